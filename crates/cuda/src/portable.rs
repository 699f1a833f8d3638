//! Host twin of `kernels/portable_*.cu`: the tier that takes every shape.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use pirouette_model::BackendError;

use crate::cubins;
use crate::driver::{Arg, Context, Function, Launch};

/// Columns of some rows of every group, as kernels see them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct View {
    /// Address of column 0 of matrix row 0.
    pub base: u64,
    /// Elements from one matrix row to the next.
    pub ld: u32,
    /// Matrix rows from one group to the next.
    pub stride: u32,
    /// First row of a group.
    pub first: u32,
    /// Rows of a group.
    pub count: u32,
    /// 1 for f32, 0 for bf16.
    pub f32: u32,
    /// 0
    pub pad: u32,
}

/// `portable::Epilogue`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Epilogue {
    /// y
    Store = 0,
    /// y + position table
    StorePosition = 1,
    /// gelu(y)
    Gelu = 2,
    /// silu(y)
    Silu = 3,
    /// gelu(gate) · up
    GeGlu = 4,
    /// out + gate · y
    Add = 5,
    /// q, k rotated; v
    Rope = 6,
}

/// `portable::Norm`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Norm {
    /// x
    None = 0,
    /// RMS
    Rms = 1,
    /// Layer
    Layer = 2,
    /// RMS, then scale and shift
    Adaptive = 3,
}

/// Where a product goes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct Output {
    /// Destination; Rope: q.
    pub out: View,
    /// Rope: keys.
    pub k: View,
    /// Rope: values.
    pub v: View,
    /// f32 [n] or 0.
    pub bias: u64,
    /// Position table, gate, or rotations; see the kernel.
    pub aux: u64,
    /// u32 [samples][2].
    pub lengths: u64,
    /// [`Epilogue`]
    pub epilogue: u32,
    /// Columns of y.
    pub n: u32,
    /// Rows of a group.
    pub period: u32,
    /// Rope: query heads.
    pub q_heads: u32,
    /// Rope: width of a head.
    pub head_dim: u32,
    /// Rope: tokens of a camera.
    pub image_tokens: u32,
    /// Rope, suffix: position of row 0 less the prefix length.
    pub first_position: u32,
    /// Rope: 1 counts from the prefix length.
    pub suffix: u32,
    /// Multiplies y before the bias.
    pub scale: f32,
    /// 0
    pub pad: u32,
    /// Not 0: E4M3 operands, float2 [rows] multiplies their product; GeGlu: gate's and up's, and
    /// the result becomes E4M3.
    pub factors: u64,
}

/// Parameters of `portable_linear_*`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct LinearParams {
    /// x, bf16.
    pub input: View,
    /// bf16 or E4M3 [packed_n][ldw].
    pub weight: u64,
    /// Rows of x.
    pub rows: u32,
    /// Columns of x.
    pub k: u32,
    /// Stored rows of the weight.
    pub packed_n: u32,
    /// Elements from one weight row to the next.
    pub ldw: u32,
    /// 1: the weight is E4M3, and x holds such numbers.
    pub e4m3: u32,
    /// 0
    pub pad: u32,
    /// Where y goes.
    pub output: Output,
}

/// Parameters of `portable_rim`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct RimParams {
    /// x.
    pub input: View,
    /// f32 [n][k].
    pub weight: u64,
    /// f32 [k], the learned scale, or 0. Adaptive: [3·k].
    pub modulation: u64,
    /// Rows of x.
    pub rows: u32,
    /// Columns of x.
    pub k: u32,
    /// [`Norm`]
    pub norm: u32,
    /// 0
    pub pad: u32,
    /// Where y goes.
    pub output: Output,
}

/// Parameters of `portable_norm`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct NormParams {
    /// x.
    pub input: View,
    /// f32 [k], the learned scale, or 0. Adaptive: [3·k].
    pub modulation: u64,
    /// bf16 [rows][ld].
    pub out: u64,
    /// Rows.
    pub rows: u32,
    /// Columns.
    pub k: u32,
    /// Elements from one row of `out` to the next.
    pub ld: u32,
    /// [`Norm`]
    pub norm: u32,
    /// 1: rows become E4M3 numbers, each row times a power of two.
    pub e4m3: u32,
    /// Then: what takes gate's scale out of its product.
    pub gate_scale: f32,
    /// Up's.
    pub up_scale: f32,
    /// Down's.
    pub down_scale: f32,
    /// Then: float2 [rows], factors of gate's and up's products.
    pub up: u64,
    /// float2 [rows], of down's, and 0.
    pub down: u64,
    /// bf16 [k], powers of two by which channels count.
    pub channels: u64,
}

