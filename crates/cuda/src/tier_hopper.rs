//! Program step → launches of the Hopper kernels, for models of the full size.

use std::sync::OnceLock;

use pirouette_model::config::Vision;
use pirouette_model::fp8::{self, Matrix};
use pirouette_model::program::{
    Attention as AttentionOp, Bias, BufferId, Epilogue, KeyMask, Linear, Norm, Op, Program, Stage,
    Step, View,
};
use pirouette_model::weights::Kind;
use pirouette_model::{BackendError, Config};

use crate::attention::{
    Attention, EmbedParams, PatchifyParams, PrefillParams, SuffixParams, VisionParams,
};
use crate::bind::Binding;
use crate::denoise::Denoise;
use crate::denoise_pack::{Packed, Packing, Size};
use crate::driver::{Launch, Stream};
use crate::gemm::{Gemm, GemmParams, Operand, RowsE4m3Params};
use crate::gemm_tiles::GemmEpilogue;
use crate::load::Weights;
use crate::portable::Portable;
use crate::tier_beside::Beside;
use crate::tier_loop::{self, LoopPlan};
use crate::tier_portable::table_row;

/// The loaded Hopper kernels, and the loop's weights as they want them.
pub struct Hopper {
    gemm: Gemm,
    attention: Attention,
    denoise: Denoise,
    packing: Packing,
    /// For loops of few rows.
    packed: OnceLock<Packed>,
    /// For loops of many.
    packed_many: OnceLock<Packed>,
}

impl Hopper {
    /// Loads them; needs compute capability 9.0.
    pub fn load(context: &std::sync::Arc<crate::driver::Context>) -> Result<Self, BackendError> {
        Ok(Hopper {
            gemm: Gemm::load(context)?,
            attention: Attention::load(context)?,
            denoise: Denoise::load(context)?,
            packing: Packing::load(context)?,
            packed: OnceLock::new(),
            packed_many: OnceLock::new(),
        })
    }

    /// Whether the kernels were written for these sizes. All steps of vision and prefill go one
    /// way: the products pass each other row statistics, which the portable ones do not write.
    pub fn takes(config: &Config) -> bool {
        let full = Config::pi0();
        let vision = Vision { depth: full.vision.depth, ..config.vision };
        vision == full.vision
            && (config.prefix, config.expert) == (full.prefix, full.expert)
            && (config.heads, config.head_dim) == (full.heads, full.head_dim)
            && config.action_dim == full.action_dim
    }

    /// Bytes of device memory beside the weights proper.
    pub fn packed_bytes(&self) -> u64 {
        let kinds = [&self.packed, &self.packed_many];
        kinds.iter().filter_map(|packed| packed.get()).map(Packed::bytes).sum()
    }

    /// Packs the loop's weights if this program is the first to want them so.
    pub fn prepare(
        &self,
        stream: &Stream,
        weights: &Weights,
        program: &Program,
    ) -> Result<(), BackendError> {
        let (packed, size) = match tier_loop::is_small(program) {
            true => (&self.packed, Size::Few),
            false => (&self.packed_many, Size::Many),
        };
        if packed.get().is_none() {
            let _ = packed.set(self.packing.pack(stream, weights, program, size)?);
        }
        Ok(())
    }

    /// The launches of one step: `None` where the portable tier must serve, an empty list where
    /// another step's launch does the work.
    pub fn plan(
        &self,
        portable: &Portable,
        weights: &Weights,
        bound: &Binding,
        at: usize,
    ) -> Result<Option<Vec<Launch>>, BackendError> {
        let step = &bound.program.steps[at];
        if let (Op::Linear(linear), Stage::Denoise) = (&step.op, step.stage()) {
            let context = LoopPlan { gemm: &self.gemm, portable, weights, bound };
            let planned = match (self.packed.get(), self.packed_many.get()) {
                (Some(packed), _) if tier_loop::is_small(&bound.program) => {
                    context.small(&self.denoise, packed, at, linear)?
                }
                (_, Some(packed)) => context.many(&self.denoise, packed, at, linear)?,
                _ => return Ok(None),
            };
            return Ok(Some(planned));
        }
        self.plan_one(weights, bound, at)
    }

    /// The launches of a program's steps beside its prefill, one for each layer; `None` where a
    /// layer has no kernel.
    pub fn plan_beside(
        &self,
        portable: &Portable,
        weights: &Weights,
        bound: &Binding,
        beside: &Beside,
    ) -> Result<Option<Vec<Launch>>, BackendError> {
        let Some(packed) = self.packed.get() else { return Ok(None) };
        let context = LoopPlan { gemm: &self.gemm, portable, weights, bound };
        let layers = beside.layers.iter();
        layers.map(|&(at, _)| context.beside(&self.denoise, packed, at)).collect()
    }

