//! Measured run times → predicted run times, per bucket and batch size.

use std::collections::HashMap;
use std::time::Duration;

use crate::bucket::Bucket;

/// Weight of a new measurement in the running mean and deviation.
const GAIN: f64 = 0.125;

#[derive(Clone, Copy, Debug)]
struct Estimate {
    mean_ms: f64,
    deviation_ms: f64,
}

/// Running estimates of how long a device works on a batch.
#[derive(Debug, Default)]
pub(crate) struct ServiceTimes {
    estimates: HashMap<(Bucket, usize), Estimate>,
}

impl ServiceTimes {
    /// Takes in one measured run.
    pub(crate) fn record(&mut self, bucket: Bucket, batch: usize, took: Duration) {
        let took_ms = took.as_secs_f64() * 1e3;
        let e = self
            .estimates
            .entry((bucket, batch))
            .or_insert(Estimate { mean_ms: took_ms, deviation_ms: took_ms / 8.0 });
        let error = took_ms - e.mean_ms;
        e.mean_ms += GAIN * error;
        e.deviation_ms += GAIN * (error.abs() - e.deviation_ms);
    }

    /// Mean time of exactly this bucket and batch size, if it ever ran.
    pub(crate) fn measured(&self, bucket: Bucket, batch: usize) -> Option<Duration> {
        self.estimates.get(&(bucket, batch)).map(|e| millis(e.mean_ms))
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
    fn a_smaller_batch_is_never_predicted_below_the_measured_larger_one() {
        let mut times = ServiceTimes::default();
        times.record(BUCKET, 8, Duration::from_millis(80));
        let predicted = times.predict(BUCKET, 1).unwrap();
        assert_eq!(predicted, times.predict(BUCKET, 8).unwrap());
    }
}
