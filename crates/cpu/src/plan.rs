//! A program → what the workers need to know of each step: places in the arena, kernels, pairs of
//! panels, live rows.

use pirouette_model::arena::{ArenaPlan, plan as plan_arena};
use pirouette_model::program::{
    Attention, Bias, BufferId, Element, Epilogue, Linear, Norm, Op, Program, Stage, Step, View,
};
use pirouette_model::schedule::rope_angles;
use pirouette_model::{Inputs, Shape};

use crate::gemm::attention::AttentionPlan;
use crate::gemm::edges::{EmbedPlan, PatchifyPlan};
use crate::gemm::keys::Stores;
use crate::gemm::product::{Pair, pairs};
use crate::gemm::{Isa, Kernel, Storage};
use crate::weights::{Stored, Weights};

/// Bytes of an element in the arena: activations are f32.
pub(crate) fn element_bytes(element: Element) -> usize {
    match element {
        Element::Activation | Element::F32 | Element::U32 => 4,
        Element::U8 => 1,
    }
}

/// A view's place in the arena, in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    start: usize,
    pitch: usize,
    stride: usize,
    /// Columns.
    pub(crate) cols: usize,
}

impl Place {
    /// A plain matrix.
    pub(crate) fn matrix(start: usize, cols: usize) -> Place {
        Place { start, pitch: cols, stride: 0, cols }
    }

    /// First word of row `row` of a group.
    #[inline(always)]
    pub(crate) fn at(&self, group: usize, row: usize) -> usize {
        self.start + (group * self.stride + row) * self.pitch
    }
}

/// Which rows of which groups are worth computing: those that hold real tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RowSet {
    /// All tokens of each real image.
    Images,
    /// Image tokens of each sample's real cameras.
    Slots,
    /// Real prefix tokens of each sample.
    Prefix,
    /// Everything.
    All { groups: usize, count: usize },
}

/// The rows of a [`RowSet`] in one run.
pub(crate) struct LiveRows {
    /// (group, rows): the first so many rows of each group.
    pub(crate) segments: Vec<(usize, usize)>,
    /// (group, row) of every live row.
    pub(crate) rows: Vec<(u32, u32)>,
}

impl RowSet {
    fn of(step: &Step, groups: usize, count: usize, program: &Program) -> RowSet {
        let (shape, tokens) = (program.shape, program.config.vision.tokens());
        let prefix = shape.prefix_rows(&program.config);
        match step.stage() {
            Stage::Vision if groups == shape.batch * shape.cameras && count == tokens => {
                RowSet::Images
            }
            Stage::Vision if groups == shape.batch && count == shape.cameras * tokens => {
                RowSet::Slots
            }
            Stage::Prefill if groups == shape.batch && count == prefix => RowSet::Prefix,
            _ => RowSet::All { groups, count },
        }
    }

    pub(crate) fn live(self, shape: &Shape, tokens: usize, inputs: &Inputs<'_>) -> LiveRows {
        let cameras = |b: usize| inputs.cameras[b] as usize;
        let samples = 0..shape.batch;
        let segments: Vec<(usize, usize)> = match self {
            RowSet::Images => samples
                .flat_map(|b| (0..cameras(b)).map(move |c| (b * shape.cameras + c, tokens)))
                .collect(),
            RowSet::Slots => samples.map(|b| (b, cameras(b) * tokens)).collect(),
            RowSet::Prefix => {
                samples.map(|b| (b, cameras(b) * tokens + inputs.prompt_len[b] as usize)).collect()
            }
            RowSet::All { groups, count } => (0..groups).map(|g| (g, count)).collect(),
        };
        let rows = segments
            .iter()
            .flat_map(|&(g, count)| (0..count).map(move |i| (g as u32, i as u32)))
            .collect();
        LiveRows { segments, rows }
    }

    /// Most rows a run can have.
    fn most(self, program: &Program) -> usize {
        let (shape, tokens) = (program.shape, program.config.vision.tokens());
        match self {
            RowSet::Images | RowSet::Slots => shape.batch * shape.cameras * tokens,
            RowSet::Prefix => shape.batch * shape.prefix_rows(&program.config),
            RowSet::All { groups, count } => groups * count,
        }
    }
}

/// Cosines and sines of the rotary embedding, `[positions, head_dim / 2]` each.
pub(crate) struct RopeTable {
    pub(crate) half: usize,
    pub(crate) cos: Vec<f32>,
    pub(crate) sin: Vec<f32>,
}

impl RopeTable {
    fn new(positions: usize, head_dim: usize, bf16: bool) -> Self {
        let angles = (0..positions).flat_map(|p| rope_angles(p as u32, head_dim, bf16));
        let (cos, sin) = angles.unzip();
        RopeTable { half: head_dim / 2, cos, sin }
    }
}

/// Destinations of an epilogue.
#[derive(Clone, Copy)]
pub(crate) enum Places {
    One(Place),
    Rope { q: Option<Place>, k: Place, v: Place, table: usize },
}

