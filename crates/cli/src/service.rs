//! Observation → policy → engine → policy → answer: the service behind the server.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use pirouette_cuda::gauge::Gauge;
use pirouette_engine::{BatchRecord, Noise, Request, StatsSnapshot};
use pirouette_policy::{PolicyConfig, PolicyError, Value};
use pirouette_server::{
    GpuReading, Method, Page, PageRequest, Preparation, Reply, RequestContext, Seldom, Service,
    ServiceError, ServiceFuture, Spans, render_engine, timing,
};

use crate::device;
use crate::model::{Model, Served};
use crate::rtc;

/// A policy over an engine.
pub struct PolicyService {
    served: Arc<Served>,
    preparation: Preparation,
    /// Whether the actions are made up.
    null: bool,
    /// Sensors of the GPUs it works on.
    gauges: Vec<(String, Gauge)>,
}

impl PolicyService {
    /// Puts a service before a model.
    pub fn new(served: Served) -> Result<Self> {
        let null = served.plan().is_null()?;
        let preparation = Preparation::per_core(served.plan().queue);
        let gauges = device::gauges(&served.plan().devices);
        Ok(PolicyService { served: Arc::new(served), preparation, null, gauges })
    }

    /// The policy and the engine of this moment.
    pub fn model(&self) -> Arc<Model> {
        self.served.model()
    }

    /// `POST /swap`: other weights, with their statistics and tokenizer, for what is served.
    async fn swap(&self, body: &[u8]) -> Page {
        let body = if body.is_empty() { b"{}" } else { body };
        let wanted: SwapRequest = match serde_json::from_slice(body) {
            Ok(wanted) => wanted,
            Err(error) => {
                let text = format!("the body must be {{\"checkpoint\": \"DIR\"}}: {error}\n");
                return Page::text(400, text);
            }
        };
        let served = Arc::clone(&self.served);
        // The log is told by whoever swaps: the client may not have waited.
        let swap = move || {
            served.swap(wanted.checkpoint).inspect_err(|why| {
                tracing::error!("not swapped, the old checkpoint serves on: {why:#}");
            })
        };
        match tokio::task::spawn_blocking(swap).await {
            Ok(Ok(report)) => {
                let (devices, changed) = (report.devices, report.changed);
                let seconds = report.took.as_secs_f64();
                let done = serde_json::json!({
                    "devices": devices, "other_weights": changed, "seconds": seconds,
                });
                Page::json(200, done.to_string() + "\n")
            }
            Ok(Err(why)) => {
                Page::text(409, format!("not swapped, the old checkpoint serves on: {why:#}\n"))
            }
            Err(_) => Page::text(500, "not swapped: a bug, see the log\n"),
        }
    }

    async fn answer(
        &self,
        observation: Value,
        mut context: RequestContext,
    ) -> Result<Reply, ServiceError> {
        // Statistics, tokenizer and weights of one checkpoint, from beginning to end.
        let model = self.model();
        model.engine.admit(context.deadline)?;
        // Decoding and resizing images take milliseconds: not on the socket's threads. Where there
        // is nothing of it to do, going to another thread and back would take the longest.
        let light = !context.scene && model.policy.is_light(&observation);
        if light {
            model.engine.expect();
        }
        let (preparing, scene) = (Arc::clone(&model), context.scene);
        let work = move || {
            let policy = &preparing.policy;
            match scene {
                true => policy.prepare_scene(observation),
                false => policy.prepare(&observation),
            }
        };
        let preparing = match light {
            true => Preparation::here(work),
            false => self.preparation.run(&context, work).await?,
        };
        let (waited, took) = (preparing.waited, preparing.took);
        let prepared = preparing.value.map_err(refused)?;
        static CUT: Seldom = Seldom::new();
        if prepared.dropped_tokens > 0
            && let Some(unsaid) = CUT.pass()
        {
            let dropped = prepared.dropped_tokens;
            tracing::warn!(dropped, unsaid, "the prompt was cut at its end");
        }
        let drawn = context.seed.is_none() && context.noise.is_none();
        let noise = noise(&context, model.policy.config())?;
        let sizes = &model.engine.options().tables[0].config;
        let previous = rtc::previous_chunk(sizes, &model.policy, &prepared, &context.rtc)?;
        let input = prepared.input.clone();
        let pending = model.engine.submit(Request {
            images: input.images,
            tokens: input.tokens,
            state: input.state,
            noise,
            previous,
            steps: context.steps,
            deadline: context.deadline,
            company: context.company.take(),
        })?;
        let answer = context.answer(pending).await?;
        let finishing = Instant::now();
        let actions = model.policy.finish(&prepared, &answer.actions).map_err(refused)?;
        // The seed the server drew: with it the same request gives the same actions again.
        let seed = answer.seed.filter(|_| drawn).map(|s| ("seed".into(), Value::Int(s.into())));
        let mut extras: Vec<(String, Value)> = seed.into_iter().collect();
        if context.explain {
            let finish = finishing.elapsed();
            let spans = Spans { prepare_wait: waited, prepare: took, finish };
            extras.push(timing(&context, &spans, &answer.timing));
        }
        if self.null {
            extras.push(("null_device".into(), Value::Bool(true)));
        }
        if context.rtc.return_model_actions {
            extras.extend(rtc::model_actions(&model.policy, &answer));
        }
        let (model_ms, timing) = (answer.timing.run.total_ms, Some(answer.timing));
        let identity = context.identify.then(|| identity(&model));
        Ok(Reply { actions, model_ms, timing, extras, identity })
    }
}

