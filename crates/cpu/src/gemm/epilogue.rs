//! Sums of a product → arena: bias, activation, residual, rotary embedding, while the tile is in
//! cache.

use pirouette_model::program::{Epilogue, Gate, Guidance, Positions};

use super::math::{gelu, silu};
use super::operand::{Matrix, Meets, pack_chunk, round_columns};
use super::product::{Pair, Role};
use super::{CHUNK, Lanes, PAIR, Storage, mul_add};
use crate::driver::memory::Shared;
use crate::executable::Context;
use crate::plan::{Feeding, LinearPlan, Place, Places};

/// Finishes all rows of one pair of panels.
pub(crate) struct Finish<'a> {
    pub(crate) context: &'a Context<'a>,
    pub(crate) plan: &'a LinearPlan,
    pub(crate) pair: &'a Pair,
    /// Sums, `[rows, 32]`.
    pub(crate) sums: &'a [f32],
    /// (group, row) of each row.
    pub(crate) rows: &'a [(u32, u32)],
    /// Number of the first of them among the rows of A.
    pub(crate) first_row: usize,
    /// Rows of a panel of A, of this product's and of the next one's.
    pub(crate) height: usize,
}

/// Values of both panels' columns.
type Two = [[f32; CHUNK]; 2];

impl Finish<'_> {
    /// Columns of a vector that belong to the pair; beyond the end: zero.
    fn columns(&self, vector: &[f32]) -> Two {
        let mut two = [[0.0; CHUNK]; 2];
        for (columns, panel) in two.iter_mut().zip(self.pair.panels) {
            let Some(panel) = panel else { continue };
            let values = &vector[(panel * CHUNK).min(vector.len())..];
            let width = values.len().min(CHUNK);
            columns[..width].copy_from_slice(&values[..width]);
        }
        two
    }

    /// A row of a destination, from column `col` on, 16 wide.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    fn target(&self, place: &Place, (group, row): (u32, u32), col: usize) -> &mut [f32; CHUNK] {
        let at = place.at(group as usize, row as usize) + col;
        // SAFETY: this task alone writes these columns of these rows during the step, and the
        // step reads its input from the packed copy.
        let slice = unsafe { self.context.arena.write(at..at + CHUNK) };
        slice.try_into().unwrap_or_else(|_| unreachable!("16 columns asked for"))
    }

    #[inline(always)]
    fn position(&self, (group, row): (u32, u32), positions: Positions) -> usize {
        position(self.context, group, row, positions)
    }
}

/// The previous chunk of a row, and the factors of the step and of the pull towards it; absent
/// where the row is free, which then takes the plain step, bit for bit.
fn guided<'a>(
    context: &Context<'a>,
    g: &Guidance,
    (group, row): (u32, u32),
) -> Option<(&'a [f32], f32, f32)> {
    let previous = context.inputs.previous?;
    let (chunk, weight, limit) = previous.row(group as usize, row as usize);
    let a = weight * limit.min(g.strength);
    (a != 0.0).then_some((chunk, 1.0 - a * g.time, a * g.pull))
}

pub(super) fn position(context: &Context<'_>, group: u32, row: u32, p: Positions) -> usize {
    match p {
        Positions::Prefix => row as usize,
        Positions::Suffix { first } => context.prefix_len[group as usize] + first + row as usize,
    }
}

impl Lanes for Finish<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let n = self.context.matrix(self.plan.weight).n;
        let zero = [[0.0; CHUNK]; 2];
        let bias = self
            .plan
            .bias
            .map_or(zero, |b| self.columns(&self.context.vector(b.table.0)[b.row * n..][..n]));
        let gate_of = |g: Gate, row: usize| {
            self.columns(&self.context.vector(g.table.0)[(row * 3 + 2) * n..][..n])
        };
        let (gate, of_given) = match self.plan.epilogue {
            Epilogue::Add { gate: Some(g), .. } => {
                (gate_of(g, g.row), g.given_row.map(|row| gate_of(g, row)))
            }
            _ => ([[1.0; CHUNK]; 2], None),
        };
        let (sums, _) = self.sums.as_chunks::<CHUNK>();
        if let (Feeding::Feeds(weight), Some(fed)) = (self.plan.feeding, self.context.fed) {
            return self.feed::<FMA>(fed, self.context.matrix(weight), &bias);
        }
        for (sums, &row) in sums.chunks_exact(2).zip(self.rows) {
            let mut y: Two = [sums[0], sums[1]];
            for (y, bias) in y.iter_mut().zip(&bias) {
                for (y, bias) in y.iter_mut().zip(bias) {
                    *y = *y * self.plan.scale + bias;
                }
            }
            match self.pair.role {
                Role::Columns => {
                    let given = of_given.as_ref().filter(|_| self.context.is_given(row));
                    self.columns_row::<FMA>(row, y, given.unwrap_or(&gate));
                }
                Role::GateUp => self.gate_up_row::<FMA>(row, y),
                Role::Rotate { to_key, col, angle } => {
                    self.rotate_row::<FMA>(row, y, to_key, col, angle);
                }
                Role::Value { col } => {
                    let Places::Rope { v, .. } = &self.plan.places else { continue };
                    for (p, y) in y.iter().enumerate() {
                        if self.pair.panels[p].is_some() {
                            *self.target(v, row, col + p * CHUNK) = *y;
                        }
                    }
                }
            }
        }
    }
}

