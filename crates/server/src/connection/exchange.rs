//! One request → its answer: the service is asked, what became of it is counted, remembered and
//! sent.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::join_all;
use pirouette_engine::Company;
use pirouette_policy::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tungstenite::protocol::frame::coding::Data;

use super::{Connection, ERROR_REASON, End, INTERNAL_ERROR, ms};
use crate::carry;
use crate::dialect::openpi::{self, Asked};
use crate::dialect::{Dialect, vla_eval, vllm_omni};
use crate::msgpack;
use crate::quota::Pass;
use crate::recent::RequestRecord;
use crate::serve::Shared;
use crate::service::{Failure, Reply, ServiceError};

/// A request on its way to its answer: what is remembered of it, and recorded.
pub(super) struct Exchange {
    pub(super) record: RequestRecord,
    /// Answered as vLLM-Omni answers: its actions alone, errors as maps.
    pub(super) bare: bool,
    /// Empty while nothing has become of it.
    pub(super) outcome: &'static str,
    /// The frame or the text that it was answered with.
    pub(super) reply: Bytes,
    /// Of what answered, where it is recorded.
    pub(super) identity: Option<serde_json::Value>,
}

impl Exchange {
    /// The service has answered. `seed`: the one that was asked for.
    fn inferred(&mut self, reply: &Reply, seed: Option<u64>) {
        self.record.inferred = Some(Instant::now());
        self.record.timing = reply.timing;
        self.record.seed = seed.or(reply.seed());
        self.identity.clone_from(&reply.identity);
    }
}

/// Counts a request as being answered until it is dropped, however that ends.
pub(crate) struct Running(Arc<Shared>);

impl Running {
    pub(crate) fn begin(shared: Arc<Shared>) -> Self {
        shared.metrics.running.fetch_add(1, Relaxed);
        Running(shared)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.metrics.running.fetch_sub(1, Relaxed);
    }
}

impl<S: AsyncRead + AsyncWrite> Connection<S> {
    /// Answers a request of openpi's or a relative of its.
    pub(super) async fn answer(
        &mut self,
        request: Result<openpi::Request, ServiceError>,
        exchange: &mut Exchange,
        decode_ms: f64,
        previous_ms: Option<f64>,
    ) -> Result<(), End> {
        let asked = Instant::now();
        let response = match request {
            Err(error) => return self.tell(error, exchange).await,
            Ok(openpi::Request::Reset) => {
                self.done("reset", exchange);
                let (kind, payload) = reset(self.dialect);
                return self.send(kind, &payload).await;
            }
            Ok(openpi::Request::Infer(one)) => {
                let seed = one.1.seed;
                match self.infer(vec![Ok(*one)], exchange).await?.remove(0) {
                    Ok(reply) => {
                        exchange.inferred(&reply, seed);
                        self.done("ok", exchange);
                        match exchange.bare {
                            true => vllm_omni::response(reply.actions),
                            false => openpi::response(reply, ms(asked), previous_ms),
                        }
                    }
                    Err(error) => return self.tell(error, exchange).await,
                }
            }
            Ok(openpi::Request::Batch(observations)) => {
                let results = self.infer(observations, exchange).await?;
                if let Some(reply) = results.iter().flatten().next() {
                    exchange.inferred(reply, None);
                }
                for result in &results {
                    let outcome = result.as_ref().map_or_else(|error| error.reason, |_| "ok");
                    self.done(outcome, exchange);
                }
                let failed = results.iter().find_map(|result| result.as_ref().err());
                exchange.outcome = failed.map_or("ok", |error| error.reason);
                openpi::batch_response(results, ms(asked), previous_ms)
            }
        };
        self.shared.metrics.stage("decode").record_ms(decode_ms);
        self.shared.metrics.stage("infer").record_ms(ms(asked));
        match self.encode(&response, true) {
            Ok(bytes) => self.reply(bytes, exchange).await?,
            Err(error) => return self.tell(error, exchange).await,
        }
        self.shared.metrics.stage("total").record_ms(ms(exchange.record.received));
        Ok(())
    }

