//! `pirouette serve`: a policy and its weights behind openpi's websocket protocol.
//!
//! Two spellings: `serve pi05_droid --checkpoint DIR`, and openpi's own
//! `serve --env DROID --port 8000 policy:checkpoint --policy.config=NAME --policy.dir=DIR`.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use pirouette_engine::{Bucket, BucketRule, DeviceFactory, Engine, EngineOptions};
use pirouette_model::{BackendError, Rtc, WeightTable};
use pirouette_policy::config::environment;
use pirouette_server::{ApiKeys, ServeOptions, check_exposure};

use crate::args::{DeviceArgs, WeightArgs};
use crate::device;
use crate::service::PolicyService;
use crate::setup::{self, PolicyArgs};
use crate::weights::Weights;

/// Arguments of `serve`.
#[derive(clap::Args)]
pub struct ServeArgs {
    /// A configuration's name, a TOML file, or openpi's `policy:checkpoint` / `policy:default`.
    pub config: Option<String>,
    /// openpi's environment: ALOHA, ALOHA_SIM, DROID or LIBERO; its policy and checkpoint.
    #[arg(long)]
    pub env: Option<String>,
    /// openpi's spelling of the configuration.
    #[arg(long = "policy.config")]
    pub policy_config: Option<String>,
    /// openpi's spelling of the checkpoint.
    #[arg(long = "policy.dir")]
    pub policy_dir: Option<String>,
    /// Checkpoint directory (default: random weights of the full size, for trying things out).
    #[arg(long)]
    pub checkpoint: Option<PathBuf>,
    #[command(flatten)]
    pub policy: PolicyArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Port.
    #[arg(long, default_value_t = 8000)]
    pub port: u16,
    /// Address to listen on. Anything but loopback needs --api-key-file or --insecure.
    #[arg(long, default_value = "127.0.0.1")]
    pub host: IpAddr,
    /// File with one API key a line; clients send `Authorization: Api-Key KEY`.
    #[arg(long)]
    pub api_key_file: Option<PathBuf>,
    /// Serve other machines without keys.
    #[arg(long)]
    pub insecure: bool,
    /// Largest message accepted, MiB.
    #[arg(long, default_value_t = 64)]
    pub max_frame_mib: usize,
    /// Most requests in one batch (default: 8 on a GPU, 1 on the CPU).
    #[arg(long)]
    pub max_batch: Option<usize>,
    /// Euler steps (default: the configuration's).
    #[arg(long)]
    pub steps: Option<usize>,
    /// On a GPU, compile the programs of real-time chunking before the first request, too.
    #[arg(long)]
    pub rtc: bool,
    /// openpi's flag; nothing is recorded.
    #[arg(long)]
    pub record: bool,
}

/// Serves until SIGTERM or Ctrl-C.
pub fn run(args: &ServeArgs) -> Result<()> {
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("PIROUETTE_LOG")
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info")),
        )
        .with_writer(std::io::stderr)
        .init();
    if args.record {
        tracing::warn!("--record is accepted for openpi's sake; nothing is recorded");
    }
    let (name, checkpoint) = what_to_serve(args)?;
    let keys = args.api_key_file.as_deref().map(ApiKeys::read).transpose()?;
    let address = SocketAddr::new(args.host, args.port);
    check_exposure(address, keys.is_some(), args.insecure)?;

    let family = match &name {
        Some(name) => setup::policy_config(name)?.family,
        None => pirouette_model::Family::Pi0,
    };
    let weight_args = WeightArgs::for_family(checkpoint, family);
    let weights = Weights::open(&weight_args)?;
    let config = setup::choose(name.as_deref(), weights.checkpoint())?;
    let steps = args.steps.unwrap_or(config.steps);
    let model = weights.config;
    let (policy, warnings) = setup::policy(config, &model, weights.checkpoint(), &args.policy)?;
    for warning in &warnings {
        tracing::warn!("{warning}");
    }
    tracing::info!("{}; {}", setup::describe(&policy), weights.origin);
    drop(weights);

    let on_gpu = device::is_gpu(&args.device)?;
    let most = args.max_batch.unwrap_or(if on_gpu { 8 } else { 1 });
    let c = policy.config();
    let table = Arc::new(WeightTable::new(model, steps));
    let mut options = EngineOptions::new(vec![table], c.horizon, c.max_token_len);
    options.rule = if on_gpu { BucketRule::gpu(most) } else { BucketRule::cpu(most) };
    if on_gpu {
        let cameras = c.robot.cameras().min(3);
        let prompts = (1..=6).map(|i| 16 * i).filter(|p| *p <= c.max_token_len.max(16));
        options.warm = prompts.map(|p| options.bucket(cameras, p)).collect();
        if args.rtc {
            let guided = options.warm.iter().map(|b| Bucket { rtc: Rtc::Guided, ..*b });
            options.warm.extend(guided.collect::<Vec<_>>());
            options.executables *= 2;
        }
    } else {
        // A request on a CPU takes seconds, on two cores tens of them.
        options.watchdog = Duration::from_secs(600);
    }
    let engine = Engine::start(vec![factory(args.device.clone(), weight_args, steps)], options)?;
    let serve = ServeOptions {
        max_frame_bytes: args.max_frame_mib.clamp(1, 4096) << 20,
        api_keys: keys,
        ..ServeOptions::default()
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(listen(address, PolicyService::new(policy, engine), serve))
}

