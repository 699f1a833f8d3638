//! `pirouette plan`: a recorded program → its steps with shapes, FLOPs, bytes and limits.

use anyhow::Result;
use pirouette_model::cost::Rates;
use pirouette_model::program::{Stage, Step};
use pirouette_model::{Program, record};
use serde::Serialize;

use crate::args::{PlanArgs, Precision};
use crate::text::{scaled, table, write_json};

#[derive(Serialize)]
struct StepRow {
    name: String,
    kind: &'static str,
    shape: String,
    flops: f64,
    weight_bytes: f64,
    limit_us: f64,
}

#[derive(Serialize)]
struct StageRow {
    stage: &'static str,
    steps: usize,
    flops: f64,
    weight_bytes: f64,
    limit_ms: f64,
}

#[derive(Serialize)]
struct Plan {
    model: &'static str,
    batch: usize,
    cameras: usize,
    prompt_tokens: usize,
    horizon: usize,
    euler_steps: usize,
    precision: &'static str,
    tflops: f64,
    tbps: f64,
    weight_bytes: u64,
    stages: Vec<StageRow>,
    steps: Vec<StepRow>,
}

const STAGES: [(Stage, &str); 3] =
    [(Stage::Vision, "vision"), (Stage::Prefill, "prefill"), (Stage::Denoise, "denoise")];

/// Prints (or writes) the plan.
pub fn run(args: &PlanArgs) -> Result<()> {
    let program = record(&args.model.config(), args.shape.shape(args.batch))?;
    let rates = Rates {
        flops: args.tflops * 1e12,
        bandwidth: args.tbps * 1e12,
        weight_bytes: args.precision.matrix_bytes(),
        e4m3: args.precision == Precision::Fp8,
    };
    let plan = plan(&program, args.precision, &rates);
    match &args.json {
        Some(path) => write_json(path, &plan),
        None => {
            print(&plan, args.all);
            Ok(())
        }
    }
}

fn plan(program: &Program, precision: Precision, rates: &Rates) -> Plan {
    let row = |step: &Step| {
        let cost = program.cost(step);
        StepRow {
            name: step.name.clone(),
            kind: step.op.kind(),
            shape: program.shape_text(step),
            flops: cost.flops,
            weight_bytes: cost.weight_bytes(rates),
            limit_us: cost.limit_ms(rates) * 1e3,
        }
    };
    let stage = |(stage, name): (Stage, &'static str)| {
        let cost = program.stage_cost(stage);
        StageRow {
            stage: name,
            steps: program.steps.iter().filter(|s| s.stage() == stage).count(),
            flops: cost.flops,
            weight_bytes: cost.weight_bytes(rates),
            limit_ms: cost.limit_ms(rates),
        }
    };
    Plan {
        model: program.config.family.name(),
        batch: program.shape.batch,
        cameras: program.shape.cameras,
        prompt_tokens: program.shape.prompt_tokens,
        horizon: program.shape.horizon,
        euler_steps: program.shape.steps,
        precision: precision.name(),
        tflops: rates.flops / 1e12,
        tbps: rates.bandwidth / 1e12,
        weight_bytes: program.weight_bytes(rates),
        stages: STAGES.map(stage).into(),
        steps: program.steps.iter().map(row).collect(),
    }
}

/// Whether a step is shown in the short form: rim steps, and layer 0 and the last of each tower.
fn shown(name: &str) -> bool {
    let layer = name.split('.').find_map(|p| p.parse::<usize>().ok());
    let step = name.split('.').find_map(|p| p.strip_prefix("step"));
    layer.is_none_or(|l| l == 0 || name.ends_with(".kv"))
        && step.is_none_or(|s| s == "0" || s == "1")
}

fn print(plan: &Plan, all: bool) {
    println!(
        "{} · {} · batch {} · {} cameras · {} prompt tokens · horizon {} · {} Euler steps",
        plan.model,
        plan.precision,
        plan.batch,
        plan.cameras,
        plan.prompt_tokens,
        plan.horizon,
        plan.euler_steps
    );
    println!(
        "limits at {} TFLOP/s{} and {} TB/s · weights at rest {}B\n",
        plan.tflops,
        if plan.precision == "fp8" { " (E4M3 twice that)" } else { "" },
        plan.tbps,
        scaled(plan.weight_bytes as f64)
    );
    let steps: Vec<Vec<String>> = plan
        .steps
        .iter()
        .filter(|s| all || shown(&s.name))
        .map(|s| {
            vec![
                s.name.clone(),
                s.kind.into(),
                s.shape.clone(),
                scaled(s.flops),
                scaled(s.weight_bytes),
                format!("{:.2}", s.limit_us),
            ]
        })
        .collect();
    print!("{}", table(&["step", "kind", "shape", "FLOP", "weight bytes", "limit µs"], &steps));
    if !all {
        println!(
            "… {} of {} steps shown (one layer of each tower, Euler steps 0 and 1); \
             --all shows every one",
            steps.len(),
            plan.steps.len()
        );
    }
    let stages: Vec<Vec<String>> = plan
        .stages
        .iter()
        .map(|s| {
            vec![
                s.stage.into(),
                s.steps.to_string(),
                scaled(s.flops),
                scaled(s.weight_bytes),
                format!("{:.2}", s.limit_ms),
            ]
        })
        .collect();
    println!("\n{}", table(&["stage", "steps", "FLOP", "weight bytes", "limit ms"], &stages));
    let total: f64 = plan.stages.iter().map(|s| s.limit_ms).sum();
    println!("limit of the whole: {total:.2} ms, {:.0} samples/s", plan.batch as f64 / total * 1e3);
}
