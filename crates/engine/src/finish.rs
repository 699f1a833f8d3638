//! Devices at work and requests waiting → who would finish what, and when.

use std::time::{Duration, Instant};

use crate::bucket::{Bucket, BucketRule};
use crate::request::EngineError;
use crate::shared::{DeviceState, Phase, State};

/// A device must be sooner by this much before another leaves it work: differences below are
/// noise between equal cards.
const SOONER: f64 = 0.8;

/// One ready device as the prediction sees it.
struct Lane {
    /// Until it is free.
    free: Duration,
    /// Time of one batch in its best size, and that size.
    took: Duration,
    per_batch: usize,
}

impl DeviceState {
    /// The batch size with the most requests per second, and its careful time.
    fn best_batch(&self, bucket: Bucket, rule: &BucketRule) -> Option<(usize, Duration)> {
        let alone = self.times.predict(bucket, rule.batches[0])?;
        let (mut per_batch, mut took) = (rule.batches[0], alone);
        for &slots in &rule.batches {
            if let Some(t) = self.times.measured(bucket, slots)
                && t.as_secs_f64() * (per_batch as f64) < took.as_secs_f64() * slots as f64
            {
                (per_batch, took) = (slots, self.times.predict(bucket, slots).unwrap_or(t));
            }
        }
        Some((per_batch, took))
    }

    fn lane(&self, now: Instant, bucket: Bucket, rule: &BucketRule) -> Option<Lane> {
        let (per_batch, took) = self.best_batch(bucket, rule)?;
        Some(Lane { free: self.free_in(now), took, per_batch })
    }

    /// Predicted time until it is free.
    fn free_in(&self, now: Instant) -> Duration {
        let until = self.running.as_ref().map(|r| r.started + r.predicted);
        until.map_or(Duration::ZERO, |at| at.saturating_duration_since(now))
    }
}

/// Time of a request that runs at once on the fastest device; zero while nothing is known.
pub(crate) fn shortest(devices: &[DeviceState], bucket: Bucket, rule: &BucketRule) -> Duration {
    let ready = devices.iter().filter(|d| d.phase == Phase::Ready);
    let times = ready.map(|d| d.times.predict(bucket, rule.batches[0]).unwrap_or_default());
    times.min().unwrap_or_default()
}

/// The same by the best of the last runs, zero where nothing is known or was learnt lately: for a
/// request that comes alone.
pub(crate) fn hope(
    devices: &[DeviceState],
    now: Instant,
    bucket: Bucket,
    rule: &BucketRule,
) -> Option<Duration> {
    let idle = devices.iter().filter(|d| d.phase == Phase::Ready && d.running.is_none());
    idle.map(|d| d.times.hope(bucket, rule.batches[0], now).unwrap_or_default()).min()
}

impl State {
    pub(crate) fn ready(&self) -> impl Iterator<Item = &DeviceState> {
        self.devices.iter().filter(|d| d.phase == Phase::Ready)
    }

    /// Ready devices that do nothing.
    pub(crate) fn idle(&self) -> usize {
        self.ready().filter(|d| d.running.is_none()).count()
    }

    /// The shape that some ready device runs fastest.
    pub(crate) fn fastest(&self, rule: &BucketRule) -> Option<Bucket> {
        let smallest = rule.batches[0];
        let timed = self.ready().filter_map(|d| {
            let bucket = d.times.fastest(smallest)?;
            Some((d.times.measured(bucket, smallest)?, bucket))
        });
        timed.min_by_key(|(took, _)| *took).map(|(_, bucket)| bucket)
    }

    /// Whether a request entering now can be answered in time.
    pub(crate) fn admit(
        &self,
        rule: &BucketRule,
        now: Instant,
        bucket: Bucket,
        deadline: Option<Instant>,
    ) -> Result<(), EngineError> {
        if self.draining || self.stop {
            return Err(EngineError::Draining);
        }
        if let Some(why) = self.unready() {
            return Err(EngineError::Unavailable(why));
        }
        let Some(deadline) = deadline else { return Ok(()) };
        // Where nothing waits and a device does nothing, a request may try what lately went well.
        let alone = self.queue.is_empty().then(|| hope(&self.devices, now, bucket, rule)).flatten();
        let predicted =
            alone.or_else(|| self.predict(rule, now, bucket, Some(deadline))).unwrap_or_default();
        if now + predicted > deadline {
            return Err(EngineError::deadline(now, deadline, predicted));
        }
        Ok(())
    }

