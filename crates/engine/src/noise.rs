//! (seed, element) → standard normal: the random stream of a request, counter-based so that it
//! depends on nothing else.
//!
//! Algorithm, stable across versions and machines: Philox4x32-10 (Salmon et al., SC'11) with key
//! = seed (low word, high word) and counter = (low and high word of `element / 4`, 0, 0) gives four
//! words w0…w3.
//! A word becomes u = (w + ½) · 2⁻³². Elements 4k and 4k+1 are r·cos φ and r·sin φ with
//! r = √(−2 ln u(w0)), φ = 2π·u(w1); elements 4k+2 and 4k+3 likewise from w2 and w3. All in
//! f64, rounded to f32 at the end.

use std::hash::{BuildHasher, Hasher};

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Ten rounds of Philox4x32.
pub(crate) fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = MULTIPLIERS[0] as u64 * counter[0] as u64;
        let b = MULTIPLIERS[1] as u64 * counter[2] as u64;
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// Fills `out` with elements 0, 1, … of the seed's stream, each N(0, 1).
pub fn standard_normal(seed: u64, out: &mut [f32]) {
    let key = [seed as u32, (seed >> 32) as u32];
    for (block, chunk) in out.chunks_mut(4).enumerate() {
        let words = philox([block as u32, (block as u64 >> 32) as u32, 0, 0], key);
        let unit = |w: u32| (w as f64 + 0.5) / 4_294_967_296.0;
        for (pair, chunk) in chunk.chunks_mut(2).enumerate() {
            let radius = (-2.0 * unit(words[2 * pair]).ln()).sqrt();
            let (sin, cos) = (std::f64::consts::TAU * unit(words[2 * pair + 1])).sin_cos();
            for (value, part) in chunk.iter_mut().zip([cos, sin]) {
                *value = (radius * part) as f32;
            }
        }
    }
}

/// A fresh seed from the operating system's entropy, below 2⁵³ so that any JSON log can hold it.
pub fn draw_seed() -> u64 {
    // `RandomState` is seeded by the operating system and differs at every call.
    std::collections::hash_map::RandomState::new().build_hasher().finish() >> 11
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_known_answers() {
        // The reference vectors of Random123.
        assert_eq!(philox([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        let ones = u32::MAX;
        assert_eq!(philox([ones; 4], [ones; 2]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        assert_eq!(
            philox([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0]),
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
        );
    }

    #[test]
    fn golden_values() {
        // Computed by an independent script from the description at the top of this file.
        let bits = |seed: u64, n: usize| {
            let mut values = vec![0.0; n];
            standard_normal(seed, &mut values);
            values.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
        };
        let zero = [0x3f7dbb33, 0xbf6cb6b0, 0xbf1e1b9f, 0xbef6d1b2, 0xbe1d5357, 0x3e392a6d];
        assert_eq!(bits(0, 6), zero);
        let answer = [0xbf785e5c, 0x3e46ace8, 0xbf9e28d2, 0x3ff6433b, 0xbd95e030, 0x3e0e7a0f];
        assert_eq!(bits(42, 6), answer);
        assert_eq!(bits(42, 1600)[1599], 0xbf9e7e83);
        let high = [0x3e7919c5, 0x3c8ad502, 0xbfc67677, 0x3e8bc854, 0xbeebb237, 0xbfa834c4];
        assert_eq!(bits((1 << 63) + 5, 6), high);
    }

    #[test]
    fn an_element_depends_on_seed_and_index_only() {
        let mut long = vec![0.0; 1600];
        standard_normal(42, &mut long);
        for n in [1, 2, 3, 5, 320] {
            let mut short = vec![0.0; n];
            standard_normal(42, &mut short);
            assert_eq!(short, long[..n]);
        }
        let mut other = vec![0.0; 1600];
        standard_normal(43, &mut other);
        assert!(long.iter().zip(&other).filter(|(a, b)| a == b).count() < 3);
        standard_normal(42 | 1 << 40, &mut other);
        assert!(long.iter().zip(&other).filter(|(a, b)| a == b).count() < 3);
    }

    #[test]
    fn moments_are_those_of_a_standard_normal() {
        let n = 1 << 20;
        let mut values = vec![0.0f32; n];
        standard_normal(7, &mut values);
        let moment = |p: i32| values.iter().map(|&v| (v as f64).powi(p)).sum::<f64>() / n as f64;
        // Five standard errors: sqrt(1, 2, 15, 96) / sqrt(n) ≈ 0.001, 0.0014, 0.0038, 0.0096.
        assert!(moment(1).abs() < 0.005, "mean {}", moment(1));
        assert!((moment(2) - 1.0).abs() < 0.007, "variance {}", moment(2));
        assert!(moment(3).abs() < 0.019, "third {}", moment(3));
        assert!((moment(4) - 3.0).abs() < 0.048, "fourth {}", moment(4));
        let lag: f64 = values.windows(2).map(|w| w[0] as f64 * w[1] as f64).sum::<f64>();
        assert!((lag / n as f64).abs() < 0.005, "correlation {}", lag / n as f64);
        let beyond = values.iter().filter(|v| v.abs() > 3.0).count() as f64 / n as f64;
        assert!((beyond - 0.0027).abs() < 0.0003, "beyond three sigma: {beyond}");
    }

    #[test]
    fn drawn_seeds_differ_and_fit_a_double() {
        let seeds: std::collections::HashSet<u64> = (0..100).map(|_| draw_seed()).collect();
        assert_eq!(seeds.len(), 100);
        assert!(seeds.iter().all(|s| *s < 1 << 53));
    }
}
