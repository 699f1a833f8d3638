//! What the engine's handle, its device threads and its watchdog share.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, oneshot};

use crate::canary;
use crate::lookout::Arrivals;
use crate::options::{DeviceFactory, EngineOptions};
use crate::queue::{Queue, Reply, Swept};
use crate::request::EngineError;
use crate::stats::Stats;
use crate::times::ServiceTimes;

/// What a device is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Loading weights.
    Opening,
    /// Compiling and running the warm-up shapes and the canary.
    Warming,
    /// Serving.
    Ready,
    /// Failed; it will be reopened, unless it hung too often or the files of its weights are
    /// others by now.
    Failed(String),
    /// Stopped for good.
    Stopped,
}

/// One device as seen from outside.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceStatus {
    /// The device's own name, empty until it was opened.
    pub name: String,
    /// What it is doing.
    pub phase: Phase,
    /// Times it failed.
    pub restarts: u64,
    /// Bytes its weights take.
    pub weight_bytes: u64,
    /// Age of the last good canary forward.
    pub canary_age: Option<Duration>,
    /// Whether something is asked of it right now: a batch, a warm-up, to open or to close.
    pub busy: bool,
    /// Hash of the canary's known answer, bit for bit: another number says that the weights, the
    /// precision or the arithmetic is another. `None` before the first forward.
    pub fingerprint: Option<u64>,
}

/// What becomes of a device that failed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Next {
    /// Its thread opens it again.
    Reopen,
    /// The thread hangs and is given up.
    GiveUp,
    /// Nothing: its weights' files are others by now.
    Leave,
}

pub(crate) type CanaryWaiter = oneshot::Sender<Result<(), String>>;

/// A run in progress. The replies live here so that the watchdog can answer them.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) started: Instant,
    pub(crate) predicted: Duration,
    pub(crate) limit: Duration,
    pub(crate) replies: Vec<Reply>,
}

#[derive(Debug)]
pub(crate) struct DeviceState {
    /// Raised when a hung thread is given up: what it says afterwards no longer counts.
    pub(crate) generation: u64,
    /// Threads given up that have not come back: each may still hold the device's memory.
    pub(crate) hung: usize,
    /// Not opened again until one of those comes back.
    pub(crate) abandoned: bool,
    /// Never opened again: its weights' files are others by now.
    pub(crate) stale: bool,
    pub(crate) name: String,
    pub(crate) weight_bytes: u64,
    pub(crate) phase: Phase,
    pub(crate) restarts: u64,
    /// Why it failed last.
    pub(crate) failure: Option<String>,
    /// What runs take on this device; another card may be slower.
    pub(crate) times: ServiceTimes,
    pub(crate) running: Option<Running>,
    pub(crate) last_canary: Option<Instant>,
    pub(crate) canary_waiters: Vec<CanaryWaiter>,
    /// The next canary comes after a run that began when the last one was young: no probe waits
    /// for either.
    pub(crate) canary_excused: bool,
    /// The canary's known answer, kept across restarts.
    pub(crate) reference: Option<Vec<f32>>,
}

#[derive(Debug)]
pub(crate) struct State {
    pub(crate) queue: Queue,
    pub(crate) devices: Vec<DeviceState>,
    /// A request was announced that will be here by then.
    pub(crate) expected: Option<Instant>,
    /// No new requests; device threads end when the queue is empty.
    pub(crate) draining: bool,
    /// Device threads end now.
    pub(crate) stop: bool,
    pub(crate) threads: Vec<(usize, u64, JoinHandle<()>)>,
}

pub(crate) struct Shared {
    pub(crate) options: EngineOptions,
    pub(crate) factories: Vec<DeviceFactory>,
    /// Shared with a successor.
    pub(crate) stats: Arc<Stats>,
    state: Mutex<State>,
    pub(crate) arrivals: Arrivals,
    /// Wakes device threads, and whoever drains.
    pub(crate) wake: Condvar,
    /// Wakes the watchdog, which has nothing to do with requests coming and going.
    pub(crate) stopped: Condvar,
    /// Wakes whoever waits for a phase to change.
    pub(crate) phases: Notify,
}

impl Shared {
    pub(crate) fn new(
        options: EngineOptions,
        factories: Vec<DeviceFactory>,
        stats: Arc<Stats>,
    ) -> Arc<Self> {
        let devices = factories.iter().map(|_| DeviceState::new(&options)).collect();
        let state = State {
            queue: Queue::new(options.queue_capacity),
            devices,
            expected: None,
            draining: false,
            stop: false,
            threads: Vec::new(),
        };
        Arc::new(Shared {
            options,
            factories,
            stats,
            state: Mutex::new(state),
            arrivals: Arrivals::default(),
            wake: Condvar::new(),
            stopped: Condvar::new(),
            phases: Notify::new(),
        })
    }