    /// Predicted time until a request entering now would have its answer: what runs, what is
    /// ahead of it in the best batch sizes, then its own batch, each on the device that finishes
    /// it first. `None` while nothing is known.
    pub(crate) fn predict(
        &self,
        rule: &BucketRule,
        now: Instant,
        bucket: Bucket,
        deadline: Option<Instant>,
    ) -> Option<Duration> {
        let lanes: Vec<(&DeviceState, Lane)> =
            self.ready().filter_map(|d| Some((d, d.lane(now, bucket, rule)?))).collect();
        let mut free: Vec<Duration> = lanes.iter().map(|(_, lane)| lane.free).collect();
        let mut ahead = self.queue.ahead_of(deadline, now);
        let behind_others = ahead > 0;
        let mut behind_full = false;
        loop {
            let finish = |i: &usize| free[*i] + lanes[*i].1.took;
            let first = (0..lanes.len()).min_by_key(finish)?;
            let Lane { took, per_batch, .. } = lanes[first].1;
            if ahead < per_batch {
                break;
            }
            ahead -= per_batch;
            free[first] += took;
            behind_full = true;
        }
        // With a full batch ahead there is more work than time: its own batch will be full as well
        // when its turn comes. Let in for less, it would force a small batch then, and with it a
        // throughput that makes the next ones late.
        let slots = rule.batches.iter().copied().find(|s| *s > ahead).filter(|_| !behind_full);
        let finish = lanes.iter().zip(free).map(|((device, lane), free)| {
            let run = device.times.predict(bucket, slots.unwrap_or(lane.per_batch));
            // A quarter of a batch in reserve: a request let in with no slack would force small
            // batches on everybody when its turn comes.
            let reserve = if behind_others { lane.took / 4 } else { Duration::ZERO };
            free + run.unwrap_or(lane.took) + reserve
        });
        finish.min()
    }

    /// How many of the waiting requests device `index` should leave to faster ones, because they
    /// would finish them before it could finish a batch. Zero among equal devices.
    pub(crate) fn leave_to_faster(&self, index: usize, now: Instant, rule: &BucketRule) -> usize {
        let Some((head, mates)) = self.queue.head(0, rule) else { return 0 };
        let bucket = head.inputs.bucket;
        let Some(own) = self.devices[index].times.predict(bucket, mates) else { return 0 };
        let others = self.devices.iter().enumerate().filter(|(i, d)| {
            // One that is overdue may be hung: nobody waits for it.
            let on_time = d.running.as_ref().is_none_or(|r| r.started + r.predicted > now);
            *i != index && d.phase == Phase::Ready && on_time
        });
        let finished = others.map(|(_, device)| {
            let Some(each) = device.times.predict(bucket, mates) else { return 0 };
            let until = own.as_secs_f64() * SOONER - device.free_in(now).as_secs_f64();
            (until / each.as_secs_f64().max(1e-6)).max(0.0) as usize * mates
        });
        finished.sum()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use pirouette_model::{Config, WeightTable};

    use super::*;
    use crate::options::EngineOptions;
    use crate::queue::Queue;
    use crate::queue::tests::job;

    /// One ready device that does nothing, with these times in milliseconds by batch size, and as
    /// many requests waiting as `ahead`.
    fn state(times: &[(usize, u64)], ahead: usize) -> (State, Bucket, BucketRule) {
        let tables = vec![Arc::new(WeightTable::new(Config::pi0(), 10))];
        let options = EngineOptions::new(tables, 10, 48);
        let bucket = options.bucket(3, 16);
        let mut device = DeviceState::new(&options);
        device.phase = Phase::Ready;
        for (batch, ms) in times {
            for _ in 0..200 {
                device.times.record(bucket, *batch, Duration::from_millis(*ms));
            }
        }
        let mut queue = Queue::new(256);
        let arrived = Instant::now();
        for _ in 0..ahead {
            queue.push(job(arrived, None, bucket).0).unwrap();
        }
        let (draining, stop, threads, expected) = (false, false, Vec::new(), None);
        let devices = vec![device];
        let state = State { queue, devices, expected, draining, stop, threads };
        (state, bucket, BucketRule::gpu(16))
    }

    #[test]
    fn behind_a_full_batch_a_request_is_judged_by_another_full_one() {
        let times = [(1, 10), (2, 19), (4, 33), (8, 64), (16, 115)];
        let predicted_ms = |ahead: usize| {
            let (state, bucket, rule) = state(&times, ahead);
            // Later than all that wait, so that they are served before it.
            let now = Instant::now() + Duration::from_secs(1);
            state.predict(&rule, now, bucket, None).unwrap().as_secs_f64() * 1e3
        };
        let near = |ahead: usize, want: f64| {
            let got = predicted_ms(ahead);
            assert!((got - want).abs() < 0.05 * want, "{ahead} ahead: {got} ms, {want} expected");
        };
        near(0, 10.0);
        // A quarter of a full batch is in reserve once somebody is ahead.
        near(3, 33.0 + 29.0);
        near(16, 115.0 + 115.0 + 29.0);
        near(20, 115.0 + 115.0 + 29.0);
        near(36, 3.0 * 115.0 + 29.0);
    }
}
