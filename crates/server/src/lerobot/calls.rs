//! The four calls of `transport.AsyncInference`.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::FutureExt;
use pirouette_policy::Value;
use tokio::sync::{Semaphore, watch};

use super::session::{Arrival, Assembly, Observed, Piece, Session};
use super::setup;
use super::wire::{self, Messages, Status};
use crate::connection::Running;
use crate::dialect::openpi;
use crate::msgpack;
use crate::pickle::{self, Class, Instance, TimedActions, write_actions};
use crate::recent::RequestRecord;
use crate::seldom::Seldom;
use crate::serve::Shared;
use crate::service::{Reply, RequestContext, ServiceError};

/// How long a client that asks for actions waits for an observation of its own.
const OBSERVATION_WAIT: Duration = Duration::from_secs(2);

/// How long the last call for actions may take to end when its client begins anew.
const RESTART_WAIT: Duration = Duration::from_millis(500);

/// One robot's side of the server.
pub(super) struct Robot {
    shared: Arc<Shared>,
    session: Arc<Session>,
    draining: watch::Receiver<bool>,
    /// Of its connection.
    number: u64,
    /// One observation at a time is on its way, so that its pieces cost one frame's memory.
    uploading: Semaphore,
    /// Calls for actions: how many wait, and how many came to an end that their client saw.
    asking: watch::Sender<(usize, u64)>,
}

/// A call for actions, which may be dropped when its client has left.
struct Asking<'a>(&'a watch::Sender<(usize, u64)>);

impl<'a> Asking<'a> {
    fn begin(asking: &'a watch::Sender<(usize, u64)>) -> Self {
        asking.send_modify(|(waiting, _)| *waiting += 1);
        Asking(asking)
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|(waiting, _)| *waiting -= 1);
    }
}

impl Robot {
    pub(super) fn new(shared: Arc<Shared>, draining: watch::Receiver<bool>, number: u64) -> Self {
        let session = Arc::default();
        let (uploading, asking) = (Semaphore::new(1), watch::Sender::default());
        Robot { shared, session, draining, number, uploading, asking }
    }

    /// Answers a call by its path: the bytes of its message.
    pub(super) async fn call(&self, path: &str, messages: Messages) -> Result<Vec<u8>, Status> {
        let patience = self.shared.options.keepalive_timeout;
        let in_time = |late| Status { code: wire::Code::DeadlineExceeded, ..Status::invalid(late) };
        match path.strip_prefix("/transport.AsyncInference/") {
            Some("Ready") => self.ready().await,
            Some("SendPolicyInstructions") => {
                let mut messages = messages;
                let received = tokio::time::timeout(patience, messages.only()).await;
                let message = received.map_err(|_| in_time("the message took too long"))??;
                self.set_up(wire::parcel(message, 1)?.data).await
            }
            Some("SendObservations") => {
                let observed = tokio::time::timeout(patience, self.receive(messages)).await;
                let observed =
                    observed.unwrap_or_else(|_| Err(in_time("the pieces took too long")));
                self.observe(observed)
            }
            Some("GetActions") => {
                let _asking = Asking::begin(&self.asking);
                let actions = self.actions().await;
                self.asking.send_modify(|(_, ended)| *ended += 1);
                actions
            }
            _ => Err(Status::unknown_method(path)),
        }
    }

    /// A client begins. Another one that asks for actions on the same connection is another robot
    /// in the same process, where gRPC shares connections: each would get the other's actions.
    async fn ready(&self) -> Result<Vec<u8>, Status> {
        let mut asking = self.asking.subscribe();
        let before = asking.borrow().1;
        // A client that left withdraws its calls; those of one that lives are answered.
        let settled = asking.wait_for(|(waiting, ended)| *waiting == 0 || *ended != before);
        let settled = tokio::time::timeout(RESTART_WAIT, settled).await.ok();
        let alone = settled.is_some_and(|seen| seen.is_ok_and(|seen| seen.1 == before));
        if !alone {
            let text = "another robot client asks for actions on this connection: clients of one \
                        process share it, so start each robot's client in a process of its own";
            return Err(Status::precondition(text));
        }
        self.session.clear();
        Ok(Vec::new())
    }

    async fn set_up(&self, data: Bytes) -> Result<Vec<u8>, Status> {
        let service = &self.shared.service;
        // LeRobot's server loads its model here; ours may still be doing so.
        let mut draining = self.draining.clone();
        tokio::select! {
            () = service.warm() => {}
            _ = draining.wait_for(|draining| *draining) => return Err(shutting_down()),
        }
        let wanted = self.unpickle(&data)?;
        let Some(config) = service.policy_config() else {
            return Err(Status::precondition("this server has no policy that a robot could fit"));
        };
        let setup = setup::read(&wanted, &config)?;
        self.session.set_up(setup);
        Ok(Vec::new())
    }

