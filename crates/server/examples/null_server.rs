//! A complete server whose model takes a given time and returns made-up actions: for trying
//! clients, for load experiments, and as the example of a [`Service`].
//!
//! `cargo run --release -p pirouette-server --example null_server -- --port 8000 --times 1:30,8:60`

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pirouette_engine::{
    BatchRecord, BucketRule, DeviceFactory, Engine, EngineOptions, Noise, NullDevice, NullTimes,
    Request, StatsSnapshot,
};
use pirouette_model::config::Vision;
use pirouette_model::{Config, WeightTable};
use pirouette_policy::{NdArray, Scalar, Value};
use pirouette_server::{
    ApiKeys, Reply, RequestContext, ServeOptions, Service, ServiceError, ServiceFuture, Spans, Tls,
    check_exposure, render_engine, timing,
};

const USAGE: &str = "null_server [--host 127.0.0.1] [--port 8000] [--times 1:30,8:60] \
    [--horizon 50] [--dims 8] [--max-batch 8] [--load-ms 0] [--keepalive-ms 20000] \
    [--dialect openpi] [--api-key-file F] [--tls-cert F --tls-key F] [--insecure]";

struct NullService {
    engine: Engine,
    dims: usize,
}

impl NullService {
    /// The little the null model looks at: a state and a prompt.
    fn request(
        &self,
        observation: &Value,
        context: &mut RequestContext,
    ) -> Result<Request, ServiceError> {
        let Value::Map(map) = observation else {
            return Err(ServiceError::exception("TypeError", "the observation must be a map"));
        };
        let get = |key: &str| map.iter().find(|(k, _)| k == key).map(|(_, v)| v);
        let Some(Value::Str(prompt)) = get("prompt").or(get("task_description")) else {
            return Err(ServiceError::exception("KeyError", "'prompt'"));
        };
        let config = self.engine.options().tables[0].config;
        let states = ["observation/state", "state", "states", "observation/joint_position"];
        let state = states.iter().find_map(|key| get(key));
        let Some(Value::Array(state)) = state else {
            return Err(ServiceError::exception("KeyError", "'observation/state'"));
        };
        let mut values: Vec<f32> = match state.dtype {
            Scalar::F32 => state
                .data
                .chunks_exact(4)
                .map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]]))
                .collect(),
            Scalar::F64 => state
                .data
                .chunks_exact(8)
                .map(|c| {
                    f64::from_le_bytes([c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]]) as f32
                })
                .collect(),
            _ => return Err(ServiceError::exception("ValueError", "the state must be float")),
        };
        values.resize(config.action_dim, 0.0);
        let noise = match (&context.noise, context.seed) {
            (Some(given), _) => Noise::Given(given.values.clone()),
            (None, Some(seed)) => Noise::Seed(seed),
            (None, None) => Noise::Drawn,
        };
        let side = config.vision.image;
        Ok(Request {
            images: vec![vec![0; side * side * 3].into()],
            tokens: prompt.bytes().take(16).map(u32::from).chain([1]).take(16).collect(),
            state: values,
            noise,
            previous: None,
            steps: context.steps,
            deadline: context.deadline,
            company: context.company.take(),
        })
    }
}

impl Service for NullService {
    fn warm(&self) -> ServiceFuture<'_, ()> {
        Box::pin(async {
            while self.engine.wait_ready().await.is_err() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        })
    }

    fn metadata(&self) -> Value {
        Value::Map(vec![("policy".into(), Value::Str("null".into()))])
    }

    fn infer(
        &self,
        observation: Value,
        mut context: RequestContext,
    ) -> ServiceFuture<'_, Result<Reply, ServiceError>> {
        Box::pin(async move {
            let drawn = context.seed.is_none() && context.noise.is_none();
            let preparing = Instant::now();
            let request = self.request(&observation, &mut context)?;
            let prepare = preparing.elapsed();
            let answer = context.answer(self.engine.submit(request)?).await?;
            let rows = answer.actions.chunks(answer.action_dim);
            let data: Vec<u8> = rows
                .flat_map(|row| row[..self.dims].iter().flat_map(|v| f64::from(*v).to_le_bytes()))
                .collect();
            let shape = vec![answer.horizon, self.dims];
            let seed = answer.seed.filter(|_| drawn).map(|s| ("seed".into(), Value::Int(s.into())));
            let spans = Spans { prepare, ..Spans::default() };
            let explained = context.explain.then(|| timing(&context, &spans, &answer.timing));
            Ok(Reply {
                actions: NdArray { dtype: Scalar::F64, shape, data: data.into() },
                model_ms: answer.timing.run.total_ms,
                timing: Some(answer.timing),
                extras: seed.into_iter().chain(explained).collect(),
                identity: None,
            })
        })
    }

    fn roboarena(&self) -> Option<Value> {
        let entries = [
            ("image_resolution", Value::List(vec![Value::Int(224), Value::Int(224)])),
            ("needs_wrist_camera", Value::Bool(true)),
            ("n_external_cameras", Value::Int(1)),
            ("needs_stereo_camera", Value::Bool(false)),
            ("needs_session_id", Value::Bool(false)),
            ("action_space", Value::Str("joint_position".into())),
        ];
        Some(Value::Map(entries.map(|(key, value)| (key.to_string(), value)).into()))
    }

    fn readiness(&self) -> ServiceFuture<'_, Result<(), String>> {
        Box::pin(self.engine.readiness())
    }

    fn metrics(&self, out: &mut String) {
        render_engine(&self.engine.stats(), out);
    }

    fn stats(&self) -> Option<StatsSnapshot> {
        Some(self.engine.stats())
    }

    fn batches_after(&self, id: u64) -> (Vec<BatchRecord>, u64) {
        self.engine.batches_after(id)
    }
}

