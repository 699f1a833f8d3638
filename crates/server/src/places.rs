//! A listener's connections whose request is not there yet: bounded, and where all places are
//! taken the one that has been silent longest makes room, so that silent ones keep nobody out.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::{AbortHandle, JoinSet};

/// The places of a listener.
pub(crate) struct Places {
    free: Arc<Semaphore>,
    limit: usize,
    /// In the order they came; some have asked or ended since.
    taken: VecDeque<(AbortHandle, Arc<Mutex<Slot>>)>,
}

struct Slot {
    /// None: taken away from it, or given back.
    permit: Option<OwnedSemaphorePermit>,
    asked: bool,
}

fn lock(slot: &Mutex<Slot>) -> MutexGuard<'_, Slot> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A place among them, given back when it is dropped.
pub(crate) struct Place(Arc<Mutex<Slot>>);

impl Place {
    /// The request is there: the connection no longer makes room for others.
    pub(crate) fn asked(&self) {
        lock(&self.0).asked = true;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.0).permit = None;
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
        converse: impl FnOnce(Place) -> F,
    ) -> bool
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let gone = |slot: &Mutex<Slot>| {
            let slot = lock(slot);
            slot.asked || slot.permit.is_none()
        };
        while self.taken.front().is_some_and(|(_, slot)| gone(slot)) {
            self.taken.pop_front();
        }
        if self.taken.len() >= 2 * self.limit {
            self.taken.retain(|(_, slot)| !gone(slot));
        }
        let free = self.free.clone().try_acquire_owned().ok();
        let was_free = free.is_some();
        let Some(permit) = free.or_else(|| self.oldest_silent()) else { return false };
        let slot = Arc::new(Mutex::new(Slot { permit: Some(permit), asked: false }));
        let task = tasks.spawn(converse(Place(slot.clone())));
        self.taken.push_back((task, slot));
        was_free
    }

    /// Ends it, and takes its place away.
    fn oldest_silent(&mut self) -> Option<OwnedSemaphorePermit> {
        loop {
            let (task, slot) = self.taken.pop_front()?;
            let mut slot = lock(&slot);
            if !slot.asked
                && let Some(permit) = slot.permit.take()
            {
                task.abort();
                return Some(permit);
            }
        }
    }
}
