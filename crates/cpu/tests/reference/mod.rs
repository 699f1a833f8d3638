//! Program → results, the plain way: f64, one buffer per name, NaN until written, one loop per doc
//! comment of `pirouette_model::program`. The fast interpreter is compared with this one.
#![allow(dead_code)]

use pirouette_model::program::{
    Attention, Bias, Epilogue, Gate, KeyMask, Linear, Norm, Op, Positions, Program, Step, View,
    WeightId,
};
use pirouette_model::schedule::rope_angles;
use pirouette_model::{Inputs, TensorSource, WeightTable};

/// All weights of a model in f64.
pub struct Reference {
    pub weights: Vec<Vec<f64>>,
}

/// Values of all buffers, by id.
pub type Buffers = Vec<Vec<f64>>;

impl Reference {
    pub fn load(table: &WeightTable, source: &dyn TensorSource) -> Self {
        let weights = (0..table.specs.len()).map(|id| {
            let rows = table.open(WeightId(id), source).unwrap();
            let mut row = vec![0.0; rows.cols];
            let mut all = Vec::with_capacity(rows.rows * rows.cols);
            for r in 0..rows.rows {
                rows.fill(r, &mut row).unwrap();
                all.extend(row.iter().map(|v| *v as f64));
            }
            all
        });
        Reference { weights: weights.collect() }
    }

    /// Runs all steps; `observe` sees the buffers after each.
    pub fn run(
        &self,
        program: &Program,
        inputs: &Inputs<'_>,
        mut observe: impl FnMut(&Step, &Buffers),
    ) -> Vec<f32> {
        inputs.check(program).unwrap();
        let mut buffers: Buffers =
            program.buffers.iter().map(|b| vec![f64::NAN; b.rows * b.cols]).collect();
        let mut set = |name: &str, values: Vec<f64>| {
            if let Some(id) = program.buffer(name) {
                assert_eq!(buffers[id.0].len(), values.len(), "{name}");
                buffers[id.0] = values;
            }
        };
        set("images", inputs.images.pieces().flatten().map(|v| *v as f64).collect());
        set("tokens", inputs.tokens.iter().map(|v| *v as f64).collect());
        set("state", inputs.state.iter().map(|v| *v as f64).collect());
        set("actions", inputs.noise.iter().map(|v| *v as f64).collect());
        if let Some(p) = inputs.previous {
            set("previous.chunk", p.chunks.iter().map(|v| *v as f64).collect());
            set("previous.weights", p.weights.iter().map(|v| *v as f64).collect());
            set("previous.limits", p.limits.iter().map(|v| *v as f64).collect());
        }
        self.run_on(program, inputs, &mut buffers, &mut observe);
        let actions = program.buffer("actions").unwrap();
        buffers[actions.0].iter().map(|v| *v as f32).collect()
    }

    /// Runs all steps on buffers that the caller filled.
    pub fn run_on(
        &self,
        program: &Program,
        inputs: &Inputs<'_>,
        buffers: &mut Buffers,
        observe: &mut dyn FnMut(&Step, &Buffers),
    ) {
        let run = Run { reference: self, program, inputs };
        for step in &program.steps {
            run.step(step, buffers);
            observe(step, buffers);
        }
    }
}

struct Run<'a> {
    reference: &'a Reference,
    program: &'a Program,
    inputs: &'a Inputs<'a>,
}

