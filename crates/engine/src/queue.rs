//! Waiting requests → batches: one bounded queue, earliest deadline first.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use pirouette_model::PreviousChunk;
use tokio::sync::oneshot;

use crate::bucket::{Bucket, BucketRule};
use crate::request::{Answer, EngineError};
use crate::times::ServiceTimes;

/// A request without a deadline is ordered as if it had one this far after its arrival, so that
/// requests with deadlines can't starve it.
const PATIENCE: Duration = Duration::from_secs(10);

/// A larger batch must promise this much more throughput, or requests would wait for nothing.
pub(crate) const WORTHWHILE: f64 = 1.02;

/// Requests per second assumed of a batch size that never ran: above anything measured.
const UNTRIED: f64 = 1e9;

/// What the model needs of a request; noise already drawn.
#[derive(Debug)]
pub(crate) struct JobInputs {
    pub(crate) bucket: Bucket,
    pub(crate) images: Vec<Bytes>,
    pub(crate) tokens: Vec<u32>,
    pub(crate) state: Vec<f32>,
    pub(crate) noise: Vec<f32>,
    /// There exactly if the bucket has real-time chunking.
    pub(crate) previous: Option<PreviousChunk>,
}

/// Where the answer goes.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) arrived: Instant,
    pub(crate) seed: Option<u64>,
    pub(crate) sender: oneshot::Sender<Result<Answer, EngineError>>,
    /// Set once a batch has taken the request.
    pub(crate) started: Arc<AtomicBool>,
}

/// A request in the queue.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) inputs: JobInputs,
    pub(crate) deadline: Option<Instant>,
    pub(crate) reply: Reply,
    /// Held by those of its company that are still on their way.
    pub(crate) others: Weak<()>,
}

/// A batch that is ready to run.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) jobs: Vec<Job>,
    /// The bucket all of them fit in.
    pub(crate) bucket: Bucket,
    /// Compiled batch size, at least `jobs.len()`.
    pub(crate) slots: usize,
}

/// What leaves the queue without having been worked on.
#[derive(Debug, Default)]
pub(crate) struct Swept {
    /// Deadlines that can't be met any more.
    pub(crate) late: Vec<(Job, EngineError)>,
    /// Requests nobody waits for any more.
    pub(crate) cancelled: usize,
}

/// The queue.
#[derive(Debug)]
pub(crate) struct Queue {
    jobs: BTreeMap<(Instant, u64), Job>,
    next: u64,
    capacity: usize,
}

impl Queue {
    pub(crate) fn new(capacity: usize) -> Self {
        Queue { jobs: BTreeMap::new(), next: 0, capacity }
    }

    pub(crate) fn len(&self) -> usize {
        self.jobs.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }

    /// Whether nobody else waits than these, who came together.
    pub(crate) fn is_of(&self, company: &Weak<()>) -> bool {
        self.jobs.values().all(|job| job.others.ptr_eq(company))
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    fn order(deadline: Option<Instant>, arrived: Instant) -> Instant {
        deadline.unwrap_or(arrived + PATIENCE)
    }

    /// Requests that would be served before one with this deadline.
    pub(crate) fn ahead_of(&self, deadline: Option<Instant>, arrived: Instant) -> usize {
        self.jobs.range(..=(Self::order(deadline, arrived), u64::MAX)).count()
    }

    /// Whether it is full, once those that nobody waits for any more are forgotten.
    pub(crate) fn is_full(&mut self) -> bool {
        if self.len() >= self.capacity {
            self.jobs.retain(|_, job| !job.reply.sender.is_closed());
        }
        self.len() >= self.capacity
    }

    /// Adds a request; gives it back when the queue is full.
    pub(crate) fn push(&mut self, job: Job) -> Result<(), Box<Job>> {
        if self.is_full() {
            return Err(Box::new(job));
        }
        let order = Self::order(job.deadline, job.reply.arrived);
        self.jobs.insert((order, self.next), job);
        self.next += 1;
        Ok(())
    }

    /// Takes everything out (the engine stops).
    pub(crate) fn clear(&mut self) -> Vec<Job> {
        std::mem::take(&mut self.jobs).into_values().collect()
    }

    /// Removes what is not worth running: requests nobody waits for, and those that would be late
    /// even if they ran from now on in the time `needs` tells of their bucket.
    pub(crate) fn sweep(&mut self, now: Instant, needs: impl Fn(Bucket) -> Duration) -> Swept {
        let mut swept = Swept::default();
        let unwanted = |job: &Job| {
            let needs = needs(job.inputs.bucket);
            match job.deadline {
                _ if job.reply.sender.is_closed() => Some(None),
                Some(d) if now + needs > d => Some(Some(EngineError::deadline(now, d, needs))),
                _ => None,
            }
        };
        let found: Vec<_> =
            self.jobs.iter().filter_map(|(key, job)| Some((*key, unwanted(job)?))).collect();
        for (key, error) in found {
            match (self.jobs.remove(&key), error) {
                (Some(job), Some(error)) => swept.late.push((job, error)),
                _ => swept.cancelled += 1,
            }
        }
        swept
    }

    /// The first request after `skip` others, and how many of those behind it could join its
    /// batch (itself included).
    pub(crate) fn head(&self, skip: usize, rule: &BucketRule) -> Option<(&Job, usize)> {
        let head = self.jobs.values().nth(skip)?;
        let mates = self
            .jobs
            .values()
            .skip(skip)
            .filter(|job| rule.compatible(&head.inputs.bucket, &job.inputs.bucket))
            .take(rule.max_batch())
            .count();
        Some((head, mates))
    }

    /// Takes the batch to run now: the head after `skip` others, and as many compatible requests,
    /// in deadline order, as raise throughput without making the head late: at most `share`, in at
    /// most `max_batch` slots.
    pub(crate) fn take(
        &mut self,
        skip: usize,
        now: Instant,
        times: &ServiceTimes,
        rule: &BucketRule,
        share: usize,
        max_batch: usize,
    ) -> Option<Batch> {
        let head = self.jobs.values().nth(skip)?;
        let (mut bucket, deadline) = (head.inputs.bucket, head.deadline);
        let keys: Vec<(Instant, u64)> = self
            .jobs
            .iter()
            .skip(skip)
            .filter(|(_, job)| rule.compatible(&bucket, &job.inputs.bucket))
            .map(|(key, _)| *key)
            .take(rule.max_batch().min(share.max(1)))
            .collect();
        for key in &keys {
            bucket.prompt_tokens =
                bucket.prompt_tokens.max(self.jobs[key].inputs.bucket.prompt_tokens);
        }
        let slack = deadline.map(|d| d.saturating_duration_since(now));
        let slots = choose_slots(keys.len(), slack, bucket, times, rule, max_batch);
        let jobs: Vec<Job> =
            keys.iter().take(slots).filter_map(|key| self.jobs.remove(key)).collect();
        let prompt_tokens = jobs.iter().map(|j| j.inputs.bucket.prompt_tokens).max().unwrap_or(1);
        Some(Batch { jobs, bucket: Bucket { prompt_tokens, ..bucket }, slots })
    }
}

/// The compiled batch size for `waiting` requests: best requests per second among those that end
/// within `slack`; sizes that never ran are tried as soon as they can be filled.
fn choose_slots(
    waiting: usize,
    slack: Option<Duration>,
    bucket: Bucket,
    times: &ServiceTimes,
    rule: &BucketRule,
    max_batch: usize,
) -> usize {
    let smallest = rule.batches.first().copied().unwrap_or(1);
    let (mut best, mut best_rate) = (smallest, 0.0);
    for &slots in rule.batches.iter().filter(|s| **s <= max_batch.max(smallest)) {
        let predicted = times.predict(bucket, slots).unwrap_or_default();
        if slack.is_some_and(|slack| predicted > slack) {
            break;
        }
        let served = waiting.min(slots) as f64;
        let rate = match times.measured(bucket, slots) {
            Some(took) => served / took.as_secs_f64().max(1e-6),
            None if slots <= waiting => UNTRIED * slots as f64,
            None => 0.0,
        };
        if rate > best_rate * WORTHWHILE {
            (best, best_rate) = (slots, rate);
        }
        if slots >= waiting {
            break;
        }
    }
    best
}

#[cfg(test)]
pub(crate) mod tests {
    use pirouette_model::Rtc;

    use super::*;

    const BUCKET: Bucket =
        Bucket { cameras: 1, prompt_tokens: 16, horizon: 2, steps: 3, rtc: Rtc::Off };

    pub(crate) type Receiver = oneshot::Receiver<Result<Answer, EngineError>>;

    pub(crate) fn job(
        arrived: Instant,
        deadline_ms: Option<u64>,
        bucket: Bucket,
    ) -> (Job, Receiver) {
        let (sender, receiver) = oneshot::channel();
        let inputs = JobInputs {
            bucket,
            images: Vec::new(),
            tokens: Vec::new(),
            state: Vec::new(),
            noise: Vec::new(),
            previous: None,
        };
        let deadline = deadline_ms.map(|ms| arrived + Duration::from_millis(ms));
        (
            Job {
                inputs,
                deadline,
                reply: Reply { arrived, seed: None, sender, started: Arc::default() },
                others: Weak::new(),
            },
            receiver,
        )
    }

    fn times(table: &[(usize, u64)]) -> ServiceTimes {
        let mut times = ServiceTimes::default();
        for (batch, ms) in table {
            for _ in 0..200 {
                times.record(BUCKET, *batch, Duration::from_millis(*ms));
            }
        }
        times
    }

    fn filled(now: Instant, deadlines: &[Option<u64>]) -> (Queue, Vec<Receiver>) {
        let mut queue = Queue::new(64);
        let mut receivers = Vec::new();
        for deadline in deadlines {
            let (job, receiver) = job(now, *deadline, BUCKET);
            queue.push(job).unwrap();
            receivers.push(receiver);
        }
        (queue, receivers)
    }

