//! A listener's connections whose request is not there yet: bounded, and where all places are
//! taken the one that has been silent longest makes room, so that silent ones keep nobody out.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::{AbortHandle, JoinSet};

/// The places of a listener.
pub(crate) struct Places {
    free: Arc<Semaphore>,
    limit: usize,
    /// In the order they came; some have asked or ended since.
    taken: VecDeque<Taken>,
}

struct Taken {
    task: AbortHandle,
    asked: Arc<AtomicBool>,
}

impl Taken {
    fn is_silent(&self) -> bool {
        !self.asked.load(Relaxed) && !self.task.is_finished()
    }
}

/// A place among them, given back when it is dropped.
pub(crate) struct Place {
    asked: Arc<AtomicBool>,
    _permit: OwnedSemaphorePermit,
}

impl Place {
    /// The request is there: the connection no longer makes room for others.
    pub(crate) fn asked(&self) {
        self.asked.store(true, Relaxed);
    }
}

impl Places {
    pub(crate) fn new(limit: usize) -> Self {
        let limit = limit.min(Semaphore::MAX_PERMITS);
        Places { free: Arc::new(Semaphore::new(limit)), limit, taken: VecDeque::new() }
    }

    /// Runs a connection in a place. False where none was free: then one that was silent is
    /// dropped for it, or the new one, if all others have asked.
    pub(crate) fn spawn<F>(
        &mut self,
        tasks: &mut JoinSet<()>,
        converse: impl FnOnce(Place) -> F + Send + 'static,
    ) -> bool
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let permit = self.free.clone().try_acquire_owned().ok();
        let free = permit.is_some();
        if !free {
            let Some(silent) = self.oldest_silent() else { return false };
            silent.abort();
        }
        let (asked, waiting) = (Arc::new(AtomicBool::new(false)), self.free.clone());
        let own = asked.clone();
        let task = tasks.spawn(async move {
            let permit = match permit {
                Some(permit) => permit,
                // Of the one that is dropped. The semaphore is never closed.
                None => match waiting.acquire_owned().await {
                    Ok(permit) => permit,
                    Err(_) => return,
                },
            };
            converse(Place { asked: own, _permit: permit }).await;
        });
        if self.taken.len() >= 2 * self.limit {
            self.taken.retain(Taken::is_silent);
        }
        self.taken.push_back(Taken { task, asked });
        free
    }

    fn oldest_silent(&mut self) -> Option<AbortHandle> {
        loop {
            let oldest = self.taken.pop_front()?;
            if oldest.is_silent() {
                return Some(oldest.task);
            }
        }
    }
}
