//! Host twin of `kernels/denoise_{product,wide,edge}.cu`: the Euler loop over few rows, on Hopper,
//! and its edge over many.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use pirouette_model::BackendError;

use crate::cubins;
use crate::driver::{Arg, Context, Function, Launch, Swizzle, TensorMap, TensorMapSpec};
use crate::portable;

/// `DenoiseRows`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct Rows {
    /// Matrix rows from one sample to the next.
    pub stride: u32,
    /// First row of a sample.
    pub first: u32,
    /// Rows of a sample.
    pub count: u32,
    /// Elements from one matrix row to the next.
    pub width: u32,
    /// Elements from 32 columns to the next 32.
    pub step: u32,
}

impl Rows {
    /// Rows of a view whose columns begin at its address.
    pub fn of(view: &portable::View) -> Self {
        let portable::View { stride, first, count, ld, .. } = *view;
        Rows { stride, first, count, width: ld, step: COLUMNS }
    }

    /// The same rows in blocks, if such is the matrix's layout.
    pub fn laid(self, in_blocks: bool) -> Self {
        if in_blocks {
            Rows { width: COLUMNS, step: BLOCK_ROWS as u32 * COLUMNS, ..self }
        } else {
            self
        }
    }
}

const COLUMNS: u32 = 32;
/// Rows of a block of 32 columns, the layout in which few-row products read their inputs: a block's
/// rows lie behind each other.
pub const BLOCK_ROWS: usize = 16;

/// Where an element lies in a matrix in blocks.
pub fn block_element(row: usize, column: usize) -> usize {
    let columns = COLUMNS as usize;
    (column / columns * BLOCK_ROWS + row) * columns + column % columns
}

/// `DenoiseProductParams`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct ProductParams {
    /// Packed bf16.
    pub weight: u64,
    /// bf16 rows, behind a norm with its scale in them.
    pub input: u64,
    /// bf16 rows.
    pub out: u64,
    /// Residual stream to add to.
    pub old: u64,
    /// Keys of the cache.
    pub k: u64,
    /// Values of the cache.
    pub v: u64,
    /// f32 [N] or 0.
    pub bias: u64,
    /// f32 [N] or 0.
    pub gate: u64,
    /// f32 [stream rows][64] sums of squares of the stream that `input` is a copy of.
    pub input_sums: u64,
    /// Where the stream is written: f32 [N] scale of the norm that follows, or 0.
    pub next_scale: u64,
    /// `out` times it, or 0.
    pub scaled: u64,
    /// Sums of squares of `out`.
    pub out_sums: u64,
    /// (cos, sin) [positions][128].
    pub rope: u64,
    /// u32 [samples][2].
    pub lengths: u64,
    /// Rows of `input`.
    pub input_rows: Rows,
    /// Rows of `out`.
    pub out_rows: Rows,
    /// Rows of `k` and `v`.
    pub cache_rows: Rows,
    /// Rows of `scaled`.
    pub scaled_rows: Rows,
    /// Rows of work.
    pub rows: u32,
    /// Tokens of a camera.
    pub image_tokens: u32,
    /// Position of a sample's row 0 less its prefix length.
    pub first_position: u32,
    /// Set here: copies of weights under way at a time.
    pub depth: u32,
}

