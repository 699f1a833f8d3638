//! `Linear` steps: input rows are packed (norm applied) by all workers, then tasks of row blocks ×
//! column pairs are multiplied and finished.
//!
//! A task goes along K in blocks; in each, a pair of B's panels meets all panels of A. B stays in
//! the nearest cache meanwhile, A and the sums in the second. What comes from further away per
//! multiply-add falls with 1 / pairs (A) and 1 / panels (B) of a task; kernels that outrun it fetch
//! the next pair, and A of the next block, while they compute (`ahead`).

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use pirouette_model::program::{Epilogue, Norm, WeightId};

use super::ahead::Run;
use super::epilogue::{Finish, finish_row};
use super::operand::{Matrix, Meets, PackRow, Rounding, RowNorm};
use super::{Ahead, CHUNK, PAIR, Tile};
use crate::driver::memory::Shared;
use crate::driver::pool::Worker;
use crate::executable::Context;
use crate::plan::{Feeding, LinearPlan};

/// What the columns of a pair become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Output columns at the panels' own places.
    Columns,
    /// Gate columns and the up columns that go with them.
    GateUp,
    /// Two halves of a rotation: to `col` and `col + head_dim / 2` of q or k.
    Rotate { to_key: bool, col: usize, angle: usize },
    /// Value columns.
    Value { col: usize },
}

/// Two panels of a weight that are multiplied and finished together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pair {
    pub(crate) panels: [Option<usize>; 2],
    pub(crate) role: Role,
}

/// The pairs of an epilogue over a weight of `n` rows, and whether they do not fall on panels, so
/// that whole rows must be finished.
pub(crate) fn pairs(epilogue: &Epilogue, n: usize) -> (Vec<Pair>, bool) {
    let pair = |a: usize, b: usize, role| Pair { panels: [Some(a), Some(b)], role };
    let consecutive = |from: usize, to: usize, role: &dyn Fn(usize) -> Role| -> Vec<Pair> {
        (from..to)
            .step_by(2)
            .map(|p| Pair { panels: [Some(p), (p + 1 < to).then_some(p + 1)], role: role(p) })
            .collect()
    };
    let all = n.div_ceil(CHUNK);
    match epilogue {
        Epilogue::GeGlu { .. } if n.is_multiple_of(PAIR) => {
            ((0..all / 2).map(|p| pair(p, all / 2 + p, Role::GateUp)).collect(), false)
        }
        Epilogue::Rope { q, head_dim, .. } if head_dim.is_multiple_of(PAIR) => {
            let (per_head, heads) = (head_dim / CHUNK, n / head_dim - 1);
            let mut pairs = Vec::new();
            for head in 0..heads {
                let to_key = head + 1 == heads;
                let first = if to_key || q.is_none() { 0 } else { head * head_dim };
                for i in 0..per_head / 2 {
                    let (a, angle) = (head * per_head + i, i * CHUNK);
                    let role = Role::Rotate { to_key, col: first + angle, angle };
                    pairs.push(pair(a, a + per_head / 2, role));
                }
            }
            let from = heads * per_head;
            let value = |p: usize| Role::Value { col: (p - from) * CHUNK };
            pairs.extend(consecutive(from, all, &value));
            (pairs, false)
        }
        Epilogue::GeGlu { .. } | Epilogue::Rope { .. } => {
            (consecutive(0, all, &|_| Role::Columns), true)
        }
        _ => (consecutive(0, all, &|_| Role::Columns), !n.is_multiple_of(CHUNK)),
    }
}

/// How the rows of a run are cut.
struct Cut {
    /// Rows of a panel.
    height: usize,
    panels: usize,
    panels_per_block: usize,
    blocks: usize,
    pairs_per_task: usize,
}

