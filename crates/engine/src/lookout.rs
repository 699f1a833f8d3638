//! A request that is on its way → a device thread that is awake when it arrives.
//!
//! Waking a thread takes some tens of microseconds, about as long as preparing a small
//! observation. Whoever begins to prepare one says so, and both happen at the same time. Where
//! cores are to spare, the thread may stay awake after each request until the next
//! ([`EngineOptions::busy_poll`]).
//!
//! [`EngineOptions::busy_poll`]: crate::EngineOptions::busy_poll

use std::sync::MutexGuard;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::time::{Duration, Instant};

use crate::shared::{Shared, State};

/// Below this many cores the thread that looks out would keep others from their work.
const CORES: usize = 4;

/// Preparing a small observation and submitting it takes less.
const PREPARATION: Duration = Duration::from_micros(200);

/// Longest time between two looks at the rest of the state.
const GLANCE: Duration = Duration::from_millis(1);

/// How long a device thread looks out for an announced request, if not said otherwise.
pub(crate) fn usual() -> Duration {
    if spare_cores() { PREPARATION } else { Duration::ZERO }
}

/// Whether there are cores for threads that stay awake.
pub(crate) fn spare_cores() -> bool {
    std::thread::available_parallelism().map_or(1, usize::from) >= CORES
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

    /// Looks out for the announced request, or for any until `awake`; the lock is free meanwhile.
    /// False when there is nothing to look out for. Returns now and then all the same: there are
    /// other things than requests.
    pub(crate) fn look_out<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        awake: Option<Instant>,
    ) -> (MutexGuard<'a, State>, bool) {
        let now = Instant::now();
        let awake = awake.filter(|awake| *awake > now);
        // One thread is enough for one request.
        let until = state.expected.take().max(awake);
        let Some(until) = until.map(|until| until.min(now + GLANCE)) else { return (state, false) };
        let before = self.arrivals.0.load(Acquire);
        drop(state);
        while self.arrivals.0.load(Acquire) == before && Instant::now() < until {
            match awake {
                None => std::hint::spin_loop(),
                // This may take long: whoever else wants the core goes first.
                Some(_) => std::thread::yield_now(),
            }
        }
        (self.lock(), true)
    }
}
