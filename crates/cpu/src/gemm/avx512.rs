//! AVX-512 micro-kernels: up to 14 rows × 32 columns in 28 accumulators, one broadcast of A and two
//! loads of B per word of K.

use std::arch::x86_64::*;

use super::{CHUNK, Tile};

/// How far ahead of its use B is fetched, in words of K: B streams from memory when few rows
/// share it.
const AHEAD: usize = 24;

/// What is done with a word of A and a word of B: pairs of bf16 multiplied and added at once,
const DOT: u8 = 0;
/// one after the other in f32,
const WIDEN: u8 = 1;
/// or one f32 product.
const FMA: u8 = 2;

/// # Safety
/// AVX-512 BF16.
#[inline(always)]
unsafe fn dot(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
    // SAFETY: 512 bits of plain numbers either way; the caller has the feature.
    unsafe {
        let a = std::mem::transmute::<__m512i, __m512bh>(a);
        let b = std::mem::transmute::<__m512i, __m512bh>(b);
        _mm512_dpbf16_ps(sum, a, b)
    }
}

/// # Safety
/// AVX-512 F.
#[inline(always)]
unsafe fn fma(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
    // SAFETY: the caller has the feature.
    unsafe { _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum) }
}

/// # Safety
/// AVX-512 F.
#[inline(always)]
unsafe fn widen(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
    // SAFETY: the caller has the feature.
    unsafe {
        let high = _mm512_set1_epi32(0xffff_0000_u32 as i32);
        let low = |v| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(v));
        let high = |v| _mm512_castsi512_ps(_mm512_and_si512(v, high));
        _mm512_fmadd_ps(high(a), high(b), _mm512_fmadd_ps(low(a), low(b), sum))
    }
}

/// # Safety
/// As for [`super::TileFn`], rows = `R`, `P` panels; AVX-512 F, and BF16 for
/// `DOT`.
#[inline(always)]
unsafe fn block<const R: usize, const P: usize, const HOW: u8>(t: &Tile) {
    // SAFETY: the caller has AVX-512 F.
    let zero = unsafe { _mm512_setzero_ps() };
    let mut sums = [[zero; P]; R];
    if t.accumulate {
        for (r, sum) in sums.iter_mut().enumerate() {
            for (p, sum) in sum.iter_mut().enumerate() {
                // SAFETY: row r of the result has 16 columns for each panel.
                *sum = unsafe { _mm512_loadu_ps(t.c.add(r * t.c_stride + p * CHUNK)) };
            }
        }
    }
    let (mut a_chunk, mut b) = (t.a, t.b);
    for _ in 0..t.chunks {
        let mut a = a_chunk;
        for _ in 0..CHUNK {
            // SAFETY: the caller has AVX-512 F.
            let mut columns = [unsafe { _mm512_setzero_si512() }; P];
            for (column, b) in columns.iter_mut().zip(&mut b) {
                // SAFETY: the panel has `chunks` chunks of 16 words of 16 columns; a prefetch may
                // point anywhere.
                unsafe {
                    _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add(AHEAD * CHUNK).cast());
                    *column = _mm512_loadu_si512(b.cast());
                    *b = b.add(CHUNK);
                }
            }
            for (r, sum) in sums.iter_mut().enumerate() {
                // SAFETY: the chunk has 16 words of each row.
                let a = unsafe { _mm512_set1_epi32(a.add(r * CHUNK).cast::<i32>().read()) };
                for (sum, column) in sum.iter_mut().zip(columns) {
                    // SAFETY: the caller has the features.
                    *sum = unsafe {
                        match HOW {
                            DOT => dot(*sum, a, column),
                            WIDEN => widen(*sum, a, column),
                            _ => fma(*sum, a, column),
                        }
                    };
                }
            }
            // SAFETY: at most one past the last word of the chunk's first row.
            a = unsafe { a.add(1) };
        }
        a_chunk = a_chunk.wrapping_add(t.a_stride);
    }
    for (r, sum) in sums.iter().enumerate() {
        for (p, sum) in sum.iter().enumerate() {
            // SAFETY: as for the load.
            unsafe { _mm512_storeu_ps(t.c.add(r * t.c_stride + p * CHUNK), *sum) };
        }
    }
}

macro_rules! by_rows {
    ($tile:ident, $panels:literal, $how:ident: $($rows:literal)*) => {
        match $tile.rows {
            // SAFETY: passed on.
            $($rows => unsafe { block::<$rows, $panels, { $how }>($tile) },)*
            rows => assert!(rows == 0, "{rows} rows are more than a tile has"),
        }
    };
}

/// # Safety
/// As for [`super::TileFn`].
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn tile_bf16(t: &Tile) {
    if t.b[1].is_null() {
        by_rows!(t, 1, DOT: 1 2 3 4 5 6 7 8 9 10 11 12 13 14)
    } else {
        by_rows!(t, 2, DOT: 1 2 3 4 5 6 7 8 9 10 11 12 13 14)
    }
}

/// # Safety
/// As for [`super::TileFn`].
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn tile_widened(t: &Tile) {
    if t.b[1].is_null() {
        by_rows!(t, 1, WIDEN: 1 2 3 4 5 6 7 8 9 10 11 12)
    } else {
        by_rows!(t, 2, WIDEN: 1 2 3 4 5 6 7 8 9 10 11 12)
    }
}

/// # Safety
/// As for [`super::TileFn`].
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn tile_f32(t: &Tile) {
    if t.b[1].is_null() {
        by_rows!(t, 1, FMA: 1 2 3 4 5 6 7 8 9 10 11 12 13 14)
    } else {
        by_rows!(t, 2, FMA: 1 2 3 4 5 6 7 8 9 10 11 12 13 14)
    }
}
