//! Program step → launches of the portable kernels: any shape, any epilogue.

use pirouette_model::BackendError;
use pirouette_model::fp8::{self, Matrix, MlpScales};
use pirouette_model::program::{
    Attention, Epilogue, Guidance, KeyMask, Linear, Norm, Op, Positions, Step, View, WeightId,
};
use pirouette_model::weights::Kind;

use crate::bind::Binding;
use crate::driver::Launch;
use crate::layout::row_pitch;
use crate::load::Weights;
use crate::portable::{self, Portable};

/// Appends the launches of one step.
pub fn plan(
    kernels: &Portable,
    weights: &Weights,
    bound: &Binding,
    step: &Step,
    launches: &mut Vec<Launch>,
) -> Result<(), BackendError> {
    let program = &bound.program;
    match &step.op {
        Op::Patchify { images, patches, patch, side } => {
            let params = portable::PatchifyParams {
                images: bound.address(*images),
                patches: bound.address(*patches),
                side: *side as u32,
                patch: *patch as u32,
                ld: bound.pitch(*patches) as u32,
                pad: 0,
            };
            let count = program.buffers[images.0].rows as u32;
            launches.push(kernels.patchify(params, count));
        }
        Op::EmbedTokens { tokens, table, scale, image_tokens, out } => {
            let place = weights.place(*table);
            if place.ld != out.cols {
                return Err(unsupported(step, "the token table's width is no multiple of 8"));
            }
            let params = portable::EmbedParams {
                out: bound.view(out),
                tokens: bound.address(*tokens),
                table: weights.address(*table),
                lengths: bound.lengths(),
                slots: program.buffers[tokens.0].cols as u32,
                width: out.cols as u32,
                image_tokens: *image_tokens as u32,
                scale: *scale,
            };
            launches.push(kernels.embed(params, program.shape.batch as u32));
        }
        Op::Linear(linear) => self::linear(kernels, weights, bound, step, linear, launches)?,
        Op::Attention(op) => launches.push(kernels.attention(attention(bound, step, op)?)),
    }
    Ok(())
}

fn unsupported(step: &Step, why: &str) -> BackendError {
    BackendError::Unavailable(format!("no CUDA kernel takes step `{}`: {why}", step.name))
}

/// A product with its norm and its epilogue.
pub fn linear(
    kernels: &Portable,
    weights: &Weights,
    bound: &Binding,
    step: &Step,
    linear: &Linear,
    launches: &mut Vec<Launch>,
) -> Result<(), BackendError> {
    if matches!(linear.epilogue, Epilogue::AddFree { .. }) {
        return Err(unsupported(step, "actions can't be given"));
    }
    let (norm, modulation) = norm_of(weights, linear);
    let rows = (linear.groups * linear.input.count) as u32;
    let k = linear.input.cols as u32;
    let output = output(weights, bound, linear);
    let place = weights.place(linear.weight);
    let weight = weights.address(linear.weight);
    let mut input = bound.view(&linear.input);
    if weights.table.spec(linear.weight).kind != Kind::Matrix {
        if linear.input.cols > kernels.rim_columns() {
            return Err(unsupported(step, "its f32 matrix is too wide"));
        }
        if matches!(linear.epilogue, Epilogue::GeGlu { .. } | Epilogue::Rope { .. }) {
            return Err(unsupported(step, "its epilogue needs paired rows, its matrix is f32"));
        }
        let norm = norm as u32;
        let params =
            portable::RimParams { input, weight, modulation, rows, k, norm, pad: 0, output };
        launches.push(kernels.rim(params));
        launches.extend(guide(kernels, bound, linear));
        return Ok(());
    }
    if norm != portable::Norm::None {
        launches.push(normalise(kernels, weights, bound, linear));
        input = normed_view(bound, linear);
    } else if input.f32 != 0 {
        return Err(unsupported(step, "its input is f32, its matrix is not"));
    }
    let (packed_n, ldw) = (place.rows as u32, place.ld as u32);
    let e4m3 = weights.scales.of(linear.weight).is_some() as u32;
    let params =
        portable::LinearParams { input, weight, rows, k, packed_n, ldw, e4m3, pad: 0, output };
    launches.push(kernels.linear(params));
    launches.extend(guide(kernels, bound, linear));
    Ok(())
}

/// The guided Euler step after its product; no other epilogue has a launch of its own here.
fn guide(kernels: &Portable, bound: &Binding, linear: &Linear) -> Option<Launch> {
    let Epilogue::Guide { out, guidance } = &linear.epilogue else { return None };
    let Guidance { chunk, weights, limits, time, strength, pull } = *guidance;
    let params = portable::GuideParams {
        out: bound.view(out),
        y: bound.product(),
        chunk: bound.address(chunk),
        weights: bound.address(weights),
        limits: bound.address(limits),
        n: out.cols as u32,
        period: out.count as u32,
        time,
        strength,
        pull,
        pad: 0,
    };
    Some(kernels.guide(params, (linear.groups * out.count) as u32))
}

/// The room for a product that another launch finishes, rows one after the other in f32.
fn product_view(bound: &Binding, linear: &Linear, out: &View) -> portable::View {
    let (ld, rows) = (out.cols as u32, (linear.groups * out.count) as u32);
    portable::View {
        base: bound.product(),
        ld,
        stride: rows,
        first: 0,
        count: rows,
        f32: 1,
        pad: 0,
    }
}

