//! A service over a real engine whose device tells its stages.
#![allow(dead_code)] // each test file uses its part

use std::sync::Arc;
use std::time::Duration;

use pirouette_engine::{
    BatchRecord, BucketRule, DeviceFactory, Engine, EngineOptions, Noise, NullDevice, NullTimes,
    Request, StatsSnapshot,
};
use pirouette_model::config::Vision;
use pirouette_model::{
    BackendError, Config, Device, Executable, Inputs, Program, StageTimes, WeightTable,
};
use pirouette_policy::{NdArray, Scalar, Value};
use pirouette_server::{Reply, RequestContext, Service, ServiceError, ServiceFuture};

/// A null device that says a tenth of its time was vision, three prefill, six denoise.
struct Staged(NullDevice);

struct StagedExecutable(Box<dyn Executable>);

impl Device for Staged {
    fn name(&self) -> String {
        "staged <null> & \"co\"".into()
    }

    fn compile(&mut self, program: Arc<Program>) -> Result<Box<dyn Executable>, BackendError> {
        Ok(Box::new(StagedExecutable(self.0.compile(program)?)))
    }

    fn weight_bytes(&self) -> u64 {
        6_000_000_000
    }
}

impl Executable for StagedExecutable {
    fn program(&self) -> &Arc<Program> {
        self.0.program()
    }

    fn run(
        &mut self,
        inputs: &Inputs<'_>,
        actions: &mut [f32],
    ) -> Result<StageTimes, BackendError> {
        let run = self.0.run(inputs, actions)?;
        Ok(StageTimes {
            vision_ms: run.total_ms * 0.1,
            prefill_ms: run.total_ms * 0.3,
            denoise_ms: run.total_ms * 0.6,
            ..run
        })
    }
}

pub struct EngineService {
    pub engine: Engine,
}

impl EngineService {
    /// Batches of up to four, each `ms` long.
    pub fn start(ms: f64) -> Arc<Self> {
        let vision = Vision { image: 28, depth: 1, ..Config::pi0().vision };
        let config = Config { vision, depth: 1, vocab: 256, ..Config::pi0() };
        let mut options = EngineOptions::new(vec![Arc::new(WeightTable::new(config, 10))], 10, 16);
        options.rule = BucketRule::gpu(4);
        let open: DeviceFactory =
            Arc::new(move || Ok(Box::new(Staged(NullDevice::new(NullTimes::constant(ms))))));
        Arc::new(EngineService { engine: Engine::start(vec![open], options).unwrap() })
    }
}

impl Service for EngineService {
    fn warm(&self) -> ServiceFuture<'_, ()> {
        Box::pin(async {
            while self.engine.wait_ready().await.is_err() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
    }

    fn metadata(&self) -> Value {
        Value::Map(vec![])
    }

    fn infer(
        &self,
        observation: Value,
        mut context: RequestContext,
    ) -> ServiceFuture<'_, Result<Reply, ServiceError>> {
        Box::pin(async move {
            let Value::Map(map) = observation else { panic!("the server promised a map") };
            let state = match map.iter().find(|(k, _)| k == "state") {
                Some((_, Value::Float(v))) => *v as f32,
                _ => return Err(ServiceError::exception("KeyError", "'state'")),
            };
            let config = self.engine.options().tables[0].config;
            let side = config.vision.image;
            let answer = self
                .engine
                .submit(Request {
                    previous: None,
                    images: vec![vec![0; side * side * 3].into()],
                    tokens: vec![1, 2, 3],
                    state: vec![state; config.action_dim],
                    noise: context.seed.map_or(Noise::Drawn, Noise::Seed),
                    steps: None,
                    deadline: context.deadline,
                    company: context.company.take(),
                })?
                .await?;
            let data: Vec<u8> =
                answer.actions.iter().flat_map(|v| f64::from(*v).to_le_bytes()).collect();
            let shape = vec![answer.horizon, answer.action_dim];
            let seed = answer.seed.map(|s| ("seed".to_string(), Value::Int(s.into())));
            Ok(Reply {
                actions: NdArray { dtype: Scalar::F64, shape, data: data.into() },
                model_ms: answer.timing.run.total_ms,
                timing: Some(answer.timing),
                extras: seed.into_iter().collect(),
                identity: None,
            })
        })
    }

    fn readiness(&self) -> ServiceFuture<'_, Result<(), String>> {
        Box::pin(self.engine.readiness())
    }

    fn stats(&self) -> Option<StatsSnapshot> {
        Some(self.engine.stats())
    }

    fn batches_after(&self, id: u64) -> (Vec<BatchRecord>, u64) {
        self.engine.batches_after(id)
    }
}
