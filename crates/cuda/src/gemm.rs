//! Host twin of `kernels/gemm_{,loop_,e4m3_}sm90.cu`: products of the vision and prefix towers and
//! of an Euler loop of many rows, on Hopper; and of `rows_e4m3.cu`, which makes inputs of some.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use pirouette_model::BackendError;

use crate::cubins;
use crate::driver::{Arg, Context, Function, Launch, Stored, Swizzle, TensorMap, TensorMapSpec};
use crate::gemm_tiles::{GemmEpilogue, MOST_ROWS, TILES, Tile, choose};

/// `gemm::GemmParams`; see there for shapes. Addresses of 0 switch a feature off.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct GemmParams {
    /// f32 [n], packed order.
    pub bias: u64,
    /// f32 [n], the norm's scale in it: LayerNorm only.
    pub colsum: u64,
    /// float2 [rows][slots_in]. E4M3: [rows], factors of the row's products.
    pub stats_in: u64,
    /// float2 [rows of out][n / 64].
    pub stats_out: u64,
    /// Position table, turns, or the loop's gate.
    pub aux: u64,
    /// Destination.
    pub out: u64,
    /// Rope: keys.
    pub out_k: u64,
    /// Rope: values.
    pub out_v: u64,
    /// `out` times `next_scale`, laid out as `out`.
    pub scaled: u64,
    /// f32 [n]: learned scale of the norm that reads `out` next.
    pub next_scale: u64,
    /// Rows of x.
    pub rows: u32,
    /// Rows of W.
    pub n: u32,
    /// Columns of W.
    pub k: u32,
    /// K / 64.
    pub slots_in: u32,
    /// 1 / K.
    pub inv_width: f32,
    /// Rows of a sample or image.
    pub period: u32,
    /// Rows from one sample to the next in `out`.
    pub out_stride: u32,
    /// Elements from one row of `out` to the next.
    pub out_ld: u32,
    /// Rope: columns of q.
    pub q_cols: u32,
    /// Rope: cache rows from one sample to the next.
    pub kv_stride: u32,
    /// Rope: elements from one cache row to the next.
    pub kv_ld: u32,
    /// Token tiles walked before the next weight tile.
    pub group: u32,
    /// StorePosition: multiplies the product.
    pub scale: f32,
    /// Columns of x: k, or half of them, and x is read twice.
    pub x_cols: u32,
    /// LoopRope: u32 [samples][2].
    pub lengths: u64,
    /// LoopRope: tokens of a camera.
    pub image_tokens: u32,
    /// LoopRope: position of row 0 less the prefix's length.
    pub first_position: u32,
}

const _: () = assert!(size_of::<GemmParams>() == 152);

/// `RowsE4m3Params`: normalised rows as E4M3.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct RowsE4m3Params {
    /// bf16 [rows][ld], the norm's learned scale in it.
    pub x: u64,
    /// float2 [rows][width / 64] of the plain stream.
    pub stats: u64,
    /// bf16 [width], powers of two by which channels count.
    pub channels: u64,
    /// E4M3 [rows][width].
    pub out: u64,
    /// float2 [rows]: factors of gate's and up's products.
    pub up: u64,
    /// float2 [rows]: of down's, and 0.
    pub down: u64,
    /// Rows.
    pub rows: u32,
    /// Columns, a multiple of 256, at most 2048.
    pub width: u32,
    /// Elements from one row of x to the next.
    pub ld: u32,
    /// What takes gate's scale out of its product.
    pub gate_scale: f32,
    /// Up's.
    pub up_scale: f32,
    /// Down's.
    pub down_scale: f32,
}

const _: () = assert!(size_of::<RowsE4m3Params>() == 72);

/// A matrix the copy engine reads.
#[derive(Clone, Copy, Debug)]
pub struct Operand {
    /// Device address.
    pub address: u64,
    /// Rows.
    pub rows: u32,
    /// Columns.
    pub cols: u32,
    /// Elements from one row to the next; a multiple of 8, of 16 if they are E4M3.
    pub ld: u32,
}

/// The loaded instances.
pub struct Gemm {
    context: Arc<Context>,
    functions: Vec<Function>,
    rows_e4m3: Function,
}

