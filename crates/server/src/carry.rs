//! A connection → a task that the device thread may carry on, where it has the answer.
//!
//! Otherwise the last stretch of a request begins with waking one of the runtime's threads, which
//! takes about a tenth of a millisecond: as long as making the answer and writing it. So a
//! connection's task is polled by whoever wakes it, if that is a device thread at leisure
//! ([`pirouette_engine::take_leisure`]). It is the same task with the same waker, one step
//! further: a socket that takes no more is waited for by the runtime as ever, and so is all that
//! comes after the answer ([`hand_back`]).

use std::cell::Cell;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use futures_util::task::AtomicWaker;
use pirouette_engine::take_leisure;
use tokio::runtime::Handle;

thread_local! {
    /// Whether this thread is a device's and carries a connection on.
    static CARRYING: Cell<bool> = const { Cell::new(false) };
}

type Work = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A future that two threads may poll: the runtime's, and whoever wakes it at leisure.
struct Carried {
    /// `None` when it is over.
    work: Mutex<Option<Work>>,
    /// Of the runtime's task.
    task: AtomicWaker,
    runtime: Handle,
}

/// The runtime's side of it. Dropping it drops the work.
struct Task(Arc<Carried>);

/// Makes a task of `work` that may be carried on. Called on a runtime.
pub(crate) fn carried(work: impl Future<Output = ()> + Send + 'static) -> impl Future<Output = ()> {
    Task(Carried::new(work))
}

/// Whether the calling thread is a device's that carries a connection on.
pub(crate) fn carrying() -> bool {
    CARRYING.get()
}

/// Leaves the rest to the runtime: the device has other things to do.
pub(crate) async fn hand_back() {
    std::future::poll_fn(|context| {
        if !carrying() {
            return Poll::Ready(());
        }
        // This thread holds the work, so that waking means the runtime's task.
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

impl Carried {
    fn new(work: impl Future<Output = ()> + Send + 'static) -> Arc<Self> {
        let work = Mutex::new(Some(Box::pin(work) as Work));
        Arc::new(Carried { work, task: AtomicWaker::new(), runtime: Handle::current() })
    }

    fn work(&self) -> MutexGuard<'_, Option<Work>> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn poll(self: &Arc<Self>, work: &mut Option<Work>) -> Poll<()> {
        let Some(future) = work else { return Poll::Ready(()) };
        let waker = Waker::from(Arc::clone(self));
        let polled = future.as_mut().poll(&mut Context::from_waker(&waker));
        if polled.is_ready() {
            *work = None;
        }
        polled
    }

    /// One step on this thread, unless another one is at it. Says whether it was made.
    fn carry_on(self: &Arc<Self>) -> bool {
        let Ok(mut work) = self.work.try_lock() else { return false };
        let _runtime = self.runtime.enter();
        CARRYING.set(true);
        let polled = catch_unwind(AssertUnwindSafe(|| self.poll(&mut work)));
        CARRYING.set(false);
        if polled.is_err() {
            tracing::error!("a connection panicked and is over");
            *work = None;
        }
        if work.is_none() {
            self.task.wake();
        }
        true
    }
}

impl Wake for Carried {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !(take_leisure() && self.carry_on()) {
            self.task.wake();
        }
    }
}

impl Future for Task {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        self.0.task.register(context.waker());
        // A device thread that is at it takes a tenth of a millisecond.
        self.0.poll(&mut self.0.work())
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        // Out of the lock before it is dropped: that may wake it.
        let work = self.0.work().take();
        drop(work);
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use tokio::sync::oneshot;

    use super::*;

    fn whole(work: impl Future<Output = ()> + Send + 'static) -> (Arc<Carried>, Task) {
        let carried = Carried::new(work);
        (carried.clone(), Task(carried))
    }

    /// One step on a thread of its own.
    fn elsewhere(carried: &Arc<Carried>) -> bool {
        let carried = carried.clone();
        thread::spawn(move || carried.carry_on()).join().unwrap()
    }

    #[tokio::test]
    async fn another_thread_makes_the_step_and_hands_the_rest_back() {
        let (answer, asked) = oneshot::channel();
        let (told, mut steps) = tokio::sync::mpsc::unbounded_channel();
        let (carried, task) = whole(async move {
            asked.await.unwrap();
            told.send((carrying(), thread::current().id())).unwrap();
            hand_back().await;
            // Timers are the runtime's, whoever polls.
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            told.send((carrying(), thread::current().id())).unwrap();
        });
        assert!(elsewhere(&carried), "nothing happens while there is no answer");
        // No runtime polls the task yet, so that nobody else can have taken the step.
        answer.send(()).unwrap();
        assert!(elsewhere(&carried));
        let (carried_there, there) = steps.recv().await.unwrap();
        assert!(carried_there && there != thread::current().id());
        task.await;
        assert_eq!(steps.recv().await, Some((false, thread::current().id())));
        assert!(steps.recv().await.is_none());
        assert!(elsewhere(&carried), "what is over stays over");
    }

    #[tokio::test]
    async fn a_panic_ends_the_connection_and_nothing_else() {
        let (carried, task) = whole(async { panic!("a bug") });
        assert!(elsewhere(&carried));
        task.await;
    }

    #[tokio::test]
    async fn nobody_waits_for_a_connection_that_is_being_polled() {
        let (carried, task) = whole(std::future::pending());
        let held = carried.work();
        let other = carried.clone();
        assert!(!thread::spawn(move || other.carry_on()).join().unwrap());
        drop(held);
        drop(task);
        assert!(carried.work().is_none(), "it ends with its task");
    }
}