struct Arguments {
    address: SocketAddr,
    times: NullTimes,
    horizon: usize,
    dims: usize,
    max_batch: usize,
    load: Duration,
    insecure: bool,
    tls: [Option<String>; 2],
    serve: ServeOptions,
}

fn arguments() -> Result<Arguments, Box<dyn std::error::Error>> {
    let mut a = Arguments {
        address: "127.0.0.1:8000".parse()?,
        times: NullTimes::constant(30.0),
        horizon: 50,
        dims: 8,
        max_batch: 8,
        load: Duration::ZERO,
        insecure: false,
        tls: [None, None],
        serve: ServeOptions::default(),
    };
    let mut given = std::env::args().skip(1);
    while let Some(flag) = given.next() {
        if flag == "--insecure" {
            a.insecure = true;
            continue;
        }
        let value = given.next().ok_or(USAGE)?;
        match flag.as_str() {
            "--host" => a.address.set_ip(value.parse()?),
            "--port" => a.address.set_port(value.parse()?),
            "--horizon" => a.horizon = value.parse()?,
            "--dims" => a.dims = value.parse()?,
            "--max-batch" => a.max_batch = value.parse()?,
            "--load-ms" => a.load = Duration::from_millis(value.parse()?),
            "--keepalive-ms" => {
                a.serve.keepalive_interval = Duration::from_millis(value.parse()?);
                a.serve.keepalive_timeout = a.serve.keepalive_interval;
            }
            "--dialect" => a.serve.dialect = value.parse()?,
            "--api-key-file" => a.serve.api_keys = Some(ApiKeys::read(value.as_ref())?),
            "--tls-cert" => a.tls[0] = Some(value),
            "--tls-key" => a.tls[1] = Some(value),
            "--reload-ms" => a.serve.reload_interval = Duration::from_millis(value.parse()?),
            "--times" => a.times = value.parse()?,
            _ => return Err(USAGE.into()),
        }
    }
    a.serve.tls = match &a.tls {
        [Some(certificate), Some(key)] => Some(Tls::read(certificate.as_ref(), key.as_ref())?),
        [None, None] => None,
        _ => return Err(USAGE.into()),
    };
    let guard = a.serve.api_keys.is_some() || a.serve.tls.is_some();
    check_exposure(a.address, guard, a.insecure)?;
    Ok(a)
}

fn engine(a: &Arguments) -> Result<Engine, pirouette_engine::EngineError> {
    let vision = Vision { image: 28, depth: 1, ..Config::pi0().vision };
    let config = Config { vision, depth: 1, vocab: 256, ..Config::pi0() };
    let tables = vec![Arc::new(WeightTable::new(config, 10))];
    let mut options = EngineOptions::new(tables, a.horizon, 16);
    options.rule = BucketRule::gpu(a.max_batch);
    options.warm = vec![options.bucket(1, 16)];
    let (device, load) = (NullDevice::new(a.times.clone()), a.load);
    let open: DeviceFactory = Arc::new(move || {
        std::thread::sleep(load);
        Ok(Box::new(device.clone()))
    });
    Engine::start(vec![open], options)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments = arguments()?;
    let dims = arguments.dims.clamp(1, Config::pi0().action_dim);
    let service = Arc::new(NullService { engine: engine(&arguments)?, dims });
    let listener = pirouette_server::bind(arguments.address).await?;
    println!("listening on {}", axum::serve::Listener::local_addr(&listener)?);
    let mut termination = pirouette_server::Termination::new();
    let served =
        pirouette_server::serve(listener, service, arguments.serve, termination.told()).await;
    println!("{}", if served.drained { "drained" } else { "gave up draining" });
    Ok(())
}
