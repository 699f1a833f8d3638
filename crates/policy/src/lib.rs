//! From a robot's observation to model inputs, and from model outputs to robot actions.
//!
//! [`Policy::prepare`] reads an observation, [`Policy::finish`] turns the model's chunk into the
//! robot's actions. A policy is made of a [`PolicyConfig`] (by name or from TOML), the
//! checkpoint's [`NormStats`] and a [`Tokenizer`].
#![deny(missing_docs)]
#![forbid(unsafe_code)]

pub mod array;
pub mod config;
pub mod contract;
mod error;
mod file;
pub mod image;
mod light;
pub mod norm;
mod policy;
pub mod prompt;
pub mod reserved;
pub mod robots;
mod scene;
pub mod tokenizer;
pub mod value;

pub use config::{ConfigError, PolicyConfig, Processing};
pub use contract::{Contract, contract, sample_observation};
pub use error::PolicyError;
pub use norm::{NormError, NormStats};
pub use policy::{Policy, Prepared, SetupError};
pub use tokenizer::{Tokenizer, TokenizerError};
pub use value::{NdArray, Scalar, Value};

/// What the model gets for one observation (the input side's result).
#[derive(Clone, Debug, PartialEq)]
pub struct ModelInput {
    /// Real cameras only, in the order base, left wrist, right wrist: 8-bit RGB, row-major
    /// `[side, side, 3]`, already resized with padding.
    pub images: Vec<bytes::Bytes>,
    /// Valid prompt tokens (BOS included, padding left out), at most `max_token_len` of them.
    pub tokens: Vec<u32>,
    /// Normalised state, zero-padded to the model's action dimensions.
    pub state: Vec<f32>,
}
