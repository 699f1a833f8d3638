//! How weights lie on the device: where each begins, in which order its rows come.

use std::collections::HashMap;

use pirouette_model::program::{Epilogue, Linear, Norm, Op, Program, WeightId};
use pirouette_model::weights::{Kind, WeightSpec};

use crate::load::Scales;

/// Order of a matrix's rows on the device. Rows that meet in an epilogue lie 8 apart, so that the
/// tensor cores leave both in one thread; gaps are zero rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowOrder {
    /// As recorded.
    Plain,
    /// gate‖up: 8 rows of gate, their 8 rows of up, and so on.
    GateUp,
    /// q‖k‖v: in each of the `rotated` heads of q and k 8 rows of the first half, their 8 partners
    /// of the second half, and so on; v plain.
    Heads {
        /// Heads of q and k.
        rotated: usize,
        /// Width of a head.
        head_dim: usize,
    },
}

impl RowOrder {
    /// Rows on the device, a multiple of 16, of a matrix of `n`.
    pub fn packed_rows(self, n: usize) -> usize {
        match self {
            RowOrder::Plain => n.next_multiple_of(16),
            RowOrder::GateUp => (n / 2).next_multiple_of(8) * 2,
            RowOrder::Heads { rotated, head_dim } => {
                rotated * packed_head(head_dim) + head_dim.next_multiple_of(16)
            }
        }
    }

    /// The recorded row behind packed row `row`; `None` is a row of zeros.
    pub fn source(self, row: usize, n: usize) -> Option<usize> {
        let paired = |within: usize, half: usize| {
            let j = within / 16 * 8 + within % 8;
            (j < half).then_some(if within % 16 < 8 { j } else { half + j })
        };
        match self {
            RowOrder::Plain => (row < n).then_some(row),
            RowOrder::GateUp => paired(row, n / 2),
            RowOrder::Heads { rotated, head_dim } => {
                let head = row / packed_head(head_dim);
                if head < rotated {
                    let within = row % packed_head(head_dim);
                    return paired(within, head_dim / 2).map(|r| head * head_dim + r);
                }
                let column = row - rotated * packed_head(head_dim);
                (column < head_dim).then_some(rotated * head_dim + column)
            }
        }
    }
}

fn packed_head(head_dim: usize) -> usize {
    (head_dim / 2).next_multiple_of(8) * 2
}

/// Elements from one bf16 row to the next: whole 16 bytes, which the copy engine asks for, and for
/// long rows whole cache lines, without which 128 bytes of a row are pieces of two.
pub fn row_pitch(cols: usize) -> usize {
    cols.next_multiple_of(if cols > 512 { 64 } else { 8 })
}

/// One weight on the device.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Byte offset in the weights' block.
    pub offset: usize,
    /// Rows stored.
    pub rows: usize,
    /// Elements from one row to the next.
    pub ld: usize,
    /// Order of the rows.
    pub order: RowOrder,
    /// Bytes of an element: bf16 or f32.
    pub element: usize,
    /// Index of the first packed row's sum among all column sums; only behind a LayerNorm.
    pub column_sum: Option<usize>,
    /// The LayerNorm's scale.
    pub norm_scale: Option<WeightId>,
}

impl Place {
    /// Bytes of the whole weight.
    pub fn bytes(&self) -> usize {
        self.rows * self.ld * self.element
    }
}

/// Places of all weights of a table.
pub struct Layout {
    /// By [`WeightId`].
    pub places: Vec<Place>,
    /// Offset of the f32 sums over k of scale[k] · W[n, k] of each matrix behind a LayerNorm.
    pub column_sums: usize,
    /// How many there are.
    pub column_sum_count: usize,
    /// Offset of bf16 [cols] by which the channels of a gate‖up that is E4M3 count.
    pub channels: HashMap<WeightId, usize>,
    /// Bytes of the block.
    pub bytes: usize,
}

