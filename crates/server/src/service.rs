//! What the server needs from whoever computes actions.

use std::future::Future;
use std::pin::Pin;
use std::time::Instant;

use pirouette_engine::{Answer, BatchRecord, Company, EngineError, Pending, StatsSnapshot, Timing};
use pirouette_policy::{NdArray, PolicyConfig, Value};

use crate::newest::Ticket;
use crate::pages::{Page, PageRequest};
use crate::rtc::RtcFields;
use crate::seldom::Seldom;

/// A boxed future, so that services can be trait objects.
pub type ServiceFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Observations in, actions out. Dropping the future of [`Service::infer`] withdraws the request.
pub trait Service: Send + Sync + 'static {
    /// Resolves once the service has been warm: clients get their metadata then. A service that
    /// fails later stays warm; its requests fail one by one.
    fn warm(&self) -> ServiceFuture<'_, ()>;

    /// The map every client gets unasked after connecting.
    fn metadata(&self) -> Value;

    /// One request. `observation` is a map without the optional keys, which are in `context`.
    fn infer(
        &self,
        observation: Value,
        context: RequestContext,
    ) -> ServiceFuture<'_, Result<Reply, ServiceError>>;

    /// Whether a known forward gave the known answer lately; if not, why. The server bounds the
    /// time it waits for this.
    fn readiness(&self) -> ServiceFuture<'_, Result<(), String>>;

    /// Whether it may yet answer again by itself; if not, why.
    fn alive(&self) -> Result<(), String> {
        Ok(())
    }

    /// RoboArena's `PolicyServerConfig` as a map, if the policy's robot is DROID's.
    fn roboarena(&self) -> Option<Value> {
        None
    }

    /// The policy's configuration, for clients whose own names are fitted to it.
    fn policy_config(&self) -> Option<PolicyConfig> {
        None
    }

    /// The contract card, JSON.
    fn contract(&self) -> String {
        "{}".into()
    }

    /// Appends its own metrics in Prometheus text form.
    fn metrics(&self, _out: &mut String) {}

    /// A page of the service's own, or `None` for a path it does not know. Keys are checked
    /// before; a [`Method::Post`](crate::Method) came through the admin listener.
    fn page(&self, _request: PageRequest) -> ServiceFuture<'_, Option<Page>> {
        Box::pin(async { None })
    }

    /// What computes, for recordings: configuration, steps, devices with their fingerprints.
    fn identity(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    /// Counts and devices of its engine, if it has one.
    fn stats(&self) -> Option<StatsSnapshot> {
        None
    }

    /// Sensors of the GPUs it works on. May block for some milliseconds.
    fn gpus(&self) -> Vec<GpuReading> {
        Vec::new()
    }

    /// Its engine's [`pirouette_engine::Engine::batches_after`].
    fn batches_after(&self, _id: u64) -> (Vec<BatchRecord>, u64) {
        (Vec::new(), 0)
    }
}

/// One reading of a GPU's sensors; a sensor that it does not have is `None`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GpuReading {
    /// `NVIDIA H200`, ….
    pub name: String,
    /// Power drawn, watts.
    pub power_watts: Option<f64>,
    /// Clock of the multiprocessors, MHz.
    pub sm_mhz: Option<u32>,
    /// Clock of the memory, MHz.
    pub memory_mhz: Option<u32>,
    /// Temperature of the chip, °C.
    pub temperature_celsius: Option<u32>,
    /// Memory used by all processes, bytes.
    pub memory_used_bytes: Option<u64>,
}

/// What came with a request besides the observation.
#[derive(Clone, Debug)]
pub struct RequestContext {
    /// When its last byte arrived.
    pub received: Instant,
    /// `deadline_ms` after that.
    pub deadline: Option<Instant>,
    /// `seed`: of the noise.
    pub seed: Option<u64>,
    /// `noise`: instead of a seed.
    pub noise: Option<GivenNoise>,
    /// `num_steps`: Euler steps.
    pub steps: Option<usize>,
    /// `explain`: whether the answer tells where its time went ([`crate::timing`]).
    pub explain: bool,
    /// `newest_wins`: whether a newer request of the session makes this one pointless.
    pub newest_wins: bool,
    /// `session`: the name of the session; without one it is the connection.
    pub session: Option<String>,
    /// Its place in the session, where `newest_wins` is asked for.
    pub ticket: Option<Ticket>,
    /// Whether the observation has vla-eval's keys (`images`, `task_description`, `states`) and
    /// not the robot's.
    pub scene: bool,
    /// The keys of real-time chunking.
    pub rtc: RtcFields,
    /// What decoding the frame took.
    pub decode_ms: f64,
    /// The other observations of its frame. Goes with the request to the engine, so that they run
    /// together; whoever keeps it longer keeps them waiting.
    pub company: Option<Company>,
    /// The answer is recorded: [`Reply::identity`] is wanted.
    pub identify: bool,
}

