//! Recipes evaluated: checkpoint tensors → rows of a weight in f32.

use crate::config::names::VISION;
use crate::program::WeightId;
use crate::schedule::{time_embedding, times};
use crate::source::{OpenTensor, SourceError, Tensor, TensorSource};
use crate::weights::{BiasPart, Columns, Part, Recipe, WeightTable};

/// An opened weight: any row can be computed, from several threads. What its rows are read from may
/// still lie in a file.
pub struct WeightRows<'s> {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    making: Making<'s>,
}

enum Making<'s> {
    Stack(Vec<OpenPart<'s>>),
    Patch(OpenTensor<'s>),
    Ready(Vec<f32>),
}

impl WeightRows<'_> {
    /// Rows from `row` on, `cols` values each, as many as `out` holds. Fails where a file can't be
    /// read or is no longer the same.
    pub fn fill(&self, row: usize, out: &mut [f32]) -> Result<(), SourceError> {
        match &self.making {
            Making::Stack(parts) => self.fill_stacked(parts, row, out),
            Making::Patch(kernel) => {
                let p = kernel.shape[2];
                let mut channels = vec![0.0; self.cols];
                for (n, out) in out.chunks_exact_mut(self.cols).enumerate() {
                    kernel.read_f32((row + n) * self.cols, &mut channels)?;
                    for (i, o) in out.iter_mut().enumerate() {
                        let (pixel, channel) = (i / 3, i % 3);
                        *o = channels[channel * p * p + pixel];
                    }
                }
                Ok(())
            }
            Making::Ready(values) => {
                out.copy_from_slice(&values[row * self.cols..][..out.len()]);
                Ok(())
            }
        }
    }

    fn fill_stacked(
        &self,
        parts: &[OpenPart<'_>],
        mut row: usize,
        mut out: &mut [f32],
    ) -> Result<(), SourceError> {
        while !out.is_empty() {
            let at = parts.partition_point(|p| p.0 <= row) - 1;
            let (first, tensor, scale, factors) = &parts[at];
            let end = parts.get(at + 1).map_or(self.rows, |next| next.0);
            let count = (end - row).min(out.len() / self.cols);
            let (values, rest) = out.split_at_mut(count * self.cols);
            tensor.read_f32((row - first) * self.cols, values)?;
            if let Some(factors) = factors {
                for values in values.chunks_exact_mut(self.cols) {
                    for (o, f) in values.iter_mut().zip(factors) {
                        *o *= f;
                    }
                }
            }
            if *scale != 1.0 {
                for o in values {
                    *o *= scale;
                }
            }
            (row, out) = (row + count, rest);
        }
        Ok(())
    }
}

impl WeightTable {
    /// Opens a weight: opens its tensors, evaluates small tables.
    pub fn open<'s>(
        &self,
        id: WeightId,
        source: &'s dyn TensorSource,
    ) -> Result<WeightRows<'s>, SourceError> {
        let spec = self.spec(id);
        let making = match &spec.recipe {
            Recipe::Stack(parts) => Making::Stack(open_parts(parts, spec.cols, source)?),
            Recipe::Bias(parts) => Making::Ready(bias(parts, source)?),
            Recipe::Copy(tensor) => {
                let t = open(source, tensor, &[spec.rows, spec.cols])?;
                Making::Stack(vec![(0, t, 1.0, None)])
            }
            Recipe::NormScale { tensor, plus_one } => {
                let one = if *plus_one { 1.0 } else { 0.0 };
                let scale = vector(source, tensor, spec.cols)?;
                Making::Ready(scale.iter().map(|w| one + w).collect())
            }
            Recipe::PatchKernel => Making::Patch(self.patch_kernel(source)?),
            Recipe::PatchBias => Making::Ready(self.patch_bias(source)?),
            Recipe::ComposedActionIn => Making::Ready(self.composed_action_in(source)?),
            Recipe::ComposedTimeBias => Making::Ready(self.composed_time_bias(source)?),
            Recipe::Modulation(dense) => Making::Ready(self.modulation(dense, source)?),
        };
        Ok(WeightRows { rows: spec.rows, cols: spec.cols, making })
    }

    fn patch_kernel<'s>(
        &self,
        source: &'s dyn TensorSource,
    ) -> Result<OpenTensor<'s>, SourceError> {
        let v = &self.config.vision;
        let name = format!("{VISION}embeddings.patch_embedding.weight");
        open(source, &name, &[v.width, 3, v.patch, v.patch])
    }

    fn patch_bias(&self, source: &dyn TensorSource) -> Result<Vec<f32>, SourceError> {
        let v = &self.config.vision;
        let kernel = self.patch_kernel(source)?;
        let bias = vector(source, &format!("{VISION}embeddings.patch_embedding.bias"), v.width)?;
        let mut row = vec![0.0; v.patch_values()];
        (0..v.width)
            .map(|d| {
                kernel.read_f32(d * row.len(), &mut row)?;
                let sum: f64 = row.iter().map(|&w| w as f64).sum();
                Ok((bias[d] as f64 + sum * (0.5 / 127.5)) as f32)
            })
            .collect()
    }

    /// (action half of `action_time_mlp_in`) · `action_in_proj`.weight, in f64.
    fn composed_action_in(&self, source: &dyn TensorSource) -> Result<Vec<f32>, SourceError> {
        let (d, a) = (self.config.expert.width, self.config.action_dim);
        let mlp = load(source, "action_time_mlp_in.weight", &[d, 2 * d])?.to_f32();
        let inner = load(source, "action_in_proj.weight", &[d, a])?.to_f32();
        let mut out = vec![0.0f32; d * a];
        let mut sums = vec![0.0f64; a];
        for (row, out) in mlp.chunks_exact(2 * d).zip(out.chunks_exact_mut(a)) {
            sums.fill(0.0);
            for (w, inner) in row[..d].iter().zip(inner.chunks_exact(a)) {
                for (s, i) in sums.iter_mut().zip(inner) {
                    *s += *w as f64 * *i as f64;
                }
            }
            for (o, s) in out.iter_mut().zip(&sums) {
                *o = *s as f32;
            }
        }
        Ok(out)
    }

    fn composed_time_bias(&self, source: &dyn TensorSource) -> Result<Vec<f32>, SourceError> {
        let d = self.config.expert.width;
        let mlp = load(source, "action_time_mlp_in.weight", &[d, 2 * d])?.to_f32();
        let mlp_bias = vector(source, "action_time_mlp_in.bias", d)?;
        let in_bias = vector(source, "action_in_proj.bias", d)?;
        let mut out = Vec::with_capacity(self.steps * d);
        for t in times(self.steps) {
            let embedding = time_embedding(t, d, self.time_embedding);
            for (row, b) in mlp.chunks_exact(2 * d).zip(&mlp_bias) {
                let y = dot(&row[..d], &in_bias) + dot(&row[d..], &embedding) + *b as f64;
                out.push(y as f32);
            }
        }
        Ok(out)
    }

    /// W_dense · cond + b for each conditioning vector, first third + 1.
    fn modulation(&self, dense: &str, source: &dyn TensorSource) -> Result<Vec<f32>, SourceError> {
        let d = self.config.expert.width;
        let w = load(source, &format!("{dense}.dense.weight"), &[3 * d, d])?.to_f32();
        let b = vector(source, &format!("{dense}.dense.bias"), 3 * d)?;
        let mut out = Vec::with_capacity(self.steps * 3 * d);
        for condition in self.conditions(source)?.chunks_exact(d) {
            for (i, (row, b)) in w.chunks_exact(d).zip(&b).enumerate() {
                let one = if i < d { 1.0 } else { 0.0 };
                out.push((dot(row, condition) + *b as f64 + one) as f32);
            }
        }
        Ok(out)
    }

    /// Conditioning vectors of π0.5, `[steps, width]`, and one for time 0 where actions may be
    /// given:
    /// silu(W_out · silu(W_in · emb(t) + b) + b).
    pub fn conditions(&self, source: &dyn TensorSource) -> Result<Vec<f32>, SourceError> {
        let d = self.config.expert.width;
        let layer = |name: &str, x: &[f32]| -> Result<Vec<f32>, SourceError> {
            let w = load(source, &format!("{name}.weight"), &[d, d])?.to_f32();
            let b = vector(source, &format!("{name}.bias"), d)?;
            Ok(w.chunks_exact(d)
                .zip(&b)
                .map(|(row, b)| dot(row, x) + *b as f64)
                .map(|y| (y / (1.0 + (-y).exp())) as f32)
                .collect())
        };
        let mut out = Vec::new();
        let given = (self.config.rtc_max_delay > 0).then_some(0.0);
        for t in times(self.steps).into_iter().chain(given) {
            let embedding = time_embedding(t, d, self.time_embedding);
            out.extend(layer("time_mlp_out", &layer("time_mlp_in", &embedding)?)?);
        }
        Ok(out)
    }
}

