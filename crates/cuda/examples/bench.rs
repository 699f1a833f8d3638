//! Whole-model timings on synthetic weights of the full size.
//!
//! `bench [pi0|pi05] [auto|portable] [batch] [cameras] [prompt] [horizon] [--steps] [--compare]
//! [--overlap]`: input to output, replay only, by stage; with `--steps` by kind of step; with
//! `--compare` the distance of the actions from the portable tier's; with `--overlap` the
//! throughput of two batches at a time beside that of one after another.

use std::collections::BTreeMap;
use std::sync::{Arc, Barrier};
use std::time::Instant;

use anyhow::{Context, Result};
use pirouette_checkpoint::Synthetic;
use pirouette_cuda::gauge::Gauge;
use pirouette_cuda::{CudaDevice, CudaExecutable, Tier};
use pirouette_model::{
    Config, Device, Executable, Images, Inputs, Rtc, Shape, WeightTable, record_with,
};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let positional: Vec<&str> =
        args.iter().filter(|a| !a.starts_with("--")).map(String::as_str).collect();
    let config = match positional.first().copied().unwrap_or("pi0") {
        "pi05" => Config::pi05(),
        _ => Config::pi0(),
    };
    let tier = match positional.get(1).copied() {
        Some("portable") => Tier::Portable,
        _ => Tier::Auto,
    };
    let number = |at: usize, default: usize| -> Result<usize> {
        let parse = |s: &&str| s.parse().with_context(|| format!("`{s}` is not a number"));
        positional.get(at).map_or(Ok(default), parse)
    };
    let shape = Shape {
        batch: number(2, 1)?,
        cameras: number(3, 3)?,
        prompt_tokens: number(4, 20)?,
        horizon: number(5, 10)?,
        steps: 10,
        rtc: Rtc::Off,
    };
    let begin = Instant::now();
    let table = Arc::new(WeightTable::new(config, shape.steps));
    let source = Synthetic::new(&config, 1);
    let mut device = CudaDevice::open(0, table.clone(), &source)?;
    device.set_tier(tier);
    let loaded = begin.elapsed().as_secs_f64();
    let mut executable = device.compile_cuda(Arc::new(record_with(table, shape)?))?;
    let ready = begin.elapsed().as_secs_f64();
    let (free, total) = device.memory_info()?;
    println!(
        "{} {} {tier:?} {shape:?}\nloaded {loaded:.2} s, ready {ready:.2} s, {} kernels, weights \
         {:.2} GB, activations {:.3} GB, device memory in use {:.2} GB",
        config.family.name(),
        device.name(),
        executable.kernel_count(),
        device.weight_bytes() as f64 / 1e9,
        executable.activation_bytes() as f64 / 1e9,
        (total - free) as f64 / 1e9,
    );
    let actions = time(&mut executable, &config, shape)?;
    match Gauge::open(&device.context().properties) {
        Ok(gauge) => println!("{:?}", gauge.read()),
        Err(error) => println!("{error}"),
    }
    if args.iter().any(|a| a == "--compare") {
        device.set_tier(Tier::Portable);
        let program = executable.program().clone();
        let mut reference = device.compile_cuda(program)?;
        let mut want = actions.clone();
        let request = Request::new(&config, shape);
        reference.run(&request.inputs(), &mut want)?;
        let (mut off, mut norm) = (0.0, 0.0);
        for (a, w) in actions.iter().zip(&want) {
            off += (*a as f64 - *w as f64).powi(2);
            norm += (*w as f64).powi(2);
        }
        println!("relative distance from the portable tier: {:.3e}", (off / norm).sqrt());
    }
    if args.iter().any(|a| a == "--steps") {
        print_steps(&mut executable)?;
    }
    if args.iter().any(|a| a == "--overlap") {
        let program = executable.program().clone();
        let mut other = CudaDevice::open(0, program.weights.clone(), &source)?;
        other.set_tier(tier);
        overlap(&mut [executable, other.compile_cuda(program)?])?;
    }
    Ok(())
}

/// Two batches at a time, each on a stream (and weights) of its own, so that one's loop may run
/// beside the other's vision and prefill.
fn overlap(executables: &mut [CudaExecutable; 2]) -> Result<()> {
    for at_once in [1, 2, 1, 2] {
        let begin = Barrier::new(at_once);
        let rates = std::thread::scope(|scope| {
            let threads: Vec<_> = executables[..at_once]
                .iter_mut()
                .map(|executable| scope.spawn(|| throughput(executable, &begin)))
                .collect();
            threads.into_iter().map(|t| t.join().unwrap_or((0.0, f64::NAN))).collect::<Vec<_>>()
        });
        let sum: f64 = rates.iter().map(|rate| rate.0).sum();
        println!("{at_once} at a time: {sum:.1} samples/s, p50 {:.2} ms", rates[0].1);
    }
    Ok(())
}

