//! Weights of the prefix tower's MLPs → the powers of two that put them, and what they meet, into
//! the range of E4M3 (8-bit floats: 4 bits of exponent, 3 of mantissa, at most 448, no infinity).
//!
//! At `fp8` the products `prefill.i.up` and `prefill.i.down` take both operands as E4M3, summed in
//! f32; everything else is as at bf16. These two are 0.89 of the prefill's FLOPs. Rounding the
//! attention's products of that tower as well doubles the error of the actions, vision's products
//! triple it, and the expert's loop does not wait for its bytes.
//!
//! A float needs no scale that fits closely, only one that keeps it in range, so powers of two do
//! and nothing is calibrated. With y = x̂∘s a normalised row times the norm's learned scale, g and
//! u the rows of gate and up of one hidden unit, h = gelu(g·y)·(u·y) is at most
//! ‖y‖²·(‖g‖·‖u‖ + |g·u|)/2, since |gelu(v)| ≤ |v|: of all rows of a length, one between g and u
//! has the largest product. The same holds for y∘m, g/m and u/m, whatever m is. With m the size of
//! a channel's weights, a channel that no unit reads does not count, however large it may be in
//! some rows; plain lengths are closer where rows and weights are large in the same channels. So
//!
//! - a row has two powers of two, made where it is normalised ([`RowPowers`]): 2^t puts its largest
//!   value just below 448, 2^q is at most 1 / the smaller of ‖y‖² and ‖y∘m‖²;
//! - a hidden unit has one, made at load for the larger of its two bounds. It multiplies the unit's
//!   row of `up` and divides its column of `down`, so it costs nothing at run time and their
//!   columns lie as far apart as what they contribute does. Units that hardly contribute are not
//!   raised to the others' level: all rows of `up` share the rest of their scale, and one raised by
//!   far would push the others out of range.
//!
//! What `down` reads is h·2^(hidden + q). It stays in range whatever the observation, but for units
//! whose weights are some 10⁴ times smaller than the matrix's largest: E4M3 has few numbers for
//! them, and rounding may add more than is counted on here. Values beyond 448 become 448.

use crate::program::WeightId;
use crate::source::{SourceError, TensorSource};
use crate::weights::{WeightSpec, WeightTable};

/// The largest E4M3 number.
pub const MAX: f32 = 448.0;
/// What rounding adds at most to a product of two numbers, each of which it moves by at most 2⁻⁴
/// of itself.
const ROUNDING: f64 = (1.0 + 0.0625) * (1.0 + 0.0625);
/// What f32 arithmetic and a rounding to bf16 on the way may add to a hidden value.
const SLACK: f64 = 1.01;
/// Exponents stay where a product of two factors is an ordinary f32.
const MOST: i32 = 60;
/// How far a unit's exponent may lie above the middle one.
const RAISED: i32 = 4;
/// How far exponents of channels may lie from 0.
const APART: i32 = 8;
/// Rows read at a time.
const ROWS: usize = 64;
/// How many such parts of a matrix tell the sizes of its columns.
const PARTS: usize = 16;

/// The nearest E4M3 number, ties to even, at most ±[`MAX`]; NaN is 0x7f.
#[inline]
pub fn encode(v: f32) -> u8 {
    let (sign, v) = ((v.to_bits() >> 24 & 0x80) as u8, v.abs());
    if v.is_nan() {
        return sign | 0x7f;
    }
    if v >= MAX {
        return sign | 0x7e;
    }
    // Below 2⁻⁶ numbers are 2⁻⁹ apart.
    if v < 0.015625 {
        return sign | (v * 512.0).round_ties_even() as u8;
    }
    let bits = v.to_bits();
    let rounded = bits + ((1 << 19) - 1) + (bits >> 20 & 1);
    // Exponent 127 of f32 is 7 of E4M3.
    sign | ((rounded >> 20) - (120 << 3)) as u8
}

/// The number behind a code.
#[inline]
pub fn decode(code: u8) -> f32 {
    let (exponent, mantissa) = (u32::from(code >> 3 & 15), u32::from(code & 7));
    let magnitude = match (exponent, mantissa) {
        (15, 7) => f32::NAN,
        (0, m) => m as f32 / 512.0,
        (e, m) => f32::from_bits((e + 120) << 23 | m << 20),
    };
    if code & 0x80 != 0 { -magnitude } else { magnitude }
}

