//! The engine's handle: start, submit, readiness, stats, drain.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pirouette_model::Rtc;
use tokio::sync::oneshot;

use crate::batches::BatchRecord;
use crate::noise::{draw_seed, standard_normal};
use crate::options::{DeviceFactory, EngineOptions};
use crate::queue::{Job, JobInputs, Reply};
use crate::request::{Answer, EngineError, Noise, Request};
use crate::shared::{DeviceState, Phase, Shared};
use crate::stats::{Stats, StatsSnapshot};
use crate::worker;

/// A device thread that does not end within this, or within the watchdog's time if that is less, is
/// left behind when the engine is dropped.
const STOP_PATIENCE: Duration = Duration::from_secs(10);

/// Devices, their threads and the queue in front of them. Dropping it stops the threads after
/// the batches they are running, and waits for that ten seconds at most.
pub struct Engine {
    pub(crate) shared: Arc<Shared>,
    watchdog: Option<JoinHandle<()>>,
    /// Noise of a seed nobody has asked for yet: drawn while a device is busy, it costs the next
    /// request nothing.
    spare: Mutex<Option<(u64, Vec<f32>)>>,
}

/// An answer on its way. Dropping it withdraws the request if it has not started.
#[derive(Debug)]
pub struct Pending {
    receiver: oneshot::Receiver<Result<Answer, EngineError>>,
    started: Arc<AtomicBool>,
}

impl Pending {
    /// Whether a device has begun to work on it; until then dropping it costs nothing.
    pub fn has_started(&self) -> bool {
        self.started.load(Relaxed)
    }

    /// Blocks the calling thread (not one of an async runtime) until the answer is there.
    pub fn wait(self) -> Result<Answer, EngineError> {
        self.receiver.blocking_recv().unwrap_or(Err(EngineError::Draining))
    }
}

impl Future for Pending {
    type Output = Result<Answer, EngineError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let polled = Pin::new(&mut self.receiver).poll(context);
        polled.map(|received| received.unwrap_or(Err(EngineError::Draining)))
    }
}

impl Engine {
    /// Starts one thread per factory. Returns at once: the devices open on their own threads, see
    /// [`Engine::wait_ready`].
    ///
    /// # Errors
    /// [`EngineError::Invalid`] when the options contradict themselves.
    pub fn start(devices: Vec<DeviceFactory>, options: EngineOptions) -> Result<Self, EngineError> {
        Engine::start_with(devices, options, Arc::default())
    }

    /// The same, with the counts of another engine continued.
    pub(crate) fn start_with(
        devices: Vec<DeviceFactory>,
        options: EngineOptions,
        stats: Arc<Stats>,
    ) -> Result<Self, EngineError> {
        options.check()?;
        if devices.is_empty() {
            return Err(EngineError::Invalid("an engine needs at least one device".into()));
        }
        let count = devices.len();
        let shared = Shared::new(options, devices, stats);
        let thread = |e: std::io::Error| EngineError::Unavailable(format!("no thread: {e}"));
        for index in 0..count {
            worker::spawn(&shared, index, 0).map_err(thread)?;
        }
        let watched = shared.clone();
        let watchdog = std::thread::Builder::new()
            .name("watchdog".into())
            .spawn(move || worker::watch(&watched))
            .map_err(thread)?;
        Ok(Engine { shared, watchdog: Some(watchdog), spare: Mutex::new(None) })
    }

    /// The options it was started with.
    pub fn options(&self) -> &EngineOptions {
        &self.shared.options
    }

    /// Whether a request with this deadline could be let in now, before any work is done for it:
    /// judged as one of the fastest shape that ran, so what [`Engine::submit`] would take passes.
    ///
    /// # Errors
    /// What `submit` would say.
    pub fn admit(&self, deadline: Option<Instant>) -> Result<(), EngineError> {
        let options = &self.shared.options;
        let mut state = self.shared.lock();
        let bucket = state.fastest(&options.rule).unwrap_or_else(|| options.bucket(1, 1));
        let mut admitted = state.admit(&options.rule, Instant::now(), bucket, deadline);
        if admitted.is_ok() && state.queue.is_full() {
            admitted = Err(EngineError::Overloaded { capacity: state.queue.capacity() });
        }
        drop(state);
        admitted.inspect_err(|error| self.shared.stats.error(error))
    }

    /// Says that a request will be submitted within microseconds: an idle device thread is woken
    /// meanwhile ([`EngineOptions::lookout`]). Costs little if none comes.
    pub fn expect(&self) {
        self.shared.expect();
    }

    /// Puts a request into the queue, or refuses it on the spot.
    pub fn submit(&self, request: Request) -> Result<Pending, EngineError> {
        self.try_submit(request).inspect_err(|error| self.shared.stats.error(error))
    }

