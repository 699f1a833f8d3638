//! An open checkpoint → the report that `pirouette inspect` prints.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use pirouette_model::DType;
use serde::Serialize;
use serde_json::Value;

use crate::error::CheckpointError;
use crate::expected::{Expected, expected_tensors};
use crate::names::Skipped;
use crate::open::Checkpoint;
use crate::orbax::OrbaxSource;
use crate::safetensors::{Entry, Stored};
use crate::small_file;
use crate::torch_source::TorchSource;

/// Stored tensors or arrays of one element type.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct StoredType {
    /// Tensors (in an Orbax checkpoint: arrays).
    pub tensors: usize,
    /// Elements.
    pub elements: u64,
    /// Bytes, decompressed.
    pub bytes: u64,
}

/// What the reader noted while opening.
#[derive(Debug, Default)]
pub(crate) struct Inventory {
    types: BTreeMap<String, StoredType>,
    skipped: Vec<Skipped>,
    lora: Vec<String>,
}

impl Inventory {
    fn add(&mut self, dtype: DType, shape: &[usize]) {
        let name = match dtype {
            DType::F32 => "F32",
            DType::Bf16 => "BF16",
            DType::F16 => "F16",
        };
        let elements: u64 = shape.iter().map(|&e| e as u64).product();
        let slot = self.types.entry(name.into()).or_default();
        slot.tensors += 1;
        slot.elements += elements;
        slot.bytes += elements * dtype.bytes() as u64;
    }

    pub(crate) fn of_files(source: &TorchSource) -> Self {
        let mut inventory =
            Inventory { skipped: source.mapping().skipped.clone(), ..Self::default() };
        for stored in source.mapping().used.values() {
            if let Some(Entry { stored: Stored::Float(dtype), shape, .. }) =
                source.files().entry(stored)
            {
                inventory.add(*dtype, shape);
            }
        }
        inventory
    }

    pub(crate) fn of_arrays(source: &OrbaxSource) -> Self {
        let mut inventory = Inventory { lora: source.lora().to_vec(), ..Self::default() };
        for (_, entry) in source.arrays().iter() {
            inventory.add(entry.meta.dtype, &entry.meta.shape);
        }
        inventory
    }
}

/// Statistics found beside the weights.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NormStatsFound {
    /// Asset id.
    pub asset_id: String,
    /// The file.
    pub path: PathBuf,
    /// Key (`state`, `actions`) → length of its mean.
    pub dims: BTreeMap<String, usize>,
    /// Why there are no dims, if the file can't be read, or the folder of an asset `?`.
    pub problem: Option<String>,
}

/// Everything worth knowing about a checkpoint at a glance.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The checkpoint directory.
    pub path: PathBuf,
    /// Format, as shown to users.
    pub format: &'static str,
    /// `pi0` or `pi05`.
    pub family: &'static str,
    /// Sizes of the model, by name.
    pub sizes: BTreeMap<&'static str, usize>,
    /// Parameters of the model.
    pub parameters: u64,
    /// Tensors of the model.
    pub tensors: usize,
    /// Stored element types.
    pub types: BTreeMap<String, StoredType>,
    /// Bytes of the used tensors, decompressed.
    pub bytes: u64,
    /// Stored tensors that are not used.
    pub skipped: Vec<Skipped>,
    /// Arrays that LoRA factors are merged into at load.
    pub lora_merged: Vec<String>,
    /// Norm stats found.
    pub norm_stats: Vec<NormStatsFound>,
    /// LeRobot's features: name, type and shape.
    pub features: Vec<String>,
    /// LeRobot features that have statistics.
    pub features_with_stats: Vec<String>,
    /// LeRobot's processor steps before and after the model.
    pub steps: Vec<String>,
}

