//! A known input whose answer is known: what it takes for a device to count as sound.

use std::time::Duration;

use pirouette_model::{Config, Shape};

use crate::noise::{philox, standard_normal};
use crate::staging::Staging;

/// Settings of the canary forward.
#[derive(Clone, Debug)]
pub struct CanaryOptions {
    /// Cameras of the known observation (default 1).
    pub cameras: usize,
    /// Tokens of its prompt (default 16).
    pub prompt_tokens: usize,
    /// The known actions, `[horizon, action_dim]`. Without them a device's first forward after
    /// the engine started is the reference, also across its restarts.
    pub expected: Option<Vec<f32>>,
    /// Largest difference allowed, relative to the largest expected magnitude. Zero (the
    /// default) asks for the same bits.
    pub tolerance: f32,
    /// A readiness probe reruns the forward when the last is older than this (default 30 s).
    pub max_age: Duration,
}

impl Default for CanaryOptions {
    fn default() -> Self {
        CanaryOptions {
            cameras: 1,
            prompt_tokens: 16,
            expected: None,
            tolerance: 0.0,
            max_age: Duration::from_secs(30),
        }
    }
}

impl CanaryOptions {
    /// Whether the actions are the known ones; the error names the first that is not.
    pub(crate) fn compare(&self, want: &[f32], got: &[f32]) -> Result<(), String> {
        if want.len() != got.len() {
            return Err(format!("canary: {} values, {} expected", got.len(), want.len()));
        }
        let scale = want.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        for (i, (w, g)) in want.iter().zip(got).enumerate() {
            let close = g.is_finite() && (w - g).abs() <= self.tolerance * scale;
            if !close && w.to_bits() != g.to_bits() {
                return Err(format!("canary: value {i} is {g}, known to be {w}"));
            }
        }
        Ok(())
    }
}

/// A hash (FNV-1a) of the bits of an answer.
pub(crate) fn fingerprint(actions: &[f32]) -> u64 {
    let bytes = actions.iter().flat_map(|v| v.to_bits().to_le_bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// Fills every slot of the staging area with the known observation.
pub(crate) fn fill(staging: &mut Staging, config: &Config, shape: Shape) {
    staging.reset(config, shape);
    let word = |i: usize| philox([i as u32, 0, 0, 1], [0x70697275, 0x65747465])[0];
    // A slow wave with a little structure: like a picture, unlike noise.
    let wave = |i: usize| (i / 3 % 97 + i / 7919) as u32;
    let pixel = |i: usize| (wave(i).wrapping_mul(2) ^ (i as u32 % 3) << 5) as u8;
    let image = config.vision.image * config.vision.image * 3;
    let picture = |n: usize| (n * image..(n + 1) * image).map(pixel).collect::<Vec<_>>().into();
    staging.images.extend((0..shape.batch * shape.cameras).map(picture));
    for (i, token) in staging.tokens.iter_mut().enumerate() {
        *token = word(i % shape.prompt_tokens) % config.vocab.max(1) as u32;
    }
    staging.cameras.fill(shape.cameras as u32);
    staging.prompt_len.fill(shape.prompt_tokens as u32);
    for (i, value) in staging.state.iter_mut().enumerate() {
        *value = ((i % config.action_dim) as f32 / config.action_dim as f32) - 0.5;
    }
    let row = shape.horizon * config.action_dim;
    for noise in staging.noise.chunks_mut(row) {
        standard_normal(0, noise);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fingerprint_tells_one_bit() {
        let flipped = f32::from_bits(1.0f32.to_bits() ^ 1);
        assert_eq!(fingerprint(&[]), 0xcbf2_9ce4_8422_2325);
        assert_ne!(fingerprint(&[0.5, 1.0]), fingerprint(&[0.5, flipped]));
    }

    #[test]
    fn one_wrong_bit_is_found_and_a_tolerance_is_relative() {
        let exact = CanaryOptions::default();
        let want = [0.0, -2.0, 1.0];
        assert!(exact.compare(&want, &want).is_ok());
        let flipped = f32::from_bits(1.0f32.to_bits() ^ 1);
        let error = exact.compare(&want, &[0.0, -2.0, flipped]).unwrap_err();
        assert!(error.contains("value 2"), "{error}");
        assert!(exact.compare(&want, &[0.0, -2.0]).is_err());
        let loose = CanaryOptions { tolerance: 1e-3, ..exact };
        assert!(loose.compare(&want, &[0.001, -2.0, 1.0]).is_ok());
        assert!(loose.compare(&want, &[0.003, -2.0, 1.0]).is_err());
        assert!(loose.compare(&want, &[f32::NAN, -2.0, 1.0]).is_err());
    }
}
