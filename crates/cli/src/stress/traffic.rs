//! Clients that behave: throughput, overhead, overload, replicas, swaps.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use pirouette_engine::NullTimes;
use pirouette_server::load::run;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::server::Server;
use super::{Check, Outcome, Scale};

fn slowed(times: &NullTimes, by: f64) -> NullTimes {
    NullTimes(times.0.iter().map(|(batch, ms)| (*batch, ms * by)).collect())
}

/// A server stopped by SIGTERM must drain and say so.
async fn drained(server: Server) -> Result<Check> {
    Ok(Check::exactly("clean exit on SIGTERM", 1, server.stop().await?.into()))
}

/// 64 clients in a closed loop, against offline batches of 64.
pub async fn throughput(scale: &Scale) -> Outcome {
    const DEADLINE_MS: f64 = 1500.0;
    let server = Server::start(&scale.times, 64, &[]).await?;
    let mut options = server.load(64, scale.of(60.0, 4.0)).await?;
    options.deadline = Some(Duration::from_secs_f64(DEADLINE_MS / 1e3));
    let report = run(&options).await?;
    let offline = scale.capacity(64);
    Ok(vec![
        Check::at_least(
            "of the offline batch throughput",
            scale.of(0.85, 0.5),
            report.goodput() / offline,
        ),
        Check::at_most("p99 latency, ms (the deadline)", DEADLINE_MS, report.latency.p99_ms),
        Check::exactly("failed requests", 0, report.errors.values().sum()),
        drained(server).await?,
    ])
}

/// One client at the speed of the model.
pub async fn overhead(scale: &Scale) -> Outcome {
    let flag = scale.busy_poll.map(|ms| format!("--busy-poll={ms}"));
    let flags: Vec<&str> = flag.iter().map(String::as_str).collect();
    let server = Server::start(&scale.times, 1, &flags).await?;
    let (address, observation) = (server.address()?, server.observation(224).await?);
    let lasts = Duration::from_secs(scale.of(20, 2));
    let plain = move || {
        let at_once = super::client::ask(&address, &observation, lasts, Duration::ZERO)?;
        // A robot's 20 a second: everything has gone to sleep in between.
        let paced = super::client::ask(&address, &observation, lasts, Duration::from_millis(50))?;
        anyhow::Ok((at_once, paced))
    };
    let (plain, paced) = tokio::task::spawn_blocking(plain).await??;
    // The same through the load generator's client, whose own tasks and threads are in it too.
    let mut options = server.load(1, scale.of(15.0, 2.0)).await?;
    options.warm_up = 20;
    let load = run(&options).await?.over_model;
    // Three images and some more: what the same bytes take without any server in between.
    let (bytes, pause) = (3 * 224 * 224 * 3 + 500, scale.times.of(1));
    let count = scale.of(1000, 100);
    let awake = scale.busy_poll.is_some_and(|ms| ms > 0.0);
    let bare = move || super::bare::exchange(bytes, pause, count, awake);
    let bare = tokio::task::spawn_blocking(bare).await??;
    let (over, socket) = (plain.over_model, plain.over_server);
    Ok(vec![
        Check::at_most("p50, ms", scale.of(0.3, 10.0), over.p50_ms),
        Check::at_most("p99, ms", scale.of(1.0, 100.0), over.p99_ms),
        Check::told("of that outside the service (socket, codec), p50, ms", socket.p50_ms),
        Check::told("at 20 requests a second, p50, ms", paced.over_model.p50_ms),
        Check::told("at 20 requests a second, p99, ms", paced.over_model.p99_ms),
        Check::told("through the load generator's client, p50, ms", load.p50_ms),
        Check::told("through the load generator's client, p99, ms", load.p99_ms),
        Check::told("the same bytes over a bare socket, p50, ms", bare.p50_ms),
        Check::told("the same bytes over a bare socket, p99, ms", bare.p99_ms),
        drained(server).await?,
    ])
}

