//! exp and the activations built on it, to be vectorised by their callers; within a few units of
//! the last place of f32.

use super::mul_add;

/// e^x: 2^n · e^r with |r| ≤ ln 2 / 2, e^r by its series to r⁷ (remainder under 6e-9). Arguments
/// are clamped to −87 … 88, where the result is a normal number.
#[inline(always)]
pub(crate) fn exp<const FMA: bool>(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2²³: adding it leaves an integer in the low bits
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.0, 88.0);
    let shifted = mul_add::<FMA>(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = mul_add::<FMA>(n, -LN2_HIGH, x);
    let r = mul_add::<FMA>(n, -LN2_LOW, r);
    let mut p = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = mul_add::<FMA>(p, r, c);
    }
    let power = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    p * f32::from_bits(power)
}

/// y · (1 + tanh(√(2/π) · (y + 0.044715 y³))) / 2, written as y · sigmoid of twice the argument:
/// no cancellation for negative y.
#[inline(always)]
pub(crate) fn gelu<const FMA: bool>(y: f32) -> f32 {
    const TWICE: f32 = 1.595_769; // 2 · √(2/π), nearest f32
    let inner = TWICE * y * mul_add::<FMA>(0.044_715 * y, y, 1.0);
    y / (1.0 + exp::<FMA>(-inner))
}

/// y · sigmoid(y)
#[inline(always)]
pub(crate) fn silu<const FMA: bool>(y: f32) -> f32 {
    y / (1.0 + exp::<FMA>(-y))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gemm::{Isa, Lanes};

    struct Map<'a>(&'a mut [f32], u8);

    impl Lanes for Map<'_> {
        type Output = ();
        #[inline(always)]
        fn run<const FMA: bool>(self) {
            for v in self.0 {
                *v = match self.1 {
                    0 => exp::<FMA>(*v),
                    1 => gelu::<FMA>(*v),
                    _ => silu::<FMA>(*v),
                };
            }
        }
    }

    fn gelu64(y: f64) -> f64 {
        let inner = (2.0 / std::f64::consts::PI).sqrt() * (y + 0.044715 * y * y * y);
        y / (1.0 + (-2.0 * inner).exp())
    }

    #[test]
    fn close_to_f64_everywhere() {
        let points: Vec<f32> = (-86_000..86_000).map(|i| i as f32 * 1e-3 + 3e-4).collect();
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            for which in 0..3u8 {
                let mut got = points.clone();
                isa.lanes(Map(&mut got, which));
                for (x, got) in points.iter().zip(got) {
                    let x = *x as f64;
                    // An argument of exp that was itself rounded costs that many units more.
                    let (want, argument) = match which {
                        0 => (x.exp(), 0.0),
                        1 => (gelu64(x), 1.6 * x.abs() * (1.0 + 0.045 * x * x)),
                        _ => (x / (1.0 + (-x).exp()), x.abs()),
                    };
                    // Below −87 the clamped exp keeps a remainder of 1e-38 · x.
                    let off = (got as f64 - want).abs() - 1e-36;
                    let limit = 1.6e-7 + 3e-7 * argument;
                    assert!(off <= limit * want.abs(), "{isa:?} {which} {x}: {got} {want}");
                }
            }
        }
    }

    #[test]
    fn far_arguments_stay_finite() {
        for x in [-1e30f32, -1000.0, -90.0, 90.0, 1000.0, 1e30] {
            assert!(exp::<false>(x).is_finite() && gelu::<false>(x.clamp(-1e9, 1e9)).is_finite());
            assert!(silu::<false>(x).is_finite());
        }
        assert_eq!(gelu::<false>(-50.0).abs().max(1e-30), 1e-30);
    }
}