    fn plan_one(
        &self,
        weights: &Weights,
        bound: &Binding,
        at: usize,
    ) -> Result<Option<Vec<Launch>>, BackendError> {
        let step = &bound.program.steps[at];
        match &step.op {
            Op::Patchify { images, patches, patch, side } => {
                let params = PatchifyParams {
                    images: bound.address(*images),
                    patches: bound.address(*patches),
                    side: *side as u32,
                    patch: *patch as u32,
                    stride: bound.pitch(*patches) as u32,
                    reserved: 0,
                };
                let count = bound.program.buffers[images.0].rows as u32;
                Ok(Some(vec![self.attention.patchify(params, count)]))
            }
            Op::EmbedTokens { tokens, table, scale, image_tokens, out } => {
                let norm_scale = next_scale(weights, &bound.program, at, out.buffer);
                let params = EmbedParams {
                    tokens: bound.address(*tokens),
                    lengths: bound.lengths(),
                    table: weights.address(*table),
                    stream: bound.address(out.buffer),
                    scaled: if norm_scale == 0 { 0 } else { bound.scaled(out.buffer) },
                    norm_scale,
                    stats: bound.stats(out.buffer),
                    vocab: weights.place(*table).rows as u32,
                    width: out.cols as u32,
                    prompt_tokens: bound.program.buffers[tokens.0].cols as u32,
                    rows: out.count as u32,
                    image_tokens: *image_tokens as u32,
                    parts: (out.cols / 64) as u32,
                    scale: *scale,
                    reserved: 0,
                };
                let samples = bound.program.shape.batch as u32;
                Ok(Some(vec![self.attention.embed(params, samples)]))
            }
            Op::Linear(linear) => self.tower_product(weights, bound, at, linear).map(Some),
            Op::Attention(op) => {
                Ok(self.attention(bound, step, at, op)?.map(|launch| vec![launch]))
            }
        }
    }

    fn tower_product(
        &self,
        weights: &Weights,
        bound: &Binding,
        at: usize,
        linear: &Linear,
    ) -> Result<Vec<Launch>, BackendError> {
        let input = &linear.input;
        let place = weights.place(linear.weight);
        let k = input.cols as u32;
        let scaled = !matches!(linear.norm, Norm::None | Norm::Rms { scale: None });
        let mut x = Operand {
            address: if scaled { bound.scaled(input.buffer) } else { bound.address(input.buffer) },
            rows: (linear.groups * input.count) as u32,
            cols: k,
            ld: bound.pitch(input.buffer) as u32,
        };
        let w = Operand {
            address: weights.address(linear.weight),
            rows: place.rows as u32,
            cols: k,
            ld: place.ld as u32,
        };
        let mut p = GemmParams {
            bias: linear.bias.map_or(0, |Bias { table, row }| {
                table_row(weights, table, row, weights.table.spec(linear.weight).rows)
            }),
            slots_in: k / 64,
            inv_width: 1.0 / k as f32,
            period: input.count as u32,
            scale: linear.scale,
            ..Default::default()
        };
        if linear.norm != Norm::None {
            p.stats_in = bound.stats(input.buffer);
        }
        if matches!(linear.norm, Norm::Layer { .. }) {
            p.colsum = weights.column_sums(linear.weight);
        }
        let e4m3 = weights.scales.of(linear.weight);
        let mut launches = Vec::new();
        if let Some((scales, matrix)) = e4m3 {
            let (up, down) = bound.e4m3_factors();
            p.stats_in = match matrix {
                Matrix::Up => up,
                Matrix::Down => down,
            };
            if matrix == Matrix::Up {
                launches.push(self.gemm.rows_e4m3(RowsE4m3Params {
                    x: x.address,
                    stats: bound.stats(input.buffer),
                    channels: weights.channels(linear.weight),
                    out: bound.normed(),
                    up,
                    down,
                    rows: x.rows,
                    width: k,
                    ld: x.ld,
                    gate_scale: fp8::power(-scales.gate),
                    up_scale: fp8::power(-scales.up),
                    down_scale: fp8::power(-scales.down),
                }));
                x = Operand { address: bound.normed(), ld: k, ..x };
            }
        }
        let mut to = |out: &View| {
            p.out = bound.address(out.buffer);
            p.out_stride = out.stride as u32;
            p.out_ld = bound.pitch(out.buffer) as u32;
            p.stats_out = bound.stats(out.buffer);
            p.next_scale = next_scale(weights, &bound.program, at, out.buffer);
            p.scaled = if p.next_scale == 0 { 0 } else { bound.scaled(out.buffer) };
        };
        let epilogue = match &linear.epilogue {
            Epilogue::Store { out } => {
                to(out);
                GemmEpilogue::Store
            }
            Epilogue::StorePosition { out, table } => {
                to(out);
                p.aux = weights.address(*table);
                GemmEpilogue::StorePosition
            }
            Epilogue::Gelu { out } => {
                to(out);
                GemmEpilogue::Gelu
            }
            Epilogue::GeGlu { out } => {
                to(out);
                e4m3.map_or(GemmEpilogue::GeGlu, |_| GemmEpilogue::E4m3GeGlu)
            }
            Epilogue::Add { out, .. } => {
                to(out);
                e4m3.map_or(GemmEpilogue::Add, |_| GemmEpilogue::E4m3Add)
            }
            Epilogue::Rope { q, k, v, .. } => {
                if let Some(q) = q {
                    to(q);
                    p.q_cols = q.cols as u32;
                }
                p.stats_out = 0;
                p.aux = bound.turns();
                p.out_k = bound.address(k.buffer);
                p.out_v = bound.address(v.buffer);
                p.kv_stride = k.stride as u32;
                p.kv_ld = bound.pitch(k.buffer) as u32;
                GemmEpilogue::Rope
            }
            Epilogue::Silu { .. } | Epilogue::AddFree { .. } | Epilogue::Guide { .. } => {
                let why = format!("no Hopper kernel takes step `{}`", bound.program.steps[at].name);
                return Err(BackendError::Unavailable(why));
            }
        };
        let beside = bound.program.steps[at].stage() == Stage::Prefill && bound.beside().is_some();
        let spare = if beside { Denoise::BESIDE_CTAS } else { 0 };
        launches.push(self.gemm.product(epilogue, [w, x], p, spare)?);
        Ok(launches)
    }

