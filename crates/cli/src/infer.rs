//! `pirouette infer`: one observation → one chunk of actions, printed or saved.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use pirouette_engine::{BucketRule, draw_seed};
use pirouette_engine::{Engine, EngineOptions, Noise, Request};
use pirouette_model::WeightTable;
use pirouette_policy::{NdArray, Value, sample_observation};

use crate::args::{DeviceArgs, RopeArgs, WeightArgs, euler_steps};
use crate::log::LogFormat;
use crate::model::{self, Open};
use crate::setup::{self, ConfigArgs, PolicyArgs};
use crate::text::{writable, write_json};
use crate::weights::Weights;
use crate::{device, log, npz};

/// Arguments of `infer`.
#[derive(clap::Args)]
pub struct InferArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Checkpoint directory (default: random weights of the full size).
    #[arg(long)]
    pub checkpoint: Option<PathBuf>,
    #[command(flatten)]
    pub rope: RopeArgs,
    /// The observation: `.npz`, or `.msgpack` as a client sends it (default: a random one). Maps
    /// in an `.npz` are named with a bar: `np.savez(file, **{"images|cam_high": image, …})`.
    #[arg(long)]
    pub observation: Option<PathBuf>,
    /// Instruction, when the observation brings none.
    #[arg(long)]
    pub prompt: Option<String>,
    /// Seed of the noise (default: drawn and printed).
    #[arg(long)]
    pub seed: Option<u64>,
    /// Euler steps (default: the configuration's).
    #[arg(long, value_parser = euler_steps)]
    pub steps: Option<usize>,
    /// Save the actions as a NumPy file.
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// Write actions, seed and times as JSON to this file (`-` for standard output).
    #[arg(long)]
    pub json: Option<PathBuf>,
    #[command(flatten)]
    pub policy: PolicyArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Runs one observation through the whole stack.
pub fn run(args: &InferArgs) -> Result<()> {
    writable(args.json.iter().chain(&args.out))?;
    let family = match args.config.name() {
        Some(name) => setup::policy_config(name)?.family,
        None => pirouette_model::Family::Pi0,
    };
    let weight_args = WeightArgs::for_family(args.checkpoint.clone(), family, args.rope);
    let weights = Weights::open(&weight_args)?;
    let mut config = setup::choose(args.config.name(), weights.checkpoint())?;
    config.steps = args.steps.unwrap_or(config.steps);
    let steps = config.steps;
    let policy_args = PolicyArgs {
        default_prompt: args.prompt.clone().or(args.policy.default_prompt.clone()),
        ..args.policy.clone()
    };
    let (policy, warnings) =
        setup::policy(config, &weights.config, weights.checkpoint(), &policy_args)?;
    log::note(format_args!("{}; {}", setup::describe(&policy), weights.origin));
    warnings
        .iter()
        .chain(&device::on_cpu(&args.device))
        .for_each(|w| log::note(format_args!("note: {w}")));
    let observation = match &args.observation {
        Some(path) => read(path)?,
        None => {
            log::note(format_args!("note: a random observation (give one with --observation)"));
            sample_observation(policy.config(), 0)
        }
    };
    let prepared = policy
        .prepare(&observation)
        .map_err(|e| anyhow::anyhow!("{}: {} ({})", e.exception(), e.message(), e.remedy()))?;

    if prepared.dropped_tokens > 0 {
        let dropped = prepared.dropped_tokens;
        log::note(format_args!(
            "note: the prompt was cut at its end: {dropped} tokens are over the limit"
        ));
    }

    let c = policy.config();
    let table = std::sync::Arc::new(WeightTable::new(weights.config, steps));
    let mut options = EngineOptions::new(vec![table], c.horizon, c.max_token_len);
    options.rule = BucketRule::cpu(1);
    options.watchdog = std::time::Duration::from_secs(3600);
    let identity = weights.identity();
    drop(weights);
    if device::null(&args.device)?.is_some() {
        bail!("`--device {}` has no model: it is for `pirouette serve`", args.device.device);
    }
    let (device, log) = (args.device.clone(), LogFormat::Text);
    let factory = model::here(&Open { device, weights: weight_args, identity, steps, log });
    let engine = Engine::start(vec![factory], options)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(engine.wait_ready()).map_err(|why| anyhow::anyhow!("{why}"))?;
    let seed = args.seed.unwrap_or_else(draw_seed);
    let input = prepared.input.clone();
    let request = Request {
        images: input.images,
        tokens: input.tokens,
        state: input.state,
        noise: Noise::Seed(seed),
        previous: None,
        steps: None,
        deadline: None,
    };
    let answer = engine.submit(request)?.wait()?;
    let actions = policy.finish(&prepared, &answer.actions)?;
    log::note(format_args!("seed {seed}, {:.1} ms", answer.timing.run.total_ms));
    let values = actions.to_f64().context("actions are numbers")?;
    if let Some(path) = &args.out {
        npz::write_npy(path, &actions)?;
    }
    if let Some(path) = &args.json {
        let rows: Vec<&[f64]> = values.chunks(actions.shape[1].max(1)).collect();
        let ms = answer.timing.run.total_ms;
        let report = serde_json::json!({ "actions": rows, "seed": seed, "infer_ms": ms });
        return write_json(path, &report);
    }
    if args.out.is_none() {
        print(&actions, &values);
    }
    Ok(())
}

fn read(path: &std::path::Path) -> Result<Value> {
    let bytes = std::fs::read(path).with_context(|| format!("can't read {}", path.display()))?;
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("");
    match extension {
        "npz" => npz::read(&bytes).with_context(|| path.display().to_string()),
        "msgpack" => pirouette_server::msgpack::decode(&bytes.into())
            .with_context(|| path.display().to_string()),
        _ => bail!("{}: an observation is a .npz or a .msgpack file", path.display()),
    }
}

fn print(actions: &NdArray, values: &[f64]) {
    for row in values.chunks(actions.shape.get(1).copied().unwrap_or(1).max(1)) {
        let cells: Vec<String> = row.iter().map(|v| format!("{v:>9.4}")).collect();
        println!("{}", cells.join(" "));
    }
}
