//! Clients that do not behave: mutated frames, deaths, half-open sockets.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use pirouette_policy::Value;
use pirouette_server::load::run;
use pirouette_server::load::socket::{Address, Received, Socket, frame};
use pirouette_server::msgpack;
use pirouette_testing::mutate::Mutator;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use super::server::Server;
use super::{Check, Outcome, Scale};

/// Hostile clients at once.
const HOSTILE: usize = 8;

/// Longest time the server may leave a frame without an answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// A mask; which one does not matter.
const MASK: [u8; 4] = [0x12, 0x34, 0x56, 0x78];

async fn connect(address: &Address) -> Result<Socket> {
    let mut socket = timeout(PATIENCE, Socket::connect(address, None)).await??;
    timeout(PATIENCE, socket.receive()).await.context("no metadata")??;
    Ok(socket)
}

/// What is measured of the server before and after.
struct Footprint {
    memory_bytes: u64,
    descriptors: u64,
}

impl Footprint {
    fn of(server: &Server) -> Result<Self> {
        let (memory_bytes, descriptors) = (server.memory_bytes()?, server.descriptors()?);
        Ok(Footprint { memory_bytes, descriptors })
    }

    /// Waits until nobody is connected, then compares.
    async fn compare(&self, server: &Server, grown_mib: f64) -> Result<Vec<Check>> {
        let began = Instant::now();
        let (mut open, mut descriptors) = (f64::INFINITY, u64::MAX);
        while began.elapsed() < PATIENCE {
            open = server.metric("pirouette_connections").await?;
            // Asking takes a descriptor, too, which is given back a moment later.
            sleep(Duration::from_millis(50)).await;
            descriptors = server.descriptors()?;
            if open == 0.0 && descriptors <= self.descriptors {
                break;
            }
        }
        let grown = server.memory_bytes()? as f64 - self.memory_bytes as f64;
        let waiting = server.metric("pirouette_queue_depth").await?;
        Ok(vec![
            Check::exactly("connections left open", 0, open as u64),
            Check::exactly("requests left in the queue", 0, waiting as u64),
            Check::at_most(
                "descriptors, as many as before",
                self.descriptors as f64,
                descriptors as f64,
            ),
            Check::at_most("memory growth, MiB", grown_mib, grown / 1048576.0),
        ])
    }
}

/// A client that asks the same thing again and again and must get the same actions.
async fn good_client(
    address: Address,
    request: Bytes,
    over: Arc<AtomicBool>,
) -> Result<(u64, u64)> {
    let mut socket = connect(&address).await?;
    let (mut same, mut wrong, mut first) = (0, 0, None);
    while !over.load(Relaxed) {
        socket.send(&request).await?;
        let answer = timeout(PATIENCE, socket.receive()).await.context("a good client waits")??;
        let actions = match &answer {
            Received::Answer(bytes) => match msgpack::decode(bytes) {
                Ok(Value::Map(map)) => map.into_iter().find(|(k, _)| k == "actions"),
                _ => None,
            },
            Received::Refusal(_) => None,
        };
        match (&first, actions) {
            (None, Some(actions)) => first = Some(actions),
            (Some(known), Some(actions)) if *known == actions => same += 1,
            _ => wrong += 1,
        }
        sleep(Duration::from_millis(2)).await;
    }
    Ok((same, wrong))
}

fn seeded(mut observation: Value) -> Result<Bytes> {
    if let Value::Map(map) = &mut observation {
        map.push(("seed".into(), Value::Int(7)));
    }
    Ok(frame(2, &msgpack::encode(&observation)?, MASK))
}

/// Requests, small and large, of the right form; what the hostile ones are mutated from.
async fn corpus(server: &Server) -> Result<Vec<Vec<u8>>> {
    let whole = server.observation(8).await?;
    let Value::Map(map) = &whole else { bail!("an observation is a map") };
    let mut corpus = vec![msgpack::encode(&whole)?];
    for drop in 0..map.len() {
        let mut less = map.clone();
        less.remove(drop);
        less.push(("deadline_ms".into(), Value::Float(1000.0)));
        corpus.push(msgpack::encode(&Value::Map(less))?);
    }
    corpus.push(msgpack::encode(&Value::Map(vec![
        ("noise".into(), Value::Nil),
        ("num_steps".into(), Value::Int(10)),
        ("seed".into(), Value::Int(1)),
    ]))?);
    Ok(corpus)
}

#[derive(Default)]
struct Fates {
    answered: AtomicU64,
    refused: AtomicU64,
    closed: AtomicU64,
    unanswered: AtomicU64,
}