/// The nearest E4M3 number as f32: `decode(encode(v))` without a branch, for loops over many.
#[inline(always)]
pub fn round(v: f32) -> f32 {
    let near = v.clamp(-MAX, MAX);
    // 2⁻⁶ is the smallest number with a mantissa of its own.
    let exponent = (near.to_bits() & 0x7f80_0000).max(121 << 23);
    // 1.5 · 2²⁰ times the power of two: numbers there are as far apart as E4M3's are here.
    let coarse = f32::from_bits((exponent + (20 << 23)) | 0x40_0000);
    (near + coarse - coarse).copysign(v)
}

/// The weights of one MLP of the prefix tower.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mlp {
    /// The learned scale of the norm in front, `[1, C]`.
    pub norm: WeightId,
    /// gate‖up, `[2·M, C]`.
    pub up: WeightId,
    /// `[C, M]`
    pub down: WeightId,
}

/// One of the two matrices of an MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Matrix {
    /// gate‖up
    Up,
    /// down
    Down,
}

impl WeightSpec {
    /// Whether it is one of the matrices of [`WeightTable::prefix_mlps`].
    pub fn is_e4m3(&self) -> bool {
        let product = self.name.strip_prefix("prefill.").and_then(|n| n.split_once('.'));
        matches!(product, Some((_, "up" | "down")))
    }
}

impl WeightTable {
    /// The MLPs whose products are E4M3 at `fp8`: those of all prefix layers but the last, which
    /// has none.
    pub fn prefix_mlps(&self) -> Vec<Mlp> {
        let mlp = |i: usize| Mlp {
            norm: self.id(&format!("prefill.{i}.mlp.norm")),
            up: self.id(&format!("prefill.{i}.up")),
            down: self.id(&format!("prefill.{i}.down")),
        };
        (0..self.config.depth - 1).map(mlp).collect()
    }
}

/// The powers of two of a row that an MLP reads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowPowers {
    /// 2^t: multiplies the row.
    pub row: f32,
    /// 2^q: multiplies its hidden values, beside their unit's.
    pub hidden: f32,
}

impl RowPowers {
    /// Of a row with this largest magnitude, this sum of squares, and this one of its values times
    /// their channels' powers of two.
    #[inline(always)]
    pub fn of(largest: f32, squares: f32, weighted: f32) -> Self {
        let hidden = power_within(1.0 / squares.min(weighted));
        RowPowers { row: power_within(MAX / largest), hidden }
    }
}

/// The largest power of two that is at most `v`, between 2^−60 and 2^60.
#[inline(always)]
fn power_within(v: f32) -> f32 {
    let v = v.max(power(-MOST)).min(power(MOST));
    f32::from_bits(v.to_bits() & 0x7f80_0000)
}

/// Exponents of the powers of two that multiply an MLP's weights before they are rounded, and of
/// those by which its input's channels count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MlpScales {
    /// Of each channel of the input: how much of a hidden value it may make.
    pub channels: Vec<i32>,
    /// Of gate's rows.
    pub gate: i32,
    /// Of up's rows, beside their unit's.
    pub up: i32,
    /// Of each hidden unit: what `down` reads is h·2^hidden times its row's power.
    pub hidden: Vec<i32>,
    /// Of down's columns, beside their unit's, which divides them.
    pub down: i32,
}

