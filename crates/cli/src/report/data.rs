//! What a report holds: measurements as saved to JSON, and numbers published by others.

use std::path::Path;

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::ladder::Ladder;
use crate::profile::{Profile, Timing};
use crate::provenance::Provenance;

/// Measurements of one or more models.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Where it was measured, and when.
    #[serde(flatten)]
    pub provenance: Provenance,
    /// What the milliseconds of a whole run cover.
    pub clock: String,
    /// One entry per model and device.
    pub models: Vec<ModelReport>,
}

/// Measurements of one model on one device at one precision.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelReport {
    /// Where it was measured, and when; absent from older files, whose own then holds.
    #[serde(default)]
    pub provenance: Provenance,
    /// `pi0` or `pi05`.
    pub model: String,
    /// Whether every size is the released model's: only then do others' numbers compare.
    pub full_size: bool,
    /// Where it ran.
    pub device: String,
    /// A checkpoint, or the recipe of random weights.
    pub weights: String,
    /// Stored precision of the matrices.
    pub precision: String,
    /// Bytes of weights on the device.
    pub weight_bytes: u64,
    /// The batch sweep.
    pub batches: Vec<Timing>,
    /// Other shapes at batch 1.
    pub shapes: Vec<Timing>,
    /// Where the milliseconds of batch 1 go.
    pub profile: Profile,
    /// What each choice is worth.
    pub ladders: Vec<Ladder>,
}

impl Report {
    /// Reads a saved report; each model then has its provenance.
    pub fn read(path: &Path) -> Result<Self> {
        let mut report: Report = read(path)?;
        let unset = |m: &&mut ModelReport| m.provenance == Provenance::default();
        for model in report.models.iter_mut().filter(unset) {
            model.provenance = report.provenance.clone();
        }
        Ok(report)
    }

    /// `Pirouette 0.1.0 · 2026-11-22`, for each version and day of its models.
    pub fn measured(&self) -> String {
        let mut all: Vec<String> = Vec::new();
        for m in &self.models {
            let one = format!("Pirouette {} · {}", m.provenance.version, m.provenance.date);
            if !all.contains(&one) {
                all.push(one);
            }
        }
        all.join(", ")
    }
}

impl ModelReport {
    /// `pi0 bf16`.
    pub fn name(&self) -> String {
        format!("{} {}", self.model, self.precision)
    }

    /// `pi0 bf16 on cuda:0 NVIDIA H200`.
    pub fn title(&self) -> String {
        format!("{} on {}", self.name(), self.device)
    }

    /// Every whole-run timing.
    pub fn timings(&self) -> impl Iterator<Item = &Timing> {
        self.batches.iter().chain(&self.shapes)
    }
}

/// Numbers published by others.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Published {
    /// How to read them.
    pub note: String,
    /// The numbers.
    pub rows: Vec<PublishedRow>,
}

/// One number published by others.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PublishedRow {
    /// Whose.
    pub system: String,
    /// On what.
    pub gpu: String,
    /// `pi0` or `pi05`; absent where the source does not say.
    pub model: Option<String>,
    /// Samples per run.
    pub batch: usize,
    /// Cameras.
    pub cameras: usize,
    /// Prompt tokens.
    pub prompt_tokens: usize,
    /// Actions per chunk.
    pub horizon: usize,
    /// Euler steps.
    pub euler_steps: usize,
    /// Milliseconds of a run.
    pub ms: Option<f64>,
    /// Samples per second.
    pub samples_per_s: Option<f64>,
    /// `published` or `re-measured`.
    pub measured: String,
    /// Where it is stated.
    pub source: String,
    /// Anything else.
    pub note: Option<String>,
}

impl PublishedRow {
    /// For people: `batch 1 · 3 cam · 20 tok · h 10`: cameras, prompt tokens, horizon.
    pub fn shape(&self) -> String {
        let (b, c, p, h) = (self.batch, self.cameras, self.prompt_tokens, self.horizon);
        format!("batch {b} · {c} cam · {p} tok · h {h}")
    }

    /// Milliseconds of a run, from the rate where only that is stated.
    pub fn run_ms(&self) -> Option<f64> {
        let from_rate = |rate: f64| (rate > 0.0).then(|| self.batch as f64 / rate * 1e3);
        self.ms.or_else(|| self.samples_per_s.and_then(from_rate))
    }

    /// Whether a timing of ours is of the same model and shape.
    pub fn matches(&self, model: &ModelReport, t: &Timing) -> bool {
        let w = &t.workload;
        model.full_size
            && self.model.as_ref() == Some(&model.model)
            && (self.batch, self.cameras) == (w.batch, w.cameras)
            && (self.prompt_tokens, self.horizon) == (w.prompt_tokens, w.horizon)
            && self.euler_steps == w.euler_steps
    }

    /// Ours to set beside it: on the row's GPU and at bf16, as others run, where there is a choice.
    pub fn ours<'a>(&self, models: &'a [ModelReport]) -> Option<(&'a ModelReport, &'a Timing)> {
        let matching =
            models.iter().filter_map(|m| Some((m, m.timings().find(|t| self.matches(m, t))?)));
        matching.min_by_key(|(m, _)| {
            let same_gpu = m.device.split_whitespace().any(|word| word == self.gpu);
            (!same_gpu, m.precision != "bf16")
        })
    }
}

/// Reads a saved file.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("can't read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| {
        format!("{} is not what this command saves or reads: write it with --json", path.display())
    })
}
