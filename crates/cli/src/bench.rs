//! `pirouette bench`: weights and a shape → medians, p99, stages and throughput.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use pirouette_cuda::gauge::Gauge;
use pirouette_cuda::{CudaDevice, CudaExecutable};
use pirouette_model::{Executable, Family, Inputs, Shape, StageTimes, WeightTable, record_with};
use serde::Serialize;

use crate::args::BenchArgs;
use crate::device;
use crate::energy;
use crate::log;
use crate::meanwhile::Meanwhile;
use crate::provenance::Provenance;
use crate::quantile::quantile;
use crate::random::RandomInputs;
use crate::text::{table, writable, write_json};
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
    /// Runs a second that were asked for; none: one after another.
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
    /// Of runs one after another by the median, of those at a pace by what was reached.
    samples_per_s: f64,
    /// Of runs at a pace: runs a second that were reached, and how many began late, by more than a
    /// tenth of the time between two.
    #[serde(skip_serializing_if = "Option::is_none")]
    achieved_hz: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    late_runs: Option<usize>,
    vision_ms: f64,
    prefill_ms: f64,
    denoise_ms: f64,
    #[serde(flatten)]
    gpu: Option<Gpu>,
    /// Of the runs, warm-up included.
    #[serde(flatten)]
    meanwhile: Meanwhile,
    /// How many runs were [`slow`], of the median; of those the first [`SLOW_TOLD`].
    slow: usize,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    slow_runs: Vec<SlowRun>,
}

/// A run that took longer than others.
#[derive(Clone, Serialize)]
struct SlowRun {
    /// Its begin, since that of the first measured run.
    at_s: f64,
    ms: f64,
    /// Of these, until the inputs were copied together and the graph was queued.
    #[serde(skip_serializing_if = "Option::is_none")]
    queued_ms: Option<f64>,
    /// Of these, from before the graph was queued to its end by the GPU's clock.
    #[serde(skip_serializing_if = "Option::is_none")]
    device_ms: Option<f64>,
    /// Right after it, of runs with pauses.
    #[serde(skip_serializing_if = "Option::is_none")]
    sm_mhz: Option<u32>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    clock_limits: Vec<&'static str>,
}

impl SlowRun {
    /// Whether it would not be slow if its graph had been queued as early as others'.
    fn queued_late(&self, queued_p50_ms: f64, p50_ms: f64) -> bool {
        self.queued_ms.is_some_and(|queued| !slow(self.ms - (queued - queued_p50_ms), p50_ms))
    }
}

/// What a slow run takes longer than others: as much as p99 may at batch 1, or of long runs a part.
const SLOW_MS: f64 = 0.3;
const SLOW_PART: f64 = 0.03;
const SLOW_TOLD: usize = 64;
const CLOCK: &str = "inputs in host memory to actions in host memory";

