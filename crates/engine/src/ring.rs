//! The last few of many records, numbered, for whoever watches: traces and dashboards.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A bounded memory of records with numbers from 1, without gaps. A watcher asks for what came
/// after the last number it saw; when the next is missing, it was forgotten.
#[derive(Debug)]
pub struct Ring<T> {
    inner: Mutex<Inner<T>>,
    capacity: usize,
}

#[derive(Debug)]
struct Inner<T> {
    records: VecDeque<T>,
    /// Records ever pushed: the number of the newest.
    count: u64,
}

impl<T: Clone> Ring<T> {
    /// Remembers that many.
    pub fn new(capacity: usize) -> Self {
        let inner = Inner { records: VecDeque::new(), count: 0 };
        Ring { inner: Mutex::new(inner), capacity: capacity.max(1) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner<T>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a record, made from its number, and says the number.
    pub fn push(&self, make: impl FnOnce(u64) -> T) -> u64 {
        let mut inner = self.lock();
        let number = inner.count + 1;
        let record = make(number);
        if inner.records.len() == self.capacity {
            inner.records.pop_front();
        }
        inner.records.push_back(record);
        inner.count = number;
        number
    }

    /// Number of the newest record, 0 before the first.
    pub fn newest(&self) -> u64 {
        self.lock().count
    }

    /// Records with a number above `number`, oldest first, and how many of those were forgotten.
    pub fn after(&self, number: u64) -> (Vec<T>, u64) {
        let inner = self.lock();
        let kept = inner.records.len() as u64;
        let first = inner.count - kept + 1;
        let forgotten = first.saturating_sub(number.saturating_add(1));
        let skip = number.saturating_sub(first - 1).min(kept) as usize;
        (inner.records.iter().skip(skip).cloned().collect(), forgotten)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_no_gaps_and_what_is_forgotten_is_counted() {
        let ring = Ring::new(4);
        assert_eq!((ring.newest(), ring.after(0)), (0, (vec![], 0)));
        for i in 1..=3 {
            assert_eq!(ring.push(|n| n * 10), i);
        }
        assert_eq!(ring.after(0), (vec![10, 20, 30], 0));
        assert_eq!(ring.after(2), (vec![30], 0));
        for _ in 0..4 {
            ring.push(|n| n * 10);
        }
        assert_eq!(ring.after(1), (vec![40, 50, 60, 70], 2), "2 and 3 are gone");
        assert_eq!(ring.after(6), (vec![70], 0));
        assert_eq!(ring.after(7), (vec![], 0));
        assert_eq!(ring.after(99), (vec![], 0), "a number of the future");
    }
}
