//! Safetensors and the meaning of their names → a [`TensorSource`] that reads what is asked
//! for.

use pirouette_model::{DType, OpenTensor, SourceError, Tensor, TensorSource};

use crate::error::{CheckpointError, Mismatch};
use crate::names::Mapping;
use crate::safetensors::{Stored, TensorFiles};

/// Tensors of openpi PyTorch or LeRobot files under their canonical names.
pub struct TorchSource {
    files: TensorFiles,
    mapping: Mapping,
}

impl TorchSource {
    /// Joins files and names.
    pub fn new(files: TensorFiles, mapping: Mapping) -> Self {
        TorchSource { files, mapping }
    }

    /// Every used tensor must have a type weights may have. A name that means nothing has no type
    /// to be wrong: names come first.
    pub(crate) fn check_types(&self) -> Result<(), CheckpointError> {
        let used = self.mapping.used.values();
        let mismatches = used
            .filter_map(|name| match &self.files.entry(name)?.stored {
                Stored::Float(_) => None,
                Stored::Other(found) => {
                    Some(Mismatch::DType { name: name.clone(), found: found.clone() })
                }
            })
            .collect::<Vec<_>>();
        if !mismatches.is_empty() {
            return Err(CheckpointError::Tensors { origin: self.origin(), mismatches });
        }
        Ok(())
    }

    /// The files.
    pub fn files(&self) -> &TensorFiles {
        &self.files
    }

    /// The meaning of their names.
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// A tensor's name in the files, its shape and type.
    fn find(&self, name: &str) -> Result<(&str, Vec<usize>, DType), SourceError> {
        let missing = || SourceError::Missing { name: name.into(), origin: self.origin() };
        let stored = self.mapping.used.get(name).ok_or_else(missing)?;
        let entry = self.files.entry(stored).ok_or_else(missing)?;
        let Stored::Float(dtype) = entry.stored else {
            return Err(unreadable(name, format!("it has type {}", entry.stored.name())));
        };
        Ok((stored, entry.shape.clone(), dtype))
    }
}

impl TensorSource for TorchSource {
    fn origin(&self) -> String {
        self.files.origin()
    }

    fn names(&self) -> Vec<String> {
        self.mapping.used.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        let stored = self.mapping.used.get(name)?;
        self.files.entry(stored).map(|e| e.shape.clone())
    }

    fn load(&self, name: &str) -> Result<Tensor<'_>, SourceError> {
        let (stored, shape, dtype) = self.find(name)?;
        let bytes = self.files.bytes(stored).map_err(|e| unreadable(name, e))?;
        Ok(Tensor { shape, dtype, data: bytes.unwrap_or_default().into() })
    }

    fn open(&self, name: &str) -> Result<OpenTensor<'_>, SourceError> {
        let (stored, shape, dtype) = self.find(name)?;
        let name = name.to_string();
        let read = move |at: usize, out: &mut [u8]| {
            self.files.read_at(stored, at, out).map_err(|e| unreadable(&name, e))
        };
        Ok(OpenTensor::stored(shape, dtype, Box::new(read)))
    }
}

fn unreadable(name: &str, reason: impl ToString) -> SourceError {
    SourceError::Unreadable { name: name.into(), reason: reason.to_string() }
}