impl MlpScales {
    /// Reads an MLP's weights through once. Fails at one that is not finite: E4M3 has no infinity,
    /// and would make an ordinary number of it.
    pub fn measure(
        table: &WeightTable,
        mlp: &Mlp,
        source: &dyn TensorSource,
    ) -> Result<Self, SourceError> {
        let mut scale = vec![0.0f32; table.spec(mlp.norm).cols];
        table.open(mlp.norm, source)?.fill(0, &mut scale)?;
        finite(table, mlp.norm, &scale)?;
        let mut channels = channels_of(table, mlp.up, source)?;
        let both = units_of(table, mlp.up, source, &channels)?;
        let bounds = |of: usize| both.iter().map(|unit| unit.sides[of].bound()).collect::<Vec<_>>();
        let (plain, weighted) = (bounds(0), bounds(1));
        // Both speak of rows of length 1. Channels' powers are such that they are as large.
        let apart = (middle(&weighted) / middle(&plain)).log2() / 2.0;
        let apart = if apart.is_finite() { apart.round() as i32 } else { 0 };
        channels.iter_mut().for_each(|e| *e += apart);
        let weighted = weighted.iter().map(|bound| bound * 4f64.powi(-apart));
        let hidden = together(plain.iter().zip(weighted).map(|(a, b)| a.max(b)).collect());
        let of_unit = |j: usize| 2f64.powi(hidden[j]);
        let gate = exponent(both.iter().fold(0.0, |m: f64, unit| m.max(unit.largest[0])));
        let up = both.iter().enumerate();
        let up = up.fold(0.0, |m: f64, (j, unit)| m.max(unit.largest[1] * of_unit(j)));
        let inverse: Vec<f32> = hidden.iter().map(|e| power(-e)).collect();
        let mut down = 0.0f64;
        rows(table, mlp.down, source, |row| {
            let most = row.iter().zip(&inverse).fold(0.0f32, |m, (w, f)| m.max((w * f).abs()));
            down = down.max(most as f64);
        })?;
        Ok(MlpScales { channels, gate, up: exponent(up), hidden, down: exponent(down) })
    }

    /// The powers of two by which channels count.
    pub fn channel_powers(&self) -> Vec<f32> {
        self.channels.iter().map(|e| power(*e)).collect()
    }

    /// Those of a row `[C]`, normalised and times the norm's scale.
    pub fn row_powers(&self, row: &[f32]) -> RowPowers {
        let weighted = row.iter().zip(&self.channels).map(|(v, e)| (v * power(*e)).powi(2)).sum();
        RowPowers::of(largest(row) as f32, row.iter().map(|v| v * v).sum(), weighted)
    }

    /// Multiplies row `row` of a matrix, so that its values are in range.
    pub fn scale_row(&self, matrix: Matrix, row: usize, values: &mut [f32]) {
        let factor = match matrix {
            Matrix::Up if row < self.hidden.len() => power(self.gate),
            Matrix::Up => power(self.up) * power(self.hidden[row - self.hidden.len()]),
            Matrix::Down => {
                for (v, e) in values.iter_mut().zip(&self.hidden) {
                    *v *= power(-e);
                }
                power(self.down)
            }
        };
        for v in values {
            *v *= factor;
        }
    }

    /// What a row was multiplied by, undone.
    pub fn unscale_row(&self, matrix: Matrix, row: usize, values: &mut [f32]) {
        let factor = match matrix {
            Matrix::Up if row < self.hidden.len() => power(-self.gate),
            Matrix::Up => power(-self.up) * power(-self.hidden[row - self.hidden.len()]),
            Matrix::Down => {
                for (v, e) in values.iter_mut().zip(&self.hidden) {
                    *v *= power(*e);
                }
                power(-self.down)
            }
        };
        for v in values {
            *v *= factor;
        }
    }
}

/// 2^`exponent`
#[inline]
pub fn power(exponent: i32) -> f32 {
    f32::from_bits(((exponent.clamp(-126, 127) + 127) as u32) << 23)
}

/// The largest exponent whose power of two keeps `bound` within [`MAX`].
fn exponent(bound: f64) -> i32 {
    if !(bound > 0.0 && bound.is_finite()) {
        return 0;
    }
    ((MAX as f64 / bound).log2().floor() as i32).clamp(-MOST, MOST)
}

/// The middle one of those that are not 0.
fn middle(bounds: &[f64]) -> f64 {
    let mut sorted: Vec<f64> = bounds.iter().copied().filter(|b| *b > 0.0).collect();
    sorted.sort_unstable_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}

/// Exponents of the units by their bounds.
fn together(bounds: Vec<f64>) -> Vec<i32> {
    let most = exponent(middle(&bounds)) + RAISED;
    let each = bounds.iter().map(|&b| if b > 0.0 { exponent(b).min(most) } else { most });
    each.collect()
}

fn largest(values: &[f32]) -> f64 {
    values.iter().fold(0.0f32, |m, v| m.max(v.abs())) as f64
}

