//! Every kind of step at odd shapes against an f64 reference: all norms, epilogues, masks, views
//! with gaps, on fresh random inputs and poisoned outputs.

use std::sync::Arc;

use pirouette_cuda::{CudaDevice, Tier};
use pirouette_model::config::{Gemma, Vision};
use pirouette_model::program::{
    Attention, Bias, Buffer, BufferId, Element, Epilogue, Gate, Guidance, KeyMask, Linear, Norm,
    Op, Positions, Program, Role, Step, View, WeightId,
};
use pirouette_model::weights::{Kind, Recipe, WeightSpec};
use pirouette_model::{Config, Family, MemorySource, Rtc, Shape, WeightTable};

use crate::fixture::OwnedInputs;
use crate::reference::{Buffers, Reference};
use crate::{Random, has_gpu, quick, relative_error};

/// bf16 rounding of the normalised input and of the output, up to 2⁻⁹ each and uniformly
/// distributed: 2e-3 over many values, up to 6e-3 over the eight of the smallest case.
const TOLERANCE: f64 = 6e-3;
/// What outputs hold before; of the size of the data, so that a missing write shows.
const POISON: f32 = 0.75;

fn config(head_dim: usize) -> Config {
    Config {
        family: Family::Pi0,
        vision: Vision { width: 24, depth: 1, mlp: 48, heads: 2, patch: 14, image: 28 },
        prefix: Gemma { width: 32, mlp: 64 },
        expert: Gemma { width: 32, mlp: 64 },
        depth: 1,
        heads: 3,
        head_dim,
        vocab: 50,
        action_dim: 5,
        rope_bf16: false,
        rtc_max_delay: 0,
    }
}

const BATCH: usize = 3;
/// Long enough that every row of every case has a rotation.
const HORIZON: usize = 64;
const CAMERAS: [u32; 3] = [2, 1, 2];
const PROMPT_LEN: [u32; 3] = [5, 3, 1];

/// A program of unrelated steps, with the values its buffers start from.
struct Builder {
    random: Random,
    program: Program,
    table: WeightTable,
    source: MemorySource,
    initial: Vec<Vec<f32>>,
}

impl Builder {
    fn new(head_dim: usize) -> Self {
        let config = config(head_dim);
        let shape = Shape {
            batch: BATCH,
            cameras: 2,
            prompt_tokens: 5,
            horizon: HORIZON,
            steps: 1,
            rtc: Rtc::Off,
        };
        let mut table = WeightTable::new(config, 1);
        table.specs.clear();
        let program = Program {
            config,
            shape,
            buffers: Vec::new(),
            steps: Vec::new(),
            weights: Arc::new(table.clone()),
        };
        let mut b = Builder {
            random: Random(11),
            program,
            table,
            source: MemorySource::default(),
            initial: Vec::new(),
        };
        let lengths = CAMERAS.iter().zip(PROMPT_LEN).flat_map(|(c, p)| [*c as f32, p as f32]);
        b.buffer("lengths", BATCH, 2, Element::U32, Role::Input, lengths.collect());
        let noise = vec![0.5; BATCH * HORIZON * 5];
        b.buffer("actions", BATCH * HORIZON, 5, Element::F32, Role::InOut, noise);
        b
    }

    fn buffer(
        &mut self,
        name: &str,
        rows: usize,
        cols: usize,
        element: Element,
        role: Role,
        values: Vec<f32>,
    ) -> BufferId {
        let id = BufferId(self.program.buffers.len());
        self.program.buffers.push(Buffer { name: name.into(), rows, cols, element, role });
        self.initial.push(values);
        id
    }

    fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.random.value()).collect()
    }

    /// A buffer with room around the view: columns left and right, rows before and after.
    fn view(
        &mut self,
        element: Element,
        count: usize,
        cols: usize,
        gaps: bool,
        poison: bool,
    ) -> View {
        let gap = |r: &mut Random, n| if gaps { r.below(n) } else { 0 };
        let r = &mut self.random;
        let (first, behind) = (gap(r, 3), gap(r, 4));
        let (col, right) = (gap(r, 3) * 8, gap(r, 2) * 8);
        let stride = first + count + behind;
        let (rows, width) = (BATCH * stride, col + cols + right);
        let values = if poison { vec![POISON; rows * width] } else { self.values(rows * width) };
        let name = format!("buffer{}", self.program.buffers.len());
        let buffer = self.buffer(&name, rows, width, element, Role::Input, values);
        View { buffer, col, cols, stride, first, count }
    }

    fn weight(&mut self, rows: usize, cols: usize, kind: Kind, scale: f32) -> WeightId {
        let id = WeightId(self.table.specs.len());
        let name = format!("weight{}", id.0);
        let values: Vec<f32> = (0..rows * cols)
            .map(|_| half::bf16::from_f32(self.random.value() * scale).to_f32())
            .collect();
        self.source.insert(&name, &[rows, cols], &values);
        let recipe = Recipe::Copy(name.clone());
        self.table.specs.push(WeightSpec { name, rows, cols, kind, recipe });
        id
    }

    fn vector(&mut self, rows: usize, cols: usize) -> WeightId {
        self.weight(rows, cols, Kind::Vector, 1.0)
    }

    fn push(&mut self, name: String, op: Op) {
        self.program.steps.push(Step { name: format!("denoise.{name}"), op });
    }

    fn linear(&mut self, sizes: (usize, usize, usize), norm: usize, epilogue: usize, rim: bool) {
        let (count, k, n) = sizes;
        let gaps = self.random.below(2) == 1;
        let of_rim = |b: &mut Self| match rim && b.random.below(2) == 1 {
            true => Element::F32,
            false => Element::Activation,
        };
        let element = of_rim(self);
        let input = self.view(element, count, k, gaps, false);
        let norm = match norm {
            0 => Norm::None,
            1 => Norm::Rms { scale: (n % 16 != 8).then(|| self.vector(1, k)) },
            2 => Norm::Layer { scale: self.vector(1, k) },
            _ => Norm::Adaptive { table: self.vector(2, 3 * k), row: 1, given_row: None },
        };
        let element = of_rim(self);
        let out = |b: &mut Self, cols, poison| b.view(element, count, cols, gaps, poison);
        let mut rows = n;
        let epilogue = match epilogue {
            0 => Epilogue::Store { out: out(self, n, true) },
            1 => {
                let table = self.vector(count, n);
                Epilogue::StorePosition { out: out(self, n, true), table }
            }
            2 => Epilogue::Gelu { out: out(self, n, true) },
            3 => Epilogue::Silu { out: out(self, n, true) },
            4 => Epilogue::Add { out: out(self, n, false), gate: None },
            5 => {
                let table = self.vector(3, 3 * n);
                let gate = Some(Gate { table, row: 2, given_row: None });
                Epilogue::Add { out: out(self, n, false), gate }
            }
            6 => {
                rows = 2 * n;
                Epilogue::GeGlu { out: out(self, n, true) }
            }
            kind => {
                let head_dim = self.program.config.head_dim;
                let heads = [3, 0, 3][kind - 7];
                rows = (heads + 2) * head_dim;
                // Whole buffers: where a view begins inside a row, the packed order of heads would
                // not be that of the buffer's columns.
                let out = |b: &mut Self, cols| b.view(element, count, cols, false, true);
                let q = (heads > 0).then(|| out(self, heads * head_dim));
                let positions = match kind {
                    9 => Positions::Suffix { first: 1 },
                    _ => Positions::Prefix,
                };
                let (k, v) = (out(self, head_dim), out(self, head_dim));
                Epilogue::Rope { q, k, v, head_dim, positions }
            }
        };
        let kind = if rim { Kind::RimMatrix } else { Kind::Matrix };
        let weight = self.weight(rows, k, kind, 1.0 / (k as f32).sqrt());
        let bias =
            (self.random.below(2) == 1).then(|| Bias { table: self.vector(2, rows), row: 1 });
        let name = format!("{count}x{k}x{n} {norm:?} {epilogue:?} rim {rim}");
        let scale = [1.0, 0.75][self.random.below(2)];
        let linear = Linear { input, groups: BATCH, norm, weight, scale, bias, epilogue };
        self.push(name, Op::Linear(linear));
    }

    /// A guided Euler step: rows that are free, held fast, and in between.
    fn guide(&mut self, (count, k, n): (usize, usize, usize), time: f32, rim: bool) {
        let input = self.view(Element::Activation, count, k, true, false);
        let out = self.view(Element::F32, count, n, true, false);
        let name = format!("guide{}", self.program.steps.len());
        let buffer = |b: &mut Self, part: &str, rows, cols, values| {
            let name = format!("{name}.{part}");
            b.buffer(&name, rows, cols, Element::F32, Role::Input, values)
        };
        let rows = BATCH * count;
        let values = self.values(rows * n);
        let chunk = buffer(self, "chunk", rows, n, values);
        let values = (0..rows).map(|i| [0.0, 1.0, self.random.unit()][i % 3]).collect();
        let weights = buffer(self, "weights", rows, 1, values);
        let limits = buffer(self, "limits", BATCH, 1, vec![10.0, 0.0, 1.5]);
        let strength = pirouette_model::rtc::strength(time);
        let guidance = Guidance { chunk, weights, limits, time, strength, pull: 0.1 };
        let kind = if rim { Kind::RimMatrix } else { Kind::Matrix };
        let weight = self.weight(n, k, kind, 1.0 / (k as f32).sqrt());
        let bias = Some(Bias { table: self.vector(2, n), row: 1 });
        let epilogue = Epilogue::Guide { out, guidance };
        let (norm, groups, scale) = (Norm::Rms { scale: None }, BATCH, 1.0);
        let linear = Linear { input, groups, norm, weight, scale, bias, epilogue };
        self.push(format!("guide {count}x{k}x{n} at {time} rim {rim}"), Op::Linear(linear));
    }

    fn attention(&mut self, queries: usize, head_dim: usize, shared: bool, mask: KeyMask) {
        let heads = 3;
        let kv_heads = if shared { 1 } else { heads };
        let prefix = self.program.shape.prefix_rows(&self.program.config);
        let keys = match mask {
            KeyMask::All => queries,
            KeyMask::Prefix => prefix,
            KeyMask::Suffix { prefix_rows, .. } => prefix_rows + queries,
        };
        let e = Element::Activation;
        let q = self.view(e, queries, heads * head_dim, true, false);
        let k = self.view(e, keys, kv_heads * head_dim, true, false);
        let v = self.view(e, keys, kv_heads * head_dim, true, false);
        let out = self.view(e, queries, heads * head_dim, true, true);
        let scale = [1.0, 0.3][self.random.below(2)];
        let op = Attention { groups: BATCH, heads, kv_heads, head_dim, q, k, v, out, scale, mask };
        self.push(format!("attention {queries}x{head_dim} {mask:?}"), Op::Attention(op));
    }

    fn edges(&mut self) {
        let config = self.program.config;
        let (side, patch) = (config.vision.image, config.vision.patch);
        let images = BATCH * 2;
        let pixels = (0..images * side * side * 3).map(|_| self.random.below(256) as f32).collect();
        let input =
            self.buffer("images", images, side * side * 3, Element::U8, Role::Input, pixels);
        let (rows, cols) = (images * config.vision.tokens(), config.vision.patch_values());
        let poison = vec![POISON; rows * cols];
        let patches = self.buffer("patches", rows, cols, Element::Activation, Role::Input, poison);
        self.push("patchify".into(), Op::Patchify { images: input, patches, patch, side });

        let ids = (0..BATCH * 5).map(|_| self.random.below(50) as f32).collect();
        let tokens = self.buffer("tokens", BATCH, 5, Element::U32, Role::Input, ids);
        let table = self.weight(50, 32, Kind::TokenTable, 1.0);
        let prefix = self.program.shape.prefix_rows(&config);
        // Rows behind the prompt become zero or stay: the reference leaves them, so they start so.
        let zeros = vec![0.0; BATCH * prefix * 32];
        let stream =
            self.buffer("stream", BATCH * prefix, 32, Element::Activation, Role::Input, zeros);
        let out =
            View { buffer: stream, col: 0, cols: 32, stride: prefix, first: 0, count: prefix };
        let scale = 5.65;
        let image_tokens = config.vision.tokens();
        self.push("embed".into(), Op::EmbedTokens { tokens, table, scale, image_tokens, out });
    }

    fn inputs(&self) -> OwnedInputs {
        let named = |name: &str| self.initial[self.program.buffer(name).unwrap().0].clone();
        OwnedInputs {
            images: named("images").iter().map(|v| *v as u8).collect(),
            cameras: CAMERAS.to_vec(),
            tokens: named("tokens").iter().map(|v| *v as u32).collect(),
            prompt_len: PROMPT_LEN.to_vec(),
            state: vec![0.0; BATCH * 5],
            noise: named("actions"),
        }
    }
}

