//! `Attention` steps, once keys and values are packed (`keys`): tasks of query rows go
//! scores → softmax → values.
//!
//! Keys are packed without gaps: the real prefix tokens, then the suffix. Every mask then is "row i
//! sees the first so many keys", and padding changes nothing, not even the last bit.

use std::sync::atomic::{AtomicUsize, Ordering};

use bytemuck::cast_slice_mut;
use pirouette_model::program::KeyMask;

use super::ahead::Run;
use super::keys::Store;
use super::math::exp;
use super::operand::{PackRow, Rounding, RowNorm, Storage, bf16_bits, fold};
use super::{CHUNK, Kernel, Lanes, PAIR, Tile};
use crate::driver::pool::Worker;
use crate::executable::Context;
use crate::plan::Place;

/// Most panels of query rows in a task.
const PANELS: usize = 4;

/// Attention, planned.
pub(crate) struct AttentionPlan {
    pub(crate) rows: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) q: Place,
    pub(crate) k: Place,
    pub(crate) v: Place,
    pub(crate) out: Place,
    /// Key rows of a group.
    pub(crate) keys: usize,
    /// Of q·kᵀ.
    pub(crate) scale: f32,
    pub(crate) mask: KeyMask,
    pub(crate) kernel: Kernel,
    pub(crate) store: Store,
    /// Key rows before this one are packed already.
    pub(crate) stale_from: usize,
}

impl AttentionPlan {
    /// Words of scratch: queries, scores, probabilities, values.
    pub(crate) fn scratch_words(&self) -> usize {
        let rows = PANELS * self.kernel.rows + CHUNK;
        let chunks = self.kernel.storage.chunks(self.head_dim);
        let keys = self.keys.next_multiple_of(PAIR);
        let probabilities = self.kernel.storage.chunks(keys) * CHUNK;
        rows * (chunks * CHUNK + scores_stride(keys) + probabilities + PAIR)
    }

    /// Real keys of a group.
    pub(super) fn key_count(&self, context: &Context<'_>, group: usize) -> usize {
        match self.mask {
            KeyMask::All => self.keys,
            KeyMask::Prefix => context.prefix_len[group],
            KeyMask::Suffix { prefix_rows, .. } => {
                context.prefix_len[group] + self.keys - prefix_rows
            }
        }
    }

    /// Key row of the n-th real key.
    pub(super) fn key_row(&self, context: &Context<'_>, group: usize, n: usize) -> usize {
        match self.mask {
            KeyMask::Suffix { prefix_rows, .. } if n >= context.prefix_len[group] => {
                prefix_rows + n - context.prefix_len[group]
            }
            _ => n,
        }
    }

    /// First real key that has to be packed.
    pub(super) fn first_stale(&self, context: &Context<'_>, group: usize) -> usize {
        match self.mask {
            KeyMask::Suffix { prefix_rows, .. } if self.stale_from >= prefix_rows => {
                context.prefix_len[group].saturating_add(self.stale_from - prefix_rows)
            }
            _ => 0,
        }
    }

    /// Keys that a query row sees: the first so many.
    fn visible(&self, context: &Context<'_>, group: usize, row: usize) -> usize {
        match self.mask {
            KeyMask::Suffix { state_row: true, .. } if row == 0 => context.prefix_len[group] + 1,
            _ => self.key_count(context, group),
        }
    }
}

/// Scores of one row: an odd number of cache lines, so that rows do not fall on one set.
fn scores_stride(keys: usize) -> usize {
    ((keys / CHUNK) | 1) * CHUNK
}

/// Second half of the step: tasks of query rows. The heads that share keys are stacked: row r of a
/// stack is query row r mod count of head r / count.
pub(crate) fn attend(
    context: &Context<'_>,
    plan: &AttentionPlan,
    worker: &Worker<'_>,
    counter: &AtomicUsize,
    scratch: &mut [u32],
) {
    let stacked = plan.heads / plan.kv_heads;
    let segments = &context.rows[plan.rows].segments;
    let total: usize = segments.iter().map(|s| s.1 * plan.heads).sum();
    let panels = total.div_ceil(plan.kernel.rows) / (4 * worker.count);
    let most = panels.clamp(1, PANELS) * plan.kernel.rows;
    let mut task = counter.fetch_add(1, Ordering::Relaxed);
    let mut before = 0;
    for &(group, count) in segments {
        let rows = stacked * count;
        let blocks = rows.div_ceil(most);
        while task < before + blocks * plan.kv_heads {
            let (kv, block) = ((task - before) / blocks, (task - before) % blocks);
            let rows = rows * block / blocks..rows * (block + 1) / blocks;
            Block { context, plan, group, kv, count, rows }.run(scratch);
            task = counter.fetch_add(1, Ordering::Relaxed);
        }
        before += blocks * plan.kv_heads;
    }
}