/// A product, planned.
pub(crate) struct LinearPlan {
    pub(crate) input: Place,
    pub(crate) rows: usize,
    pub(crate) norm: Norm,
    pub(crate) weight: usize,
    /// Of the product.
    pub(crate) scale: f32,
    pub(crate) bias: Option<Bias>,
    pub(crate) epilogue: Epilogue,
    pub(crate) places: Places,
    pub(crate) kernel: Kernel,
    pub(crate) pairs: Vec<Pair>,
    /// The epilogue wants whole rows: sizes that do not fall on panels.
    pub(crate) whole: bool,
    /// How A comes to be packed.
    pub(crate) feeding: Feeding,
}

/// Whether a product packs its result as the next one's A at once, past the arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Feeding {
    Apart,
    /// The result goes to A of the next step, whose weight this is.
    Feeds(usize),
    /// A was packed by the step before.
    Fed,
}

/// A step, planned.
pub(crate) enum StepPlan {
    Patchify(PatchifyPlan),
    Embed(EmbedPlan),
    Linear(LinearPlan),
    Attention(AttentionPlan),
}

/// A program, planned.
pub(crate) struct Plan {
    pub(crate) arena: ArenaPlan,
    pub(crate) steps: Vec<StepPlan>,
    pub(crate) row_sets: Vec<RowSet>,
    pub(crate) ropes: Vec<RopeTable>,
    /// Words of a packed A operand, of which there are two.
    pub(crate) packed_words: usize,
    /// Rows of an E4M3 product.
    pub(crate) power_words: usize,
    /// Words of all packed keys and values.
    pub(crate) store_words: usize,
    /// Words of a worker's own scratch memory.
    pub(crate) scratch_words: usize,
}

/// Finds products whose result only the next product reads, and as it is.
fn feed(program: &Program, steps: &mut [StepPlan]) {
    let mut feeds = vec![None; steps.len()];
    for (at, pair) in steps.windows(2).enumerate() {
        if let [StepPlan::Linear(from), StepPlan::Linear(to)] = pair {
            feeds[at] = from.feeds(to);
        }
    }
    // A buffer with one reader that was not fed has to be written in full, always.
    let whole: Vec<BufferId> = (0..program.buffers.len())
        .map(BufferId)
        .filter(|&buffer| {
            let fed = |at: usize| at > 0 && feeds[at - 1].is_some();
            let mut steps = program.steps.iter().enumerate();
            steps.any(|(at, s)| s.op.reads().contains(&buffer) && !fed(at))
        })
        .collect();
    for at in 0..steps.len() {
        let Some(weight) = feeds[at] else { continue };
        if program.steps[at].op.writes().iter().any(|b| whole.contains(b)) {
            continue;
        }
        if let [StepPlan::Linear(from), StepPlan::Linear(to)] = &mut steps[at..at + 2] {
            from.feeding = Feeding::Feeds(weight);
            to.feeding = Feeding::Fed;
        }
    }
}

impl LinearPlan {
    /// `next`'s weight, if this product could pack its A.
    fn feeds(&self, next: &LinearPlan) -> Option<usize> {
        let (Places::One(out), Epilogue::GeGlu { .. } | Epilogue::Gelu { .. }) =
            (&self.places, self.epilogue)
        else {
            return None;
        };
        let fits = !self.whole
            && *out == next.input
            && self.rows == next.rows
            && next.norm == Norm::None
            && self.kernel.storage == Storage::Bf16
            && next.kernel.storage == Storage::Bf16;
        fits.then_some(next.weight)
    }
}

/// Collects plans.
pub(crate) struct Planner<'a> {
    program: &'a Program,
    weights: &'a Weights,
    isa: Isa,
    plan: Plan,
    stores: Stores,
}

impl<'a> Planner<'a> {
    pub(crate) fn plan(program: &'a Program, weights: &'a Weights, isa: Isa) -> Plan {
        let plan = Plan {
            arena: plan_arena(program, element_bytes, 64),
            steps: Vec::new(),
            row_sets: Vec::new(),
            ropes: Vec::new(),
            packed_words: 0,
            power_words: 0,
            store_words: 0,
            scratch_words: 0,
        };
        let stores = Stores::default();
        let mut planner = Planner { program, weights, isa, plan, stores };
        for step in &program.steps {
            let planned = planner.step(step);
            planner.plan.steps.push(planned);
        }
        planner.plan.store_words = planner.stores.words();
        feed(program, &mut planner.plan.steps);
        planner.plan
    }

    pub(crate) fn place(&self, view: &View) -> Place {
        let cols = self.program.buffers[view.buffer.0].cols;
        Place {
            start: self.start(view.buffer) + view.first * cols + view.col,
            pitch: cols,
            stride: view.stride,
            cols: view.cols,
        }
    }

    fn start(&self, buffer: BufferId) -> usize {
        self.plan.arena.offsets[buffer.0] / 4
    }

