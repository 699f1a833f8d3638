//! `pirouette serve`: a policy and its weights behind openpi's websocket protocol.
//!
//! Two spellings: `serve pi05_droid --checkpoint DIR`, and openpi's own
//! `serve --env DROID --port 8000 policy:checkpoint --policy.config=NAME --policy.dir=DIR`.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use pirouette_policy::PolicyConfig;
use pirouette_policy::config::{environment, names};
use pirouette_policy::robots::Robot;
use pirouette_policy::tokenizer::SearchPlaces;
use pirouette_server::{
    ApiKeys, Dialect, Doors, Listener as _, RecordOptions, Recorder, ServeOptions, Service, Tls,
    check_admin_exposure, check_exposure, check_lerobot_exposure,
};

use crate::args::{DeviceArgs, RopeArgs};
use crate::descriptors;
use crate::device::{self, Target};
use crate::ending;
use crate::log::{self, LogFormat};
use crate::model::{Isolate, ModelPlan, Served};
use crate::service::PolicyService;
use crate::setup::{ConfigArgs, PolicyArgs};

/// Arguments of `serve`.
#[derive(clap::Args)]
pub struct ServeArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
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
    pub rope: RopeArgs,
    #[command(flatten)]
    pub policy: PolicyArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Port.
    #[arg(long, default_value_t = 8000)]
    pub port: u16,
    /// Address to listen on. Anything but loopback needs --api-key-file, --tls-cert or --insecure.
    #[arg(long, default_value = "127.0.0.1")]
    pub host: IpAddr,
    /// File with one API key a line, `[NAME] KEY [QUOTA=N …]` (connections, rate, burst,
    /// in_flight); clients send `Authorization: Api-Key KEY`. Read again when it changes, and at
    /// SIGHUP.
    #[arg(long)]
    pub api_key_file: Option<PathBuf>,
    /// PEM file with the server's certificate and those that lead to its authority: all ports
    /// but LeRobot's speak TLS (wss://). Read again when it changes, and at SIGHUP.
    #[arg(long, requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// PEM file with the certificate's key, unencrypted.
    #[arg(long, requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Serve other machines without keys and without TLS.
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
    /// Port for LeRobot's asynchronous robot client (gRPC), which has no keys and no TLS: neither
    /// --api-key-file nor --tls-cert guards this port.
    #[arg(long)]
    pub lerobot_port: Option<u16>,
    /// Address of LeRobot's port. Anything but loopback needs --insecure.
    #[arg(long, default_value = "127.0.0.1", requires = "lerobot_port")]
    pub lerobot_host: IpAddr,
    /// Actions a second that a LeRobot client executes, by which the actions of a chunk are dated.
    #[arg(long, default_value_t = 30.0, value_parser = rate, requires = "lerobot_port")]
    pub lerobot_fps: f64,
    /// Whose protocol is spoken on paths that name none: openpi, roboarena, vllm-omni, vla-eval
    /// or auto (docs/protocol.md).
    #[arg(long, default_value_t = Dialect::Openpi)]
    pub dialect: Dialect,
    /// Actions of a chunk that a vla-eval client executes before the next inference.
    #[arg(long, default_value_t = 10)]
    pub vla_eval_actions: usize,
    /// Most observations in one `batch` request.
    #[arg(long, default_value_t = 128)]
    pub max_observations: usize,
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
    /// Serve from several GPUs on one port: `all`, or their numbers as in `0,2`.
    #[arg(long, conflicts_with = "device")]
    pub gpus: Option<String>,
    /// Which devices run in a process of their own, so that one that breaks takes nothing else with
    /// it. `auto`: of several GPUs all, a single one from its first failure on.
    #[arg(long, value_enum, value_name = "WHICH", default_value = "auto")]
    pub isolate: Isolate,
    /// Engines of a null device.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub replicas: u8,
    /// One program for everybody, of --max-batch slots and the longest prompt: a seed gives the
    /// same bits alone and in any batch. `bench --deterministic` tells what it costs.
    #[arg(long)]
    pub deterministic: bool,
    /// Milliseconds a free device waits for more requests before it runs a batch that is not
    /// full.
    #[arg(long, default_value_t = 0.0, value_parser = window)]
    pub window_ms: f64,
    /// Milliseconds after each answer for which one thread for the first 16 connections without
    /// TLS, and one for each device, stay awake for the next request; the former is awake while it
    /// answers, too. 0: threads sleep. Default: 1 on GPUs with cores to spare, at least two for
    /// each device and two more, otherwise 0. Without a value 1000: the next request of any robot
    /// comes in that time.
    #[arg(long, value_name = "MS", num_args = 0..=1, require_equals = true,
        default_missing_value = "1000", value_parser = patience)]
    pub busy_poll: Option<f64>,
    /// Form of the log on standard error; PIROUETTE_LOG chooses what is told (default `info`;
    /// `info,pirouette::request=debug` for every request).
    #[arg(long, value_enum, default_value = "text")]
    pub log_format: LogFormat,
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
    match (args.config.name(), policy) {
        (None, Some(policy)) => (Some(policy), Some(Path::new(RECORD_DIR))),
        (config, _) => (config, record),
    }
}

