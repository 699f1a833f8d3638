//! `pirouette verify`: a device at its precision against the F32 reference, step by step.
//!
//! Both run the same recorded program on the same random observation. What is compared after a
//! step is what it wrote; only steps that end a residual update are kept, so that the reference
//! fits in memory beside nothing else. The actions compared are those of a whole run, on a GPU its
//! graph's.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Result, bail};
use pirouette_cpu::{Arena, CpuDevice, Isa, Options};
use pirouette_cuda::CudaDevice;
use pirouette_model::program::{Epilogue, Op, Step, View};
use pirouette_model::{Executable, Program, WeightTable, record_with};
use pirouette_testing::fixture::relative_l2;
use serde::Serialize;

use crate::args::{DeviceArgs, Precision, VerifyArgs, WeightArgs};
use crate::device::{self, Opened};
use crate::log;
use crate::provenance::Provenance;
use crate::random::RandomInputs;
use crate::text::{table, writable, write_json};
use crate::weights::Weights;

/// Actions diverge when their relative error passes this bound. A step does, too, or when its
/// error passes a fifth of the bound and is five times its predecessor's: bf16 holds 8 bits, and
/// errors of a sound network add up slowly.
const DIVERGED: f64 = 0.1;
/// The bound of a step at fp8. Random full-size weights reach 0.11 at the last layer of the
/// prefill, from which actions are 0.04 off; the first MLP brings 0.04 at once.
const DIVERGED_FP8: f64 = 0.25;
const JUMP: f64 = 5.0;

#[derive(Serialize)]
struct Row {
    step: String,
    relative_l2: f64,
}

#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    provenance: Provenance,
    weights: String,
    reference: String,
    device: String,
    precision: &'static str,
    steps: Vec<Row>,
    actions_relative_l2: f64,
    first_diverging: Option<String>,
}

/// Runs both and compares; fails when a step diverges.
pub fn run(args: &VerifyArgs) -> Result<()> {
    writable(&args.json)?;
    let weights = Weights::open(&WeightArgs {
        checkpoint: args.dir.clone(),
        model: args.model,
        weight_seed: 1,
        rope: args.rope,
    })?;
    let table = Arc::new(WeightTable::new(weights.config, args.shape.steps));
    let program = Arc::new(record_with(table, args.shape.shape(1))?);
    let inputs = RandomInputs::new(&weights.config, program.shape, args.seed);
    let reference_args = DeviceArgs { precision: Precision::F32, ..args.device.clone() };
    let portable = DeviceArgs { device: "cpu".into(), ..reference_args };
    log::note(format_args!("reference: F32 on the CPU"));
    let reference = {
        let mut cpu =
            device::open_cpu(&portable, weights.config, args.shape.steps, weights.source())?;
        observe(&mut cpu, &program, &inputs)?
    };
    let steps = args.shape.steps;
    let (name, tested) = match device::open(&args.device, weights.config, steps, weights.source())?
    {
        Opened::Cpu(cpu) => on_cpu(args, &weights, &program, &inputs, cpu)?,
        Opened::Cuda(mut cuda) => {
            let name = pirouette_model::Device::name(&*cuda);
            log::note(format_args!("under test: {name}"));
            (name, observe_cuda(&mut cuda, &program, &inputs)?)
        }
    };
    let precision = args.device.precision;
    let report = compare(&reference, &tested, precision, weights.origin, name);
    match &args.json {
        Some(path) => write_json(path, &report)?,
        None => print(&report),
    }
    match report.first_diverging {
        Some(step) => bail!("diverges at `{step}`"),
        None => Ok(()),
    }
}

fn on_cpu(
    args: &VerifyArgs,
    weights: &Weights,
    program: &Arc<Program>,
    inputs: &RandomInputs,
    mut cpu: CpuDevice,
) -> Result<(String, Run)> {
    if args.device.precision == Precision::F32 && cpu.isa() != Isa::Portable {
        // F32 against itself says nothing: the portable path is the other implementation.
        let options = Options {
            precision: pirouette_cpu::Precision::F32,
            threads: args.device.threads,
            isa: Some(Isa::Portable),
        };
        drop(cpu);
        let steps = args.shape.steps;
        cpu =
            pirouette_cpu::load(weights.config, steps, weights.source(), options, &mut |_, _| ())?;
    }
    let name = pirouette_model::Device::name(&cpu);
    log::note(format_args!("under test: {name}"));
    Ok((name, observe(&mut cpu, program, inputs)?))
}

/// Values of a run: what each kept step wrote, and the actions.
struct Run {
    steps: Vec<(String, Vec<f32>)>,
    actions: Vec<f32>,
}

