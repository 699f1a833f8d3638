//! A program's buffers bound to device memory: addresses, row pitches, rotation table, scratch.

use std::ops::Range;
use std::sync::Arc;

use pirouette_model::BackendError;
use pirouette_model::arena;
use pirouette_model::program::{
    BufferId, Element, Epilogue, Linear, Norm, Op, Program, Role, View,
};
use pirouette_model::schedule::rope_angles;

use crate::denoise::{BLOCK_ROWS, Denoise, Rows};
use crate::driver::{Context, DeviceMemory, Pinned, Stream};
use crate::layout::row_pitch;
use crate::portable;
use crate::tier_beside::Beside;

/// Bytes of an element on the GPU.
pub fn element_bytes(element: Element) -> usize {
    match element {
        Element::Activation => 2,
        Element::F32 | Element::U32 => 4,
        Element::U8 => 1,
    }
}

const ALIGN: usize = 256;

/// Scratch that does not lie in rows of bf16, since only kernels that want it otherwise touch it.
#[derive(Debug, Default)]
pub struct Forms {
    /// Buffers in blocks of 32 columns and [`BLOCK_ROWS`] rows: the loop's few-row kernels'.
    pub in_blocks: Vec<BufferId>,
    /// Streams whose scaled copies do.
    pub scaled_in_blocks: Vec<BufferId>,
    /// Buffers of E4M3 numbers.
    pub e4m3: Vec<BufferId>,
    /// Whether these lie in bytes, and not in bf16.
    pub e4m3_bytes: bool,
}

/// Buffers of one compiled program.
pub struct Binding {
    /// The program.
    pub program: Arc<Program>,
    /// Inputs and in-outs, copied in and out as one block; its offsets are those of `io_offsets`.
    pub io: DeviceMemory,
    /// Offset of each input or in-out in `io`; `None` for scratch.
    pub io_offsets: Vec<Option<usize>>,
    /// Bytes from the block's start that the host fills.
    pub io_bytes: usize,
    scratch: DeviceMemory,
    scratch_offsets: Vec<usize>,
    pitches: Vec<usize>,
    forms: Forms,
    rope: usize,
    turns: usize,
    normed: usize,
    product: usize,
    sums: usize,
    beside_scratch: usize,
    /// Of each row that an MLP of E4M3 reads, two float2.
    factors: [usize; 2],
    beside: Option<Beside>,
    /// Offset of each residual stream's row statistics.
    stats: Vec<Option<usize>>,
    /// Offset of each residual stream's copy that a norm's scale has multiplied.
    scaled: Vec<Option<usize>>,
}

impl Binding {
    /// Plans and allocates; fills the rotation table and zeroes the scratch.
    pub fn new(
        context: &Arc<Context>,
        stream: &Stream,
        program: Arc<Program>,
        forms: Forms,
        beside: Option<Beside>,
    ) -> Result<Self, BackendError> {
        let (io_offsets, io_bytes) = io_offsets(&program);
        let mut padded = padded_scratch(&program);
        for id in forms.in_blocks.iter().chain(&forms.scaled_in_blocks) {
            padded.buffers[id.0].rows = BLOCK_ROWS;
        }
        for id in forms.e4m3.iter().filter(|_| forms.e4m3_bytes) {
            padded.buffers[id.0].element = Element::U8;
        }
        if let Some(beside) = &beside {
            // They run anywhere from the start on: what they touch lives from there on.
            let early = padded.steps[beside.steps.clone()].to_vec();
            padded.steps.splice(0..0, early);
        }
        let pitches: Vec<usize> = padded.buffers.iter().map(|b| b.cols).collect();
        let plan = arena::plan(&padded, element_bytes, ALIGN);
        let rope_table = rope_table(&program);
        let turn_table = turn_table(&program);
        let rope = plan.bytes.next_multiple_of(ALIGN);
        let turns = (rope + rope_table.len() * 4).next_multiple_of(ALIGN);
        let normed = (turns + turn_table.len() * 4).next_multiple_of(ALIGN);
        let product = (normed + normed_bytes(&program)).next_multiple_of(ALIGN);
        let sums = (product + product_bytes(&program)).next_multiple_of(ALIGN);
        let beside_scratch = (sums + sums_bytes(&program)).next_multiple_of(ALIGN);
        let beside_bytes = beside.as_ref().map_or(0, |_| Denoise::BESIDE_SCRATCH.iter().sum());
        let rows = program.shape.batch * program.shape.prefix_rows(&program.config);
        let up = (beside_scratch + beside_bytes).next_multiple_of(ALIGN);
        let factors = [up, up + rows * 8];
        let (stats, end) = stats_offsets(&program, up + rows * 16);
        let (scaled, bytes) = scaled_offsets(&padded, end);
        let io = DeviceMemory::new(context, "inputs and actions", io_bytes)?;
        let scratch = DeviceMemory::new(context, "activations", bytes)?;
        scratch.fill(stream, 0, bytes, 0)?;
        io.fill(stream, 0, io_bytes, 0)?;
        for (at, table) in [(rope, rope_table), (turns, turn_table)] {
            let mut host = Pinned::new(context, table.len() * 4)?;
            host.as_mut_slice().copy_from_slice(bytemuck::cast_slice(&table));
            scratch.copy_in(stream, at, &host, 0, table.len() * 4)?;
            stream.synchronize()?;
        }
        let scratch_offsets = plan.offsets;
        Ok(Binding {
            program,
            io,
            io_offsets,
            io_bytes,
            scratch,
            scratch_offsets,
            pitches,
            forms,
            rope,
            turns,
            normed,
            product,
            sums,
            beside_scratch,
            factors,
            beside,
            stats,
            scaled,
        })
    }

