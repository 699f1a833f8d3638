//! openpi's JAX checkpoints (`params/` written by Orbax) → canonical tensors.

mod arrays;
mod lora;
pub mod ocdbt;
pub mod permute;
mod source;
pub mod zarr;

pub use arrays::{ArrayEntry, Arrays};
pub use source::OrbaxSource;