struct Block<'a> {
    context: &'a Context<'a>,
    plan: &'a AttentionPlan,
    group: usize,
    kv: usize,
    /// Query rows of a head.
    count: usize,
    /// Rows of the stack.
    rows: std::ops::Range<usize>,
}

impl Block<'_> {
    fn run(&self, scratch: &mut [u32]) {
        let (plan, kernel, store) = (self.plan, &self.plan.kernel, &self.plan.store);
        let keys = plan.key_count(self.context, self.group);
        let padded = keys.next_multiple_of(PAIR);
        let (d_chunks, key_chunks) =
            (kernel.storage.chunks(plan.head_dim), kernel.storage.chunks(padded));
        let height = kernel.panel_rows(self.rows.len());
        let room = self.rows.len().div_ceil(height) * height;
        let stride = scores_stride(padded);
        let (q, rest) = scratch.split_at_mut(room * d_chunks * CHUNK);
        let (scores, rest) = rest.split_at_mut(room * stride);
        let (p, rest) = rest.split_at_mut(room * key_chunks * CHUNK);
        let (scores, sums) = (cast_slice_mut(scores), cast_slice_mut(&mut rest[..room * PAIR]));

        self.pack_queries(q, height, d_chunks);
        let at = store.keys_at(self.group, self.kv);
        // SAFETY: keys and values were packed before the barrier; nobody writes them in this half.
        let b: &[u32] = unsafe { self.context.stores.read(at..at + store.words()) };
        for pair in 0..padded / PAIR {
            let panels = [2 * pair, 2 * pair + 1].map(|p| Some(&b[p * store.key_panel()..]));
            self.tiles(q, d_chunks, height, panels, &mut scores[pair * PAIR..], stride);
        }

        let mut scales = [0.0f32; PANELS * 32 + CHUNK];
        for (r, scale) in scales[..self.rows.len()].iter_mut().enumerate() {
            let row = (self.rows.start + r) % self.count;
            let visible = plan.visible(self.context, self.group, row);
            let at = r / height * (key_chunks * height * CHUNK) + r % height * CHUNK;
            *scale = kernel.isa.lanes(Softmax {
                scores: &mut scores[r * stride..][..padded],
                visible,
                factor: plan.scale,
                storage: kernel.storage,
                out: &mut p[at..],
                out_stride: height * CHUNK,
            });
        }

        let values = &b[store.key_words()..];
        let panels = plan.head_dim.div_ceil(CHUNK);
        for first in (0..panels).step_by(2) {
            let pair = [first, first + 1]
                .map(|p| (p < panels).then(|| &values[p * store.value_panel()..]));
            self.tiles(p, key_chunks, height, pair, sums, PAIR);
            self.write(first * CHUNK, sums, &scales);
        }
    }

    fn pack_queries(&self, q: &mut [u32], height: usize, chunks: usize) {
        let (plan, d) = (self.plan, self.plan.head_dim);
        for (r, stacked) in self.rows.clone().enumerate() {
            let at = self.head_row(&plan.q, stacked);
            // SAFETY: nobody writes queries during the step.
            let row: &[f32] = unsafe { self.context.arena.read(at..at + d) };
            let to = r / height * (chunks * height * CHUNK) + r % height * CHUNK;
            let put = |chunk: usize, words: &[u32; CHUNK]| {
                q[to + chunk * height * CHUNK..][..CHUNK].copy_from_slice(words);
            };
            let (norm, rounding, storage) = (RowNorm::None, Rounding::None, plan.kernel.storage);
            plan.kernel.isa.lanes(PackRow { row, norm, rounding, storage, put });
        }
    }

    /// First word of a stacked row's head in a view.
    fn head_row(&self, place: &Place, stacked: usize) -> usize {
        let per_kv = self.plan.heads / self.plan.kv_heads;
        let head = self.kv * per_kv + stacked / self.count;
        place.at(self.group, stacked % self.count) + head * self.plan.head_dim
    }

    /// All panels of the block against a pair of B panels.
    fn tiles(
        &self,
        a: &[u32],
        chunks: usize,
        height: usize,
        b: [Option<&[u32]>; 2],
        c: &mut [f32],
        c_stride: usize,
    ) {
        for b in b.iter().flatten() {
            assert!(b.len() >= chunks * CHUNK * CHUNK, "a B panel is too short");
        }
        for (panel, first) in (0..self.rows.len()).step_by(height).enumerate() {
            let rows = height.min(self.rows.len() - first);
            let c = &mut c[first * c_stride..];
            let a = &a[panel * chunks * height * CHUNK..][..chunks * height * CHUNK];
            assert!(c.len() >= (self.plan.kernel.capacity(rows) - 1) * c_stride + PAIR);
            let t = Tile {
                rows,
                chunks,
                a: a.as_ptr(),
                a_stride: height * CHUNK,
                b: b.map(|b| b.map_or(std::ptr::null(), <[u32]>::as_ptr)),
                c: c.as_mut_ptr(),
                c_stride,
                accumulate: false,
                ahead: [Run::NONE; 2],
            };
            // SAFETY: the lengths of all three were just checked; the kernel was chosen for this
            // machine and the worker is in a session.
            unsafe { (self.plan.kernel.tile)(&t) };
        }
    }

    /// Sums, divided by their rows' weights, to columns `col..` of the heads.
    fn write(&self, col: usize, sums: &[f32], scales: &[f32]) {
        let width = PAIR.min(self.plan.head_dim - col);
        for (r, stacked) in self.rows.clone().enumerate() {
            let at = self.head_row(&self.plan.out, stacked) + col;
            // SAFETY: this task alone writes these rows of this head.
            let out: &mut [f32] = unsafe { self.context.arena.write(at..at + width) };
            for (o, sum) in out.iter_mut().zip(&sums[r * PAIR..]) {
                *o = sum * scales[r];
            }
        }
    }
}