/// What is kept of a step: residual streams and the last keys.
fn kept(step: &Step) -> Option<View> {
    match &step.op {
        Op::Linear(l) => match &l.epilogue {
            Epilogue::Add { out, .. }
            | Epilogue::AddFree { out }
            | Epilogue::Guide { out, .. }
            | Epilogue::StorePosition { out, .. } => Some(*out),
            Epilogue::Store { out } if !step.name.ends_with(".qkv") => Some(*out),
            Epilogue::Rope { q: None, k, .. } => Some(*k),
            _ => None,
        },
        _ => None,
    }
}

/// The part of a buffer's `values` that a view shows.
fn part(program: &Program, view: View, values: &[f32]) -> Vec<f32> {
    let width = program.buffers[view.buffer.0].cols;
    let groups = values.chunks(view.stride * width);
    let rows = groups.filter_map(|group| {
        let first = view.first * width;
        Some(group.get(first..first + view.count * width)?.chunks(width))
    });
    rows.flatten().flat_map(|row| &row[view.col..view.col + view.cols]).copied().collect()
}

fn observe(cpu: &mut CpuDevice, program: &Arc<Program>, inputs: &RandomInputs) -> Result<Run> {
    let mut executable = cpu.compile_cpu(Arc::clone(program))?;
    let mut actions = vec![0.0; inputs.noise.len()];
    let mut steps = Vec::new();
    executable.run_observed(&inputs.inputs(), &mut actions, &mut |step, arena: &Arena<'_>| {
        if let Some(view) = kept(step) {
            steps.push((step.name.clone(), part(program, view, arena.floats(view.buffer))));
        }
    })?;
    Ok(Run { steps, actions })
}

fn observe_cuda(
    cuda: &mut CudaDevice,
    program: &Arc<Program>,
    inputs: &RandomInputs,
) -> Result<Run> {
    let mut executable = cuda.compile_cuda(Arc::clone(program))?;
    let mut actions = vec![0.0; inputs.noise.len()];
    executable.run(&inputs.inputs(), &mut actions)?;
    // Once more, launch by launch: the inputs are there, but for the noise that became actions.
    executable.write_buffer("actions", &inputs.noise)?;
    let mut steps = Vec::new();
    for (at, step) in program.steps.iter().enumerate() {
        executable.run_steps(at..at + 1)?;
        // The state's row is written together with the first action rows, one step later.
        let Some(view) = kept(step).filter(|_| !step.name.ends_with(".state")) else { continue };
        let name = &program.buffers[view.buffer.0].name;
        let Some(values) = executable.read_buffer(name)? else { continue };
        steps.push((step.name.clone(), part(program, view, &values)));
    }
    Ok(Run { steps, actions })
}

fn compare(
    reference: &Run,
    tested: &Run,
    precision: Precision,
    weights: String,
    device: String,
) -> Report {
    let bound = match precision {
        Precision::Fp8 => DIVERGED_FP8,
        Precision::F32 | Precision::Bf16 => DIVERGED,
    };
    let mut steps: Vec<Row> = Vec::new();
    let mut first_diverging = None;
    // In the order of the program, but not every device tells of every step.
    let mut wanted = reference.steps.iter();
    for (name, got) in &tested.steps {
        let Some((_, want)) = wanted.find(|(known, _)| known == name) else { continue };
        let error = relative_l2(got, want);
        let jumped = steps.last().is_some_and(|previous: &Row| {
            error > bound / JUMP && error > JUMP * previous.relative_l2.max(1e-6)
        });
        if first_diverging.is_none() && (error.is_nan() || error > bound || jumped) {
            first_diverging = Some(name.clone());
        }
        steps.push(Row { step: name.clone(), relative_l2: error });
    }
    let actions_relative_l2 = relative_l2(&tested.actions, &reference.actions);
    if steps.is_empty() || actions_relative_l2.is_nan() || actions_relative_l2 > DIVERGED {
        first_diverging = first_diverging.or(Some("actions".into()));
    }
    Report {
        provenance: Provenance::here(),
        weights,
        reference: "cpu f32".into(),
        device,
        precision: precision.name(),
        steps,
        actions_relative_l2,
        first_diverging,
    }
}

/// The worst step of each stage: its first that is no number, if there is one.
fn worst(steps: &[Row]) -> BTreeMap<&str, (f64, &str)> {
    let mut stages: BTreeMap<&str, (f64, &str)> = BTreeMap::new();
    for row in steps {
        let stage = row.step.split('.').next().unwrap_or("");
        let worst = stages.entry(stage).or_insert((0.0, ""));
        let first_nan = row.relative_l2.is_nan() && !worst.0.is_nan();
        if first_nan || row.relative_l2 > worst.0 {
            *worst = (row.relative_l2, &row.step);
        }
    }
    stages
}