impl LinearPlan {
    fn cut(&self, rows: usize, threads: usize) -> Cut {
        let height = self.kernel.panel_rows(rows);
        let panels = rows.div_ceil(height);
        let most = if self.whole { 1 } else { (self.kernel.block_rows / height).max(1) };
        let blocks = panels.div_ceil(most).max(1);
        let panels_per_block = panels.div_ceil(blocks);
        let pairs = self.pairs.len();
        let pairs_per_task = if self.whole {
            pairs
        } else {
            (pairs * blocks / (4 * threads)).clamp(1, self.kernel.block_pairs)
        };
        Cut { height, panels, panels_per_block, blocks, pairs_per_task }
    }

    /// Where A is.
    fn operand<'a>(&self, context: &Context<'a>) -> &'a Shared {
        match (self.feeding, context.fed) {
            (Feeding::Fed, Some(fed)) => fed,
            _ => context.packed,
        }
    }

    /// Words a worker needs for the sums of a task, and a whole row.
    pub(crate) fn scratch_words(&self) -> usize {
        let k = &self.kernel;
        if self.whole {
            (k.rows + 1) * self.pairs.len() * PAIR
        } else {
            (k.block_rows + k.rows) * k.block_pairs * PAIR
        }
    }
}

/// First half of the step: this worker's share of the rows of A.
pub(crate) fn pack(context: &Context<'_>, plan: &LinearPlan, worker: &Worker<'_>) {
    if plan.feeding == Feeding::Fed && context.fed.is_some() {
        return;
    }
    let rows = &context.rows[plan.rows].rows;
    let matrix = context.matrix(plan.weight);
    let height = plan.kernel.panel_rows(rows.len());
    let panel_words = plan.kernel.panel_chunks(matrix.chunks()) * height * CHUNK;
    let k = plan.input.cols;
    let adaptive = |table: WeightId, row: usize| {
        let m = &context.vector(table.0)[row * 3 * k..][..2 * k];
        RowNorm::Adaptive(&m[..k], &m[k..])
    };
    let (norm, of_given) = match plan.norm {
        Norm::None => (RowNorm::None, None),
        Norm::Rms { scale } => (RowNorm::Rms(scale.map(|s| context.vector(s.0))), None),
        Norm::Layer { scale } => (RowNorm::Layer(context.vector(scale.0)), None),
        Norm::Adaptive { table, row, given_row } => {
            (adaptive(table, row), given_row.map(|row| adaptive(table, row)))
        }
    };
    let share = |i: usize| rows.len() * i / worker.count;
    let first = share(worker.index);
    for (r, &(group, row)) in (first..).zip(&rows[first..share(worker.index + 1)]) {
        let at = plan.input.at(group as usize, row as usize);
        // SAFETY: nobody writes the arena in this half of the step.
        let x: &[f32] = unsafe { context.arena.read(at..at + k) };
        let to = r / height * panel_words + r % height * CHUNK;
        let norm = of_given.filter(|_| context.is_given((group, row))).unwrap_or(norm);
        let put = |chunk: usize, words: &[u32; CHUNK]| {
            let to = to + chunk * height * CHUNK;
            // SAFETY: this worker alone writes row r of A.
            unsafe { context.packed.write::<u32>(to..to + CHUNK) }.copy_from_slice(words);
        };
        let rounding = match &matrix.meets {
            None => Rounding::None,
            Some(Meets::Rows(channels)) => Rounding::Own(channels),
            Some(Meets::Hidden(columns)) => {
                // SAFETY: written before a barrier, by the product in front.
                let power: &[f32] = unsafe { context.powers.read(r..r + 1) };
                Rounding::Given(columns, power[0])
            }
        };
        let storage = plan.kernel.storage;
        let hidden = plan.kernel.isa.lanes(PackRow { row: x, norm, rounding, storage, put });
        if let Rounding::Own(_) = rounding {
            // SAFETY: this worker alone writes what belongs to row r.
            unsafe { context.powers.write::<f32>(r..r + 1) }.fill(hidden);
        }
    }
}

