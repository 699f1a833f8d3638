//! Every op × norm × epilogue × mask at sizes that fit no tile, against the plain f64 reference, on
//! every instruction set of this machine and at both precisions.

mod reference;

use std::sync::Arc;

use pirouette_cpu::{Arena, Isa, Options, Precision, load_table};
use pirouette_model::config::{Config, Family, Gemma, Vision};
use pirouette_model::program::{
    Attention, Bias, Buffer, BufferId, Element, Epilogue, Gate, Guidance, KeyMask, Linear, Norm,
    Op, Positions, Program, Role, Shape, Step, View, WeightId,
};
use pirouette_model::weights::{Kind, Recipe, WeightSpec};
use pirouette_model::{Images, Inputs, MemorySource, Previous, Rtc, WeightTable};
use reference::Reference;

const BATCH: usize = 3;
const SLOTS: usize = 2; // cameras
/// With 3 suffix rows the keys of the last sample end on a tile of 32, those of the first within.
const PROMPT: usize = 43;
const IMAGE_TOKENS: usize = 9;
const PREFIX: usize = SLOTS * IMAGE_TOKENS + PROMPT;

/// Reproducible numbers in −1..1.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn many(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.next()).collect()
    }
}

/// A hand-written program whose input is `actions`, `[BATCH · rows, cols]`.
struct Sketch {
    table: WeightTable,
    source: MemorySource,
    buffers: Vec<Buffer>,
    steps: Vec<Step>,
    noise: Noise,
    rows: usize,
}

impl Sketch {
    fn new(rows: usize, cols: usize) -> Self {
        let config = Config {
            family: Family::Pi05,
            vision: Vision { width: 12, depth: 1, mlp: 8, heads: 1, patch: 3, image: 9 },
            prefix: Gemma { width: 8, mlp: 8 },
            expert: Gemma { width: 8, mlp: 8 },
            depth: 1,
            heads: 1,
            head_dim: 8,
            vocab: 11,
            action_dim: cols,
            rope_bf16: false,
            rtc_max_delay: 0,
        };
        let mut table = WeightTable::new(config, 1);
        table.specs.clear();
        let mut sketch = Sketch {
            table,
            source: MemorySource::default(),
            buffers: Vec::new(),
            steps: Vec::new(),
            noise: Noise((rows * 1000 + cols) as u64),
            rows,
        };
        sketch.buffer("actions", BATCH * rows, cols, Element::F32, Role::InOut);
        sketch
    }

    fn buffer(
        &mut self,
        name: &str,
        rows: usize,
        cols: usize,
        element: Element,
        role: Role,
    ) -> BufferId {
        self.buffers.push(Buffer { name: name.into(), rows, cols, element, role });
        BufferId(self.buffers.len() - 1)
    }

    /// Scratch with two rows before and one after those of each group.
    fn padded(&mut self, name: &str, rows: usize, cols: usize) -> View {
        let stride = rows + 3;
        let name = format!("{name}{}", self.buffers.len());
        let element = Element::Activation;
        let buffer = self.buffer(&name, BATCH * stride, cols + 2, element, Role::Scratch);
        View { buffer, col: 1, cols, stride, first: 2, count: rows }
    }

    fn input(&self) -> View {
        let cols = self.buffers[0].cols;
        let (stride, count) = (self.rows, self.rows);
        View { buffer: BufferId(0), col: 0, cols, stride, first: 0, count }
    }

    fn weight(&mut self, rows: usize, cols: usize, kind: Kind) -> WeightId {
        let name = format!("w{}", self.table.specs.len());
        let mut values = self.noise.many(rows * cols);
        if kind == Kind::Matrix {
            let factor = 1.5 / (cols as f32).sqrt();
            values.iter_mut().for_each(|v| *v *= factor);
        }
        self.source.insert(&name, &[rows, cols], &values);
        let recipe = Recipe::Copy(name.clone());
        self.table.specs.push(WeightSpec { name, rows, cols, kind, recipe });
        WeightId(self.table.specs.len() - 1)
    }

    fn push(&mut self, op: Op) {
        self.steps.push(Step { name: format!("test.{}", self.steps.len()), op });
    }

    fn linear(&mut self, input: View, norm: Norm, n: usize, bias: bool, epilogue: Epilogue) {
        let weight = self.weight(n, input.cols, Kind::Matrix);
        let bias = bias.then(|| Bias { table: self.weight(2, n, Kind::Vector), row: 1 });
        let groups = BATCH;
        self.push(Op::Linear(Linear { input, groups, norm, weight, scale: 1.0, bias, epilogue }));
    }

