//! An open device at work: compiled programs by bucket, warm-up, canary, batches.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use pirouette_model::{BackendError, Device, Executable, StageTimes, record_with};

use crate::batches::BatchRecord;
use crate::bucket::Bucket;
use crate::canary;
use crate::finish::{hope, shortest};
use crate::leisure::hand_out;
use crate::queue::{Batch, Job, JobInputs, Reply};
use crate::request::{Answer, EngineError, Timing, ms};
use crate::shared::{Phase, Running, Shared, State};
use crate::staging::Staging;

/// A warm-up run shorter than this is repeated, because the first run of a program often pays
/// for more than itself.
const QUICK: Duration = Duration::from_secs(1);

/// Longest sleep of an idle device thread between looks at the queue and at its device.
const IDLE: Duration = Duration::from_millis(500);

/// Longest sleep while requests wait that are left to a faster device, or for their company.
const RECONSIDER: Duration = Duration::from_millis(2);

/// What a device thread does next.
enum Work {
    Stop,
    Canary,
    Look,
    Run(Taken),
}

/// A batch taken from the queue; its replies are with the device's state already.
struct Taken {
    inputs: Vec<JobInputs>,
    bucket: Bucket,
    slots: usize,
    looking_since: Instant,
    at: Instant,
}

/// An open device. Executables come first: they are dropped before the device they run on.
pub(crate) struct Session {
    /// Most recently used last.
    executables: Vec<((Bucket, usize), Box<dyn Executable>)>,
    device: Box<dyn Device>,
    staging: Staging,
    /// Shrinks when the device runs out of memory.
    max_batch: usize,
    shared: Arc<Shared>,
    index: usize,
    generation: u64,
    /// Until when it stays awake for another request.
    awake: Option<Instant>,
    /// What the last canary took.
    canary_took: Option<Duration>,
    /// When the device was last known to be there.
    seen: Instant,
}

impl Session {
    pub(crate) fn new(
        shared: Arc<Shared>,
        index: usize,
        generation: u64,
        device: Box<dyn Device>,
    ) -> Self {
        {
            let mut state = shared.lock();
            let status = &mut state.devices[index];
            if status.generation == generation {
                status.name = device.name();
                status.weight_bytes = device.weight_bytes();
            }
        }
        let max_batch = shared.options.rule.max_batch();
        Session {
            executables: Vec::new(),
            device,
            staging: Staging::default(),
            max_batch,
            shared,
            index,
            generation,
            awake: None,
            canary_took: None,
            seen: Instant::now(),
        }
    }

    /// Compiles and runs what the options ask for, then the canary, then says it is ready.
    pub(crate) fn warm(&mut self) -> Result<(), String> {
        self.shared.set_phase(self.index, self.generation, Phase::Warming);
        let options = self.shared.options.clone();
        for bucket in options.warm {
            for &slots in &options.rule.batches {
                // A shutdown does not wait for a warm-up.
                if self.shared.lock().stop {
                    return Ok(());
                }
                if slots > self.max_batch || !self.warm_one(bucket, slots)? {
                    break;
                }
            }
        }
        self.canary()?;
        self.shared.set_phase(self.index, self.generation, Phase::Ready);
        Ok(())
    }

    /// False when the device has no memory for this size.
    fn warm_one(&mut self, bucket: Bucket, slots: usize) -> Result<bool, String> {
        for attempt in 0..2 {
            self.begin(self.shared.options.watchdog_first);
            canary::fill(
                &mut self.staging,
                &self.shared.options.tables[0].config,
                bucket.shape(slots),
            );
            let started = match self.compile(bucket, slots) {
                Ok(()) => Instant::now(),
                Err(error @ BackendError::OutOfMemory { .. }) if slots > 1 => {
                    self.end();
                    self.shrink(slots, &error);
                    return Ok(false);
                }
                Err(error) => return Err(error.to_string()),
            };
            self.run(bucket, slots).map_err(|e| e.to_string())?;
            let took = started.elapsed();
            if self.end().is_none() {
                return Err("given up".into());
            }
            if attempt == 1 || took > QUICK {
                self.shared.lock().devices[self.index].times.record(bucket, slots, took);
                break;
            }
        }
        Ok(true)
    }

    fn shrink(&mut self, slots: usize, error: &BackendError) {
        let batches = &self.shared.options.rule.batches;
        self.max_batch = batches.iter().copied().filter(|s| *s < slots).max().unwrap_or(1);
        tracing::warn!(device = self.index, %error, max_batch = self.max_batch, "smaller batches");
    }

