//! A checkpoint directory → its weights as a [`TensorSource`], its sizes, and what lies beside.

use std::path::{Path, PathBuf};

use pirouette_model::{Config, TensorSource};

use crate::assets::{self, NormStatsFile};
use crate::error::{CheckpointError, Mismatch};
use crate::identity::Identity;
use crate::inspect::Inventory;
use crate::layout::{Format, Layout};
use crate::lerobot::LeRobot;
use crate::names::{lerobot, openpi_torch};
use crate::orbax::{Arrays, OrbaxSource};
use crate::safetensors::TensorFiles;
use crate::strict::model_of;
use crate::torch_source::TorchSource;

/// Weights without the file that says what they are.
const NO_POLICY_TYPE: &str = "the tensors have LeRobot's names, but there is no such file, or no \
                              `type` in it: copy the whole folder of the policy, with its \
                              config.json and processor files";

/// An open checkpoint whose tensors are known to be exactly those of `config`.
pub struct Checkpoint {
    /// What kind of files it is made of.
    pub format: Format,
    /// The checkpoint directory.
    pub root: PathBuf,
    /// Which files the weights lie in.
    pub identity: Identity,
    /// The weights, under canonical names.
    pub source: Box<dyn TensorSource>,
    /// The model's sizes.
    pub config: Config,
    /// Policy settings and statistics of a LeRobot checkpoint.
    pub lerobot: Option<LeRobot>,
    pub(crate) inventory: Inventory,
}

impl Checkpoint {
    /// The statistics file of an asset: `assets/<id>/norm_stats.json` in the checkpoint or beside
    /// it.
    pub fn norm_stats(&self, asset_id: &str) -> Result<NormStatsFile, CheckpointError> {
        assets::norm_stats(&self.root, asset_id)
    }

    /// Asset ids that have statistics, with their files; an error if their folder can't be listed.
    pub fn asset_ids(&self) -> Result<Vec<(String, PathBuf)>, CheckpointError> {
        assets::asset_ids(&self.root)
    }
}

/// Opens a checkpoint: its directory, its `params/`, or its `.safetensors` file.
///
/// Reads headers and indices only, weights when they are asked for. Fails unless the tensors are
/// exactly those of one π0 or π0.5, known junk aside.
pub fn open(path: &Path) -> Result<Checkpoint, CheckpointError> {
    open_fixture(path, &[])
}

/// Like [`open`], but tensors whose stored names start with one of `foreign` are not looked at:
/// for test files that keep inputs and expected outputs next to the weights.
pub fn open_fixture(path: &Path, foreign: &[&str]) -> Result<Checkpoint, CheckpointError> {
    let layout = Layout::find(path)?;
    match layout.format {
        Format::OpenpiJax => open_jax(layout),
        Format::OpenpiTorch | Format::LeRobot => open_torch(layout, foreign),
    }
}

fn open_jax(layout: Layout) -> Result<Checkpoint, CheckpointError> {
    let source = OrbaxSource::new(Arrays::open(&layout.weights)?)?;
    let config =
        model_of(&source, source.vision_heads(), source.extra().to_vec(), &OrbaxSource::array_of)?;
    Ok(Checkpoint {
        format: layout.format,
        root: layout.root,
        identity: source.arrays().identity()?,
        inventory: Inventory::of_arrays(&source),
        source: Box::new(source),
        config,
        lerobot: None,
    })
}

fn open_torch(layout: Layout, foreign: &[&str]) -> Result<Checkpoint, CheckpointError> {
    let lerobot = match (&layout.config, layout.format) {
        (Some(config), Format::LeRobot) => Some(LeRobot::read(&layout.root, config)?),
        _ => None,
    };
    let files = TensorFiles::open(&layout.weights)?;
    if lerobot.is_none() && files.entry("model.action_in_proj.weight").is_some() {
        let (path, what) = (layout.root.join("config.json"), NO_POLICY_TYPE.to_string());
        return Err(CheckpointError::Unsupported { path, what });
    }
    let stored = files
        .entries()
        .map(|e| e.name.as_str())
        .filter(|name| !foreign.iter().any(|prefix| name.starts_with(prefix)));
    let mapping = match &lerobot {
        Some(policy) => lerobot::mapping(stored, policy.family),
        None => openpi_torch::mapping(stored),
    }
    .map_err(|m: Mismatch| CheckpointError::Tensors {
        origin: files.origin(),
        mismatches: vec![m],
    })?;
    let heads = vision_heads(&files, layout.config.as_ref());
    let source = TorchSource::new(files, mapping);
    let stored_name =
        |name: &str| source.mapping().used.get(name).cloned().unwrap_or_else(|| name.to_string());
    let mut config = model_of(&source, heads, vec![], &stored_name)?;
    source.check_types()?;
    config.rtc_max_delay = lerobot.as_ref().map_or(0, |policy| policy.rtc_training_max_delay);
    if let Some(policy) = &lerobot
        && policy.family != config.family
    {
        return Err(CheckpointError::Unsupported {
            path: layout.root.join("config.json"),
            what: format!(
                "its `type` is {}, but the tensors are those of {}; use the config.json that \
                 belongs to the weights",
                policy.family.name(),
                config.family.name()
            ),
        });
    }
    Ok(Checkpoint {
        format: layout.format,
        root: layout.root,
        identity: source.files().identity(),
        inventory: Inventory::of_files(&source),
        source: Box::new(source),
        config,
        lerobot,
    })
}

/// SigLIP heads where a checkpoint records them: test towers in the header's metadata or in
/// `config.json`.
fn vision_heads(files: &TensorFiles, config: Option<&serde_json::Value>) -> Option<usize> {
    let header = files.metadata("vit_heads").and_then(|text| text.parse().ok());
    let json = || config?["vision"]["num_attention_heads"].as_u64()?.try_into().ok();
    header.or_else(json)
}
