//! `pirouette infer`: one observation → one chunk of actions, printed or saved.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use pirouette_engine::{BucketRule, draw_seed};
use pirouette_engine::{Engine, EngineOptions, Noise, Request};
use pirouette_model::WeightTable;
use pirouette_policy::{NdArray, Value};
use pirouette_server::RequestContext;

use crate::args::{DeviceArgs, RopeArgs, WeightArgs, euler_steps};
use crate::log::LogFormat;
use crate::model::{self, Open};
use crate::setup::{self, ConfigArgs, PolicyArgs};
use crate::text::{writable, write_json};
use crate::weights::Weights;
use crate::{device, log, npz, rtc, service};

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
    /// in an `.npz` are named with a bar: `np.savez(file, **{"images|cam_high": image, …})`. The
    /// request keys `seed`, `noise`, `num_steps` and those of real-time chunking count.
    #[arg(long)]
    pub observation: Option<PathBuf>,
    /// Instruction, when the observation brings none.
    #[arg(long)]
    pub prompt: Option<String>,
    /// Seed of the noise, before the observation's own (default: drawn and printed).
    #[arg(long)]
    pub seed: Option<u64>,
    /// Euler steps, before the observation's own (default: the configuration's).
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
    let (observation, context) = asked(args)?;
    let family = match args.config.name() {
        Some(name) => setup::policy_config(name)?.family,
        None => pirouette_model::Family::Pi0,
    };
    let weight_args = WeightArgs::for_family(args.checkpoint.clone(), family, args.rope);
    let weights = Weights::open(&weight_args)?;
    let mut config = setup::choose(args.config.name(), weights.checkpoint())?;
    config.steps = context.steps.unwrap_or(config.steps);
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
    let observation = observation.unwrap_or_else(|| {
        log::note(format_args!("note: a random observation (give one with --observation)"));
        policy.contract().sample(0)
    });
    let prepared = policy
        .prepare(&observation)
        .map_err(|e| anyhow::anyhow!("{}: {} ({})", e.exception(), e.message(), e.remedy()))?;

    if prepared.dropped_tokens > 0 {
        let dropped = prepared.dropped_tokens;
        log::note(format_args!(
            "note: the prompt was cut at its end: {dropped} tokens are over the limit"
        ));
    }

    let (c, model) = (policy.config(), weights.config);
    let noise = match service::noise(&context, c)? {
        Noise::Drawn => Noise::Seed(draw_seed()),
        said => said,
    };
    let previous = rtc::previous_chunk(&model, &policy, &prepared, &context.rtc)?;
    let table = std::sync::Arc::new(WeightTable::new(model, steps));
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
    let seed = if let Noise::Seed(seed) = noise { Some(seed) } else { None };
    let input = prepared.input.clone();
    let request = Request {
        images: input.images,
        tokens: input.tokens,
        state: input.state,
        noise,
        previous,
        steps: None,
        deadline: None,
        company: None,
    };
    let answer = engine.submit(request)?.wait()?;
    let actions = policy.finish(&prepared, &answer.actions)?;
    let origin = seed.map_or("the observation's noise".into(), |seed| format!("seed {seed}"));
    log::note(format_args!("{origin}, {:.1} ms", answer.timing.run.total_ms));
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

/// The observation, if one is given, and what its request asks for: what a server honours counts
/// here, too, what only a server can do is refused. Flags go before the file.
fn asked(args: &InferArgs) -> Result<(Option<Value>, RequestContext)> {
    let mut observation = args.observation.as_deref().map(read).transpose()?;
    let mut context = RequestContext::new(std::time::Instant::now());
    if let (Some(Value::Map(map)), Some(path)) = (&mut observation, &args.observation) {
        map.retain(|(key, value)| key != "batch" || *value != Value::Nil);
        let batch = map.iter().any(|(key, _)| key == "batch");
        context = RequestContext::take(map).with_context(|| path.display().to_string())?;
        let refused: Vec<String> = [
            ("batch", batch),
            ("deadline_ms", context.deadline.is_some()),
            ("explain", context.explain),
            ("newest_wins", context.newest_wins),
            ("session", context.session.is_some()),
            ("return_model_actions", context.rtc.return_model_actions),
        ]
        .into_iter()
        .filter(|(_, given)| *given)
        .map(|(key, _)| format!("`{key}`"))
        .collect();
        if !refused.is_empty() {
            bail!(
                "{}: only `pirouette serve` can do what {} ask{} for: leave it out here",
                path.display(),
                refused.join(", "),
                if refused.len() == 1 { "s" } else { "" }
            );
        }
    }
    if let Some(seed) = args.seed {
        let other = match (context.noise.take(), context.seed.replace(seed)) {
            (Some(_), _) => Some("noise".to_string()),
            (None, Some(own)) if own != seed => Some(format!("seed {own}")),
            _ => None,
        };
        if let Some(other) = other {
            log::note(format_args!("note: --seed {seed} instead of the observation's {other}"));
        }
    }
    if let Some(steps) = args.steps
        && let Some(own) = context.steps.replace(steps)
        && own != steps
    {
        log::note(format_args!(
            "note: --steps {steps} instead of the observation's num_steps {own}"
        ));
    }
    if context.steps == Some(0) {
        bail!("`num_steps` is 0: 1 to 1000 steps");
    }
    Ok((observation, context))
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
