//! `pirouette bench`: weights and a shape → medians, p99, stages and throughput.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use pirouette_cuda::gauge::Gauge;
use pirouette_cuda::{CudaDevice, CudaExecutable};
use pirouette_engine::standard_normal;
use pirouette_model::{
    Config, Executable, Family, Images, Inputs, Shape, StageTimes, WeightTable, record_with,
};
use serde::Serialize;

use crate::args::BenchArgs;
use crate::device;
use crate::provenance::Provenance;
use crate::text::{table, write_json};
use crate::weights::Weights;

#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    provenance: Provenance,
    device: String,
    weights: String,
    model: &'static str,
    precision: &'static str,
    weight_bytes: u64,
    clock: &'static str,
    /// Runs a second; none: one after another.
    #[serde(skip_serializing_if = "Option::is_none")]
    rate_hz: Option<f64>,
    results: Vec<Row>,
    #[serde(skip_serializing_if = "Option::is_none")]
    deterministic: Option<Deterministic>,
}

/// One request in the one program of `serve --deterministic`, and in its own.
#[derive(Serialize)]
struct Deterministic {
    alone: Row,
    fixed: Row,
    /// Of the medians.
    times_as_long: f64,
}

#[derive(Serialize)]
struct Row {
    batch: usize,
    cameras: usize,
    prompt_tokens: usize,
    horizon: usize,
    euler_steps: usize,
    runs: usize,
    p50_ms: f64,
    mean_ms: f64,
    p99_ms: f64,
    min_ms: f64,
    samples_per_s: f64,
    vision_ms: f64,
    prefill_ms: f64,
    denoise_ms: f64,
    #[serde(flatten)]
    gpu: Option<Gpu>,
}

const CLOCK: &str = "inputs in host memory to actions in host memory";

/// Measures every batch size asked for.
pub fn run(args: &BenchArgs) -> Result<()> {
    if args.batch.is_empty() || args.runs == Some(0) || args.deterministic == Some(0) {
        bail!("nothing to measure: --batch, --runs and --deterministic must be at least 1");
    }
    if args.rate.is_some_and(|hz| !(0.01..=1e6).contains(&hz)) {
        bail!("--rate is a number of runs a second, from 0.01 on");
    }
    let period = args.rate.map(|hz| Duration::from_secs_f64(1.0 / hz));
    let weights = Weights::open(&args.weights)?;
    let config = weights.config;
    let mut opened = device::open(&args.device, config, args.shape.steps, weights.source())?;
    let (name, weight_bytes) = (opened.device().name(), opened.device().weight_bytes());
    let on_gpu = matches!(opened, device::Opened::Cuda(_));
    let runs = args.runs.unwrap_or(if on_gpu { 200 } else { 5 });
    let warmup = args.warmup.unwrap_or(if on_gpu { 20 } else { 1 });
    let mut report = Report {
        provenance: Provenance::here(),
        device: name,
        weights: weights.origin.clone(),
        model: config.family.name(),
        precision: args.device.precision.name(),
        weight_bytes,
        clock: CLOCK,
        rate_hz: args.rate,
        results: vec![],
        deterministic: None,
    };
    eprintln!("{} · {} · {}", report.model, report.device, report.weights);
    let table = Arc::new(WeightTable::new(config, args.shape.steps));
    let mut measure = |shape: Shape| -> Result<Row> {
        let program = Arc::new(record_with(Arc::clone(&table), shape)?);
        let sample = RandomInputs::new(&config, shape, 1);
        let measured = match &mut opened {
            device::Opened::Cpu(cpu) => {
                let mut executable = cpu.compile_cpu(program)?;
                Measured {
                    runs: time(&mut executable, &sample, [warmup, runs], period)?,
                    gpu: None,
                }
            }
            device::Opened::Cuda(cuda) => {
                let mut executable = cuda.compile_cuda(program)?;
                let runs = time(&mut executable, &sample, [warmup, runs], period)?;
                Measured { gpu: Some(gpu(cuda, &mut executable, runs.len())?), runs }
            }
        };
        Ok(row(shape, &measured))
    };
    for &batch in &args.batch {
        report.results.push(measure(args.shape.shape(batch))?);
    }
    if let Some(slots) = args.deterministic {
        let prompt_tokens = longest_prompt(config.family);
        let alone = measure(args.shape.shape(1))?;
        let fixed = measure(Shape { prompt_tokens, ..args.shape.shape(slots) })?;
        let times_as_long = fixed.p50_ms / alone.p50_ms;
        report.deterministic = Some(Deterministic { alone, fixed, times_as_long });
    }
    match &args.json {
        Some(path) => write_json(path, &report),
        None => {
            print(&report);
            Ok(())
        }
    }
}