/// `DenoiseEdgeParams`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct EdgeParams {
    /// bf16 stream after the last layer, or 0: no action_out.
    pub stream: u64,
    /// f32 [1024]: 1 + scale of the final adaptive norm, or 0.
    pub norm_scale: u64,
    /// f32 [1024]: its shift, or 0.
    pub norm_shift: u64,
    /// f32 [32][1024].
    pub out_weight: u64,
    /// f32 [32].
    pub out_bias: u64,
    /// f32 [rows][32].
    pub actions: u64,
    /// f32 [32][1024], input-major, or 0: no action_in.
    pub in_weight: u64,
    /// f32 [1024].
    pub in_bias: u64,
    /// bf16 rows that action_in writes.
    pub out: u64,
    /// f32 [samples][32], or 0: no state token.
    pub state: u64,
    /// f32 [32][1024], input-major.
    pub state_weight: u64,
    /// f32 [1024].
    pub state_bias: u64,
    /// bf16 stream for the state token.
    pub state_out: u64,
    /// f32 [1024]: scale of the norm of the first layer, or 0.
    pub next_scale: u64,
    /// What goes to the stream times it, or 0.
    pub scaled: u64,
    /// f32 [stream rows][64].
    pub sums: u64,
    /// Of many rows, instead: float2 [stream rows][16].
    pub stats: u64,
    /// Rows of `stream`.
    pub stream_rows: Rows,
    /// Rows of `out`.
    pub out_rows: Rows,
    /// Rows of `state_out`.
    pub state_rows: Rows,
    /// samples · horizon
    pub rows: u32,
    /// Samples.
    pub samples: u32,
    /// 1: action_in ends in SiLU.
    pub silu: u32,
    /// As [`Rows::width`], of `scaled`; its rows are the stream's.
    pub scaled_width: u32,
    /// As [`Rows::step`].
    pub scaled_step: u32,
    /// Set here: rows of a CTA of many rows.
    pub share: u32,
    /// 0
    pub reserved: u32,
}

/// `DenoiseBesideParams`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct BesideParams {
    /// Attention → stream.
    pub out: ProductParams,
    /// Norm → hidden units.
    pub up: ProductParams,
    /// Hidden units → stream.
    pub down: ProductParams,
    /// The next layer's norm → q, k, v.
    pub qkv: ProductParams,
    /// bf16 queries of this layer.
    pub q: u64,
    /// Its keys.
    pub k: u64,
    /// Its values.
    pub v: u64,
    /// f16 [4][16][2048] scratch.
    pub parts: u64,
    /// (max, sum) [4][16][8] scratch.
    pub part_stats: u64,
    /// A u32 that was 0 once.
    pub arrivals: u64,
    /// Rows of `q`.
    pub q_rows: Rows,
    /// Cache row of the first suffix key.
    pub prefix_rows: u32,
    /// Suffix keys.
    pub suffix_keys: u32,
    /// 1: row 0 sees no suffix key but the first.
    pub state_row: u32,
}

const _: () = assert!(size_of::<BesideParams>() == 4 * 208 + 6 * 8 + 20 + 12);
const _: () = assert!(size_of::<ProductParams>() == 14 * 8 + 80 + 16);
const _: () = assert!(size_of::<EdgeParams>() == 17 * 8 + 60 + 28);

/// What a product ends in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// norm → q, k, v.
    Qkv,
    /// attention → stream.
    Out,
    /// norm → hidden units.
    Up,
    /// hidden units → stream.
    Down,
    /// action_in's output → stream (π0).
    Mlp,
}

/// One kernel of `denoise_product.cu` or, of `denoise_wide.cu`, with a ring.
struct Instance {
    name: &'static str,
    role: Role,
    /// Inputs of the product.
    k: u32,
    /// CTAs that share them.
    cluster: u32,
    /// Groups of 8 rows.
    groups: u32,
    shape: Shape,
}

enum Shape {
    /// Tiles of 16 outputs of a CTA, whose weights all lie in shared memory.
    Few(u32),
    /// Stages of a ring of 128 inputs.
    Wide(u32),
}

const fn few(name: &'static str, role: Role, k: u32, tiles: u32) -> Instance {
    Instance { name, role, k, cluster: k / 1024, groups: 2, shape: Shape::Few(tiles) }
}

const fn wide(name: &'static str, role: Role, [k, cluster, groups, stages]: [u32; 4]) -> Instance {
    Instance { name, role, k, cluster, groups, shape: Shape::Wide(stages) }
}