    #[test]
    fn earliest_deadline_comes_first_and_none_does_not_starve() {
        let now = Instant::now();
        let (mut queue, _receivers) =
            filled(now, &[Some(900), None, Some(100), Some(20_000), Some(500)]);
        let rule = BucketRule { batches: vec![1], ..BucketRule::cpu(1) };
        let mut order = Vec::new();
        while let Some(batch) = queue.take(0, now, &ServiceTimes::default(), &rule, 64, 64) {
            assert_eq!((batch.jobs.len(), batch.slots), (1, 1));
            order.push(batch.jobs[0].deadline.map(|d| (d - now).as_millis()));
        }
        assert_eq!(order, [Some(100), Some(500), Some(900), None, Some(20_000)]);
    }

    #[test]
    fn a_full_queue_gives_the_request_back_but_first_forgets_the_dead() {
        let now = Instant::now();
        let mut queue = Queue::new(2);
        let (a, ra) = job(now, None, BUCKET);
        let (b, _rb) = job(now, None, BUCKET);
        let (c, _rc) = job(now, None, BUCKET);
        queue.push(a).unwrap();
        queue.push(b).unwrap();
        let c = queue.push(c).unwrap_err();
        drop(ra);
        queue.push(*c).unwrap();
        assert_eq!(queue.len(), 2);
    }

    #[test]
    fn hopeless_and_abandoned_requests_are_swept() {
        let now = Instant::now();
        let (mut queue, mut receivers) = filled(now, &[Some(5), Some(50), None]);
        drop(receivers.pop());
        let swept = queue.sweep(now, |_| Duration::from_millis(20));
        assert_eq!((swept.late.len(), swept.cancelled, queue.len()), (1, 1, 1));
        assert!(matches!(swept.late[0].1, EngineError::Deadline { deadline_ms, .. }
            if (deadline_ms - 5.0).abs() < 0.1));
    }

    #[test]
    fn batch_sizes_follow_measured_throughput() {
        let now = Instant::now();
        let sizes_of = |table: &[(usize, u64)], deadlines: &[Option<u64>], share| {
            let (mut queue, _receivers) = filled(now, deadlines);
            let batch = queue.take(0, now, &times(table), &BucketRule::gpu(8), share, 64).unwrap();
            (batch.jobs.len(), batch.slots)
        };
        let sizes = |table: &[(usize, u64)], deadlines: &[_]| sizes_of(table, deadlines, 64);
        let gpu = [(1, 20), (2, 24), (4, 32), (8, 48)];
        assert_eq!(sizes(&gpu, &[None; 8]), (8, 8));
        assert_eq!(sizes(&gpu, &[None; 5]), (4, 4), "5 in 48 ms is worse than 4 in 32 ms");
        assert_eq!(sizes(&gpu, &[None; 7]), (7, 8));
        assert_eq!(sizes_of(&gpu, &[None; 8], 3), (3, 4), "the others are left to other devices");
        let cpu = [(1, 20), (2, 40), (4, 80), (8, 160)];
        assert_eq!(sizes(&cpu, &[None; 8]), (1, 1), "no gain, no waiting");
        assert_eq!(sizes(&gpu, &[Some(30); 8]), (2, 2), "32 ms would be too late");
        assert_eq!(sizes(&[(1, 20)], &[None; 8]), (8, 8), "unknown sizes are tried when full");
        assert_eq!(sizes(&[(1, 20)], &[None; 3]), (2, 2), "but not with empty slots");
        assert_eq!(sizes(&[], &[Some(1); 1]), (1, 1), "nothing known yet");
    }

    #[test]
    fn a_mixed_batch_runs_in_the_largest_prompt_of_those_taken() {
        let now = Instant::now();
        let mut queue = Queue::new(8);
        let mut receivers = Vec::new();
        for prompt_tokens in [16, 48, 32] {
            let (job, receiver) = job(now, None, Bucket { prompt_tokens, ..BUCKET });
            queue.push(job).unwrap();
            receivers.push(receiver);
        }
        let (other, _r) = job(now, None, Bucket { cameras: 2, ..BUCKET });
        queue.push(other).unwrap();
        assert_eq!(queue.head(0, &BucketRule::gpu(8)).unwrap().1, 3);
        let batch =
            queue.take(0, now, &ServiceTimes::default(), &BucketRule::gpu(2), 64, 64).unwrap();
        assert_eq!((batch.jobs.len(), batch.bucket.prompt_tokens), (2, 48));
        let batch =
            queue.take(0, now, &ServiceTimes::default(), &BucketRule::cpu(8), 64, 64).unwrap();
        assert_eq!((batch.jobs.len(), batch.bucket.prompt_tokens), (1, 32));
        assert_eq!(queue.len(), 1);
    }
}
