//! Reads a fixture's tensors.

use pirouette_policy::{NdArray, Scalar, Value};
use safetensors::{Dtype, SafeTensors};
use std::path::PathBuf;

pub fn path(relative: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../testdata").join(relative)
}

pub fn read(relative: &str) -> Vec<u8> {
    let path = path(relative);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

pub fn json(relative: &str) -> serde_json::Value {
    serde_json::from_slice(&read(relative)).unwrap()
}

/// Names in a folder, sorted.
pub fn list(relative: &str) -> Vec<String> {
    let entries = std::fs::read_dir(path(relative)).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A safetensors file.
pub struct Tensors {
    bytes: Vec<u8>,
}

impl Tensors {
    pub fn open(relative: &str) -> Tensors {
        Tensors { bytes: read(relative) }
    }

    pub fn names(&self) -> Vec<String> {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        tensors.names().into_iter().map(Into::into).collect()
    }

    pub fn find(&self, name: &str) -> Option<NdArray> {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        let tensor = tensors.tensor(name).ok()?;
        let dtype = match tensor.dtype() {
            Dtype::BOOL => Scalar::Bool,
            Dtype::U8 => Scalar::U8,
            Dtype::I64 => Scalar::I64,
            Dtype::F32 => Scalar::F32,
            Dtype::F64 => Scalar::F64,
            other => panic!("{name}: {other:?}"),
        };
        let data = tensor.data().to_vec().into();
        Some(NdArray { dtype, shape: tensor.shape().to_vec(), data })
    }

    pub fn array(&self, name: &str) -> NdArray {
        self.find(name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    pub fn numbers(&self, name: &str) -> Vec<f64> {
        self.array(name).to_f64().unwrap()
    }

    /// The raw observation: `in.<key>`, nested keys joined with `|`.
    pub fn observation(&self, prompt: Option<&str>) -> Value {
        let mut root: Vec<(String, Value)> = Vec::new();
        for name in self.names() {
            let Some(key) = name.strip_prefix("in.") else { continue };
            if ["noise", "model_actions"].contains(&key) {
                continue;
            }
            let value = Value::Array(self.array(&name));
            match key.split_once('|') {
                None => root.push((key.into(), value)),
                Some((outer, inner)) => {
                    if !root.iter().any(|(known, _)| known == outer) {
                        root.push((outer.into(), Value::Map(vec![])));
                    }
                    let (_, nested) = root.iter_mut().find(|(known, _)| known == outer).unwrap();
                    let Value::Map(nested) = nested else { panic!("{outer}") };
                    nested.push((inner.into(), value));
                }
            }
        }
        root.extend(prompt.map(|text| ("prompt".into(), Value::Str(text.into()))));
        Value::Map(root)
    }
}

/// Fails at the first number that is not the same to the last bit (0 and −0 are the same).
pub fn assert_exact(what: &str, actual: &[f64], expected: &[f64]) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        assert!(a == e || (a.is_nan() && e.is_nan()), "{what}[{i}]: {a:e} is not {e:e}");
    }
}

/// Largest difference relative to the largest magnitude.
pub fn relative_difference(actual: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(actual.len(), expected.len());
    let largest = expected.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    let differences = actual.iter().zip(expected).map(|(a, e)| (a - e).abs());
    differences.fold(0.0f64, f64::max) / largest
}