/// Second half: tasks are taken from `counter` until none is left.
pub(crate) fn multiply(
    context: &Context<'_>,
    plan: &LinearPlan,
    worker: &Worker<'_>,
    counter: &AtomicUsize,
    scratch: &mut [f32],
) {
    let rows = &context.rows[plan.rows].rows;
    if rows.is_empty() {
        return;
    }
    let cut = plan.cut(rows.len(), worker.count);
    loop {
        let number = counter.fetch_add(1, Ordering::Relaxed);
        let Some(task) = cut.task(plan, number) else { return };
        // Workers take turns, more or less: a wrong guess costs a little bandwidth.
        let next = cut.task(plan, number + worker.count);
        sums(context, plan, &cut, &task, next.as_ref(), scratch);
        let Task { panels, pairs } = task;
        let first_row = panels.start * cut.height;
        let rows = &rows[first_row..(panels.end * cut.height).min(rows.len())];
        let pair_words = panels.len() * cut.height * PAIR;
        if plan.whole {
            finish_whole(context, plan, rows, pair_words, scratch);
            continue;
        }
        for (pair, sums) in pairs.iter().zip(scratch.chunks_exact(pair_words)) {
            let height = cut.height;
            let finish = Finish { context, plan, pair, sums, rows, first_row, height };
            plan.kernel.isa.lanes(finish);
        }
    }
}

/// Sums of a task, `[pair][row][32]`.
fn sums(
    context: &Context<'_>,
    plan: &LinearPlan,
    cut: &Cut,
    task: &Task<'_>,
    next: Option<&Task<'_>>,
    scratch: &mut [f32],
) {
    let matrix = context.matrix(plan.weight);
    let chunks = matrix.chunks();
    let rows = context.rows[plan.rows].rows.len();
    let panel_words = plan.kernel.panel_chunks(chunks) * cut.height * CHUNK;
    let pair_words = task.panels.len() * cut.height * PAIR;
    assert!(scratch.len() >= task.pairs.len() * pair_words, "scratch of a product is too small");
    // With one panel of rows B is read once: nothing to keep in cache, stream it.
    let blocks = chunks.div_ceil(plan.kernel.chunks_per_block).max(1);
    let block = if task.panels.len() == 1 { chunks } else { chunks.div_ceil(blocks) };
    // SAFETY: A was packed before a barrier, nobody writes it in this half of the step.
    let a: &[u32] = unsafe { plan.operand(context).read(0..cut.panels * panel_words) };
    let operands = Operands { matrix, a, panel_words, height: cut.height, chunks, block };
    for from in (0..chunks).step_by(block) {
        let at = At { task, from };
        let after = if from + block < chunks {
            Some(At { task, from: from + block })
        } else {
            next.map(|task| At { task, from: 0 })
        };
        for (p, pair) in task.pairs.iter().enumerate() {
            let b = operands.b(pair, from);
            for (i, panel) in task.panels.clone().enumerate() {
                let c = &mut scratch[p * pair_words + i * cut.height * PAIR..];
                let ahead = plan.kernel.ahead.map(|how| operands.ahead(how, at, after, [p, i]));
                let t = Tile {
                    rows: cut.height.min(rows - panel * cut.height),
                    chunks: block.min(chunks - from),
                    a: operands.a(at, i).as_ptr(),
                    a_stride: cut.height * CHUNK,
                    b: b.map(|b| b.map_or(std::ptr::null(), <[u32]>::as_ptr)),
                    c: c[..cut.height * PAIR].as_mut_ptr(),
                    c_stride: PAIR,
                    accumulate: from > 0,
                    ahead: ahead.unwrap_or([Run::NONE; 2]),
                };
                // SAFETY: A and B panels have `chunks` chunks, the sums `height` rows of 32; the
                // kernel was chosen for this machine and the worker is in a session.
                unsafe { (plan.kernel.tile)(&t) };
            }
        }
    }
}

