//! The inputs of a batch, gathered into the buffers a backend wants; images stay where they are.

use bytes::Bytes;
use pirouette_model::{
    BackendError, Config, Executable, Images, Inputs, Previous, Rtc, Shape, StageTimes,
};

use crate::queue::JobInputs;

/// Input buffers, kept from batch to batch. Images are kept for one run: each lies in the frame it
/// came in, and would hold all of that.
#[derive(Debug, Default)]
pub(crate) struct Staging {
    /// `[batch, cameras]`; a sample's first one stands in for the cameras it does not have.
    pub(crate) images: Vec<Bytes>,
    pub(crate) cameras: Vec<u32>,
    pub(crate) tokens: Vec<u32>,
    pub(crate) prompt_len: Vec<u32>,
    pub(crate) state: Vec<f32>,
    pub(crate) noise: Vec<f32>,
    /// Previous chunks, weights and limits; empty without real-time chunking.
    previous: [Vec<f32>; 3],
    pub(crate) actions: Vec<f32>,
}

impl Staging {
    /// Sizes every buffer for a shape. Contents are whatever they were.
    pub(crate) fn reset(&mut self, config: &Config, shape: Shape) {
        let actions = shape.batch * shape.horizon * config.action_dim;
        self.images.clear();
        self.cameras.resize(shape.batch, 0);
        self.tokens.resize(shape.batch * shape.prompt_tokens, 0);
        self.prompt_len.resize(shape.batch, 0);
        self.state.resize(shape.batch * config.action_dim, 0.0);
        self.noise.resize(actions, 0.0);
        let tied = (shape.rtc != Rtc::Off) as usize;
        // Zeros: warm-ups and the canary fill in none, and are not tied to anything.
        for (values, n) in
            self.previous.iter_mut().zip([actions, shape.batch * shape.horizon, shape.batch])
        {
            values.clear();
            values.resize(tied * n, 0.0);
        }
        self.actions.resize(actions, 0.0);
        // An answer must be written by the run it belongs to: anything left over is not finite.
        self.actions.fill(f32::NAN);
    }

    /// Gathers a batch; slots without a request repeat the first one.
    ///
    /// `jobs` is not empty, each has an image, and each was checked against the bucket of `shape`.
    pub(crate) fn gather(&mut self, config: &Config, shape: Shape, jobs: &[&JobInputs]) {
        self.reset(config, shape);
        let action_row = shape.horizon * config.action_dim;
        for slot in 0..shape.batch {
            let job = jobs.get(slot).copied().unwrap_or(jobs[0]);
            let camera = |i: usize| job.images.get(i).unwrap_or(&job.images[0]).clone();
            self.images.extend((0..shape.cameras).map(camera));
            self.cameras[slot] = job.images.len() as u32;
            let row = &mut self.tokens[slot * shape.prompt_tokens..][..shape.prompt_tokens];
            row[..job.tokens.len()].copy_from_slice(&job.tokens);
            row[job.tokens.len()..].fill(0);
            self.prompt_len[slot] = job.tokens.len() as u32;
            let (from, n) = (slot * config.action_dim, config.action_dim);
            self.state[from..from + n].copy_from_slice(&job.state);
            self.noise[slot * action_row..][..action_row].copy_from_slice(&job.noise);
            if let (Some(p), [chunks, weights, limits]) = (&job.previous, &mut self.previous) {
                chunks[slot * action_row..][..action_row].copy_from_slice(&p.chunk);
                weights[slot * shape.horizon..][..shape.horizon].copy_from_slice(&p.weights);
                limits[slot] = p.limit;
            }
        }
    }

    /// Runs a program of the shape on what is gathered, into `actions`. Lets go of the images.
    pub(crate) fn run(
        &mut self,
        executable: &mut dyn Executable,
    ) -> Result<StageTimes, BackendError> {
        let images = std::mem::take(&mut self.images);
        let each: Vec<&[u8]> = images.iter().map(|image| &image[..]).collect();
        let [chunks, weights, limits] = &self.previous;
        let inputs = Inputs {
            images: Images::Each(&each),
            cameras: &self.cameras,
            tokens: &self.tokens,
            prompt_len: &self.prompt_len,
            state: &self.state,
            noise: &self.noise,
            previous: (!limits.is_empty()).then_some(Previous { chunks, weights, limits }),
        };
        executable.run(&inputs, &mut self.actions)
    }
}
