//! openpi's tiny golden models and cases → sources and observations.

use std::path::PathBuf;

use pirouette_model::config::names::EMBED;
use pirouette_model::{Config, Family, MemorySource};

use crate::fixture::{Fixture, FixtureError, testdata};
use crate::plain::Observation;

/// The five recorded cases of each tiny model.
pub const TINY_CASES: [&str; 5] =
    ["all_cameras", "masked_third", "padded_prompt", "batch3_mixed", "masked_first_padded_3steps"];

/// Camera names in the model's order.
pub const CAMERAS: [&str; 3] = ["base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"];

/// Folder of a tiny model.
pub fn tiny_dir(family: Family) -> PathBuf {
    testdata().join("A_tiny").join(family.name())
}

/// Weights of a tiny model.
pub fn tiny_source(family: Family) -> Result<MemorySource, FixtureError> {
    let file = Fixture::open(tiny_dir(family).join("model.safetensors"))?;
    let mut source = MemorySource::default();
    for name in file.names() {
        let canonical = match name {
            "paligemma_with_expert.paligemma.lm_head.weight" => EMBED,
            "paligemma_with_expert.gemma_expert.lm_head.weight" => continue,
            other => other,
        };
        source.insert(canonical, file.shape(name)?, &file.f32(name)?);
    }
    Ok(source)
}

/// Sizes of a tiny model, read off its weights.
pub fn tiny_config(family: Family) -> Result<Config, FixtureError> {
    let source = tiny_source(family)?;
    Ok(Config::infer(&source, Some(4)).expect("the fixture is a whole model"))
}

/// A recorded case: what openpi was given and what it answered, sample by sample.
pub struct Case {
    /// The file, for `out.*` tensors.
    pub fixture: Fixture,
    /// One per sample of the batch.
    pub observations: Vec<Observation>,
    /// Euler steps.
    pub steps: usize,
}

impl Case {
    /// Reads a case of a tiny model (float images are exact images of bytes).
    pub fn tiny(family: Family, name: &str) -> Result<Self, FixtureError> {
        let path = tiny_dir(family).join("cases").join(format!("{name}.safetensors"));
        Self::read(Fixture::open(path)?)
    }

    /// Reads any golden case: `in.image.*` floats or `in.image_u8.*` bytes.
    pub fn read(fixture: Fixture) -> Result<Self, FixtureError> {
        let batch = fixture.shape("in.tokens")?[0];
        let steps =
            if fixture.has("in.num_steps") { fixture.int("in.num_steps")?[0] as usize } else { 10 };
        let mut images = Vec::new();
        let mut masks = Vec::new();
        for camera in CAMERAS {
            let bytes_name = format!("in.image_u8.{camera}");
            images.push(if fixture.has(&bytes_name) {
                fixture.u8(&bytes_name)?.to_vec()
            } else {
                let floats = fixture.f32(&format!("in.image.{camera}"))?;
                floats.iter().map(|v| ((v + 1.0) * 127.5).round() as u8).collect()
            });
            masks.push(fixture.int(&format!("in.image_mask.{camera}"))?);
        }
        let tokens = fixture.int("in.tokens")?;
        let token_mask = fixture.int("in.token_mask")?;
        let state = fixture.f32("in.state")?;
        let noise = fixture.f32("in.noise")?;
        let part = |b: usize, len: usize| b * (len / batch)..(b + 1) * (len / batch);
        let observation = |b: usize| Observation {
            images: std::array::from_fn(|c| images[c][part(b, images[c].len())].to_vec()),
            image_masks: std::array::from_fn(|c| masks[c][b] != 0),
            tokens: tokens[part(b, tokens.len())].iter().map(|&t| t as u32).collect(),
            token_mask: token_mask[part(b, tokens.len())].iter().map(|&m| m != 0).collect(),
            state: state[part(b, state.len())].to_vec(),
            noise: noise[part(b, noise.len())].to_vec(),
        };
        Ok(Case { observations: (0..batch).map(observation).collect(), fixture, steps })
    }
}

/// Observations → the inputs of one run: real cameras first, valid tokens first.
pub struct Packed {
    /// The shape that holds them.
    pub shape: pirouette_model::Shape,
    /// See [`pirouette_model::Inputs`].
    pub images: Vec<u8>,
    /// Real cameras per sample.
    pub cameras: Vec<u32>,
    /// Padded prompts.
    pub tokens: Vec<u32>,
    /// Valid tokens per sample.
    pub prompt_len: Vec<u32>,
    /// States.
    pub state: Vec<f32>,
    /// Noise.
    pub noise: Vec<f32>,
}

impl Packed {
    /// Packs samples into one batch whose slots fit the largest of them.
    pub fn new(config: &Config, observations: &[&Observation], steps: usize) -> Self {
        let real = |o: &Observation| o.image_masks.iter().filter(|&&m| m).count();
        let valid = |o: &Observation| -> Vec<u32> {
            let both = o.tokens.iter().zip(&o.token_mask);
            both.filter(|(_, m)| **m).map(|(t, _)| *t).collect()
        };
        let slots = observations.iter().map(|o| real(o)).max().unwrap_or(1);
        let prompt_tokens = observations.iter().map(|o| valid(o).len()).max().unwrap_or(1);
        let mut packed = Packed {
            shape: pirouette_model::Shape {
                batch: observations.len(),
                cameras: slots,
                prompt_tokens,
                horizon: observations[0].noise.len() / config.action_dim,
                steps,
                rtc: pirouette_model::Rtc::Off,
            },
            images: vec![],
            cameras: vec![],
            tokens: vec![],
            prompt_len: vec![],
            state: vec![],
            noise: vec![],
        };
        for o in observations {
            let bytes = o.images[0].len();
            let masked = o.images.iter().zip(o.image_masks);
            let images: Vec<u8> =
                masked.filter(|(_, m)| *m).flat_map(|(i, _)| i.iter().copied()).collect();
            packed.images.extend(&images);
            // Slots nobody fills hold anything: their content must not matter.
            packed.images.resize(packed.images.len() + slots * bytes - images.len(), 201);
            packed.cameras.push(real(o) as u32);
            let tokens = valid(o);
            packed.prompt_len.push(tokens.len() as u32);
            packed.tokens.extend(&tokens);
            packed.tokens.resize(packed.tokens.len() + prompt_tokens - tokens.len(), 3);
            packed.state.extend(&o.state);
            packed.noise.extend(&o.noise);
        }
        packed
    }

    /// Borrowed for a run.
    pub fn inputs(&self) -> pirouette_model::Inputs<'_> {
        pirouette_model::Inputs {
            images: pirouette_model::Images::Packed(&self.images),
            cameras: &self.cameras,
            tokens: &self.tokens,
            prompt_len: &self.prompt_len,
            state: &self.state,
            noise: &self.noise,
            previous: None,
        }
    }
}