impl RequestContext {
    /// A request without any optional key.
    pub fn new(received: Instant) -> Self {
        RequestContext {
            received,
            deadline: None,
            seed: None,
            noise: None,
            steps: None,
            explain: false,
            newest_wins: false,
            session: None,
            ticket: None,
            scene: false,
            rtc: RtcFields::default(),
            decode_ms: 0.0,
            company: None,
            identify: false,
        }
    }

    /// Takes the optional keys out of the observation of a request received now, as the server
    /// does with each frame.
    ///
    /// # Errors
    /// `ValueError`, with the key and what its value must be.
    pub fn take(observation: &mut Vec<(String, Value)>) -> Result<Self, ServiceError> {
        crate::fields::take(observation, Instant::now())
    }

    /// Resolves when a newer request of the session arrives, if that matters.
    pub async fn superseded(&self) {
        match &self.ticket {
            Some(ticket) => ticket.superseded().await,
            None => std::future::pending().await,
        }
    }

    /// Resolves when the deadline has passed, if there is one.
    pub async fn late(&self) {
        match self.deadline {
            Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
            None => std::future::pending().await,
        }
    }

    /// Awaits the engine's answer; gives it up when a newer request of the session arrives before
    /// a device has begun.
    ///
    /// # Errors
    /// The engine's, or that the request was superseded.
    pub async fn answer(&self, mut pending: Pending) -> Result<Answer, ServiceError> {
        tokio::select! {
            biased;
            answer = &mut pending => return Ok(answer?),
            () = self.superseded() => {}
        }
        if pending.has_started() { Ok(pending.await?) } else { Err(ServiceError::superseded()) }
    }
}

/// Noise given by the client.
#[derive(Clone, Debug, PartialEq)]
pub struct GivenNoise {
    /// `[horizon, action_dim]` as the client claims; the service checks them.
    pub shape: [usize; 2],
    /// Row-major values, all finite.
    pub values: Vec<f32>,
}

/// A service's answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply {
    /// `[horizon, dims]`, float64 as openpi sends them.
    pub actions: NdArray,
    /// The model's share of the time, for `policy_timing.infer_ms`.
    pub model_ms: f64,
    /// The engine's account of it, for those who watch.
    pub timing: Option<Timing>,
    /// Further keys, after openpi's own. Only scalars, strings and lists of them: openpi's chunk
    /// broker slices every array it finds (right for a chunk alone, one row an action).
    pub extras: Vec<(String, Value)>,
    /// [`Service::identity`] of what answered, where the request asked for it: by the time it is
    /// written down, another checkpoint may serve.
    pub identity: Option<serde_json::Value>,
}

impl Reply {
    /// The seed the answer tells, if it does: the one the service drew.
    pub fn seed(&self) -> Option<u64> {
        self.extras.iter().find_map(|(key, value)| match value {
            Value::Int(seed) if key == "seed" => u64::try_from(*seed).ok(),
            _ => None,
        })
    }
}

/// What becomes of the connection after an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// As in openpi: the text, then close 1011.
    Exception,
    /// The text only; the next request is welcome (overload, missed deadline, restart).
    Refusal,
}

/// Why there is no answer. The client sees `type: message` as the last line of a text frame, so
/// neither may hold paths or other secrets of the server.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{python_type}: {message}")]
pub struct ServiceError {
    /// What becomes of the connection.
    pub failure: Failure,
    /// Label in the metrics: `invalid`, `overloaded`, `deadline`, ….
    pub reason: &'static str,
    /// Name of the Python exception: `KeyError`, `ValueError`, ….
    pub python_type: String,
    /// Its text, one line.
    pub message: String,
    /// A line of explanation before the last one.
    pub detail: Option<String>,
}

impl ServiceError {
    /// A request that is wrong: openpi's server would have raised this.
    pub fn exception(python_type: impl Into<String>, message: impl Into<String>) -> Self {
        ServiceError {
            failure: Failure::Exception,
            reason: "invalid",
            python_type: python_type.into(),
            message: message.into(),
            detail: None,
        }
    }

