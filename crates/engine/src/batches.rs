//! What is remembered of a batch that ran.

use std::time::Instant;

use pirouette_model::StageTimes;

use crate::bucket::Bucket;
use crate::ring::Ring;

/// How many batches are remembered. A watcher that looks ten times a second misses none below
/// ten thousand batches a second.
const REMEMBERED: usize = 1024;

/// One batch that ran.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BatchRecord {
    /// Its number, from 1 without gaps, over all devices. [`crate::Timing::batch_id`] names it.
    pub id: u64,
    /// Index of the device.
    pub device: usize,
    /// Requests in it.
    pub requests: usize,
    /// Slots of the compiled batch.
    pub slots: usize,
    /// The bucket it ran in.
    pub bucket: Bucket,
    /// When it was taken from the queue.
    pub taken: Instant,
    /// When its inputs were gathered and the device began.
    pub started: Instant,
    /// When the device was done.
    pub done: Instant,
    /// The device's own account of the run.
    pub run: StageTimes,
}

/// The last batches of an engine.
#[derive(Debug)]
pub(crate) struct Batches(pub(crate) Ring<BatchRecord>);

impl Default for Batches {
    fn default() -> Self {
        Batches(Ring::new(REMEMBERED))
    }
}
