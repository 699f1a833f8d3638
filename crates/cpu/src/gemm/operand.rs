//! Rows of f32 → packed operands: A with the norm applied on the way, B once at load or per
//! attention step.

use pirouette_model::BackendError;
use pirouette_model::fp8::{self, RowPowers};

use super::{CHUNK, Lanes, mul_add};
use crate::driver::memory::Words;

/// How a packed operand's numbers are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Storage {
    F32,
    Bf16,
}

impl Storage {
    /// Bytes of a number.
    pub(crate) fn bytes(self) -> usize {
        match self {
            Storage::F32 => 4,
            Storage::Bf16 => 2,
        }
    }

    /// Numbers along K in a chunk.
    pub(crate) fn per_chunk(self) -> usize {
        match self {
            Storage::F32 => CHUNK,
            Storage::Bf16 => 2 * CHUNK,
        }
    }

    /// The nearest number that can be stored.
    pub(crate) fn round(self, v: f32) -> f32 {
        match self {
            Storage::F32 => v,
            Storage::Bf16 => f32::from_bits(bf16_bits(v) << 16),
        }
    }

    /// Chunks that K numbers take.
    pub(crate) fn chunks(self, k: usize) -> usize {
        k.div_ceil(self.per_chunk())
    }
}

/// What becomes of A's rows where a product takes E4M3 numbers.
pub(crate) enum Meets {
    /// Rows of the stream: each has powers of two of its own, which the next product wants, too.
    /// Those by which channels count.
    Rows(Vec<f32>),
    /// Hidden values: a power of two for each column, times that of the row.
    Hidden(Vec<f32>),
}

/// A matrix `[n, k]` packed as B: zero padded to whole panels and chunks.
pub(crate) struct Matrix {
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) storage: Storage,
    pub(crate) words: Words,
    /// Where the product takes E4M3 numbers.
    pub(crate) meets: Option<Meets>,
}

impl Matrix {
    pub(crate) fn zeroed(
        n: usize,
        k: usize,
        storage: Storage,
        what: &str,
    ) -> Result<Self, BackendError> {
        let len = n.div_ceil(CHUNK) * storage.chunks(k) * CHUNK * CHUNK;
        Ok(Matrix { n, k, storage, words: Words::zeroed(len, what)?, meets: None })
    }

    pub(crate) fn chunks(&self) -> usize {
        self.storage.chunks(self.k)
    }

    /// Words of one panel.
    pub(crate) fn panel_words(&self) -> usize {
        self.chunks() * CHUNK * CHUNK
    }

    pub(crate) fn panel(&self, panel: usize) -> &[u32] {
        &self.words.as_slice()[panel * self.panel_words()..][..self.panel_words()]
    }
}

/// Nearest bf16, ties to even. A NaN stays one: rounded, some would carry over into a zero, and
/// whoever looks for values that are no numbers would find none.
#[inline(always)]
pub(crate) fn bf16_bits(v: f32) -> u32 {
    let bits = v.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if v.is_nan() { bits >> 16 | 0x40 } else { rounded }
}

/// A chunk of 16 words from `values` (fewer than a chunk holds: the rest is zero).
#[inline(always)]
pub(crate) fn pack_chunk(values: &[f32], storage: Storage, out: &mut [u32; CHUNK]) {
    match storage {
        Storage::F32 => {
            if let Ok(full) = <&[f32; CHUNK]>::try_from(values) {
                for (o, v) in out.iter_mut().zip(full) {
                    *o = v.to_bits();
                }
                return;
            }
            out.fill(0);
            for (o, v) in out.iter_mut().zip(values) {
                *o = v.to_bits();
            }
        }
        Storage::Bf16 => {
            if let Ok(full) = <&[f32; 2 * CHUNK]>::try_from(values) {
                for j in 0..CHUNK {
                    out[j] = bf16_bits(full[2 * j]) | bf16_bits(full[2 * j + 1]) << 16;
                }
                return;
            }
            out.fill(0);
            for (j, v) in values.iter().enumerate() {
                out[j / 2] |= bf16_bits(*v) << (16 * (j % 2));
            }
        }
    }
}

/// Each value times its power of two, `columns` and that of the row, becomes the nearest E4M3
/// number, and is divided by it again: what is left has few bits and is exact in bf16.
#[inline(always)]
pub(crate) fn round_columns(values: &mut [f32], columns: &[f32], row: f32) {
    for (v, power) in values.iter_mut().zip(columns) {
        *v = fp8::round(*v * (power * row)) / (power * row);
    }
}