impl Gemm {
    /// Loads them; Hopper only.
    pub fn load(context: &Arc<Context>) -> Result<Self, BackendError> {
        let towers = cubins::load(context, "gemm_sm90")?;
        let of_loop = cubins::load(context, "gemm_loop_sm90")?;
        let e4m3 = cubins::load(context, "gemm_e4m3_sm90")?;
        let function = |t: &Tile| {
            let module = match t.epilogue {
                epilogue if epilogue.of_loop() => &of_loop,
                epilogue if epilogue.takes_e4m3() => &e4m3,
                _ => &towers,
            };
            module.function(t.name, t.shared_bytes() as usize)
        };
        let functions = TILES.iter().map(function).collect::<Result<_, _>>()?;
        let rows_e4m3 = cubins::load(context, "rows_e4m3")?.function("rows_e4m3", 0)?;
        Ok(Gemm { context: context.clone(), functions, rows_e4m3 })
    }

    /// Normalised rows as E4M3.
    pub fn rows_e4m3(&self, p: RowsE4m3Params) -> Launch {
        let (function, grid) = (self.rows_e4m3.clone(), [p.rows.div_ceil(4), 1, 1]);
        Launch { dependent: true, ..Launch::new(function, grid, 256, vec![Arg::of(&p)]) }
    }

    /// One product y = norm(x) · Wᵀ; `p.out` and friends are set by the caller. It leaves `spare`
    /// multiprocessors alone.
    pub fn product(
        &self,
        epilogue: GemmEpilogue,
        [w, x]: [Operand; 2],
        mut p: GemmParams,
        spare: u32,
    ) -> Result<Launch, BackendError> {
        let sms = self.context.properties.sms - spare;
        (p.rows, p.n, p.k, p.x_cols) = (x.rows, w.rows, w.cols, x.cols);
        if p.rows > MOST_ROWS {
            return Err(BackendError::Unsupported(format!(
                "a product of {} rows: its kernels take {MOST_ROWS}; use smaller batches",
                p.rows
            )));
        }
        let plain = p.stats_out == 0 && p.scaled == 0 && p.out_stride == p.period;
        let chosen = choose(epilogue, [p.rows, p.n, p.k], plain, sms);
        let Some((at, tile)) = chosen else {
            return Err(BackendError::Unavailable(format!(
                "no Hopper product ends in {epilogue:?}"
            )));
        };
        p.group = (8 / tile.cluster[1]).max(1);
        let [w_box, x_box] = if tile.upright { [tile.bn, tile.bm()] } else { [tile.bm(), tile.bn] };
        let stored = if epilogue.takes_e4m3() { Stored::U8 } else { Stored::Bf16 };
        let [w_map, x_map] = [self.map(stored, w, w_box)?, self.map(stored, x, x_box)?];
        let cols = match epilogue {
            GemmEpilogue::Rope => p.q_cols,
            _ => w.rows,
        };
        let out_map = match cols {
            0 => x_map, // keys and values alone
            cols if tile.maps_out() => {
                let out = Operand { address: p.out, rows: x.rows, cols, ld: p.out_ld };
                self.map(Stored::Bf16, out, tile.own() * 8)?
            }
            _ => x_map,
        };
        let size = tile.cluster_size();
        let tiles = tile.tiles(p.rows, p.n);
        let clusters = if tile.cluster[2] > 1 { tiles } else { tiles.min(tile.at_once(sms)) };
        let args = vec![Arg::of(&w_map), Arg::of(&x_map), Arg::of(&out_map), Arg::of(&p)];
        let function = self.functions[at].clone();
        let launch =
            Launch::new(function, [clusters * size, 1, 1], 128 * (1 + tile.consumers), args);
        Ok(Launch { shared_bytes: tile.shared_bytes(), dependent: true, ..launch })
    }

    /// Boxes of 128 bytes × `rows` rows.
    fn map(&self, stored: Stored, m: Operand, rows: u32) -> Result<TensorMap, BackendError> {
        let bytes = match stored {
            Stored::U8 => 1,
            Stored::Bf16 => 2,
        };
        let spec = TensorMapSpec {
            address: m.address,
            extents: &[m.cols as u64, m.rows as u64],
            strides_bytes: &[m.ld as u64 * bytes],
            boxes: &[128 / bytes as u32, rows],
            swizzle: Swizzle::B128,
        };
        TensorMap::new(&self.context, stored, &spec)
    }
}
