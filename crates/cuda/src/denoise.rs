//! Host twin of `kernels/denoise_{product,edge}.cu`: the Euler loop over few rows, on Hopper.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use pirouette_model::BackendError;

use crate::cubins;
use crate::driver::{Arg, Context, Function, Launch};
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
}

impl Rows {
    /// Rows of a view whose columns begin at its address.
    pub fn of(view: &portable::View) -> Self {
        Rows { stride: view.stride, first: view.first, count: view.count, width: view.ld }
    }
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
    /// `out` times it, laid out as `out`, or 0.
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
    /// What goes to the stream times it, laid out as the stream, or 0.
    pub scaled: u64,
    /// f32 [stream rows][64].
    pub sums: u64,
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
    /// 0
    pub unused: u32,
}

const _: () = assert!(size_of::<ProductParams>() == 14 * 8 + 48 + 16);
const _: () = assert!(size_of::<EdgeParams>() == 16 * 8 + 48 + 16);

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

/// One instance: 16-row tiles per CTA, inputs of a CTA, CTAs that share K, 8-token groups.
struct Instance {
    name: &'static str,
    role: Role,
    tiles: u32,
    k_slice: u32,
    cluster: u32,
    groups: u32,
}

const fn instance(
    name: &'static str,
    role: Role,
    [tiles, k_slice, cluster, groups]: [u32; 4],
) -> Instance {
    Instance { name, role, tiles, k_slice, cluster, groups }
}

/// Fastest first among those that take the rows.
const INSTANCES: &[Instance] = &[
    instance("denoise_qkv_16", Role::Qkv, [1, 1024, 1, 2]),
    instance("denoise_o_16", Role::Out, [1, 1024, 2, 2]),
    instance("denoise_gate_up_16", Role::Up, [2, 1024, 1, 2]),
    instance("denoise_down_16", Role::Down, [1, 1024, 4, 2]),
    instance("denoise_mlp_out_16", Role::Mlp, [1, 1024, 1, 2]),
    instance("denoise_qkv_32", Role::Qkv, [1, 1024, 1, 4]),
    instance("denoise_o_32", Role::Out, [1, 1024, 2, 4]),
    instance("denoise_gate_up_32", Role::Up, [2, 1024, 1, 4]),
    instance("denoise_down_32", Role::Down, [1, 1024, 4, 4]),
    instance("denoise_mlp_out_32", Role::Mlp, [1, 1024, 1, 4]),
    instance("denoise_qkv_56", Role::Qkv, [2, 1024, 1, 7]),
    instance("denoise_o_56", Role::Out, [1, 1024, 2, 7]),
    instance("denoise_gate_up_56", Role::Up, [4, 1024, 1, 7]),
    instance("denoise_down_56", Role::Down, [1, 1024, 4, 7]),
    instance("denoise_mlp_out_56", Role::Mlp, [1, 1024, 1, 7]),
];

/// Threads of a product: eight warps compute, one loads weights.
const THREADS: u32 = 288;
/// Copies of 8 KB of weights a block keeps under way: more crowd out the kernel in front.
const fn depth(role: Role) -> u32 {
    match role {
        Role::Up => 4,
        Role::Qkv | Role::Down => 3,
        Role::Out | Role::Mlp => 2,
    }
}
const MAX_SHARED: usize = 200 << 10;

impl Instance {
    fn takes(&self, role: Role, rows: u32) -> bool {
        self.role == role && rows <= self.groups * 8
    }
}

/// The loaded kernels.
pub struct Denoise {
    products: Vec<Function>,
    edge: Function,
}

impl Denoise {
    /// Loads them; Hopper only.
    pub fn load(context: &Arc<Context>) -> Result<Self, BackendError> {
        let products = cubins::load(context, "denoise_product")?;
        Ok(Denoise {
            products: INSTANCES
                .iter()
                .map(|i| products.function(i.name, MAX_SHARED))
                .collect::<Result<_, _>>()?,
            edge: cubins::load(context, "denoise_edge")?.function("denoise_edge", 0)?,
        })
    }

    /// Whether a loop of so many rows per step runs on these kernels: all of it or nothing, since
    /// they hand each other sums of squares.
    pub fn takes(rows: u32) -> bool {
        let roles = [Role::Qkv, Role::Out, Role::Up, Role::Down, Role::Mlp];
        let served = |role| INSTANCES.iter().any(|i| i.takes(role, rows));
        roles.into_iter().all(served)
    }

    /// A product of `outputs` rows of weight; `None` when no instance takes it.
    pub fn product(&self, role: Role, outputs: u32, mut p: ProductParams) -> Option<Launch> {
        let at = INSTANCES.iter().position(|i| i.takes(role, p.rows))?;
        let i = &INSTANCES[at];
        p.depth = depth(role);
        let shared_bytes = i.tiles * i.k_slice * 32;
        let grid = [outputs / 16 / i.tiles * i.cluster, 1, 1];
        let args = vec![Arg::of(&p)];
        let launch = Launch::new(self.products[at].clone(), grid, THREADS, args);
        Some(Launch { shared_bytes, cluster: [i.cluster, 1, 1], dependent: true, ..launch })
    }

    /// The edge between two Euler steps.
    pub fn edge(&self, p: EdgeParams) -> Launch {
        let states = if p.state == 0 { 0 } else { p.samples };
        let grid = [p.rows + states, 1, 1];
        let launch = Launch::new(self.edge.clone(), grid, 1024, vec![Arg::of(&p)]);
        Launch { dependent: true, ..launch }
    }
}
