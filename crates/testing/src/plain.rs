//! The model in its plain form, in f64: every camera computed and masked, every prompt slot
//! computed and masked, all layers whole, the state token in every step, the time network in
//! every step, no weight folded. Slow; the yardstick that shows that the exact simplifications of
//! the recorded program change nothing beyond rounding.

use pirouette_model::config::names::{EMBED, EXPERT, PREFIX, PROJECTOR, VISION};
use pirouette_model::schedule::{TimeEmbedding, dt, time_embedding, times};
use pirouette_model::{Config, Family, PreviousChunk, Rtc, TensorSource};

/// A row-major f64 matrix.
#[derive(Clone, Debug)]
pub struct Matrix {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Elements.
    pub data: Vec<f64>,
}

impl Matrix {
    fn zeros(rows: usize, cols: usize) -> Self {
        Matrix { rows, cols, data: vec![0.0; rows * cols] }
    }

    /// Row `i`.
    pub fn row(&self, i: usize) -> &[f64] {
        &self.data[i * self.cols..][..self.cols]
    }

    fn row_mut(&mut self, i: usize) -> &mut [f64] {
        &mut self.data[i * self.cols..][..self.cols]
    }

    fn stack(parts: &[Matrix]) -> Self {
        let data: Vec<f64> = parts.iter().flat_map(|p| p.data.iter().copied()).collect();
        Matrix { rows: parts.iter().map(|p| p.rows).sum(), cols: parts[0].cols, data }
    }

    /// The row for row `i` of something: the only one, or the one of that number.
    fn row_for(&self, i: usize) -> &[f64] {
        self.row(i.min(self.rows - 1))
    }

    fn add(&mut self, other: &Matrix, gate: Option<&Matrix>) {
        for i in 0..self.rows {
            for j in 0..self.cols {
                let g = gate.map_or(1.0, |g| g.row_for(i)[j]);
                self.data[i * self.cols + j] += g * other.data[i * self.cols + j];
            }
        }
    }

    fn map(mut self, f: impl Fn(f64) -> f64) -> Self {
        self.data.iter_mut().for_each(|x| *x = f(*x));
        self
    }
}

/// One observation as openpi's model gets it: three cameras, masks, padded prompt.
#[derive(Clone, Debug)]
pub struct Observation {
    /// `[side, side, 3]` pixels of each camera.
    pub images: [Vec<u8>; 3],
    /// Whether each camera is real.
    pub image_masks: [bool; 3],
    /// Prompt ids, padded.
    pub tokens: Vec<u32>,
    /// Which of them count.
    pub token_mask: Vec<bool>,
    /// Normalised state.
    pub state: Vec<f32>,
    /// `[horizon, action_dim]`
    pub noise: Vec<f32>,
}

/// The network over a source of tensors.
pub struct Plain<'s> {
    /// Sizes.
    pub config: Config,
    source: &'s dyn TensorSource,
    /// Evaluation of the time embedding.
    pub time_embedding: TimeEmbedding,
}

fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

impl<'s> Plain<'s> {
    /// Over these weights.
    pub fn new(config: Config, source: &'s dyn TensorSource) -> Self {
        Plain { config, source, time_embedding: TimeEmbedding::F64 }
    }

    fn tensor(&self, name: &str) -> Vec<f64> {
        let t = self.source.load(name).unwrap_or_else(|e| panic!("{e}"));
        t.to_f32().into_iter().map(f64::from).collect()
    }

    fn linear(&self, name: &str, x: &Matrix) -> Matrix {
        let weight = self.tensor(&format!("{name}.weight"));
        let rows = weight.len() / x.cols;
        let bias_name = format!("{name}.bias");
        let bias = self.source.shape(&bias_name).map(|_| self.tensor(&bias_name));
        let mut out = Matrix::zeros(x.rows, rows);
        for i in 0..x.rows {
            for n in 0..rows {
                let w = &weight[n * x.cols..][..x.cols];
                let sum: f64 = x.row(i).iter().zip(w).map(|(a, b)| a * b).sum();
                out.data[i * rows + n] = sum + bias.as_ref().map_or(0.0, |b| b[n]);
            }
        }
        out
    }

    fn layer_norm(&self, name: &str, x: &Matrix) -> Matrix {
        let (w, b) = (self.tensor(&format!("{name}.weight")), self.tensor(&format!("{name}.bias")));
        let mut out = x.clone();
        for i in 0..x.rows {
            let n = x.cols as f64;
            let mean = x.row(i).iter().sum::<f64>() / n;
            let variance = x.row(i).iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
            for (j, o) in out.row_mut(i).iter_mut().enumerate() {
                *o = (*o - mean) / (variance + 1e-6).sqrt() * w[j] + b[j];
            }
        }
        out
    }

