//! One job → all threads at once: a fixed pool that runs the same closure on every worker, with a
//! barrier between the steps of the closure.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use pirouette_model::BackendError;

/// Rounds of a waiting loop before a thread goes to sleep: some tens of microseconds, more than
/// most steps leave a worker waiting.
const SPINS: usize = 4000;

/// Another worker panicked: leave the job.
#[derive(Debug)]
pub(crate) struct Abandoned;

type Job = dyn Fn(&Worker<'_>) -> Result<(), Abandoned> + Sync;

/// A job whose lifetime is erased: it lives until `Pool::run` returns.
#[derive(Clone, Copy)]
struct JobPointer(*const Job);
// SAFETY: the closure behind it is Sync, and `Pool::run` outlives every use.
unsafe impl Send for JobPointer {}

/// What a worker knows of itself.
pub(crate) struct Worker<'a> {
    /// 0 for the calling thread.
    pub(crate) index: usize,
    /// Workers in the pool.
    pub(crate) count: usize,
    shared: &'a State,
}

impl Worker<'_> {
    /// Waits until every worker has come here.
    pub(crate) fn barrier(&self) -> Result<(), Abandoned> {
        let s = self.shared;
        if self.count == 1 {
            return Ok(());
        }
        let round = s.round.load(Ordering::Acquire);
        if s.arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.count {
            s.arrived.store(0, Ordering::Relaxed);
            s.round.store(round.wrapping_add(1), Ordering::Release);
            s.wake();
        } else {
            s.wait_until(|| {
                s.round.load(Ordering::Acquire) != round || s.abandoned.load(Ordering::Acquire)
            });
        }
        if s.abandoned.load(Ordering::Acquire) { Err(Abandoned) } else { Ok(()) }
    }
}

struct Assignment {
    job: Option<JobPointer>,
    number: usize,
    stop: bool,
}

struct State {
    assignment: Mutex<Assignment>,
    /// Number of the current assignment, readable without the lock.
    number: AtomicUsize,
    changed: Condvar,
    sleepers: AtomicUsize,
    arrived: AtomicUsize,
    round: AtomicUsize,
    running: AtomicUsize,
    abandoned: AtomicBool,
    failure: Mutex<Option<String>>,
    spins: usize,
}

impl State {
    fn lock(&self) -> MutexGuard<'_, Assignment> {
        self.assignment.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Spins a while, then sleeps. Whoever makes `done` true calls `wake` afterwards.
    fn wait_until(&self, done: impl Fn() -> bool) {
        for _ in 0..self.spins {
            if done() {
                return;
            }
            std::hint::spin_loop();
        }
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        let mut guard = self.lock();
        while !done() {
            guard = self.changed.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        drop(guard);
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }

    fn wake(&self) {
        // Pairs with the increment in `wait_until`: either we see the sleeper, or it sees the
        // change that was made before this fence.
        std::sync::atomic::fence(Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            drop(self.lock());
            self.changed.notify_all();
        }
    }

    fn work(&self, job: JobPointer, index: usize, count: usize) {
        let worker = Worker { index, count, shared: self };
        // SAFETY: `Pool::run` keeps the closure alive until `running` is zero.
        let job = unsafe { &*job.0 };
        // Nothing of the closure's state is used after a panic: the run reports failure.
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| job(&worker))) {
            let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
            failure.get_or_insert(format!("worker {index} panicked: {}", message(&*panic)));
            drop(failure);
            self.abandoned.store(true, Ordering::Release);
            self.wake();
        }
        self.running.fetch_sub(1, Ordering::AcqRel);
        self.wake();
    }

    fn serve(&self, index: usize, count: usize) {
        let mut seen = 0;
        loop {
            self.wait_until(|| self.number.load(Ordering::Acquire) != seen);
            let assignment = self.lock();
            if assignment.stop {
                return;
            }
            seen = assignment.number;
            let job = assignment.job;
            drop(assignment);
            if let Some(job) = job {
                self.work(job, index, count);
            }
        }
    }
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| s.to_string());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}

