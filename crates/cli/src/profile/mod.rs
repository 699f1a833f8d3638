//! `pirouette profile`: where the milliseconds of one run go, step by step against the limit.

mod breakdown;
mod cuda;
mod kernels;
mod meter;
mod rates;
mod timing;
mod trace;
mod trace_replay;

use std::sync::Arc;

use anyhow::{Context, Result};
use pirouette_model::{Config, Program, StageTimes, WeightTable, record_with};
use serde::{Deserialize, Serialize};

use kernels::Kernel;
use meter::StepTimes;

pub use breakdown::{Breakdown, Group, gaps};
pub use kernels::{KERNEL_HEADER, KernelGroup, kernel_rows};
pub use meter::{CpuMeter, Meter, STAGES, compile};
pub use rates::{Limits, limits};
pub use timing::{Repeats, Timing, Workload, summary, time};

use crate::args::{ProfileArgs, TracingArgs};
use crate::device;
use crate::log;
use crate::provenance::Provenance;
use crate::random::RandomInputs;
use crate::text::{scaled, table, writable, write_json};
use crate::weights::Weights;

/// Where the milliseconds of one run go.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    /// What was run.
    #[serde(flatten)]
    pub workload: Workload,
    /// Median of whole runs, inputs in host memory to actions in host memory.
    pub end_to_end_ms: f64,
    /// Median without copies, where measured apart.
    pub device_ms: Option<f64>,
    /// Medians of vision, prefill and denoise in runs that don't look at steps.
    pub stage_ms: [f64; 3],
    /// Kernels per run, where a step is not one unit of work.
    pub kernels: Option<usize>,
    /// How the steps' times were taken.
    pub step_clock: String,
    /// Kernels and copies by what they do, where they were looked at inside the graph.
    #[serde(default)]
    pub kernel_groups: Vec<KernelGroup>,
    /// Median of replays under the tracing library, copies included.
    #[serde(default)]
    pub traced_replay_ms: Option<f64>,
    /// Rates the limits are computed for.
    pub limits: Limits,
    /// The tables.
    #[serde(flatten)]
    pub breakdown: Breakdown,
}

#[derive(Serialize)]
struct Output<'a> {
    #[serde(flatten)]
    provenance: Provenance,
    device: String,
    weights: &'a str,
    model: &'static str,
    precision: &'static str,
    #[serde(flatten)]
    profile: &'a Profile,
    /// Every kernel and copy in the graph's order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    nodes: Vec<Kernel<'a>>,
}

/// A profile, and what a trace is drawn from.
pub struct Measured {
    /// The tables.
    pub profile: Profile,
    run: StageTimes,
    steps: StepTimes,
}

/// Profiles one model and prints the tables, or writes them.
pub fn run(args: &ProfileArgs) -> Result<()> {
    writable(args.json.iter().chain(&args.trace))?;
    let weights = Weights::open(&args.weights)?;
    let config = weights.config;
    let mut opened = device::open(&args.device, config, args.shape.steps, weights.source())?;
    let name = opened.device().name();
    log::note(format_args!("{} · {name} · {}", config.family.name(), weights.origin));
    let limits = limits(&name, &args.device, &args.rates)?;
    let table = Arc::new(WeightTable::new(config, args.shape.steps));
    let program = Arc::new(record_with(table, args.shape.shape(args.batch))?);
    let mut meter = compile(&mut opened, program.clone())?;
    let repeats = Repeats::choose(&name, args.runs, args.warmup)?;
    let measured =
        measure(meter.as_mut(), &program, &config, repeats, limits, Some(&args.tracing))?;
    if let Some(path) = &args.trace {
        let rates = measured.profile.limits.rates();
        let steps = &measured.steps;
        let json = match &steps.replay {
            Some(replay) => trace_replay::trace(&program, &name, &rates, replay),
            None => trace::trace(&program, &name, &rates, &measured.run, &steps.ms),
        };
        std::fs::write(path, json).with_context(|| format!("can't write {}", path.display()))?;
        log::note(format_args!("trace of {} steps: {}", program.steps.len(), path.display()));
    }
    let profile = &measured.profile;
    match &args.json {
        Some(path) => {
            let output = Output {
                provenance: Provenance::here(),
                device: name,
                weights: &weights.origin,
                model: config.family.name(),
                precision: args.device.precision.name(),
                profile,
                nodes: measured
                    .steps
                    .replay
                    .as_ref()
                    .map_or(vec![], |replay| kernels::list(&program, &replay.nodes)),
            };
            write_json(path, &output)
        }
        None => {
            print(profile, config.family.name());
            Ok(())
        }
    }
}

/// Times whole runs, then steps.
pub fn measure(
    meter: &mut dyn Meter,
    program: &Program,
    config: &Config,
    repeats: Repeats,
    limits: Limits,
    tracing: Option<&TracingArgs>,
) -> Result<Measured> {
    let timing = time(meter, config, program.shape, repeats)?;
    let sample = RandomInputs::new(config, program.shape, 1);
    let mut actions = vec![0.0; sample.noise.len()];
    let run = meter.run(&sample.inputs(), &mut actions)?;
    let steps = step_times(meter, program, config, repeats, tracing)?;
    let mut profile = Profile {
        workload: timing.workload,
        end_to_end_ms: timing.p50_ms,
        device_ms: timing.device_ms,
        stage_ms: timing.stage_ms,
        kernels: meter.kernels(),
        step_clock: String::new(),
        kernel_groups: vec![],
        traced_replay_ms: None,
        breakdown: Breakdown::default(),
        limits,
    };
    profile.attribute(program, &steps);
    Ok(Measured { profile, run, steps })
}