    /// RMSNorm, adaptive when conditioning vectors are given, one for all rows or one each; returns
    /// the gates too.
    fn rms_norm(
        &self,
        name: &str,
        x: &Matrix,
        condition: Option<&Matrix>,
    ) -> (Matrix, Option<Matrix>) {
        let modulation = condition.map(|c| self.linear(&format!("{name}.dense"), c));
        let weight = match modulation {
            Some(_) => vec![],
            None => self.tensor(&format!("{name}.weight")),
        };
        let mut out = x.clone();
        let n = x.cols;
        for i in 0..x.rows {
            let mean = x.row(i).iter().map(|v| v * v).sum::<f64>() / n as f64;
            for (j, o) in out.row_mut(i).iter_mut().enumerate() {
                let y = *o / (mean + 1e-6).sqrt();
                *o = match &modulation {
                    Some(m) => y * (1.0 + m.row_for(i)[j]) + m.row_for(i)[n + j],
                    None => y * (1.0 + weight[j]),
                };
            }
        }
        let gates = modulation.map(|m| {
            let data = (0..m.rows).flat_map(|i| m.row(i)[2 * n..].to_vec()).collect();
            Matrix { rows: m.rows, cols: n, data }
        });
        (out, gates)
    }

    /// SigLIP and projector of one image: `[tokens, prefix width]`.
    pub fn vision(&self, image: &[u8]) -> Matrix {
        let v = self.config.vision;
        let (p, grid) = (v.patch, v.image / v.patch);
        let mut patches = Matrix::zeros(v.tokens(), v.patch_values());
        for t in 0..v.tokens() {
            for (k, o) in patches.row_mut(t).iter_mut().enumerate() {
                let (channel, r, c) = (k / (p * p), k / p % p, k % p);
                let pixel = ((t / grid * p + r) * v.image + t % grid * p + c) * 3 + channel;
                *o = image[pixel] as f64 / 255.0 * 2.0 - 1.0;
            }
        }
        let mut x = self.linear(&format!("{VISION}embeddings.patch_embedding"), &patches);
        let table = self.tensor(&format!("{VISION}embeddings.position_embedding.weight"));
        x.data.iter_mut().zip(&table).for_each(|(x, p)| *x += p);
        for i in 0..v.depth {
            let layer = format!("{VISION}encoder.layers.{i}.");
            let y = self.layer_norm(&format!("{layer}layer_norm1"), &x);
            let [q, k, val] =
                ["q", "k", "v"].map(|n| self.linear(&format!("{layer}self_attn.{n}_proj"), &y));
            let a = attend(&q, &k, &val, v.heads, v.heads, |_, _| true);
            x.add(&self.linear(&format!("{layer}self_attn.out_proj"), &a), None);
            let y = self.layer_norm(&format!("{layer}layer_norm2"), &x);
            let y = self.linear(&format!("{layer}mlp.fc1"), &y).map(gelu);
            x.add(&self.linear(&format!("{layer}mlp.fc2"), &y), None);
        }
        let x = self.layer_norm(&format!("{VISION}post_layernorm"), &x);
        self.linear(PROJECTOR.trim_end_matches('.'), &x)
    }

    /// Rotates heads of `head_dim` by the rows' positions.
    fn rope(&self, x: &mut Matrix, positions: &[i64]) {
        let (d, half) = (self.config.head_dim, self.config.head_dim / 2);
        for (i, &position) in positions.iter().enumerate() {
            for head in x.row_mut(i).chunks_exact_mut(d) {
                for j in 0..half {
                    let angle = position as f64 * 10000f64.powf(-2.0 * j as f64 / d as f64);
                    let (a, b) = (head[j], head[j + half]);
                    head[j] = a * angle.cos() - b * angle.sin();
                    head[j + half] = b * angle.cos() + a * angle.sin();
                }
            }
        }
    }

    fn mlp(&self, layer: &str, y: &Matrix) -> Matrix {
        let mut gate = self.linear(&format!("{layer}mlp.gate_proj"), y).map(gelu);
        let up = self.linear(&format!("{layer}mlp.up_proj"), y);
        gate.data.iter_mut().zip(&up.data).for_each(|(g, u)| *g *= u);
        self.linear(&format!("{layer}mlp.down_proj"), &gate)
    }