    /// The block a buffer lies in, and its offset there.
    pub fn locate(&self, id: BufferId) -> (&DeviceMemory, usize) {
        match self.io_offsets[id.0] {
            Some(offset) => (&self.io, offset),
            None => (&self.scratch, self.scratch_offsets[id.0]),
        }
    }

    /// Where the factors of hidden values' rows lie, those of down's product.
    pub fn locate_hidden_factors(&self) -> (&DeviceMemory, Range<usize>) {
        let [up, down] = self.factors;
        (&self.scratch, down..2 * down - up)
    }

    /// Where the images lie in the block of inputs.
    pub fn images(&self) -> Option<Range<usize>> {
        let id = self.program.buffer("images")?;
        let start = self.io_offsets[id.0]?;
        let buffer = &self.program.buffers[id.0];
        Some(start..start + buffer.rows * buffer.cols * element_bytes(buffer.element))
    }

    /// Device address of a buffer.
    pub fn address(&self, id: BufferId) -> u64 {
        let (memory, offset) = self.locate(id);
        memory.address() + offset as u64
    }

    /// Elements from one row of a buffer to the next.
    pub fn pitch(&self, id: BufferId) -> usize {
        match self.io_offsets[id.0] {
            Some(_) => self.program.buffers[id.0].cols,
            None => self.pitches[id.0],
        }
    }

    /// A view as kernels see it.
    pub fn view(&self, view: &View) -> portable::View {
        let element = self.program.buffers[view.buffer.0].element;
        portable::View {
            base: self.address(view.buffer) + (view.col * element_bytes(element)) as u64,
            ld: self.pitch(view.buffer) as u32,
            stride: view.stride as u32,
            first: view.first as u32,
            count: view.count as u32,
            f32: (element == Element::F32) as u32,
            pad: 0,
        }
    }

    /// Whether a buffer lies in blocks and not row by row.
    pub fn in_blocks(&self, id: BufferId) -> bool {
        self.forms.in_blocks.contains(&id)
    }

    /// Whether a buffer holds E4M3 numbers.
    pub fn is_e4m3(&self, id: BufferId) -> bool {
        self.forms.e4m3.contains(&id)
    }

    /// Whether they lie in bytes.
    pub fn in_bytes(&self, id: BufferId) -> bool {
        self.is_e4m3(id) && self.forms.e4m3_bytes
    }

    /// A view's rows as the loop's kernels see them.
    pub fn rows(&self, view: &View) -> Rows {
        Rows::of(&self.view(view)).laid(self.in_blocks(view.buffer))
    }

    /// The same of the stream's scaled copy.
    pub fn scaled_rows(&self, view: &View) -> Rows {
        Rows::of(&self.view(view)).laid(self.forms.scaled_in_blocks.contains(&view.buffer))
    }

    /// `lengths`, u32 [samples][2].
    pub fn lengths(&self) -> u64 {
        self.program.buffer("lengths").map_or(0, |id| self.address(id))
    }

    /// (cos, sin) [positions][head_dim / 2], f32.
    pub fn rope(&self) -> u64 {
        self.scratch.address() + self.rope as u64
    }

    /// Turns per position of each rotary frequency as high and low parts, [head_dim / 2][2] f32.
    pub fn turns(&self) -> u64 {
        self.scratch.address() + self.turns as u64
    }

    /// Row statistics beside a residual stream, float2 [rows][cols / 64]; 0 if it has none.
    pub fn stats(&self, id: BufferId) -> u64 {
        self.stats[id.0].map_or(0, |at| self.scratch.address() + at as u64)
    }

    /// A residual stream's copy that the next norm's scale has multiplied; 0 if it has none.
    pub fn scaled(&self, id: BufferId) -> u64 {
        self.scaled[id.0].map_or(0, |at| self.scratch.address() + at as u64)
    }

    /// Room for the largest normalised input.
    pub fn normed(&self) -> u64 {
        self.scratch.address() + self.normed as u64
    }

    /// Room for the product of a guided Euler step, f32.
    pub fn product(&self) -> u64 {
        self.scratch.address() + self.product as u64
    }

    /// Sums of squares beside the suffix stream, f32 [rows][64].
    pub fn sums(&self) -> u64 {
        self.scratch.address() + self.sums as u64
    }

    /// Scratch of the kernels beside the prefill, all 0 at first.
    pub fn beside_scratch(&self) -> u64 {
        self.scratch.address() + self.beside_scratch as u64
    }