    /// Runs everything everywhere and compares every buffer a step wrote.
    fn check(self, what: &str) {
        let shape = Shape {
            batch: BATCH,
            cameras: SLOTS,
            prompt_tokens: PROMPT,
            horizon: self.rows,
            steps: 1,
            rtc: Rtc::Guided,
        };
        let Sketch { table, source, buffers, steps, mut noise, .. } = self;
        let reference = Reference::load(&table, &source);
        let config = table.config;
        let weights = Arc::new(table.clone());
        let program = Arc::new(Program { config, shape, buffers, steps, weights });
        let images: Vec<u8> = (0..BATCH * SLOTS * 243).map(|i| (i * 89 % 256) as u8).collect();
        let tokens: Vec<u32> = (0..BATCH * PROMPT).map(|i| (i * 7 % 11) as u32).collect();
        let values = noise.many(BATCH * shape.horizon * config.action_dim);
        let chunks = noise.many(values.len());
        // Free rows, rows held fast, and rows in between.
        let weight = |i| if i % 3 == 2 { 0.5 + 0.5 * noise.next() } else { (i % 3) as f32 };
        let weights: Vec<f32> = (0..BATCH * shape.horizon).map(weight).collect();
        let limits = [10.0, 0.0, 1.5];
        let inputs = Inputs {
            images: Images::Packed(&images),
            cameras: &[1, 2, 2],
            tokens: &tokens,
            prompt_len: &[33, 1, 43],
            state: &noise.many(BATCH * config.action_dim),
            noise: &values,
            previous: Some(Previous { chunks: &chunks, weights: &weights, limits: &limits }),
        };
        let mut want: Vec<Vec<Vec<f64>>> = Vec::new();
        reference.run(&program, &inputs, |_, buffers| want.push(buffers.clone()));
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            for (precision, tolerance) in [(Precision::F32, 4e-6), (Precision::Bf16, 3e-2)] {
                let options = Options { precision, threads: Some(2), isa: Some(isa) };
                let loaded = load_table(table.clone(), &source, options, &mut |_, _| {});
                let mut executable = loaded.unwrap().compile_cpu(program.clone()).unwrap();
                let mut actions = vec![0.0; values.len()];
                let mut at = 0;
                let mut before: Vec<Vec<f32>> = Vec::new();
                executable
                    .run_observed(&inputs, &mut actions, &mut |step, arena| {
                        for id in step.op.writes() {
                            let got = arena.floats(id);
                            let what = format!("{what}, {}, {isa:?}, {precision:?}", step.name);
                            let before = before.get(id.0).map(Vec::as_slice);
                            compare(&what, got, &want[at][id.0], before, tolerance);
                        }
                        let ids = (0..program.buffers.len()).map(BufferId);
                        before = ids.map(|id| floats(&program, arena, id)).collect();
                        at += 1;
                    })
                    .unwrap();
                assert_eq!(at, program.steps.len());
            }
        }
    }
}

fn floats(program: &Program, arena: &Arena<'_>, id: BufferId) -> Vec<f32> {
    match program.buffers[id.0].element {
        Element::U8 | Element::U32 => Vec::new(),
        _ => arena.floats(id).to_vec(),
    }
}

/// What the reference never wrote (NaN) must be as it was.
fn compare(what: &str, got: &[f32], want: &[f64], before: Option<&[f32]>, tolerance: f64) {
    assert_eq!(got.len(), want.len());
    let scale = want.iter().fold(1.0f64, |m, w| m.max(w.abs()));
    assert!(want.iter().any(|w| w.abs() > 0.0), "{what}: nothing to compare");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        if want.is_nan() {
            let same = before.is_none_or(|b| b[i].to_bits() == got.to_bits());
            assert!(same, "{what}: element {i} was overwritten with {got}");
            continue;
        }
        let off = (*got as f64 - want).abs();
        assert!(off <= tolerance * scale, "{what}: element {i} is {got}, should be {want}");
    }
}

/// (rows per group, K, N): below a tile, on it, and past it.
const SIZES: [(usize, usize, usize); 5] =
    [(1, 3, 6), (5, 33, 48), (7, 70, 80), (11, 64, 96), (23, 40, 64)];

#[test]
fn norms() {
    for (rows, k, n) in SIZES {
        for which in 0..4 {
            let mut s = Sketch::new(rows, k);
            let norm = match which {
                0 => Norm::None,
                1 => Norm::Rms { scale: None },
                2 => Norm::Layer { scale: s.weight(1, k, Kind::Vector) },
                _ => {
                    let table = s.weight(3, 3 * k, Kind::Vector);
                    Norm::Adaptive { table, row: 2, given_row: None }
                }
            };
            let out = s.padded("out", rows, n);
            s.linear(s.input(), norm, n, which % 2 == 0, Epilogue::Store { out });
            s.check(&format!("{norm:?} {rows}×{k}×{n}"));
        }
    }
}