    /// Serves until the engine stops (`Ok`) or the device fails (`Err`).
    pub(crate) fn serve(&mut self) -> Result<(), String> {
        loop {
            match self.next() {
                Work::Stop => return Ok(()),
                Work::Canary => {
                    // Of one that fails or hangs, whoever notes that tells the waiting.
                    self.canary()?;
                    let mut state = self.shared.lock();
                    let device = &mut state.devices[self.index];
                    device.canary_excused = false;
                    for waiter in device.canary_waiters.drain(..) {
                        let _ = waiter.send(Ok(()));
                    }
                }
                Work::Look => {
                    self.device.look().map_err(|e| e.to_string())?;
                    self.seen = Instant::now();
                }
                Work::Run(taken) => {
                    self.run_batch(taken)?;
                    self.awake = Instant::now().checked_add(self.shared.options.busy_poll);
                }
            }
        }
    }

    /// Waits for something to do.
    fn next(&self) -> Work {
        let shared = &self.shared;
        let rule = &shared.options.rule;
        let looking_since = Instant::now();
        let mut state = shared.lock();
        loop {
            if state.stop || state.devices[self.index].generation != self.generation {
                return Work::Stop;
            }
            if !state.devices[self.index].canary_waiters.is_empty() {
                return Work::Canary;
            }
            let now = Instant::now();
            self.sweep(&mut state, now);
            let skip = state.leave_to_faster(self.index, now, rule);
            let Some((head, mates)) = state.queue.head(skip, rule) else {
                if state.draining && state.queue.is_empty() {
                    return Work::Stop;
                }
                if state.queue.is_empty() && now.duration_since(self.seen) >= IDLE {
                    return Work::Look;
                }
                let looked;
                (state, looked) = shared.look_out(state, self.awake);
                if looked {
                    continue;
                }
                // What is left to a faster device is looked at again soon: it may be late.
                let at_most = if state.queue.is_empty() { IDLE } else { RECONSIDER };
                state = shared.wait(state, at_most);
                continue;
            };
            let (close_at, look_again) = self.closes(&state, head, mates);
            if mates < rule.max_batch().min(self.max_batch) && now < close_at && !state.draining {
                state = shared.wait(state, look_again.min(close_at - now));
                continue;
            }
            // Idle devices share what waits: each is done sooner.
            let share = mates.div_ceil(state.idle().max(1));
            let State { queue, devices, .. } = &mut *state;
            let times = &devices[self.index].times;
            if let Some(batch) = queue.take(skip, now, times, rule, share, self.max_batch) {
                return Work::Run(self.start(&mut state, batch, looking_since, now));
            }
        }
    }

    /// Until when a batch that is not full waits for company of its head, and how long to sleep
    /// between looks at it.
    fn closes(&self, state: &State, head: &Job, mates: usize) -> (Instant, Duration) {
        let options = &self.shared.options;
        let arrived = head.reply.arrived;
        let (mut wait, mut look_again) = (options.window, Duration::MAX);
        if let Some(company) = self.waits_for_company(state, head).filter(|c| *c > wait) {
            // One of them that is given up wakes nobody.
            (wait, look_again) = (company, RECONSIDER);
        }
        let mut close_at = arrived + wait;
        if let Some(deadline) = head.deadline {
            let times = &state.devices[self.index].times;
            let run = times.predict(head.inputs.bucket, mates).unwrap_or_default();
            close_at = close_at.min(deadline.checked_sub(run * 2).unwrap_or(arrived));
        }
        (close_at, look_again)
    }

    /// How long the head waits for those of its frame that are on their way, at most: alone, it
    /// would be done by then. It does only where that is nobody's loss: no one else waits, no other
    /// device is idle, larger batches are faster, and one that misses the batch is in time still.
    fn waits_for_company(&self, state: &State, head: &Job) -> Option<Duration> {
        let rule = &self.shared.options.rule;
        let (bucket, smallest) = (head.inputs.bucket, rule.batches[0]);
        let times = &state.devices[self.index].times;
        if head.others.strong_count() == 0 || !state.queue.is_of(&head.others) || state.idle() > 1 {
            return None;
        }
        let alone = times.predict(bucket, smallest)?;
        if head.deadline.is_some_and(|deadline| head.reply.arrived + 3 * alone > deadline) {
            return None;
        }
        let larger = rule.batches.iter().filter(|s| (smallest + 1..=self.max_batch).contains(s));
        let mut larger = larger.copied();
        larger.any(|slots| times.is_worthwhile(bucket, smallest, slots)).then_some(alone)
    }

