//! What every backend offers: load weights once, compile programs, run them.

use std::sync::Arc;

use crate::program::Program;
use crate::rtc::{Rtc, check_values};

/// Inputs of one run, `batch` samples, all buffers sized by the program's shape.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// `[batch, cameras, side, side, 3]` 8-bit RGB.
    pub images: Images<'a>,
    /// Real cameras of each sample, `1..=shape.cameras`; its images come first. `[batch]`
    pub cameras: &'a [u32],
    /// `[batch, prompt_tokens]`, each row padded with anything after its length.
    pub tokens: &'a [u32],
    /// Valid tokens of each row, `1..=shape.prompt_tokens`. `[batch]`
    pub prompt_len: &'a [u32],
    /// `[batch, action_dim]` normalised state (π0; ignored by π0.5).
    pub state: &'a [f32],
    /// `[batch, horizon, action_dim]` standard normal noise; with [`Rtc::Trained`] the rows of
    /// given actions hold these ([`crate::PreviousChunk::give`]).
    pub noise: &'a [f32],
    /// The chunks a program with real-time chunking ties the new ones to; other programs ignore
    /// them.
    pub previous: Option<Previous<'a>>,
}

/// The images of a batch, sample by sample: `batch × cameras` of `[side, side, 3]` bytes.
#[derive(Clone, Copy, Debug)]
pub enum Images<'a> {
    /// One behind the other.
    Packed(&'a [u8]),
    /// Each where it happens to lie, so that nobody need copy them together.
    Each(&'a [&'a [u8]]),
}

impl<'a> Images<'a> {
    /// Image `index`, each being of this many `bytes`.
    pub fn get(&self, index: usize, bytes: usize) -> &'a [u8] {
        match self {
            Images::Packed(all) => &all[index * bytes..][..bytes],
            Images::Each(images) => images[index],
        }
    }

    /// The pieces that make up `[batch, cameras, side, side, 3]`, in order.
    pub fn pieces(&self) -> impl Iterator<Item = &'a [u8]> {
        let (all, each) = match self {
            Images::Packed(all) => (Some(*all), &[][..]),
            Images::Each(images) => (None, *images),
        };
        all.into_iter().chain(each.iter().copied())
    }

    fn check(&self, count: usize, bytes: usize) -> Result<(), BackendError> {
        let wrong = |name, got, want| Err(BackendError::InputSize { name, got, want });
        match self {
            Images::Packed(all) if all.len() != count * bytes => {
                wrong("images", all.len(), count * bytes)
            }
            Images::Each(images) if images.len() != count => wrong("images", images.len(), count),
            Images::Each(images) => match images.iter().find(|image| image.len() != bytes) {
                Some(image) => wrong("an image", image.len(), bytes),
                None => Ok(()),
            },
            Images::Packed(_) => Ok(()),
        }
    }
}

/// The previous chunks of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Previous<'a> {
    /// `[batch, horizon, action_dim]`, model space, all finite.
    pub chunks: &'a [f32],
    /// `[batch, horizon]`, 0 (the action is free) to 1. A sample without a previous chunk has 0s.
    pub weights: &'a [f32],
    /// `[batch]`: upper limit of each sample's guidance, 0 to 1000.
    pub limits: &'a [f32],
}

/// Why a backend could not load, compile or run.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The device is not there or can't be used; the text says why and what to do.
    #[error("{0}")]
    Unavailable(String),
    /// The weights' files are not those the model was first opened from; the text names one and
    /// says what to do. Opening again is of no use.
    #[error("{0}")]
    Stale(String),
    /// A weight could not be read.
    #[error(transparent)]
    Source(#[from] crate::source::SourceError),
    /// Not enough memory; both numbers in bytes.
    #[error(
        "{what} needs {needed_bytes} bytes on {device}, {free_bytes} are free: \
         use a smaller batch or free the device"
    )]
    OutOfMemory {
        /// What was to be allocated.
        what: String,
        /// The device's name.
        device: String,
        /// Bytes asked for.
        needed_bytes: u64,
        /// Bytes free.
        free_bytes: u64,
    },
    /// An input does not have the size the program wants.
    #[error("input `{name}` has {got} elements, the program wants {want}")]
    InputSize {
        /// Which input.
        name: &'static str,
        /// Elements given.
        got: usize,
        /// Elements wanted.
        want: usize,
    },
    /// An input value is out of range (a token id, a length).
    #[error("input `{name}`: {reason}")]
    InputValue {
        /// Which input.
        name: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The device has no kernels for a program; others run. The text says what to do instead.
    #[error("{0}")]
    Unsupported(String),
    /// The device failed while running; it must be reopened.
    #[error("the device failed: {0}")]
    Device(String),
}

