//! Measured run times → predicted run times, per bucket and batch size.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::bucket::Bucket;
use crate::queue::WORTHWHILE;

/// Weight of a new measurement in the running mean and deviation.
const GAIN: f64 = 0.125;

/// A measurement counts as this many times the mean at most: where a machine stood still for a
/// second, that says little about the next run.
const OUTLIER: f64 = 4.0;

/// Runs that are remembered one by one.
const RECENT: usize = 8;

/// An estimate that no run has confirmed for this long refuses nobody who comes alone.
const DOUBT: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug)]
struct Estimate {
    mean_ms: f64,
    deviation_ms: f64,
    /// The last runs, as a ring.
    recent_ms: [f64; RECENT],
    runs: usize,
    last: Instant,
}

/// Running estimates of how long a device works on a batch.
#[derive(Debug, Default)]
pub(crate) struct ServiceTimes {
    estimates: HashMap<(Bucket, usize), Estimate>,
}

impl ServiceTimes {
    /// Takes in one measured run.
    pub(crate) fn record(&mut self, bucket: Bucket, batch: usize, took: Duration) {
        self.record_at(bucket, batch, took, Instant::now());
    }

    fn record_at(&mut self, bucket: Bucket, batch: usize, took: Duration, now: Instant) {
        let took_ms = took.as_secs_f64() * 1e3;
        let e = self.estimates.entry((bucket, batch)).or_insert(Estimate {
            mean_ms: took_ms,
            deviation_ms: took_ms / 8.0,
            recent_ms: [took_ms; RECENT],
            runs: 0,
            last: now,
        });
        e.recent_ms[e.runs % RECENT] = took_ms;
        e.runs += 1;
        e.last = now;
        let error = took_ms.min(e.mean_ms * OUTLIER) - e.mean_ms;
        e.mean_ms += GAIN * error;
        e.deviation_ms += GAIN * (error.abs() - e.deviation_ms);
    }

    /// Mean time of exactly this bucket and batch size, if it ever ran.
    pub(crate) fn measured(&self, bucket: Bucket, batch: usize) -> Option<Duration> {
        self.estimates.get(&(bucket, batch)).map(|e| millis(e.mean_ms))
    }

    /// Whether full batches of a larger size are faster, or might be: it never ran.
    pub(crate) fn is_worthwhile(&self, bucket: Bucket, size: usize, larger: usize) -> bool {
        let rate = |n| self.measured(bucket, n).map(|took| n as f64 / took.as_secs_f64().max(1e-6));
        let Some((rate, of_larger)) = rate(size).zip(rate(larger)) else { return true };
        of_larger > rate * WORTHWHILE
    }

    /// The best of the last runs of exactly this bucket and batch size: what a request may hope for
    /// that has the device to itself. `None` if it never ran, or not lately. A slow run raises
    /// [`ServiceTimes::predict`], and if that refused everybody, no run would ever lower it again.
    pub(crate) fn hope(&self, bucket: Bucket, batch: usize, now: Instant) -> Option<Duration> {
        let e = self.estimates.get(&(bucket, batch))?;
        let best_ms = e.recent_ms.iter().copied().fold(f64::INFINITY, f64::min);
        (now.saturating_duration_since(e.last) <= DOUBT).then(|| millis(best_ms))
    }

    /// The bucket that runs fastest at a batch size, of those that ran.
    pub(crate) fn fastest(&self, batch: usize) -> Option<Bucket> {
        let ran = self.estimates.iter().filter(|((_, n), _)| *n == batch);
        ran.min_by(|a, b| a.1.mean_ms.total_cmp(&b.1.mean_ms)).map(|((bucket, _), _)| *bucket)
    }