/// What a model computes with: its configuration, and the fingerprints of its devices.
fn identity(model: &Model) -> serde_json::Value {
    let devices = model.engine.stats().devices.into_iter().map(|device| {
        let fingerprint = device.fingerprint.map(|f| format!("{f:016x}"));
        serde_json::json!({ "name": device.name, "fingerprint": fingerprint })
    });
    let (c, table) = (model.policy.config(), &model.engine.options().tables[0]);
    let mut identity = serde_json::json!({
        "config": c.name,
        "family": c.family.name(),
        "horizon": c.horizon,
        "steps": table.steps,
        "devices": devices.collect::<Vec<_>>(),
    });
    if table.config.rope_bf16 {
        identity["rope"] = "bf16".into();
    }
    identity
}

/// The noise a request asks for.
pub fn noise(context: &RequestContext, c: &PolicyConfig) -> Result<Noise, ServiceError> {
    match (&context.noise, context.seed) {
        (Some(given), _) if given.shape != [c.horizon, c.action_dim] => {
            let message = format!(
                "noise has shape {:?}, the model takes [{}, {}]",
                given.shape, c.horizon, c.action_dim
            );
            Err(ServiceError::exception("ValueError", message))
        }
        (Some(given), _) => Ok(Noise::Given(given.values.clone())),
        (None, Some(seed)) => Ok(Noise::Seed(seed)),
        (None, None) => Ok(Noise::Drawn),
    }
}

/// Body of `POST /swap`.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct SwapRequest {
    /// Without one, the checkpoint that is served is read again.
    checkpoint: Option<PathBuf>,
}

/// A policy's error as the client sees it.
pub fn refused(error: PolicyError) -> ServiceError {
    ServiceError {
        detail: Some(error.remedy().to_string()),
        ..ServiceError::exception(error.exception(), error.message())
    }
}

impl Service for PolicyService {
    fn warm(&self) -> ServiceFuture<'_, ()> {
        Box::pin(async {
            while self.model().engine.wait_ready().await.is_err() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        })
    }

    fn metadata(&self) -> Value {
        Value::Map(self.model().policy.config().metadata.clone())
    }

    fn infer(
        &self,
        observation: Value,
        context: RequestContext,
    ) -> ServiceFuture<'_, Result<Reply, ServiceError>> {
        Box::pin(self.answer(observation, context))
    }

    fn readiness(&self) -> ServiceFuture<'_, Result<(), String>> {
        Box::pin(async { self.model().engine.readiness().await })
    }

    fn alive(&self) -> Result<(), String> {
        self.model().engine.beyond_help().map_or(Ok(()), Err)
    }

    fn roboarena(&self) -> Option<Value> {
        self.model().policy.roboarena()
    }

    fn policy_config(&self) -> Option<PolicyConfig> {
        Some(self.model().policy.config().clone())
    }

    fn contract(&self) -> String {
        let mut card = serde_json::json!(self.model().policy.contract());
        if self.null {
            card["null_device"] = "no model runs: the actions are made up".into();
        }
        serde_json::to_string_pretty(&card).unwrap_or_default()
    }

    fn metrics(&self, out: &mut String) {
        render_engine(&self.model().engine.stats(), out);
    }

    fn page(&self, request: PageRequest) -> ServiceFuture<'_, Option<Page>> {
        Box::pin(async move {
            match (request.method, request.path.as_str()) {
                (Method::Post, "/swap") => Some(self.swap(&request.body).await),
                _ => None,
            }
        })
    }

    fn identity(&self) -> serde_json::Value {
        identity(&self.model())
    }

    fn stats(&self) -> Option<StatsSnapshot> {
        Some(self.model().engine.stats())
    }

    fn gpus(&self) -> Vec<GpuReading> {
        let read = |(name, gauge): &(String, Gauge)| {
            let reading = gauge.read();
            GpuReading {
                name: name.clone(),
                power_watts: reading.power_watts,
                sm_mhz: reading.sm_mhz,
                memory_mhz: reading.memory_mhz,
                temperature_celsius: reading.temperature_celsius,
                memory_used_bytes: reading.memory_used_bytes,
            }
        };
        self.gauges.iter().map(read).collect()
    }

    fn batches_after(&self, id: u64) -> (Vec<BatchRecord>, u64) {
        self.model().engine.batches_after(id)
    }
}
