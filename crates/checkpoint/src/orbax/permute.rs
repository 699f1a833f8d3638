//! A block of an array and an order of its axes → the same elements in that order.

use rayon::prelude::*;

/// Side of a square tile. A tile is copied to and fro through a small buffer because power-of-two
/// strides would otherwise map all its rows to the same few cache sets.
const TILE: usize = 64;
/// Extra columns of that buffer, for the same reason.
const PAD: usize = 8;

/// Elements of `block` (C order, extents `shape`, `size` bytes each) with axes in the order
/// `perm`: output axis `i` is input axis `perm[i]`. Parallel over the output.
pub fn permuted(block: &[u8], shape: &[usize], perm: &[usize], size: usize) -> Vec<u8> {
    let mut strides = vec![1; shape.len()];
    for axis in (0..shape.len().saturating_sub(1)).rev() {
        strides[axis] = strides[axis + 1] * shape[axis + 1];
    }
    let axes = merged(perm.iter().map(|&axis| (shape[axis], strides[axis])));
    let mut out = vec![0; block.len()];
    match size {
        2 => fill::<2>(block.as_chunks().0, &axes, out.as_chunks_mut().0),
        _ => fill::<4>(block.as_chunks().0, &axes, out.as_chunks_mut().0),
    }
    out
}

/// (extent, stride) of the output's axes: those of extent 1 dropped, those that lie behind each
/// other in the input joined.
fn merged(axes: impl Iterator<Item = (usize, usize)>) -> Vec<(usize, usize)> {
    let mut out: Vec<(usize, usize)> = Vec::new();
    for (extent, stride) in axes.filter(|a| a.0 != 1) {
        match out.last_mut() {
            Some(last) if last.1 == extent * stride => *last = (last.0 * extent, stride),
            _ => out.push((extent, stride)),
        }
    }
    out
}

/// Input offset of position `i` of a C-ordered set of axes.
fn offset(mut i: usize, axes: &[(usize, usize)]) -> usize {
    let mut at = 0;
    for &(extent, stride) in axes.iter().rev() {
        at += i % extent * stride;
        i /= extent;
    }
    at
}

fn fill<const N: usize>(src: &[[u8; N]], axes: &[(usize, usize)], out: &mut [[u8; N]]) {
    let Some(unit) = axes.iter().position(|a| a.1 == 1) else {
        return out.copy_from_slice(src); // one element
    };
    let (outer, rest) = axes.split_at(unit);
    let (extent, inner) = (rest[0].0, &rest[1..]);
    if inner.is_empty() {
        // Rows keep their order inside; only whole rows move.
        out.par_chunks_mut(extent).enumerate().for_each(|(i, row)| {
            let at = offset(i, outer);
            row.copy_from_slice(&src[at..at + extent]);
        });
        return;
    }
    let width: usize = inner.iter().map(|a| a.0).product();
    out.par_chunks_mut(extent * width).enumerate().for_each(|(o, part)| {
        let base = offset(o, outer);
        part.par_chunks_mut(TILE * width).enumerate().for_each(|(i, rows)| {
            transpose_rows(src, base + i * TILE, inner, width, rows);
        });
    });
}

/// Fills up to [`TILE`] output rows of `width` elements: row `r`, column `c` is
/// `src[base + r + offset(c)]`.
fn transpose_rows<const N: usize>(
    src: &[[u8; N]],
    base: usize,
    inner: &[(usize, usize)],
    width: usize,
    out: &mut [[u8; N]],
) {
    let Some((&(extent, stride), middle)) = inner.split_last() else { return };
    let rows = out.len() / width;
    let mut tile = [[[0; N]; TILE + PAD]; TILE];
    for m in 0..width / extent {
        let at = base + offset(m, middle);
        for first in (0..extent).step_by(TILE) {
            let columns = TILE.min(extent - first);
            for (c, strip) in tile.iter_mut().enumerate().take(columns) {
                let from = at + (first + c) * stride;
                strip[..rows].copy_from_slice(&src[from..from + rows]);
            }
            for (r, row) in out.chunks_exact_mut(width).enumerate() {
                let to = &mut row[m * extent + first..][..columns];
                for (element, strip) in to.iter_mut().zip(&tile) {
                    *element = strip[r];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every permutation of odd-sized blocks against index arithmetic.
    #[test]
    fn agrees_with_indexing() {
        let shapes: [&[usize]; 5] = [&[7], &[70, 131], &[3, 67, 5], &[2, 3, 65, 9], &[1, 4, 1, 66]];
        for shape in shapes {
            let n: usize = shape.iter().product();
            for perm in orders(shape.len()) {
                for size in [2usize, 4] {
                    let block: Vec<u8> =
                        (0..n as u32).flat_map(|i| i.to_le_bytes()[..size].to_vec()).collect();
                    let got = permuted(&block, shape, &perm, size);
                    let extents: Vec<usize> = perm.iter().map(|&a| shape[a]).collect();
                    for (i, element) in got.chunks(size).enumerate() {
                        let mut index = vec![0; shape.len()];
                        let mut left = i;
                        for (axis, &e) in extents.iter().enumerate().rev() {
                            index[perm[axis]] = left % e;
                            left /= e;
                        }
                        let from = index.iter().zip(shape).fold(0, |at, (x, e)| at * e + x);
                        assert_eq!(element, &block[from * size..(from + 1) * size]);
                    }
                }
            }
        }
    }

    fn orders(n: usize) -> Vec<Vec<usize>> {
        if n == 0 {
            return vec![vec![]];
        }
        let mut out = Vec::new();
        for shorter in orders(n - 1) {
            for at in 0..n {
                let mut order = shorter.clone();
                order.insert(at, n - 1);
                out.push(order);
            }
        }
        out
    }
}