/// Scores of one row → unnormalised probabilities, packed; returns 1 / their sum.
struct Softmax<'a> {
    scores: &'a mut [f32],
    visible: usize,
    /// Of the scores.
    factor: f32,
    storage: Storage,
    out: &'a mut [u32],
    out_stride: usize,
}

impl Lanes for Softmax<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<const FMA: bool>(self) -> f32 {
        self.scores[self.visible..].fill(f32::NEG_INFINITY);
        let (lanes, _) = self.scores.as_chunks_mut::<CHUNK>();
        let mut tops = [f32::NEG_INFINITY; CHUNK];
        for lane in lanes.iter() {
            for (top, s) in tops.iter_mut().zip(lane) {
                *top = if *s > *top { *s } else { *top };
            }
        }
        let top = tops.iter().fold(f32::NEG_INFINITY, |a, b| if *b > a { *b } else { a });
        for lane in lanes.iter_mut() {
            for s in lane {
                *s = exp::<FMA>((*s - top) * self.factor);
            }
        }
        self.scores[self.visible..].fill(0.0);
        let (lanes, _) = self.scores.as_chunks::<CHUNK>();
        let mut sums = [0.0f32; CHUNK];
        for lane in lanes {
            for (sum, s) in sums.iter_mut().zip(lane) {
                *sum += s;
            }
        }
        let each = self.storage.per_chunk();
        for (chunk, values) in self.scores.chunks_exact(each).enumerate() {
            let out = &mut self.out[chunk * self.out_stride..][..CHUNK];
            match self.storage {
                Storage::F32 => {
                    for (o, v) in out.iter_mut().zip(values) {
                        *o = v.to_bits();
                    }
                }
                Storage::Bf16 => {
                    let (pairs, _) = values.as_chunks::<2>();
                    for (o, [a, b]) in out.iter_mut().zip(pairs) {
                        *o = bf16_bits(*a) | bf16_bits(*b) << 16;
                    }
                }
            }
        }
        1.0 / fold(sums)
    }
}
