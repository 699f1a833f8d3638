//! A small model on null devices, and requests for it.
#![allow(dead_code)] // each test file uses its part

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use pirouette_engine::{
    BucketRule, DeviceFactory, Engine, EngineOptions, Fault, Noise, NullDevice, NullTimes, Request,
};
use pirouette_model::config::Vision;
use pirouette_model::{Config, WeightTable};

pub const HORIZON: usize = 5;

pub fn config() -> Config {
    let vision = Vision { image: 28, depth: 1, ..Config::pi0().vision };
    Config { vision, depth: 1, vocab: 100, action_dim: 4, ..Config::pi0() }
}

pub fn options(max_batch: usize) -> EngineOptions {
    let tables = vec![Arc::new(WeightTable::new(config(), 3))];
    let mut options = EngineOptions::new(tables, HORIZON, 48);
    options.rule = BucketRule::gpu(max_batch);
    options.restart_pause = Duration::from_millis(20);
    options.warm = vec![options.bucket(1, 16)];
    options
}

pub fn factory(device: &NullDevice) -> DeviceFactory {
    let device = device.clone();
    Arc::new(move || Ok(Box::new(device.clone())))
}

/// An engine on one null device that takes `table` (batch, ms).
pub fn engine(table: &[(usize, f64)], options: EngineOptions) -> Engine {
    let device = NullDevice::new(NullTimes(table.to_vec()));
    Engine::start(vec![factory(&device)], options).unwrap()
}

/// The same with faults.
pub fn faulty(
    ms: f64,
    options: EngineOptions,
    plan: impl Fn(u64) -> Option<Fault> + Send + Sync + 'static,
) -> Engine {
    let device = NullDevice::new(NullTimes::constant(ms)).with_faults(plan);
    Engine::start(vec![factory(&device)], options).unwrap()
}

pub fn request(i: usize) -> Request {
    let side = config().vision.image;
    Request {
        images: vec![Bytes::from(vec![i as u8; side * side * 3])],
        tokens: vec![1, 2, i as u32 % 100],
        state: vec![0.25, -0.5, i as f32, 1.0],
        noise: Noise::Seed(i as u64),
        previous: None,
        steps: None,
        deadline: None,
        company: None,
    }
}

pub fn due(i: usize, ms: u64) -> Request {
    Request { deadline: Some(Instant::now() + Duration::from_millis(ms)), ..request(i) }
}

/// What the null device must answer to a request.
pub fn expected(request: &Request, seed: u64) -> Vec<f32> {
    let mut noise = vec![0.0; HORIZON * 4];
    pirouette_engine::standard_normal(seed, &mut noise);
    let mut actions = vec![0.0; noise.len()];
    let images = request.images.iter().map(|image| &image[..]);
    NullDevice::actions(images, &request.tokens, &request.state, &noise, &mut actions);
    actions
}

/// Waits until a condition holds, five seconds at most.
pub async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < Duration::from_secs(5), "never happened: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
