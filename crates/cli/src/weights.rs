//! Flags → where the weights come from: a checkpoint, or random weights of the full size.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use pirouette_checkpoint::{Checkpoint, Identity, Synthetic};
use pirouette_model::{Config, TensorSource};
use pirouette_policy::tokenizer::SearchPlaces;

use crate::args::{Rope, WeightArgs};

/// Tensors to load, and what is known about them.
pub struct Weights {
    /// Sizes, and how RoPE is rounded.
    pub config: Config,
    /// What to call them: a path, or the recipe; and what is not as usual.
    pub origin: String,
    kind: Kind,
}

enum Kind {
    Checkpoint(Box<Checkpoint>),
    Synthetic(Synthetic),
}

impl Weights {
    /// Opens the checkpoint, or says that weights are random.
    pub fn open(args: &WeightArgs) -> Result<Self> {
        let mut weights = match &args.checkpoint {
            None => Self::synthetic(args.model.config(), args.weight_seed),
            Some(dir) => {
                let checkpoint = pirouette_checkpoint::open(&local(dir)?)
                    .with_context(|| format!("checkpoint {}", dir.display()))?;
                Weights {
                    config: checkpoint.config,
                    origin: dir.display().to_string(),
                    kind: Kind::Checkpoint(Box::new(checkpoint)),
                }
            }
        };
        if args.rope.rope == Rope::Bf16 {
            weights.config.rope_bf16 = true;
            weights.origin += ", RoPE in bf16";
        }
        Ok(weights)
    }

    /// Random weights of any size.
    pub fn synthetic(config: Config, seed: u64) -> Self {
        let source = Synthetic::new(&config, seed);
        Weights {
            config,
            origin: format!("random weights, seed {seed}"),
            kind: Kind::Synthetic(source),
        }
    }

    /// The tensors.
    pub fn source(&self) -> &dyn TensorSource {
        match &self.kind {
            Kind::Checkpoint(c) => c.source.as_ref(),
            Kind::Synthetic(s) => s,
        }
    }

    /// Which files they lie in; none where they are random.
    pub fn identity(&self) -> Identity {
        self.checkpoint().map(|c| c.identity.clone()).unwrap_or_default()
    }

    /// The checkpoint, if it is one.
    pub fn checkpoint(&self) -> Option<&Checkpoint> {
        match &self.kind {
            Kind::Checkpoint(c) => Some(c),
            Kind::Synthetic(_) => None,
        }
    }
}

/// A checkpoint's path: as it is, or where openpi caches a `gs://` one.
pub fn local(path: &Path) -> Result<PathBuf> {
    let Some(uri) = path.to_str().filter(|uri| uri.starts_with("gs://")) else {
        return Ok(path.into());
    };
    let Some(home) = SearchPlaces::from_env().openpi_home else {
        bail!("{uri}: set OPENPI_DATA_HOME to openpi's cache")
    };
    let path = home.join(&uri["gs://".len()..]);
    if !path.exists() {
        bail!(
            "{uri} is not in {}: fetch it with `mkdir -p {folder} && gsutil -m cp -r {uri} \
             {folder}`, or name a directory with --checkpoint",
            home.display(),
            folder = path.parent().unwrap_or(&home).display()
        );
    }
    Ok(path)
}