/// Fastest first among those that take the rows.
const INSTANCES: &[Instance] = &[
    few("denoise_qkv_16", Role::Qkv, 1024, 1),
    few("denoise_o_16", Role::Out, 2048, 1),
    few("denoise_gate_up_16", Role::Up, 1024, 2),
    few("denoise_down_16", Role::Down, 4096, 1),
    few("denoise_mlp_out_16", Role::Mlp, 1024, 1),
    wide("denoise_qkv_24", Role::Qkv, [1024, 2, 3, 4]),
    wide("denoise_o_24", Role::Out, [2048, 4, 3, 4]),
    wide("denoise_gate_up_24", Role::Up, [1024, 1, 3, 4]),
    wide("denoise_down_24", Role::Down, [4096, 8, 3, 4]),
    wide("denoise_mlp_out_24", Role::Mlp, [1024, 8, 3, 4]),
    wide("denoise_qkv_56", Role::Qkv, [1024, 1, 7, 3]),
    wide("denoise_o_56", Role::Out, [2048, 8, 7, 3]),
    wide("denoise_gate_up_56", Role::Up, [1024, 1, 7, 3]),
    wide("denoise_down_56", Role::Down, [4096, 8, 7, 3]),
    wide("denoise_mlp_out_56", Role::Mlp, [1024, 8, 7, 3]),
    wide("denoise_qkv_88", Role::Qkv, [1024, 2, 11, 2]),
    wide("denoise_o_88", Role::Out, [2048, 8, 11, 2]),
    wide("denoise_gate_up_88", Role::Up, [1024, 1, 11, 2]),
    wide("denoise_down_88", Role::Down, [4096, 8, 11, 2]),
    wide("denoise_mlp_out_88", Role::Mlp, [1024, 8, 11, 2]),
];

/// Threads of a few-row product: eight warps compute, one loads weights.
const FEW_THREADS: u32 = 288;
/// Threads of a wide product: four warps compute, one loads, three prepare the norm.
const WIDE_THREADS: u32 = 256;
/// Dynamic shared memory of a kernel beside the prefill: so many keys and values at their pitch.
const BESIDE_ROOM: u32 = BESIDE_SLOTS * BESIDE_PITCH;
const BESIDE_SLOTS: u32 = 416;
const BESIDE_PITCH: u32 = 528;
/// Keys that one of its CTAs takes at most.
const BESIDE_SHARE: u32 = 256;
/// Rows that a CTA of the edge over many takes at most (`kMost`).
const EDGE_ROWS: u32 = 16;
/// Inputs of a stage of a wide product.
const PART: u32 = 128;
/// Copies of 8 KB of weights a block of a few-row product keeps under way: more crowd out the
/// kernel in front.
const fn depth(role: Role) -> u32 {
    match role {
        Role::Up | Role::Down => 4,
        Role::Qkv => 3,
        Role::Out | Role::Mlp => 2,
    }
}

impl Instance {
    fn takes(&self, role: Role, rows: u32) -> bool {
        self.role == role && rows <= self.groups * 8
    }

    /// Outputs of a CTA, its threads and its dynamic shared memory (`Wide::kSmem`).
    fn block(&self) -> (u32, u32, u32) {
        match self.shape {
            Shape::Few(tiles) => (16 * tiles, FEW_THREADS, tiles * (self.k / self.cluster) * 32),
            Shape::Wide(stages) => {
                let stages = stages.min(self.k / self.cluster / PART);
                let stage = PART * 2 * (64 + self.groups * 8);
                let mail = if self.cluster > 1 { 64 * self.groups * 32 } else { 0 };
                (64, WIDE_THREADS, stages * stage + mail + 1024)
            }
        }
    }
}

/// The loaded kernels.
pub struct Denoise {
    context: Arc<Context>,
    products: Vec<Function>,
    edge: Function,
    edge_many: Function,
    beside: Function,
}

