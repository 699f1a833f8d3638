//! The fixed flow-matching schedule: step times and their sinusoidal embedding.

/// Times at which the network is evaluated: 1 down to 1/steps, accumulated in f32 as openpi does
/// (`t += dt` while `t >= -dt/2`).
pub fn times(steps: usize) -> Vec<f32> {
    let dt = -1.0f32 / steps as f32;
    let mut t = 1.0f32;
    (0..steps)
        .map(|_| {
            let now = t;
            t += dt;
            now
        })
        .collect()
}

/// Step size of the Euler integration: −1/steps.
pub fn dt(steps: usize) -> f32 {
    -1.0f32 / steps as f32
}

/// How the angles of the time embedding are evaluated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum TimeEmbedding {
    /// f64 angles rounded at the end (openpi PyTorch, and the more accurate one).
    #[default]
    F64,
    /// f32 throughout (openpi JAX); differs by up to 1.4e-4 in the fastest components.
    F32,
}

const MIN_PERIOD: f64 = 4e-3;
const MAX_PERIOD: f64 = 4.0;

/// Embedding of time `t`, `dim` values: all sines, then all cosines, of 2πt / period with periods
/// geometrically spaced from 0.004 to 4, both ends included.
pub fn time_embedding(t: f32, dim: usize, precision: TimeEmbedding) -> Vec<f32> {
    let n = dim / 2;
    let angle = |i: usize| -> (f32, f32) {
        let fraction = if n > 1 { i as f64 / (n - 1) as f64 } else { 0.0 };
        match precision {
            TimeEmbedding::F64 => {
                let period = MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD).powf(fraction);
                let a = 1.0 / period * 2.0 * std::f64::consts::PI * t as f64;
                (a.sin() as f32, a.cos() as f32)
            }
            TimeEmbedding::F32 => {
                // As XLA evaluates it: the fraction by a reciprocal, the power to the nearest f32.
                let fraction = i as f32 * (1.0 / (n.max(2) - 1) as f32);
                let ratio = (MAX_PERIOD / MIN_PERIOD).powf(fraction as f64) as f32;
                let period = MIN_PERIOD as f32 * ratio;
                let a = t * (1.0 / period * 2.0 * std::f32::consts::PI);
                (a.sin(), a.cos())
            }
        }
    };
    let (sines, cosines): (Vec<f32>, Vec<f32>) = (0..n).map(angle).unzip();
    sines.into_iter().chain(cosines).collect()
}

/// Cosine and sine of rotary angle `position · 10000^(−2j / head_dim)` for `j < head_dim / 2`.
/// With `bf16_frequencies` the inverse frequencies are rounded as openpi's PyTorch server has them.
pub fn rope_angles(
    position: u32,
    head_dim: usize,
    bf16_frequencies: bool,
) -> impl Iterator<Item = (f32, f32)> {
    (0..head_dim / 2).map(move |j| {
        let mut inverse = 10000f64.powf(-2.0 * j as f64 / head_dim as f64);
        if bf16_frequencies {
            inverse = half::bf16::from_f64(inverse).to_f64();
        }
        let a = position as f64 * inverse;
        (a.cos() as f32, a.sin() as f32)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_steps_accumulate_as_openpi() {
        let want = [
            1.0,
            0.8999999762,
            0.7999999523,
            0.6999999285,
            0.5999999046,
            0.4999999106,
            0.3999999166,
            0.2999999225,
            0.1999999285,
            0.0999999270,
        ];
        for (t, w) in times(10).iter().zip(want) {
            assert!((*t as f64 - w).abs() < 1e-10, "{t} {w}");
        }
    }

    #[test]
    fn loop_condition_gives_exactly_the_step_count() {
        for n in [1, 2, 3, 5, 7, 10, 12, 16, 20, 25, 32, 50, 64, 100, 200, 500, 1000] {
            let (dt, mut t, mut count) = (dt(n), 1.0f32, 0);
            while t >= -dt / 2.0 {
                t += dt;
                count += 1;
            }
            assert_eq!(count, n);
        }
    }

    #[test]
    fn embedding_matches_the_published_values() {
        let e = time_embedding(0.9, 1024, TimeEmbedding::F64);
        for (i, w) in [
            (0, -3.745070291588944e-05),
            (1, -0.13228215116199155),
            (255, 0.8555127527076758),
            (511, 0.9876883347365564),
            (512, 0.9999999992987224),
            (1023, 0.1564345020298533),
        ] {
            assert!((e[i] as f64 - w).abs() < 6e-8, "{i}: {} {w}", e[i]);
        }
    }
}