/// Parameters of `portable_patchify`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct PatchifyParams {
    /// u8 [images][side][side][3].
    pub images: u64,
    /// bf16 [images · tokens][ld].
    pub patches: u64,
    /// Pixels.
    pub side: u32,
    /// Pixels.
    pub patch: u32,
    /// Elements from one patch to the next.
    pub ld: u32,
    /// 0
    pub pad: u32,
}

/// Parameters of `portable_embed`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct EmbedParams {
    /// All prefix rows of every sample.
    pub out: View,
    /// u32 [samples][slots].
    pub tokens: u64,
    /// bf16 [vocab][width].
    pub table: u64,
    /// u32 [samples][2].
    pub lengths: u64,
    /// Prompt slots.
    pub slots: u32,
    /// Columns.
    pub width: u32,
    /// Rows of a camera.
    pub image_tokens: u32,
    /// √width
    pub scale: f32,
}

/// `Mask` of `portable_attention`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Mask {
    /// Every key of the group.
    All = 0,
    /// Keys below the prefix length.
    Prefix = 1,
    /// Those, and the suffix.
    Suffix = 2,
}

/// Parameters of `portable_attention`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct AttentionParams {
    /// Queries.
    pub q: View,
    /// Keys.
    pub k: View,
    /// Values.
    pub v: View,
    /// Destination.
    pub out: View,
    /// u32 [samples][2].
    pub lengths: u64,
    /// Query heads.
    pub heads: u32,
    /// 1 or `heads`.
    pub kv_heads: u32,
    /// Width of a head, at most 256.
    pub head_dim: u32,
    /// Query rows of all groups.
    pub rows: u32,
    /// [`Mask`]
    pub mask: u32,
    /// Tokens of a camera.
    pub image_tokens: u32,
    /// Suffix: prefix slots of the cache.
    pub prefix_rows: u32,
    /// Suffix: 1 if query row 0 is the state token.
    pub state_row: u32,
    /// Of q·kᵀ.
    pub scale: f32,
    /// 0
    pub pad: u32,
}

/// Parameters of `portable_guide`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct GuideParams {
    /// x, updated in place.
    pub out: View,
    /// f32 [rows][n]
    pub y: u64,
    /// f32 [rows][n]
    pub chunk: u64,
    /// f32 [rows]
    pub weights: u64,
    /// f32 [rows / period]
    pub limits: u64,
    /// Columns.
    pub n: u32,
    /// Rows of a sample.
    pub period: u32,
    /// t
    pub time: f32,
    /// Guidance before its limit.
    pub strength: f32,
    /// −dt
    pub pull: f32,
    /// 0
    pub pad: u32,
}

const _: () = assert!(size_of::<View>() == 32);
const _: () = assert!(size_of::<Output>() == 168);
const _: () = assert!(size_of::<LinearParams>() == 32 + 8 + 24 + 168);
const _: () = assert!(size_of::<RimParams>() == 32 + 16 + 16 + 168);
const _: () = assert!(size_of::<NormParams>() == 104);
const _: () = assert!(size_of::<PatchifyParams>() == 32);
const _: () = assert!(size_of::<EmbedParams>() == 72);
const _: () = assert!(size_of::<AttentionParams>() == 176);
const _: () = assert!(size_of::<GuideParams>() == 32 + 4 * 8 + 6 * 4);

/// Widest head `portable_attention` takes.
pub const MAX_HEAD_DIM: usize = 256;
/// Shared memory of `portable_rim` for each column of its rows: 8 rows of f32.
const RIM_COLUMN: usize = 8 * 4;
/// Longest row `portable_rim` takes where a block may have 128 KiB.
const MAX_RIM_COLUMNS: usize = 4096;

const LARGE_SHARED: u32 = 4 * (128 + 128) * (32 * 2 + 16);
const SMALL_SHARED: u32 = 6 * (16 + 32) * (128 * 2 + 16);
/// Up to here the tile of 16 rows wins: weights are read once per 16 rows from L2.
const SMALL_ROWS: u32 = 48;

/// Longest row of `portable_rim` where a block may have so much shared memory: 163 KiB on an A100,
/// 227 on Hopper, 99 on the other GPUs from Ampere on.
const fn rim_columns(shared_bytes: u32) -> usize {
    let fit = shared_bytes as usize / RIM_COLUMN;
    if fit < MAX_RIM_COLUMNS { fit } else { MAX_RIM_COLUMNS }
}