    pub(crate) fn row_set(&mut self, step: &Step, groups: usize, count: usize) -> usize {
        let set = RowSet::of(step, groups, count, self.program);
        let known = self.plan.row_sets.iter().position(|s| *s == set);
        known.unwrap_or_else(|| {
            self.plan.row_sets.push(set);
            self.plan.row_sets.len() - 1
        })
    }

    fn rope(&mut self, head_dim: usize) -> usize {
        let known = self.plan.ropes.iter().position(|r| r.half == head_dim / 2);
        known.unwrap_or_else(|| {
            let (shape, config) = (&self.program.shape, &self.program.config);
            // Suffix positions start after the prefix and may skip the state token.
            let positions = shape.prefix_rows(config) + shape.suffix_rows(config) + 1;
            let longest = self.program.buffers.iter().map(|b| b.rows).max().unwrap_or(0);
            let positions = positions.max(longest.min(1 << 13) + 1);
            self.plan.ropes.push(RopeTable::new(positions, head_dim, config.rope_bf16));
            self.plan.ropes.len() - 1
        })
    }

    fn step(&mut self, step: &Step) -> StepPlan {
        let planned = match &step.op {
            Op::Patchify { images, patches, patch, side } => {
                let tokens = (side / patch) * (side / patch);
                let images_count = self.program.buffers[images.0].rows;
                let cols = self.program.buffers[patches.0].cols;
                let start = self.start(*patches);
                StepPlan::Patchify(PatchifyPlan {
                    patches: Place { start, pitch: cols, stride: tokens, cols },
                    patch: *patch,
                    side: *side,
                    rows: self.row_set(step, images_count, tokens),
                })
            }
            Op::EmbedTokens { table, scale, image_tokens, out, .. } => StepPlan::Embed(EmbedPlan {
                table: table.0,
                scale: *scale,
                image_tokens: *image_tokens,
                prompt_tokens: self.program.shape.prompt_tokens,
                out: self.place(out),
            }),
            Op::Linear(linear) => StepPlan::Linear(self.linear(step, linear)),
            Op::Attention(attention) => StepPlan::Attention(self.attention(step, attention)),
        };
        self.stores.written(&step.op);
        planned
    }

    fn linear(&mut self, step: &Step, l: &Linear) -> LinearPlan {
        let Stored::Matrix(matrix) = &self.weights.stored[l.weight.0] else {
            panic!("step {}: its weight is no matrix", step.name);
        };
        let kernel = Kernel::choose(self.isa, matrix.storage);
        let places = match &l.epilogue {
            Epilogue::Store { out }
            | Epilogue::StorePosition { out, .. }
            | Epilogue::Gelu { out }
            | Epilogue::Silu { out }
            | Epilogue::GeGlu { out }
            | Epilogue::Add { out, .. }
            | Epilogue::AddFree { out }
            | Epilogue::Guide { out, .. } => Places::One(self.place(out)),
            Epilogue::Rope { q, k, v, head_dim, .. } => Places::Rope {
                q: q.as_ref().map(|q| self.place(q)),
                k: self.place(k),
                v: self.place(v),
                table: self.rope(*head_dim),
            },
        };
        let (pairs, whole) = pairs(&l.epilogue, matrix.n);
        let rows = self.row_set(step, l.groups, l.input.count);
        let planned = LinearPlan {
            input: self.place(&l.input),
            rows,
            norm: l.norm,
            weight: l.weight.0,
            scale: l.scale,
            bias: l.bias,
            epilogue: l.epilogue,
            places,
            kernel,
            pairs,
            whole,
            feeding: Feeding::Apart,
        };
        let most = self.plan.row_sets[rows].most(self.program);
        let chunks = kernel.panel_chunks(matrix.chunks());
        // Fewer rows than the most may be cut into taller panels, but never take more words.
        let packed = (most + kernel.rows) * chunks * 16;
        self.plan.packed_words = self.plan.packed_words.max(packed);
        if matrix.meets.is_some() {
            self.plan.power_words = self.plan.power_words.max(most);
        }
        let scratch = planned.scratch_words();
        self.plan.scratch_words = self.plan.scratch_words.max(scratch);
        planned
    }

    fn attention(&mut self, step: &Step, a: &Attention) -> AttentionPlan {
        let storage = self.weights.storage;
        let kernel = Kernel::choose(self.isa, storage);
        let (store, stale_from) = self.stores.store(a, kernel);
        let planned = AttentionPlan {
            rows: self.row_set(step, a.groups, a.q.count),
            heads: a.heads,
            kv_heads: a.kv_heads,
            head_dim: a.head_dim,
            q: self.place(&a.q),
            k: self.place(&a.k),
            v: self.place(&a.v),
            out: self.place(&a.out),
            keys: a.k.count,
            scale: a.scale,
            mask: a.mask,
            kernel,
            store,
            stale_from,
        };
        self.plan.scratch_words = self.plan.scratch_words.max(planned.scratch_words());
        planned
    }
}
