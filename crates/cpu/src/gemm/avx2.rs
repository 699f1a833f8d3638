//! AVX2 micro-kernels: up to 6 rows (f32) or 4 rows (bf16, widened by shifts) × 16 columns, the
//! second panel after the first.

use std::arch::x86_64::*;

use super::{CHUNK, Tile};

/// Two registers are a row of a panel.
const HALF: usize = CHUNK / 2;
/// How far ahead of its use B is fetched, in words of K.
const AHEAD: usize = 24;

/// # Safety
/// AVX2; 16 words behind the pointer.
#[inline(always)]
unsafe fn load(from: *const u32) -> [__m256i; 2] {
    // SAFETY: the caller vouches for the words.
    unsafe { [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(HALF).cast())] }
}

/// # Safety
/// AVX2.
#[inline(always)]
unsafe fn low(v: __m256i) -> __m256 {
    // SAFETY: the caller has the feature.
    unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(v)) }
}

/// # Safety
/// AVX2.
#[inline(always)]
unsafe fn high(v: __m256i) -> __m256 {
    // SAFETY: the caller has the feature.
    unsafe {
        let mask = _mm256_set1_epi32(0xffff_0000_u32 as i32);
        _mm256_castsi256_ps(_mm256_and_si256(v, mask))
    }
}

/// # Safety
/// As for [`super::TileFn`], rows = `R`; AVX2 and FMA.
#[inline(always)]
unsafe fn panel<const R: usize, const BF16: bool>(t: &Tile, which: usize) {
    // SAFETY: the pointers cover what the shape says, the caller has the features. A prefetch may
    // point anywhere.
    unsafe {
        let c = t.c.add(which * CHUNK);
        let mut sums = [[_mm256_setzero_ps(); 2]; R];
        if t.accumulate {
            for (r, sum) in sums.iter_mut().enumerate() {
                let c = c.add(r * t.c_stride);
                *sum = [_mm256_loadu_ps(c), _mm256_loadu_ps(c.add(HALF))];
            }
        }
        let (mut a_chunk, mut b) = (t.a, t.b[which]);
        for _ in 0..t.chunks {
            let mut a = a_chunk;
            for _ in 0..CHUNK {
                _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add(AHEAD * CHUNK).cast());
                let columns = load(b);
                b = b.add(CHUNK);
                if BF16 {
                    let (even, odd) = (columns.map(|v| low(v)), columns.map(|v| high(v)));
                    for (r, sum) in sums.iter_mut().enumerate() {
                        let a = _mm256_set1_epi32(a.add(r * CHUNK).cast::<i32>().read());
                        let (first, second) = (low(a), high(a));
                        for (h, sum) in sum.iter_mut().enumerate() {
                            *sum = _mm256_fmadd_ps(first, even[h], *sum);
                            *sum = _mm256_fmadd_ps(second, odd[h], *sum);
                        }
                    }
                } else {
                    for (r, sum) in sums.iter_mut().enumerate() {
                        let a = _mm256_set1_ps(a.add(r * CHUNK).cast::<f32>().read());
                        for (sum, column) in sum.iter_mut().zip(columns) {
                            *sum = _mm256_fmadd_ps(a, _mm256_castsi256_ps(column), *sum);
                        }
                    }
                }
                a = a.add(1);
            }
            a_chunk = a_chunk.wrapping_add(t.a_stride);
        }
        for (r, sum) in sums.iter().enumerate() {
            let c = c.add(r * t.c_stride);
            _mm256_storeu_ps(c, sum[0]);
            _mm256_storeu_ps(c.add(HALF), sum[1]);
        }
    }
}

macro_rules! by_rows {
    ($tile:ident, $bf16:literal: $($rows:literal)*) => {
        for which in 0..2 {
            if $tile.b[which].is_null() {
                continue;
            }
            match $tile.rows {
                // SAFETY: passed on.
                $($rows => unsafe { panel::<$rows, $bf16>($tile, which) },)*
                rows => assert!(rows == 0, "{rows} rows are more than a tile has"),
            }
        }
    };
}

/// # Safety
/// As for [`super::TileFn`].
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn tile_f32(t: &Tile) {
    by_rows!(t, false: 1 2 3 4 5 6);
}

/// # Safety
/// As for [`super::TileFn`].
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn tile_bf16(t: &Tile) {
    by_rows!(t, true: 1 2 3 4);
}