    fn try_submit(&self, mut request: Request) -> Result<Pending, EngineError> {
        let arrived = Instant::now();
        let (deadline, company) = (request.deadline, request.company.take());
        let (inputs, seed) = self.prepare(request)?;
        let (sender, receiver) = oneshot::channel();
        let mut state = self.shared.lock();
        state.admit(&self.shared.options.rule, arrived, inputs.bucket, deadline)?;
        let capacity = state.queue.capacity();
        let started = Arc::new(AtomicBool::new(false));
        let reply = Reply { arrived, seed, sender, started: started.clone() };
        let others = company.as_ref().map_or_else(Weak::new, |c| Arc::downgrade(&c.0));
        let job = Job { inputs, deadline, reply, others };
        state.queue.push(job).map_err(|_| EngineError::Overloaded { capacity })?;
        // No longer on its way, from the moment it is in the queue.
        drop(company);
        drop(state);
        self.shared.arrivals.count();
        self.shared.stats.accepted.fetch_add(1, Relaxed);
        self.shared.wake.notify_all();
        self.refill();
        Ok(Pending { receiver, started })
    }

    /// Checks a request against the model and draws its noise.
    fn prepare(&self, request: Request) -> Result<(JobInputs, Option<u64>), EngineError> {
        let options = &self.shared.options;
        let config = &options.tables[0].config;
        let invalid = |what: String| Err(EngineError::Invalid(what));
        let steps = request.steps.unwrap_or(options.tables[0].steps);
        if options.table(steps).is_none() {
            let known: Vec<usize> = options.tables.iter().map(|t| t.steps).collect();
            return invalid(format!("num_steps {steps} is not among those loaded, {known:?}"));
        }
        let (cameras, prompt) = (request.images.len(), request.tokens.len());
        if cameras == 0 || cameras > 3 {
            return invalid(format!("{cameras} cameras, the model takes 1 to 3"));
        }
        let side = config.vision.image;
        if let Some(image) = request.images.iter().find(|i| i.len() != side * side * 3) {
            let got = image.len();
            return invalid(format!("an image has {got} bytes, the model takes {side}×{side}×3"));
        }
        if prompt == 0 || prompt > options.max_prompt_tokens {
            let limit = options.max_prompt_tokens;
            return invalid(format!(
                "the prompt has {prompt} tokens, the model takes 1 to {limit}"
            ));
        }
        if let Some(token) = request.tokens.iter().find(|t| **t as usize >= config.vocab) {
            return invalid(format!("token {token} is outside the vocabulary of {}", config.vocab));
        }
        if request.state.len() != config.action_dim {
            let (got, want) = (request.state.len(), config.action_dim);
            return invalid(format!("the state has {got} values, the model takes {want}"));
        }
        if let Some(i) = request.state.iter().position(|v| !v.is_finite()) {
            return invalid(format!("value {i} of the state is {}", request.state[i]));
        }
        if let Some(previous) = &request.previous {
            previous
                .check(config, options.horizon)
                .map_err(|e| EngineError::Invalid(e.to_string()))?;
        }
        let rtc = request.previous.as_ref().map_or(Rtc::Off, |previous| previous.rtc);
        let (mut noise, seed) = self.noise(request.noise)?;
        if let Some(previous) = &request.previous {
            previous.give(&mut noise);
        }
        let bucket = crate::Bucket { steps, rtc, ..options.bucket(cameras, prompt) };
        let Request { images, tokens, state, previous, .. } = request;
        Ok((JobInputs { bucket, images, tokens, state, noise, previous }, seed))
    }

    fn noise(&self, noise: Noise) -> Result<(Vec<f32>, Option<u64>), EngineError> {
        let options = &self.shared.options;
        let (horizon, dim) = (options.horizon, options.tables[0].config.action_dim);
        let seed = match noise {
            Noise::Given(values) => {
                if values.len() != horizon * dim {
                    return Err(EngineError::Invalid(format!(
                        "the noise has {} values, the model takes [{horizon}, {dim}]",
                        values.len()
                    )));
                }
                if let Some(i) = values.iter().position(|v| !v.is_finite()) {
                    let what = format!("value {i} of the noise is {}", values[i]);
                    return Err(EngineError::Invalid(what));
                }
                return Ok((values, None));
            }
            Noise::Drawn => {
                if let Some((seed, values)) = self.spare().take() {
                    return Ok((values, Some(seed)));
                }
                draw_seed()
            }
            Noise::Seed(seed) => seed,
        };
        Ok((self.normal(seed), Some(seed)))
    }

    fn normal(&self, seed: u64) -> Vec<f32> {
        let options = &self.shared.options;
        let mut values = vec![0.0; options.horizon * options.tables[0].config.action_dim];
        standard_normal(seed, &mut values);
        values
    }

