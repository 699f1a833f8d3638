//! A request's sizes → the bucket (compiled shape) it runs in.

use pirouette_model::{Rtc, Shape};

/// What requests of one batch share: everything of a program's shape but the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Bucket {
    /// Cameras of the request, 1 to 3.
    pub cameras: usize,
    /// Prompt slots: the prompt's length, rounded up by the rule.
    pub prompt_tokens: usize,
    /// Actions per chunk.
    pub horizon: usize,
    /// Euler steps.
    pub steps: usize,
    /// Whether the chunk is tied to the one before it.
    pub rtc: Rtc,
}

impl Bucket {
    /// The program shape of this bucket at a batch size.
    pub fn shape(&self, batch: usize) -> Shape {
        Shape {
            batch,
            cameras: self.cameras,
            prompt_tokens: self.prompt_tokens,
            horizon: self.horizon,
            steps: self.steps,
            rtc: self.rtc,
        }
    }
}

/// How sizes are rounded and which batch sizes are compiled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BucketRule {
    /// Prompt lengths are rounded up to a multiple of this: 16 on a GPU, 1 (exact) on a CPU.
    pub prompt_multiple: usize,
    /// Whether requests of different prompt buckets may share a batch (in the largest of them).
    pub mix_prompts: bool,
    /// Cameras every request is given room for, where that is fixed.
    pub cameras: Option<usize>,
    /// Batch sizes, ascending.
    pub batches: Vec<usize>,
}

impl BucketRule {
    /// For a GPU: prompts to multiples of 16, batches 1, 2, 4, … `max_batch`.
    pub fn gpu(max_batch: usize) -> Self {
        let batches = powers(max_batch);
        BucketRule { prompt_multiple: 16, mix_prompts: true, cameras: None, batches }
    }

    /// For a CPU: exact prompts, no mixing.
    pub fn cpu(max_batch: usize) -> Self {
        let batches = powers(max_batch);
        BucketRule { prompt_multiple: 1, mix_prompts: false, cameras: None, batches }
    }

    /// One program for everybody: always `slots` slots, room for `cameras` cameras and for the
    /// longest prompt. The same kernels run on the same shapes whoever asks and whoever else is
    /// there, and no kernel lets one sample's values reach another's: a request's actions have
    /// the same bits alone and in any slot of any batch.
    pub fn deterministic(slots: usize, cameras: usize, max_prompt_tokens: usize) -> Self {
        BucketRule {
            prompt_multiple: max_prompt_tokens.max(1),
            mix_prompts: false,
            cameras: Some(cameras),
            batches: vec![slots.max(1)],
        }
    }

    /// The prompt slots of a prompt of `len` tokens, at most `limit`.
    pub fn prompt_tokens(&self, len: usize, limit: usize) -> usize {
        len.next_multiple_of(self.prompt_multiple.max(1)).min(limit)
    }

    /// The largest batch size.
    pub fn max_batch(&self) -> usize {
        self.batches.last().copied().unwrap_or(1)
    }

    /// Whether two requests may run in one batch.
    pub(crate) fn compatible(&self, a: &Bucket, b: &Bucket) -> bool {
        let same_prompt = self.mix_prompts || a.prompt_tokens == b.prompt_tokens;
        let rest = |b: &Bucket| (b.cameras, b.horizon, b.steps, b.rtc);
        same_prompt && rest(a) == rest(b)
    }
}

fn powers(max_batch: usize) -> Vec<usize> {
    let mut sizes: Vec<usize> = std::iter::successors(Some(1usize), |n| n.checked_mul(2))
        .take_while(|n| *n < max_batch)
        .collect();
    sizes.push(max_batch.max(1));
    sizes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_round_up_and_stop_at_the_limit() {
        let gpu = BucketRule::gpu(8);
        assert_eq!(gpu.batches, [1, 2, 4, 8]);
        for (len, want) in [(1, 16), (16, 16), (17, 32), (190, 192), (199, 200), (200, 200)] {
            assert_eq!(gpu.prompt_tokens(len, 200), want, "{len}");
        }
        assert_eq!(BucketRule::cpu(6).batches, [1, 2, 4, 6]);
        assert_eq!(BucketRule::cpu(1).batches, [1]);
        assert_eq!(BucketRule::cpu(1).prompt_tokens(17, 48), 17);
    }

    #[test]
    fn only_prompts_may_differ_within_a_batch() {
        let a = Bucket { cameras: 2, prompt_tokens: 16, horizon: 50, steps: 10, rtc: Rtc::Off };
        let longer = Bucket { prompt_tokens: 32, ..a };
        assert!(BucketRule::gpu(4).compatible(&a, &longer));
        assert!(!BucketRule::cpu(4).compatible(&a, &longer));
        assert!(!BucketRule::gpu(4).compatible(&a, &Bucket { cameras: 3, ..a }));
        assert!(!BucketRule::gpu(4).compatible(&a, &Bucket { steps: 5, ..a }));
        assert!(!BucketRule::gpu(4).compatible(&a, &Bucket { rtc: Rtc::Guided, ..a }));
    }
}
