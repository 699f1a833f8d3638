//! Golden files → typed arrays: safetensors fixtures of openpi's own inputs and outputs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};

/// Why a fixture can't be used; tests print it.
#[derive(Debug, thiserror::Error)]
pub enum FixtureError {
    /// The file is not there or not readable.
    #[error("can't read {path}: {reason}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// No such tensor, or another type.
    #[error("{path}: no {wanted} tensor `{name}`")]
    Tensor {
        /// The file.
        path: PathBuf,
        /// Tensor name.
        name: String,
        /// Wanted type.
        wanted: &'static str,
    },
}

/// A safetensors file in memory.
pub struct Fixture {
    path: PathBuf,
    tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>,
}

/// `testdata/` of the repository, or the folder `PIROUETTE_TESTDATA` names (a test binary that was
/// copied to another machine).
pub fn testdata() -> PathBuf {
    match std::env::var_os("PIROUETTE_TESTDATA") {
        Some(dir) => dir.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata"),
    }
}

impl Fixture {
    /// Reads a whole fixture file.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, FixtureError> {
        let path = path.as_ref().to_path_buf();
        let unreadable = |reason: String| FixtureError::Unreadable { path: path.clone(), reason };
        let bytes = std::fs::read(&path).map_err(|e| unreadable(e.to_string()))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| unreadable(e.to_string()))?;
        let tensors = file
            .tensors()
            .into_iter()
            .map(|(n, t)| (n, (t.dtype(), t.shape().to_vec(), t.data().to_vec())))
            .collect();
        Ok(Fixture { path, tensors })
    }

    /// Names of all tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether a tensor is there.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    fn get(
        &self,
        name: &str,
        wanted: &'static str,
    ) -> Result<&(Dtype, Vec<usize>, Vec<u8>), FixtureError> {
        self.tensors.get(name).ok_or_else(|| self.missing(name, wanted))
    }

    fn missing(&self, name: &str, wanted: &'static str) -> FixtureError {
        FixtureError::Tensor { path: self.path.clone(), name: name.into(), wanted }
    }

    /// Shape of a tensor.
    pub fn shape(&self, name: &str) -> Result<&[usize], FixtureError> {
        Ok(&self.get(name, "any")?.1)
    }

    /// Floating-point elements, widened or narrowed to f32.
    pub fn f32(&self, name: &str) -> Result<Vec<f32>, FixtureError> {
        Ok(self.f64(name)?.into_iter().map(|v| v as f32).collect())
    }

    /// Floating-point elements as f64.
    pub fn f64(&self, name: &str) -> Result<Vec<f64>, FixtureError> {
        let (dtype, _, data) = self.get(name, "float")?;
        match dtype {
            Dtype::F32 => Ok(data
                .chunks_exact(4)
                .map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]]) as f64)
                .collect()),
            Dtype::F64 => Ok(data
                .chunks_exact(8)
                .map(|c| f64::from_le_bytes(std::array::from_fn(|i| c[i])))
                .collect()),
            _ => Err(self.missing(name, "float")),
        }
    }

    /// Integer or boolean elements.
    pub fn int(&self, name: &str) -> Result<Vec<i64>, FixtureError> {
        let (dtype, _, data) = self.get(name, "integer")?;
        match dtype {
            Dtype::U8 | Dtype::BOOL => Ok(data.iter().map(|&b| b as i64).collect()),
            Dtype::I32 => Ok(data
                .chunks_exact(4)
                .map(|c| i32::from_le_bytes([c[0], c[1], c[2], c[3]]) as i64)
                .collect()),
            Dtype::I64 => Ok(data
                .chunks_exact(8)
                .map(|c| i64::from_le_bytes(std::array::from_fn(|i| c[i])))
                .collect()),
            _ => Err(self.missing(name, "integer")),
        }
    }

    /// The raw bytes of a u8 tensor.
    pub fn u8(&self, name: &str) -> Result<&[u8], FixtureError> {
        match self.get(name, "u8")? {
            (Dtype::U8, _, data) => Ok(data),
            _ => Err(self.missing(name, "u8")),
        }
    }
}

/// ‖a − b‖ / ‖b‖ in f64; NaN anywhere gives NaN.
pub fn relative_l2(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len(), "lengths differ");
    let (mut difference, mut norm) = (0.0f64, 0.0f64);
    for (x, y) in a.iter().zip(b) {
        difference += (*x as f64 - *y as f64).powi(2);
        norm += (*y as f64).powi(2);
    }
    (difference / norm).sqrt()
}

/// Largest |a − b|; NaN if any difference is NaN.
pub fn max_abs(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len(), "lengths differ");
    let mut worst = 0.0f64;
    for (x, y) in a.iter().zip(b) {
        let d = (*x as f64 - *y as f64).abs();
        if d.is_nan() {
            return f64::NAN;
        }
        worst = worst.max(d);
    }
    worst
}
