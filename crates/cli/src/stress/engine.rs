//! The engine without a server: devices that die, and the bits of its answers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use pirouette_engine::{
    BucketRule, DeviceFactory, Engine, EngineError, EngineOptions, Fault, Noise, NullDevice,
    NullTimes, Phase, Request, standard_normal,
};
use pirouette_model::config::Vision;
use pirouette_model::{Config, WeightTable};
use pirouette_testing::mutate::Mutator;

use super::{Check, Outcome, Scale};

const HORIZON: usize = 10;
const PROMPT: usize = 48;

/// Time within which anything must be answered.
const PATIENCE: Duration = Duration::from_secs(30);

fn config() -> Config {
    let vision = Vision { image: 28, depth: 1, ..Config::pi0().vision };
    Config { vision, depth: 1, vocab: 256, action_dim: 8, ..Config::pi0() }
}

fn options(rule: BucketRule) -> EngineOptions {
    let tables = vec![Arc::new(WeightTable::new(config(), 10))];
    let mut options = EngineOptions { rule, ..EngineOptions::new(tables, HORIZON, PROMPT) };
    options.restart_pause = Duration::from_millis(5);
    options.restart_pause_max = Duration::from_millis(5);
    options
}

fn factory(device: &NullDevice) -> DeviceFactory {
    let device = device.clone();
    Arc::new(move || Ok(Box::new(device.clone())))
}

/// Requests of all lengths and one to three cameras.
fn request(i: usize) -> Request {
    let side = config().vision.image;
    let image = |camera: usize| Bytes::from(vec![(i * 3 + camera) as u8; side * side * 3]);
    Request {
        previous: None,
        images: (0..1 + i % 3).map(image).collect(),
        tokens: (0..1 + i * 7 % PROMPT).map(|t| (t * i % 256) as u32).collect(),
        state: vec![i as f32 / 64.0; 8],
        noise: Noise::Seed(i as u64),
        steps: None,
        deadline: None,
        company: None,
    }
}

/// What a null device answers.
fn expected(request: &Request, seed: u64) -> Vec<f32> {
    let mut noise = vec![0.0; HORIZON * 8];
    standard_normal(seed, &mut noise);
    let mut actions = vec![0.0; noise.len()];
    let images = request.images.iter().map(|image| &image[..]);
    NullDevice::actions(images, &request.tokens, &request.state, &noise, &mut actions);
    actions
}

