//! What a server knows of one robot: the newest observation, and what was predicted already.
//!
//! LeRobot's rules: one observation waits, the newest wins; one that follows an answered one must
//! be new in step and state, unless the client says that it must go.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use pirouette_policy::Value;
use tokio::sync::Notify;

use super::setup::Setup;

/// Steps remembered: more than any robot has on the way.
const REMEMBERED_STEPS: usize = 4096;

/// Least distance between states that differ, in the robot's own units.
const NEW_STATE: f64 = 1.0;

/// An observation that fits the policy.
#[derive(Clone, Debug)]
pub(super) struct Observed {
    /// Under the policy's keys.
    pub(super) observation: Value,
    /// Its state, for comparison.
    pub(super) state: Vec<f32>,
    pub(super) timestamp: f64,
    pub(super) timestep: i64,
    pub(super) must_go: bool,
    /// Module of the client's classes.
    pub(super) module: String,
    /// When its last byte arrived, and what decoding took.
    pub(super) received: Instant,
    pub(super) decode_ms: f64,
    pub(super) bytes: usize,
    /// Horizon the client wants, and what it wants it for.
    pub(super) setup: Arc<Setup>,
}

/// What became of an observation that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arrival {
    Queued,
    /// Queued in the place of an older one.
    Replaced,
    /// Its step was answered already.
    OldStep,
    /// The robot has hardly moved.
    SameState,
}

impl Arrival {
    /// Label in the metrics.
    pub(super) fn name(self) -> &'static str {
        match self {
            Arrival::Queued => "queued",
            Arrival::Replaced => "replaced_older",
            Arrival::OldStep => "old_step",
            Arrival::SameState => "same_state",
        }
    }
}

#[derive(Debug, Default)]
struct State {
    setup: Option<Arc<Setup>>,
    queued: Option<Observed>,
    predicted: BTreeSet<i64>,
    /// State of the observation that was answered last.
    last: Option<Vec<f32>>,
    /// An answer failed: whatever comes next must go, since the client doesn't know.
    retry: bool,
    /// Counts calls of `Ready`.
    epoch: u64,
}

/// One robot.
#[derive(Debug, Default)]
pub(super) struct Session {
    state: Mutex<State>,
    arrived: Notify,
}

impl Session {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `Ready`: forgets everything but what the robot is.
    pub(super) fn clear(&self) {
        let mut state = self.state();
        let setup = state.setup.take();
        *state = State { setup, epoch: state.epoch + 1, ..State::default() };
    }

    pub(super) fn set_up(&self, setup: Setup) {
        self.state().setup = Some(Arc::new(setup));
    }

    pub(super) fn setup(&self) -> Option<Arc<Setup>> {
        self.state().setup.clone()
    }

    /// Takes an observation in, or not.
    pub(super) fn arrive(&self, observed: Observed) -> Arrival {
        let mut state = self.state();
        if let Some(last) = &state.last
            && !observed.must_go
            && !state.retry
        {
            if state.predicted.contains(&observed.timestep) {
                return Arrival::OldStep;
            }
            if distance(last, &observed.state) < NEW_STATE {
                return Arrival::SameState;
            }
        }
        let older = state.queued.replace(observed);
        drop(state);
        self.arrived.notify_one();
        if older.is_some() { Arrival::Replaced } else { Arrival::Queued }
    }

    /// Waits for an observation and takes it. Safe to drop.
    pub(super) async fn next(self: &Arc<Self>) -> (Observed, Taken) {
        loop {
            if let Some(observed) = self.take() {
                let epoch = self.state().epoch;
                return (observed, Taken { session: self.clone(), epoch, answered: false });
            }
            self.arrived.notified().await;
        }
    }

    fn take(&self) -> Option<Observed> {
        let mut state = self.state();
        let observed = state.queued.take()?;
        state.predicted.insert(observed.timestep);
        if state.predicted.len() > REMEMBERED_STEPS {
            state.predicted.pop_first();
        }
        state.last = Some(observed.state.clone());
        state.retry = false;
        Some(observed)
    }
}

/// An observation that is being answered. Dropped without an answer, it lets the next one pass:
/// LeRobot's client waits for actions before it says again that one must go.
pub(super) struct Taken {
    session: Arc<Session>,
    epoch: u64,
    answered: bool,
}

impl Taken {
    pub(super) fn answered(mut self) {
        self.answered = true;
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let mut state = self.session.state();
        if !self.answered && state.epoch == self.epoch {
            state.retry = true;
        }
    }
}

/// Pieces of one observation → the whole.
#[derive(Debug, Default)]
pub(super) struct Assembly {
    pieces: Vec<u8>,
}