    /// From here on, without a gap, the batch's requests are answered by this thread, by the
    /// watchdog, or by whoever notes that the device failed.
    fn start(&self, state: &mut State, batch: Batch, looking_since: Instant, at: Instant) -> Taken {
        let Batch { jobs, bucket, slots } = batch;
        let options = &self.shared.options;
        let times = &state.devices[self.index].times;
        let measured = times.measured(bucket, slots);
        let limit = measured.map_or(options.watchdog_first, |t| options.watchdog.max(t * 10));
        let predicted = times.predict(bucket, slots).unwrap_or_default();
        jobs.iter().for_each(|job| job.reply.started.store(true, Relaxed));
        let (inputs, replies) = jobs.into_iter().map(|job| (job.inputs, job.reply)).unzip();
        let running = Running { started: at, predicted, limit, replies };
        state.devices[self.index].running = Some(running);
        Taken { inputs, bucket, slots, looking_since, at }
    }

    fn sweep(&self, state: &mut State, now: Instant) {
        let rule = &self.shared.options.rule;
        let State { queue, devices, .. } = state;
        let alone = queue.len() == 1;
        let swept = queue.sweep(now, |bucket| match hope(devices, now, bucket, rule) {
            Some(hope) if alone => hope,
            _ => shortest(devices, bucket, rule),
        });
        self.shared.turn_away(swept);
    }

    fn run_batch(&mut self, taken: Taken) -> Result<(), String> {
        let Taken { ref inputs, bucket, slots, .. } = taken;
        if let Err(error) = self.compile(bucket, slots) {
            return self.refuse_running(slots, &error);
        }
        let gathering = Instant::now();
        let config = self.shared.options.tables[0].config;
        self.staging.gather(&config, bucket.shape(slots), &inputs.iter().collect::<Vec<_>>());
        let started = Instant::now();
        let run = match self.run(bucket, slots) {
            Ok(run) => run,
            Err(error @ (BackendError::InputSize { .. } | BackendError::InputValue { .. })) => {
                return self.refuse_running(slots, &error);
            }
            Err(error) => return Err(error.to_string()),
        };
        let done = Instant::now();
        let Some(running) = self.end() else { return Ok(()) };
        let took = done - gathering;
        let mut state = self.shared.lock();
        state.devices[self.index].times.record(bucket, slots, took);
        let nothing_waits = state.queue.is_empty() && state.expected.is_none();
        drop(state);
        self.shared.stats.batch(running.replies.len());
        let batch_id = self.shared.stats.recent.0.push(|id| BatchRecord {
            id,
            device: self.index,
            requests: running.replies.len(),
            slots,
            bucket,
            taken: taken.at,
            started,
            done,
            run,
        });
        let timing = Timing {
            gather_ms: ms(started - gathering),
            run,
            batch: running.replies.len(),
            slots,
            device: self.index,
            batch_id,
            ..Timing::default()
        };
        let leisure = nothing_waits && timing.batch == 1;
        self.answer(&taken, running.replies, timing, leisure);
        Ok(())
    }

    fn answer(&self, taken: &Taken, replies: Vec<Reply>, timing: Timing, leisure: bool) {
        let horizon = taken.bucket.horizon;
        let action_dim = self.shared.options.tables[0].config.action_dim;
        let row = horizon * action_dim;
        for (reply, actions) in replies.into_iter().zip(self.staging.actions.chunks(row)) {
            let count = actions.iter().filter(|v| !v.is_finite()).count();
            if count > 0 {
                self.shared.refuse([reply], &EngineError::NonFinite { count, total: row });
                continue;
            }
            let seen = reply.arrived.max(taken.looking_since).min(taken.at);
            let timing = Timing {
                queue_ms: ms(seen.saturating_duration_since(reply.arrived)),
                batch_wait_ms: ms(taken.at.saturating_duration_since(seen)),
                total_ms: ms(reply.arrived.elapsed()),
                ..timing
            };
            let answer =
                Answer { actions: actions.to_vec(), horizon, action_dim, seed: reply.seed, timing };
            // Counted before it is sent: whoever has the answer finds it in the statistics.
            if reply.sender.is_closed() {
                self.shared.stats.cancelled.fetch_add(1, Relaxed);
                continue;
            }
            self.shared.stats.answer(&timing);
            // A client that leaves at this very moment was answered all the same.
            hand_out(leisure, || drop(reply.sender.send(Ok(answer))));
        }
    }