/// Prompt slots of openpi's configurations.
fn longest_prompt(family: Family) -> usize {
    match family {
        Family::Pi0 => 48,
        Family::Pi05 => 200,
    }
}

/// What was measured of one shape.
struct Measured {
    runs: Vec<StageTimes>,
    gpu: Option<Gpu>,
}

/// What only a GPU tells.
#[derive(Clone, Serialize)]
struct Gpu {
    replay_p50_ms: f64,
    kernels: usize,
    memory_used_bytes: u64,
    activation_bytes: u64,
    power_watts: Option<f64>,
    joules_per_sample: Option<f64>,
    sm_mhz: Option<u32>,
    temperature_celsius: Option<u32>,
    #[serde(skip)]
    stages: [f64; 3],
}

/// Runs warm-up and measured runs, one every `period`; the actions of the last must be finite.
fn time(
    executable: &mut dyn Executable,
    sample: &RandomInputs,
    [warmup, runs]: [usize; 2],
    period: Option<Duration>,
) -> Result<Vec<StageTimes>> {
    let mut actions = vec![0.0; sample.noise.len()];
    let mut times = Vec::with_capacity(runs);
    let mut due = Instant::now();
    for i in 0..warmup + runs {
        if let Some(period) = period {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            due += period;
        }
        let t = executable.run(&sample.inputs(), &mut actions)?;
        if i >= warmup {
            times.push(t);
        }
    }
    match actions.iter().find(|a| !a.is_finite()) {
        Some(bad) => bail!("the run produced {bad}: the weights or the device are broken"),
        None => Ok(times),
    }
}

/// Replays without copies, stages as graphs of their own, sensors after a second of load.
fn gpu(device: &CudaDevice, executable: &mut CudaExecutable, runs: usize) -> Result<Gpu> {
    let runs = runs.clamp(5, 200);
    let mut replays = executable.replay_ms(runs)?;
    replays.sort_by(f64::total_cmp);
    let stage_runs = executable.stage_ms(runs)?;
    let stage = |i: usize| {
        let mut ms: Vec<f64> = stage_runs.iter().map(|s| s[i]).collect();
        ms.sort_by(f64::total_cmp);
        quantile(&ms, 0.5)
    };
    let gauge = Gauge::open(&device.context().properties).ok();
    let energy = |g: &Option<Gauge>| g.as_ref().and_then(|g| g.read().energy_joules);
    let (before, begun, mut samples) = (energy(&gauge), Instant::now(), 0);
    while begun.elapsed().as_secs_f64() < 1.0 {
        samples += executable.replay_ms(8)?.len() * executable.program().shape.batch;
    }
    let seconds = begun.elapsed().as_secs_f64();
    let reading = gauge.as_ref().map(Gauge::read).unwrap_or_default();
    let joules = energy(&gauge).zip(before).map(|(after, before)| after - before);
    let (free, total) = device.memory_info()?;
    Ok(Gpu {
        replay_p50_ms: quantile(&replays, 0.5),
        kernels: executable.kernel_count(),
        memory_used_bytes: total - free,
        activation_bytes: executable.activation_bytes(),
        power_watts: joules.map(|j| j / seconds),
        joules_per_sample: joules.map(|j| j / samples as f64),
        sm_mhz: reading.sm_mhz,
        temperature_celsius: reading.temperature_celsius,
        stages: [stage(0), stage(1), stage(2)],
    })
}

/// A batch of random observations: every pixel, token and number is drawn, none is zero by rule.
pub struct RandomInputs {
    images: Vec<u8>,
    cameras: Vec<u32>,
    tokens: Vec<u32>,
    prompt_len: Vec<u32>,
    state: Vec<f32>,
    /// Initial noise.
    pub noise: Vec<f32>,
}

impl RandomInputs {
    /// For a shape, all slots filled; a seed gives the same observations everywhere.
    pub fn new(config: &Config, shape: Shape, seed: u64) -> Self {
        let mut state = 0x9E37_79B9_7F4A_7C15u64 ^ seed.rotate_left(32);
        let mut next = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let pixels = shape.batch * shape.cameras * config.vision.image.pow(2) * 3;
        let prompts = shape.batch * shape.prompt_tokens;
        let mut noise = vec![0.0; shape.batch * shape.horizon * config.action_dim];
        standard_normal(2 * seed, &mut noise);
        let mut robot = vec![0.0; shape.batch * config.action_dim];
        standard_normal(2 * seed + 1, &mut robot);
        RandomInputs {
            images: (0..pixels).map(|_| (next() >> 32) as u8).collect(),
            cameras: vec![shape.cameras as u32; shape.batch],
            tokens: (0..prompts).map(|_| (next() % config.vocab as u64) as u32).collect(),
            prompt_len: vec![shape.prompt_tokens as u32; shape.batch],
            state: robot,
            noise,
        }
    }