#[test]
fn epilogues() {
    for (rows, k, n) in SIZES {
        let mut s = Sketch::new(rows, k);
        let table = s.weight(rows, n, Kind::Vector);
        let table_of_gate = s.weight(2, 3 * n, Kind::Vector);
        let gate = Some(Gate { table: table_of_gate, row: 1, given_row: None });
        let stream = s.padded("stream", rows, n);
        let x = s.input();
        s.linear(x, Norm::None, n, false, Epilogue::Store { out: stream });
        s.linear(x, Norm::Rms { scale: None }, n, true, Epilogue::Add { out: stream, gate: None });
        s.linear(x, Norm::None, n, true, Epilogue::Add { out: stream, gate });
        for which in 0..4 {
            let cols = if which == 3 { n / 2 } else { n };
            let out = s.padded("out", rows, cols);
            let epilogue = match which {
                0 => Epilogue::Gelu { out },
                1 => Epilogue::Silu { out },
                2 => Epilogue::StorePosition { out, table },
                _ => Epilogue::GeGlu { out },
            };
            s.linear(stream, Norm::Rms { scale: None }, n, which != 1, epilogue);
        }
        s.check(&format!("epilogues {rows}×{k}×{n}"));
    }
}

#[test]
fn guided_euler_steps() {
    for (rows, cols) in [(1, 3), (5, 16), (7, 33), (11, 32), (23, 48)] {
        let mut s = Sketch::new(rows, cols);
        let mut previous = |name: &str, rows, cols| {
            s.buffer(&format!("previous.{name}"), rows, cols, Element::F32, Role::Input)
        };
        let chunk = previous("chunk", BATCH * rows, cols);
        let weights = previous("weights", BATCH * rows, 1);
        let limits = previous("limits", BATCH, 1);
        for time in [1.0f32, 0.7, 0.05] {
            let strength = pirouette_model::rtc::strength(time);
            let guidance = Guidance { chunk, weights, limits, time, strength, pull: 0.1 };
            let out = s.input();
            s.linear(out, Norm::None, cols, true, Epilogue::Guide { out, guidance });
        }
        s.check(&format!("guided {rows}×{cols}"));
    }
}

/// Rows of given actions take another row of the modulation table and are not stepped.
#[test]
fn given_actions() {
    for (rows, cols) in [(1, 3), (5, 16), (7, 33), (11, 32), (23, 48)] {
        let mut s = Sketch::new(rows, cols);
        s.buffer("previous.weights", BATCH * rows, 1, Element::F32, Role::Input);
        let x = s.input();
        let stream = s.padded("stream", rows, cols);
        let [table, gates] = [0, 1].map(|_| s.weight(3, 3 * cols, Kind::Vector));
        let norm = Norm::Adaptive { table, row: 0, given_row: Some(2) };
        let gate = Some(Gate { table: gates, row: 1, given_row: Some(2) });
        s.linear(x, norm, cols, false, Epilogue::Store { out: stream });
        s.linear(x, norm, cols, true, Epilogue::Add { out: stream, gate });
        s.linear(stream, norm, cols, true, Epilogue::AddFree { out: x });
        s.check(&format!("given {rows}×{cols}"));
    }
}

#[test]
fn rope() {
    for (head_dim, heads) in [(6, 2), (8, 3), (16, 2), (24, 1), (32, 3), (64, 2)] {
        for positions in [Positions::Prefix, Positions::Suffix { first: 1 }] {
            let mut s = Sketch::new(9, 20);
            let q = s.padded("q", 9, heads * head_dim);
            let [k, v, k2, v2] = ["k", "v", "k", "v"].map(|name| s.padded(name, 9, head_dim));
            let rope = |q, k, v| Epilogue::Rope { q, k, v, head_dim, positions };
            let x = s.input();
            s.linear(
                x,
                Norm::Rms { scale: None },
                (heads + 2) * head_dim,
                false,
                rope(Some(q), k, v),
            );
            s.linear(x, Norm::None, 2 * head_dim, true, rope(None, k2, v2));
            s.check(&format!("rope {head_dim} × {heads}, {positions:?}"));
        }
    }
}