    fn unpickle(&self, data: &Bytes) -> Result<Instance, Status> {
        let read = pickle::read(data, &pickle::Limits::default());
        read.map_err(|error| Status::invalid(error.to_string()))
    }

    /// The pieces of an observation → one that fits the policy.
    async fn receive(&self, mut messages: Messages) -> Result<Observed, Status> {
        let Ok(_one) = self.uploading.try_acquire() else {
            return Err(Status::too_big("one observation of a robot at a time is received"));
        };
        let limit = self.shared.options.max_frame_bytes;
        let mut assembly = Assembly::default();
        let whole = loop {
            let Some(message) = messages.next().await? else {
                return Err(Status::invalid("the observation has no end"));
            };
            let wire::Parcel { transfer_state, data } = wire::parcel(message, 2)?;
            match assembly.add(transfer_state, data, limit) {
                Piece::More => {}
                Piece::Whole(whole) => break whole,
                Piece::TooBig => {
                    return Err(Status::too_big(format!("an observation above {limit} bytes")));
                }
                Piece::Unknown => {
                    let text = format!("transfer state {transfer_state} is unknown");
                    return Err(Status::invalid(text));
                }
            }
        };
        self.read(&whole)
    }

    fn read(&self, whole: &Bytes) -> Result<Observed, Status> {
        let received = Instant::now();
        let Some(setup) = self.session.setup() else {
            let text = "SendPolicyInstructions comes first: restart the robot client (its \
                        connection was lost, or it never called it)";
            return Err(Status::precondition(text));
        };
        let Instance { module, class, fields } = self.unpickle(whole)?;
        if class != Class::TimedObservation {
            let text = format!("a TimedObservation was expected, not a {}", class.name());
            return Err(Status::invalid(text));
        }
        let fields = Value::Map(fields);
        let wrong = |what: &str| Status::invalid(format!("TimedObservation has no {what}"));
        let Some(timestamp) = float(fields.get("timestamp")) else {
            return Err(wrong("`timestamp` that is a finite number"));
        };
        let timestep = match fields.get("timestep") {
            Some(Value::Int(step)) => i64::try_from(*step).ok(),
            _ => None,
        };
        let timestep = timestep.ok_or_else(|| wrong("`timestep` that is a whole number"))?;
        let must_go = matches!(fields.get("must_go"), Some(Value::Bool(true)));
        let raw = fields.get("observation").ok_or_else(|| wrong("`observation`"))?;
        let (observation, state) = setup.fit.observation(raw)?;
        Ok(Observed {
            observation,
            state,
            timestamp,
            timestep,
            must_go,
            module,
            received,
            decode_ms: ms(received),
            bytes: whole.len(),
            setup,
        })
    }

    /// Lets an observation in by LeRobot's rules; the client is not told which became of it.
    fn observe(&self, observed: Result<Observed, Status>) -> Result<Vec<u8>, Status> {
        let metrics = &self.shared.metrics;
        match observed {
            Ok(observed) => {
                let (step, arrival) = (observed.timestep, self.session.arrive(observed));
                metrics.observation(arrival.name());
                if !matches!(arrival, Arrival::Queued) {
                    tracing::debug!(connection = self.number, step, "{}", arrival.name());
                }
                Ok(Vec::new())
            }
            Err(status) => {
                metrics.observation(status.reason);
                Err(status)
            }
        }
    }