/// Sends mutated frames until `left` is used up, reconnecting as often as it is thrown out.
async fn hostile(
    address: Address,
    corpus: Arc<Vec<Vec<u8>>>,
    seed: u64,
    left: Arc<AtomicU64>,
    fates: Arc<Fates>,
) -> Result<()> {
    let mut mutator = Mutator::new(seed);
    let mut socket = None;
    while left.fetch_update(Relaxed, Relaxed, |n| n.checked_sub(1)).is_ok() {
        let mut open = match socket.take() {
            Some(open) => open,
            None => connect(&address).await.context("a new connection was not served")?,
        };
        // Mostly the message; now and then the frame around it.
        let raw = mutator.below(8) == 0;
        let bytes = if raw {
            let frames: Vec<Vec<u8>> =
                corpus.iter().take(2).map(|m| frame(2, m, MASK).to_vec()).collect();
            Bytes::from(mutator.mutate(&frames))
        } else {
            frame(2, &mutator.mutate(&corpus), MASK)
        };
        let exchange = async {
            open.send(&bytes).await?;
            if raw {
                // It may wait for the rest of a frame: tell it that there is none.
                open.finish().await?;
            }
            open.receive().await
        };
        match timeout(PATIENCE, exchange).await {
            Err(_) => fates.unanswered.fetch_add(1, Relaxed),
            Ok(Ok(Received::Answer(_))) if !raw => {
                socket = Some(open);
                fates.answered.fetch_add(1, Relaxed)
            }
            Ok(Ok(Received::Answer(_))) => fates.answered.fetch_add(1, Relaxed),
            Ok(Ok(Received::Refusal(_))) => {
                open.kill(true);
                fates.refused.fetch_add(1, Relaxed)
            }
            Ok(Err(_)) => fates.closed.fetch_add(1, Relaxed),
        };
    }
    Ok(())
}

/// Mutated messages and frames; a good client beside them.
pub async fn frames(scale: &Scale) -> Outcome {
    let count = scale.of(1_000_000u64, 3_000);
    let server = Server::start(&"0.2".parse().map_err(anyhow::Error::msg)?, 8, &[]).await?;
    let (address, corpus) = (server.address()?, Arc::new(corpus(&server).await?));
    let over = Arc::new(AtomicBool::new(false));
    let request = seeded(server.observation(224).await?)?;
    let good = tokio::spawn(good_client(address.clone(), request, over.clone()));
    let (left, fates) = (Arc::new(AtomicU64::new(count / 10)), Arc::new(Fates::default()));
    let seed = pirouette_engine::draw_seed();
    let mut before = None;
    // A tenth warms the server's buffers; what it holds then is what it may hold afterwards.
    for (round, part) in [count / 10, count - count / 10].into_iter().enumerate() {
        left.store(part, Relaxed);
        let mut clients = tokio::task::JoinSet::new();
        for client in 0..HOSTILE as u64 {
            let seed = seed.wrapping_add(client * 2 + round as u64 * 1000);
            let (address, corpus) = (address.clone(), corpus.clone());
            clients.spawn(hostile(address, corpus, seed, left.clone(), fates.clone()));
        }
        while let Some(client) = clients.join_next().await {
            client?.with_context(|| format!("seed {seed}"))?;
        }
        before.get_or_insert(Footprint::of(&server)?);
    }
    over.store(true, Relaxed);
    let (same, wrong) = good.await??;
    let total = |n: &AtomicU64| n.load(Relaxed);
    let sum = [&fates.answered, &fates.refused, &fates.closed, &fates.unanswered];
    let mut checks = vec![
        Check::exactly("frames", count, sum.iter().map(|n| total(n)).sum()),
        Check::some("answered", total(&fates.answered)),
        Check::some("refused by a text frame", total(&fates.refused)),
        Check::some("closed", total(&fates.closed)),
        Check::exactly("left without an answer", 0, total(&fates.unanswered)),
        Check::some("answers of the good client, all the same", same),
        Check::exactly("wrong answers of the good client", 0, wrong),
        Check::exactly("panics", 0, internal_errors(&server).await?),
    ];
    let before = before.context("no first round")?;
    checks.extend(before.compare(&server, scale.of(16.0, 64.0)).await?);
    checks.push(Check::exactly("clean exit on SIGTERM", 1, server.stop().await?.into()));
    Ok(checks)
}

/// Requests that ended in a caught panic.
async fn internal_errors(server: &Server) -> Result<u64> {
    let text = server.page("/metrics").await?;
    let line = text.lines().find(|l| l.contains("outcome=\"internal\""));
    Ok(line.and_then(|l| l.rsplit(' ').next()?.parse().ok()).unwrap_or(0))
}

/// One client that dies, in one of five ways.
async fn death(address: &Address, request: &Bytes, way: u64) -> Result<()> {
    if way == 0 {
        drop(TcpStream::connect(&address.authority).await?);
        return Ok(());
    }
    let mut socket = timeout(PATIENCE, Socket::connect(address, None)).await??;
    match way {
        1 => {}
        2 => socket.send(&request.slice(..request.len() / 2)).await?,
        3 => socket.send(request).await?,
        _ => {
            timeout(PATIENCE, socket.receive()).await??;
            socket.send(request).await?;
            timeout(PATIENCE, socket.receive()).await??;
        }
    }
    socket.kill(true);
    Ok(())
}