/// The launch that leaves norm(x) in the binding's room for it.
pub fn normalise(
    kernels: &Portable,
    weights: &Weights,
    bound: &Binding,
    linear: &Linear,
) -> Launch {
    let (norm, modulation) = norm_of(weights, linear);
    let view = normed_view(bound, linear);
    let scales = weights.scales.of(linear.weight);
    let power = |exponent: fn(&MlpScales) -> i32| {
        scales.map_or(0.0, |(scales, _)| fp8::power(-exponent(scales)))
    };
    let factors = scales.map_or((0, 0), |_| bound.e4m3_factors());
    kernels.norm(portable::NormParams {
        input: bound.view(&linear.input),
        modulation,
        out: view.base,
        rows: view.count,
        k: linear.input.cols as u32,
        ld: view.ld,
        norm: norm as u32,
        e4m3: scales.is_some() as u32,
        gate_scale: power(|s| s.gate),
        up_scale: power(|s| s.up),
        down_scale: power(|s| s.down),
        up: factors.0,
        down: factors.1,
        channels: weights.channels(linear.weight),
    })
}

/// The normalised input, one row after the other.
pub fn normed_view(bound: &Binding, linear: &Linear) -> portable::View {
    let rows = (linear.groups * linear.input.count) as u32;
    let ld = row_pitch(linear.input.cols) as u32;
    portable::View { base: bound.normed(), ld, stride: rows, first: 0, count: rows, f32: 0, pad: 0 }
}

/// The norm and the address of its scale or modulation row.
fn norm_of(weights: &Weights, linear: &Linear) -> (portable::Norm, u64) {
    match linear.norm {
        Norm::None => (portable::Norm::None, 0),
        Norm::Rms { scale } => {
            (portable::Norm::Rms, scale.map_or(0, |scale| weights.address(scale)))
        }
        Norm::Layer { scale } => (portable::Norm::Layer, weights.address(scale)),
        Norm::Adaptive { table, row, .. } => {
            (portable::Norm::Adaptive, table_row(weights, table, row, 3 * linear.input.cols))
        }
    }
}

/// Address of row `row` of an f32 table.
pub fn table_row(weights: &Weights, table: WeightId, row: usize, cols: usize) -> u64 {
    weights.address(table) + (row * cols * 4) as u64
}

/// Where a product goes.
pub fn output(weights: &Weights, bound: &Binding, linear: &Linear) -> portable::Output {
    let n = weights.table.spec(linear.weight).rows;
    let bias = linear.bias.map_or(0, |bias| table_row(weights, bias.table, bias.row, n));
    let mut o = portable::Output {
        bias,
        lengths: bound.lengths(),
        n: n as u32,
        period: linear.input.count as u32,
        image_tokens: bound.program.config.vision.tokens() as u32,
        scale: linear.scale,
        ..Default::default()
    };
    if let Some((_, matrix)) = weights.scales.of(linear.weight) {
        let (up, down) = bound.e4m3_factors();
        o.factors = match matrix {
            Matrix::Up => up,
            Matrix::Down => down,
        };
    }
    let (epilogue, out) = match &linear.epilogue {
        Epilogue::Store { out } => (portable::Epilogue::Store, out),
        Epilogue::StorePosition { out, table } => {
            o.aux = weights.address(*table);
            (portable::Epilogue::StorePosition, out)
        }
        Epilogue::Gelu { out } => (portable::Epilogue::Gelu, out),
        Epilogue::Silu { out } => (portable::Epilogue::Silu, out),
        Epilogue::GeGlu { out } => (portable::Epilogue::GeGlu, out),
        // Refused before; the step of given actions differs from it in given rows alone.
        Epilogue::AddFree { out } => (portable::Epilogue::Add, out),
        Epilogue::Add { out, gate } => {
            // The gate is the last third of its row.
            o.aux = gate.map_or(0, |gate| {
                table_row(weights, gate.table, gate.row, 3 * n) + (2 * n * 4) as u64
            });
            (portable::Epilogue::Add, out)
        }
        Epilogue::Guide { out, .. } => {
            o.epilogue = portable::Epilogue::Store as u32;
            o.out = product_view(bound, linear, out);
            return o;
        }
        Epilogue::Rope { q, k, v, head_dim, positions } => {
            o.aux = bound.rope();
            o.k = bound.view(k);
            o.v = bound.view(v);
            o.q_heads = q.map_or(0, |q| q.cols / head_dim) as u32;
            o.head_dim = *head_dim as u32;
            if let Positions::Suffix { first } = positions {
                o.suffix = 1;
                o.first_position = *first as u32;
            }
            (portable::Epilogue::Rope, q.as_ref().unwrap_or(k))
        }
    };
    o.epilogue = epilogue as u32;
    o.out = bound.view(out);
    o
}

fn attention(
    bound: &Binding,
    step: &Step,
    op: &Attention,
) -> Result<portable::AttentionParams, BackendError> {
    if op.head_dim > portable::MAX_HEAD_DIM {
        return Err(unsupported(step, "its heads are wider than 256"));
    }
    let (mask, prefix_rows, state_row) = match op.mask {
        KeyMask::All => (portable::Mask::All, 0, false),
        KeyMask::Prefix => (portable::Mask::Prefix, 0, false),
        KeyMask::Suffix { prefix_rows, state_row } => {
            (portable::Mask::Suffix, prefix_rows, state_row)
        }
    };
    Ok(portable::AttentionParams {
        q: bound.view(&op.q),
        k: bound.view(&op.k),
        v: bound.view(&op.v),
        out: bound.view(&op.out),
        lengths: bound.lengths(),
        heads: op.heads as u32,
        kv_heads: op.kv_heads as u32,
        head_dim: op.head_dim as u32,
        rows: (op.groups * op.q.count) as u32,
        mask: mask as u32,
        image_tokens: bound.program.config.vision.tokens() as u32,
        prefix_rows: prefix_rows as u32,
        state_row: state_row as u32,
        scale: op.scale,
        pad: 0,
    })
}