    /// The running requests get an error but the device is still good (or merely out of memory).
    fn refuse_running(&mut self, slots: usize, error: &BackendError) -> Result<(), String> {
        let replies = match error {
            BackendError::OutOfMemory { .. } if slots > 1 => {
                self.shrink(slots, error);
                self.end()
            }
            BackendError::InputSize { .. }
            | BackendError::InputValue { .. }
            | BackendError::Unsupported(_) => self.end(),
            _ => return Err(error.to_string()),
        };
        let replies = replies.map(|r| r.replies).unwrap_or_default();
        let error = match error {
            BackendError::Unsupported(why) => EngineError::Invalid(why.clone()),
            _ => EngineError::Unavailable(error.to_string()),
        };
        self.shared.refuse(replies, &error);
        Ok(())
    }

    /// The known forward. The first answer becomes the reference where none was given.
    fn canary(&mut self) -> Result<(), String> {
        let options = self.shared.options.clone();
        let bucket = options.bucket(options.canary.cameras, options.canary.prompt_tokens);
        let slots = options.rule.batches[0];
        let limit =
            self.canary_took.map_or(options.watchdog_first, |t| options.watchdog.max(t * 10));
        self.begin(limit);
        let started = Instant::now();
        let config = options.tables[0].config;
        canary::fill(&mut self.staging, &config, bucket.shape(slots));
        self.compile(bucket, slots).map_err(|e| e.to_string())?;
        self.run(bucket, slots).map_err(|e| e.to_string())?;
        if self.end().is_none() {
            return Err("given up".into());
        }
        self.canary_took = Some(started.elapsed());
        let got = &self.staging.actions[..bucket.horizon * config.action_dim];
        if let Some(i) = got.iter().position(|v| !v.is_finite()) {
            let bad = got[i];
            return Err(format!(
                "canary: value {i} is {bad}: the weights or the device are broken"
            ));
        }
        let mut state = self.shared.lock();
        let device = &mut state.devices[self.index];
        match &device.reference {
            Some(want) => options.canary.compare(want, got)?,
            None => device.reference = Some(got.to_vec()),
        }
        device.last_canary = Some(Instant::now());
        self.shared.stats.canaries.fetch_add(1, Relaxed);
        Ok(())
    }

    /// Makes the program of a bucket the most recently used one, compiling it if need be.
    fn compile(&mut self, bucket: Bucket, slots: usize) -> Result<(), BackendError> {
        let key = (bucket, slots);
        if let Some(at) = self.executables.iter().position(|(k, _)| *k == key) {
            let found = self.executables.remove(at);
            self.executables.push(found);
            return Ok(());
        }
        if self.executables.len() >= self.shared.options.executables {
            self.executables.remove(0);
        }
        let table = self.shared.options.table(bucket.steps).ok_or_else(|| {
            BackendError::Unavailable(format!("no weights for {} steps are loaded", bucket.steps))
        })?;
        let program = record_with(table.clone(), bucket.shape(slots))
            .map_err(|e| BackendError::Unavailable(e.to_string()))?;
        let program = Arc::new(program);
        let compiled = match self.device.compile(program.clone()) {
            Err(BackendError::OutOfMemory { .. }) if !self.executables.is_empty() => {
                self.executables.clear();
                self.device.compile(program)?
            }
            other => other?,
        };
        self.executables.push((key, compiled));
        Ok(())
    }

    /// Runs the most recently used program (of that bucket) on what is staged.
    fn run(&mut self, bucket: Bucket, slots: usize) -> Result<StageTimes, BackendError> {
        let Some((key, executable)) = self.executables.last_mut() else {
            return Err(BackendError::Device("no program is compiled".into()));
        };
        debug_assert_eq!(*key, (bucket, slots));
        self.staging.run(executable.as_mut())
    }

    /// Puts a run without requests (warm-up, canary) under the watchdog.
    fn begin(&self, limit: Duration) {
        self.shared.begin(self.index, self.generation, limit);
    }

    /// Takes the running requests back; `None` when the watchdog has answered them already.
    fn end(&self) -> Option<Running> {
        self.shared.end(self.index, self.generation)
    }
}
