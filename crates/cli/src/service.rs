//! Observation → policy → engine → policy → answer: the service behind the server.

use std::sync::Arc;
use std::time::Duration;

use pirouette_engine::{Engine, Noise, Request};
use pirouette_policy::{Policy, PolicyError, Value, contract};
use pirouette_server::{
    Reply, RequestContext, Service, ServiceError, ServiceFuture, render_engine,
};

use crate::rtc;

/// A policy over an engine.
pub struct PolicyService {
    policy: Arc<Policy>,
    engine: Engine,
}

impl PolicyService {
    /// Joins the two.
    pub fn new(policy: Policy, engine: Engine) -> Self {
        PolicyService { policy: Arc::new(policy), engine }
    }

    /// The engine, for readiness and the drain.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    async fn answer(
        &self,
        observation: Value,
        context: RequestContext,
    ) -> Result<Reply, ServiceError> {
        // Resizing takes milliseconds: not on the socket's threads.
        let policy = Arc::clone(&self.policy);
        let prepared = tokio::task::spawn_blocking(move || policy.prepare(&observation))
            .await
            .map_err(|_| ServiceError::exception("RuntimeError", "preprocessing failed"))?
            .map_err(refused)?;
        if prepared.dropped_tokens > 0 {
            tracing::warn!(dropped = prepared.dropped_tokens, "the prompt was cut at its end");
        }
        let drawn = context.seed.is_none() && context.noise.is_none();
        let noise = match (&context.noise, context.seed) {
            (Some(given), _) => {
                let c = self.policy.config();
                if given.shape != [c.horizon, c.action_dim] {
                    let message = format!(
                        "noise has shape {:?}, the model takes [{}, {}]",
                        given.shape, c.horizon, c.action_dim
                    );
                    return Err(ServiceError::exception("ValueError", message));
                }
                Noise::Given(given.values.clone())
            }
            (None, Some(seed)) => Noise::Seed(seed),
            (None, None) => Noise::Drawn,
        };
        let model = &self.engine.options().tables[0].config;
        let previous = rtc::previous_chunk(model, &self.policy, &prepared, &context.rtc)?;
        let input = prepared.input.clone();
        let pending = self.engine.submit(Request {
            images: input.images,
            tokens: input.tokens,
            state: input.state,
            noise,
            previous,
            steps: context.steps,
            deadline: context.deadline,
        })?;
        let answer = pending.await?;
        let actions = self.policy.finish(&prepared, &answer.actions).map_err(refused)?;
        // The seed the server drew: with it the same request gives the same actions again.
        let seed = answer.seed.filter(|_| drawn).map(|s| ("seed".into(), Value::Int(s.into())));
        let asked = context.rtc.return_model_actions;
        let chunk = if asked { rtc::model_actions(&self.policy, &answer) } else { None };
        Ok(Reply {
            actions,
            model_ms: answer.timing.run.total_ms,
            extras: seed.into_iter().chain(chunk).collect(),
        })
    }
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
            while self.engine.wait_ready().await.is_err() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        })
    }

    fn metadata(&self) -> Value {
        Value::Map(self.policy.config().metadata.clone())
    }

    fn infer(
        &self,
        observation: Value,
        context: RequestContext,
    ) -> ServiceFuture<'_, Result<Reply, ServiceError>> {
        Box::pin(self.answer(observation, context))
    }

    fn readiness(&self) -> ServiceFuture<'_, Result<(), String>> {
        Box::pin(self.engine.readiness())
    }

    fn contract(&self) -> String {
        serde_json::to_string_pretty(&contract(self.policy.config())).unwrap_or_default()
    }

    fn metrics(&self, out: &mut String) {
        render_engine(&self.engine.stats(), out);
    }
}
