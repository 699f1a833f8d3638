//! A real policy over an engine whose device computes nothing, and whose runs a test can hold.
#![allow(dead_code)] // each test file uses its part

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use pirouette_engine::{
    BucketRule, DeviceFactory, Engine, EngineOptions, Noise, NullDevice, NullTimes, Request,
};
use pirouette_model::config::Vision;
use pirouette_model::{Config, WeightTable};
use pirouette_policy::config::named;
use pirouette_policy::{NormStats, Policy, Tokenizer, Value};
use pirouette_server::{
    Preparation, Reply, RequestContext, ServeOptions, Service, ServiceError, ServiceFuture, Spans,
    serve, timing,
};

use super::Raw;

/// Side of the model's images here.
pub const SIDE: usize = 28;

pub struct Arm {
    pub policy: Arc<Policy>,
    pub engine: Engine,
    pub preparation: Preparation,
}

impl Service for Arm {
    fn warm(&self) -> ServiceFuture<'_, ()> {
        Box::pin(async {
            while self.engine.wait_ready().await.is_err() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
    }

    fn metadata(&self) -> Value {
        Value::Map(self.policy.config().metadata.clone())
    }

    fn infer(
        &self,
        observation: Value,
        mut context: RequestContext,
    ) -> ServiceFuture<'_, Result<Reply, ServiceError>> {
        Box::pin(async move {
            let (policy, scene) = (self.policy.clone(), context.scene);
            let work = move || match scene {
                true => policy.prepare_scene(observation),
                false => policy.prepare(&observation),
            };
            let preparing = self.preparation.run(&context, work).await?;
            let prepared =
                preparing.value.map_err(|e| ServiceError::exception(e.exception(), e.message()))?;
            let input = prepared.input.clone();
            let noise = context.seed.map_or(Noise::Drawn, Noise::Seed);
            let pending = self.engine.submit(Request {
                previous: None,
                images: input.images,
                tokens: input.tokens,
                state: input.state,
                noise,
                steps: None,
                deadline: context.deadline,
                company: context.company.take(),
            })?;
            let answer = context.answer(pending).await?;
            let actions = self
                .policy
                .finish(&prepared, &answer.actions)
                .map_err(|e| ServiceError::exception(e.exception(), e.message()))?;
            let (prepare_wait, prepare) = (preparing.waited, preparing.took);
            let spans = Spans { prepare_wait, prepare, ..Spans::default() };
            let explained = context.explain.then(|| timing(&context, &spans, &answer.timing));
            let model_ms = answer.timing.run.total_ms;
            let timing = Some(answer.timing);
            Ok(Reply {
                actions,
                model_ms,
                timing,
                extras: explained.into_iter().collect(),
                identity: None,
            })
        })
    }

    fn roboarena(&self) -> Option<Value> {
        self.policy.roboarena()
    }

    fn readiness(&self) -> ServiceFuture<'_, Result<(), String>> {
        Box::pin(self.engine.readiness())
    }
}

/// A served arm.
pub struct Served {
    pub address: SocketAddr,
    pub arm: Arc<Arm>,
    held: Arc<AtomicBool>,
}

impl Served {
    pub async fn start(config: &str, options: ServeOptions) -> Served {
        Served::taking(0.0, config, options).await
    }

    /// Every run takes these milliseconds.
    pub async fn taking(ms: f64, config: &str, options: ServeOptions) -> Served {
        let testdata = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../testdata");
        let tokenizer = testdata.join("D_preprocess/tokenizer/tok_bpe.model");
        let tokenizer = Arc::new(Tokenizer::from_file(&tokenizer).unwrap());
        let config = named(config).unwrap();
        let (horizon, tokens) = (config.horizon, config.max_token_len);
        let policy = Policy::new(config, &NormStats::default(), tokenizer, SIDE).unwrap();
        let vision = Vision { image: SIDE, depth: 1, ..Config::pi05().vision };
        let model = Config { vision, depth: 1, ..Config::pi05() };
        let table = Arc::new(WeightTable::new(model, 10));
        let mut engine = EngineOptions::new(vec![table], horizon, tokens);
        engine.rule = BucketRule::gpu(8);
        engine.watchdog = Duration::from_secs(60);
        let held = Arc::new(AtomicBool::new(false));
        let gate = held.clone();
        let device = NullDevice::new(NullTimes::constant(ms)).with_faults(move |_| {
            while gate.load(SeqCst) {
                std::thread::sleep(Duration::from_millis(1));
            }
            None
        });
        let open: DeviceFactory = Arc::new(move || Ok(Box::new(device.clone())));
        let engine = Engine::start(vec![open], engine).unwrap();
        let preparation = Preparation::new(2, 64);
        let arm = Arc::new(Arm { policy: Arc::new(policy), engine, preparation });
        let listener = pirouette_server::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = axum::serve::Listener::local_addr(&listener).unwrap();
        tokio::spawn(serve(listener, arm.clone() as _, options, std::future::pending()));
        Served { address, arm, held }
    }

    /// Runs that begin from now on do not end, until [`Served::release`].
    pub fn hold(&self) {
        self.held.store(true, SeqCst);
    }

    pub fn release(&self) {
        self.held.store(false, SeqCst);
    }

    pub fn busy(&self) -> bool {
        self.arm.engine.stats().devices[0].busy
    }

    pub fn queued(&self) -> usize {
        self.arm.engine.stats().queue_depth
    }

    /// A websocket on a path; nothing was read from it yet.
    pub async fn open(&self, path: &str) -> Raw {
        let stream = tokio::net::TcpStream::connect(self.address).await.unwrap();
        let mut raw = Raw(stream);
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        );
        raw.write(request.as_bytes()).await;
        assert!(raw.head().await.starts_with("HTTP/1.1 101 "));
        raw
    }

    /// A websocket that has its metadata.
    pub async fn client(&self) -> Raw {
        let mut raw = self.open("/").await;
        assert_eq!(raw.frame().await.opcode, 2);
        raw
    }
}