    /// One Gemma layer over rows `x` that see `cache` rows first, then their own.
    fn gemma_layer(
        &self,
        layer: &str,
        x: &mut Matrix,
        cache: Option<&[Matrix; 2]>,
        positions: &[i64],
        condition: Option<&Matrix>,
        visible: &dyn Fn(usize, usize) -> bool,
    ) -> [Matrix; 2] {
        let project = |y: &Matrix, n: &str| self.linear(&format!("{layer}self_attn.{n}_proj"), y);
        let (y, gate) = self.rms_norm(&format!("{layer}input_layernorm"), x, condition);
        let mut q = project(&y, "q");
        let [mut k, v] = ["k", "v"].map(|n| project(&y, n));
        self.rope(&mut q, positions);
        self.rope(&mut k, positions);
        let own = [k, v];
        let [k, v] = match cache {
            None => own.clone(),
            Some(c) => [0, 1].map(|i| Matrix::stack(&[c[i].clone(), own[i].clone()])),
        };
        let a = attend(&q, &k, &v, self.config.heads, 1, visible);
        x.add(&self.linear(&format!("{layer}self_attn.o_proj"), &a), gate.as_ref());
        let (y, gate) = self.rms_norm(&format!("{layer}post_attention_layernorm"), x, condition);
        x.add(&self.mlp(layer, &y), gate.as_ref());
        own
    }

    /// Actions `[horizon, action_dim]` after `steps` Euler steps.
    pub fn sample(&self, o: &Observation, steps: usize) -> Vec<f64> {
        self.sample_after(o, steps, None)
    }

    /// The same with each step guided towards a previous chunk, if there is one, or with its first
    /// actions given.
    pub fn sample_after(
        &self,
        o: &Observation,
        steps: usize,
        previous: Option<&PreviousChunk>,
    ) -> Vec<f64> {
        let c = self.config;
        let table = self.source.load(EMBED).unwrap_or_else(|e| panic!("{e}"));
        let width = c.prefix.width;
        let mut text = Matrix::zeros(o.tokens.len(), width);
        for (i, &t) in o.tokens.iter().enumerate() {
            let mut row = vec![0.0f32; width];
            table.read_f32(t as usize * width, &mut row);
            let scaled = row.iter().map(|v| *v as f64 * (width as f64).sqrt());
            text.row_mut(i).iter_mut().zip(scaled).for_each(|(o, v)| *o = v);
        }
        let mut parts: Vec<Matrix> = o.images.iter().map(|i| self.vision(i)).collect();
        parts.push(text);
        let mut x = Matrix::stack(&parts);
        let mut mask: Vec<bool> = vec![];
        for valid in o.image_masks {
            mask.extend(vec![valid; c.vision.tokens()]);
        }
        mask.extend(&o.token_mask);
        let mut valid = 0;
        let positions: Vec<i64> = mask
            .iter()
            .map(|&m| {
                valid += m as i64;
                valid - 1
            })
            .collect();
        let mut cache = Vec::new();
        for l in 0..c.depth {
            let layer = format!("{PREFIX}layers.{l}.");
            let visible = |q: usize, k: usize| mask[q] && mask[k];
            cache.push(self.gemma_layer(&layer, &mut x, None, &positions, None, &visible));
        }
        let mut actions: Vec<f64> = o.noise.iter().map(|&v| v as f64).collect();
        let given = previous.filter(|p| p.rtc == Rtc::Trained);
        let rows = given.map_or(0, |p| p.weights.iter().filter(|w| **w > 0.0).count());
        let give = |actions: &mut [f64]| {
            let values = given.map_or(&[][..], |p| &p.chunk[..rows * c.action_dim]);
            actions.iter_mut().zip(values).for_each(|(a, v)| *a = *v as f64);
        };
        for t in times(steps) {
            give(&mut actions);
            let mut velocity = self.velocity(o, &actions, (t, rows), &cache, &mask, valid);
            if let Some(previous) = previous.filter(|p| p.rtc == Rtc::Guided) {
                guide(&mut velocity, &actions, t as f64, previous);
            }
            for (a, v) in actions.iter_mut().zip(&velocity.data) {
                *a += dt(steps) as f64 * v;
            }
            give(&mut actions);
        }
        actions
    }