/// Four running sums, so that the compiler may vectorise without reordering at will.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    let mut sums = [0.0f64; 4];
    let (a4, b4) = (a.chunks_exact(4), b.chunks_exact(4));
    let tail: f64 =
        a4.remainder().iter().zip(b4.remainder()).map(|(x, y)| *x as f64 * *y as f64).sum();
    for (x, y) in a4.zip(b4) {
        for i in 0..4 {
            sums[i] += x[i] as f64 * y[i] as f64;
        }
    }
    sums.iter().sum::<f64>() + tail
}

fn load<'s>(
    source: &'s dyn TensorSource,
    name: &str,
    shape: &[usize],
) -> Result<Tensor<'s>, SourceError> {
    let tensor = source.load(name)?;
    check(source, name, &tensor.shape, shape)?;
    Ok(tensor)
}

fn open<'s>(
    source: &'s dyn TensorSource,
    name: &str,
    shape: &[usize],
) -> Result<OpenTensor<'s>, SourceError> {
    let tensor = source.open(name)?;
    check(source, name, &tensor.shape, shape)?;
    Ok(tensor)
}

fn check(
    source: &dyn TensorSource,
    name: &str,
    found: &[usize],
    shape: &[usize],
) -> Result<(), SourceError> {
    if found != shape {
        let reason = format!("shape {found:?} in {}, expected {shape:?}", source.origin());
        return Err(SourceError::Unreadable { name: name.into(), reason });
    }
    Ok(())
}

