//! A file on disk → its bytes, mapped read-only. The only unsafe code of this crate.

use std::fs::File;
use std::path::Path;

use crate::error::CheckpointError;

/// A read-only file in memory, paged in as it is read.
#[derive(Debug)]
pub struct Mapped(memmap2::Mmap);

impl Mapped {
    /// Maps the whole file.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let file = File::open(path).map_err(CheckpointError::io(path))?;
        let meta = file.metadata().map_err(CheckpointError::io(path))?;
        if !meta.is_file() {
            let error = std::io::Error::other("not a regular file");
            return Err(CheckpointError::Io { path: path.into(), error });
        }
        // SAFETY: the map is private to this value and never written through. Checkpoints are
        // written once and then only read; a file that is shortened while it is being served
        // raises SIGBUS, as it does for every program that maps weights.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(CheckpointError::io(path))?;
        Ok(Mapped(map))
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}