    fn attention(
        &self,
        bound: &Binding,
        step: &Step,
        at: usize,
        op: &AttentionOp,
    ) -> Result<Option<Launch>, BackendError> {
        let address = |view: &View| bound.view(view).base;
        let groups = op.groups as u32;
        let image_tokens = bound.program.config.vision.tokens() as u32;
        match op.mask {
            KeyMask::All => {
                let params = VisionParams { out: address(&op.out), scale: op.scale, heads: 0 };
                self.attention.vision(params, address(&op.q), groups).map(Some)
            }
            KeyMask::Prefix => {
                let params = PrefillParams {
                    out: address(&op.out),
                    lengths: bound.lengths(),
                    rows: op.q.count as u32,
                    q_stride: op.q.stride as u32,
                    out_stride: op.out.stride as u32,
                    cache_rows: op.k.stride as u32,
                    image_tokens,
                    prefix_rows: op.q.count as u32,
                    ..PrefillParams::default()
                };
                let operands = [address(&op.q), address(&op.k), address(&op.v)];
                self.attention.prefill(params, operands, groups).map(Some)
            }
            KeyMask::Suffix { prefix_rows, state_row } => {
                let out_rows = bound.rows(&op.out);
                let params = SuffixParams {
                    q: address(&op.q),
                    k: address(&op.k),
                    v: address(&op.v),
                    out: address(&op.out),
                    lengths: bound.lengths(),
                    queries: op.q.count as u32,
                    q_stride: op.q.stride as u32,
                    out_stride: op.out.stride as u32,
                    out_width: out_rows.width,
                    out_step: out_rows.step,
                    cache_rows: op.k.stride as u32,
                    prefix_rows: prefix_rows as u32,
                    suffix_keys: (op.k.count - prefix_rows) as u32,
                    image_tokens,
                    key_slots: 0,
                    state_row: state_row as u32,
                    prefix_ready: prefix_is_ready(&bound.program, step, at, op) as u32,
                };
                self.attention.suffix(params, groups)
            }
        }
    }
}

/// What the prefix tower's MLPs hand each other as E4M3.
pub fn e4m3_buffers(program: &Program, weights: &Weights) -> Vec<BufferId> {
    let inputs = program.steps.iter().filter_map(|step| match &step.op {
        Op::Linear(linear) if linear.norm == Norm::None => {
            weights.scales.of(linear.weight).map(|_| linear.input.buffer)
        }
        _ => None,
    });
    let mut found: Vec<BufferId> = inputs.collect();
    found.dedup();
    found
}

/// Address of the scale of the norm that reads a stream next after step `at`; 0 if nothing does, or
/// a product that scales by itself, as those at the loop's rim do.
pub fn next_scale(weights: &Weights, program: &Program, at: usize, stream: BufferId) -> u64 {
    let reader = program.steps[at + 1..].iter().find_map(|step| match &step.op {
        Op::Linear(linear) if linear.input.buffer == stream && linear.norm != Norm::None => {
            Some(linear)
        }
        _ => None,
    });
    let Some(reader) = reader else { return 0 };
    if weights.table.spec(reader.weight).kind == Kind::RimMatrix {
        return 0;
    }
    match reader.norm {
        Norm::Rms { scale: Some(scale) } | Norm::Layer { scale } => weights.address(scale),
        Norm::Adaptive { table, row, .. } => table_row(weights, table, row, 3 * reader.input.cols),
        Norm::None | Norm::Rms { scale: None } => 0,
    }
}

/// Whether the prefix half of the cache was surely written before this step may start early: with
/// dependent launches a kernel's prologue overlaps a few predecessors, never this many.
fn prefix_is_ready(program: &Program, step: &Step, at: usize, op: &AttentionOp) -> bool {
    const FAR: usize = 16;
    let writes_prefix = |s: &Step| match &s.op {
        Op::Linear(Linear { epilogue: Epilogue::Rope { k, .. }, .. }) => {
            s.stage() != step.stage() && k.buffer == op.k.buffer
        }
        _ => false,
    };
    program.steps[..at].iter().rposition(writes_prefix).is_some_and(|writer| at - writer > FAR)
}
