//! A path a user typed → which format it is and where its parts lie.

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use crate::error::CheckpointError;
use crate::{json_file, present};

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The family of files a checkpoint is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum Format {
    /// `model.safetensors` with openpi's names.
    OpenpiTorch,
    /// `params/` written by Orbax.
    OpenpiJax,
    /// `model.safetensors` and a `config.json` with a policy type.
    LeRobot,
}

impl Format {
    /// As shown to users.
    pub fn name(self) -> &'static str {
        match self {
            Format::OpenpiTorch => "openpi PyTorch",
            Format::OpenpiJax => "openpi JAX (Orbax)",
            Format::LeRobot => "LeRobot",
        }
    }
}

/// Where a checkpoint's parts lie.
#[derive(Clone, Debug)]
pub struct Layout {
    /// What kind it is.
    pub format: Format,
    /// The checkpoint directory.
    pub root: PathBuf,
    /// Weights: a `.safetensors` file, its index, or an Orbax directory.
    pub weights: PathBuf,
    /// `config.json`, parsed, if there is one (openpi's is informative, LeRobot's decides).
    pub config: Option<Value>,
}

impl Layout {
    /// Looks at a checkpoint directory, its `params/`, or a `.safetensors` file. A
    /// `model.safetensors` decides over `params/`, as in openpi.
    pub fn find(path: &Path) -> Result<Self, CheckpointError> {
        let meta = std::fs::metadata(path).map_err(CheckpointError::io(path))?;
        if meta.is_file() {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if !name.ends_with(".safetensors") && !name.ends_with(".safetensors.index.json") {
                return Err(not_a_checkpoint(path, "; this is some other file"));
            }
            return Self::torch(parent(path), path.into());
        }
        for name in [WEIGHTS, INDEX] {
            if present(&path.join(name))? {
                return Self::torch(path.into(), path.join(name));
            }
        }
        if path.join("params").is_dir() {
            let config = None;
            let weights = path.join("params");
            if weights.join("params").is_dir() && !is_params(&weights)? {
                let hint =
                    format!("; its weights lie one level deeper, open {}", weights.display());
                return Err(not_a_checkpoint(path, &hint));
            }
            return Ok(Layout { format: Format::OpenpiJax, root: path.into(), weights, config });
        }
        if is_params(path)? {
            let (root, weights) = (parent(path), path.into());
            return Ok(Layout { format: Format::OpenpiJax, root, weights, config: None });
        }
        let pretrained = path.join("pretrained_model");
        for name in [WEIGHTS, INDEX] {
            if present(&pretrained.join(name))? {
                return Self::torch(pretrained.clone(), pretrained.join(name));
            }
        }
        Err(not_a_checkpoint(path, &hint(path)))
    }

    fn torch(root: PathBuf, weights: PathBuf) -> Result<Self, CheckpointError> {
        let config_path = root.join("config.json");
        let config = match present(&config_path)? {
            true => Some(json_file(&config_path)?),
            false => None,
        };
        let policy = config.as_ref().and_then(|c| c["type"].as_str());
        let format = if policy.is_some() { Format::LeRobot } else { Format::OpenpiTorch };
        Ok(Layout { format, root, weights, config })
    }
}

/// The directory a file or folder lies in. A bare relative name lies in the current one, and
/// above `.` or `..` is one more `..`.
pub(crate) fn parent(path: &Path) -> PathBuf {
    match (path.file_name(), path.parent()) {
        (Some(_), Some(p)) if p.as_os_str().is_empty() => ".".into(),
        (Some(_), Some(p)) => p.into(),
        _ => path.join(".."),
    }
}

fn is_params(path: &Path) -> Result<bool, CheckpointError> {
    if path.join("manifest.ocdbt").is_file() {
        return Ok(true);
    }
    for entry in std::fs::read_dir(path).map_err(CheckpointError::io(path))? {
        let entry = entry.map_err(CheckpointError::io(path))?;
        if entry.path().join(".zarray").is_file() {
            return Ok(true);
        }
    }
    Ok(false)
}

fn not_a_checkpoint(path: &Path, hint: &str) -> CheckpointError {
    CheckpointError::NotACheckpoint { path: path.into(), hint: hint.into() }
}

/// A training run holds one checkpoint per step: name the last one.
fn hint(path: &Path) -> String {
    let steps = std::fs::read_dir(path).into_iter().flatten().flatten().filter_map(|entry| {
        let step: u64 = entry.file_name().to_str()?.parse().ok()?;
        let path = entry.path();
        let folders = [path.clone(), path.join("pretrained_model")];
        let mut files = folders.iter().flat_map(|f| [WEIGHTS, INDEX].map(|name| f.join(name)));
        (files.any(|file| file.is_file()) || path.join("params").is_dir()).then_some((step, path))
    });
    match steps.max() {
        Some((_, path)) => {
            format!("; it is a training run, open one of its steps: {}", path.display())
        }
        None => String::new(),
    }
}
