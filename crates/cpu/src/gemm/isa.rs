//! The processor → the instruction sets found, and plain Rust loops compiled for each.

/// An instruction set that the kernels are written or compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Isa {
    /// Whatever the target guarantees.
    Portable,
    /// 128-bit vectors of aarch64.
    Neon,
    /// AVX2 with FMA.
    Avx2,
    /// AVX-512 F, BW, DQ, VL.
    Avx512,
    /// AVX-512 with bf16 dot products.
    Avx512Bf16,
    /// AVX-512 BF16 with AMX tiles.
    Amx,
}

impl Isa {
    /// All of them, the weakest first.
    pub const ALL: [Isa; 6] =
        [Isa::Portable, Isa::Neon, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16, Isa::Amx];

    /// Its usual spelling.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Neon => "NEON",
            Isa::Avx2 => "AVX2",
            Isa::Avx512 => "AVX-512",
            Isa::Avx512Bf16 => "AVX-512 BF16",
            Isa::Amx => "AMX BF16",
        }
    }

    /// Whether this machine (and, for AMX, this kernel) lets us use it.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Portable => true,
            Isa::Neon => cfg!(target_arch = "aarch64"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => Isa::Avx512.is_available() && is_x86_feature_detected!("avx512bf16"),
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => Isa::Avx512Bf16.is_available() && super::amx::is_available(),
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// The best one here.
    pub fn best() -> Isa {
        Isa::ALL.into_iter().rev().find(|isa| isa.is_available()).unwrap_or(Isa::Portable)
    }

    /// Runs loops compiled for this instruction set.
    ///
    /// # Panics
    /// If the machine does not have it: devices are opened with available ones only.
    #[inline]
    pub(crate) fn lanes<L: Lanes>(self, loops: L) -> L::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                assert!(has_avx2());
                // SAFETY: just checked.
                unsafe { avx2(loops) }
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => {
                assert!(has_avx512());
                // SAFETY: just checked.
                unsafe { avx512(loops) }
            }
            Isa::Neon => loops.run::<{ cfg!(target_arch = "aarch64") }>(),
            _ => loops.run::<false>(),
        }
    }
}

/// Loops over fixed-size arrays, written plainly so that the compiler can vectorise them. `run`
/// must be `#[inline(always)]` to be compiled with the features of its caller.
pub(crate) trait Lanes {
    type Output;
    /// `FMA`: multiply-adds are fused.
    fn run<const FMA: bool>(self) -> Self::Output;
}

/// a · b + c
#[inline(always)]
pub(crate) fn mul_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn avx2<L: Lanes>(loops: L) -> L::Output {
    loops.run::<true>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
fn avx512<L: Lanes>(loops: L) -> L::Output {
    loops.run::<true>()
}