/// What a piece made of it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece {
    More,
    Whole(Bytes),
    /// Longer than the limit.
    TooBig,
    /// A transfer state nobody knows.
    Unknown,
}

impl Assembly {
    /// BEGIN (1) starts anew, MIDDLE (2) adds, END (3) completes; one that is short is END alone.
    pub(super) fn add(&mut self, transfer_state: u64, data: Bytes, limit: usize) -> Piece {
        if transfer_state == 1 {
            self.pieces.clear();
        }
        if data.len() > limit.saturating_sub(self.pieces.len()) {
            return Piece::TooBig;
        }
        match transfer_state {
            1 | 2 => {
                self.pieces.extend_from_slice(&data);
                Piece::More
            }
            3 if self.pieces.is_empty() => Piece::Whole(data),
            3 => {
                self.pieces.extend_from_slice(&data);
                Piece::Whole(std::mem::take(&mut self.pieces).into())
            }
            _ => Piece::Unknown,
        }
    }
}

/// L2, in the robot's own units.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let squares = a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2));
    squares.sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn observed(timestep: i64, state: f32, must_go: bool) -> Observed {
        Observed {
            observation: Value::Nil,
            state: vec![0.0, state],
            timestamp: 0.0,
            timestep,
            must_go,
            module: String::new(),
            received: Instant::now(),
            decode_ms: 0.0,
            bytes: 0,
            setup: Arc::default(),
        }
    }

    #[tokio::test]
    async fn the_newest_observation_waits_and_old_news_do_not() {
        let session = Arc::new(Session::default());
        assert_eq!(session.arrive(observed(0, 0.0, false)), Arrival::Queued, "nothing processed");
        assert_eq!(session.arrive(observed(1, 0.0, false)), Arrival::Replaced);
        let (first, taken) = session.next().await;
        assert_eq!(first.timestep, 1);
        // The rules hold while it is being answered.
        assert_eq!(session.arrive(observed(1, 9.0, false)), Arrival::OldStep);
        assert_eq!(session.arrive(observed(2, 0.99, false)), Arrival::SameState);
        assert_eq!(session.arrive(observed(2, 1.0, false)), Arrival::Queued);
        assert_eq!(session.arrive(observed(1, 0.0, true)), Arrival::Replaced, "it must go");
        taken.answered();
        let (second, taken) = session.next().await;
        assert_eq!(second.timestep, 1);
        drop(taken);
        assert_eq!(session.arrive(observed(1, 0.0, false)), Arrival::Queued, "the answer failed");
        session.next().await.1.answered();
        assert_eq!(session.arrive(observed(1, 0.0, false)), Arrival::OldStep);
        let (_, taken) = {
            assert_eq!(session.arrive(observed(5, 5.0, true)), Arrival::Queued);
            session.next().await
        };
        session.clear();
        drop(taken);
        assert!(!session.state().retry, "that was before `Ready`");
        assert_eq!(session.arrive(observed(5, 5.0, false)), Arrival::Queued);
    }

    #[tokio::test]
    async fn waiting_ends_with_an_arrival_and_steps_are_forgotten_in_the_end() {
        let session = Arc::new(Session::default());
        let waiting = session.clone();
        let waiter = tokio::spawn(async move { waiting.next().await.0.timestep });
        while Arc::strong_count(&session) < 2 {
            tokio::task::yield_now().await;
        }
        session.arrive(observed(7, 0.0, true));
        assert_eq!(waiter.await.unwrap(), 7);
        for step in 0..2 * REMEMBERED_STEPS as i64 {
            session.arrive(observed(step, 0.0, true));
            session.next().await.1.answered();
        }
        assert_eq!(session.state().predicted.len(), REMEMBERED_STEPS);
    }

    #[test]
    fn pieces_make_a_whole_up_to_the_limit() {
        let mut assembly = Assembly::default();
        let mut add = |state, data: &'static [u8]| assembly.add(state, Bytes::from_static(data), 6);
        assert_eq!(add(3, b"short"), Piece::Whole(Bytes::from_static(b"short")));
        assert_eq!(add(1, b"lost"), Piece::More);
        assert_eq!(add(1, b"ab"), Piece::More);
        assert_eq!(add(2, b"cd"), Piece::More);
        assert_eq!(add(3, b"ef"), Piece::Whole(Bytes::from_static(b"abcdef")));
        assert_eq!(add(1, b"abcd"), Piece::More);
        assert_eq!(add(2, b"efg"), Piece::TooBig);
        assert_eq!(add(3, b"1234567"), Piece::TooBig);
        assert_eq!(add(0, b""), Piece::Unknown);
        assert_eq!(add(4, b""), Piece::Unknown);
    }
}