/// The configuration's name (none: the checkpoint describes itself) and the checkpoint.
fn what_to_serve(args: &ServeArgs) -> Result<(Option<String>, Option<PathBuf>)> {
    let positional = args.config.as_deref().filter(|c| !c.starts_with("policy:"));
    if let Some(other) = args.config.as_deref().filter(|c| c.starts_with("policy:"))
        && !["policy:checkpoint", "policy:default"].contains(&other)
    {
        bail!("`{other}`: openpi knows policy:checkpoint and policy:default");
    }
    let env = args.env.as_deref().map(environment).transpose()?;
    let named = positional.or(args.policy_config.as_deref());
    let dir = match (&args.checkpoint, &args.policy_dir) {
        (Some(dir), _) => Some(dir.clone()),
        (None, Some(uri)) => Some(local(uri)?),
        (None, None) => match (named, env) {
            (None, Some(env)) => Some(local(env.checkpoint)?),
            _ => None,
        },
    };
    let name = named.map(str::to_string).or_else(|| env.map(|e| e.config.to_string()));
    Ok((name, dir))
}

/// A checkpoint's path: as it is, or where openpi caches a `gs://` one.
fn local(uri: &str) -> Result<PathBuf> {
    let Some(rest) = uri.strip_prefix("gs://") else { return Ok(PathBuf::from(uri)) };
    let home = std::env::var_os("OPENPI_DATA_HOME").map(PathBuf::from).or_else(|| {
        std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache").join("openpi"))
    });
    let Some(home) = home else { bail!("{uri}: set OPENPI_DATA_HOME to openpi's cache") };
    let path = home.join(rest);
    if !path.exists() {
        bail!(
            "{uri} is not in {}: fetch it with `gsutil -m cp -r {uri} {}`, or name a directory \
             with --checkpoint",
            home.display(),
            path.parent().unwrap_or(&home).display()
        );
    }
    Ok(path)
}

/// Opens the device and its weights, on the engine's thread and again after every failure.
pub fn factory(args: DeviceArgs, weights: WeightArgs, steps: usize) -> DeviceFactory {
    Arc::new(move || {
        let unavailable = |e: anyhow::Error| BackendError::Unavailable(format!("{e:#}"));
        let weights = Weights::open(&weights).map_err(unavailable)?;
        let opened = device::open(&args, weights.config, steps, weights.source());
        Ok(opened.map_err(unavailable)?.boxed())
    })
}

async fn listen(address: SocketAddr, service: PolicyService, options: ServeOptions) -> Result<()> {
    let listener = pirouette_server::bind(address).await.with_context(|| {
        format!("can't listen on {address}: choose another --port, or end what listens there")
    })?;
    tracing::info!("listening on ws://{address}; clients wait until the model is warm");
    let service = Arc::new(service);
    let watched = Arc::clone(&service);
    let (failed, failure) = tokio::sync::oneshot::channel();
    tokio::spawn(async move {
        let started = std::time::Instant::now();
        match watched.engine().wait_ready().await {
            Ok(()) => tracing::info!("ready after {:.1} s", started.elapsed().as_secs_f64()),
            // The first load failed: nobody is served yet, so say it and leave.
            Err(why) => drop(failed.send(why)),
        }
    });
    let mut cause = None;
    let shutdown = async {
        tokio::select! {
            () = pirouette_server::termination() => {}
            Ok(why) = failure => cause = Some(why),
        }
    };
    let served =
        pirouette_server::serve(listener, Arc::clone(&service) as _, options, shutdown).await;
    let engine = Arc::clone(&service);
    tokio::task::spawn_blocking(move || engine.engine().drain(Duration::from_secs(10))).await?;
    match cause {
        Some(why) => bail!("the model could not be loaded: {why}"),
        None if served.drained => tracing::info!("drained"),
        None => tracing::warn!("some connections did not end in time"),
    }
    Ok(())
}