impl Denoise {
    /// Loads them; Hopper only.
    pub fn load(context: &Arc<Context>) -> Result<Self, BackendError> {
        let few = cubins::load(context, "denoise_product")?;
        let wide = cubins::load(context, "denoise_wide")?;
        let edge = cubins::load(context, "denoise_edge")?;
        let function = |i: &Instance| {
            let (_, _, shared) = i.block();
            match i.shape {
                Shape::Few(_) => few.function(i.name, shared as usize),
                Shape::Wide(_) => wide.function(i.name, shared as usize),
            }
        };
        Ok(Denoise {
            context: context.clone(),
            products: INSTANCES.iter().map(function).collect::<Result<_, _>>()?,
            edge: edge.function("denoise_edge", 0)?,
            edge_many: edge.function("denoise_edge_many", 0)?,
            beside: cubins::load(context, "denoise_beside")?
                .function("denoise_beside", BESIDE_ROOM as usize)?,
        })
    }

    /// Whether a loop of so many rows per step runs on these kernels: all of it or nothing, since
    /// they hand each other sums of squares.
    pub fn takes(rows: u32) -> bool {
        let roles = [Role::Qkv, Role::Out, Role::Up, Role::Down, Role::Mlp];
        let served = |role| INSTANCES.iter().any(|i| i.takes(role, rows));
        roles.into_iter().all(served)
    }

    /// Whether all products of a loop of so many rows are those that read their inputs in blocks.
    pub fn few(rows: u32) -> bool {
        INSTANCES.iter().filter(|i| matches!(i.shape, Shape::Few(_))).all(|i| rows <= i.groups * 8)
    }

    /// A product of `outputs` rows of weight; `None` when no instance takes it.
    pub fn product(
        &self,
        role: Role,
        outputs: u32,
        mut p: ProductParams,
    ) -> Result<Option<Launch>, BackendError> {
        let Some(at) = INSTANCES.iter().position(|i| i.takes(role, p.rows)) else {
            return Ok(None);
        };
        let i = &INSTANCES[at];
        p.depth = depth(role);
        let mut args = vec![Arg::of(&p)];
        if let Shape::Wide(_) = i.shape {
            args.push(Arg::of(&self.rows(&p, i.k)?));
        }
        let (block, threads, shared_bytes) = i.block();
        let grid = [outputs / block * i.cluster, 1, 1];
        let launch = Launch::new(self.products[at].clone(), grid, threads, args);
        Ok(Some(Launch { shared_bytes, cluster: [i.cluster, 1, 1], dependent: true, ..launch }))
    }

    /// All rows of a product's input, 64 columns at a time.
    fn rows(&self, p: &ProductParams, k: u32) -> Result<TensorMap, BackendError> {
        let Rows { stride, first, count, width, .. } = p.input_rows;
        let row = u64::from(width) * 2;
        let samples = p.rows / count;
        let spec = TensorMapSpec {
            address: p.input + u64::from(first) * row,
            extents: &[k.into(), count.into(), samples.into()],
            strides_bytes: &[row, u64::from(stride) * row],
            boxes: &[64, count, samples],
            swizzle: Swizzle::B128,
        };
        TensorMap::bf16(&self.context, &spec)
    }

    /// CTAs, each with a multiprocessor of its own, that take a layer beside the prefill.
    pub const BESIDE_CTAS: u32 = 4;
    /// Bytes of their scratch: where they meet (as many as lie in front of the rest), the parts of
    /// the attention's statistics, and of its values.
    pub const BESIDE_SCRATCH: [usize; 3] = [256, 4 * 16 * 8 * 8, 4 * 16 * 2048 * 2];

    /// A layer of the first step beside the prefill; `None` for more rows or keys than it takes.
    pub fn beside(&self, p: BesideParams) -> Option<Launch> {
        let keys = Self::BESIDE_CTAS * BESIDE_SHARE;
        if p.out.rows > BLOCK_ROWS as u32 || p.prefix_rows + p.suffix_keys > keys {
            return None;
        }
        let grid = [Self::BESIDE_CTAS, 1, 1];
        let launch = Launch::new(self.beside.clone(), grid, 256, vec![Arg::of(&p)]);
        let (shared_bytes, cluster) = (BESIDE_ROOM, [2, 1, 1]);
        Some(Launch { shared_bytes, cluster, dependent: true, ..launch })
    }