    /// Nothing that holds the lock can panic half-way through a change, so a poisoned lock is
    /// still consistent.
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn wait<'a>(
        &self,
        state: MutexGuard<'a, State>,
        at_most: Duration,
    ) -> MutexGuard<'a, State> {
        self.wake.wait_timeout(state, at_most).unwrap_or_else(PoisonError::into_inner).0
    }

    /// Tells everybody that the engine stops now.
    pub(crate) fn stop(&self, state: &mut State) {
        state.draining = true;
        state.stop = true;
        self.arrivals.count();
        self.wake.notify_all();
        self.stopped.notify_all();
        self.phases.notify_waiters();
    }

    /// Answers replies with an error.
    pub(crate) fn refuse(&self, replies: impl IntoIterator<Item = Reply>, error: &EngineError) {
        for reply in replies {
            self.stats.error(error);
            // The receiver may be gone; then nobody wants to know.
            let _ = reply.sender.send(Err(error.clone()));
        }
    }

    /// Answers what was swept out of the queue.
    pub(crate) fn turn_away(&self, swept: Swept) {
        self.stats.cancelled.fetch_add(swept.cancelled as u64, Relaxed);
        for (job, error) in swept.late {
            self.refuse([job.reply], &error);
        }
    }

    /// Sets a device's phase unless the calling thread was given up. Says whether it was set.
    pub(crate) fn set_phase(&self, index: usize, generation: u64, phase: Phase) -> bool {
        let mut state = self.lock();
        let device = &mut state.devices[index];
        let mine = device.generation == generation;
        if mine {
            device.phase = phase;
        }
        drop(state);
        self.phases.notify_waiters();
        self.wake.notify_all();
        mine
    }

    /// Puts work without requests (opening, warm-up, a canary, closing) under the watchdog.
    pub(crate) fn begin(&self, index: usize, generation: u64, limit: Duration) {
        let mut state = self.lock();
        let device = &mut state.devices[index];
        if device.generation == generation {
            let (started, predicted) = (Instant::now(), Duration::ZERO);
            device.running = Some(Running { started, predicted, limit, replies: Vec::new() });
        }
    }

    /// Takes the running requests back; `None` when the watchdog has answered them already.
    pub(crate) fn end(&self, index: usize, generation: u64) -> Option<Running> {
        let mut state = self.lock();
        let device = &mut state.devices[index];
        if device.generation != generation { None } else { device.running.take() }
    }

    /// A device failed: its requests and probes get an error, it is no longer ready. Says whether
    /// the generation was still the current one.
    pub(crate) fn device_failed(
        &self,
        index: usize,
        generation: u64,
        reason: &str,
        next: Next,
    ) -> bool {
        let mut state = self.lock();
        let device = &mut state.devices[index];
        if device.generation != generation {
            return false;
        }
        match next {
            Next::Reopen => {}
            Next::GiveUp => {
                device.generation += 1;
                device.hung += 1;
            }
            Next::Leave => device.stale = true,
        }
        device.phase = Phase::Failed(reason.into());
        device.restarts += 1;
        device.failure = Some(reason.into());
        device.last_canary = None;
        device.canary_excused = false;
        let replies = device.running.take().map(|r| r.replies).unwrap_or_default();
        for waiter in device.canary_waiters.drain(..) {
            let _ = waiter.send(Err(reason.into()));
        }
        // With nobody left to serve them, waiting requests fail now rather than at a deadline
        // their senders may not have given.
        let none_left = !state.devices.iter().any(|d| d.phase == Phase::Ready);
        let waiting = if none_left { state.queue.clear() } else { Vec::new() };
        drop(state);
        self.stats.restarts.fetch_add(1, Relaxed);
        self.refuse(replies, &EngineError::DeviceFailed(reason.into()));
        let unavailable = EngineError::Unavailable(reason.into());
        self.refuse(waiting.into_iter().map(|job| job.reply), &unavailable);
        self.phases.notify_waiters();
        true
    }
}

impl DeviceState {
    pub(crate) fn new(options: &EngineOptions) -> Self {
        DeviceState {
            generation: 0,
            hung: 0,
            abandoned: false,
            stale: false,
            name: String::new(),
            weight_bytes: 0,
            phase: Phase::Opening,
            restarts: 0,
            failure: None,
            times: ServiceTimes::default(),
            running: None,
            last_canary: None,
            canary_waiters: Vec::new(),
            canary_excused: false,
            reference: options.canary.expected.clone(),
        }
    }

    pub(crate) fn status(&self) -> DeviceStatus {
        DeviceStatus {
            name: self.name.clone(),
            phase: self.phase.clone(),
            restarts: self.restarts,
            weight_bytes: self.weight_bytes,
            canary_age: self.last_canary.map(|at| at.elapsed()),
            busy: self.running.is_some(),
            fingerprint: self.reference.as_deref().map(canary::fingerprint),
        }
    }
}

impl State {
    /// Why no device is ready, or `None` when one is.
    pub(crate) fn unready(&self) -> Option<String> {
        if self.devices.iter().any(|d| d.phase == Phase::Ready) {
            return None;
        }
        let say = |d: &DeviceState| match &d.phase {
            Phase::Opening => "loading weights".to_string(),
            Phase::Warming => "warming up".to_string(),
            Phase::Failed(reason) => reason.clone(),
            Phase::Ready | Phase::Stopped => "stopped".to_string(),
        };
        Some(self.devices.iter().map(say).collect::<Vec<_>>().join("; "))
    }
}
