//! What goes into the engine and what comes out.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use pirouette_model::{BackendError, PreviousChunk, StageTimes};

/// Where the denoising starts.
#[derive(Clone, Debug, PartialEq)]
pub enum Noise {
    /// From a seed the engine draws; the answer tells it.
    Drawn,
    /// From this seed: [`crate::standard_normal`].
    Seed(u64),
    /// These values, `[horizon, action_dim]`.
    Given(Vec<f32>),
}

/// Held by requests that come together, until each is submitted or given up: those that wait in
/// the queue meanwhile let an idle device wait for the others, so that they share a batch. They do
/// so for the time that a run of one takes at most.
#[derive(Clone, Debug, Default)]
pub struct Company(pub(crate) Arc<()>);

/// One observation, ready for the model.
#[derive(Clone, Debug)]
pub struct Request {
    /// Real cameras only, 8-bit RGB, `[side, side, 3]` each.
    pub images: Vec<Bytes>,
    /// Valid prompt tokens.
    pub tokens: Vec<u32>,
    /// Normalised state, `[action_dim]`.
    pub state: Vec<f32>,
    /// Where the denoising starts.
    pub noise: Noise,
    /// The chunk in execution, to which the new one is tied (real-time chunking).
    pub previous: Option<PreviousChunk>,
    /// Euler steps; the engine's default when `None`.
    pub steps: Option<usize>,
    /// An answer after this instant is worthless; the request is refused as soon as it is clear
    /// that it can't be met.
    pub deadline: Option<Instant>,
    /// Whom it comes with.
    pub company: Option<Company>,
}

/// Where the milliseconds of one request went.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Timing {
    /// From submission until a device was free for it.
    pub queue_ms: f64,
    /// From then until its batch was closed (the batching window).
    pub batch_wait_ms: f64,
    /// Copying the batch's inputs together.
    pub gather_ms: f64,
    /// The device's own account of the run.
    pub run: StageTimes,
    /// From submission to the answer.
    pub total_ms: f64,
    /// Requests in the batch.
    pub batch: usize,
    /// Slots of the compiled batch.
    pub slots: usize,
    /// Index of the device.
    pub device: usize,
    /// Number of the batch: [`crate::BatchRecord::id`].
    pub batch_id: u64,
}

/// The actions of one request.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// `[horizon, action_dim]` in model space, all finite.
    pub actions: Vec<f32>,
    /// Actions per chunk.
    pub horizon: usize,
    /// Action dimensions of the model.
    pub action_dim: usize,
    /// The seed of the noise; `None` when the noise was given.
    pub seed: Option<u64>,
    /// Where the time went.
    pub timing: Timing,
}

/// Why there are no actions.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum EngineError {
    /// The request itself is wrong.
    #[error("{0}")]
    Invalid(String),
    /// The queue is full.
    #[error("the queue holds {capacity} requests already: send fewer, or add a device")]
    Overloaded {
        /// Its bound.
        capacity: usize,
    },
    /// The deadline can't be met (or has passed); no work was done for this request.
    #[error(
        "{}: allow more time, send fewer requests, or add a device",
        lateness(*deadline_ms, *predicted_ms)
    )]
    Deadline {
        /// Time left when it was refused, negative when it had passed.
        deadline_ms: f64,
        /// Predicted time to the answer.
        predicted_ms: f64,
    },
    /// No device is ready; the text says why.
    #[error("no device is ready ({0}): try again in a moment")]
    Unavailable(String),
    /// The device failed while it worked on this request; it is being reopened.
    #[error("the device failed ({0}) and is being restarted: try again")]
    DeviceFailed(String),
    /// The model produced NaN or infinity for this request; nothing of it was let out.
    #[error(
        "the model produced {count} non-finite values of {total}: \
         check the observation's scale, the norm stats and the checkpoint"
    )]
    NonFinite {
        /// How many.
        count: usize,
        /// Of how many.
        total: usize,
    },
    /// The engine is shutting down.
    #[error("the server is shutting down")]
    Draining,
}

impl EngineError {
    /// Short name for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            EngineError::Invalid(_) => "invalid",
            EngineError::Overloaded { .. } => "overloaded",
            EngineError::Deadline { .. } => "deadline",
            EngineError::Unavailable(_) => "unavailable",
            EngineError::DeviceFailed(_) => "device_failed",
            EngineError::NonFinite { .. } => "non_finite",
            EngineError::Draining => "draining",
        }
    }

    pub(crate) fn deadline(now: Instant, deadline: Instant, predicted: Duration) -> Self {
        let left = ms(deadline.saturating_duration_since(now))
            - ms(now.saturating_duration_since(deadline));
        EngineError::Deadline { deadline_ms: left, predicted_ms: ms(predicted) }
    }
}

fn lateness(deadline_ms: f64, predicted_ms: f64) -> String {
    if deadline_ms < 0.0 {
        return format!("the deadline passed {:.1} ms ago, before a device was free", -deadline_ms);
    }
    format!(
        "the deadline is {deadline_ms:.1} ms away and the answer would take {predicted_ms:.1} ms"
    )
}

impl From<&BackendError> for EngineError {
    fn from(error: &BackendError) -> Self {
        EngineError::DeviceFailed(error.to_string())
    }
}

pub(crate) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
