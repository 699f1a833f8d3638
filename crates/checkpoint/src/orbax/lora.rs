//! A block of weights and its low-rank factors → the merged block.

use rayon::prelude::*;

use crate::names::openpi_jax::Lora;

/// Sizes of one block: `batch` matrices of `rows` × `cols`, factors of rank `rank`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Leading axes together (heads, or 1).
    pub batch: usize,
    /// Axis shared with A.
    pub rows: usize,
    /// Axis shared with B.
    pub cols: usize,
    /// Inner axis of A·B.
    pub rank: usize,
}

/// Adds ΔW to `w` [batch, rows, cols], with A [batch, rows, rank] and B [batch, rank, cols].
///
/// The scale α/rank is 1 in every variant openpi ships and is not stored in a checkpoint; the
/// feed-forward factors never have one.
pub fn merge(w: &mut [f32], a: &[f32], b: &[f32], sizes: Sizes, kind: Lora) {
    let Sizes { batch, rows, cols, rank } = sizes;
    if cols == 0 || rank == 0 {
        return;
    }
    let summed: Vec<f32> = match kind {
        Lora::Each => vec![],
        Lora::HeadsSummed => (0..rank * cols)
            .map(|i| (0..batch).map(|head| b[head * rank * cols + i]).sum())
            .collect(),
    };
    w.par_chunks_mut(cols).zip(a.par_chunks(rank)).enumerate().for_each(|(i, (row, a))| {
        let b = match kind {
            Lora::Each => &b[i / rows * rank * cols..][..rank * cols],
            Lora::HeadsSummed => &summed,
        };
        for (factor, b) in a.iter().zip(b.chunks_exact(cols)) {
            for (w, b) in row.iter_mut().zip(b) {
                *w += factor * b;
            }
        }
    });
}