    /// Waits for an observation and answers it; nothing if none comes, or the server stops.
    async fn actions(&self) -> Result<Vec<u8>, Status> {
        let mut draining = self.draining.clone();
        let (observed, taken) = tokio::select! {
            biased;
            next = self.session.next() => next,
            _ = draining.wait_for(|draining| *draining) => return Ok(Vec::new()),
            () = tokio::time::sleep(OBSERVATION_WAIT) => return Ok(Vec::new()),
        };
        let _running = Running::begin(self.shared.clone());
        let (number, received) = (self.number, observed.received);
        let mut record = RequestRecord::begin(number, observed.bytes, received, Instant::now());
        record.decoded = Some(record.began);
        let mut context = RequestContext::new(received);
        context.decode_ms = observed.decode_ms;
        context.identify = self.shared.options.recorder.is_some();
        let observation = self.stretched(&observed, &context).await;
        let request = self.recorded(|| observation.clone().ok());
        let answer = match observation {
            Ok(observation) => self.infer(observation, context).await,
            Err(error) => Err(error),
        };
        let metrics = &self.shared.metrics;
        let mut identity = None;
        let (outcome, reply) = match &answer {
            Ok(reply) => {
                identity.clone_from(&reply.identity);
                record.inferred = Some(Instant::now());
                (record.timing, record.seed) = (reply.timing, reply.seed());
                ("ok", self.recorded(|| Some(openpi::response(reply.clone(), 0.0, None))))
            }
            Err(error) => (error.reason, error.text().into()),
        };
        let encoding = Instant::now();
        let pickle = answer.map(|reply| self.chunk(&observed, &reply));
        metrics.outcome(outcome);
        if pickle.is_ok() {
            metrics.stage("encode").record_ms(ms(encoding));
            metrics.stage("total").record_ms(ms(received));
            record.encoded = Some(Instant::now());
        }
        tracing::debug!(
            target: "pirouette::request",
            connection = number,
            request = observed.timestep,
            dialect = "lerobot",
            key = "-",
            outcome,
            ms = (ms(received) * 1e3).round() / 1e3,
        );
        let record = RequestRecord { sent: Instant::now(), outcome, ..record };
        self.shared.finished(record, [request, reply], identity);
        let pickle = pickle?;
        taken.answered();
        Ok(wire::actions(&pickle))
    }

    /// A frame of openpi's, where requests are recorded: never a pickle.
    fn recorded(&self, frame: impl FnOnce() -> Option<Value>) -> Bytes {
        let wanted = self.shared.options.recorder.is_some();
        let frame = wanted.then(frame).flatten();
        frame.and_then(|frame| msgpack::encode(&frame).ok()).unwrap_or_default().into()
    }

    /// The observation with its images as large as in training.
    async fn stretched(
        &self,
        observed: &Observed,
        context: &RequestContext,
    ) -> Result<Value, ServiceError> {
        let (setup, observation) = (observed.setup.clone(), observed.observation.clone());
        if !setup.fit.must_stretch(&observation) {
            return Ok(observation);
        }
        let stretching = move || setup.fit.stretch(observation);
        Ok(self.shared.stretching.run(context, stretching).await?.value)
    }

    async fn infer(
        &self,
        observation: Value,
        context: RequestContext,
    ) -> Result<Reply, ServiceError> {
        let metrics = &self.shared.metrics;
        let (asked, decode_ms) = (Instant::now(), context.decode_ms);
        // A bug in a service must end like any exception, not with a vanished connection.
        let work = AssertUnwindSafe(self.shared.service.infer(observation, context));
        let work = self.shared.before_the_end(self.draining.clone(), work.catch_unwind());
        let reply = work.await?.unwrap_or_else(|_| {
            let mut failure = ServiceError::exception("RuntimeError", "internal error");
            failure.reason = "internal";
            Err(failure)
        })?;
        metrics.stage("decode").record_ms(decode_ms);
        metrics.stage("infer").record_ms(ms(asked));
        Ok(reply)
    }

    fn chunk(&self, observed: &Observed, reply: &Reply) -> Vec<u8> {
        let dims = reply.actions.shape.last().copied().unwrap_or(0);
        let actions = reply.actions.to_f64().unwrap_or_default();
        let most = observed.setup.actions_per_chunk.saturating_mul(dims).min(actions.len());
        write_actions(&TimedActions {
            module: &observed.module,
            actions: &actions[..most],
            dims,
            timestamp: observed.timestamp,
            timestep: observed.timestep,
            period: 1.0 / self.shared.options.lerobot_fps,
        })
    }
}

/// Tells the log why a call failed, seldom enough that no client can fill it.
pub(super) fn failed(path: &str, status: &Status) {
    static LINE: Seldom = Seldom::new();
    if status.reason != "gone"
        && let Some(unsaid) = LINE.pass()
    {
        let call = path.rsplit('/').next().map(setup::text).unwrap_or_default();
        tracing::warn!(call, why = status.message, unsaid, "a LeRobot client's call failed");
    }
}

fn shutting_down() -> Status {
    Status::unavailable("the server is shutting down", "draining")
}

fn float(value: Option<&Value>) -> Option<f64> {
    let number = match value? {
        Value::Float(x) => *x,
        Value::Int(n) => *n as f64,
        _ => return None,
    };
    number.is_finite().then_some(number)
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}