fn finite(table: &WeightTable, id: WeightId, values: &[f32]) -> Result<(), SourceError> {
    match values.iter().find(|v| !v.is_finite()) {
        None => Ok(()),
        Some(bad) => Err(SourceError::Unreadable {
            name: table.spec(id).name.clone(),
            reason: format!("it holds {bad}, which fp8 can't; export or download it again"),
        }),
    }
}

/// A hidden unit's rows of gate and of up, as they are or by channels' powers.
#[derive(Default)]
struct Side {
    /// Squared norms.
    squares: [f64; 2],
    /// The product of one and the other, and of their magnitudes.
    dot: f64,
    dot_of_magnitudes: f64,
}

impl Side {
    fn add(&mut self, a: f64, b: f64) {
        self.squares[0] += a * a;
        self.squares[1] += b * b;
        self.dot += a * b;
        self.dot_of_magnitudes += (a * b).abs();
    }

    /// What the unit never exceeds for rows of length 1, which rounding makes 17/16 at most: of all
    /// of a length, one between gate's and up's rows has the largest product.
    fn bound(&self) -> f64 {
        let norms = (self.squares[0] * self.squares[1]).sqrt() * ROUNDING;
        let dot = self.dot.abs() + self.dot_of_magnitudes * (ROUNDING - 1.0);
        ROUNDING * (norms + dot) / 2.0 * SLACK
    }
}

/// What is to be known of a hidden unit.
#[derive(Default)]
struct Unit {
    /// Its rows as they are, and divided by channels' powers.
    sides: [Side; 2],
    /// The largest value of each row.
    largest: [f64; 2],
}

impl Unit {
    fn of(gate: &[f32], up: &[f32], inverse: &[f64]) -> Self {
        let mut unit = Unit { largest: [largest(gate), largest(up)], ..Unit::default() };
        for ((g, u), inverse) in gate.iter().zip(up).zip(inverse) {
            let (g, u) = (*g as f64, *u as f64);
            unit.sides[0].add(g, u);
            unit.sides[1].add(g * inverse, u * inverse);
        }
        unit
    }
}

/// The exponent of each column's size in gate and up, beside that of all; of some of their rows.
fn channels_of(
    table: &WeightTable,
    id: WeightId,
    source: &dyn TensorSource,
) -> Result<Vec<i32>, SourceError> {
    let (units, cols) = (table.spec(id).rows / 2, table.spec(id).cols);
    let opened = table.open(id, source)?;
    let mut values = vec![0.0f32; ROWS.min(units) * cols];
    let mut sizes = vec![0.0f64; cols];
    let stride = units.div_ceil(ROWS).div_ceil(PARTS) * ROWS;
    for of in [0, units] {
        let mut squares = vec![0.0f64; cols];
        for first in (0..units).step_by(stride) {
            let part = &mut values[..ROWS.min(units - first) * cols];
            opened.fill(of + first, part)?;
            for row in part.chunks_exact(cols) {
                squares.iter_mut().zip(row).for_each(|(sum, v)| *sum += (*v as f64).powi(2));
            }
        }
        let all: f64 = squares.iter().sum();
        sizes
            .iter_mut()
            .zip(squares)
            .for_each(|(size, sum)| *size += sum / all * cols as f64 / 2.0);
    }
    // Where there are no weights, or too large ones, which are refused later, all count alike.
    let exponent = |size: f64| match size.is_nan() {
        true => 0,
        false => (size.log2() / 2.0).round().clamp(-APART as f64, APART as f64) as i32,
    };
    Ok(sizes.into_iter().map(exponent).collect())
}

fn units_of(
    table: &WeightTable,
    id: WeightId,
    source: &dyn TensorSource,
    channels: &[i32],
) -> Result<Vec<Unit>, SourceError> {
    let (units, cols) = (table.spec(id).rows / 2, table.spec(id).cols);
    let opened = table.open(id, source)?;
    let inverse: Vec<f64> = channels.iter().map(|e| 2f64.powi(-e)).collect();
    let mut values = [(); 2].map(|_| vec![0.0f32; ROWS.min(units) * cols]);
    let mut found = Vec::with_capacity(units);
    for first in (0..units).step_by(ROWS) {
        let [gate, up] = values.each_mut().map(|v| &mut v[..ROWS.min(units - first) * cols]);
        opened.fill(first, gate)?;
        opened.fill(units + first, up)?;
        finite(table, id, gate)?;
        finite(table, id, up)?;
        let both = gate.chunks_exact(cols).zip(up.chunks_exact(cols));
        found.extend(both.map(|(gate, up)| Unit::of(gate, up, &inverse)));
    }
    Ok(found)
}

