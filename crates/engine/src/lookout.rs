//! A request that is on its way → a device thread that is awake when it arrives.
//!
//! Waking a thread takes some tens of microseconds, about as long as preparing a small
//! observation. Whoever begins to prepare one says so, and both happen at the same time.

use std::sync::MutexGuard;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::time::{Duration, Instant};

use crate::shared::{Shared, State};

/// Below this many cores the thread that looks out would keep others from their work.
const CORES: usize = 4;

/// Preparing a small observation and submitting it takes less.
const PREPARATION: Duration = Duration::from_micros(200);

/// How long a device thread looks out for an announced request, if not said otherwise.
pub(crate) fn usual() -> Duration {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    if cores < CORES { Duration::ZERO } else { PREPARATION }
}

/// Counts requests as they enter the queue, for those who look out for one without the lock; and
/// the engine's end, which they must not miss.
#[derive(Debug, Default)]
pub(crate) struct Arrivals(AtomicU64);

impl Arrivals {
    /// A request is in the queue, or the engine stops.
    pub(crate) fn count(&self) {
        self.0.fetch_add(1, Release);
    }
}

impl Shared {
    /// A request will be submitted in a moment: wakes a device thread for it, if one sleeps.
    pub(crate) fn expect(&self) {
        if self.options.lookout.is_zero() {
            return;
        }
        self.lock().expected = Some(Instant::now() + self.options.lookout);
        self.wake.notify_one();
    }

    /// Looks out for the announced request; the lock is free meanwhile. False when none was
    /// announced.
    pub(crate) fn look_out<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
    ) -> (MutexGuard<'a, State>, bool) {
        // One thread is enough for one request.
        let Some(until) = state.expected.take() else { return (state, false) };
        let before = self.arrivals.0.load(Acquire);
        drop(state);
        while self.arrivals.0.load(Acquire) == before && Instant::now() < until {
            std::hint::spin_loop();
        }
        (self.lock(), true)
    }
}