/// Milliseconds of one run, by stage. A stage that was not timed apart is zero.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StageTimes {
    /// Copies in, u8 → activations.
    pub copy_in_ms: f64,
    /// SigLIP and projector.
    pub vision_ms: f64,
    /// Gemma-2B prefix pass.
    pub prefill_ms: f64,
    /// Flow-matching steps.
    pub denoise_ms: f64,
    /// Actions back to the host.
    pub copy_out_ms: f64,
    /// The whole run, inputs in host memory to actions in host memory.
    pub total_ms: f64,
}

/// A device with the weights of one model on it.
pub trait Device: Send {
    /// `cpu (AVX-512 BF16, 2 threads)`, `cuda:0 NVIDIA H200`, ….
    fn name(&self) -> String;

    /// Compiles a program against the loaded weights (plans memory, captures a graph, …).
    /// `Executable`s of one device share its weights and run one at a time.
    fn compile(&mut self, program: Arc<Program>) -> Result<Box<dyn Executable>, BackendError>;

    /// Bytes the weights take on the device.
    fn weight_bytes(&self) -> u64;

    /// Whether it is still there: asked again and again while there is nothing to run, so it must
    /// take microseconds. An error is as good as one of a run.
    fn look(&mut self) -> Result<(), BackendError> {
        Ok(())
    }
}

/// A compiled program.
pub trait Executable: Send {
    /// The program it was compiled from.
    fn program(&self) -> &Arc<Program>;

    /// Runs it: fills `actions` (`[batch, horizon, action_dim]`, model space).
    fn run(&mut self, inputs: &Inputs<'_>, actions: &mut [f32])
    -> Result<StageTimes, BackendError>;
}

impl Inputs<'_> {
    /// Checks every size and every value that indexes something against the program.
    pub fn check(&self, program: &Program) -> Result<(), BackendError> {
        let (shape, config) = (&program.shape, &program.config);
        let side = config.vision.image;
        let size = |name, got: usize, want: usize| {
            if got == want { Ok(()) } else { Err(BackendError::InputSize { name, got, want }) }
        };
        self.images.check(shape.batch * shape.cameras, side * side * 3)?;
        size("cameras", self.cameras.len(), shape.batch)?;
        size("tokens", self.tokens.len(), shape.batch * shape.prompt_tokens)?;
        size("prompt_len", self.prompt_len.len(), shape.batch)?;
        size("state", self.state.len(), shape.batch * config.action_dim)?;
        size("noise", self.noise.len(), shape.batch * shape.horizon * config.action_dim)?;
        let value = |name, reason| Err(BackendError::InputValue { name, reason });
        for (b, &n) in self.cameras.iter().enumerate() {
            if n == 0 || n as usize > shape.cameras {
                let range = shape.cameras;
                return value("cameras", format!("{n} of sample {b} is not in 1..={range}"));
            }
        }
        for (b, &n) in self.prompt_len.iter().enumerate() {
            if n == 0 || n as usize > shape.prompt_tokens {
                let range = shape.prompt_tokens;
                return value("prompt_len", format!("{n} of sample {b} is not in 1..={range}"));
            }
            let row = &self.tokens[b * shape.prompt_tokens..][..n as usize];
            if let Some(t) = row.iter().find(|&&t| t as usize >= config.vocab) {
                let vocab = config.vocab;
                return value(
                    "tokens",
                    format!("id {t} of sample {b}: the table has {vocab} rows"),
                );
            }
        }
        if let Some(i) = self.state.iter().position(|v| !v.is_finite()) {
            return value("state", format!("element {i} is {}", self.state[i]));
        }
        if let Some(i) = self.noise.iter().position(|v| !v.is_finite()) {
            return value("noise", format!("element {i} is {}", self.noise[i]));
        }
        if shape.rtc == Rtc::Off {
            return Ok(());
        }
        let Some(previous) = &self.previous else {
            return value("previous", "the program has real-time chunking, there is none".into());
        };
        size("previous.chunks", previous.chunks.len(), self.noise.len())?;
        size("previous.weights", previous.weights.len(), shape.batch * shape.horizon)?;
        size("previous.limits", previous.limits.len(), shape.batch)?;
        let Previous { chunks, weights, limits } = *previous;
        check_values(chunks, weights, limits).or_else(|e| value("previous", e.to_string()))
    }
}

impl<'a> Previous<'a> {
    /// Of action `row` of a sample: what it is drawn to, its weight, and the sample's limit.
    pub fn row(&self, sample: usize, row: usize) -> (&'a [f32], f32, f32) {
        let horizon = self.weights.len() / self.limits.len();
        let (at, cols) = (sample * horizon + row, self.chunks.len() / self.weights.len());
        (&self.chunks[at * cols..][..cols], self.weights[at], self.limits[sample])
    }
}