impl Layout {
    /// Lays the program's table out; row orders follow from what its steps do with each weight.
    /// Weights with `scales` are E4M3.
    pub fn new(program: &Program, scales: &Scales) -> Self {
        let table = &program.weights;
        let orders = row_orders(program);
        let (mut bytes, mut sums) = (0usize, 0);
        let mut places = Vec::with_capacity(table.specs.len());
        let norm_scales = layer_scales(program);
        for ((spec, order), scale) in table.specs.iter().zip(orders).zip(norm_scales) {
            let mut place = place(spec, order);
            if scales.of(WeightId(places.len())).is_some() {
                place.element = 1;
            }
            place.offset = bytes;
            place.norm_scale = scale;
            if scale.is_some() {
                place.column_sum = Some(sums);
                sums += place.rows;
            }
            bytes += place.bytes().next_multiple_of(256);
            places.push(place);
        }
        let mut end = (bytes + sums * 4).next_multiple_of(256);
        let mut channels = HashMap::new();
        for (id, scales) in scales.inputs() {
            channels.insert(id, end);
            end += (scales.channels.len() * 2).next_multiple_of(256);
        }
        Layout { places, column_sums: bytes, column_sum_count: sums, channels, bytes: end }
    }
}

fn place(spec: &WeightSpec, order: RowOrder) -> Place {
    let (rows, ld, element) = match spec.kind {
        Kind::Matrix => (order.packed_rows(spec.rows), row_pitch(spec.cols), 2),
        Kind::TokenTable => (spec.rows, row_pitch(spec.cols), 2),
        Kind::RimMatrix | Kind::Vector => (spec.rows, spec.cols, 4),
    };
    Place { offset: 0, rows, ld, order, element, column_sum: None, norm_scale: None }
}

/// The scale of the LayerNorm in front of each bf16 matrix.
fn layer_scales(program: &Program) -> Vec<Option<WeightId>> {
    let mut scales = vec![None; program.weights.specs.len()];
    for step in &program.steps {
        if let Op::Linear(Linear { weight, norm: Norm::Layer { scale }, .. }) = step.op
            && program.weights.spec(weight).kind == Kind::Matrix
        {
            scales[weight.0] = Some(scale);
        }
    }
    scales
}

fn row_orders(program: &Program) -> Vec<RowOrder> {
    let table = &program.weights;
    let mut orders = vec![RowOrder::Plain; table.specs.len()];
    for step in &program.steps {
        let Op::Linear(linear) = step.op else { continue };
        let WeightId(weight) = linear.weight;
        if table.specs[weight].kind != Kind::Matrix {
            continue;
        }
        orders[weight] = match linear.epilogue {
            Epilogue::GeGlu { .. } => RowOrder::GateUp,
            Epilogue::Rope { q, head_dim, .. } => {
                let q_heads = q.map_or(0, |q| q.cols / head_dim);
                RowOrder::Heads { rotated: q_heads + 1, head_dim }
            }
            _ => RowOrder::Plain,
        };
    }
    orders
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every recorded row appears exactly once among the packed ones.
    fn is_complete(order: RowOrder, n: usize) {
        let packed: Vec<_> =
            (0..order.packed_rows(n)).filter_map(|row| order.source(row, n)).collect();
        let mut sorted = packed.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..n).collect::<Vec<_>>(), "{order:?} of {n}");
    }

    #[test]
    fn orders_keep_every_row() {
        for n in [1, 15, 16, 17, 2048, 4304] {
            is_complete(RowOrder::Plain, n);
        }
        for units in [1, 7, 8, 9, 64, 4096] {
            is_complete(RowOrder::GateUp, 2 * units);
        }
        for head_dim in [2, 12, 16, 20, 256] {
            for rotated in [1, 2, 9] {
                is_complete(RowOrder::Heads { rotated, head_dim }, (rotated + 1) * head_dim);
            }
        }
    }

    #[test]
    fn partners_lie_eight_apart() {
        let gate_up = RowOrder::GateUp;
        assert_eq!(gate_up.source(9, 256), Some(128 + 1));
        assert_eq!(gate_up.source(17, 256), Some(9));
        let heads = RowOrder::Heads { rotated: 9, head_dim: 256 };
        assert_eq!(heads.source(256 + 8, 2560), Some(256 + 128));
        assert_eq!(heads.source(256 + 16, 2560), Some(256 + 8));
        assert_eq!(heads.source(9 * 256 + 8, 2560), Some(9 * 256 + 8));
    }
}
