//! Names in a file → canonical names (those of an openpi `model.safetensors`).

pub mod lerobot;
pub mod openpi_jax;
pub mod openpi_torch;

use std::collections::BTreeMap;

use serde::Serialize;

use crate::error::Mismatch;

/// A stored tensor that the model does not use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Skipped {
    /// Name in the file.
    pub name: String,
    /// Why it is not used.
    pub reason: &'static str,
}

/// What the names of a file mean.
#[derive(Debug, Default)]
pub struct Mapping {
    /// Canonical name → stored name.
    pub used: BTreeMap<String, String>,
    /// Known and not needed.
    pub skipped: Vec<Skipped>,
}

impl Mapping {
    /// Records that `stored` is the tensor `canonical`.
    fn insert(&mut self, canonical: String, stored: &str) -> Result<(), Mismatch> {
        match self.used.insert(canonical, stored.to_string()) {
            Some(other) => Err(Mismatch::Twice(stored.to_string(), other)),
            None => Ok(()),
        }
    }

    fn skip(&mut self, name: &str, reason: &'static str) {
        self.skipped.push(Skipped { name: name.to_string(), reason });
    }
}
