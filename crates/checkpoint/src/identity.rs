//! The weight files of an open checkpoint → what tells whether another opening found the same.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::file::Stamp;

/// Which files the weights lie in: of each its length and when it was written. Of arrays in
/// folders of their own (zarr without OCDBT) it is `.zarray` that counts: chunks are too many, and
/// a folder's time changes with any file in it. A chunk that is written anew is not noticed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity(BTreeMap<String, Stamp>);

impl Identity {
    pub(crate) fn add(&mut self, path: &Path, stamp: Stamp) {
        self.0.insert(path.display().to_string(), stamp);
    }

    /// A file that is not the same in `other`, or is in one of them alone.
    pub fn difference<'a>(&'a self, other: &'a Identity) -> Option<&'a str> {
        let paths = self.0.keys().chain(other.0.keys());
        paths.map(String::as_str).find(|path| self.0.get(*path) != other.0.get(*path))
    }
}