impl Finish<'_> {
    /// All rows, rounded and packed as A of the product with `next`.
    #[inline(always)]
    fn feed<const FMA: bool>(&self, fed: &Shared, next: &Matrix, bias: &Two) {
        let Some(panel) = self.pair.panels[0] else { return };
        let gated = self.pair.role == Role::GateUp;
        // Two panels of columns make a chunk; gated ones half of it.
        let (chunk, half) = (panel / 2, panel % 2 * (CHUNK / 2));
        // The end of K is filled up with zeros by whoever writes the last columns.
        let wide = !gated || half == 0 && (panel + 1) * CHUNK == next.k;
        let chunks = self.plan.kernel.panel_chunks(next.chunks());
        let width = if wide { CHUNK } else { CHUNK / 2 };
        let columns = match &next.meets {
            Some(Meets::Hidden(columns)) => Some(&columns[panel * CHUNK..]),
            Some(Meets::Rows(_)) | None => None,
        };
        let (sums, _) = self.sums.as_chunks::<CHUNK>();
        for (r, sums) in (self.first_row..).zip(sums.chunks_exact(2)).take(self.rows.len()) {
            let mut y: Two = [sums[0], sums[1]];
            for (y, bias) in y.iter_mut().zip(bias) {
                for (y, bias) in y.iter_mut().zip(bias) {
                    *y = *y * self.plan.scale + bias;
                }
            }
            let mut values = [0.0; PAIR];
            let [first, second] = y;
            for j in 0..CHUNK {
                if gated {
                    values[j] = gelu::<FMA>(first[j]) * second[j];
                } else {
                    values[j] = gelu::<FMA>(first[j]);
                }
            }
            if !gated && self.pair.panels[1].is_some() {
                for j in 0..CHUNK {
                    values[CHUNK + j] = gelu::<FMA>(second[j]);
                }
            }
            if let Some(columns) = columns {
                // SAFETY: written where this product's rows were packed, before a barrier.
                let power: &[f32] = unsafe { self.context.powers.read(r..r + 1) };
                round_columns(&mut values, columns, power[0]);
            }
            let mut words = [0; CHUNK];
            pack_chunk(&values, Storage::Bf16, &mut words);
            let (in_panel, panel) = (r % self.height, r / self.height);
            let to = ((panel * chunks + chunk) * self.height + in_panel) * CHUNK + half;
            // SAFETY: this task alone packs these columns of these rows during the step, whose
            // own A is elsewhere.
            unsafe { fed.write::<u32>(to..to + width) }.copy_from_slice(&words[..width]);
        }
    }

    #[inline(always)]
    fn columns_row<const FMA: bool>(&self, row: (u32, u32), y: Two, gate: &Two) {
        let Places::One(out) = &self.plan.places else { return };
        for (p, y) in y.iter().enumerate() {
            let Some(panel) = self.pair.panels[p] else { continue };
            let col = panel * CHUNK;
            let target = self.target(out, row, col);
            match self.plan.epilogue {
                Epilogue::Gelu { .. } => {
                    for (t, y) in target.iter_mut().zip(y) {
                        *t = gelu::<FMA>(*y);
                    }
                }
                Epilogue::Silu { .. } => {
                    for (t, y) in target.iter_mut().zip(y) {
                        *t = silu::<FMA>(*y);
                    }
                }
                Epilogue::Add { .. } => {
                    for ((t, y), gate) in target.iter_mut().zip(y).zip(&gate[p]) {
                        *t = mul_add::<FMA>(*gate, *y, *t);
                    }
                }
                Epilogue::AddFree { .. } if self.context.is_given(row) => {}
                Epilogue::AddFree { .. } => target.iter_mut().zip(y).for_each(|(t, y)| *t += y),
                Epilogue::Guide { guidance, .. } => match guided(self.context, &guidance, row) {
                    None => target.iter_mut().zip(y).for_each(|(t, y)| *t += y),
                    Some((chunk, step, pull)) => {
                        for ((t, y), to) in target.iter_mut().zip(y).zip(&chunk[col..]) {
                            *t += mul_add::<FMA>(pull, to - *t, step * y);
                        }
                    }
                },
                Epilogue::StorePosition { table, .. } => {
                    let at = row.1 as usize * out.cols + col;
                    let table = &self.context.vector(table.0)[at..at + CHUNK];
                    for ((t, y), position) in target.iter_mut().zip(y).zip(table) {
                        *t = y + position;
                    }
                }
                _ => *target = *y,
            }
        }
    }

    #[inline(always)]
    fn gate_up_row<const FMA: bool>(&self, row: (u32, u32), [gate, up]: Two) {
        let (Places::One(out), Some(panel)) = (&self.plan.places, self.pair.panels[0]) else {
            return;
        };
        let target = self.target(out, row, panel * CHUNK);
        for ((t, gate), up) in target.iter_mut().zip(gate).zip(up) {
            *t = gelu::<FMA>(gate) * up;
        }
    }

    #[inline(always)]
    fn rotate_row<const FMA: bool>(
        &self,
        row: (u32, u32),
        [a, b]: Two,
        to_key: bool,
        col: usize,
        angle: usize,
    ) {
        let (Places::Rope { q, k, table, .. }, Epilogue::Rope { positions, .. }) =
            (&self.plan.places, self.plan.epilogue)
        else {
            return;
        };
        let Some(out) = (if to_key { Some(k) } else { q.as_ref() }) else { return };
        let rope = &self.context.plan.ropes[*table];
        let at = self.position(row, positions) * rope.half + angle;
        let (cos, sin) = (&rope.cos[at..at + CHUNK], &rope.sin[at..at + CHUNK]);
        let mut turned = [[0.0; CHUNK]; 2];
        for j in 0..CHUNK {
            turned[0][j] = mul_add::<FMA>(a[j], cos[j], -(b[j] * sin[j]));
            turned[1][j] = mul_add::<FMA>(b[j], cos[j], a[j] * sin[j]);
        }
        *self.target(out, row, col) = turned[0];
        *self.target(out, row, col + rope.half) = turned[1];
    }
}

