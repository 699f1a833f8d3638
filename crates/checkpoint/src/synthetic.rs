//! A model's sizes and a seed → reproducible random weights, bit for bit the same everywhere.
//!
//! Element `i` of a tensor is `offset + scale · rᵢ` in f32, with `rᵢ` from a splitmix64 stream
//! that starts at a hash of the tensor's name and the seed. Offsets and scales depend on the kind
//! of tensor and keep activations of a full-size model sane.

use std::borrow::Cow;
use std::collections::BTreeMap;

use pirouette_model::{Config, DType, SourceError, Tensor, TensorSource};
use rayon::prelude::*;

use crate::expected::expected_tensors;

const GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;
/// Elements computed between two stores; small enough for the first-level cache.
const RUN: usize = 1024;
/// Elements of one parallel task.
const TASK: usize = 1 << 18;

/// The affine map of one tensor's random numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// Added.
    pub offset: f32,
    /// Half-width of the uniform distribution.
    pub scale: f32,
}

struct Entry {
    shape: Vec<usize>,
    base: u64,
    spread: Spread,
}

/// Random weights for any [`Config`].
pub struct Synthetic {
    seed: u64,
    dtype: DType,
    tensors: BTreeMap<String, Entry>,
}

impl Synthetic {
    /// Weights rounded to bf16 and served as bf16.
    pub fn new(config: &Config, seed: u64) -> Self {
        Self::with_dtype(config, seed, DType::Bf16)
    }

    /// The same weights before rounding, served as f32.
    pub fn unrounded(config: &Config, seed: u64) -> Self {
        Self::with_dtype(config, seed, DType::F32)
    }

    fn with_dtype(config: &Config, seed: u64, dtype: DType) -> Self {
        let tensors = expected_tensors(config)
            .into_iter()
            .map(|t| {
                let (base, spread) = (stream(&t.name, seed), spread(&t.name, &t.shape));
                (t.name, Entry { shape: t.shape, base, spread })
            })
            .collect();
        Synthetic { seed, dtype, tensors }
    }

    /// The first `count` elements of a tensor, without making the rest.
    pub fn head(&self, name: &str, count: usize) -> Option<Vec<f32>> {
        let entry = self.tensors.get(name)?;
        let count = count.min(entry.shape.iter().product());
        let tensor =
            Tensor { shape: vec![count], dtype: self.dtype, data: self.make(entry, count) };
        Some(tensor.to_f32())
    }

    fn make(&self, entry: &Entry, count: usize) -> Cow<'static, [u8]> {
        let mut data = vec![0; count * self.dtype.bytes()];
        match self.dtype {
            DType::Bf16 => fill(data.as_chunks_mut().0, entry, |v| bf16(v).to_le_bytes()),
            _ => fill(data.as_chunks_mut().0, entry, f32::to_le_bytes),
        }
        Cow::Owned(data)
    }

    /// Offset and scale of a tensor.
    pub fn spread(&self, name: &str) -> Option<Spread> {
        self.tensors.get(name).map(|t| t.spread)
    }
}

impl TensorSource for Synthetic {
    fn origin(&self) -> String {
        format!("synthetic weights, seed {}", self.seed)
    }

    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensors.get(name).map(|t| t.shape.clone())
    }

    fn load(&self, name: &str) -> Result<Tensor<'_>, SourceError> {
        let entry = self
            .tensors
            .get(name)
            .ok_or_else(|| SourceError::Missing { name: name.into(), origin: self.origin() })?;
        let data = self.make(entry, entry.shape.iter().product());
        Ok(Tensor { shape: entry.shape.clone(), dtype: self.dtype, data })
    }
}

/// Start of a tensor's splitmix64 stream: FNV-1a of its name, mixed with the seed.
fn stream(name: &str, seed: u64) -> u64 {
    let hash = name.bytes().fold(0xCBF2_9CE4_8422_2325u64, |h, byte| {
        (h ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3)
    });
    mix(hash.wrapping_add(seed.wrapping_mul(GAMMA)))
}

/// The finaliser of splitmix64.
#[inline(always)]
fn mix(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Rounds to nearest, ties to even. The values are finite.
#[inline(always)]
fn bf16(v: f32) -> u16 {
    let bits = v.to_bits();
    ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) as u16
}

/// Fills a whole tensor. Integers first, floats second: each loop then vectorises.
fn fill<const N: usize>(out: &mut [[u8; N]], entry: &Entry, store: impl Fn(f32) -> [u8; N] + Sync) {
    let Spread { offset, scale } = entry.spread;
    out.par_chunks_mut(TASK).enumerate().for_each(|(task, part)| {
        let mut state = entry.base.wrapping_add(((task * TASK) as u64).wrapping_mul(GAMMA));
        let mut numbers = [0i32; RUN];
        for run in part.chunks_mut(RUN) {
            for number in &mut numbers[..run.len()] {
                state = state.wrapping_add(GAMMA);
                // 24 bits → an odd number in (-2^24, 2^24), exact in f32 and never 0
                *number = 2 * (mix(state) >> 40) as i32 + 1 - (1 << 24);
            }
            for (element, &number) in run.iter_mut().zip(&numbers) {
                let unit = number as f32 * (1.0 / 16_777_216.0);
                *element = store(offset + scale * unit);
            }
        }
    });
}

/// Offset and scale by kind of tensor; the first rule that fits counts.
fn spread(name: &str, shape: &[usize]) -> Spread {
    // Uniform with standard deviation gain/√fan_in, computed in f64.
    let uniform = |gain: f64, fan_in: usize| Spread {
        offset: 0.0,
        scale: (gain * (3.0 / fan_in as f64).sqrt()) as f32,
    };
    let fixed = |offset, scale| Spread { offset, scale };
    let has = |part: &str| name.contains(part);
    let fan_in = shape.get(1).copied().unwrap_or(1);
    if name.ends_with("lm_head.weight") || name.ends_with("embed_tokens.weight") {
        return uniform(1.0, fan_in);
    }
    if has("position_embedding") {
        return fixed(0.0, 0.5);
    }
    if has("patch_embedding.weight") {
        return uniform(1.0, shape.iter().skip(1).product());
    }
    if has(".dense.weight") {
        return uniform(1.0, fan_in);
    }
    if has(".dense.bias") {
        return fixed(0.0, 0.3);
    }
    if has("layer_norm") || has("post_layernorm") {
        return if name.ends_with("weight") { fixed(1.0, 0.3) } else { fixed(0.0, 0.1) };
    }
    if has("layernorm.weight") || name.ends_with(".norm.weight") {
        return fixed(0.0, 0.3);
    }
    if name.ends_with(".bias") {
        return fixed(0.0, 0.05);
    }
    let query_or_key = has("q_proj") || has("k_proj");
    let gain = if has("vision_tower") {
        if query_or_key { 1.4 } else { 1.0 }
    } else if query_or_key {
        1.8
    } else if has("gate_proj") {
        1.4
    } else if has("time_mlp_") {
        1.5
    } else {
        1.0
    };
    uniform(gain, fan_in)
}