async fn ready(engine: &Engine) -> Result<()> {
    let began = Instant::now();
    while engine.stats().devices.iter().any(|d| d.phase != Phase::Ready) {
        if began.elapsed() > PATIENCE {
            bail!("the devices never got ready");
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(())
}

#[derive(Default)]
struct Fates {
    good: AtomicU64,
    wrong: AtomicU64,
    lost: AtomicU64,
    refused: AtomicU64,
    other: AtomicU64,
}

/// Asks until `over`; every request must end, one way or the other.
async fn client(
    engine: Arc<Engine>,
    i: usize,
    fates: Arc<Fates>,
    over: impl Fn() -> bool,
) -> Result<()> {
    let wanted = expected(&request(i), i as u64);
    while !over() {
        let outcome = match engine.submit(request(i)) {
            Ok(pending) => tokio::time::timeout(PATIENCE, pending)
                .await
                .map_err(|_| anyhow!("a request hangs"))?,
            Err(error) => Err(error),
        };
        let fate = match outcome {
            Ok(answer) if answer.actions == wanted => &fates.good,
            Ok(_) => &fates.wrong,
            Err(EngineError::DeviceFailed(_)) => &fates.lost,
            Err(EngineError::Unavailable(_)) => {
                tokio::time::sleep(Duration::from_millis(1)).await;
                &fates.refused
            }
            Err(_) => &fates.other,
        };
        fate.fetch_add(1, Relaxed);
    }
    Ok(())
}

/// One engine, killed again and again: by a panic, an error, a hang.
pub async fn faults(scale: &Scale) -> Outcome {
    let kills = scale.of(100u64, 10);
    let device = NullDevice::new(NullTimes::constant(2.0)).with_faults(move |run| {
        // A hang costs a thread for good; the engine takes two.
        let kind = run / 40 % 10;
        match run % 40 {
            39 if kind == 3 && run < 400 => Some(Fault::Hang(Duration::from_secs(5))),
            39 if kind % 2 == 0 => Some(Fault::Panic),
            39 => Some(Fault::Error("the card fell off the bus".into())),
            _ => None,
        }
    });
    let mut options = options(BucketRule::gpu(4));
    options.watchdog = Duration::from_millis(500);
    let engine = Arc::new(Engine::start(vec![factory(&device)], options)?);
    ready(&engine).await?;
    let fates = Arc::new(Fates::default());
    let mut clients = tokio::task::JoinSet::new();
    for i in 0..16 {
        let (engine, fates) = (engine.clone(), fates.clone());
        let watched = engine.clone();
        clients.spawn(client(engine, i, fates, move || watched.stats().restarts >= kills));
    }
    let (mut unready, mut seen) = (Duration::ZERO, 0);
    while !clients.is_empty() {
        let restarts = engine.stats().restarts;
        if restarts > seen {
            seen = restarts;
            let began = Instant::now();
            ready(&engine).await?;
            unready = unready.max(began.elapsed());
        }
        let joined = tokio::time::timeout(Duration::from_millis(1), clients.join_next()).await;
        if let Ok(Some(client)) = joined {
            client??;
        }
    }
    ready(&engine).await?;
    let last = engine.submit(request(5))?.await?;
    let count = |n: &AtomicU64| n.load(Relaxed);
    Ok(vec![
        Check::at_least("kills", kills as f64, engine.stats().restarts as f64),
        Check::some("good answers between them", count(&fates.good)),
        Check::some("requests lost with the engine, told so", count(&fates.lost)),
        Check::exactly("wrong answers", 0, count(&fates.wrong)),
        Check::exactly("other errors", 0, count(&fates.other)),
        Check::at_most("longest time to be back, s", 5.0, unready.as_secs_f64()),
        Check::exactly("requests left in the queue", 0, engine.stats().queue_depth as u64),
        Check::exactly("serves afterwards", 1, (last.actions == expected(&request(5), 5)).into()),
    ])
}

/// Two engines, one killed for good under load.
pub async fn one_of_two(scale: &Scale) -> Outcome {
    const BATCH: u64 = 4;
    let sound = NullDevice::new(NullTimes::constant(2.0));
    let dying = NullDevice::new(NullTimes::constant(2.0))
        .with_faults(|run| (run >= 200).then_some(Fault::Panic));
    let mut options = options(BucketRule::gpu(BATCH as usize));
    options.canary.max_age = Duration::from_secs(3600);
    let engine = Arc::new(Engine::start(vec![factory(&sound), factory(&dying)], options)?);
    ready(&engine).await?;
    let fates = Arc::new(Fates::default());
    let until = Instant::now() + Duration::from_secs(scale.of(20, 3));
    let mut clients = tokio::task::JoinSet::new();
    for i in 0..16 {
        let over = move || Instant::now() >= until;
        clients.spawn(client(engine.clone(), i, fates.clone(), over));
    }
    let (mut probes, mut unready) = (0, 0);
    while Instant::now() < until {
        unready += u64::from(engine.readiness().await.is_err());
        probes += 1;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    while let Some(client) = clients.join_next().await {
        client??;
    }
    let count = |n: &AtomicU64| n.load(Relaxed);
    Ok(vec![
        Check::some("deaths of the one", engine.stats().restarts),
        Check::some("good answers", count(&fates.good)),
        Check::some("requests lost with it", count(&fates.lost)),
        Check::at_most("which is what it held", BATCH as f64, count(&fates.lost) as f64),
        Check::exactly("wrong answers", 0, count(&fates.wrong)),
        Check::exactly("other errors", 0, count(&fates.other) + count(&fates.refused)),
        Check::some("readiness probes", probes),
        Check::exactly("not ready", 0, unready),
    ])
}

/// Random interleavings of the same requests; a device whose last bits depend on the shape.
pub async fn interleavings(scale: &Scale) -> Outcome {
    let rounds = scale.of(10_000u64, 300);
    let start = async |rule: BucketRule| -> Result<Engine> {
        let times = NullTimes(vec![(1, 0.05), (8, 0.1)]);
        let device = NullDevice::new(times).sensitive_to_shape();
        let engine = Engine::start(vec![factory(&device)], options(rule))?;
        ready(&engine).await?;
        Ok(engine)
    };
    let engine = start(BucketRule::deterministic(8, 3, PROMPT)).await?;
    let (run, different, sizes) = differing(&engine, rounds).await?;
    let ordinary = start(BucketRule::gpu(8)).await?;
    let (_, without, _) = differing(&ordinary, rounds.min(300)).await?;
    Ok(vec![
        Check::exactly("interleavings", rounds, run),
        Check::exactly("with other bits than alone", 0, different),
        Check::at_least("batch sizes met", 5.0, sizes as f64),
        Check::some("with other bits when not deterministic", without),
    ])
}

/// Interleavings run, those with other bits than alone, and the batch sizes met.
async fn differing(engine: &Engine, rounds: u64) -> Result<(u64, u64, usize)> {
    let mut random = Mutator::new(pirouette_engine::draw_seed());
    let mut alone = Vec::new();
    for i in 0..24 {
        alone.push(engine.submit(request(i))?.await?.actions);
    }
    let (mut run, mut different) = (0, 0);
    let mut sizes = std::collections::BTreeSet::new();
    for _ in 0..rounds {
        let order: Vec<usize> = (0..1 + random.below(16)).map(|_| random.below(24)).collect();
        let pending: Result<Vec<_>, _> = order.iter().map(|i| engine.submit(request(*i))).collect();
        let mut same = true;
        for (i, pending) in order.iter().zip(pending?) {
            let answer = tokio::time::timeout(PATIENCE, pending).await.context("it hangs")??;
            same &= answer.actions == alone[*i];
            sizes.insert(answer.timing.batch);
        }
        run += 1;
        different += u64::from(!same);
    }
    Ok((run, different, sizes.len()))
}