    /// The edge between two Euler steps.
    pub fn edge(&self, p: EdgeParams) -> Launch {
        let states = if p.state == 0 { 0 } else { p.samples };
        let grid = [p.rows + states, 1, 1];
        let launch = Launch::new(self.edge.clone(), grid, 1024, vec![Arg::of(&p)]);
        Launch { dependent: true, ..launch }
    }

    /// The same over many rows: a CTA takes several, as many as let all run at once.
    pub fn edge_many(&self, mut p: EdgeParams) -> Launch {
        let states = if p.state == 0 { 0 } else { p.samples };
        p.share = p.rows.div_ceil(self.context.properties.sms).clamp(1, EDGE_ROWS);
        let grid = [p.rows.div_ceil(p.share) + states.div_ceil(p.share), 1, 1];
        let launch = Launch::new(self.edge_many.clone(), grid, 1024, vec![Arg::of(&p)]);
        Launch { dependent: true, ..launch }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One instance of every role for any rows that the loop may have, within a multiprocessor's
    /// shared memory.
    #[test]
    fn instances_take_all_roles_alike() {
        let roles = [Role::Qkv, Role::Out, Role::Up, Role::Down, Role::Mlp];
        let widest = |role| INSTANCES.iter().filter(|i| i.role == role).map(|i| i.groups).max();
        for role in roles {
            assert_eq!(widest(role), widest(Role::Qkv), "{role:?}");
        }
        assert!(Denoise::takes(1) && Denoise::takes(88) && !Denoise::takes(89));
        for i in INSTANCES {
            let (_, _, shared) = i.block();
            assert!(shared <= 224 << 10, "{}: {shared}", i.name);
        }
    }

    /// Every element has a place of its own, a block begins at a cache line.
    #[test]
    fn blocks_are_complete_and_aligned() {
        let elements = |row| (0..96).map(move |column| block_element(row, column));
        let mut places: Vec<_> = (0..BLOCK_ROWS).flat_map(elements).collect();
        places.sort_unstable();
        assert_eq!(places, (0..BLOCK_ROWS * 96).collect::<Vec<_>>());
        assert_eq!(block_element(0, 32) * 2 % 128, 0);
        let step = Rows::default().laid(true).step as usize;
        assert_eq!(block_element(0, 64), 2 * step);
        let largest = INSTANCES.iter().filter(|i| matches!(i.shape, Shape::Few(_)));
        assert!(largest.map(|i| i.groups as usize * 8).all(|rows| rows <= BLOCK_ROWS));
    }

    /// What the host gives the kernel beside the prefill is what it was compiled for.
    #[test]
    fn the_kernel_beside_has_the_room_it_needs() {
        let source = include_str!("../kernels/denoise_beside.cu");
        for (name, value) in [
            ("kCtas", Denoise::BESIDE_CTAS),
            ("kShare", BESIDE_SHARE),
            ("kKeySlots", BESIDE_SLOTS),
            ("kKeyPitch", BESIDE_PITCH),
        ] {
            assert!(source.contains(&format!("{name} = {value}")), "{name} is not {value}");
        }
    }

    /// The shapes here are those the wide kernels are compiled for.
    #[test]
    fn wide_instances_are_those_of_the_kernel_file() {
        let source = include_str!("../kernels/denoise_wide.cu");
        let listed = source.lines().filter(|line| line.starts_with("  X(")).count();
        let mut found = 0;
        for i in INSTANCES {
            let Shape::Wide(stages) = i.shape else { continue };
            let (name, shape) = (format!("X({},", i.name), [i.k, i.cluster, i.groups, stages]);
            let shape = shape.map(|n| n.to_string()).join(", ") + ")";
            let line = source.lines().find(|line| line.contains(&name));
            assert!(line.is_some_and(|line| line.contains(&shape)), "{name} {shape}: {line:?}");
            found += 1;
        }
        assert_eq!(found, listed);
    }
}