impl Checkpoint {
    /// Reports on the checkpoint. Reads no weights.
    pub fn inspect(&self) -> Report {
        let c = &self.config;
        let expected = expected_tensors(c);
        let (features, features_with_stats, steps) = match &self.lerobot {
            None => (vec![], vec![], vec![]),
            Some(policy) => (
                policy
                    .input_features
                    .iter()
                    .chain(&policy.output_features)
                    .map(|f| format!("{} {} {:?}", f.name, f.kind.name(), f.shape))
                    .collect(),
                policy.input_stats.stats.keys().cloned().collect(),
                [("before", &policy.preprocessor), ("after", &policy.postprocessor)]
                    .iter()
                    .flat_map(|(when, steps)| {
                        steps.iter().map(move |s| format!("{when}: {}", s.name))
                    })
                    .collect(),
            ),
        };
        Report {
            path: self.root.clone(),
            format: self.format.name(),
            family: c.family.name(),
            sizes: BTreeMap::from([
                ("vision_width", c.vision.width),
                ("vision_depth", c.vision.depth),
                ("vision_heads", c.vision.heads),
                ("vision_mlp", c.vision.mlp),
                ("image", c.vision.image),
                ("patch", c.vision.patch),
                ("prefix_width", c.prefix.width),
                ("prefix_mlp", c.prefix.mlp),
                ("expert_width", c.expert.width),
                ("expert_mlp", c.expert.mlp),
                ("depth", c.depth),
                ("heads", c.heads),
                ("head_dim", c.head_dim),
                ("vocab", c.vocab),
                ("action_dim", c.action_dim),
            ]),
            parameters: expected.iter().map(Expected::elements).sum(),
            tensors: expected.len(),
            types: self.inventory.types.clone(),
            bytes: self.inventory.types.values().map(|t| t.bytes).sum(),
            skipped: self.inventory.skipped.clone(),
            lora_merged: self.inventory.lora.clone(),
            norm_stats: match self.asset_ids() {
                Ok(ids) => ids.into_iter().map(norm_stats_found).collect(),
                Err(e) => vec![unlisted(&self.root, &e)],
            },
            features,
            features_with_stats,
            steps,
        }
    }
}

fn unlisted(root: &Path, error: &CheckpointError) -> NormStatsFound {
    let path = match error {
        CheckpointError::Io { path, .. } => path.clone(),
        _ => root.join("assets"),
    };
    let problem = Some(error.to_string());
    NormStatsFound { asset_id: "?".into(), path, dims: BTreeMap::new(), problem }
}

fn norm_stats_found((asset_id, path): (String, PathBuf)) -> NormStatsFound {
    let (dims, problem) = match small_file(&path).map_err(|e| e.to_string()).and_then(dims) {
        Ok(dims) => (dims, None),
        Err(problem) => (BTreeMap::new(), Some(problem)),
    };
    NormStatsFound { asset_id, path, dims, problem }
}

/// Lengths of the means. Python writes NaN and Infinity as bare words; only lengths matter here,
/// so they become null.
fn dims(bytes: Vec<u8>) -> Result<BTreeMap<String, usize>, String> {
    let text = String::from_utf8(bytes).map_err(|_| "not UTF-8")?;
    let text = text.replace("-Infinity", "null").replace("Infinity", "null").replace("NaN", "null");
    let json: Value = serde_json::from_str(&text).map_err(|e| format!("not JSON: {e}"))?;
    let entries = json["norm_stats"].as_object().ok_or("no `norm_stats` object")?;
    Ok(entries
        .iter()
        .map(|(key, entry)| (key.clone(), entry["mean"].as_array().map_or(0, Vec::len)))
        .collect())
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millions = self.parameters as f64 / 1e6;
        writeln!(f, "{}", self.path.display())?;
        writeln!(f, "  format       {}", self.format)?;
        writeln!(
            f,
            "  model        {}, {millions:.1} M parameters in {} tensors",
            self.family, self.tensors
        )?;
        let sizes: Vec<String> = self.sizes.iter().map(|(k, v)| format!("{k} {v}")).collect();
        for (i, line) in sizes.chunks(5).enumerate() {
            let title = if i == 0 { "sizes" } else { "" };
            writeln!(f, "  {title:<12} {}", line.join(", "))?;
        }
        for (name, t) in &self.types {
            let gib = t.bytes as f64 / (1u64 << 30) as f64;
            writeln!(
                f,
                "  {:<12} {} tensors, {} elements, {gib:.3} GiB",
                name, t.tensors, t.elements
            )?;
        }
        for s in &self.skipped {
            writeln!(f, "  skipped      {} ({})", s.name, s.reason)?;
        }
        for path in &self.lora_merged {
            writeln!(f, "  LoRA merged  {path}")?;
        }
        for found in &self.norm_stats {
            let dims: Vec<String> = found.dims.iter().map(|(k, n)| format!("{k} {n}")).collect();
            let what = found.problem.clone().unwrap_or_else(|| dims.join(", "));
            writeln!(f, "  norm stats   {}: {what} ({})", found.asset_id, found.path.display())?;
        }
        if self.norm_stats.is_empty() && self.features_with_stats.is_empty() {
            writeln!(f, "  norm stats   none found")?;
        }
        for feature in &self.features {
            let name = feature.split(' ').next().unwrap_or_default();
            let stats = self.features_with_stats.iter().any(|s| s == name);
            writeln!(
                f,
                "  feature      {feature}{}",
                if stats { ", with statistics" } else { "" }
            )?;
        }
        for step in &self.steps {
            writeln!(f, "  step         {step}")?;
        }
        Ok(())
    }
}