/// Measures every batch size asked for.
pub fn run(args: &BenchArgs) -> Result<()> {
    writable(&args.json)?;
    if args.batch.is_empty() {
        bail!("nothing to measure: --batch must be at least 1");
    }
    if args.rate.is_some_and(|hz| !(0.01..=1e6).contains(&hz)) {
        bail!("--rate is a number of runs a second, from 0.01 on");
    }
    // Before gigabytes are loaded.
    let batches = args.batch.iter().chain(&args.deterministic);
    batches.copied().try_for_each(|batch| args.shape.shape(batch).check())?;
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
    log::note(format_args!("{} · {} · {}", report.model, report.device, report.weights));
    let table = Arc::new(WeightTable::new(config, args.shape.steps));
    let mut measure = |shape: Shape| -> Result<Row> {
        let program = Arc::new(record_with(Arc::clone(&table), shape)?);
        let sample = RandomInputs::new(&config, shape, 1);
        let measured = match &mut opened {
            device::Opened::Cpu(cpu) => {
                let mut executable = cpu.compile_cpu(program)?;
                let run = |inputs: &Inputs<'_>, actions: &mut [f32]| {
                    Ok(Run::new(executable.run(inputs, actions)?, None))
                };
                let (runs, meanwhile) =
                    Meanwhile::of(|| time(run, &sample, [warmup, runs], period, None))?;
                Measured { runs, meanwhile, gpu: None }
            }
            device::Opened::Cuda(cuda) => {
                let mut executable = cuda.compile_cuda(program)?;
                let gauge = Gauge::open(&cuda.context().properties).ok();
                let run = |inputs: &Inputs<'_>, actions: &mut [f32]| {
                    let run = executable.run_timed(inputs, actions)?;
                    Ok(Run::new(run.times, Some([run.queued_ms, run.device_ms])))
                };
                let (runs, meanwhile) =
                    Meanwhile::of(|| time(run, &sample, [warmup, runs], period, gauge.as_ref()))?;
                let gpu = Some(gpu(cuda, &mut executable, &runs, period)?);
                Measured { gpu, runs, meanwhile }
            }
        };
        Ok(row(shape, &measured, period.is_some()))
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
    runs: Vec<Run>,
    meanwhile: Meanwhile,
    gpu: Option<Gpu>,
}

/// What was measured of one run.
struct Run {
    times: StageTimes,
    /// Until its graph was queued, and of the GPU.
    parts_ms: Option<[f64; 2]>,
    at_s: f64,
    is_late: bool,
    sm_mhz: Option<u32>,
    clock_limits: Vec<&'static str>,
}

impl Run {
    fn new(times: StageTimes, parts_ms: Option<[f64; 2]>) -> Run {
        let (at_s, is_late) = (0.0, false);
        Run { times, parts_ms, at_s, is_late, sm_mhz: None, clock_limits: vec![] }
    }
}