#[test]
fn masks_and_heads() {
    for (head_dim, heads, kv_heads) in [(5, 2, 1), (8, 3, 3), (16, 4, 1), (40, 2, 2), (72, 2, 1)] {
        let suffix = 4;
        let masks = [
            KeyMask::All,
            KeyMask::Prefix,
            KeyMask::Suffix { prefix_rows: PREFIX, state_row: false },
            KeyMask::Suffix { prefix_rows: PREFIX, state_row: true },
        ];
        let rows = PREFIX + suffix;
        let mut s = Sketch::new(rows, 20);
        let x = s.input();
        let [k, v] = ["k", "v"].map(|name| s.padded(name, rows, kv_heads * head_dim));
        let q = s.padded("q", rows, heads * head_dim);
        for out in [q, k, v] {
            s.linear(x, Norm::Rms { scale: None }, out.cols, false, Epilogue::Store { out });
        }
        for mask in masks {
            let count = match mask {
                KeyMask::Suffix { .. } => suffix,
                KeyMask::Prefix => 13,
                KeyMask::All => rows,
            };
            let keys = if mask == KeyMask::Prefix { PREFIX } else { rows };
            let out = s.padded("out", count, heads * head_dim);
            let [k, v] = [k, v].map(|view| View { count: keys, ..view });
            let q = View { count, ..q };
            let groups = BATCH;
            let scale = (head_dim as f32).powf(-0.5);
            let a = Attention { groups, heads, kv_heads, head_dim, q, k, v, out, mask, scale };
            s.push(Op::Attention(a));
        }
        // New suffix keys in the last two rows: only they are packed again.
        let late = |view: View| View { first: view.first + rows - 2, count: 2, ..view };
        let two = View { count: 2, ..x };
        for out in [late(k), late(v)] {
            s.linear(two, Norm::None, out.cols, true, Epilogue::Store { out });
        }
        let mask = KeyMask::Suffix { prefix_rows: PREFIX, state_row: false };
        let out = s.padded("out", suffix, heads * head_dim);
        let q = View { count: suffix, ..q };
        let groups = BATCH;
        let scale = (head_dim as f32).powf(-0.5);
        s.push(Op::Attention(Attention {
            groups,
            heads,
            kv_heads,
            head_dim,
            q,
            k,
            v,
            out,
            mask,
            scale,
        }));
        s.check(&format!("attention {heads}/{kv_heads} × {head_dim}"));
    }
}

#[test]
fn a_cache_attended_again_sees_new_rows() {
    let (head_dim, heads, suffix) = (32, 2, 3);
    let rows = PREFIX + suffix;
    let mut s = Sketch::new(rows, 20);
    let x = s.input();
    let [k, v] = ["k", "v"].map(|name| s.padded(name, rows, head_dim));
    let q = s.padded("q", rows, heads * head_dim);
    for from in [0, PREFIX, PREFIX + 1, PREFIX + 1, PREFIX] {
        let count = rows - from;
        let part = |view: View| View { first: view.first + from, count, ..view };
        let (k_new, v_new, q_new) = (part(k), part(v), View { count, ..q });
        let positions = Positions::Suffix { first: 0 };
        let rope = Epilogue::Rope { q: Some(q_new), k: k_new, v: v_new, head_dim, positions };
        let input = View { count, ..x };
        s.linear(input, Norm::Rms { scale: None }, (heads + 2) * head_dim, false, rope);
        let out = s.padded("out", count, heads * head_dim);
        let mask = KeyMask::Suffix { prefix_rows: PREFIX, state_row: from == PREFIX };
        let (groups, kv_heads) = (BATCH, 1);
        let scale = (head_dim as f32).powf(-0.5);
        let a = Attention { groups, heads, kv_heads, head_dim, q: q_new, k, v, out, mask, scale };
        s.push(Op::Attention(a));
    }
    s.check("a growing cache");
}

#[test]
fn pixels_and_tokens() {
    let mut s = Sketch::new(2, 3);
    let (images, side, patch) = (BATCH * SLOTS, 9, 3);
    let pixels = s.buffer("images", images, side * side * 3, Element::U8, Role::Input);
    s.buffer("tokens", BATCH, PROMPT, Element::U32, Role::Input);
    let tokens = BufferId(s.buffers.len() - 1);
    let patches =
        s.buffer("patches", images * IMAGE_TOKENS, 27, Element::Activation, Role::Scratch);
    s.push(Op::Patchify { images: pixels, patches, patch, side });
    let width = 7;
    let table = s.weight(11, width, Kind::TokenTable);
    let out = s.padded("stream", PREFIX, width);
    let scale = 2.5;
    s.push(Op::EmbedTokens { tokens, table, scale, image_tokens: IMAGE_TOKENS, out });
    s.check("edges");
}