    fn spare(&self) -> MutexGuard<'_, Option<(u64, Vec<f32>)>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn refill(&self) {
        if self.spare().is_none() {
            let seed = draw_seed();
            let values = self.normal(seed);
            *self.spare() = Some((seed, values));
        }
    }

    /// Waits until a device is ready.
    ///
    /// # Errors
    /// Why not, when every device has failed (most keep being reopened) or the engine stops.
    pub async fn wait_ready(&self) -> Result<(), String> {
        loop {
            let changed = self.shared.phases.notified();
            {
                let state = self.shared.lock();
                let Some(why) = state.unready() else { return Ok(()) };
                let over = |p: &Phase| matches!(p, Phase::Failed(_) | Phase::Stopped);
                if state.stop || state.devices.iter().all(|d| over(&d.phase)) {
                    return Err(why);
                }
            }
            changed.await;
        }
    }

    /// Whether a canary forward gave the known answer lately; runs one where the last is too old.
    /// The caller bounds the time it is willing to wait.
    pub async fn readiness(&self) -> Result<(), String> {
        let mut probes = Vec::new();
        {
            let mut state = self.shared.lock();
            if state.draining || state.stop {
                return Err("shutting down".into());
            }
            if let Some(why) = state.unready() {
                return Err(why);
            }
            let max_age = self.shared.options.canary.max_age;
            for device in state.devices.iter_mut().filter(|d| d.phase == Phase::Ready) {
                let age = device.last_canary.map(|at| at.elapsed());
                if age.is_some_and(|age| age <= max_age) {
                    return Ok(());
                }
                // A canary waits for the run in hand. A probe need not, if the last one was young
                // enough when that began: the next comes right after it, and the watchdog bounds
                // both.
                let running = device.running.as_ref().map(|running| running.started.elapsed());
                if let (Some(age), Some(running)) = (age, running)
                    && age <= max_age + running
                    && !device.canary_excused
                {
                    device.canary_excused = true;
                    device.canary_waiters.push(oneshot::channel().0);
                }
                if device.canary_excused {
                    return Ok(());
                }
                let (sender, receiver) = oneshot::channel();
                // Probes whose callers have left must not pile up behind a long run.
                device.canary_waiters.retain(|w| !w.is_closed());
                device.canary_waiters.push(sender);
                probes.push(receiver);
            }
        }
        self.shared.wake.notify_all();
        let mut why = String::from("no device answered");
        for probe in probes {
            match probe.await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(reason)) => why = reason,
                Err(_) => why = "the device stopped".into(),
            }
        }
        Err(why)
    }

    /// Why no device will be ready again without a successor or a new process, or `None` while one
    /// may: every device hangs, or the files of its weights are others by now.
    pub fn beyond_help(&self) -> Option<String> {
        let state = self.shared.lock();
        if state.stop || state.devices.iter().any(|d| !d.abandoned && !d.stale) {
            return None;
        }
        state.unready()
    }

    /// Counts and device states at this moment.
    pub fn stats(&self) -> StatsSnapshot {
        let state = self.shared.lock();
        let devices = state.devices.iter().map(|d| d.status()).collect();
        let depth = state.queue.len();
        drop(state);
        self.shared.stats.snapshot(depth, devices)
    }

    /// The last batches that ran: those with a number above `id`, oldest first, and how many of
    /// those were forgotten.
    pub fn batches_after(&self, id: u64) -> (Vec<BatchRecord>, u64) {
        self.shared.stats.recent.0.after(id)
    }

    /// Takes no more requests, finishes those it has, and stops; gives up after `limit`, when
    /// what is left gets [`EngineError::Draining`]. True when everything was finished. Blocks.
    pub fn drain(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        let mut state = self.shared.lock();
        state.draining = true;
        self.shared.wake.notify_all();
        self.shared.phases.notify_waiters();
        loop {
            // A device that opens, warms up or closes keeps nobody waiting.
            let asked = |d: &DeviceState| d.running.as_ref().is_some_and(|r| !r.replies.is_empty());
            let idle = state.queue.is_empty() && !state.devices.iter().any(asked);
            let left = until.saturating_duration_since(Instant::now());
            if idle || left.is_zero() {
                self.shared.stop(&mut state);
                return idle;
            }
            state = self.shared.wait(state, left.min(Duration::from_millis(5)));
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let threads = {
            let mut state = self.shared.lock();
            self.shared.stop(&mut state);
            let threads = std::mem::take(&mut state.threads);
            // A thread that was given up may never end; it is left behind.
            // A device thread that carries an answer on may be the last to let go of the engine;
            // it ends when it comes back.
            let here = std::thread::current().id();
            let current = |(i, generation, thread): &(usize, u64, JoinHandle<()>)| {
                state.devices[*i].generation == *generation && thread.thread().id() != here
            };
            threads.into_iter().filter(current).collect::<Vec<_>>()
        };
        let until = Instant::now() + STOP_PATIENCE.min(self.shared.options.watchdog);
        for (index, _, thread) in threads {
            while !thread.is_finished() && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(1));
            }
            if thread.is_finished() {
                // Device threads catch their panics.
                let _ = thread.join();
            } else {
                tracing::warn!(device = index, "its thread is busy for too long: left behind");
            }
        }
        if let Some(watchdog) = self.watchdog.take() {
            // One that panicked has nothing to add.
            let _ = watchdog.join();
        }
    }
}