/// Connect and die: descriptors, memory and places must come back.
pub async fn kills(scale: &Scale) -> Outcome {
    let count = scale.of(100_000u64, 1_000);
    let server = Server::start(&"2".parse().map_err(anyhow::Error::msg)?, 8, &[]).await?;
    let (address, request) = (server.address()?, seeded(server.observation(32).await?)?);
    let (mut before, died) = (None, Arc::new(AtomicU64::new(0)));
    for part in [count / 10, count - count / 10] {
        let left = Arc::new(AtomicU64::new(part));
        let mut clients = tokio::task::JoinSet::new();
        for _ in 0..HOSTILE {
            let (address, request, left) = (address.clone(), request.clone(), left.clone());
            let died = died.clone();
            clients.spawn(async move {
                while let Ok(n) = left.fetch_update(Relaxed, Relaxed, |n| n.checked_sub(1)) {
                    death(&address, &request, n % 5).await?;
                    died.fetch_add(1, Relaxed);
                }
                anyhow::Ok(())
            });
        }
        while let Some(client) = clients.join_next().await {
            client??;
        }
        if before.is_none() {
            // Settled first: connections that are just ending are not what is there before.
            sleep(Duration::from_millis(500)).await;
            before = Some(Footprint::of(&server)?);
        }
    }
    let before = before.context("no first round")?;
    let mut checks = vec![
        Check::exactly("deaths", count, died.load(Relaxed)),
        Check::exactly("panics", 0, internal_errors(&server).await?),
    ];
    checks.extend(before.compare(&server, scale.of(16.0, 64.0)).await?);
    // And it still serves.
    death(&address, &request, 4).await.context("afterwards")?;
    checks.push(Check::exactly("clean exit on SIGTERM", 1, server.stop().await?.into()));
    Ok(checks)
}

/// Keeps one socket half open, in one of three ways, again whenever the server ends it.
async fn hang_around(address: Address, request: Bytes, way: usize, open: Arc<AtomicU64>) {
    loop {
        if way == 2 {
            if let Ok(mut socket) = Socket::connect(&address, None).await {
                open.fetch_add(1, Relaxed);
                let _ = socket.send(&request.slice(..request.len() / 2)).await;
                while socket.receive().await.is_ok() {}
                open.fetch_sub(1, Relaxed);
            }
        } else if let Ok(mut stream) = TcpStream::connect(&address.authority).await {
            open.fetch_add(1, Relaxed);
            if way == 1 {
                let _ = stream.write_all(b"GET / HTTP/1.1\r\nHost: ").await;
            }
            let mut rest = Vec::new();
            let _ = stream.read_to_end(&mut rest).await;
            open.fetch_sub(1, Relaxed);
        }
        sleep(Duration::from_millis(20)).await;
    }
}

/// Half-open sockets beside good clients: the good ones must not notice.
pub async fn half_open(scale: &Scale) -> Outcome {
    let count = scale.of(1_000usize, 200);
    let server = Server::start(&scale.times, 64, &[]).await?;
    let options = server.load(64, scale.of(20.0, 3.0)).await?;
    let (address, request) = (server.address()?, seeded(server.observation(32).await?)?);
    let (mut without, mut with) = (f64::INFINITY, f64::INFINITY);
    let (mut fewest, mut errors) = (u64::MAX, 0);
    // In turn, and the best of each: other work on the machine hits both alike.
    for _ in 0..scale.of(3, 1) {
        let report = run(&options).await?;
        without = without.min(report.latency.p99_ms);
        errors += report.errors.values().sum::<u64>();
        let open = Arc::new(AtomicU64::new(0));
        let mut sockets = tokio::task::JoinSet::new();
        for i in 0..count {
            let (address, request) = (address.clone(), request.clone());
            sockets.spawn(hang_around(address, request, i % 3, open.clone()));
        }
        let began = Instant::now();
        while open.load(Relaxed) < count as u64 * 95 / 100 {
            if began.elapsed() > PATIENCE {
                bail!("only {} of {count} half-open sockets could be opened", open.load(Relaxed));
            }
            sleep(Duration::from_millis(20)).await;
        }
        let report = run(&options).await?;
        fewest = fewest.min(open.load(Relaxed));
        with = with.min(report.latency.p99_ms);
        errors += report.errors.values().sum::<u64>();
        sockets.shutdown().await;
    }
    Ok(vec![
        Check::at_least("half-open at the end of a round", count as f64 * 0.9, fewest as f64),
        Check::exactly("failed requests of the good clients", 0, errors),
        Check::at_most("p99 with them, of without", scale.of(1.05, 2.0), with / without),
        Check::exactly("clean exit on SIGTERM", 1, server.stop().await?.into()),
    ])
}