fn build(head_dim: usize) -> Builder {
    let mut b = Builder::new(head_dim);
    b.edges();
    let sizes = [(1, 8, 8), (5, 24, 40), (11, 56, 72), (37, 588, 24), (50, 96, 136), (1, 13, 5)];
    for (i, sizes) in sizes.into_iter().enumerate() {
        for norm in 0..4 {
            for epilogue in 0..10 {
                b.linear(sizes, norm, epilogue, false);
                if epilogue < 6 && i % 2 == norm % 2 {
                    b.linear(sizes, norm, epilogue, true);
                }
            }
        }
    }
    for (i, time) in [1.0, 0.7, 0.5, 0.05].into_iter().enumerate() {
        b.guide(sizes[i], time, true);
        b.guide(sizes[i], time, i % 2 == 0);
    }
    let prefix = b.program.shape.prefix_rows(&b.program.config);
    for head_dim in [b.program.config.head_dim, 72, 256] {
        for queries in [1, 4, 17] {
            for shared in [true, false] {
                b.attention(queries, head_dim, shared, KeyMask::All);
                b.attention(queries, head_dim, shared, KeyMask::Prefix);
                for state_row in [true, false] {
                    let mask = KeyMask::Suffix { prefix_rows: prefix, state_row };
                    b.attention(queries, head_dim, shared, mask);
                }
            }
        }
    }
    b
}

