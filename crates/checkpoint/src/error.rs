//! What can be wrong with a checkpoint, each with the thing's name and the remedy.

use std::path::PathBuf;

use pirouette_model::config::ConfigError;

/// A file's bytes contradict its format, or are of a kind that is not read; says which field and
/// what was found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}")]
pub struct Malformed {
    what: String,
    /// Nothing is wrong with the bytes: another copy of them would not help.
    unread: bool,
}

impl Malformed {
    pub(crate) fn new(what: impl Into<String>) -> Self {
        Malformed { what: what.into(), unread: false }
    }

    /// Well-formed, but of a kind that is not read. `what` ends with the remedy.
    pub(crate) fn unread(what: impl Into<String>) -> Self {
        Malformed { what: what.into(), unread: true }
    }

    /// The same fault inside something larger: `context: what`.
    pub(crate) fn within(self, context: &str) -> Self {
        Malformed { what: format!("{context}: {}", self.what), ..self }
    }

    pub(crate) fn at(self, path: impl Into<PathBuf>) -> CheckpointError {
        let (path, what) = (path.into(), self.what);
        match self.unread {
            true => CheckpointError::Unsupported { path, what },
            false => CheckpointError::Damaged { path, what },
        }
    }
}

/// Why a checkpoint can't be used.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The operating system refused.
    #[error("can't read {path}: {error}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// Its reason (not named `source`: the text has it already).
        error: std::io::Error,
    },
    /// A file is no longer what it was when it was opened.
    #[error(
        "{path} changed while it was read: write a new file and rename it over the old one, then \
         load it again"
    )]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// The directory holds none of the known layouts.
    #[error(
        "{path} is not a checkpoint: expected `model.safetensors` (openpi PyTorch, LeRobot) or \
         `params/` (openpi JAX) in it{hint}"
    )]
    NotACheckpoint {
        /// What was opened.
        path: PathBuf,
        /// Empty, or `; ` and what to open instead.
        hint: String,
    },
    /// A file is damaged.
    #[error("{path} is damaged: {what}; copy or download the checkpoint again")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Which part of it, and how.
        what: String,
    },
    /// Well-formed, but a kind this program does not read.
    #[error("{path}: {what}")]
    Unsupported {
        /// The file or directory.
        path: PathBuf,
        /// What it is, with the remedy.
        what: String,
    },
    /// Tensors are missing, left over or of the wrong shape.
    #[error("{origin} does not hold exactly one π0 or π0.5 model:{}", list(.mismatches))]
    Tensors {
        /// Where the tensors come from.
        origin: String,
        /// All of them.
        mismatches: Vec<Mismatch>,
    },
    /// The sizes of the model can't be read off the tensors.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No `norm_stats.json` where one may lie.
    #[error(
        "norm stats for asset `{asset_id}` not found; looked at {}; copy the checkpoint's `assets` \
         folder next to its weights or name the file with --norm-stats{}",
        paths(.looked), others(.present)
    )]
    NoNormStats {
        /// The asset asked for.
        asset_id: String,
        /// Every path tried, in order.
        looked: Vec<PathBuf>,
        /// Asset ids that are there.
        present: Vec<String>,
    },
    /// A folder of statistics for a configuration that does not say which.
    #[error(
        "{folder} is a folder and the configuration names no asset: give one norm_stats.json \
         itself{}",
        others(.present)
    )]
    NoAssetId {
        /// The folder.
        folder: PathBuf,
        /// Asset ids that are there.
        present: Vec<String>,
    },
    /// An asset id that would leave the assets folder.
    #[error("asset id `{0}` is not a relative path of plain names; correct it in the config")]
    BadAssetId(String),
}

impl CheckpointError {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |error| CheckpointError::Io { path, error }
    }
}

/// One tensor that is not as the model needs it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// Needed, not there.
    #[error("missing `{0}`")]
    Missing(String),
    /// A tower ends before its last layers.
    #[error("missing the last {} of the {of} layers `{prefix}*`", .of - .found)]
    Layers {
        /// Canonical prefix of the layers.
        prefix: String,
        /// Layers that are there.
        found: usize,
        /// Layers of a tower of this width.
        of: usize,
    },
    /// There, not part of the model and not known junk.
    #[error("unexpected `{0}`")]
    Extra(String),
    /// There under both of two names for the same thing.
    #[error("`{0}` is there twice, also as `{1}`")]
    Twice(String, String),
    /// Wrong shape.
    #[error("`{name}` has shape {found:?}, the rest of the model needs {expected:?}")]
    Shape {
        /// Tensor or array.
        name: String,
        /// Shape in the file.
        found: Vec<usize>,
        /// Shape that fits the other tensors.
        expected: Vec<usize>,
    },
    /// An array whose axes do not have the meaning they must have.
    #[error("array `{name}` has shape {found:?}, expected axes {axes}")]
    Axes {
        /// Array path.
        name: String,
        /// Shape in the file.
        found: Vec<usize>,
        /// What the axes should be.
        axes: String,
    },
    /// Stored in a type that weights are never stored in.
    #[error("`{name}` has type {found}, expected F32, BF16 or F16")]
    DType {
        /// Tensor.
        name: String,
        /// Type in the file.
        found: String,
    },
}

/// How many mismatches a message shows.
const SHOWN: usize = 10;

fn list(mismatches: &[Mismatch]) -> String {
    let mut text = String::new();
    for m in mismatches.iter().take(SHOWN) {
        text.push_str(&format!("\n  {m}"));
    }
    if mismatches.len() > SHOWN {
        text.push_str(&format!("\n  … {} in all", mismatches.len()));
    }
    text
}

fn paths(looked: &[PathBuf]) -> String {
    looked.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ")
}

fn others(present: &[String]) -> String {
    match present {
        [] => String::new(),
        ids => format!(" (asset ids there: {})", ids.join(", ")),
    }
}