/// Reads `--window-ms`: a second is more than any robot waits.
fn window(text: &str) -> Result<f64, String> {
    let ms = text.parse().map_err(|_| format!("`{text}` is no number of milliseconds"))?;
    if (0.0..=1000.0).contains(&ms) { Ok(ms) } else { Err("it must be from 0 to 1000".into()) }
}

/// Reads `--busy-poll`.
fn patience(text: &str) -> Result<f64, String> {
    let ms = text.parse().map_err(|_| format!("`{text}` is no number of milliseconds"))?;
    if (0.0..=60_000.0).contains(&ms) { Ok(ms) } else { Err("it must be from 0 to 60000".into()) }
}

/// Reads `--lerobot-fps`.
fn rate(text: &str) -> Result<f64, String> {
    let fps = text.parse().map_err(|_| format!("`{text}` is no number of actions a second"))?;
    if (0.1..=1000.0).contains(&fps) { Ok(fps) } else { Err("it must be from 0.1 to 1000".into()) }
}

/// Serves until SIGTERM or Ctrl-C.
pub fn run(args: &ServeArgs) -> Result<()> {
    log::start(args.log_format);
    let doors = doors(args);
    let serve = serve_options(args, &doors)?;
    let record = typed(args).1.map(|dir| RecordOptions {
        dir: dir.to_owned(),
        limit_bytes: args.record_limit_mib.saturating_mul(1 << 20),
    });
    // LeRobot's port has handshakes of its own; then the admin port's connections and the
    // checkpoint's files.
    let handshakes = serve.max_handshakes * (1 + usize::from(doors.lerobot.is_some()));
    descriptors::raise((serve.max_connections + handshakes + 256) as u64);
    let service = Arc::new(load(args)?);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let served = runtime.block_on(listen(doors, &service, serve, record));
    ending::leave(runtime, service);
    served
}

/// The policy and its engine, as the flags say; the devices open on their own threads.
pub fn load(args: &ServeArgs) -> Result<PolicyService> {
    let (name, checkpoint) = what_to_serve(args)?;
    let plan = ModelPlan {
        name,
        rope: args.rope,
        policy: args.policy.clone(),
        devices: device::targets(&args.device, args.gpus.as_deref(), args.replicas.into())?,
        max_batch: args.max_batch,
        steps: args.steps,
        deterministic: args.deterministic,
        rtc: args.rtc,
        window: Duration::from_secs_f64(args.window_ms / 1e3),
        busy_poll: busy_poll(args)?,
        isolate: args.isolate,
        log: args.log_format,
    };
    if args.busy_poll.is_some_and(|ms| ms > 0.0)
        && let Some(warning) = few_cores(plan.devices.len(), cores())
    {
        tracing::warn!("{warning}");
    }
    if plan.is_null()? {
        tracing::warn!(
            "NULL DEVICE: no model runs and the actions are MADE UP. Do not connect a robot."
        );
    }
    let parts = plan.open(checkpoint.clone())?;
    if args.dialect == Dialect::Roboarena && parts.policy.roboarena().is_none() {
        bail!(
            "RoboArena's robot is DROID's, {} is for another one ({}): leave --dialect out",
            parts.policy.config().name,
            parts.policy.config().robot.name()
        );
    }
    if args.lerobot_port.is_some() {
        check_lerobot(parts.policy.config())?;
    }
    for line in parts.policy.contract().lines() {
        tracing::info!("{line}");
    }
    PolicyService::new(Served::new(plan, checkpoint, parts.start()?))
}