fn print(report: &Report) {
    let stages = worst(&report.steps);
    let rows: Vec<Vec<String>> = ["vision", "prefill", "denoise"]
        .iter()
        .filter_map(|s| stages.get(s).map(|w| (s, w)))
        .map(|(s, (error, step))| vec![s.to_string(), format!("{error:.2e}"), step.to_string()])
        .collect();
    let Report { weights, precision, device, reference, .. } = report;
    println!("{weights}, {precision} on {device}, against {reference}");
    print!("{}", table(&["stage", "worst relative L2", "at step"], &rows));
    println!("actions: {:.3e}", report.actions_relative_l2);
    match &report.first_diverging {
        Some(step) => println!("first diverging step: {step}"),
        None => println!("no step diverges"),
    }
}

#[cfg(test)]
mod tests {
    use pirouette_model::{Config, Rtc, Shape};

    use super::*;

    fn run(steps: &[(&str, f32)], actions: f32) -> Run {
        let steps = steps.iter().map(|(name, value)| (name.to_string(), vec![*value; 8]));
        Run { steps: steps.collect(), actions: vec![actions; 4] }
    }

    fn diverging_at(precision: Precision, tested: &Run) -> Option<String> {
        let reference = run(&[("a", 1.0), ("b.state", 2.0), ("c", 3.0)], 1.0);
        compare(&reference, tested, precision, String::new(), String::new()).first_diverging
    }

    fn diverging(tested: &Run) -> Option<String> {
        diverging_at(Precision::Bf16, tested)
    }

    #[test]
    fn fp8_may_err_more_but_not_its_actions() {
        let rounded = run(&[("a", 1.004), ("c", 3.13)], 1.04);
        assert_eq!(diverging(&rounded).unwrap(), "c");
        assert_eq!(diverging_at(Precision::Fp8, &rounded), None);
        let jumps = run(&[("a", 1.004), ("c", 3.3)], 1.04);
        assert_eq!(diverging_at(Precision::Fp8, &jumps).unwrap(), "c");
        let far = run(&[("a", 1.2), ("c", 3.6)], 1.12);
        assert_eq!(diverging_at(Precision::Fp8, &far).unwrap(), "actions");
    }

    #[test]
    fn the_first_step_that_diverges_is_named_also_where_a_device_tells_of_fewer() {
        assert_eq!(diverging(&run(&[("a", 1.001), ("c", 3.01)], 1.001)), None);
        assert_eq!(diverging(&run(&[("a", 1.001), ("c", 4.0)], 2.0)).unwrap(), "c");
        assert_eq!(diverging(&run(&[("a", f32::NAN), ("c", 4.0)], 2.0)).unwrap(), "a");
        // The graph is another way than step by step.
        for actions in [1.2, f32::NAN] {
            assert_eq!(diverging(&run(&[("a", 1.0), ("c", 3.0)], actions)).unwrap(), "actions");
        }
        assert_eq!(diverging(&run(&[], 1.0)).unwrap(), "actions", "nothing was compared");
    }

    #[test]
    fn nothing_is_worse_than_what_is_no_number() {
        let errors = [("a.0", 0.1), ("a.1", f64::NAN), ("a.2", 9.0), ("a.3", f64::NAN), ("b", 0.2)];
        let row = |(step, relative_l2): (&str, f64)| Row { step: step.into(), relative_l2 };
        let steps: Vec<Row> = errors.map(row).into();
        let stages = worst(&steps);
        assert!(stages["a"].0.is_nan());
        assert_eq!((stages["a"].1, stages["b"]), ("a.1", (0.2, "b")));
    }

    #[test]
    fn what_a_step_wrote_is_taken_out_of_its_buffer() {
        let shape =
            Shape { batch: 1, cameras: 2, prompt_tokens: 3, horizon: 4, steps: 1, rtc: Rtc::Off };
        let table = Arc::new(WeightTable::new(Config::pi0(), 1));
        let program = record_with(table, shape).unwrap();
        let at = program.buffers.iter().position(|b| b.name == "actions").unwrap();
        let (buffer, width) = (pirouette_model::program::BufferId(at), program.buffers[at].cols);
        let values: Vec<f32> = (0..4 * width).map(|i| i as f32).collect();
        let view = View { buffer, col: 1, cols: 2, stride: 2, first: 1, count: 1 };
        let rows = [1, 3].map(|row| [row * width + 1, row * width + 2]);
        let want: Vec<f32> = rows.as_flattened().iter().map(|i| *i as f32).collect();
        assert_eq!(part(&program, view, &values), want);
    }
}
