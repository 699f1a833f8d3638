//! A device thread that has nothing else to do → one that may carry its answer on by itself.
//!
//! Whoever awaits an answer usually has to be woken for it, and a thread that slept takes about a
//! tenth of a millisecond to wake: longer than making a robot's answer of it and sending that. The
//! device thread is awake. So whoever is woken by it may ask here whether to go on at once, where
//! it is; the engine says yes when the device has answered its only request and none waits.

use std::cell::Cell;

thread_local! {
    static LEISURE: Cell<bool> = const { Cell::new(false) };
}

/// Whether the calling thread is a device's, hands out the only answer of a run at this moment,
/// and has no other work waiting: then it may spend the tens of microseconds that the rest of the
/// answer takes. Said once for each answer, so that what is woken on the way goes its usual way.
pub fn take_leisure() -> bool {
    LEISURE.take()
}

/// Hands out an answer; with `leisure`, whoever is woken by that may go on here.
pub(crate) fn hand_out<T>(leisure: bool, answer: impl FnOnce() -> T) -> T {
    LEISURE.set(leisure);
    let given = answer();
    LEISURE.set(false);
    given
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leisure_is_said_once_and_only_while_an_answer_is_handed_out() {
        assert!(!take_leisure());
        assert_eq!(hand_out(true, || [take_leisure(), take_leisure()]), [true, false]);
        assert!(!hand_out(false, take_leisure));
        hand_out(true, || ());
        assert!(!take_leisure(), "nobody took it, and the moment is over");
    }
}