/// How long threads stay awake after each answer. If not said otherwise, as long as a client that
/// asks again at once needs; a CPU that runs the model has better things to do.
fn busy_poll(args: &ServeArgs) -> Result<Duration> {
    let devices = device::targets(&args.device, args.gpus.as_deref(), args.replicas.into())?;
    let on_cpu = devices.iter().any(|d| matches!(device::target(d), Ok(Target::Cpu)));
    let usual = if on_cpu || few_cores(devices.len(), cores()).is_some() { 0.0 } else { 1.0 };
    Ok(Duration::from_secs_f64(args.busy_poll.unwrap_or(usual) / 1e3))
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// What to say where threads that stay awake leave fewer cores than they take.
fn few_cores(devices: usize, cores: usize) -> Option<String> {
    let (awake, wanted) = (devices + 1, 2 * (devices + 1));
    (cores < wanted).then(|| {
        format!(
            "--busy-poll keeps {awake} threads awake and wants {wanted} cores, here are {cores}: \
             answers will come later than without it"
        )
    })
}

/// Whether a LeRobot robot could fit the policy at all.
fn check_lerobot(config: &PolicyConfig) -> Result<()> {
    if !matches!(config.robot, Robot::Generic(_)) {
        bail!(
            "LeRobot's clients can't send the keys of {}'s robot, which {} takes: serve a LeRobot \
             checkpoint, describe the robot by a TOML file with LeRobot's keys \
             (docs/protocol.md), or leave --lerobot-port out",
            config.robot.name(),
            config.name
        );
    }
    Ok(())
}

/// The addresses to listen on.
fn doors(args: &ServeArgs) -> Doors<SocketAddr> {
    Doors {
        public: SocketAddr::new(args.host, args.port),
        admin: args.admin_port.map(|port| SocketAddr::new(args.admin_host, port)),
        lerobot: args.lerobot_port.map(|port| SocketAddr::new(args.lerobot_host, port)),
    }
}

/// What is known of the server before the model is: keys, limits, who may reach it.
fn serve_options(args: &ServeArgs, doors: &Doors<SocketAddr>) -> Result<ServeOptions> {
    let keys = |file: &Option<PathBuf>| file.as_deref().map(ApiKeys::read).transpose();
    let (api_keys, admin_keys) = (keys(&args.api_key_file)?, keys(&args.admin_key_file)?);
    let tls = match (&args.tls_cert, &args.tls_key) {
        (Some(certificate), Some(key)) => Some(Tls::read(certificate, key)?),
        _ => None,
    };
    check_exposure(doors.public, api_keys.is_some() || tls.is_some(), args.insecure)?;
    if let Some(admin) = doors.admin {
        check_admin_exposure(admin, admin_keys.is_some(), args.insecure)?;
    }
    if let Some(lerobot) = doors.lerobot {
        check_lerobot_exposure(lerobot, args.insecure)?;
    }
    let max_frame_bytes = args.max_frame_mib.clamp(1, 4096) << 20;
    Ok(ServeOptions {
        max_frame_bytes,
        dialect: args.dialect,
        lerobot_fps: args.lerobot_fps,
        vla_eval_actions: args.vla_eval_actions.max(1),
        max_batch_observations: args.max_observations.max(1),
        api_keys,
        admin_keys,
        tls,
        busy_poll: busy_poll(args)?,
        ..ServeOptions::default()
    })
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
    let Some(home) = SearchPlaces::from_env().openpi_home else {
        bail!("{uri}: set OPENPI_DATA_HOME to openpi's cache")
    };
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

async fn listen(
    doors: Doors<SocketAddr>,
    service: &Arc<PolicyService>,
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
    let lerobot = match doors.lerobot {
        Some(address) => Some(bind(address, "--lerobot-port").await?),
        None => None,
    };
    // Port 0 is one that the system chose.
    let s = if options.tls.is_some() { "s" } else { "" };
    let address = public.local_addr()?;
    tracing::info!("listening on ws{s}://{address}; clients wait until the model is warm");
    if let Some(admin) = &admin {
        tracing::info!("admin pages on http{s}://{}", admin.local_addr()?);
    }
    if let Some(lerobot) = &lerobot {
        let address = lerobot.local_addr()?;
        tracing::info!("LeRobot's clients are served at {address}, without keys and without TLS");
    }
    let listeners = Doors { public, admin, lerobot };
    options.recorder = recorder(record.as_ref(), service)?;
    let recorder = options.recorder.clone();
    let watched = Arc::clone(service);
    let (failed, failure) = tokio::sync::oneshot::channel();
    tokio::spawn(async move {
        let started = std::time::Instant::now();
        match watched.model().engine.wait_ready().await {
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
        pirouette_server::serve_doors(listeners, Arc::clone(service) as _, options, shutdown).await;
    ending::settle(service, recorder).await;
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
    fn a_configuration_is_named_in_its_place_or_by_a_flag_or_as_openpi_does() {
        let openpi = "policy:checkpoint --policy.config=pi05_droid --policy.dir=d";
        for line in ["pi05_droid", "--config pi05_droid", "--record d --config=pi05_droid", openpi]
        {
            let name = what_to_serve(&serve(line)).unwrap().0;
            assert_eq!(name.as_deref(), Some("pi05_droid"), "{line}");
        }
        for command in ["serve", "infer", "replay d"] {
            let parse = |flags: &str| {
                Cli::try_parse_from(format!("pirouette {command} {flags}").split_whitespace())
            };
            assert!(parse("a.toml").is_ok() && parse("--config a.toml").is_ok(), "{command}");
            let twice = parse("a.toml --config b.toml").map(drop).unwrap_err().to_string();
            assert!(twice.contains("--config") && twice.contains("cannot be used"), "{twice}");
        }
    }

    #[test]
    fn threads_that_stay_awake_want_as_many_cores_again() {
        assert_eq!([few_cores(1, 4), few_cores(8, 18)], [None, None]);
        let warning = few_cores(1, 2).unwrap();
        assert!(warning.contains("2 threads awake and wants 4 cores, here are 2"), "{warning}");
        assert!(few_cores(8, 16).is_some());
        let patience =
            |flag: &str| busy_poll(&serve(&format!("--device null:1:9 {flag}"))).unwrap();
        let usual = if cores() < 4 { Duration::ZERO } else { Duration::from_millis(1) };
        assert_eq!(patience("pi05_droid"), usual);
        assert_eq!(patience("--busy-poll pi05_droid"), Duration::from_secs(1));
        assert_eq!(patience("pi05_droid --busy-poll=0.5"), Duration::from_micros(500));
        assert_eq!(patience("pi05_droid --busy-poll=0"), Duration::ZERO);
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
