//! The recorded network: a flat list of named steps over an arena of buffers.
//!
//! Rows are tokens, columns are features, all buffers are row-major. A batch of `B` samples has
//! its rows sample after sample; a [`View`] picks the same rows of every sample.

use crate::config::Config;
use crate::rtc::Rtc;

/// What a program is recorded for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Samples per run.
    pub batch: usize,
    /// Camera slots per sample, 1 to 3; a sample may fill fewer (`Inputs::cameras`).
    pub cameras: usize,
    /// Prompt slots per sample; a sample may fill fewer (`Inputs::prompt_len`).
    pub prompt_tokens: usize,
    /// Actions per chunk (H).
    pub horizon: usize,
    /// Euler steps.
    pub steps: usize,
    /// How a chunk is tied to the one before it.
    pub rtc: Rtc,
}

impl Shape {
    /// Prefix rows of one sample: image slots, then prompt slots.
    pub fn prefix_rows(&self, config: &Config) -> usize {
        self.cameras * config.vision.tokens() + self.prompt_tokens
    }

    /// Suffix rows of one sample in the K/V cache: π0's state token, then the actions.
    pub fn suffix_rows(&self, config: &Config) -> usize {
        self.horizon + (config.family == crate::config::Family::Pi0) as usize
    }
}

/// Index of a buffer in [`Program::buffers`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BufferId(pub usize);

/// Index of a weight in [`crate::weights::WeightTable::specs`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WeightId(pub usize);

/// How a buffer's elements are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// At the backend's activation precision: f32 on the CPU, bf16 on a GPU.
    Activation,
    /// Always f32.
    F32,
    /// Unsigned bytes.
    U8,
    /// Unsigned 32-bit integers.
    U32,
}

/// What a buffer is to the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Filled from `Inputs` before the first step.
    Input,
    /// Filled from `Inputs`, updated in place, read by the caller at the end (the actions).
    InOut,
    /// Alive from its first write to its last read.
    Scratch,
}

/// A matrix in the arena.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Name, unique: `vision.stream`, `cache.k.3`, ….
    pub name: String,
    /// Rows (batch included).
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Element storage.
    pub element: Element,
    /// Who fills and reads it.
    pub role: Role,
}

/// Some columns of some rows of every group (a sample, or an image): row `i` of group `g` is
/// buffer row `g * stride + first + i`, `i < count`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct View {
    /// The buffer.
    pub buffer: BufferId,
    /// First column.
    pub col: usize,
    /// Columns.
    pub cols: usize,
    /// Buffer rows from one group to the next.
    pub stride: usize,
    /// First row within a group.
    pub first: usize,
    /// Rows of each group.
    pub count: usize,
}

impl View {
    /// Whether groups follow each other without a gap, so that the view is one plain matrix.
    pub fn is_contiguous(&self) -> bool {
        self.stride == self.count
    }
}

/// Normalisation of a product's input rows.
///
/// A learned scale multiplies the row before it is rounded for the product, not the weight:
/// rounding a scaled weight again errs the same way for every token and step, and such errors add
/// up (at full size π0's BF16 actions were 0.73 % off with folded scales). LayerNorm's shift is
/// folded into the bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Norm {
    /// x
    None,
    /// scale · x / √(mean(x²) + 1e-6)
    Rms {
        /// `[1, K]` f32, RMSNorm's 1 + w; one when absent.
        scale: Option<WeightId>,
    },
    /// scale · (x − mean) / √(var + 1e-6)
    Layer {
        /// `[1, K]` f32, LayerNorm's weight.
        scale: WeightId,
    },
    /// RMS-normalised x · (1 + scale) + shift with `scale | shift | gate` = row `row` of a
    /// `[rows, 3·K]` f32 table whose first third already holds 1 + scale.
    Adaptive {
        /// The modulation table.
        table: WeightId,
        /// Its row: the denoising step.
        row: usize,
        /// The row for given actions instead: input rows of a weight above 0 in
        /// `previous.weights`.
        given_row: Option<usize>,
    },
}