    /// Borrowed for a run.
    pub fn inputs(&self) -> Inputs<'_> {
        Inputs {
            images: Images::Packed(&self.images),
            cameras: &self.cameras,
            tokens: &self.tokens,
            prompt_len: &self.prompt_len,
            state: &self.state,
            noise: &self.noise,
            previous: None,
        }
    }
}

/// The value below which the fraction `q` of sorted values lies.
pub fn quantile(sorted: &[f64], q: f64) -> f64 {
    let at = (q * (sorted.len() - 1) as f64).round() as usize;
    sorted[at.min(sorted.len() - 1)]
}

fn row(shape: Shape, measured: &Measured) -> Row {
    let times = &measured.runs;
    let sorted = |f: fn(&StageTimes) -> f64| {
        let mut values: Vec<f64> = times.iter().map(f).collect();
        values.sort_by(f64::total_cmp);
        values
    };
    let median = |f| quantile(&sorted(f), 0.5);
    let total = sorted(|t| t.total_ms);
    let mean = total.iter().sum::<f64>() / total.len() as f64;
    let own = [median(|t| t.vision_ms), median(|t| t.prefill_ms), median(|t| t.denoise_ms)];
    let [vision_ms, prefill_ms, denoise_ms] = measured.gpu.as_ref().map_or(own, |g| g.stages);
    Row {
        batch: shape.batch,
        cameras: shape.cameras,
        prompt_tokens: shape.prompt_tokens,
        horizon: shape.horizon,
        euler_steps: shape.steps,
        runs: times.len(),
        p50_ms: quantile(&total, 0.5),
        mean_ms: mean,
        p99_ms: quantile(&total, 0.99),
        min_ms: total[0],
        samples_per_s: shape.batch as f64 / quantile(&total, 0.5) * 1e3,
        vision_ms,
        prefill_ms,
        denoise_ms,
        gpu: measured.gpu.clone(),
    }
}

fn print(report: &Report) {
    let ms = |v: f64| format!("{v:.2}");
    let rows: Vec<Vec<String>> = report
        .results
        .iter()
        .map(|r| {
            vec![
                r.batch.to_string(),
                ms(r.p50_ms),
                ms(r.mean_ms),
                ms(r.p99_ms),
                ms(r.vision_ms),
                ms(r.prefill_ms),
                ms(r.denoise_ms),
                format!("{:.2}", r.samples_per_s),
            ]
        })
        .collect();
    let r = &report.results[0];
    println!(
        "{} · {} · {} cameras · {} prompt tokens · horizon {} · {} Euler steps · {} runs",
        report.model,
        report.precision,
        r.cameras,
        r.prompt_tokens,
        r.horizon,
        r.euler_steps,
        r.runs
    );
    println!("milliseconds, {}\n", report.clock);
    let header = ["batch", "p50", "mean", "p99", "vision", "prefill", "denoise", "samples/s"];
    print!("{}", table(&header, &rows));
    if let Some(d) = &report.deterministic {
        println!(
            "\none request: {:.2} ms by itself; {:.2} ms in the program of `serve --deterministic` \
             ({} slots, {} prompt tokens): {:.2} times as long, for the same bits in any company",
            d.alone.p50_ms, d.fixed.p50_ms, d.fixed.batch, d.fixed.prompt_tokens, d.times_as_long
        );
    }
    for r in &report.results {
        let Some(g) = &r.gpu else { continue };
        println!(
            "batch {}: replay {:.2} ms, {} kernels, {:.2} GB in use, {} W, {} J a chunk, \
             {} MHz, {} °C",
            r.batch,
            g.replay_p50_ms,
            g.kernels,
            g.memory_used_bytes as f64 / 1e9,
            g.power_watts.map_or("–".into(), |w| format!("{w:.0}")),
            g.joules_per_sample.map_or("–".into(), |j| format!("{j:.2}")),
            g.sm_mhz.map_or("–".into(), |m| m.to_string()),
            g.temperature_celsius.map_or("–".into(), |t| t.to_string()),
        );
    }
}
