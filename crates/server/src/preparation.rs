//! Work on observations (decoding images, resizing, tokenising) → threads beside the sockets', so
//! many at once and no more.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;

use crate::service::{RequestContext, ServiceError};

/// Bounds how many observations are prepared at once, and how many wait for it.
#[derive(Clone, Debug)]
pub struct Preparation {
    /// One permit per observation that is worked on.
    running: Arc<Semaphore>,
    /// One permit per observation that is worked on or waits.
    places: Arc<Semaphore>,
    waiting: usize,
}

/// What came of the work, and how long it took.
#[derive(Clone, Debug, PartialEq)]
pub struct Prepared<T> {
    /// The result.
    pub value: T,
    /// Waiting for a thread.
    pub waited: Duration,
    /// The work itself.
    pub took: Duration,
}

impl Preparation {
    /// `at_once` observations are worked on at the same time, `waiting` more may wait.
    pub fn new(at_once: usize, waiting: usize) -> Self {
        let at_once = at_once.clamp(1, Semaphore::MAX_PERMITS);
        let places = at_once.saturating_add(waiting).min(Semaphore::MAX_PERMITS);
        Preparation {
            running: Arc::new(Semaphore::new(at_once)),
            places: Arc::new(Semaphore::new(places)),
            waiting,
        }
    }

    /// As many at once as there are cores.
    pub fn per_core(waiting: usize) -> Self {
        Self::new(std::thread::available_parallelism().map_or(1, usize::from), waiting)
    }

    /// Runs `work` on the calling thread, for what takes less than two changes of thread would: a
    /// hundred microseconds at most.
    pub fn here<T>(work: impl FnOnce() -> T) -> Prepared<T> {
        let began = Instant::now();
        let value = work();
        Prepared { value, waited: Duration::ZERO, took: began.elapsed() }
    }

    /// Runs `work` on a thread of its own when it is its turn. Dropping the future withdraws work
    /// that has not begun; work that has begun keeps its place until it ends.
    ///
    /// # Errors
    /// No place is free, a newer request of the session or the deadline came first, or the work
    /// panicked.
    pub async fn run<T: Send + 'static>(
        &self,
        context: &RequestContext,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<Prepared<T>, ServiceError> {
        let arrived = Instant::now();
        let Ok(place) = self.places.clone().try_acquire_owned() else {
            let message = format!("{} observations wait for preprocessing already", self.waiting);
            return Err(ServiceError::refusal("overloaded", message + ": send fewer"));
        };
        let turn = self.running.clone().acquire_owned();
        let turn = tokio::select! {
            turn = turn => turn,
            () = context.superseded() => return Err(ServiceError::superseded()),
            () = context.late() => return Err(ServiceError::late()),
        };
        let waited = arrived.elapsed();
        let task = tokio::task::spawn_blocking(move || {
            let _held = (place, turn);
            let began = Instant::now();
            let value = work();
            (value, began.elapsed())
        });
        match task.await {
            Ok((value, took)) => Ok(Prepared { value, waited, took }),
            Err(_) => {
                let mut error = ServiceError::exception("RuntimeError", "preprocessing failed");
                error.reason = "internal";
                Err(error)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::Failure;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    fn context() -> RequestContext {
        RequestContext::new(Instant::now())
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn no_more_than_allowed_run_at_once_and_wait() {
        let preparation = Preparation::new(2, 3);
        let (running, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (open, gate) = std::sync::mpsc::channel::<()>();
        let gate = Arc::new(std::sync::Mutex::new(gate));
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..5 {
            let (preparation, running, most, gate) =
                (preparation.clone(), running.clone(), most.clone(), gate.clone());
            tasks.spawn(async move {
                let work = move || {
                    most.fetch_max(running.fetch_add(1, SeqCst) + 1, SeqCst);
                    // Until the channel says so, or the test has failed.
                    let _ = gate.lock().unwrap().recv();
                    running.fetch_sub(1, SeqCst);
                };
                preparation.run(&context(), work).await.map(|_| ())
            });
        }
        while preparation.places.available_permits() > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let full = preparation.run(&context(), || ()).await.unwrap_err();
        assert_eq!((full.failure, full.reason), (Failure::Refusal, "overloaded"));
        for _ in 0..5 {
            open.send(()).unwrap();
        }
        while let Some(done) = tasks.join_next().await {
            done.unwrap().unwrap();
        }
        assert!((1..=2).contains(&most.load(SeqCst)), "{most:?}");
        assert_eq!(preparation.run(&context(), || 7).await.unwrap().value, 7);
    }

    #[tokio::test]
    async fn waiting_ends_with_the_deadline_and_panics_are_errors() {
        let preparation = Preparation::new(1, 1);
        let (open, gate) = std::sync::mpsc::channel::<()>();
        let busy = tokio::spawn({
            let preparation = preparation.clone();
            async move { preparation.run(&context(), move || gate.recv()).await.map(|_| ()) }
        });
        while preparation.running.available_permits() > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let mut hurried = context();
        hurried.deadline = Some(Instant::now() + Duration::from_millis(20));
        let late = preparation.run(&hurried, || ()).await.unwrap_err();
        assert_eq!((late.reason, late.python_type.as_str()), ("deadline", "TimeoutError"));
        open.send(()).unwrap();
        busy.await.unwrap().unwrap();
        let failed =
            preparation.run(&context(), || panic!("a bug")).await.map(|_: Prepared<()>| ());
        assert_eq!(failed.unwrap_err().reason, "internal");
        assert!(preparation.run(&context(), || ()).await.is_ok(), "the place is free again");
    }
}