impl Run<'_> {
    fn at(&self, v: &View, group: usize, row: usize) -> usize {
        (group * v.stride + v.first + row) * self.program.buffers[v.buffer.0].cols + v.col
    }

    fn prefix_len(&self, sample: usize) -> usize {
        let image_tokens = self.program.config.vision.tokens();
        self.inputs.cameras[sample] as usize * image_tokens
            + self.inputs.prompt_len[sample] as usize
    }

    fn step(&self, step: &Step, buffers: &mut Buffers) {
        match &step.op {
            Op::Patchify { images, patches, patch, side } => {
                let (grid, row) = (side / patch, patch * patch * 3);
                for (i, pixel) in buffers[images.0].clone().into_iter().enumerate() {
                    let (image, rest) = (i / (side * side * 3), i % (side * side * 3));
                    let (y, x, c) = (rest / (side * 3), rest / 3 % side, rest % 3);
                    let at = (image * grid + y / patch) * grid + x / patch;
                    let within = (y % patch * patch + x % patch) * 3 + c;
                    buffers[patches.0][at * row + within] = pixel - 128.0;
                }
            }
            Op::EmbedTokens { table, scale, image_tokens, out, .. } => {
                let prompt = self.program.shape.prompt_tokens;
                for sample in 0..self.inputs.prompt_len.len() {
                    for j in 0..self.inputs.prompt_len[sample] as usize {
                        let token = self.inputs.tokens[sample * prompt + j] as usize;
                        let row = self.inputs.cameras[sample] as usize * image_tokens + j;
                        let at = self.at(out, sample, row);
                        for c in 0..out.cols {
                            let e = self.reference.weights[table.0][token * out.cols + c];
                            buffers[out.buffer.0][at + c] = e * *scale as f64;
                        }
                    }
                }
            }
            Op::Linear(linear) => self.linear(linear, buffers),
            Op::Attention(attention) => self.attention(attention, buffers),
        }
    }

    fn linear(&self, l: &Linear, buffers: &mut Buffers) {
        let weight = &self.reference.weights[l.weight.0];
        let k = l.input.cols;
        let n = weight.len() / k;
        let before = buffers[l.input.buffer.0].clone();
        for group in 0..l.groups {
            for row in 0..l.input.count {
                let at = self.at(&l.input, group, row);
                let given = self.is_given(group, row, l.input.count, buffers);
                let x = self.norm(&before[at..at + k], l.norm, given);
                let mut y: Vec<f64> = weight
                    .chunks_exact(k)
                    .map(|w| w.iter().zip(&x).map(|(w, x)| w * x).sum::<f64>() * l.scale as f64)
                    .collect();
                if let Some(Bias { table, row }) = l.bias {
                    let bias = &self.reference.weights[table.0][row * n..][..n];
                    y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
                }
                self.epilogue(&l.epilogue, group, row, y, buffers);
            }
        }
    }

    /// Whether a row of a suffix is a given action.
    fn is_given(&self, group: usize, row: usize, count: usize, buffers: &Buffers) -> bool {
        let weights = self.program.buffer("previous.weights");
        count == self.program.shape.horizon
            && weights.is_some_and(|id| buffers[id.0][group * count + row] > 0.0)
    }

    fn norm(&self, x: &[f64], norm: Norm, given: bool) -> Vec<f64> {
        let k = x.len() as f64;
        let rms = || (x.iter().map(|v| v * v).sum::<f64>() / k + 1e-6).sqrt();
        match norm {
            Norm::None => x.to_vec(),
            Norm::Rms { scale } => {
                let rms = rms();
                let scale = |i: usize| scale.map_or(1.0, |s| self.reference.weights[s.0][i]);
                x.iter().enumerate().map(|(i, v)| v / rms * scale(i)).collect()
            }
            Norm::Layer { scale } => {
                let mean = x.iter().sum::<f64>() / k;
                let var = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / k;
                let scale = &self.reference.weights[scale.0];
                x.iter().zip(scale).map(|(v, s)| (v - mean) / (var + 1e-6).sqrt() * s).collect()
            }
            Norm::Adaptive { table, row, given_row } => {
                let row = given_row.filter(|_| given).unwrap_or(row);
                let m = &self.reference.weights[table.0][row * 3 * x.len()..];
                let (scale, shift) = (&m[..x.len()], &m[x.len()..]);
                let rms = rms();
                (0..x.len()).map(|i| x[i] / rms * scale[i] + shift[i]).collect()
            }
        }
    }

    fn epilogue(&self, e: &Epilogue, group: usize, row: usize, y: Vec<f64>, buffers: &mut Buffers) {
        let gelu = |y: f64| {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (y + 0.044715 * y * y * y);
            0.5 * y * (1.0 + inner.tanh())
        };
        let mut store = |out: &View, values: Vec<f64>| {
            assert_eq!(out.cols, values.len());
            let at = self.at(out, group, row);
            buffers[out.buffer.0][at..at + out.cols].copy_from_slice(&values);
        };
        match e {
            Epilogue::Store { out } => store(out, y),
            Epilogue::StorePosition { out, table } => {
                let position = &self.reference.weights[table.0][row * y.len()..];
                store(out, y.iter().zip(position).map(|(y, p)| y + p).collect());
            }
            Epilogue::Gelu { out } => store(out, y.into_iter().map(gelu).collect()),
            Epilogue::Silu { out } => {
                store(out, y.iter().map(|y| y / (1.0 + (-y).exp())).collect());
            }
            Epilogue::GeGlu { out } => {
                let (gate, up) = y.split_at(y.len() / 2);
                store(out, gate.iter().zip(up).map(|(g, u)| gelu(*g) * u).collect());
            }
            Epilogue::Add { out, gate } => {
                let at = self.at(out, group, row);
                let given = self.is_given(group, row, out.count, buffers);
                for (i, y) in y.iter().enumerate() {
                    let g = gate.map_or(1.0, |Gate { table, row, given_row }| {
                        let row = given_row.filter(|_| given).unwrap_or(row);
                        self.reference.weights[table.0][(row * 3 + 2) * out.cols + i]
                    });
                    buffers[out.buffer.0][at + i] += g * y;
                }
            }
            Epilogue::AddFree { out } => {
                let at = self.at(out, group, row);
                if !self.is_given(group, row, out.count, buffers) {
                    y.iter().enumerate().for_each(|(i, y)| buffers[out.buffer.0][at + i] += y);
                }
            }
            Epilogue::Guide { out, guidance: g } => {
                let (at, row) = (self.at(out, group, row), group * out.count + row);
                let strength = buffers[g.limits.0][group].min(g.strength as f64);
                let guide = strength * buffers[g.weights.0][row];
                let (t, dt) = (g.time as f64, -g.pull as f64);
                for (i, y) in y.iter().enumerate() {
                    // v' = v − g·w·(chunk − (x − t·v)), x + dt·v'
                    let (x, v) = (buffers[out.buffer.0][at + i], y / dt);
                    let err = buffers[g.chunk.0][row * out.cols + i] - (x - t * v);
                    buffers[out.buffer.0][at + i] = x + dt * (v - guide * err);
                }
            }
            Epilogue::Rope { q, k, v, head_dim, positions } => {
                let position = match positions {
                    Positions::Prefix => row,
                    Positions::Suffix { first } => self.prefix_len(group) + first + row,
                };
                let mut y = y;
                let rotated = y.len() - head_dim;
                for head in y[..rotated].chunks_exact_mut(*head_dim) {
                    let bf16 = self.program.config.rope_bf16;
                    for (j, (cos, sin)) in rope_angles(position as u32, *head_dim, bf16).enumerate()
                    {
                        let (a, b) = (head[j], head[j + head_dim / 2]);
                        head[j] = a * cos as f64 - b * sin as f64;
                        head[j + head_dim / 2] = b * cos as f64 + a * sin as f64;
                    }
                }
                let value = y.split_off(rotated);
                let key = y.split_off(rotated - head_dim);
                if let Some(q) = q {
                    store(q, y);
                }
                store(k, key);
                store(v, value);
            }
        }
    }

    fn attention(&self, a: &Attention, buffers: &mut Buffers) {
        let d = a.head_dim;
        for group in 0..a.groups {
            for head in 0..a.heads {
                let kv = if a.kv_heads == 1 { 0 } else { head };
                for row in 0..a.q.count {
                    let at = self.at(&a.q, group, row) + head * d;
                    let q = &buffers[a.q.buffer.0][at..at + d];
                    let scores: Vec<f64> = (0..a.k.count)
                        .map(|s| {
                            let at = self.at(&a.k, group, s) + kv * d;
                            let k = &buffers[a.k.buffer.0][at..at + d];
                            match self.sees(a.mask, group, row, s) {
                                true => {
                                    let dot: f64 = q.iter().zip(k).map(|(q, k)| q * k).sum();
                                    dot * a.scale as f64
                                }
                                false => f64::NEG_INFINITY,
                            }
                        })
                        .collect();
                    let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let p: Vec<f64> = scores.iter().map(|s| (s - top).exp()).collect();
                    let sum: f64 = p.iter().sum();
                    let mut out = vec![0.0; d];
                    for (s, p) in p.iter().enumerate().filter(|(_, p)| **p > 0.0) {
                        let at = self.at(&a.v, group, s) + kv * d;
                        let v = &buffers[a.v.buffer.0][at..at + d];
                        out.iter_mut().zip(v).for_each(|(o, v)| *o += p / sum * v);
                    }
                    let at = self.at(&a.out, group, row) + head * d;
                    buffers[a.out.buffer.0][at..at + d].copy_from_slice(&out);
                }
            }
        }
    }

    fn sees(&self, mask: KeyMask, group: usize, row: usize, key: usize) -> bool {
        match mask {
            KeyMask::All => true,
            KeyMask::Prefix => key < self.prefix_len(group),
            KeyMask::Suffix { prefix_rows, state_row } => {
                let state_only = state_row && row == 0;
                key < self.prefix_len(group)
                    || key == prefix_rows
                    || (key > prefix_rows && !state_only)
            }
        }
    }
}
