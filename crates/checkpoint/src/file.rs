//! A file on disk → parts of it in memory, as long as it stays what it was when it was opened.
//!
//! Nothing is mapped: a mapped file that is shortened while it is read ends the whole process.

use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};

use crate::error::{CheckpointError, Malformed};

/// What tells a file from another one, and from itself once it has been written to. Not its inode:
/// where a file system is on a network, the same file may come back with another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stamp {
    /// Bytes.
    pub length: u64,
    /// Time of the last change, nanoseconds since 1970; 0 where that is unknown.
    pub modified_ns: u64,
}

impl Stamp {
    pub fn of(meta: &Metadata) -> Self {
        let modified = meta.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
        let modified_ns = modified.map_or(0, |t| t.as_nanos() as u64);
        Stamp { length: meta.len(), modified_ns }
    }
}

/// A file of weights.
#[derive(Debug)]
pub(crate) struct WeightFile {
    path: PathBuf,
    stamp: Stamp,
    /// None: opened anew for each part.
    held: Option<Arc<File>>,
}

impl WeightFile {
    /// Opens a file and keeps it open: a file renamed over it changes nothing here.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let (file, stamp) = opened(path)?;
        Ok(WeightFile { path: path.into(), stamp, held: Some(file.into()) })
    }

    /// The same for one of many files, more than a process may have open.
    pub fn noted(path: &Path) -> Result<Self, CheckpointError> {
        Ok(WeightFile { held: None, ..Self::open(path)? })
    }

    /// What it was when it was opened.
    pub fn stamp(&self) -> Stamp {
        self.stamp
    }

    /// Its length in bytes when it was opened.
    pub fn length(&self) -> u64 {
        self.stamp.length
    }

    /// Some of its bytes. `range` lies inside the length.
    pub fn read(&self, range: Range<u64>) -> Result<Vec<u8>, CheckpointError> {
        let length = usize::try_from(range.end - range.start);
        let mut bytes = vec![0; length.map_err(io::Error::other).map_err(self.io())?];
        self.read_at(range.start, &mut bytes)?;
        Ok(bytes)
    }

    /// Its bytes from `at` on; they lie inside the length.
    pub fn read_at(&self, at: u64, out: &mut [u8]) -> Result<(), CheckpointError> {
        let file = self.handle()?;
        self.unchanged(&file, read_exact_at(&file, out, at))
    }

    /// Some of its bytes, one after the other. `range` lies inside the length.
    pub fn section(&self, range: Range<u64>) -> Result<Section, CheckpointError> {
        let (path, held) = (self.path.clone(), Some(self.handle()?));
        Ok(Section { of: WeightFile { path, held, ..*self }, range })
    }

    fn handle(&self) -> Result<Arc<File>, CheckpointError> {
        if let Some(file) = &self.held {
            return Ok(file.clone());
        }
        let (file, stamp) = opened(&self.path)?;
        if stamp != self.stamp { Err(self.changed()) } else { Ok(file.into()) }
    }

    /// What was read counts if the file is still the same.
    fn unchanged(&self, file: &File, read: io::Result<()>) -> Result<(), CheckpointError> {
        let after = Stamp::of(&file.metadata().map_err(self.io())?);
        let cut = read.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::UnexpectedEof);
        if cut || after != self.stamp {
            return Err(self.changed());
        }
        read.map_err(self.io())
    }

    fn io(&self) -> impl FnOnce(io::Error) -> CheckpointError {
        CheckpointError::io(&self.path)
    }

    fn changed(&self) -> CheckpointError {
        CheckpointError::Changed { path: self.path.clone() }
    }
}

/// Opens nothing but a regular file: a pipe would be waited for.
fn opened(path: &Path) -> Result<(File, Stamp), CheckpointError> {
    let regular = |meta: Metadata| match meta.is_file() {
        true => Ok(meta),
        false => Err(io::Error::other("not a regular file")),
    };
    let open = || {
        std::fs::metadata(path).and_then(regular)?;
        let file = File::open(path)?;
        let stamp = Stamp::of(&file.metadata().and_then(regular)?);
        Ok((file, stamp))
    };
    open().map_err(CheckpointError::io(path))
}

/// A file whole, if it has at most `most` bytes.
pub(crate) fn read_whole(path: &Path, most: u64) -> Result<Vec<u8>, CheckpointError> {
    let (file, stamp) = opened(path)?;
    let mut bytes = Vec::new();
    // Some of the kernel's files say that they are empty.
    let read = file.take(most.saturating_add(1)).read_to_end(&mut bytes);
    let length = stamp.length.max(read.map_err(CheckpointError::io(path))? as u64);
    if length > most {
        let what = format!("more than {most} bytes, the limit for such a file");
        return Err(Malformed::new(what).at(path));
    }
    Ok(bytes)
}

#[cfg(unix)]
fn read_exact_at(file: &File, out: &mut [u8], at: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, at)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut out: &mut [u8], mut at: u64) -> io::Result<()> {
    while !out.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, out, at) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                out = &mut out[n..];
                at += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// A part of a file that is read front to back. Its errors hold a [`CheckpointError`].
#[derive(Debug)]
pub(crate) struct Section {
    of: WeightFile,
    range: Range<u64>,
}

impl Section {
    /// Bytes left.
    pub fn length(&self) -> u64 {
        self.range.end - self.range.start
    }
}

impl Read for Section {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let n = usize::try_from(self.length()).map_or(out.len(), |left| left.min(out.len()));
        self.of.read_at(self.range.start, &mut out[..n]).map_err(io::Error::other)?;
        self.range.start += n as u64;
        Ok(n)
    }
}
