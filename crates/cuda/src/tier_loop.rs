//! Euler-loop step → launches on Hopper: the denoise kernels while a step has few rows, tower
//! products beyond.

use pirouette_model::program::{
    BufferId, Epilogue, KeyMask, Linear, Norm, Op, Positions, Program, Stage, View,
};
use pirouette_model::{BackendError, Rtc};

use crate::attention::key_slots;
use crate::bind::{Binding, Forms};
use crate::denoise::{Denoise, EdgeParams, ProductParams, Role, Rows};
use crate::denoise_pack::Packed;
use crate::driver::Launch;
use crate::gemm::{Gemm, GemmParams, Operand};
use crate::gemm_tiles::GemmEpilogue;
use crate::load::Weights;
use crate::portable::Portable;
use crate::tier_hopper::next_scale;
use crate::tier_portable::{self, table_row};

/// Whether the loop runs on the denoise kernels.
pub fn is_small(program: &Program) -> bool {
    let rows = program.shape.batch * program.shape.suffix_rows(&program.config);
    Denoise::takes(rows as u32)
}

/// What the kernels of a loop of few rows hand each other in blocks of columns.
pub fn in_blocks(program: &Program) -> Forms {
    let rows = program.shape.batch * program.shape.suffix_rows(&program.config);
    let mut found = Forms::default();
    if !Denoise::few(rows as u32) {
        return found;
    }
    for step in program.steps.iter().filter(|step| step.stage() == Stage::Denoise) {
        let Op::Linear(linear) = &step.op else { continue };
        let id = linear.input.buffer;
        let to = match (&linear.epilogue, linear.norm) {
            (Epilogue::Rope { .. } | Epilogue::GeGlu { .. }, _) => &mut found.scaled_in_blocks,
            (Epilogue::Add { .. }, Norm::None) => &mut found.in_blocks,
            _ => continue,
        };
        if !to.contains(&id) && fast_writer(program, id) {
            to.push(id);
        }
    }
    found
}

/// Whether what writes a buffer of a small loop is one of its kernels: attention of very many keys
/// is not.
fn fast_writer(program: &Program, id: BufferId) -> bool {
    program.steps.iter().all(|step| match &step.op {
        Op::Attention(attention) if attention.out.buffer == id => match attention.mask {
            KeyMask::Suffix { prefix_rows, .. } => {
                key_slots(prefix_rows, attention.k.count - prefix_rows).is_some()
            }
            _ => false,
        },
        _ => true,
    })
}

/// What planning a step of the loop needs.
pub struct LoopPlan<'a> {
    /// Tower products.
    pub gemm: &'a Gemm,
    /// The guided Euler step.
    pub portable: &'a Portable,
    /// The weights.
    pub weights: &'a Weights,
    /// The buffers.
    pub bound: &'a Binding,
}