fn rows(
    table: &WeightTable,
    id: WeightId,
    source: &dyn TensorSource,
    mut each: impl FnMut(&[f32]),
) -> Result<(), SourceError> {
    let spec = table.spec(id);
    let opened = table.open(id, source)?;
    let mut values = vec![0.0f32; ROWS.min(spec.rows) * spec.cols];
    for first in (0..spec.rows).step_by(ROWS) {
        let values = &mut values[..ROWS.min(spec.rows - first) * spec.cols];
        opened.fill(first, values)?;
        finite(table, id, values)?;
        values.chunks_exact(spec.cols).for_each(&mut each);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_their_own_nearest_numbers() {
        for code in 0..=255u8 {
            let v = decode(code);
            if v.is_nan() {
                assert_eq!(code & 0x7f, 0x7f);
            } else {
                assert_eq!(encode(v), code, "{v}");
            }
        }
        assert_eq!(
            [decode(0x7e), decode(0x01), decode(0x08)],
            [448.0, 2f32.powi(-9), 2f32.powi(-6)]
        );
        assert_eq!(encode(f32::NAN), 0x7f);
        assert!(round(f32::NAN).is_nan() && round(-f32::NAN).is_nan());
        for big in [448.1, 464.0, 1e30, f32::INFINITY] {
            assert_eq!([round(big), round(-big)], [MAX, -MAX]);
        }
    }

    #[test]
    fn rounding_is_to_the_nearest_and_ties_to_even() {
        let all: Vec<f32> = (0..=0x7e).map(decode).collect();
        for (code, pair) in all.windows(2).enumerate() {
            let middle = (pair[0] + pair[1]) / 2.0;
            let even = if code % 2 == 0 { pair[0] } else { pair[1] };
            assert_eq!(round(middle), even, "{middle}");
            let (below, above) = (f32::from_bits(middle.to_bits() - 1), middle.next_up());
            assert_eq!([round(below), round(above)], [pair[0], pair[1]], "{middle}");
            assert_eq!(round(-above), -pair[1]);
        }
    }

    /// Every upper half of an f32, with lower halves around the middle between two numbers.
    #[test]
    fn rounding_is_coding_there_and_back() {
        let all = (0..=u16::MAX).flat_map(|high| {
            [0, 1, 0x7fff, 0x8000, 0xffff].map(|low| f32::from_bits(u32::from(high) << 16 | low))
        });
        for v in all.filter(|v| !v.is_nan()) {
            assert_eq!(round(v).to_bits(), decode(encode(v)).to_bits(), "{v:e}");
        }
    }

    /// Sizes go by the one, loading by the other.
    #[test]
    fn the_matrices_that_are_e4m3_are_those_of_the_mlps() {
        let table = WeightTable::new(crate::Config::pi05(), 10);
        let mut of_mlps: Vec<_> =
            table.prefix_mlps().iter().flat_map(|mlp| [mlp.up, mlp.down]).collect();
        of_mlps.sort();
        let ids = (0..table.specs.len()).map(WeightId);
        let named: Vec<_> = ids.filter(|id| table.spec(*id).is_e4m3()).collect();
        assert_eq!(named, of_mlps);
    }

    #[test]
    fn an_exponent_is_the_largest_that_fits() {
        for bound in [1e-9, 0.3, 1.0, 448.0, 449.0, 1e7] {
            let e = exponent(bound);
            assert!(bound * power(e) as f64 <= MAX as f64, "{bound}");
            assert!(bound * power(e + 1) as f64 > MAX as f64, "{bound}");
        }
        assert_eq!([exponent(0.0), exponent(f64::NAN), exponent(1e-300)], [0, 0, MOST]);
    }
}
