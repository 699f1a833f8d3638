//! `pirouette serve`: a policy and its weights behind openpi's websocket protocol.
//!
//! Two spellings: `serve pi05_droid --checkpoint DIR`, and openpi's own
//! `serve --env DROID --port 8000 policy:checkpoint --policy.config=NAME --policy.dir=DIR`.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use pirouette_engine::{BucketRule, DeviceFactory, Engine, EngineOptions};
use pirouette_model::{BackendError, WeightTable};
use pirouette_policy::config::{environment, names};
use pirouette_policy::contract;
use pirouette_server::{
    ApiKeys, Doors, RecordOptions, Recorder, ServeOptions, Service, check_admin_exposure,
    check_exposure,
};

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
    /// Port for metrics, the contract and changes: the public one keeps to robots and health.
    #[arg(long)]
    pub admin_port: Option<u16>,
    /// Address of the admin port. Anything but loopback needs --admin-key-file or --insecure.
    #[arg(long, default_value = "127.0.0.1", requires = "admin_port")]
    pub admin_host: IpAddr,
    /// File with the keys of the admin port, as --api-key-file.
    #[arg(long, requires = "admin_port")]
    pub admin_key_file: Option<PathBuf>,
    /// Largest message accepted, MiB.
    #[arg(long, default_value_t = 64)]
    pub max_frame_mib: usize,
    /// Most requests in one batch (default: 8 on a GPU, 1 on the CPU).
    #[arg(long)]
    pub max_batch: Option<usize>,
    /// Euler steps (default: the configuration's).
    #[arg(long)]
    pub steps: Option<usize>,
    /// Write every request and answer, pictures included, into this folder, for `replay`.
    #[arg(long, value_name = "DIR", num_args = 0..=1, default_missing_value = RECORD_DIR)]
    pub record: Option<PathBuf>,
    /// Most MiB in that folder; above it the oldest requests go.
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u64).range(1..))]
    pub record_limit_mib: u64,
}

/// Where openpi records.
const RECORD_DIR: &str = "policy_records";

/// The configuration and the folder to record into, as they were meant: openpi's `--record` takes
/// no value, so a policy's name after it is that, and no folder.
fn typed(args: &ServeArgs) -> (Option<&str>, Option<&Path>) {
    let record = args.record.as_deref();
    let policy = record.and_then(Path::to_str).filter(|value| {
        value.starts_with("policy:") || value.ends_with(".toml") || names().any(|n| n == *value)
    });
    match (&args.config, policy) {
        (None, Some(policy)) => (Some(policy), Some(Path::new(RECORD_DIR))),
        (config, _) => (config.as_deref(), record),
    }
}

/// The log, on standard error.
pub fn log() {
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("PIROUETTE_LOG")
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info")),
        )
        .with_writer(std::io::stderr)
        .init();
}

/// Serves until SIGTERM or Ctrl-C.
pub fn run(args: &ServeArgs) -> Result<()> {
    log();
    let doors = doors(args);
    let serve = serve_options(args, &doors)?;
    let record = typed(args).1.map(|dir| RecordOptions {
        dir: dir.to_owned(),
        limit_bytes: args.record_limit_mib.saturating_mul(1 << 20),
    });
    let service = load(args)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(listen(doors, service, serve, record))
}

/// The policy and its engine, as the flags say; the devices open on their own threads.
pub fn load(args: &ServeArgs) -> Result<PolicyService> {
    let (name, checkpoint) = what_to_serve(args)?;
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
    for line in contract(policy.config()).lines() {
        tracing::info!("{line}");
    }
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
    } else {
        // A request on a CPU takes seconds, on two cores tens of them.
        options.watchdog = Duration::from_secs(600);
    }
    let engine = Engine::start(vec![factory(args.device.clone(), weight_args, steps)], options)?;
    Ok(PolicyService::new(policy, engine).with_gauges(device::gauges(&args.device)))
}

/// The addresses to listen on.
fn doors(args: &ServeArgs) -> Doors<SocketAddr> {
    Doors {
        public: SocketAddr::new(args.host, args.port),
        admin: args.admin_port.map(|port| SocketAddr::new(args.admin_host, port)),
    }
}

