//! Sizes of a π0 or π0.5 model, read off its tensors.

use crate::source::TensorSource;

/// Which of the two models.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// π0: state token in the suffix, time mixed into the action tokens.
    Pi0,
    /// π0.5: state as text in the prompt, time through adaptive RMSNorm.
    Pi05,
}

impl Family {
    /// `pi0` or `pi05`, the spelling of flags and file names.
    pub fn name(self) -> &'static str {
        match self {
            Family::Pi0 => "pi0",
            Family::Pi05 => "pi05",
        }
    }
}

/// Sizes of the SigLIP tower.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Vision {
    /// Residual width (1152).
    pub width: usize,
    /// Number of blocks (27).
    pub depth: usize,
    /// Hidden units of the MLP (4304).
    pub mlp: usize,
    /// Attention heads (16), each `width / heads` wide.
    pub heads: usize,
    /// Side of a square patch in pixels (14).
    pub patch: usize,
    /// Side of the square image in pixels (224).
    pub image: usize,
}

impl Vision {
    /// Tokens per image: 256 at full size.
    pub fn tokens(&self) -> usize {
        (self.image / self.patch).pow(2)
    }

    /// Width of one head (72).
    pub fn head_dim(&self) -> usize {
        self.width / self.heads
    }

    /// Values in one patch: `patch * patch * 3` (588).
    pub fn patch_values(&self) -> usize {
        self.patch * self.patch * 3
    }
}

/// Sizes of one of the two Gemma towers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Gemma {
    /// Residual width (2048 prefix, 1024 expert).
    pub width: usize,
    /// Hidden units of the gated MLP (16384, 4096).
    pub mlp: usize,
}

/// All sizes of a model. Both Gemma towers share depth, heads and head width.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Config {
    /// π0 or π0.5.
    pub family: Family,
    /// SigLIP.
    pub vision: Vision,
    /// Gemma-2B, the prefix model.
    pub prefix: Gemma,
    /// Gemma-300M, the action expert.
    pub expert: Gemma,
    /// Layers of each Gemma (18).
    pub depth: usize,
    /// Query heads (8); there is one K/V head.
    pub heads: usize,
    /// Width of a Gemma head (256).
    pub head_dim: usize,
    /// Rows of the token table (257152).
    pub vocab: usize,
    /// Action dimensions A of the model (32).
    pub action_dim: usize,
    /// RoPE frequencies rounded to bf16, as openpi's PyTorch server computes them. Off by default:
    /// JAX and the paper use exact ones.
    pub rope_bf16: bool,
    /// Most leading actions the model was trained to take as given (LeRobot's
    /// `rtc_training_max_delay`, π0.5 only); 0: it was not.
    pub rtc_max_delay: usize,
}

/// Names of tensors and prefixes, openpi's PyTorch spelling.
pub mod names {
    /// Prefix of SigLIP tensors.
    pub const VISION: &str = "paligemma_with_expert.paligemma.model.vision_tower.vision_model.";
    /// Prefix of the vision projector.
    pub const PROJECTOR: &str =
        "paligemma_with_expert.paligemma.model.multi_modal_projector.linear.";
    /// Prefix of Gemma-2B tensors.
    pub const PREFIX: &str = "paligemma_with_expert.paligemma.model.language_model.";
    /// Prefix of expert tensors.
    pub const EXPERT: &str = "paligemma_with_expert.gemma_expert.model.";
    /// The token table.
    pub const EMBED: &str =
        "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight";
}

/// Why sizes could not be read off the tensors.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A tensor that sizes are read from is not there.
    #[error(
        "`{name}` is missing from {origin}: this is no π0 or π0.5 checkpoint, or not all of it; \
         copy or download the whole checkpoint again, or name another directory"
    )]
    Missing {
        /// Canonical tensor name.
        name: String,
        /// Where it was looked for.
        origin: String,
    },
    /// Sizes contradict each other.
    #[error("{origin}: {what}")]
    Inconsistent {
        /// Where the tensors come from.
        origin: String,
        /// The contradiction, with the names involved.
        what: String,
    },
}

impl Config {
    /// Full-size π0 (3,238,048,528 parameters).
    pub fn pi0() -> Self {
        Config {
            family: Family::Pi0,
            vision: Vision { width: 1152, depth: 27, mlp: 4304, heads: 16, patch: 14, image: 224 },
            prefix: Gemma { width: 2048, mlp: 16384 },
            expert: Gemma { width: 1024, mlp: 4096 },
            depth: 18,
            heads: 8,
            head_dim: 256,
            vocab: 257_152,
            action_dim: 32,
            rope_bf16: false,
            rtc_max_delay: 0,
        }
    }

    /// Full-size π0.5 (3,353,433,872 parameters).
    pub fn pi05() -> Self {
        Config { family: Family::Pi05, ..Self::pi0() }
    }