/// What rounds a row to E4M3 numbers.
#[derive(Clone, Copy)]
pub(crate) enum Rounding<'a> {
    None,
    /// By powers of its own; those by which channels count.
    Own(&'a [f32]),
    /// Columns' powers, the row's.
    Given(&'a [f32], f32),
}

/// Sixteen (or fewer) rows → one B panel, `[word][16]`, from chunk `first_chunk` on.
pub(crate) fn pack_columns(
    rows: &[&[f32]],
    storage: Storage,
    mut put: impl FnMut(usize, usize, &[u32; CHUNK]),
) {
    for (column, row) in rows.iter().enumerate() {
        let mut words = [0; CHUNK];
        for (chunk, values) in row.chunks(storage.per_chunk()).enumerate() {
            pack_chunk(values, storage, &mut words);
            put(chunk, column, &words);
        }
    }
}

/// What is done to a row of A before it is packed.
#[derive(Clone, Copy)]
pub(crate) enum RowNorm<'a> {
    None,
    /// Scale.
    Rms(Option<&'a [f32]>),
    /// Scale.
    Layer(&'a [f32]),
    /// 1 + scale, shift.
    Adaptive(&'a [f32], &'a [f32]),
}

const EPSILON: f32 = 1e-6;

/// Normalises a row and packs it: chunk `c` goes to `put(c, words)`.
pub(crate) struct PackRow<'a, P> {
    pub(crate) row: &'a [f32],
    pub(crate) norm: RowNorm<'a>,
    pub(crate) rounding: Rounding<'a>,
    pub(crate) storage: Storage,
    pub(crate) put: P,
}

impl<P: FnMut(usize, &[u32; CHUNK])> Lanes for PackRow<'_, P> {
    /// The power of two of the row's hidden values, if the row has its own.
    type Output = f32;

    #[inline(always)]
    fn run<const FMA: bool>(mut self) -> f32 {
        let (row, count) = (self.row, self.row.len() as f32);
        let (mean, factor) = match self.norm {
            RowNorm::None => (0.0, 1.0),
            RowNorm::Rms(_) | RowNorm::Adaptive(..) => {
                (0.0, 1.0 / (squares::<FMA>(row, 0.0) / count + EPSILON).sqrt())
            }
            RowNorm::Layer(_) => {
                let mean = sum(row) / count;
                (mean, 1.0 / (squares::<FMA>(row, mean) / count + EPSILON).sqrt())
            }
        };
        let each = self.storage.per_chunk();
        let normed = |c: usize, x: &[f32], values: &mut [f32]| match self.norm {
            RowNorm::None => values.copy_from_slice(x),
            RowNorm::Rms(None) => {
                for (v, x) in values.iter_mut().zip(x) {
                    *v = x * factor;
                }
            }
            RowNorm::Rms(Some(scale)) | RowNorm::Layer(scale) => {
                for ((v, x), scale) in values.iter_mut().zip(x).zip(&scale[c * each..]) {
                    *v = (x - mean) * factor * scale;
                }
            }
            RowNorm::Adaptive(scale, shift) => {
                let (scale, shift) = (&scale[c * each..], &shift[c * each..]);
                for (((v, x), scale), shift) in values.iter_mut().zip(x).zip(scale).zip(shift) {
                    *v = mul_add::<FMA>(x * factor, *scale, *shift);
                }
            }
        };
        let mut words = [0; CHUNK];
        let mut values = [0.0f32; 2 * CHUNK];
        let mut powers = RowPowers { row: 1.0, hidden: 1.0 };
        if let Rounding::Own(channels) = self.rounding {
            let (mut largest, mut squares, mut weighted) = (0.0f32, 0.0f32, 0.0f32);
            for (c, x) in row.chunks(each).enumerate() {
                let values = &mut values[..x.len()];
                normed(c, x, values);
                for (v, channel) in values.iter().zip(&channels[c * each..]) {
                    largest = largest.max(v.abs());
                    squares += v * v;
                    weighted += (v * channel) * (v * channel);
                }
            }
            powers = RowPowers::of(largest, squares, weighted);
        }
        for (c, x) in row.chunks(each).enumerate() {
            let values = &mut values[..x.len()];
            normed(c, x, values);
            match self.rounding {
                Rounding::None => {}
                Rounding::Own(_) => round_columns(values, &[1.0; 2 * CHUNK], powers.row),
                Rounding::Given(columns, row) => round_columns(values, &columns[c * each..], row),
            }
            pack_chunk(values, self.storage, &mut words);
            (self.put)(c, &words);
        }
        powers.hidden
    }
}

/// Sixteen running sums, then a fixed order.
#[inline(always)]
fn sum(row: &[f32]) -> f32 {
    let mut sums = [0.0f32; CHUNK];
    let (head, tail) = row.as_chunks::<CHUNK>();
    for x in head {
        for (s, x) in sums.iter_mut().zip(x) {
            *s += x;
        }
    }
    for (s, x) in sums.iter_mut().zip(tail) {
        *s += x;
    }
    fold(sums)
}

/// Σ (x − mean)²
#[inline(always)]
fn squares<const FMA: bool>(row: &[f32], mean: f32) -> f32 {
    let mut sums = [0.0f32; CHUNK];
    let (head, tail) = row.as_chunks::<CHUNK>();
    for x in head {
        for (s, x) in sums.iter_mut().zip(x) {
            *s = mul_add::<FMA>(x - mean, x - mean, *s);
        }
    }
    for (s, x) in sums.iter_mut().zip(tail) {
        *s = mul_add::<FMA>(x - mean, x - mean, *s);
    }
    fold(sums)
}

/// Halves added until one is left.
#[inline(always)]
pub(crate) fn fold(mut sums: [f32; CHUNK]) -> f32 {
    let mut half = CHUNK / 2;
    while half > 0 {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
        half /= 2;
    }
    sums[0]
}

#[cfg(test)]
mod tests {
    use super::bf16_bits;

    #[test]
    fn numbers_are_rounded_and_nan_stays_nan() {
        for bits in [0x7f80_0001, 0x7fff_8000, 0x7fff_ffff, 0xff80_0001, 0xffff_8000, u32::MAX] {
            let rounded = f32::from_bits(bf16_bits(f32::from_bits(bits)) << 16);
            assert!(rounded.is_nan(), "{bits:#x} became {rounded}");
        }
        let all = (0..=u16::MAX).flat_map(|high| {
            [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff].map(|low| u32::from(high) << 16 | low)
        });
        for v in all.map(f32::from_bits).filter(|v| !v.is_nan()) {
            assert_eq!(bf16_bits(v), u32::from(half::bf16::from_f32(v).to_bits()), "{v:e}");
        }
    }
}
