//! Lines of a log that a client can cause as often as it likes → one a second.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

/// Lets one line in a second pass. A `static` beside each such line.
#[derive(Debug, Default)]
pub struct Seldom {
    /// Milliseconds since the process's first line at which the next may pass.
    next: AtomicU64,
    held: AtomicU64,
}

impl Seldom {
    /// The first line passes.
    pub const fn new() -> Self {
        Seldom { next: AtomicU64::new(0), held: AtomicU64::new(0) }
    }

    /// Whether this one passes, and how many were held back since the last that did.
    pub fn pass(&self) -> Option<u64> {
        static BEGAN: OnceLock<Instant> = OnceLock::new();
        self.pass_at(BEGAN.get_or_init(Instant::now).elapsed().as_millis() as u64)
    }

    fn pass_at(&self, now: u64) -> Option<u64> {
        let next = self.next.load(Relaxed);
        let passes =
            now >= next && self.next.compare_exchange(next, now + 1000, Relaxed, Relaxed).is_ok();
        if passes {
            return Some(self.held.swap(0, Relaxed));
        }
        self.held.fetch_add(1, Relaxed);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_a_second_passes_and_tells_of_the_others() {
        let line = Seldom::new();
        assert_eq!(line.pass_at(5), Some(0));
        assert_eq!(line.pass_at(6), None);
        assert_eq!(line.pass_at(1004), None);
        assert_eq!(line.pass_at(1005), Some(2));
        assert_eq!(line.pass_at(9000), Some(0));
    }
}
