//! Repeated runs of a compiled program → medians and tails.

use anyhow::{Result, bail};
use pirouette_model::{Config, Shape};
use serde::{Deserialize, Serialize};

use super::meter::{Meter, median};
use crate::quantile::quantile;
use crate::random::RandomInputs;

/// What was run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workload {
    /// Samples per run.
    pub batch: usize,
    /// Cameras computed.
    pub cameras: usize,
    /// Prompt tokens computed.
    pub prompt_tokens: usize,
    /// Actions per chunk.
    pub horizon: usize,
    /// Euler steps.
    pub euler_steps: usize,
}

impl From<Shape> for Workload {
    fn from(s: Shape) -> Self {
        Workload {
            batch: s.batch,
            cameras: s.cameras,
            prompt_tokens: s.prompt_tokens,
            horizon: s.horizon,
            euler_steps: s.steps,
        }
    }
}

impl Workload {
    /// Without the Euler steps: `3 cameras · 20 prompt tokens · horizon 10`.
    pub fn short(&self) -> String {
        let text = self.text();
        text.rsplit_once(" · ").map_or(text.clone(), |(short, _)| short.to_string())
    }

    /// For people: `3 cameras · 20 prompt tokens · horizon 10 · 10 Euler steps`.
    pub fn text(&self) -> String {
        let s = if self.cameras == 1 { "" } else { "s" };
        format!(
            "{} camera{s} · {} prompt tokens · horizon {} · {} Euler steps",
            self.cameras, self.prompt_tokens, self.horizon, self.euler_steps
        )
    }
}

/// Times of one workload.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    /// What was run.
    #[serde(flatten)]
    pub workload: Workload,
    /// Runs measured.
    pub runs: usize,
    /// Median, inputs in host memory to actions in host memory.
    pub p50_ms: f64,
    /// Mean of the same.
    pub mean_ms: f64,
    /// 99th percentile of the same.
    pub p99_ms: f64,
    /// Fastest run.
    pub min_ms: f64,
    /// Median of runs without copies, where measured apart.
    pub device_ms: Option<f64>,
    /// Samples per second at the median.
    pub samples_per_s: f64,
    /// Medians of vision, prefill, denoise.
    pub stage_ms: [f64; 3],
}

/// How often to run.
#[derive(Clone, Copy, Debug)]
pub struct Repeats {
    /// Runs before measuring.
    pub warmup: usize,
    /// Runs measured.
    pub runs: usize,
    /// A first run longer than this is repeated once only, milliseconds.
    pub patience_ms: f64,
}

impl Repeats {
    /// As typed, else 200 after 20 on a GPU and 5 after 1 on the CPU.
    pub fn choose(device: &str, runs: Option<usize>, warmup: Option<usize>) -> Result<Self> {
        let (r, w) = if device.starts_with("cpu") { (5, 1) } else { (200, 20) };
        let repeats = Repeats {
            warmup: warmup.unwrap_or(w),
            runs: runs.unwrap_or(r),
            // Who says how often means it.
            patience_ms: if runs.is_some() { f64::INFINITY } else { 15e3 },
        };
        if repeats.runs == 0 {
            bail!("nothing to measure: --runs must be at least 1");
        }
        Ok(repeats)
    }
}

/// Times a compiled program on random observations of this shape.
pub fn time(
    meter: &mut dyn Meter,
    config: &Config,
    shape: Shape,
    repeats: Repeats,
) -> Result<Timing> {
    let sample = RandomInputs::new(config, shape, 1);
    let (inputs, mut actions) = (sample.inputs(), vec![0.0; sample.noise.len()]);
    let mut runs = repeats.runs;
    for _ in 0..repeats.warmup {
        if meter.run(&inputs, &mut actions)?.total_ms > repeats.patience_ms {
            runs = 1;
            break;
        }
    }
    let (mut total, mut stages) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        let t = meter.run(&inputs, &mut actions)?;
        total.push(t.total_ms);
        stages.push([t.vision_ms, t.prefill_ms, t.denoise_ms]);
    }
    if let Some(bad) = actions.iter().find(|a| !a.is_finite()) {
        bail!("the run produced {bad}: the weights or the device are broken");
    }
    if stages.iter().all(|s| s.iter().sum::<f64>() == 0.0) {
        // Whole runs were one graph: stages are timed apart.
        stages = meter.stages(&inputs, &mut actions, runs)?;
    }
    let device_ms = meter.device_only(runs)?.map(median);
    Ok(summary(shape, &total, &stages, device_ms))
}

/// Sums repeated runs up. Without times of stages those are zero.
///
/// # Panics
/// If there are no runs: [`Repeats::choose`] refuses them.
pub fn summary(shape: Shape, total: &[f64], stages: &[[f64; 3]], device_ms: Option<f64>) -> Timing {
    let mut sorted = total.to_vec();
    sorted.sort_by(f64::total_cmp);
    let p50_ms = quantile(&sorted, 0.5);
    Timing {
        workload: shape.into(),
        runs: total.len(),
        p50_ms,
        mean_ms: total.iter().sum::<f64>() / total.len() as f64,
        p99_ms: quantile(&sorted, 0.99),
        min_ms: sorted[0],
        device_ms,
        samples_per_s: shape.batch as f64 / p50_ms * 1e3,
        stage_ms: std::array::from_fn(|i| median(stages.iter().map(|s| s[i]).collect())),
    }
}

#[cfg(test)]
mod tests {
    use pirouette_model::Rtc;

    use super::*;

    #[test]
    fn medians_and_rates() {
        let shape =
            Shape { batch: 4, cameras: 1, prompt_tokens: 2, horizon: 3, steps: 5, rtc: Rtc::Off };
        let t = summary(shape, &[9.0, 2.0, 4.0], &[[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]], None);
        assert_eq!((t.p50_ms, t.min_ms, t.mean_ms), (4.0, 2.0, 5.0));
        assert!((t.p99_ms - 8.9).abs() < 1e-9, "{}", t.p99_ms);
        assert_eq!(t.samples_per_s, 1000.0);
        assert_eq!(t.stage_ms[1], 2.0);
    }

    #[test]
    fn no_runs_are_refused() {
        assert!(Repeats::choose("cpu (AVX2, 2 threads)", Some(0), None).is_err());
        assert_eq!(Repeats::choose("cuda:0 NVIDIA H200", None, None).unwrap().runs, 200);
    }
}
