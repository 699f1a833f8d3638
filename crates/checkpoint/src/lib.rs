//! A checkpoint directory → model weights under canonical names, and what else it carries.
//!
//! [`open`] tells the format from the directory: openpi PyTorch (`model.safetensors`), openpi JAX
//! (`params/` written by Orbax) or LeRobot. [`Synthetic`] makes weights without any file.
#![deny(missing_docs)]
#![forbid(unsafe_code)]

mod assets;
mod error;
mod expected;
mod file;
mod identity;
mod inspect;
mod layout;
pub mod lerobot;
pub mod names;
mod open;
pub mod orbax;
pub mod safetensors;
mod strict;
mod synthetic;
mod torch_source;

use std::path::Path;

pub use assets::{NormStatsFile, asset_ids};
pub use error::{CheckpointError, Malformed, Mismatch};
pub use expected::{Expected, expected_tensors};
pub use identity::Identity;
pub use inspect::{NormStatsFound, Report, StoredType};
pub use layout::{Format, Layout};
pub use open::{Checkpoint, open, open_fixture};
pub use synthetic::{Spread, Synthetic};
pub use torch_source::TorchSource;

/// Largest side file read into memory (JSON, manifests).
pub const MAX_SMALL_FILE: u64 = 128 << 20;

/// Reads a side file whole, up to [`MAX_SMALL_FILE`].
fn small_file(path: &Path) -> Result<Vec<u8>, CheckpointError> {
    file::read_whole(path, MAX_SMALL_FILE)
}

/// Whether there is something of that name. What is there and can't be read (a link to nowhere, a
/// folder that may not be entered, a disk that fails) is an error, here or when it is opened: to
/// take it for absent would mean other weights or statistics than the checkpoint's.
fn present(path: &Path) -> Result<bool, CheckpointError> {
    use std::io::ErrorKind::{NotADirectory, NotFound};
    match std::fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(e) if matches!(e.kind(), NotFound | NotADirectory) => Ok(false),
        Err(e) => Err(CheckpointError::io(path)(e)),
    }
}

/// Reads a side file as JSON.
fn json_file(path: &Path) -> Result<serde_json::Value, CheckpointError> {
    let bytes = small_file(path)?;
    serde_json::from_slice(&bytes).map_err(|e| Malformed::new(format!("not JSON: {e}")).at(path))
}