/// What is known of the server before the model is: keys, limits, who may reach it.
fn serve_options(args: &ServeArgs, doors: &Doors<SocketAddr>) -> Result<ServeOptions> {
    let keys = |file: &Option<PathBuf>| file.as_deref().map(ApiKeys::read).transpose();
    let (api_keys, admin_keys) = (keys(&args.api_key_file)?, keys(&args.admin_key_file)?);
    check_exposure(doors.public, api_keys.is_some(), args.insecure)?;
    if let Some(admin) = doors.admin {
        check_admin_exposure(admin, admin_keys.is_some(), args.insecure)?;
    }
    let max_frame_bytes = args.max_frame_mib.clamp(1, 4096) << 20;
    Ok(ServeOptions { max_frame_bytes, api_keys, admin_keys, ..ServeOptions::default() })
}

/// The configuration's name (none: the checkpoint describes itself) and the checkpoint.
fn what_to_serve(args: &ServeArgs) -> Result<(Option<String>, Option<PathBuf>)> {
    let config = typed(args).0;
    let positional = config.filter(|c| !c.starts_with("policy:"));
    if let Some(other) = config.filter(|c| c.starts_with("policy:"))
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

async fn listen(
    doors: Doors<SocketAddr>,
    service: PolicyService,
    mut options: ServeOptions,
    record: Option<RecordOptions>,
) -> Result<()> {
    let bind = async |address: SocketAddr, flag: &str| {
        pirouette_server::bind(address).await.with_context(|| {
            format!("can't listen on {address}: choose another {flag}, or end what listens there")
        })
    };
    let public = bind(doors.public, "--port").await?;
    let admin = match doors.admin {
        Some(address) => Some(bind(address, "--admin-port").await?),
        None => None,
    };
    tracing::info!("listening on ws://{}; clients wait until the model is warm", doors.public);
    if let Some(address) = doors.admin {
        tracing::info!("admin pages on http://{address}");
    }
    let listeners = Doors { public, admin };
    let service = Arc::new(service);
    options.recorder = recorder(record.as_ref(), &service)?;
    let recorder = options.recorder.clone();
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
        pirouette_server::serve_doors(listeners, Arc::clone(&service) as _, options, shutdown)
            .await;
    let engine = Arc::clone(&service);
    tokio::task::spawn_blocking(move || {
        recorder.inspect(|recorder| recorder.finish());
        engine.engine().drain(Duration::from_secs(10))
    })
    .await?;
    match cause {
        Some(why) => bail!("the model could not be loaded: {why}"),
        None if served.drained => tracing::info!("drained"),
        None => tracing::warn!("some connections did not end in time"),
    }
    Ok(())
}

/// Starts what `--record` asks for.
fn recorder(
    record: Option<&RecordOptions>,
    service: &Arc<PolicyService>,
) -> Result<Option<Arc<Recorder>>> {
    let Some(options) = record else { return Ok(None) };
    let (dir, mib) = (options.dir.display(), options.limit_bytes >> 20);
    let service = Arc::clone(service);
    let recorder = Recorder::start(options, move || service.identity())
        .with_context(|| format!("can't record into {dir}"))?;
    tracing::warn!("every request is recorded, pictures included: {dir}, at most {mib} MiB");
    Ok(Some(Arc::new(recorder)))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};

    fn serve(line: &str) -> ServeArgs {
        let words = ["pirouette", "serve"].into_iter().chain(line.split(' '));
        match Cli::try_parse_from(words).unwrap().command {
            Command::Serve(args) => args,
            _ => panic!("this is serve"),
        }
    }

    #[test]
    fn record_takes_a_folder_or_nothing_as_openpis_does() {
        for (line, config, dir) in [
            ("pi05_droid", Some("pi05_droid"), None),
            ("pi05_droid --record", Some("pi05_droid"), Some("policy_records")),
            ("pi05_droid --record my/dir", Some("pi05_droid"), Some("my/dir")),
            ("--record my/dir pi05_droid", Some("pi05_droid"), Some("my/dir")),
            ("--record pi05_droid", Some("pi05_droid"), Some("policy_records")),
            ("--record robot.toml", Some("robot.toml"), Some("policy_records")),
            ("--env DROID --record --port 8000", None, Some("policy_records")),
            (
                "--env DROID --record policy:checkpoint --policy.config=pi05_droid --policy.dir=d",
                Some("policy:checkpoint"),
                Some("policy_records"),
            ),
        ] {
            let args = serve(line);
            assert_eq!(typed(&args), (config, dir.map(Path::new)), "{line}");
        }
    }
}