/// Rows × columns of a product that a worker computes at a time.
struct Task<'a> {
    /// Of A.
    panels: Range<usize>,
    pairs: &'a [Pair],
}

impl Cut {
    /// A task by its number: neighbours share columns of the weight.
    fn task<'a>(&self, plan: &'a LinearPlan, number: usize) -> Option<Task<'a>> {
        let first = number % self.blocks * self.panels_per_block;
        let panels = first..(first + self.panels_per_block).min(self.panels);
        let first = number / self.blocks * self.pairs_per_task;
        let pairs = plan.pairs.get(first..)?;
        let pairs = &pairs[..pairs.len().min(self.pairs_per_task)];
        (!pairs.is_empty()).then_some(Task { panels, pairs })
    }
}

/// A place along K in a task.
#[derive(Clone, Copy)]
struct At<'a> {
    task: &'a Task<'a>,
    /// Chunk.
    from: usize,
}

/// Both operands of a product, and how K is cut.
struct Operands<'a> {
    matrix: &'a Matrix,
    a: &'a [u32],
    /// From one panel of A to the next.
    panel_words: usize,
    height: usize,
    chunks: usize,
    /// Chunks of a block.
    block: usize,
}

impl<'a> Operands<'a> {
    /// A block of the task's `i`-th panel of A; empty if it has fewer.
    fn a(&self, at: At<'_>, i: usize) -> &'a [u32] {
        let panel = at.task.panels.start + i;
        if panel >= at.task.panels.end {
            return &[];
        }
        let words = self.block.min(self.chunks - at.from) * self.height * CHUNK;
        &self.a[panel * self.panel_words + at.from * self.height * CHUNK..][..words]
    }

    /// What tile `i` of pair `p` fetches: its part of the next pair's block of B, and of block
    /// `after` of A; with one panel of rows, its own pair some way on.
    fn ahead(&self, how: Ahead, at: At<'_>, after: Option<At<'_>>, [p, i]: [usize; 2]) -> [Run; 2] {
        let (pairs, panels) = (at.task.pairs, at.task.panels.len());
        if panels == 1 {
            let run = |b| Run::behind(b, how.bytes);
            return self.b(&pairs[p], at.from).map(|b| b.map_or(Run::NONE, run));
        }
        let following = match pairs.get(p + 1) {
            Some(pair) => Some((pair, at.from)),
            None => after.and_then(|after| Some((after.task.pairs.first()?, after.from))),
        };
        let of_b = following.map(|(pair, from)| {
            let pair = self.b(pair, from).map(Option::unwrap_or_default);
            Run::of_pair(pair, i, panels)
        });
        let of_a =
            after.filter(|_| how.rows).map(|after| Run::share(self.a(after, i), p, pairs.len()));
        [of_b, of_a].map(|run| run.unwrap_or(Run::NONE))
    }

    /// The block of a pair's panels that begins with chunk `from`.
    fn b(&self, pair: &Pair, from: usize) -> [Option<&'a [u32]>; 2] {
        let words = self.block.min(self.chunks - from) * CHUNK * CHUNK;
        pair.panels.map(|p| Some(&self.matrix.panel(p?)[from * CHUNK * CHUNK..][..words]))
    }
}

fn finish_whole(
    context: &Context<'_>,
    plan: &LinearPlan,
    rows: &[(u32, u32)],
    pair_words: usize,
    scratch: &mut [f32],
) {
    let n = context.matrix(plan.weight).n;
    let (sums, y) = scratch.split_at_mut(plan.pairs.len() * pair_words);
    for (r, &row) in rows.iter().enumerate() {
        for (p, y) in y[..n].chunks_mut(PAIR).enumerate() {
            y.copy_from_slice(&sums[p * pair_words + r * PAIR..][..y.len()]);
        }
        finish_row(context, plan, row, &mut y[..n]);
    }
}