/// What only a GPU tells.
#[derive(Clone, Serialize)]
struct Gpu {
    /// From a run's begin until its inputs were copied together and its graph was queued.
    queued_p50_ms: f64,
    queued_p99_ms: f64,
    /// From before a run's graph was queued to its end, by the GPU's clock.
    device_p50_ms: f64,
    device_p99_ms: f64,
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

/// Runs warm-up and measured runs, one every `period`; the actions of the last must be finite. In
/// the pauses, what holds the clocks down is read after runs slower than those of the warm-up.
fn time(
    mut run: impl FnMut(&Inputs<'_>, &mut [f32]) -> Result<Run>,
    sample: &RandomInputs,
    [warmup, runs]: [usize; 2],
    period: Option<Duration>,
    gauge: Option<&Gauge>,
) -> Result<Vec<Run>> {
    let mut actions = vec![0.0; sample.noise.len()];
    let (mut warm, mut measured) = (Vec::new(), Vec::new());
    let (mut due, mut first) = (Instant::now(), Instant::now());
    for i in 0..warmup + runs {
        let mut is_late = false;
        if let Some(period) = period {
            let now = Instant::now();
            is_late = now > due + period / 10;
            thread::sleep(due.saturating_duration_since(now));
            due += period;
        }
        let begin = Instant::now();
        let mut ran = run(&sample.inputs(), &mut actions)?;
        if i < warmup {
            warm.push(ran.times.total_ms);
            continue;
        }
        if i == warmup {
            warm.sort_by(f64::total_cmp);
            first = begin;
        }
        (ran.at_s, ran.is_late) = ((begin - first).as_secs_f64(), is_late);
        let is_slow = !warm.is_empty() && slow(ran.times.total_ms, quantile(&warm, 0.5));
        if let (true, Some(_), Some(gauge)) = (is_slow, period, gauge) {
            ran.sm_mhz = gauge.read().sm_mhz;
            ran.clock_limits = gauge.clock_limits();
        }
        measured.push(ran);
    }
    match actions.iter().find(|a| !a.is_finite()) {
        Some(bad) => bail!("the run produced {bad}: the weights or the device are broken"),
        None => Ok(measured),
    }
}

/// Replays without copies, stages as graphs of their own, sensors after two seconds of load, at the
/// pace of the runs.
fn gpu(
    device: &CudaDevice,
    executable: &mut CudaExecutable,
    measured: &[Run],
    period: Option<Duration>,
) -> Result<Gpu> {
    let part = |i: usize| {
        let mut ms: Vec<f64> = measured.iter().filter_map(|r| r.parts_ms.map(|p| p[i])).collect();
        ms.sort_by(f64::total_cmp);
        ms
    };
    let (queued_ms, device_ms) = (part(0), part(1));
    let runs = measured.len().clamp(5, 200);
    let mut replays = executable.replay_ms(runs)?;
    replays.sort_by(f64::total_cmp);
    let stage_runs = executable.stage_ms(runs)?;
    let stage = |i: usize| {
        let mut ms: Vec<f64> = stage_runs.iter().map(|s| s[i]).collect();
        ms.sort_by(f64::total_cmp);
        quantile(&ms, 0.5)
    };
    let gauge = Gauge::open(&device.context().properties).ok();
    let mut due = Instant::now();
    let work = || {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        due += period.unwrap_or_default();
        let replays = executable.replay_ms(if period.is_some() { 1 } else { 8 })?;
        Ok(replays.len() * executable.program().shape.batch)
    };
    let counter = || gauge.as_ref().and_then(Gauge::energy_joules);
    // Two seconds have to be enough for a few runs.
    let power = match period {
        Some(period) if period > Duration::from_secs(1) => None,
        _ => energy::of(counter, work)?,
    };
    let apart = period.unwrap_or_default().as_secs_f64() / executable.program().shape.batch as f64;
    let joules = |power: energy::Power| power.watts * power.seconds_per_sample.max(apart);
    let reading = gauge.as_ref().map(Gauge::read).unwrap_or_default();
    let (free, total) = device.memory_info()?;
    Ok(Gpu {
        queued_p50_ms: quantile(&queued_ms, 0.5),
        queued_p99_ms: quantile(&queued_ms, 0.99),
        device_p50_ms: quantile(&device_ms, 0.5),
        device_p99_ms: quantile(&device_ms, 0.99),
        replay_p50_ms: quantile(&replays, 0.5),
        kernels: executable.kernel_count(),
        memory_used_bytes: total - free,
        activation_bytes: executable.activation_bytes(),
        power_watts: power.map(|power| power.watts),
        joules_per_sample: power.map(joules),
        sm_mhz: reading.sm_mhz,
        temperature_celsius: reading.temperature_celsius,
        stages: [stage(0), stage(1), stage(2)],
    })
}

fn row(shape: Shape, measured: &Measured, paced: bool) -> Row {
    let runs = &measured.runs;
    let sorted = |f: fn(&StageTimes) -> f64| {
        let mut values: Vec<f64> = runs.iter().map(|run| f(&run.times)).collect();
        values.sort_by(f64::total_cmp);
        values
    };
    let median = |f| quantile(&sorted(f), 0.5);
    let total = sorted(|t| t.total_ms);
    let mean = total.iter().sum::<f64>() / total.len() as f64;
    let own = [median(|t| t.vision_ms), median(|t| t.prefill_ms), median(|t| t.denoise_ms)];
    let time = runs.last().filter(|last| paced && last.at_s > 0.0).map(|last| last.at_s);
    let achieved_hz = time.map(|seconds| (runs.len() - 1) as f64 / seconds);
    let own_rate = 1e3 / quantile(&total, 0.5);
    let [vision_ms, prefill_ms, denoise_ms] = measured.gpu.as_ref().map_or(own, |g| g.stages);
    Row {
        batch: shape.batch,
        cameras: shape.cameras,
        prompt_tokens: shape.prompt_tokens,
        horizon: shape.horizon,
        euler_steps: shape.steps,
        runs: runs.len(),
        p50_ms: quantile(&total, 0.5),
        mean_ms: mean,
        p99_ms: quantile(&total, 0.99),
        min_ms: total[0],
        samples_per_s: shape.batch as f64 * achieved_hz.unwrap_or(own_rate),
        achieved_hz,
        late_runs: paced.then(|| runs.iter().filter(|run| run.is_late).count()),
        vision_ms,
        prefill_ms,
        denoise_ms,
        gpu: measured.gpu.clone(),
        meanwhile: measured.meanwhile,
        slow: total.iter().filter(|&&ms| slow(ms, quantile(&total, 0.5))).count(),
        slow_runs: slow_runs(runs, quantile(&total, 0.5)),
    }
}

/// Whether a run of `ms` took longer than others of a median.
fn slow(ms: f64, median_ms: f64) -> bool {
    ms > median_ms + SLOW_MS.max(SLOW_PART * median_ms)
}

fn slow_runs(runs: &[Run], median_ms: f64) -> Vec<SlowRun> {
    runs.iter()
        .filter(|run| slow(run.times.total_ms, median_ms))
        .take(SLOW_TOLD)
        .map(|run| SlowRun {
            at_s: run.at_s,
            ms: run.times.total_ms,
            queued_ms: run.parts_ms.map(|p| p[0]),
            device_ms: run.parts_ms.map(|p| p[1]),
            sm_mhz: run.sm_mhz,
            clock_limits: run.clock_limits.clone(),
        })
        .collect()
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
        if let (Some(rate), Some(reached), Some(late)) =
            (report.rate_hz, r.achieved_hz, r.late_runs)
        {
            let of = r.runs;
            println!(
                "batch {}: {rate} runs a second asked for, {reached:.2} reached; {late} of {of} \
                 began late",
                r.batch
            );
        }
        if let Some(s) = r.meanwhile.stolen_s.filter(|&s| s > 0.0) {
            println!("batch {}: this machine's host took {s:.2} s of its cores meanwhile", r.batch);
        }
        if let Some(n) = r.meanwhile.page_faults.filter(|&n| n > 10 * r.runs as u64) {
            println!("batch {}: {n} page faults meanwhile, warm-up included", r.batch);
        }
        let Some(g) = &r.gpu else { continue };
        println!(
            "batch {}: queued after {:.2} ms, p99 {:.2}; by the GPU's clock {:.2} ms, p99 {:.2}; \
             replay {:.2} ms, {} kernels, {:.2} GB in use, {} W, {} J a chunk, {} MHz, {} °C",
            r.batch,
            g.queued_p50_ms,
            g.queued_p99_ms,
            g.device_p50_ms,
            g.device_p99_ms,
            g.replay_p50_ms,
            g.kernels,
            g.memory_used_bytes as f64 / 1e9,
            g.power_watts.map_or("–".into(), |w| format!("{w:.0}")),
            g.joules_per_sample.map_or("–".into(), |j| format!("{j:.2}")),
            g.sm_mhz.map_or("–".into(), |m| m.to_string()),
            g.temperature_celsius.map_or("–".into(), |t| t.to_string()),
        );
        if r.slow > 0 {
            let late = |run: &&SlowRun| run.queued_late(g.queued_p50_ms, r.p50_ms);
            println!(
                "batch {}: {} of {} runs were slow ({SLOW_MS} ms or {:.0} % above the median); of \
                 the first {} {} were so by being queued late (--json tells when)",
                r.batch,
                r.slow,
                r.runs,
                SLOW_PART * 100.0,
                r.slow_runs.len(),
                r.slow_runs.iter().filter(late).count(),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use pirouette_model::Config;

    use super::*;

    fn of(times: &[f64]) -> Vec<Run> {
        let run = |&total_ms: &f64| {
            Run::new(StageTimes { total_ms, ..StageTimes::default() }, Some([0.05, total_ms - 0.1]))
        };
        times.iter().map(run).collect()
    }

    fn shape() -> Shape {
        let (cameras, prompt_tokens, horizon) = (1, 1, 1);
        let rtc = pirouette_model::Rtc::Off;
        Shape { batch: 1, cameras, prompt_tokens, horizon, steps: 1, rtc }
    }

    fn sample() -> RandomInputs {
        RandomInputs::new(&Config::pi0(), shape(), 1)
    }

    #[test]
    fn slow_runs_are_told_with_the_gpus_part() {
        let told = slow_runs(&of(&[9.0, 9.2, 9.31, 9.0, 10.0]), 9.0);
        assert_eq!(told.iter().map(|run| run.ms).collect::<Vec<_>>(), [9.31, 10.0]);
        assert_eq!(told[1].device_ms, Some(9.9));
        assert_eq!(slow_runs(&of(&[20.0; 200]), 9.0).len(), SLOW_TOLD);
        // A batch of 64: 3 % of it.
        assert_eq!(slow_runs(&of(&[379.0, 391.0]), 378.0).len(), 1);
    }

    #[test]
    fn a_slow_run_was_queued_late_if_it_is_not_slow_without_that() {
        let of = |ms: f64, queued_ms: f64| {
            let parts_ms = Some([queued_ms, ms]);
            let run = Run::new(StageTimes { total_ms: ms, ..StageTimes::default() }, parts_ms);
            slow_runs(&[run], 9.0)[0].queued_late(0.1, 9.0)
        };
        assert!(of(9.7, 0.8));
        assert!(!of(9.7, 0.1), "the GPU's");
        assert!(!of(10.0, 0.5), "both's: without the host it is slow, too");
    }

    #[test]
    fn runs_are_taken_after_the_warm_up_and_begin_a_period_apart() {
        let sample = sample();
        let mut calls = 0;
        let run = |_: &Inputs<'_>, actions: &mut [f32]| {
            calls += 1;
            actions.fill(calls as f32);
            Ok(Run::new(StageTimes { total_ms: calls as f64, ..StageTimes::default() }, None))
        };
        let period = Duration::from_millis(2);
        let began = Instant::now();
        let runs = time(run, &sample, [3, 4], Some(period), None).unwrap();
        let ms: Vec<f64> = runs.iter().map(|run| run.times.total_ms).collect();
        assert_eq!((ms, calls), (vec![4.0, 5.0, 6.0, 7.0], 7));
        assert_eq!(runs[0].at_s, 0.0);
        // The seventh is due then, however late another began.
        assert!(began.elapsed() >= 6 * period, "{:?}", began.elapsed());
        assert!(runs.is_sorted_by(|a, b| a.at_s < b.at_s));
    }

    #[test]
    fn a_pace_that_is_not_reached_is_told() {
        let run = |_: &Inputs<'_>, actions: &mut [f32]| {
            actions.fill(1.0);
            thread::sleep(Duration::from_millis(5));
            Ok(Run::new(StageTimes::default(), None))
        };
        let runs = time(run, &sample(), [1, 9], Some(Duration::from_millis(1)), None).unwrap();
        let program = Shape { batch: 2, ..shape() };
        let row =
            row(program, &Measured { runs, meanwhile: Meanwhile::default(), gpu: None }, true);
        assert!(row.achieved_hz.unwrap() <= 200.0, "{:?}", row.achieved_hz);
        assert_eq!(row.late_runs, Some(9));
        assert_eq!(row.samples_per_s, 2.0 * row.achieved_hz.unwrap());
    }

    #[test]
    fn what_is_not_finite_is_no_measurement() {
        let run = |_: &Inputs<'_>, actions: &mut [f32]| {
            actions.fill(f32::NAN);
            Ok(Run::new(StageTimes::default(), None))
        };
        assert!(time(run, &sample(), [0, 1], None, None).is_err());
    }
}