    /// A request that is refused for a reason that may pass.
    pub fn refusal(reason: &'static str, message: impl Into<String>) -> Self {
        ServiceError {
            failure: Failure::Refusal,
            reason,
            python_type: "RuntimeError".into(),
            message: message.into(),
            detail: None,
        }
    }

    /// A request that a newer one of its session has made pointless.
    pub fn superseded() -> Self {
        Self::refusal("superseded", "superseded by a newer request of the session")
    }

    /// A request whose deadline has passed.
    pub fn late() -> Self {
        ServiceError {
            python_type: "TimeoutError".into(),
            ..Self::refusal("deadline", "the deadline passed before the observation was read")
        }
    }

    /// The text frame: a traceback's first line, the explanation, `Type: message`.
    pub fn text(&self) -> String {
        let mut text = String::from("Traceback (most recent call last):\n");
        for line in self.detail.iter().flat_map(|d| d.lines()) {
            text.push_str("  ");
            text.push_str(line);
            text.push('\n');
        }
        text.push_str(&self.line());
        text.push('\n');
        text
    }

    /// `Type: message`, or the type alone; what log scrapers read, so it stays one line.
    pub fn line(&self) -> String {
        match self.message.replace(['\n', '\r'], " ") {
            message if message.is_empty() => self.python_type.clone(),
            message => format!("{}: {message}", self.python_type),
        }
    }
}

impl From<EngineError> for ServiceError {
    fn from(error: EngineError) -> Self {
        let (failure, python_type) = match &error {
            EngineError::Invalid(_) => (Failure::Exception, "ValueError"),
            EngineError::NonFinite { .. } => (Failure::Exception, "FloatingPointError"),
            EngineError::Deadline { .. } => (Failure::Refusal, "TimeoutError"),
            EngineError::Overloaded { .. }
            | EngineError::Unavailable(_)
            | EngineError::DeviceFailed(_)
            | EngineError::Draining => (Failure::Refusal, "RuntimeError"),
        };
        let message = match &error {
            // A device's own words may name files; they belong in the log.
            EngineError::Unavailable(why) => {
                static LINE: Seldom = Seldom::new();
                if let Some(unsaid) = LINE.pass() {
                    tracing::warn!(%why, unsaid, "request refused: no device is ready");
                }
                "no device is ready: try again in a moment".to_string()
            }
            EngineError::DeviceFailed(why) => {
                static LINE: Seldom = Seldom::new();
                if let Some(unsaid) = LINE.pass() {
                    tracing::warn!(%why, unsaid, "request lost to a device failure");
                }
                "the device failed and is being restarted: try again".to_string()
            }
            other => other.to_string(),
        };
        let (reason, python_type) = (error.reason(), python_type.to_string());
        ServiceError { failure, reason, python_type, message, detail: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engine_errors_tell_clients_what_to_do_and_no_paths() {
        let text = |error| {
            let error = ServiceError::from(error);
            (error.failure, error.reason, error.text().lines().last().unwrap().to_owned())
        };
        let path = || "/models/pi0/model.safetensors is truncated".to_string();
        for error in [EngineError::Unavailable(path()), EngineError::DeviceFailed(path())] {
            let (failure, _, last) = text(error);
            assert_eq!(failure, Failure::Refusal);
            assert!(last.starts_with("RuntimeError: ") && last.contains("try again"), "{last}");
            assert!(!last.contains('/'), "{last}");
        }
        let late = EngineError::Deadline { deadline_ms: 5.0, predicted_ms: 30.0 };
        let (failure, reason, last) = text(late);
        assert_eq!((failure, reason), (Failure::Refusal, "deadline"));
        assert!(last.starts_with("TimeoutError: the deadline is 5.0 ms away"), "{last}");
        let (failure, reason, _) = text(EngineError::NonFinite { count: 1, total: 2 });
        assert_eq!((failure, reason), (Failure::Exception, "non_finite"));
    }

    #[test]
    fn the_last_line_is_type_and_message() {
        let mut error = ServiceError::exception("KeyError", "'state'");
        assert_eq!(error.text(), "Traceback (most recent call last):\nKeyError: 'state'\n");
        error.detail = Some("the observation needs:\nstate float32 [8]".into());
        error.message = "two\nlines".into();
        let text = error.text();
        assert_eq!(text.lines().last(), Some("KeyError: two lines"));
        assert_eq!(text.lines().nth(2), Some("  state float32 [8]"));
        error.message.clear();
        assert!(error.text().ends_with("\nKeyError\n"));
    }
}