/// The threads; the caller of [`Pool::run`] is one of the workers.
pub(crate) struct Pool {
    state: Arc<State>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    pub(crate) fn new(count: usize) -> Result<Self, BackendError> {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let state = Arc::new(State {
            assignment: Mutex::new(Assignment { job: None, number: 0, stop: false }),
            number: AtomicUsize::new(0),
            changed: Condvar::new(),
            sleepers: AtomicUsize::new(0),
            arrived: AtomicUsize::new(0),
            round: AtomicUsize::new(0),
            running: AtomicUsize::new(0),
            abandoned: AtomicBool::new(false),
            failure: Mutex::new(None),
            // Spinning only keeps others from the cores when there are more threads than cores.
            spins: if count > cores { 0 } else { SPINS },
        });
        let mut pool = Pool { state: state.clone(), threads: Vec::new() };
        for index in 1..count {
            let state = state.clone();
            let thread = std::thread::Builder::new()
                .name(format!("pirouette-cpu-{index}"))
                .spawn(move || state.serve(index, count))
                .map_err(|e| {
                    BackendError::Unavailable(format!(
                        "thread {index} of {count} can't be started: {e}; ask for fewer threads"
                    ))
                })?;
            pool.threads.push(thread);
        }
        Ok(pool)
    }

    /// Workers, the caller included.
    pub(crate) fn count(&self) -> usize {
        self.threads.len() + 1
    }

    /// Runs the closure on every worker and returns when all are done.
    pub(crate) fn run(
        &mut self,
        job: &(dyn Fn(&Worker<'_>) -> Result<(), Abandoned> + Sync),
    ) -> Result<(), BackendError> {
        let (s, count) = (&self.state, self.count());
        // SAFETY: only the lifetime changes; this function does not return before every worker
        // has left the closure (`running` is zero).
        let job = JobPointer(unsafe {
            std::mem::transmute::<
                *const (dyn Fn(&Worker<'_>) -> Result<(), Abandoned> + Sync + '_),
                *const Job,
            >(job)
        });
        s.abandoned.store(false, Ordering::Relaxed);
        s.arrived.store(0, Ordering::Relaxed);
        s.running.store(count, Ordering::Relaxed);
        let mut assignment = s.lock();
        assignment.job = Some(job);
        assignment.number = assignment.number.wrapping_add(1);
        s.number.store(assignment.number, Ordering::Release);
        drop(assignment);
        s.wake();
        s.work(job, 0, count);
        s.wait_until(|| s.running.load(Ordering::Acquire) == 0);
        s.lock().job = None;
        match s.failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(failure) => Err(BackendError::Device(failure)),
            None => Ok(()),
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let mut assignment = self.state.lock();
        assignment.stop = true;
        assignment.number = assignment.number.wrapping_add(1);
        self.state.number.store(assignment.number, Ordering::Release);
        drop(assignment);
        self.state.changed.notify_all();
        for thread in self.threads.drain(..) {
            // A worker that died has reported through `failure`; there is nothing to add.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_worker_passes_every_barrier_together() {
        for count in [1, 2, 3, 5] {
            let mut pool = Pool::new(count).unwrap();
            for _ in 0..50 {
                let steps: Vec<AtomicUsize> = (0..100).map(|_| AtomicUsize::new(0)).collect();
                pool.run(&|w| {
                    for step in &steps {
                        step.fetch_add(1, Ordering::Relaxed);
                        w.barrier()?;
                        assert_eq!(step.load(Ordering::Relaxed), count);
                    }
                    Ok(())
                })
                .unwrap();
            }
        }
    }

    #[test]
    fn a_panic_is_reported_and_the_pool_goes_on() {
        for culprit in 0..3 {
            let mut pool = Pool::new(3).unwrap();
            let error = pool
                .run(&|w| {
                    w.barrier()?;
                    assert!(w.index != culprit, "culprit");
                    w.barrier()?;
                    Ok(())
                })
                .unwrap_err();
            assert!(error.to_string().contains("culprit"), "{error}");
            let done = AtomicUsize::new(0);
            pool.run(&|w| {
                w.barrier()?;
                done.fetch_add(1, Ordering::Relaxed);
                Ok(())
            })
            .unwrap();
            assert_eq!(done.into_inner(), 3);
        }
    }
}
