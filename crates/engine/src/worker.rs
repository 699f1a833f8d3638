//! A device's thread: open → warm → serve, and again after a failure. And the watchdog.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use pirouette_model::BackendError;

use crate::request::EngineError;
use crate::session::Session;
use crate::shared::{Next, Phase, Shared};

/// With this many of a device's threads given up and not come back, it is not opened again: each
/// may still hold its memory.
const HUNG_LIMIT: usize = 3;

/// A device that served this long starts over with the shortest pause.
const STEADY: Duration = Duration::from_secs(30);

/// Starts the thread of device `index`.
pub(crate) fn spawn(shared: &Arc<Shared>, index: usize, generation: u64) -> std::io::Result<()> {
    let worker = shared.clone();
    let thread = std::thread::Builder::new()
        .name(format!("device-{index}"))
        .spawn(move || run(&worker, index, generation))?;
    shared.lock().threads.push((index, generation, thread));
    Ok(())
}

fn run(shared: &Arc<Shared>, index: usize, generation: u64) {
    let mut pause = shared.options.restart_pause;
    loop {
        let started = Instant::now();
        match live(shared, index, generation) {
            Ok(()) => break,
            Err(End::Failed(reason)) => {
                tracing::warn!(device = index, %reason, "device is reopened");
            }
            Err(End::Stale(reason)) => {
                tracing::error!(device = index, %reason, "device is not opened again");
                // Its phase says why for as long as the engine lives.
                return;
            }
        }
        if started.elapsed() > STEADY {
            pause = shared.options.restart_pause;
        }
        if !rest(shared, index, generation, pause) {
            break;
        }
        pause = (pause * 2).min(shared.options.restart_pause_max);
    }
    if !shared.set_phase(index, generation, Phase::Stopped) {
        came_back(shared, index);
    }
}

/// A thread that was given up has ended after all, and what it held is free.
fn came_back(shared: &Arc<Shared>, index: usize) {
    let mut state = shared.lock();
    let device = &mut state.devices[index];
    device.hung = device.hung.saturating_sub(1);
    let generation = device.generation;
    let abandoned = std::mem::take(&mut device.abandoned);
    let again = abandoned && !state.stop && !state.draining;
    drop(state);
    if again {
        tracing::info!(device = index, "a device thread that was given up ended: opened again");
        replace(shared, index, generation);
    }
}

/// Starts another thread for a device whose last one is gone.
fn replace(shared: &Arc<Shared>, index: usize, generation: u64) {
    if let Err(error) = spawn(shared, index, generation) {
        let reason = format!("no thread could be started: {error}");
        shared.set_phase(index, generation, Phase::Failed(reason));
    }
}

/// Why a life of a device ended early.
enum End {
    /// The device must be reopened.
    Failed(String),
    /// Its weights' files are others by now: reopening is of no use.
    Stale(String),
}

/// One life of a device: `Ok` when the engine stops.
fn live(shared: &Arc<Shared>, index: usize, generation: u64) -> Result<(), End> {
    let failed = |reason: String| {
        shared.device_failed(index, generation, &reason, Next::Reopen);
        End::Failed(reason)
    };
    if !shared.set_phase(index, generation, Phase::Opening) {
        return Ok(());
    }
    let factory = shared.factories[index].clone();
    let options = &shared.options;
    // A driver can hang wherever it is called: under the watchdog another thread takes over.
    shared.begin(index, generation, options.watchdog_open);
    let opened = guard(|| factory());
    if shared.end(index, generation).is_none() {
        return Err(End::Failed("given up while it was opened".into()));
    }
    let device = match opened.map_err(failed)? {
        Err(BackendError::Stale(reason)) => {
            shared.device_failed(index, generation, &reason, Next::Leave);
            return Err(End::Stale(reason));
        }
        opened => opened.map_err(|e| failed(e.to_string()))?,
    };
    let mut session = Session::new(shared.clone(), index, generation, device);
    let outcome = guard(|| session.warm().and_then(|()| session.serve())).and_then(|r| r);
    // Requests learn of the failure before the device is closed: closing may hang.
    let outcome = outcome.map_err(failed);
    if outcome.is_err() {
        shared.begin(index, generation, options.watchdog * 10);
    }
    if let Err(reason) = guard(move || drop(session)) {
        tracing::warn!(device = index, %reason, "closing the device failed");
    }
    shared.end(index, generation);
    outcome
}

/// Waits before a device is reopened. False when the engine stops meanwhile.
fn rest(shared: &Shared, index: usize, generation: u64, pause: Duration) -> bool {
    let until = Instant::now() + pause;
    let mut state = shared.lock();
    loop {
        if state.stop || state.draining || state.devices[index].generation != generation {
            return false;
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return true;
        }
        state = shared.wait(state, left);
    }
}

/// Runs `f`; a panic becomes an error that says what it said.
fn guard<T>(f: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(f)).map_err(|panic| {
        let text = panic
            .downcast_ref::<&str>()
            .map(|s| s.to_string())
            .or_else(|| panic.downcast_ref::<String>().cloned());
        format!("panic: {}", text.unwrap_or_else(|| "no message".into()))
    })
}

/// Says that a device is not opened again, unless a thread of its came back meanwhile.
fn abandon(shared: &Arc<Shared>, index: usize, hung: usize) {
    let mut state = shared.lock();
    let device = &mut state.devices[index];
    if device.abandoned {
        device.phase = Phase::Failed(format!("hung {hung} times: restart the process"));
    }
    drop(state);
    shared.phases.notify_waiters();
}

/// Gives up device threads that hang: answers their requests, starts a new thread. Turns away
/// requests whose deadline has passed, which device threads do only between their runs.
pub(crate) fn watch(shared: &Arc<Shared>) {
    let period = (shared.options.watchdog / 8).clamp(Duration::from_millis(5), STEADY / 60);
    let mut state = shared.lock();
    while !state.stop {
        let now = Instant::now();
        shared.turn_away(state.queue.sweep(now, |_| Duration::ZERO));
        let overdue = |limit: Duration, started: Instant| now.duration_since(started) > limit;
        let hung = state
            .devices
            .iter()
            .position(|d| matches!(&d.running, Some(r) if overdue(r.limit, r.started)));
        let Some(index) = hung else {
            let waited = shared.stopped.wait_timeout(state, period);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            continue;
        };
        let device = &mut state.devices[index];
        let (generation, hung) = (device.generation, device.hung + 1);
        let limit = device.running.as_ref().map_or(Duration::ZERO, |r| r.limit);
        device.abandoned = hung >= HUNG_LIMIT;
        drop(state);
        let reason = format!("no answer from the device within {:.1} s", limit.as_secs_f64());
        tracing::error!(device = index, %reason, "device thread is given up");
        shared.device_failed(index, generation, &reason, Next::GiveUp);
        if hung >= HUNG_LIMIT {
            abandon(shared, index, hung);
        } else {
            replace(shared, index, generation + 1);
        }
        state = shared.lock();
    }
    let waiting = state.queue.clear();
    drop(state);
    shared.refuse(waiting.into_iter().map(|job| job.reply), &EngineError::Draining);
}
