//! The last requests, and the latencies of the last minute: what watchers look at. A request
//! costs two short locks here whether anybody watches or not; watching itself only reads.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use pirouette_engine::{Ring, Timing};

/// Requests remembered: a trace looks ten times a second.
const REMEMBERED: usize = 1024;

/// Seconds that latencies are kept for.
const SECONDS: u64 = 60;

/// Latencies kept of one second; above that a fair sample of them.
const KEPT: usize = 256;

/// One request on its way through a connection. A stage it never reached has no time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RequestRecord {
    /// Its number, from 1, over all connections.
    pub(crate) id: u64,
    pub(crate) connection: u64,
    pub(crate) bytes: usize,
    /// Its last byte arrived.
    pub(crate) received: Instant,
    /// Its turn came.
    pub(crate) began: Instant,
    pub(crate) decoded: Option<Instant>,
    pub(crate) inferred: Option<Instant>,
    pub(crate) encoded: Option<Instant>,
    /// The answer, or the error, was handed to the socket.
    pub(crate) sent: Instant,
    /// `ok`, or why not.
    pub(crate) outcome: &'static str,
    /// The engine's account.
    pub(crate) timing: Option<Timing>,
    /// Of its noise, unless that was given.
    pub(crate) seed: Option<u64>,
}

impl RequestRecord {
    /// A request whose turn came at `began`.
    pub(crate) fn begin(connection: u64, bytes: usize, received: Instant, began: Instant) -> Self {
        RequestRecord {
            id: 0,
            connection,
            bytes,
            received,
            began,
            decoded: None,
            inferred: None,
            encoded: None,
            sent: began,
            outcome: "",
            timing: None,
            seed: None,
        }
    }

    pub(crate) fn total_ms(&self) -> f64 {
        ms_between(self.received, self.sent)
    }
}

/// What a server remembers.
#[derive(Debug)]
pub(crate) struct Recent {
    pub(crate) requests: Ring<RequestRecord>,
    minute: Mutex<LastMinute>,
    started: Instant,
}

impl Default for Recent {
    fn default() -> Self {
        let minute = Mutex::new(LastMinute::default());
        Recent { requests: Ring::new(REMEMBERED), minute, started: Instant::now() }
    }
}

impl Recent {
    /// Takes in a request that is over, and gives it its number.
    pub(crate) fn finished(&self, record: RequestRecord) -> RequestRecord {
        if record.outcome == "ok" {
            let second = record.sent.duration_since(self.started).as_secs();
            let mut minute = self.minute.lock().unwrap_or_else(PoisonError::into_inner);
            minute.record(second, record.total_ms() as f32);
        }
        let id = self.requests.push(|id| RequestRecord { id, ..record });
        RequestRecord { id, ..record }
    }

    /// Answers of the last minute: how many, and these quantiles of their latencies.
    pub(crate) fn quantiles_ms<const N: usize>(&self, q: [f64; N]) -> (u64, Option<[f32; N]>) {
        let second = self.started.elapsed().as_secs();
        let minute = self.minute.lock().unwrap_or_else(PoisonError::into_inner);
        minute.quantiles(second, q)
    }

    /// Seconds since the server started.
    pub(crate) fn uptime_s(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }
}

/// Latencies by the second they ended in; each second holds all of its, or a fair sample.
#[derive(Debug, Default)]
struct LastMinute {
    seconds: Vec<Second>,
}

#[derive(Clone, Debug)]
struct Second {
    second: u64,
    count: u64,
    ms: Vec<f32>,
}

impl LastMinute {
    fn record(&mut self, second: u64, ms: f32) {
        if self.seconds.is_empty() {
            let empty = |i| Second { second: i, count: 0, ms: Vec::new() };
            self.seconds = (0..SECONDS).map(empty).collect();
        }
        let slot = &mut self.seconds[(second % SECONDS) as usize];
        if slot.second != second {
            slot.second = second;
            slot.count = 0;
            slot.ms.clear();
        }
        slot.count += 1;
        if slot.ms.len() < KEPT {
            slot.ms.push(ms);
            return;
        }
        // Reservoir sampling (Vitter's algorithm R): each of `count` stays with the same chance.
        let at = (scramble(second << 32 ^ slot.count) % slot.count) as usize;
        if at < KEPT {
            slot.ms[at] = ms;
        }
    }

    fn quantiles<const N: usize>(&self, now: u64, q: [f64; N]) -> (u64, Option<[f32; N]>) {
        let fresh = |s: &&Second| s.count > 0 && s.second + SECONDS > now;
        let mut weighted: Vec<(f32, f64)> = Vec::new();
        let mut count = 0;
        for s in self.seconds.iter().filter(fresh) {
            count += s.count;
            let weight = s.count as f64 / s.ms.len() as f64;
            weighted.extend(s.ms.iter().map(|ms| (*ms, weight)));
        }
        weighted.sort_by(|a, b| a.0.total_cmp(&b.0));
        let Some(last) = weighted.last().map(|w| w.0) else { return (0, None) };
        let at = |q: f64| {
            let mut left = q * count as f64;
            let reached = weighted.iter().find(|(_, weight)| {
                left -= weight;
                left <= 1e-6
            });
            reached.map_or(last, |(ms, _)| *ms)
        };
        (count, Some(q.map(at)))
    }
}

/// The finaliser of Steele, Lea and Flood's generator.
fn scramble(n: u64) -> u64 {
    let z = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// Milliseconds from one instant to a later one; zero when they are the other way round.
pub(crate) fn ms_between(from: Instant, to: Instant) -> f64 {
    to.saturating_duration_since(from).as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_exact_while_everything_is_kept() {
        let mut minute = LastMinute::default();
        assert_eq!(minute.quantiles(0, [0.5]), (0, None));
        for i in 0..200 {
            // Spread over four seconds, in no order.
            minute.record(i % 4, ((i * 73) % 200 + 1) as f32);
        }
        assert_eq!(
            minute.quantiles(5, [0.5, 0.9, 0.99, 1.0]),
            (200, Some([100., 180., 198., 200.]))
        );
        assert_eq!(minute.quantiles(61, [0.5]).0, 100, "seconds 0 and 1 are out");
        assert_eq!(minute.quantiles(100, [0.5]), (0, None));
        minute.record(120, 7.0);
        assert_eq!(minute.quantiles(121, [0.5]), (1, Some([7.0])), "second 0's place is reused");
    }

    #[test]
    fn a_busy_second_is_sampled_fairly_and_weighs_what_it_held() {
        let mut minute = LastMinute::default();
        for i in 0..50_000 {
            minute.record(1, (i % 1000) as f32);
        }
        for _ in 0..100 {
            minute.record(2, 5000.0);
        }
        let (count, q) = minute.quantiles(3, [0.5, 0.9]);
        let [p50, p90] = q.unwrap();
        assert_eq!(count, 50_100);
        assert!((400.0..600.0).contains(&p50) && (820.0..980.0).contains(&p90), "{p50} {p90}");
        assert!(minute.seconds.iter().all(|s| s.ms.len() <= KEPT));
    }
}
