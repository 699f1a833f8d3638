//! A seed → the observations that measurements run on.

use pirouette_engine::standard_normal;
use pirouette_model::{Config, Images, Inputs, Shape};

/// A batch of random observations: every pixel, token and number is drawn, none is zero by rule.
pub struct RandomInputs {
    images: Vec<u8>,
    cameras: Vec<u32>,
    tokens: Vec<u32>,
    prompt_len: Vec<u32>,
    state: Vec<f32>,
    /// Initial noise.
    pub noise: Vec<f32>,
}

impl RandomInputs {
    /// For a shape, all slots filled; a seed gives the same observations everywhere.
    pub fn new(config: &Config, shape: Shape, seed: u64) -> Self {
        let mut state = 0x9E37_79B9_7F4A_7C15u64 ^ seed.rotate_left(32);
        let mut next = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let pixels = shape.batch * shape.cameras * config.vision.image.pow(2) * 3;
        let prompts = shape.batch * shape.prompt_tokens;
        let mut noise = vec![0.0; shape.batch * shape.horizon * config.action_dim];
        standard_normal(seed.wrapping_mul(2), &mut noise);
        let mut robot = vec![0.0; shape.batch * config.action_dim];
        standard_normal(seed.wrapping_mul(2) | 1, &mut robot);
        RandomInputs {
            images: (0..pixels).map(|_| (next() >> 32) as u8).collect(),
            cameras: vec![shape.cameras as u32; shape.batch],
            tokens: (0..prompts).map(|_| (next() % config.vocab as u64) as u32).collect(),
            prompt_len: vec![shape.prompt_tokens as u32; shape.batch],
            state: robot,
            noise,
        }
    }

    /// Borrowed for a run.
    pub fn inputs(&self) -> Inputs<'_> {
        Inputs {
            images: Images::Packed(&self.images),
            cameras: &self.cameras,
            tokens: &self.tokens,
            prompt_len: &self.prompt_len,
            state: &self.state,
            noise: &self.noise,
            previous: None,
        }
    }
}