    /// Answers a message of vla-eval's. Errors leave the connection open, unless the message
    /// could not be read at all.
    pub(super) async fn act(
        &mut self,
        message: Result<vla_eval::Envelope, ServiceError>,
        exchange: &mut Exchange,
        decode_ms: f64,
    ) -> Result<(), End> {
        let (response, unreadable) = match message {
            Err(error) => {
                self.done(error.reason, exchange);
                (vla_eval::failure("message_failed", &error, 0), true)
            }
            Ok(vla_eval::Envelope { kind, seq }) => match kind {
                vla_eval::Kind::Hello => (vla_eval::hello(seq), false),
                vla_eval::Kind::Observation(map) => {
                    let acted = self.next_action(map, seq, exchange, decode_ms).await?;
                    let response = acted.unwrap_or_else(|error| {
                        self.done(error.reason, exchange);
                        vla_eval::failure("observation_failed", &error, seq)
                    });
                    (response, false)
                }
                vla_eval::Kind::EpisodeStart | vla_eval::Kind::EpisodeEnd => {
                    self.chunk.clear();
                    return Ok(());
                }
                vla_eval::Kind::Other => return Ok(()),
            },
        };
        self.say(&response, exchange).await?;
        if unreadable { Err(End::Close(INTERNAL_ERROR, "message not understood")) } else { Ok(()) }
    }

    /// The next action of the chunk, which is a new one when the last is used up.
    async fn next_action(
        &mut self,
        observation: Vec<(String, Value)>,
        seq: i128,
        exchange: &mut Exchange,
        decode_ms: f64,
    ) -> Result<Result<Value, ServiceError>, End> {
        if let Some(action) = self.chunk.pop(seq) {
            self.done("from_chunk", exchange);
            return Ok(Ok(action));
        }
        let received = exchange.record.received;
        let context = vla_eval::context(received, decode_ms);
        let asked = Instant::now();
        let observations = vec![Ok((Value::Map(observation), context))];
        let reply = match self.infer(observations, exchange).await?.remove(0) {
            Ok(reply) => reply,
            Err(error) => return Ok(Err(error)),
        };
        self.shared.metrics.stage("decode").record_ms(decode_ms);
        self.shared.metrics.stage("infer").record_ms(ms(asked));
        exchange.inferred(&reply, None);
        if let Err(error) = self.chunk.fill(&reply.actions, self.shared.options.vla_eval_actions) {
            return Ok(Err(error));
        }
        self.shared.metrics.stage("total").record_ms(ms(received));
        self.done("ok", exchange);
        let action = self.chunk.pop(seq);
        Ok(action.ok_or_else(|| ServiceError::exception("RuntimeError", "an empty chunk")))
    }

    /// Asks the service for every observation at once: the engine makes batches of them. One
    /// result each, in their order. Where the connection ends before, all are counted as gone.
    async fn infer(
        &mut self,
        mut observations: Vec<Asked>,
        exchange: &mut Exchange,
    ) -> Result<Vec<Result<Reply, ServiceError>>, End> {
        let recorded = self.shared.options.recorder.is_some();
        observations.iter_mut().flatten().for_each(|(_, context)| context.identify = recorded);
        if observations.len() > 1 {
            let company = Company::default();
            let contexts = observations.iter_mut().flatten().map(|(_, context)| context);
            contexts.for_each(|context| context.company = Some(company.clone()));
        }
        let (shared, draining) = (self.shared.clone(), self.draining.clone());
        let service = &shared.service;
        let n = observations.len();
        let pass = self.pass.as_ref();
        let _admission = match pass.map(|pass| pass.admit(Instant::now(), n)).transpose() {
            Ok(admission) => admission,
            Err(error) => return Ok(vec![Err(error); n]),
        };
        let one = |asked: Asked| async move {
            let (observation, context) = asked?;
            if context.ticket.as_ref().is_some_and(|ticket| ticket.is_superseded()) {
                return Err(ServiceError::superseded());
            }
            // A bug in a service must end like any exception, not with a vanished connection.
            let work = AssertUnwindSafe(service.infer(observation, context)).catch_unwind();
            work.await.unwrap_or_else(|_| {
                let mut failure = ServiceError::exception("RuntimeError", "internal error");
                failure.reason = "internal";
                Err(failure)
            })
        };
        let all = join_all(observations.into_iter().map(one));
        let answered = self.while_listening(shared.before_the_end(draining, all)).await;
        if answered.is_err() {
            (0..n).for_each(|_| self.done("gone", exchange));
        }
        Ok(answered?.unwrap_or_else(|error| vec![Err(error); n]))
    }

