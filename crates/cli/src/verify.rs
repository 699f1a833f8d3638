//! `pirouette verify`: a device at its precision against the F32 reference, step by step.
//!
//! Both run the same recorded program on the same random observation. What is compared after a
//! step is the buffer it wrote; only steps that end a residual update are kept, so that the
//! reference fits in memory beside nothing else.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Result, bail};
use pirouette_cpu::{Arena, CpuDevice, Isa, Options};
use pirouette_model::program::{BufferId, Epilogue, Op, Step};
use pirouette_model::{Program, WeightTable, record_with};
use pirouette_testing::fixture::relative_l2;
use serde::Serialize;

use crate::args::{DeviceArgs, Precision, VerifyArgs, WeightArgs};
use crate::bench::RandomInputs;
use crate::device;
use crate::text::{table, write_json};
use crate::weights::Weights;

/// A step diverges when its relative error passes this bound, or grows fivefold over its
/// predecessor's in one step: bf16 holds 8 bits, and errors of a sound network add up slowly.
const DIVERGED: f64 = 0.1;
const JUMP: f64 = 5.0;

#[derive(Serialize)]
struct Row {
    step: String,
    relative_l2: f64,
}

#[derive(Serialize)]
struct Report {
    weights: String,
    reference: String,
    device: String,
    steps: Vec<Row>,
    actions_relative_l2: f64,
    first_diverging: Option<String>,
}

/// Runs both and compares; fails when a step diverges.
pub fn run(args: &VerifyArgs) -> Result<()> {
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
    eprintln!("reference: F32 on the CPU");
    let reference = {
        let mut cpu =
            device::open_cpu(&portable, weights.config, args.shape.steps, weights.source())?;
        observe(&mut cpu, &program, &inputs)?
    };
    let mut cpu =
        device::open_cpu(&args.device, weights.config, args.shape.steps, weights.source())?;
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
    eprintln!("under test: {name}");
    let tested = observe(&mut cpu, &program, &inputs)?;
    let report = compare(&reference, &tested, weights.origin, name);
    match &args.json {
        Some(path) => write_json(path, &report)?,
        None => print(&report),
    }
    match report.first_diverging {
        Some(step) => bail!("diverges at `{step}`"),
        None => Ok(()),
    }
}

/// Values of a run: what each kept step wrote, and the actions.
struct Run {
    steps: Vec<(String, Vec<f32>)>,
    actions: Vec<f32>,
}

/// The buffer whose value is kept after a step: residual streams and the last keys.
fn kept(step: &Step) -> Option<BufferId> {
    match &step.op {
        Op::Linear(l) => match &l.epilogue {
            Epilogue::Add { out, .. }
            | Epilogue::AddFree { out }
            | Epilogue::Guide { out, .. }
            | Epilogue::StorePosition { out, .. } => Some(out.buffer),
            Epilogue::Store { out } if !step.name.ends_with(".qkv") => Some(out.buffer),
            Epilogue::Rope { q: None, k, .. } => Some(k.buffer),
            _ => None,
        },
        _ => None,
    }
}

fn observe(cpu: &mut CpuDevice, program: &Arc<Program>, inputs: &RandomInputs) -> Result<Run> {
    let mut executable = cpu.compile_cpu(Arc::clone(program))?;
    let mut actions = vec![0.0; inputs.noise.len()];
    let mut steps = Vec::new();
    executable.run_observed(&inputs.inputs(), &mut actions, &mut |step, arena: &Arena<'_>| {
        if let Some(buffer) = kept(step) {
            steps.push((step.name.clone(), arena.floats(buffer).to_vec()));
        }
    })?;
    Ok(Run { steps, actions })
}

fn compare(reference: &Run, tested: &Run, weights: String, device: String) -> Report {
    let mut steps: Vec<Row> = Vec::new();
    let mut first_diverging = None;
    for ((name, want), (_, got)) in reference.steps.iter().zip(&tested.steps) {
        let error = relative_l2(got, want);
        let jumped = steps
            .last()
            .is_some_and(|previous| error > 0.02 && error > JUMP * previous.relative_l2.max(1e-6));
        if first_diverging.is_none() && (error.is_nan() || error > DIVERGED || jumped) {
            first_diverging = Some(name.clone());
        }
        steps.push(Row { step: name.clone(), relative_l2: error });
    }
    Report {
        weights,
        reference: "cpu f32".into(),
        device,
        steps,
        actions_relative_l2: relative_l2(&tested.actions, &reference.actions),
        first_diverging,
    }
}

fn print(report: &Report) {
    let mut stages: BTreeMap<&str, (f64, &str)> = BTreeMap::new();
    for row in &report.steps {
        let stage = row.step.split('.').next().unwrap_or("");
        let worst = stages.entry(stage).or_insert((0.0, ""));
        if row.relative_l2 > worst.0 {
            *worst = (row.relative_l2, &row.step);
        }
    }
    let rows: Vec<Vec<String>> = ["vision", "prefill", "denoise"]
        .iter()
        .filter_map(|s| stages.get(s).map(|w| (s, w)))
        .map(|(s, (error, step))| vec![s.to_string(), format!("{error:.2e}"), step.to_string()])
        .collect();
    println!("{} on {}, against {}", report.weights, report.device, report.reference);
    print!("{}", table(&["stage", "worst relative L2", "at step"], &rows));
    println!("actions: {:.3e}", report.actions_relative_l2);
    match &report.first_diverging {
        Some(step) => println!("first diverging step: {step}"),
        None => println!("no step diverges"),
    }
}