fn vector(source: &dyn TensorSource, name: &str, len: usize) -> Result<Vec<f32>, SourceError> {
    Ok(load(source, name, &[len])?.to_f32())
}

/// First row, the part's tensor, scale, column factors.
type OpenPart<'s> = (usize, OpenTensor<'s>, f32, Option<Vec<f32>>);

fn open_parts<'s>(
    parts: &[Part],
    cols: usize,
    source: &'s dyn TensorSource,
) -> Result<Vec<OpenPart<'s>>, SourceError> {
    let mut first = 0;
    let mut opened = Vec::with_capacity(parts.len());
    for part in parts {
        let tensor = open(source, &part.tensor, &[part.rows, cols])?;
        let factors = match &part.columns {
            Columns::Plain => None,
            Columns::OnePlus(name) => {
                Some(vector(source, name, cols)?.iter().map(|w| 1.0 + w).collect())
            }
        };
        opened.push((first, tensor, part.scale, factors));
        first += part.rows;
    }
    Ok(opened)
}

fn bias(parts: &[BiasPart], source: &dyn TensorSource) -> Result<Vec<f32>, SourceError> {
    let mut out = Vec::new();
    for part in parts {
        let mut values = vector(source, &part.bias, part.rows)?;
        if let Some((weight, shift)) = &part.shifted {
            let k = source.shape(shift).map_or(0, |s| s.iter().product());
            let shift = vector(source, shift, k)?;
            let weight = open(source, weight, &[part.rows, k])?;
            let mut row = vec![0.0; k];
            for (i, value) in values.iter_mut().enumerate() {
                weight.read_f32(i * k, &mut row)?;
                *value = (*value as f64 + dot(&row, &shift)) as f32;
            }
        }
        out.extend(values.iter().map(|v| v * part.scale));
    }
    Ok(out)
}