/// Times of every step on random inputs.
pub fn step_times(
    meter: &mut dyn Meter,
    program: &Program,
    config: &Config,
    repeats: Repeats,
    tracing: Option<&TracingArgs>,
) -> Result<StepTimes> {
    let sample = RandomInputs::new(config, program.shape, 1);
    let mut actions = vec![0.0; sample.noise.len()];
    // Medians of steps settle sooner than tails of whole runs.
    let n = repeats.runs.min(20);
    Ok(meter.steps(&sample.inputs(), &mut actions, n, tracing)?)
}

impl Profile {
    /// The tables, from what every step takes.
    pub fn attribute(&mut self, program: &Program, steps: &StepTimes) {
        let nodes = steps.replay.as_ref().map_or(&[][..], |replay| &replay.nodes);
        self.step_clock = steps.clock.clone();
        self.kernel_groups = kernels::groups(nodes);
        self.traced_replay_ms = steps.replay.as_ref().map(|replay| replay.replay_ms);
        self.breakdown = breakdown::breakdown(program, &steps.ms, &self.limits.rates());
    }
}

/// Header of the tables of [`rows`].
pub const GROUP_HEADER: [&str; 9] =
    ["", "steps", "ms", "share", "FLOP", "weight bytes", "limit ms", "of limit", "gap ms"];

/// Rows of a table of groups, and optionally their sum.
pub fn rows<'a>(groups: impl IntoIterator<Item = &'a Group>, sum: bool) -> Vec<Vec<String>> {
    let mut total = Group {
        name: "sum of steps".into(),
        steps: 0,
        ms: 0.0,
        share: 0.0,
        flops: 0.0,
        weight_bytes: 0.0,
        limit_ms: 0.0,
    };
    let mut rows = Vec::new();
    for g in groups {
        rows.push(row(g));
        total.steps += g.steps;
        total.ms += g.ms;
        total.share += g.share;
        total.flops += g.flops;
        total.weight_bytes += g.weight_bytes;
        total.limit_ms += g.limit_ms;
    }
    if sum {
        rows.push(row(&total));
    }
    rows
}

fn row(g: &Group) -> Vec<String> {
    let of_limit = if g.ms > 0.0 { g.limit_ms / g.ms } else { 0.0 };
    vec![
        g.name.clone(),
        g.steps.to_string(),
        milliseconds(g.ms),
        percent(g.share),
        scaled(g.flops),
        scaled(g.weight_bytes),
        milliseconds(g.limit_ms),
        percent(of_limit),
        milliseconds(g.gap_ms()),
    ]
}

/// Three digits that matter: `1234`, `123`, `12.3`, `1.23`, `0.123`.
pub fn milliseconds(ms: f64) -> String {
    let digits = match ms.abs() {
        v if v >= 99.95 => 0,
        v if v >= 9.995 => 1,
        v if v >= 0.9995 => 2,
        _ => 3,
    };
    format!("{ms:.digits$}")
}

/// `12.3 %`.
pub fn percent(part: f64) -> String {
    format!("{:.1} %", part * 100.0)
}

fn print(profile: &Profile, model: &str) {
    println!("{model} · batch {} · {}", profile.workload.batch, profile.workload.text());
    println!("limits at {}\nsteps: {}\n", profile.limits.text(), profile.step_clock);
    let b = &profile.breakdown;
    let section = |title: &str, rows: &[Vec<String>]| {
        let mut header = GROUP_HEADER;
        header[0] = title;
        println!("{}", table(&header, rows));
    };
    if !profile.kernel_groups.is_empty() {
        println!("{}", table(&KERNEL_HEADER, &kernel_rows(&profile.kernel_groups)));
    }
    section("category", &rows(&b.categories, true));
    section("stage", &rows(&b.stages, false));
    section("kind of step", &rows(&b.kinds, false));
    let largest: Vec<Vec<String>> = gaps(&b.kinds, 5)
        .into_iter()
        .map(|g| vec![g.name.clone(), milliseconds(g.ms), milliseconds(g.gap_ms())])
        .collect();
    println!("{}", table(&["largest gaps to the limit", "ms", "gap ms"], &largest));
    if let Some(kernels) = profile.kernels {
        println!("{kernels} kernels per run");
    }
    if let Some(ms) = profile.device_ms {
        println!("device only, one replay: {} ms", milliseconds(ms));
    }
    println!("end to end: {} ms", milliseconds(profile.end_to_end_ms));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_three_digits() {
        let texts = [1234.4, 99.96, 12.34, 1.234, 0.1234, 0.0].map(milliseconds);
        assert_eq!(texts, ["1234", "100", "12.3", "1.23", "0.123", "0.000"]);
        assert_eq!(percent(0.1234), "12.3 %");
    }
}