    /// Factors of the products of rows that are E4M3, float2 [rows] each: gate's and up's; down's.
    pub fn e4m3_factors(&self) -> (u64, u64) {
        let [up, down] = self.factors.map(|at| self.scratch.address() + at as u64);
        (up, down)
    }

    /// The steps that may run beside the prefill.
    pub fn beside(&self) -> Option<&Beside> {
        self.beside.as_ref()
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> u64 {
        (self.io.bytes() + self.scratch.bytes()) as u64
    }
}

/// In-outs first, so that the copy out is the block's head.
fn io_offsets(program: &Program) -> (Vec<Option<usize>>, usize) {
    let mut offsets = vec![None; program.buffers.len()];
    let mut bytes = 0;
    for role in [Role::InOut, Role::Input] {
        for (offset, buffer) in offsets.iter_mut().zip(&program.buffers) {
            if buffer.role == role {
                *offset = Some(bytes);
                let size = buffer.rows * buffer.cols * element_bytes(buffer.element);
                bytes += size.next_multiple_of(ALIGN);
            }
        }
    }
    (offsets, bytes)
}

/// The program with scratch rows padded (see [`row_pitch`]) and inputs, which live elsewhere, of no
/// size.
fn padded_scratch(program: &Program) -> Program {
    let mut padded = program.clone();
    for buffer in &mut padded.buffers {
        if buffer.role == Role::Scratch {
            buffer.cols = row_pitch(buffer.cols);
        } else {
            buffer.rows = 0;
        }
    }
    padded
}

fn rope_table(program: &Program) -> Vec<f32> {
    let (config, shape) = (&program.config, &program.shape);
    let positions = shape.prefix_rows(config) + shape.suffix_rows(config);
    (0..positions)
        .flat_map(|p| rope_angles(p as u32, config.head_dim, config.rope_bf16))
        .flat_map(|(cos, sin)| [cos, sin])
        .collect()
}

/// Frequencies of the rotation, 10000^(−2j / head_dim) / 2π, each as a sum of two f32.
fn turn_table(program: &Program) -> Vec<f32> {
    let config = &program.config;
    let turns = (0..config.head_dim / 2).map(|j| {
        let mut inverse = 10000f64.powf(-2.0 * j as f64 / config.head_dim as f64);
        if config.rope_bf16 {
            inverse = half::bf16::from_f64(inverse).to_f64();
        }
        inverse / (2.0 * std::f64::consts::PI)
    });
    turns.flat_map(|t| [t as f32, (t - t as f32 as f64) as f32]).collect()
}

/// Row statistics for every stream that a norm reads, from `at` on; returns the end.
fn stats_offsets(program: &Program, mut at: usize) -> (Vec<Option<usize>>, usize) {
    let mut offsets = vec![None; program.buffers.len()];
    for step in &program.steps {
        let Op::Linear(Linear { input, norm, .. }) = &step.op else { continue };
        if *norm == Norm::None {
            continue;
        }
        let buffer = &program.buffers[input.buffer.0];
        let offset = &mut offsets[input.buffer.0];
        if offset.is_none() && buffer.cols.is_multiple_of(64) {
            at = at.next_multiple_of(ALIGN);
            *offset = Some(at);
            at += buffer.rows * (buffer.cols / 64) * 8;
        }
    }
    (offsets, at)
}

/// A copy of every stream that a norm with a scale reads, from `at` on; returns the end.
fn scaled_offsets(padded: &Program, mut at: usize) -> (Vec<Option<usize>>, usize) {
    let mut offsets = vec![None; padded.buffers.len()];
    for step in &padded.steps {
        let Op::Linear(Linear { input, norm, .. }) = &step.op else { continue };
        let id = input.buffer.0;
        let has_scale = !matches!(norm, Norm::None | Norm::Rms { scale: None });
        if has_scale && offsets[id].is_none() {
            at = at.next_multiple_of(ALIGN);
            offsets[id] = Some(at);
            at += padded.buffers[id].rows * padded.buffers[id].cols * 2;
        }
    }
    (offsets, at)
}

/// Bytes of the largest input that a product behind a norm reads.
fn normed_bytes(program: &Program) -> usize {
    let inputs = program.steps.iter().filter_map(|step| match &step.op {
        Op::Linear(Linear { input, groups, norm, .. }) if *norm != Norm::None => {
            Some(groups * input.count * row_pitch(input.cols) * 2)
        }
        _ => None,
    });
    inputs.max().unwrap_or(0)
}

/// Bytes of the product of a guided Euler step, whose epilogue is a kernel of its own.
fn product_bytes(program: &Program) -> usize {
    let products = program.steps.iter().filter_map(|step| match &step.op {
        Op::Linear(Linear { input, groups, epilogue: Epilogue::Guide { out, .. }, .. }) => {
            Some(groups * input.count * out.cols * 4)
        }
        _ => None,
    });
    products.max().unwrap_or(0)
}

/// Bytes of the sums of squares beside the suffix stream: 64 per row.
fn sums_bytes(program: &Program) -> usize {
    program.buffer("suffix.stream").map_or(0, |id| program.buffers[id.0].rows * 64 * 4)
}