/// Gate of a residual: the last third of a row of a modulation table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Gate {
    /// The modulation table, `[rows, 3·N]`.
    pub table: WeightId,
    /// Its row: the denoising step.
    pub row: usize,
    /// The row for given actions instead, as in [`Norm::Adaptive`].
    pub given_row: Option<usize>,
}

/// A bias vector: row `row` of an f32 table `[rows, N]` (`row` 0 of 1 for ordinary biases).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Bias {
    /// The table.
    pub table: WeightId,
    /// The row.
    pub row: usize,
}

/// Where position 0 of the rotary embedding lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Positions {
    /// Row `i` of a sample has position `i` (prefix: real tokens come first).
    Prefix,
    /// Row `i` has position `prefix length of the sample + first + i` (suffix).
    Suffix {
        /// 1 when the state token, which comes first, is not among the rows; else 0.
        first: usize,
    },
}

/// The pull of an Euler step towards the previous chunk, `Inputs::previous`: with y the step
/// dt·v and a = weight · min(limit, strength), [`crate::rtc`]'s x + dt·v' is
/// x + (1 − a·time)·y + a·pull·(chunk − x). Rows of weight 0 get x + y, bit for bit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Guidance {
    /// `[batch · horizon, action_dim]` f32.
    pub chunk: BufferId,
    /// `[batch · horizon, 1]` f32.
    pub weights: BufferId,
    /// `[batch, 1]` f32.
    pub limits: BufferId,
    /// The step's time t.
    pub time: f32,
    /// [`crate::rtc::strength`] at that time, +∞ at 1.
    pub strength: f32,
    /// −dt.
    pub pull: f32,
}

/// What happens to a product y = norm(x)·Wᵀ + bias.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Epilogue {
    /// out = y
    Store {
        /// Destination, as many columns as the weight has rows.
        out: View,
    },
    /// out = y + table[row within the image] (position table, `[tokens, N]`, f32)
    StorePosition {
        /// Destination.
        out: View,
        /// The table.
        table: WeightId,
    },
    /// out = gelu_tanh(y)
    Gelu {
        /// Destination.
        out: View,
    },
    /// out = y · sigmoid(y)
    Silu {
        /// Destination.
        out: View,
    },
    /// The weight's rows are gate‖up (2·M): out = gelu_tanh(y[..M]) · y[M..]
    GeGlu {
        /// Destination, M columns.
        out: View,
    },
    /// out += gate · y (gate 1 when absent)
    Add {
        /// The residual stream, updated in place.
        out: View,
        /// adaRMS gate.
        gate: Option<Gate>,
    },
    /// out += y, but for given actions (a weight above 0 in `previous.weights`), which stay
    AddFree {
        /// The actions, updated in place: all of a sample's rows.
        out: View,
    },
    /// out += y, drawn towards the previous chunk: the Euler step of real-time chunking
    Guide {
        /// The actions, updated in place: all of a sample's rows.
        out: View,
        /// Where to and how hard.
        guidance: Guidance,
    },
    /// The weight's rows are q‖k‖v (or k‖v when `q` is `None`): q and k rotated, then stored.
    Rope {
        /// Destination of q (`heads · head_dim` columns).
        q: Option<View>,
        /// Destination of k in the cache (`head_dim` columns).
        k: View,
        /// Destination of v in the cache.
        v: View,
        /// Width of one head.
        head_dim: usize,
        /// Position of each row.
        positions: Positions,
    },
}

/// Which keys a query may see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KeyMask {
    /// All rows of the group.
    All,
    /// Key row s iff s < the sample's prefix length.
    Prefix,
    /// Key row s iff s < the sample's prefix length, or s ≥ `prefix_rows` (the suffix).
    Suffix {
        /// Prefix slots in the cache.
        prefix_rows: usize,
        /// Query row 0 is π0's state token, which sees no suffix key but the first (itself).
        state_row: bool,
    },
}