/// Finishes one whole row `y` (scale and bias not yet applied): any size, no vectors.
pub(crate) fn finish_row(
    context: &Context<'_>,
    plan: &LinearPlan,
    (group, row): (u32, u32),
    y: &mut [f32],
) {
    let n = y.len();
    y.iter_mut().for_each(|y| *y *= plan.scale);
    if let Some(b) = plan.bias {
        let bias = &context.vector(b.table.0)[b.row * n..][..n];
        y.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
    }
    let target = |place: &Place| {
        let at = place.at(group as usize, row as usize);
        // SAFETY: this task alone writes these rows of the destination during the step, and the
        // step reads its input from the packed copy.
        unsafe { context.arena.write::<f32>(at..at + place.cols) }
    };
    match (&plan.places, plan.epilogue) {
        (Places::One(out), Epilogue::Add { gate, .. }) => {
            let gate = gate.map(|g| {
                let given = g.given_row.filter(|_| context.is_given((group, row)));
                &context.vector(g.table.0)[(given.unwrap_or(g.row) * 3 + 2) * n..][..n]
            });
            for (i, (t, y)) in target(out).iter_mut().zip(y).enumerate() {
                let gate = gate.map_or(1.0, |gate| gate[i]);
                *t += gate * *y;
            }
        }
        (Places::One(out), Epilogue::AddFree { .. }) => {
            if !context.is_given((group, row)) {
                target(out).iter_mut().zip(y).for_each(|(t, y)| *t += *y);
            }
        }
        (Places::One(out), Epilogue::Guide { guidance, .. }) => {
            let row_of = target(out).iter_mut().zip(y);
            match guided(context, &guidance, (group, row)) {
                None => row_of.for_each(|(t, y)| *t += *y),
                Some((chunk, step, pull)) => {
                    row_of.zip(chunk).for_each(|((t, y), to)| *t += step * *y + pull * (to - *t))
                }
            }
        }
        (Places::One(out), Epilogue::GeGlu { .. }) => {
            let (gate, up) = y.split_at(n / 2);
            for ((t, gate), up) in target(out).iter_mut().zip(gate).zip(up) {
                *t = gelu::<false>(*gate) * up;
            }
        }
        (Places::One(out), epilogue) => {
            for (i, (t, y)) in target(out).iter_mut().zip(y).enumerate() {
                *t = match epilogue {
                    Epilogue::Gelu { .. } => gelu::<false>(*y),
                    Epilogue::Silu { .. } => silu::<false>(*y),
                    Epilogue::StorePosition { table, .. } => {
                        *y + context.vector(table.0)[row as usize * n + i]
                    }
                    _ => *y,
                };
            }
        }
        (Places::Rope { q, k, v, table }, Epilogue::Rope { head_dim, positions, .. }) => {
            let rope = &context.plan.ropes[*table];
            let at = position(context, group, row, positions) * rope.half;
            let rotated = n - head_dim;
            for head in y[..rotated].chunks_exact_mut(head_dim) {
                for j in 0..rope.half {
                    let (cos, sin) = (rope.cos[at + j], rope.sin[at + j]);
                    let (a, b) = (head[j], head[j + rope.half]);
                    head[j] = a * cos - b * sin;
                    head[j + rope.half] = b * cos + a * sin;
                }
            }
            let (heads, value) = y.split_at(rotated);
            let (queries, key) = heads.split_at(rotated - head_dim);
            if let Some(q) = q {
                target(q).copy_from_slice(queries);
            }
            target(k).copy_from_slice(key);
            target(v).copy_from_slice(value);
        }
        (Places::Rope { .. }, _) => unreachable!("rope places belong to the rope epilogue"),
    }
}
