//! What an engine is started with.

use std::sync::Arc;
use std::time::Duration;

use pirouette_model::{BackendError, Device, Rtc, WeightTable};

use crate::bucket::{Bucket, BucketRule};
use crate::canary::CanaryOptions;
use crate::lookout;
use crate::request::EngineError;

/// Opens a device with the model's weights loaded. Called on the device's own thread, again after
/// every failure.
pub type DeviceFactory = Arc<dyn Fn() -> Result<Box<dyn Device>, BackendError> + Send + Sync>;

/// Settings of an [`crate::Engine`].
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Weight tables the devices hold, one per number of Euler steps they can run; the first is
    /// the default. All of the same model.
    pub tables: Vec<Arc<WeightTable>>,
    /// Actions per chunk.
    pub horizon: usize,
    /// Longest prompt accepted, in tokens.
    pub max_prompt_tokens: usize,
    /// Rounding and batch sizes.
    pub rule: BucketRule,
    /// Requests that may wait (default 1024).
    pub queue_capacity: usize,
    /// How long a free device waits for more requests before it runs a batch that is not full
    /// (default zero: a batch forms from what is there).
    pub window: Duration,
    /// How long an idle device thread stays awake for a request that [`crate::Engine::expect`]
    /// announced (default 200 µs; zero, which is never, on fewer than four cores).
    pub lookout: Duration,
    /// How long a device thread stays awake for the next request after each one, instead of
    /// sleeping (default zero). Takes a core per device meanwhile.
    pub busy_poll: Duration,
    /// Compiled programs kept per device; the least recently used goes first (default 32).
    pub executables: usize,
    /// Compiled and run once before the device counts as ready, in all batch sizes of the rule,
    /// so that no request compiles anything and run times are known.
    pub warm: Vec<Bucket>,
    /// The known forward that proves a device is sound.
    pub canary: CanaryOptions,
    /// First pause before a failed device is reopened; doubles up to `restart_pause_max`
    /// (defaults 100 ms, 30 s).
    pub restart_pause: Duration,
    /// Longest pause.
    pub restart_pause_max: Duration,
    /// A run that takes longer than this and ten times its prediction is given up (default 2 s).
    pub watchdog: Duration,
    /// The same for a shape that never ran before, compilation included (default 10 min).
    pub watchdog_first: Duration,
    /// A device that is not open by then is given up (default 30 min: checkpoints may come from a
    /// slow network).
    pub watchdog_open: Duration,
}

impl EngineOptions {
    /// Defaults for a model: `tables` (at least one), actions per chunk, longest prompt.
    pub fn new(tables: Vec<Arc<WeightTable>>, horizon: usize, max_prompt_tokens: usize) -> Self {
        EngineOptions {
            tables,
            horizon,
            max_prompt_tokens,
            rule: BucketRule::gpu(1),
            queue_capacity: 1024,
            window: Duration::ZERO,
            lookout: lookout::usual(),
            busy_poll: Duration::ZERO,
            executables: 32,
            warm: Vec::new(),
            canary: CanaryOptions::default(),
            restart_pause: Duration::from_millis(100),
            restart_pause_max: Duration::from_secs(30),
            watchdog: Duration::from_secs(2),
            watchdog_first: Duration::from_secs(600),
            watchdog_open: Duration::from_secs(1800),
        }
    }

    /// The bucket of the default steps, without real-time chunking, for that many cameras and
    /// prompt tokens.
    pub fn bucket(&self, cameras: usize, prompt_len: usize) -> Bucket {
        Bucket {
            cameras: self.rule.cameras.map_or(cameras, |room| room.max(cameras)),
            prompt_tokens: self.rule.prompt_tokens(prompt_len, self.max_prompt_tokens),
            horizon: self.horizon,
            steps: self.tables.first().map_or(0, |t| t.steps),
            rtc: Rtc::Off,
        }
    }

    pub(crate) fn table(&self, steps: usize) -> Option<&Arc<WeightTable>> {
        self.tables.iter().find(|t| t.steps == steps)
    }

    pub(crate) fn check(&self) -> Result<(), EngineError> {
        let invalid = |what: String| Err(EngineError::Invalid(what));
        let Some(first) = self.tables.first() else {
            return invalid("an engine needs at least one weight table".into());
        };
        if self.tables.iter().any(|t| t.config != first.config) {
            return invalid("the weight tables of one engine must be of one model".into());
        }
        let ascending = self.rule.batches.windows(2).all(|w| w[0] < w[1]);
        if self.rule.batches.first().is_none_or(|b| *b == 0) || !ascending {
            let got = &self.rule.batches;
            return invalid(format!("batch sizes must be ascending and at least 1, got {got:?}"));
        }
        for batch in [1, self.rule.max_batch()] {
            let bucket = self.bucket(1, self.max_prompt_tokens);
            if let Err(error) = bucket.shape(batch).check() {
                return invalid(error.to_string());
            }
        }
        if self.queue_capacity == 0 || self.executables == 0 {
            return invalid("queue capacity and kept executables must be at least 1".into());
        }
        Ok(())
    }
}