impl LoopPlan<'_> {
    /// A step of a loop of few rows.
    pub fn small(
        &self,
        denoise: &Denoise,
        packed: &Packed,
        at: usize,
        linear: &Linear,
    ) -> Result<Vec<Launch>, BackendError> {
        if let Some(launches) = self.at_edge(packed, at, linear, &|p| denoise.edge(p))? {
            return Ok(launches);
        }
        let name = self.bound.program.steps[at].name.as_str();
        let missing =
            || BackendError::Unavailable(format!("no denoise kernel takes step `{name}`"));
        let launch = self.product(denoise, packed, at, linear)?;
        launch.map(|launch| vec![launch]).ok_or_else(missing)
    }

    /// A step at the edge between two Euler steps; `None` if it is none. One edge kernel does
    /// action.out, the Euler step, and the next step's action.in; in front of the first step it
    /// does the state token and action.in. Where the Euler step is guided, action.out and it are
    /// the portable tier's, and the edge kernel does action.in alone.
    fn at_edge(
        &self,
        packed: &Packed,
        at: usize,
        linear: &Linear,
        edge: &dyn Fn(EdgeParams) -> Launch,
    ) -> Result<Option<Vec<Launch>>, BackendError> {
        let name = self.bound.program.steps[at].name.as_str();
        let (step, op) = name.trim_start_matches("denoise.").split_once('.').unwrap_or_default();
        let step: usize = step.trim_start_matches("step").parse().unwrap_or(0);
        let guided = self.bound.program.shape.rtc == Rtc::Guided;
        let params = match op {
            "state" => return Ok(Some(Vec::new())),
            "action.in" if step > 0 && !guided => return Ok(Some(Vec::new())),
            "action.in" => {
                let state = self.linear_named("denoise.step0.state").filter(|_| step == 0);
                self.edge(packed, at, None, Some(linear), state)
            }
            "action.out" if guided => {
                let (portable, weights, bound) = (self.portable, self.weights, self.bound);
                let (step, mut launches) = (&bound.program.steps[at], Vec::with_capacity(2));
                tier_portable::linear(portable, weights, bound, step, linear, &mut launches)?;
                return Ok(Some(launches));
            }
            "action.out" => {
                let next = self.linear_named(&format!("denoise.step{}.action.in", step + 1));
                self.edge(packed, at, Some(linear), next, None)
            }
            _ => return Ok(None),
        };
        Ok(Some(vec![edge(params)]))
    }

    fn linear_named(&self, name: &str) -> Option<&Linear> {
        self.bound.program.steps.iter().find_map(|step| match &step.op {
            Op::Linear(linear) if step.name == name => Some(linear),
            _ => None,
        })
    }

    fn edge(
        &self,
        packed: &Packed,
        at: usize,
        out: Option<&Linear>,
        next: Option<&Linear>,
        state: Option<&Linear>,
    ) -> EdgeParams {
        let (bound, weights) = (self.bound, self.weights);
        let bias = |linear: &Linear| {
            let cols = weights.table.spec(linear.weight).rows;
            linear.bias.map_or(0, |bias| table_row(weights, bias.table, bias.row, cols))
        };
        let shape = &bound.program.shape;
        let mut p = EdgeParams {
            sums: bound.sums(),
            stats: bound.program.buffer("suffix.stream").map_or(0, |id| bound.stats(id)),
            rows: (shape.batch * shape.horizon) as u32,
            samples: shape.batch as u32,
            ..Default::default()
        };
        p.actions = bound.program.buffer("actions").map_or(0, |id| bound.address(id));
        if let Some(linear) = out {
            let stream = &linear.input;
            (p.stream, p.stream_rows) = (bound.view(stream).base, bound.rows(stream));
            p.out_weight = weights.address(linear.weight);
            p.out_bias = bias(linear);
            if let Norm::Adaptive { table, row, .. } = linear.norm {
                p.norm_scale = table_row(weights, table, row, 3 * linear.input.cols);
                p.norm_shift = p.norm_scale + linear.input.cols as u64 * 4;
            }
        }
        if let Some(linear) = next {
            p.in_weight = packed.matrix(linear.weight).unwrap_or(0);
            p.in_bias = bias(linear);
            if let Epilogue::Store { out } | Epilogue::Silu { out } = &linear.epilogue {
                let rows;
                (p.next_scale, p.scaled, rows) = self.scaled(at, out);
                (p.scaled_width, p.scaled_step) = (rows.width, rows.step);
                (p.out, p.out_rows) = (bound.view(out).base, bound.rows(out));
            }
            p.silu = matches!(linear.epilogue, Epilogue::Silu { .. }) as u32;
        }
        if let Some(linear) = state {
            p.state = bound.view(&linear.input).base;
            p.state_weight = packed.matrix(linear.weight).unwrap_or(0);
            p.state_bias = bias(linear);
            if let Epilogue::Store { out } = &linear.epilogue {
                let rows;
                (p.next_scale, p.scaled, rows) = self.scaled(at, out);
                (p.scaled_width, p.scaled_step) = (rows.width, rows.step);
                (p.state_out, p.state_rows) = (bound.view(out).base, bound.rows(out));
            }
        }
        p
    }

    /// The scale of the norm that reads a stream after step `at`, the stream's copy times it and
    /// how the rows of the view lie there; zeros if none reads it.
    fn scaled(&self, at: usize, stream: &View) -> (u64, u64, Rows) {
        match next_scale(self.weights, &self.bound.program, at, stream.buffer) {
            0 => (0, 0, Rows::default()),
            scale => {
                let copy = self.bound.scaled(stream.buffer);
                (scale, copy, self.bound.scaled_rows(stream))
            }
        }
    }

    fn product(
        &self,
        denoise: &Denoise,
        packed: &Packed,
        at: usize,
        linear: &Linear,
    ) -> Result<Option<Launch>, BackendError> {
        let Some((role, params)) = self.params(packed, at, linear) else { return Ok(None) };
        denoise.product(role, self.weights.place(linear.weight).rows as u32, params)
    }

    /// What a product's kernel is told; `None` where none takes it.
    pub fn params(
        &self,
        packed: &Packed,
        at: usize,
        linear: &Linear,
    ) -> Option<(Role, ProductParams)> {
        let (bound, weights) = (self.bound, self.weights);
        let weight = packed.matrix(linear.weight)?;
        let mut p = ProductParams {
            weight,
            input: bound.view(&linear.input).base,
            input_rows: bound.rows(&linear.input),
            input_sums: bound.sums(),
            out_sums: bound.sums(),
            rows: (linear.groups * linear.input.count) as u32,
            lengths: bound.lengths(),
            rope: bound.rope(),
            image_tokens: bound.program.config.vision.tokens() as u32,
            ..Default::default()
        };
        if let Some(bias) = linear.bias {
            p.bias =
                table_row(weights, bias.table, bias.row, weights.table.spec(linear.weight).rows);
        }
        if linear.norm != Norm::None {
            p.input = bound.scaled(linear.input.buffer);
            p.input_rows = bound.scaled_rows(&linear.input);
        }
        match linear.norm {
            Norm::None | Norm::Rms { scale: Some(_) } => {}
            Norm::Adaptive { table, row, .. } => p.bias = packed.bias(linear.weight, table, row)?,
            Norm::Rms { scale: None } | Norm::Layer { .. } => return None,
        }
        let role = match &linear.epilogue {
            Epilogue::Rope { q: Some(q), k, v, positions: Positions::Suffix { first }, .. } => {
                let base = |view| bound.view(view).base;
                (p.out, p.k, p.v) = (base(q), base(k), base(v));
                (p.out_rows, p.cache_rows) = (bound.rows(q), bound.rows(k));
                p.first_position = *first as u32;
                Role::Qkv
            }
            Epilogue::GeGlu { out } => {
                (p.out, p.out_rows) = (bound.view(out).base, bound.rows(out));
                Role::Up
            }
            Epilogue::Store { out } => {
                (p.next_scale, p.scaled, p.scaled_rows) = self.scaled(at, out);
                (p.out, p.out_rows) = (bound.view(out).base, bound.rows(out));
                Role::Mlp
            }
            Epilogue::Add { out, gate } => {
                let cols = out.cols;
                p.gate = gate.map_or(0, |gate| {
                    table_row(weights, gate.table, gate.row, 3 * cols) + (2 * cols * 4) as u64
                });
                (p.next_scale, p.scaled, p.scaled_rows) = self.scaled(at, out);
                (p.out, p.out_rows) = (bound.view(out).base, bound.rows(out));
                p.old = p.out;
                let from_heads = linear.input.cols == bound.program.config.q_dim();
                if from_heads { Role::Out } else { Role::Down }
            }
            _ => return None,
        };
        Some((role, p))
    }

    /// A step of a loop of many rows.
    pub fn many(
        &self,
        denoise: &Denoise,
        packed: &Packed,
        at: usize,
        linear: &Linear,
    ) -> Result<Vec<Launch>, BackendError> {
        if let Some(launches) = self.at_edge(packed, at, linear, &|p| denoise.edge_many(p))? {
            return Ok(launches);
        }
        Ok(vec![self.tower_product(packed, at, linear)?])
    }

    /// A tower product of the loop: the norm of its input from the statistics and the scaled copy
    /// that the writers of the stream left.
    fn tower_product(
        &self,
        packed: &Packed,
        at: usize,
        linear: &Linear,
    ) -> Result<Launch, BackendError> {
        let (bound, weights) = (self.bound, self.weights);
        let (place, input) = (weights.place(linear.weight), bound.view(&linear.input));
        let cols = linear.input.cols as u32;
        let mut x = Operand {
            address: input.base,
            rows: (linear.groups * linear.input.count) as u32,
            cols,
            ld: input.ld,
        };
        let address = weights.address(linear.weight);
        let mut w = Operand { address, rows: place.rows as u32, cols, ld: place.ld as u32 };
        if let Some(split) = packed.matrix(linear.weight) {
            w = Operand { address: split, cols: 2 * cols, ld: 2 * w.ld, ..w };
        }
        let mut p = GemmParams {
            slots_in: cols / 64,
            inv_width: 1.0 / cols as f32,
            period: linear.input.count as u32,
            lengths: bound.lengths(),
            image_tokens: bound.program.config.vision.tokens() as u32,
            ..Default::default()
        };
        if let Some(bias) = linear.bias {
            p.bias = table_row(weights, bias.table, bias.row, w.rows as usize);
        }
        if linear.norm != Norm::None {
            x.address = bound.scaled(linear.input.buffer);
            p.stats_in = bound.stats(linear.input.buffer);
        }
        if let Norm::Adaptive { table, row, .. } = linear.norm {
            p.bias = packed.bias(linear.weight, table, row).unwrap_or(0);
        }
        // Row 0 of what goes out; the stream's copy and statistics begin at the same row.
        let base = |view: &View| {
            let to = bound.view(view);
            to.base + u64::from(to.first * to.ld) * 2
        };
        let stream = |p: &mut GemmParams, out: &View| {
            let (first, cols) = (out.first as u64, out.cols as u64);
            p.next_scale = next_scale(weights, &bound.program, at, out.buffer);
            p.scaled = bound.scaled(out.buffer) + first * cols * 2;
            p.stats_out = bound.stats(out.buffer) + first * (cols / 64) * 8;
            if p.next_scale == 0 {
                p.scaled = 0;
            }
        };
        let (epilogue, out) = match &linear.epilogue {
            Epilogue::Rope { q: Some(q), k, v, positions: Positions::Suffix { first }, .. } => {
                p.q_cols = q.cols as u32;
                p.aux = bound.turns();
                p.first_position = *first as u32;
                (p.out_k, p.out_v) = (base(k), base(v));
                (p.kv_stride, p.kv_ld) = (k.stride as u32, bound.view(k).ld);
                (GemmEpilogue::LoopRope, q)
            }
            Epilogue::GeGlu { out } => (GemmEpilogue::LoopGeGlu, out),
            Epilogue::Add { out, gate } => {
                p.aux = gate.map_or(0, |gate| {
                    let row = table_row(weights, gate.table, gate.row, 3 * out.cols);
                    row + (2 * out.cols * 4) as u64
                });
                stream(&mut p, out);
                (GemmEpilogue::LoopAdd, out)
            }
            Epilogue::Store { out } => {
                stream(&mut p, out);
                (GemmEpilogue::LoopStore, out)
            }
            _ => {
                let name = &bound.program.steps[at].name;
                let why = format!("no tower product of the loop takes step `{name}`");
                return Err(BackendError::Unavailable(why));
            }
        };
        p.out = base(out);
        (p.out_stride, p.out_ld) = (out.stride as u32, bound.view(out).ld);
        self.gemm.product(epilogue, [w, x], p, 0)
    }
}
