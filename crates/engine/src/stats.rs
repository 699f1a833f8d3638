//! Events → counters and histograms anyone may read at any time.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use crate::batches::Batches;
use crate::request::{EngineError, Timing};
use crate::shared::DeviceStatus;

/// Upper bounds of the histogram's bins, in milliseconds; one more bin holds the rest.
pub const HISTOGRAM_BOUNDS_MS: [f64; 20] = [
    0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 30.0, 50.0, 100.0, 200.0,
    500.0, 1000.0, 5000.0,
];

/// A histogram of durations over [`HISTOGRAM_BOUNDS_MS`]. Lock-free.
#[derive(Debug, Default)]
pub struct Histogram {
    bins: [AtomicU64; HISTOGRAM_BOUNDS_MS.len() + 1],
    sum_us: AtomicU64,
}

impl Histogram {
    /// Counts one duration.
    pub fn record_ms(&self, ms: f64) {
        let bin = HISTOGRAM_BOUNDS_MS.iter().position(|b| ms <= *b);
        self.bins[bin.unwrap_or(HISTOGRAM_BOUNDS_MS.len())].fetch_add(1, Relaxed);
        self.sum_us.fetch_add((ms.max(0.0) * 1e3) as u64, Relaxed);
    }

    /// Count of each bin, the overflow bin last.
    pub fn bins(&self) -> Vec<u64> {
        self.bins.iter().map(|b| b.load(Relaxed)).collect()
    }

    /// Sum of everything counted, in milliseconds.
    pub fn sum_ms(&self) -> f64 {
        self.sum_us.load(Relaxed) as f64 / 1e3
    }
}

/// What a request's time is spent on inside the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Waiting for a device.
    Queue,
    /// Waiting for the batch to fill.
    BatchWait,
    /// Gathering the batch's inputs.
    Gather,
    /// Copies to the device.
    CopyIn,
    /// SigLIP and projector.
    Vision,
    /// Gemma-2B prefix pass.
    Prefill,
    /// Euler steps.
    Denoise,
    /// Actions back to the host.
    CopyOut,
    /// The whole device run.
    Run,
}

impl Stage {
    /// All stages, in the order they happen.
    pub const ALL: [Stage; 9] = [
        Stage::Queue,
        Stage::BatchWait,
        Stage::Gather,
        Stage::CopyIn,
        Stage::Vision,
        Stage::Prefill,
        Stage::Denoise,
        Stage::CopyOut,
        Stage::Run,
    ];

    /// Its label in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Queue => "queue",
            Stage::BatchWait => "batch_wait",
            Stage::Gather => "gather",
            Stage::CopyIn => "copy_in",
            Stage::Vision => "vision",
            Stage::Prefill => "prefill",
            Stage::Denoise => "denoise",
            Stage::CopyOut => "copy_out",
            Stage::Run => "run",
        }
    }

    fn of(self, timing: &Timing) -> f64 {
        match self {
            Stage::Queue => timing.queue_ms,
            Stage::BatchWait => timing.batch_wait_ms,
            Stage::Gather => timing.gather_ms,
            Stage::CopyIn => timing.run.copy_in_ms,
            Stage::Vision => timing.run.vision_ms,
            Stage::Prefill => timing.run.prefill_ms,
            Stage::Denoise => timing.run.denoise_ms,
            Stage::CopyOut => timing.run.copy_out_ms,
            Stage::Run => timing.run.total_ms,
        }
    }
}

/// Counts so far.
#[derive(Debug, Default)]
pub(crate) struct Stats {
    pub(crate) accepted: AtomicU64,
    pub(crate) completed: AtomicU64,
    pub(crate) cancelled: AtomicU64,
    pub(crate) restarts: AtomicU64,
    pub(crate) canaries: AtomicU64,
    pub(crate) recent: Batches,
    errors: Mutex<BTreeMap<&'static str, u64>>,
    batches: Mutex<BTreeMap<usize, u64>>,
    stages: [Histogram; Stage::ALL.len()],
}

impl Stats {
    pub(crate) fn error(&self, error: &EngineError) {
        let mut errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        *errors.entry(error.reason()).or_default() += 1;
    }

    pub(crate) fn batch(&self, requests: usize) {
        let mut batches = self.batches.lock().unwrap_or_else(PoisonError::into_inner);
        *batches.entry(requests).or_default() += 1;
    }

    pub(crate) fn answer(&self, timing: &Timing) {
        self.completed.fetch_add(1, Relaxed);
        for stage in Stage::ALL {
            let ms = stage.of(timing);
            // A device that does not time a stage apart says zero: no observation.
            if ms > 0.0 || matches!(stage, Stage::Queue | Stage::BatchWait) {
                self.stages[stage as usize].record_ms(ms);
            }
        }
    }

    pub(crate) fn snapshot(&self, queue_depth: usize, devices: Vec<DeviceStatus>) -> StatsSnapshot {
        StatsSnapshot {
            accepted: self.accepted.load(Relaxed),
            completed: self.completed.load(Relaxed),
            cancelled: self.cancelled.load(Relaxed),
            restarts: self.restarts.load(Relaxed),
            canaries: self.canaries.load(Relaxed),
            errors: self.errors.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            batches: self.batches.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            stages: Stage::ALL.map(|s| {
                let h = &self.stages[s as usize];
                (s, h.bins(), h.sum_ms())
            }),
            newest_batch: self.recent.0.newest(),
            queue_depth,
            devices,
        }
    }
}

/// Everything countable about an engine at one moment.
#[derive(Clone, Debug)]
pub struct StatsSnapshot {
    /// Requests that entered the queue.
    pub accepted: u64,
    /// Requests answered with actions.
    pub completed: u64,
    /// Requests nobody waited for any more when their turn came, or when they were done.
    pub cancelled: u64,
    /// Times a device failed.
    pub restarts: u64,
    /// Canary forwards that gave the known answer.
    pub canaries: u64,
    /// Requests refused or failed, by [`EngineError::reason`].
    pub errors: BTreeMap<&'static str, u64>,
    /// Batches by number of requests in them.
    pub batches: BTreeMap<usize, u64>,
    /// Per stage: histogram bins and sum in milliseconds.
    pub stages: [(Stage, Vec<u64>, f64); Stage::ALL.len()],
    /// Number of the last batch ([`crate::BatchRecord::id`]).
    pub newest_batch: u64,
    /// Requests waiting now.
    pub queue_depth: usize,
    /// Each device now.
    pub devices: Vec<DeviceStatus>,
}

impl StatsSnapshot {
    /// Requests refused or failed for this reason.
    pub fn errors_for(&self, reason: &str) -> u64 {
        self.errors.get(reason).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_lands_in_the_first_bin_that_holds_it() {
        let h = Histogram::default();
        for ms in [0.0, 0.02, 0.021, 1.0, 4999.0, 5001.0, 1e9] {
            h.record_ms(ms);
        }
        let bins = h.bins();
        assert_eq!((bins[0], bins[1], bins[7]), (2, 1, 1));
        assert_eq!((bins[19], bins[20]), (1, 2));
        assert_eq!(bins.iter().sum::<u64>(), 7);
    }
}