    /// A careful prediction: mean plus twice the mean deviation; for a batch size that never ran
    /// scaled up from smaller ones; for a bucket that never ran the slowest of the others.
    /// `None` before the first measurement.
    pub(crate) fn predict(&self, bucket: Bucket, batch: usize) -> Option<Duration> {
        let careful = |e: &Estimate, at: usize| {
            let scale = (batch as f64 / at as f64).max(1.0);
            (e.mean_ms + 2.0 * e.deviation_ms) * scale
        };
        if let Some(e) = self.estimates.get(&(bucket, batch)) {
            return Some(millis(careful(e, batch)));
        }
        let nearest = |same: bool| {
            self.estimates
                .iter()
                .filter(|((b, _), _)| (*b == bucket) == same)
                .min_by_key(|((_, at), _)| at.abs_diff(batch))
                .map(|((_, at), _)| *at)
        };
        let slowest = |same: bool| {
            let at = nearest(same)?;
            self.estimates
                .iter()
                .filter(|((b, n), _)| (*b == bucket) == same && *n == at)
                .map(|(_, e)| careful(e, at))
                .max_by(f64::total_cmp)
        };
        slowest(true).or_else(|| slowest(false)).map(millis)
    }
}

fn millis(ms: f64) -> Duration {
    Duration::from_secs_f64(ms.max(0.0) / 1e3)
}

#[cfg(test)]
mod tests {
    use pirouette_model::Rtc;

    use super::*;

    const BUCKET: Bucket =
        Bucket { cameras: 3, prompt_tokens: 48, horizon: 50, steps: 10, rtc: Rtc::Off };

    #[test]
    fn estimates_follow_measurements() {
        let mut times = ServiceTimes::default();
        assert_eq!(times.predict(BUCKET, 1), None);
        for _ in 0..100 {
            times.record(BUCKET, 1, Duration::from_millis(20));
        }
        let one = times.predict(BUCKET, 1).unwrap();
        assert!((19.9..21.0).contains(&(one.as_secs_f64() * 1e3)), "{one:?}");
        assert_eq!(times.measured(BUCKET, 4), None);
        let four = times.predict(BUCKET, 4).unwrap();
        assert!((four.as_secs_f64() / one.as_secs_f64() - 4.0).abs() < 1e-6, "linear bound");
        assert_eq!((times.fastest(1), times.fastest(4)), (Some(BUCKET), None));
        let other = Bucket { prompt_tokens: 64, ..BUCKET };
        assert_eq!(times.predict(other, 1), Some(one), "another bucket is the best guess");
        for _ in 0..100 {
            times.record(BUCKET, 1, Duration::from_millis(40));
        }
        times.record(other, 1, Duration::from_millis(30));
        assert_eq!(times.fastest(1), Some(other));
        assert!(times.measured(BUCKET, 1).unwrap() > Duration::from_millis(39));
    }

    #[test]
    fn a_run_that_stood_still_is_soon_forgotten() {
        let (mut times, start) = (ServiceTimes::default(), Instant::now());
        let mut run = |ms: u64, at_ms: u64| {
            let now = start + Duration::from_millis(at_ms);
            times.record_at(BUCKET, 1, Duration::from_millis(ms), now);
            let careful_ms = times.predict(BUCKET, 1).unwrap().as_secs_f64() * 1e3;
            (careful_ms, times.hope(BUCKET, 1, now))
        };
        let thirty = Some(Duration::from_millis(30));
        for i in 0..50 {
            run(30, i * 50);
        }
        let (careful_ms, hope) = run(1700, 4000);
        assert!((60.0..75.0).contains(&careful_ms), "four times the mean at most: {careful_ms}");
        assert_eq!(hope, thirty);
        let careful_ms = (0..16).map(|i| run(30, 4050 + i * 50).0).last().unwrap();
        assert!(careful_ms < 50.0, "{careful_ms}");
        // A device that really got slower is believed.
        let (careful_ms, hope) = (0..30).map(|i| run(200, 5000 + i * 200)).last().unwrap();
        assert!(careful_ms > 195.0, "{careful_ms}");
        assert_eq!(hope, Some(Duration::from_millis(200)));
        let last = start + Duration::from_millis(5000 + 29 * 200);
        assert!(times.hope(BUCKET, 1, last + DOUBT).is_some());
        assert_eq!(times.hope(BUCKET, 1, last + DOUBT * 2), None, "nobody knows any more");
        assert_eq!(times.hope(BUCKET, 2, last), None, "never ran");
    }

    #[test]
    fn a_smaller_batch_is_never_predicted_below_the_measured_larger_one() {
        let mut times = ServiceTimes::default();
        times.record(BUCKET, 8, Duration::from_millis(80));
        let predicted = times.predict(BUCKET, 1).unwrap();
        assert_eq!(predicted, times.predict(BUCKET, 8).unwrap());
    }
}