// Products of f32 read rows of the expert's width, 1024. The others' tiles fit, too.
const _: () = assert!(rim_columns(99 << 10) >= 1024 && rim_columns(163 << 10) == MAX_RIM_COLUMNS);
const _: () = assert!(LARGE_SHARED <= 99 << 10 && SMALL_SHARED <= 99 << 10);

/// The loaded kernels.
pub struct Portable {
    large: Function,
    small: Function,
    rim: Function,
    norm: Function,
    patchify: Function,
    embed: Function,
    attention: Function,
    guide: Function,
    rim_columns: usize,
}

impl Portable {
    /// Loads them.
    pub fn load(context: &Arc<Context>) -> Result<Self, BackendError> {
        let linear = cubins::load(context, "portable_linear")?;
        let rows = cubins::load(context, "portable_rows")?;
        let rim = cubins::load(context, "portable_rim")?;
        let attention = cubins::load(context, "portable_attention")?;
        let guide = cubins::load(context, "portable_guide")?;
        let rim_columns = rim_columns(context.properties.shared_bytes);
        Ok(Portable {
            large: linear.function("portable_linear_large", LARGE_SHARED as usize)?,
            small: linear.function("portable_linear_small", SMALL_SHARED as usize)?,
            rim: rim.function("portable_rim", RIM_COLUMN * rim_columns)?,
            norm: rows.function("portable_norm", 0)?,
            patchify: rows.function("portable_patchify", 0)?,
            embed: rows.function("portable_embed", 0)?,
            attention: attention.function("portable_attention", 0)?,
            guide: guide.function("portable_guide", 0)?,
            rim_columns,
        })
    }

    /// Longest row [`Portable::rim`] takes here.
    pub fn rim_columns(&self) -> usize {
        self.rim_columns
    }

    /// A product over bf16 rows, which may hold E4M3 numbers.
    pub fn linear(&self, p: LinearParams) -> Launch {
        let (function, tile, threads, shared_bytes) = if p.rows <= SMALL_ROWS {
            (&self.small, (16, 32), 64, SMALL_SHARED)
        } else {
            (&self.large, (128, 128), 256, LARGE_SHARED)
        };
        let grid = [p.rows.div_ceil(tile.0), p.packed_n.div_ceil(tile.1), 1];
        let launch = Launch::new(function.clone(), grid, threads, vec![Arg::of(&p)]);
        Launch { shared_bytes, dependent: true, ..launch }
    }

    /// A product in f32.
    pub fn rim(&self, p: RimParams) -> Launch {
        let grid = [p.rows.div_ceil(8), p.output.n.div_ceil(8), 1];
        let launch = Launch::new(self.rim.clone(), grid, 256, vec![Arg::of(&p)]);
        Launch { shared_bytes: RIM_COLUMN as u32 * p.k, dependent: true, ..launch }
    }

    /// Rows normalised into bf16.
    pub fn norm(&self, p: NormParams) -> Launch {
        let grid = [p.rows.div_ceil(4), 1, 1];
        let launch = Launch::new(self.norm.clone(), grid, 128, vec![Arg::of(&p)]);
        Launch { dependent: true, ..launch }
    }

    /// Images to patches.
    pub fn patchify(&self, p: PatchifyParams, images: u32) -> Launch {
        let tokens = (p.side / p.patch).pow(2);
        let args = vec![Arg::of(&p)];
        let launch = Launch::new(self.patchify.clone(), [images * tokens, 1, 1], 128, args);
        Launch { dependent: true, ..launch }
    }

    /// Prompt tokens to stream rows.
    pub fn embed(&self, p: EmbedParams, samples: u32) -> Launch {
        let grid = [p.out.count - p.image_tokens, samples, 1];
        let launch = Launch::new(self.embed.clone(), grid, 128, vec![Arg::of(&p)]);
        Launch { dependent: true, ..launch }
    }

    /// The Euler step of real-time chunking over `rows` rows of a product.
    pub fn guide(&self, p: GuideParams, rows: u32) -> Launch {
        let launch = Launch::new(self.guide.clone(), [rows, 1, 1], 128, vec![Arg::of(&p)]);
        Launch { dependent: true, ..launch }
    }

    /// Attention of any shape.
    pub fn attention(&self, p: AttentionParams) -> Launch {
        let grid = [(p.rows * p.heads).div_ceil(4), 1, 1];
        let launch = Launch::new(self.attention.clone(), grid, 128, vec![Arg::of(&p)]);
        Launch { dependent: true, ..launch }
    }
}