/// Samples a second and the median's milliseconds of 1.5 s of runs; zero if one fails.
fn throughput(executable: &mut CudaExecutable, begin: &Barrier) -> (f64, f64) {
    let (config, shape) = (executable.program().config, executable.program().shape);
    let request = Request::new(&config, shape);
    let mut actions = vec![0.0; request.noise.len()];
    let mut run = || executable.run(&request.inputs(), &mut actions).map(|times| times.total_ms);
    let warm = (0..3).all(|_| run().is_ok());
    begin.wait();
    let (start, mut ms) = (Instant::now(), Vec::new());
    while warm && start.elapsed().as_secs_f64() < 1.5 {
        let Ok(one) = run() else { return (0.0, f64::NAN) };
        ms.push(one);
    }
    let rate = (ms.len() * shape.batch) as f64 / start.elapsed().as_secs_f64();
    ms.sort_by(f64::total_cmp);
    (rate, ms.get(ms.len() / 2).copied().unwrap_or(f64::NAN))
}

/// A made-up request.
struct Request {
    images: Vec<u8>,
    cameras: Vec<u32>,
    tokens: Vec<u32>,
    prompt_len: Vec<u32>,
    state: Vec<f32>,
    noise: Vec<f32>,
}

impl Request {
    fn new(config: &Config, shape: Shape) -> Self {
        let mut random = Random(7);
        let side = config.vision.image;
        let pixels = shape.batch * shape.cameras * side * side * 3;
        let images = (0..pixels).map(|_| (random.next() * 256.0) as u8).collect();
        let tokens = (0..shape.batch * shape.prompt_tokens)
            .map(|_| (random.next() * config.vocab as f32) as u32)
            .collect();
        let mut values = |n: usize| (0..n).map(|_| random.next() * 4.0 - 2.0).collect();
        Request {
            images,
            cameras: vec![shape.cameras as u32; shape.batch],
            tokens,
            prompt_len: vec![shape.prompt_tokens as u32; shape.batch],
            state: values(shape.batch * config.action_dim),
            noise: values(shape.batch * shape.horizon * config.action_dim),
        }
    }

    fn inputs(&self) -> Inputs<'_> {
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

/// Prints all timings; returns the actions.
fn time(executable: &mut CudaExecutable, config: &Config, shape: Shape) -> Result<Vec<f32>> {
    let request = Request::new(config, shape);
    let inputs = request.inputs();
    let mut first = vec![0.0; request.noise.len()];
    let mut actions = first.clone();
    let once = executable.run(&inputs, &mut first)?.total_ms;
    // About a second for each kind of measurement.
    let runs = ((1000.0 / once) as usize).clamp(5, 200);
    let (mut total, mut different) = (Vec::new(), 0);
    for _ in 0..runs {
        total.push(executable.run(&inputs, &mut actions)?.total_ms);
        different += (first != actions) as usize;
    }
    let finite = actions.iter().all(|v| v.is_finite());
    let norm = actions.iter().map(|v| (*v as f64).powi(2)).sum::<f64>().sqrt();
    println!("{different} of {runs} replays differ; finite: {finite}; norm of actions {norm:.4}");
    print("input to output", &mut total);
    print("replay", &mut executable.replay_ms(runs)?);
    let stages = executable.stage_ms(runs)?;
    for (i, name) in ["vision", "prefill", "denoise"].into_iter().enumerate() {
        print(name, &mut stages.iter().map(|s| s[i]).collect::<Vec<_>>());
    }
    Ok(actions)
}

fn print(what: &str, ms: &mut [f64]) {
    ms.sort_by(f64::total_cmp);
    let at = |q: f64| ms[((ms.len() - 1) as f64 * q).round() as usize];
    println!("{what:16} p50 {:8.3} ms  p99 {:8.3} ms  min {:8.3} ms", at(0.5), at(0.99), at(0.0));
}

/// Sums by kind of step: names without their numbers.
fn print_steps(executable: &mut CudaExecutable) -> Result<()> {
    let ms = executable.step_ms(5)?;
    let mut kinds: BTreeMap<String, (usize, f64)> = BTreeMap::new();
    for (step, ms) in executable.program().steps.iter().zip(ms) {
        let parts: Vec<&str> = step
            .name
            .split('.')
            .filter(|p| p.parse::<usize>().is_err() && !p.starts_with("step"))
            .collect();
        let (count, sum) = kinds.entry(parts.join(".")).or_default();
        *count += 1;
        *sum += ms;
    }
    for (kind, (count, sum)) in kinds {
        let each = sum / count as f64 * 1e3;
        println!("{kind:24} {count:5} × {each:8.1} µs = {sum:8.3} ms");
    }
    Ok(())
}

/// A small generator of uniform numbers in [0, 1).
struct Random(u64);

impl Random {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 40) as f32 / (1 << 24) as f32
    }
}