#[test]
fn every_step_agrees_with_the_reference() {
    if !has_gpu() {
        return;
    }
    let head_dims: &[usize] = if quick() { &[16] } else { &[12, 16, 32] };
    for &head_dim in head_dims {
        check(build(head_dim));
    }
}

fn check(mut b: Builder) {
    b.program.weights = Arc::new(b.table.clone());
    let program = Arc::new(b.program.clone());
    let mut device = CudaDevice::open_for(0, &program, &b.source).unwrap();
    device.set_tier(Tier::Portable);
    let mut executable = device.compile_cuda(program.clone()).unwrap();
    for (buffer, values) in program.buffers.iter().zip(&b.initial) {
        executable.write_buffer(&buffer.name, values).unwrap();
    }
    let inputs = b.inputs();
    let reference = Reference::load(&program.weights, &b.source);
    let mut buffers: Buffers =
        b.initial.iter().map(|v| v.iter().map(|x| *x as f64).collect()).collect();
    reference.run_on(&program, &inputs.borrow(), &mut buffers, &mut |_, _| {});
    executable.run_steps(0..program.steps.len()).unwrap();
    let (mut compared, mut worst, mut failures) = (0, 0.0f64, Vec::new());
    for step in &program.steps {
        for written in step.op.writes() {
            let name = &program.buffers[written.0].name;
            let got = executable.read_buffer(name).unwrap().unwrap();
            let want: Vec<f32> = buffers[written.0].iter().map(|v| *v as f32).collect();
            let error = relative_error(&got, &want);
            compared += 1;
            worst = worst.max(error);
            if error > TOLERANCE {
                failures.push(format!("{} leaves {name} off by {error:.2e}", step.name));
            }
        }
    }
    println!("{compared} buffers of {} steps, worst {worst:.2e}", program.steps.len());
    let shown = failures.iter().take(20).cloned().collect::<Vec<_>>().join("\n");
    assert!(failures.is_empty(), "{} failures:\n{shown}", failures.len());
}