    /// Reads every size off the tensors' shapes.
    ///
    /// The number of SigLIP heads is in no tensor: `vision_heads` gives it where the checkpoint
    /// records it; otherwise heads are 72 wide (So400m), or 12 wide for narrow test towers.
    pub fn infer(
        source: &dyn TensorSource,
        vision_heads: Option<usize>,
    ) -> Result<Self, ConfigError> {
        let origin = source.origin();
        let shape = |name: &str, rank: usize| -> Result<Vec<usize>, ConfigError> {
            let s = source.shape(name).ok_or_else(|| ConfigError::Missing {
                name: name.into(),
                origin: origin.clone(),
            })?;
            if s.len() != rank || s.contains(&0) {
                return Err(ConfigError::Inconsistent {
                    origin: origin.clone(),
                    what: format!("`{name}` has shape {s:?}, expected {rank} non-empty axes"),
                });
            }
            Ok(s)
        };
        let wrong = |what: String| ConfigError::Inconsistent { origin: origin.clone(), what };
        let count = |prefix: &str, suffix: &str| {
            (0..1024)
                .take_while(|i| source.shape(&format!("{prefix}layers.{i}.{suffix}")).is_some())
                .count()
        };

        let pi05 = source.shape("time_mlp_in.weight").is_some();
        let pi0 = source.shape("state_proj.weight").is_some();
        let family = match (pi0, pi05) {
            (true, false) => Family::Pi0,
            (false, true) => Family::Pi05,
            (true, true) => {
                return Err(wrong(
                    "both `state_proj` (π0) and `time_mlp_in` (π0.5) present".into(),
                ));
            }
            (false, false) => {
                return Err(ConfigError::Missing { name: "state_proj.weight".into(), origin });
            }
        };

        let kernel = shape(&format!("{}embeddings.patch_embedding.weight", names::VISION), 4)?;
        let table = shape(&format!("{}embeddings.position_embedding.weight", names::VISION), 2)?;
        let fc1 = shape(&format!("{}encoder.layers.0.mlp.fc1.weight", names::VISION), 2)?;
        if kernel[1] != 3 || kernel[2] != kernel[3] {
            return Err(wrong(format!("patch kernel {kernel:?} is not [width, 3, patch, patch]")));
        }
        let side = (table[0] as f64).sqrt().round() as usize;
        if side * side != table[0] {
            return Err(wrong(format!("{} image positions are not a square grid", table[0])));
        }
        let width = kernel[0];
        let heads = match vision_heads {
            Some(h) => h,
            None if width % 72 == 0 => width / 72,
            None if width % 12 == 0 => width / 12,
            None => 0,
        };
        if heads == 0 || width % heads != 0 {
            return Err(wrong(format!("SigLIP width {width} can't be split into {heads} heads")));
        }
        let vision = Vision {
            width,
            depth: count(&format!("{}encoder.", names::VISION), "mlp.fc1.weight"),
            mlp: fc1[0],
            heads,
            patch: kernel[2],
            image: side * kernel[2],
        };

        let embed = shape(names::EMBED, 2)?;
        let q = shape(&format!("{}layers.0.self_attn.q_proj.weight", names::PREFIX), 2)?;
        let k = shape(&format!("{}layers.0.self_attn.k_proj.weight", names::PREFIX), 2)?;
        let gate = shape(&format!("{}layers.0.mlp.gate_proj.weight", names::PREFIX), 2)?;
        let expert_gate = shape(&format!("{}layers.0.mlp.gate_proj.weight", names::EXPERT), 2)?;
        let action = shape("action_in_proj.weight", 2)?;
        let depth = count(names::PREFIX, "self_attn.q_proj.weight");
        let expert_depth = count(names::EXPERT, "self_attn.q_proj.weight");
        if depth != expert_depth {
            return Err(wrong(format!(
                "{depth} prefix layers but {expert_depth} expert layers: the last layers of one \
                 of them are missing; copy or download the whole checkpoint again"
            )));
        }
        if q[0] % k[0] != 0 || k[0] % 2 != 0 {
            return Err(wrong(format!("q_proj {q:?} and k_proj {k:?} do not share a head width")));
        }
        Ok(Config {
            family,
            vision,
            prefix: Gemma { width: embed[1], mlp: gate[0] },
            expert: Gemma { width: expert_gate[1], mlp: expert_gate[0] },
            depth,
            heads: q[0] / k[0],
            head_dim: k[0],
            vocab: embed[0],
            action_dim: action[1],
            rope_bf16: false,
            rtc_max_delay: 0,
        })
    }

    /// Rows of a modulation table: one per Euler step and, for a model that was trained to take
    /// actions as given, one for those (time 0).
    pub fn modulation_rows(&self, steps: usize) -> usize {
        steps + (self.rtc_max_delay > 0) as usize
    }

    /// Width of the K (or V) row of one token; there is one K/V head.
    pub fn kv_dim(&self) -> usize {
        self.head_dim
    }

    /// Width of all query heads together (2048).
    pub fn q_dim(&self) -> usize {
        self.heads * self.head_dim
    }
}

/// The largest sizes a checkpoint may claim. Far above any real model; they keep products of
/// sizes from overflowing and allocations from going wild on a damaged header.
pub const MAX_EXTENT: usize = 1 << 24;