    /// The network's velocity at time `t` for all but the first `given` actions, whose time is 0,
    /// `[horizon, action_dim]`.
    fn velocity(
        &self,
        o: &Observation,
        actions: &[f64],
        (t, given): (f32, usize),
        cache: &[[Matrix; 2]],
        mask: &[bool],
        valid: i64,
    ) -> Matrix {
        let (c, d) = (self.config, self.config.expert.width);
        let h = actions.len() / c.action_dim;
        let noisy = Matrix { rows: h, cols: c.action_dim, data: actions.to_vec() };
        let embed = |t: f32| {
            time_embedding(t, d, self.time_embedding).into_iter().map(f64::from).collect::<Vec<_>>()
        };
        let tokens = self.linear("action_in_proj", &noisy);
        let (mut x, condition) = match c.family {
            Family::Pi05 => {
                let data = (0..h).flat_map(|i| embed(if i < given { 0.0 } else { t })).collect();
                let e = Matrix { rows: h, cols: d, data };
                let inner = self.linear("time_mlp_in", &e).map(silu);
                (tokens, Some(self.linear("time_mlp_out", &inner).map(silu)))
            }
            Family::Pi0 => {
                let mut both = Matrix::zeros(h, 2 * d);
                for i in 0..h {
                    both.row_mut(i)[..d].copy_from_slice(tokens.row(i));
                    both.row_mut(i)[d..].copy_from_slice(&embed(t));
                }
                let mixed = self.linear("action_time_mlp_in", &both).map(silu);
                let mixed = self.linear("action_time_mlp_out", &mixed);
                let state: Vec<f64> = o.state.iter().map(|&v| v as f64).collect();
                let state = Matrix { rows: 1, cols: c.action_dim, data: state };
                (Matrix::stack(&[self.linear("state_proj", &state), mixed]), None)
            }
        };
        let pi0 = c.family == Family::Pi0;
        let positions: Vec<i64> = (0..x.rows as i64).map(|i| valid + i).collect();
        let visible = |q: usize, k: usize| match k.checked_sub(mask.len()) {
            None => mask[k],
            Some(own) => !(pi0 && q == 0) || own == 0,
        };
        for (l, cache) in cache.iter().enumerate() {
            let layer = format!("{EXPERT}layers.{l}.");
            let condition = condition.as_ref();
            self.gemma_layer(&layer, &mut x, Some(cache), &positions, condition, &visible);
        }
        let (y, _) = self.rms_norm(&format!("{EXPERT}norm"), &x, condition.as_ref());
        let first = y.rows - h;
        let last = Matrix { rows: h, cols: d, data: y.data[first * d..].to_vec() };
        self.linear("action_out_proj", &last)
    }
}

/// v − g·w∘(y − (x − t·v)) with g = min(limit, (1 − τ)/τ · ((1 − τ)² + τ²)/(1 − τ)²), τ = 1 − t:
/// the formula as LeRobot writes it, infinite where τ = 0.
fn guide(velocity: &mut Matrix, x: &[f64], t: f64, previous: &PreviousChunk) {
    let tau = 1.0 - t;
    let strength = t / tau * (t * t + tau * tau) / (t * t);
    let g = strength.min(previous.limit as f64);
    for (i, v) in velocity.data.iter_mut().enumerate() {
        let w = previous.weights[i / velocity.cols] as f64;
        *v -= g * w * (previous.chunk[i] as f64 - (x[i] - t * *v));
    }
}

/// softmax(q·kᵀ / √d)·v per head; a query that sees nothing gives zeros.
fn attend(
    q: &Matrix,
    k: &Matrix,
    v: &Matrix,
    heads: usize,
    kv_heads: usize,
    visible: impl Fn(usize, usize) -> bool,
) -> Matrix {
    let d = q.cols / heads;
    let mut out = Matrix::zeros(q.rows, q.cols);
    for i in 0..q.rows {
        let keys: Vec<usize> = (0..k.rows).filter(|&s| visible(i, s)).collect();
        for h in 0..heads {
            let at = h * kv_heads / heads * d;
            let query = &q.row(i)[h * d..][..d];
            let score = |&s: &usize| -> f64 {
                let key = &k.row(s)[at..][..d];
                query.iter().zip(key).map(|(a, b)| a * b).sum::<f64>() / (d as f64).sqrt()
            };
            let scores: Vec<f64> = keys.iter().map(score).collect();
            let max = scores.iter().cloned().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for (w, &s) in weights.iter().zip(&keys) {
                let value = &v.row(s)[at..][..d];
                for (o, x) in out.row_mut(i)[h * d..][..d].iter_mut().zip(value) {
                    *o += w / sum * x;
                }
            }
        }
    }
    out
}
