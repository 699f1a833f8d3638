//! Micro-kernels in plain Rust over 16-lane arrays, for instruction sets without one of their own.
//! bf16 words are widened by shifts: exact products, f32 sums.

use super::{CHUNK, Tile, mul_add};

type Row = [f32; CHUNK];

#[inline(always)]
fn low(word: u32) -> f32 {
    f32::from_bits(word << 16)
}

#[inline(always)]
fn high(word: u32) -> f32 {
    f32::from_bits(word & 0xffff_0000)
}

/// `R` rows against one panel.
///
/// # Safety
/// As for [`super::TileFn`], rows = `R`.
#[inline(always)]
unsafe fn panel<const R: usize, const BF16: bool, const FMA: bool>(t: &Tile, which: usize) {
    let mut sums = [[0.0f32; CHUNK]; R];
    for (r, sum) in sums.iter_mut().enumerate() {
        if t.accumulate {
            // SAFETY: row r of the result has 16 columns for each panel.
            *sum = unsafe { t.c.add(r * t.c_stride + which * CHUNK).cast::<Row>().read() };
        }
    }
    for chunk in 0..t.chunks {
        for word in 0..CHUNK {
            // SAFETY: the panel has `chunks` chunks of 16 words of 16 columns.
            let b = unsafe {
                t.b[which].add((chunk * CHUNK + word) * CHUNK).cast::<[u32; CHUNK]>().read()
            };
            for (r, sum) in sums.iter_mut().enumerate() {
                // SAFETY: as above, for A.
                let a = unsafe { t.a.add(chunk * t.a_stride + r * CHUNK + word).read() };
                for j in 0..CHUNK {
                    sum[j] = if BF16 {
                        let first = mul_add::<FMA>(low(a), low(b[j]), sum[j]);
                        mul_add::<FMA>(high(a), high(b[j]), first)
                    } else {
                        mul_add::<FMA>(f32::from_bits(a), f32::from_bits(b[j]), sum[j])
                    };
                }
            }
        }
    }
    for (r, sum) in sums.iter().enumerate() {
        // SAFETY: as for the read.
        unsafe { t.c.add(r * t.c_stride + which * CHUNK).cast::<Row>().write(*sum) };
    }
}

/// # Safety
/// As for [`super::TileFn`], at most 6 rows.
#[inline(always)]
unsafe fn tile<const MAX: usize, const BF16: bool, const FMA: bool>(t: &Tile) {
    assert!(t.rows <= MAX);
    for which in 0..2 {
        if t.b[which].is_null() {
            continue;
        }
        macro_rules! by_rows {
            ($($r:literal)*) => {
                match t.rows {
                    // SAFETY: passed on.
                    $($r if $r <= MAX => unsafe { panel::<$r, BF16, FMA>(t, which) },)*
                    _ => {}
                }
            };
        }
        by_rows!(1 2 3 4 5 6);
    }
}

macro_rules! kernels {
    ($($(#[$attribute:meta])* $name:ident: $max:literal, $bf16:literal, $fma:literal;)*) => {
        $(
            /// # Safety
            /// As for [`super::TileFn`].
            $(#[$attribute])*
            pub(super) unsafe fn $name(t: &Tile) {
                // SAFETY: passed on.
                unsafe { tile::<$max, $bf16, $fma>(t) }
            }
        )*
    };
}

kernels! {
    portable_f32: 4, false, false;
    portable_bf16: 4, true, false;
    #[cfg(target_arch = "aarch64")]
    neon_f32: 6, false, true;
    #[cfg(target_arch = "aarch64")]
    neon_bf16: 4, true, true;
}