/// y = scale · norm(x)·Wᵀ + bias, then the epilogue.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Linear {
    /// Input rows, K columns.
    pub input: View,
    /// Groups of rows (samples, or images for `StorePosition`).
    pub groups: usize,
    /// Applied to each input row.
    pub norm: Norm,
    /// `[N, K]`
    pub weight: WeightId,
    /// Multiplies the product: 1, but for the patch embedding (pixels → [−1, 1]).
    pub scale: f32,
    /// Added to the scaled product.
    pub bias: Option<Bias>,
    /// What becomes of it.
    pub epilogue: Epilogue,
}

/// out = softmax(scale · q·kᵀ + mask)·v per head.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Samples or images: queries of one group see keys of the same group.
    pub groups: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads: 1 (shared by all query heads) or `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// `heads · head_dim` columns.
    pub q: View,
    /// `kv_heads · head_dim` columns.
    pub k: View,
    /// `kv_heads · head_dim` columns.
    pub v: View,
    /// `heads · head_dim` columns.
    pub out: View,
    /// Multiplies q·kᵀ. 1 for Gemma, whose 1/√256 is a power of two and lies in q's weight.
    pub scale: f32,
    /// Visible keys.
    pub mask: KeyMask,
}

/// One step of the program.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Op {
    /// patches[p, (row, column, channel)] = pixel − 128: exact in bf16. The scale 2/255 is the
    /// patch product's, the offset lies in its bias.
    Patchify {
        /// `[batch · cameras, side · side · 3]` u8.
        images: BufferId,
        /// `[batch · cameras · tokens, patch · patch · 3]`
        patches: BufferId,
        /// Side of a patch in pixels.
        patch: usize,
        /// Side of an image in pixels.
        side: usize,
    },
    /// For `j < prompt_len[b]`: stream row `b · stride + cameras[b] · image_tokens + j` =
    /// scale · table[tokens[b, j]]. Comes after the projector: in a sample that fills fewer
    /// cameras than there are slots it overwrites unused image rows. Rows past the prefix
    /// length keep finite garbage or are zeroed; nobody reads what becomes of them.
    EmbedTokens {
        /// `[batch, prompt_tokens]` u32.
        tokens: BufferId,
        /// The token table `[vocab, width]`.
        table: WeightId,
        /// √width.
        scale: f32,
        /// Rows per image.
        image_tokens: usize,
        /// Prefix rows of every sample.
        out: View,
    },
    /// A product.
    Linear(Linear),
    /// Attention.
    Attention(Attention),
}

/// A named step.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// `vision.3.qkv`, `prefill.17.kv`, `denoise.step3.7.up`, ….
    pub name: String,
    /// What it does.
    pub op: Op,
}

/// Stage of the observation → vision → prefill → denoise → actions line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stage {
    /// SigLIP and the projector.
    Vision,
    /// Gemma-2B over the prefix.
    Prefill,
    /// Euler steps of the expert.
    Denoise,
}

impl Step {
    /// The stage its name says.
    pub fn stage(&self) -> Stage {
        match self.name.split('.').next() {
            Some("vision") => Stage::Vision,
            Some("prefill") => Stage::Prefill,
            _ => Stage::Denoise,
        }
    }
}

/// A recorded network. Well-known buffers: `images`, `tokens`, `lengths` (`[batch, 2]` u32:
/// cameras, prompt length), `state`, `actions` (noise in, actions out); with real-time chunking
/// `previous.weights`, and with [`Rtc::Guided`] `previous.chunk`, `previous.limits`.
#[derive(Clone, Debug)]
pub struct Program {
    /// Sizes.
    pub config: Config,
    /// What it was recorded for.
    pub shape: Shape,
    /// The arena.
    pub buffers: Vec<Buffer>,
    /// The steps, in order.
    pub steps: Vec<Step>,
    /// Every weight the steps name, with its recipe.
    pub weights: std::sync::Arc<crate::weights::WeightTable>,
}

impl Program {
    /// The buffer of that name.
    pub fn buffer(&self, name: &str) -> Option<BufferId> {
        self.buffers.iter().position(|b| b.name == name).map(BufferId)
    }
}