/// Twice what can be served: what is answered, how fast the rest is told, memory.
pub async fn overload(scale: &Scale) -> Outcome {
    const BATCH: usize = 16;
    // The short form is slower by this: it must hold on a machine that has other things to do.
    let slower = scale.of(1, 4);
    let times = slowed(&scale.times, slower.into());
    let capacity = scale.capacity(BATCH) / f64::from(slower);
    let server = Server::start(&times, BATCH, &[]).await?;
    let mut options = server.load(128, scale.overload().as_secs_f64()).await?;
    options.rate = Some(2.0 * capacity);
    options.deadline = Some(Duration::from_millis(400) * slower);
    let load = tokio::spawn(async move { run(&options).await });
    let mut memory = Vec::new();
    while !load.is_finished() {
        memory.push(server.memory_bytes()? as f64);
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let report = load.await??;
    let refused = report.errors.get("TimeoutError").copied().unwrap_or(0);
    let others = report.errors.values().sum::<u64>() - refused;
    let quarter = (memory.len() / 4).max(1);
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let second = mean(&memory[quarter.min(memory.len() - 1)..(2 * quarter).min(memory.len())]);
    let last = mean(&memory[memory.len() - quarter..]);
    Ok(vec![
        Check::at_least(
            "good answers, of the capacity",
            scale.of(0.95, 0.4),
            report.goodput() / capacity,
        ),
        Check::some("refusals", refused),
        Check::at_most("p99 until refused, ms", scale.of(5.0, 1000.0), report.refusal.p99_ms),
        Check::exactly("other errors", 0, others),
        Check::at_most("memory growth, MiB", scale.of(4.0, 64.0), (last - second) / 1048576.0),
        drained(server).await?,
    ])
}

/// The same load on one engine and on two.
pub async fn replicas(scale: &Scale) -> Outcome {
    // Slower than measured, so that the clients are not what is measured.
    let times = slowed(&scale.times, 2.0);
    let mut rates = Vec::new();
    for count in ["1", "2"] {
        let server = Server::start(&times, 8, &["--replicas", count]).await?;
        let report = run(&server.load(48, scale.of(30.0, 4.0)).await?).await?;
        if let Some(error) = report.first_error {
            bail!("a request failed: {error}");
        }
        rates.push(report.goodput());
    }
    Ok(vec![Check::at_least("two engines, of one", scale.of(1.9, 1.4), rates[1] / rates[0])])
}

/// Checkpoints are swapped one after the other while clients ask at 80 % of the capacity.
pub async fn swaps(scale: &Scale) -> Outcome {
    const BATCH: usize = 8;
    let server = Server::start(&scale.times, BATCH, &[]).await?;
    let mut options = server.load(64, scale.of(180.0, 8.0)).await?;
    options.rate = Some(scale.capacity(BATCH) * 0.8);
    let load = tokio::spawn(async move { run(&options).await });
    let (mut swaps, mut slowest) = (0.0, 0.0f64);
    while !load.is_finished() {
        let began = Instant::now();
        swap(&server.admin()).await?;
        swaps += 1.0;
        slowest = slowest.max(began.elapsed().as_secs_f64());
    }
    let report = load.await??;
    let descriptors = server.descriptors()?;
    Ok(vec![
        Check::at_least("swaps", scale.of(100.0, 3.0), swaps),
        Check::some("requests answered meanwhile", report.answered),
        Check::exactly("requests failed", 0, report.errors.values().sum()),
        Check::at_most("slowest swap, s", 30.0, slowest),
        Check::at_most("descriptors afterwards", 100.0, descriptors as f64),
        drained(server).await?,
    ])
}

/// `POST /swap` with an empty body: what is served is loaded again.
async fn swap(admin: &str) -> Result<()> {
    let mut stream = tokio::net::TcpStream::connect(admin).await?;
    let request = format!("POST /swap HTTP/1.1\r\nHost: {admin}\r\nContent-Length: 0\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    let reading = stream.read_to_string(&mut answer);
    tokio::time::timeout(Duration::from_secs(120), reading).await.context("a swap hangs")??;
    if !answer.starts_with("HTTP/1.1 200") {
        bail!("a swap failed: {answer}");
    }
    Ok(())
}