    /// Counts a request by what became of it, and adds a line to the request log: never what was
    /// asked or answered, never a key.
    fn done(&self, outcome: &'static str, exchange: &mut Exchange) {
        exchange.outcome = outcome;
        self.shared.metrics.outcome(outcome);
        if tracing::enabled!(target: "pirouette::request", tracing::Level::DEBUG) {
            let key = self.pass.as_ref().map(Pass::name);
            tracing::debug!(
                target: "pirouette::request",
                connection = self.number,
                request = self.messages,
                dialect = %self.dialect,
                key = key.as_deref().unwrap_or("-"),
                outcome,
                ms = (ms(exchange.record.received) * 1e3).round() / 1e3,
            );
        }
    }

    /// `answered`: a chunk was inferred for it, whose stages are counted.
    fn encode(&self, response: &Value, answered: bool) -> Result<Vec<u8>, ServiceError> {
        let encoding = Instant::now();
        let bytes = msgpack::encode(response).map_err(|error| {
            let mut failure = ServiceError::exception("ValueError", error.to_string());
            failure.reason = "internal";
            failure
        });
        if answered {
            self.shared.metrics.stage("encode").record_ms(ms(encoding));
        }
        bytes
    }

    /// Sends what can always be encoded.
    async fn say(&mut self, response: &Value, exchange: &mut Exchange) -> Result<(), End> {
        let bytes = self.encode(response, exchange.outcome == "ok").map_err(|error| {
            tracing::error!(%error, "an answer can't be encoded");
            End::Close(INTERNAL_ERROR, ERROR_REASON)
        })?;
        self.reply(bytes, exchange).await
    }

    /// Sends an error as text; one that openpi's server would have raised ends the connection.
    async fn tell(&mut self, error: ServiceError, exchange: &mut Exchange) -> Result<(), End> {
        self.done(error.reason, exchange);
        if exchange.bare {
            return self.say(&vllm_omni::failure(&error), exchange).await;
        }
        let text = error.text();
        exchange.reply = text.into();
        self.send(Data::Text, &exchange.reply).await?;
        match error.failure {
            Failure::Exception => Err(End::Close(INTERNAL_ERROR, ERROR_REASON)),
            Failure::Refusal => Ok(()),
        }
    }

    async fn reply(&mut self, bytes: Vec<u8>, exchange: &mut Exchange) -> Result<(), End> {
        exchange.record.encoded = Some(Instant::now());
        self.shared.metrics.carried.fetch_add(carry::carrying().into(), Relaxed);
        exchange.reply = bytes.into();
        self.send(Data::Binary, &exchange.reply).await
    }
}

/// What a reset is answered with.
fn reset(dialect: Dialect) -> (Data, Vec<u8>) {
    const DONE: &str = "reset successful";
    if dialect != Dialect::VllmOmni {
        return (Data::Text, DONE.into());
    }
    let map = Value::Map(vec![("status".into(), Value::Str(DONE.into()))]);
    // Two short strings always fit.
    (Data::Binary, msgpack::encode(&map).unwrap_or_default())
}
