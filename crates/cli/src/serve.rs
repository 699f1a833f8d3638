//! `pirouette serve`: a policy and its weights behind openpi's websocket protocol.
//!
//! Two spellings: `serve pi05_droid --checkpoint DIR`, and openpi's own
//! `serve --env DROID --port 8000 policy:checkpoint --policy.config=NAME --policy.dir=DIR`.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use pirouette_policy::config::names;
use pirouette_policy::robots::Robot;
use pirouette_policy::{Policy, PolicyConfig};
use pirouette_server::{
    ApiKeys, Dialect, Doors, Listener as _, RecordOptions, Recorder, ServeOptions, Service,
    Termination, Tls, check_admin_exposure, check_exposure, check_lerobot_exposure,
};

use crate::args::{at_least_one, host};
use crate::descriptors;
use crate::ending;
use crate::log;
use crate::opening::{OpenArgs, busy_poll, load};
use crate::service::PolicyService;

/// Arguments of `serve`.
#[derive(clap::Args)]
pub struct ServeArgs {
    #[command(flatten)]
    pub open: OpenArgs,
    /// Port.
    #[arg(long, default_value_t = 8000)]
    pub port: u16,
    /// Address to listen on. Anything but loopback needs --api-key-file, --tls-cert or --insecure.
    #[arg(long, default_value = "127.0.0.1", value_parser = host)]
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
    #[arg(long, default_value = "127.0.0.1", value_parser = host, requires = "admin_port")]
    pub admin_host: IpAddr,
    /// File with the keys of the admin port, as --api-key-file.
    #[arg(long, requires = "admin_port")]
    pub admin_key_file: Option<PathBuf>,
    /// Port for LeRobot's asynchronous robot client (gRPC), which has no keys and no TLS: neither
    /// --api-key-file nor --tls-cert guards this port.
    #[arg(long)]
    pub lerobot_port: Option<u16>,
    /// Address of LeRobot's port. Anything but loopback needs --insecure.
    #[arg(long, default_value = "127.0.0.1", value_parser = host, requires = "lerobot_port")]
    pub lerobot_host: IpAddr,
    /// Actions a second that a LeRobot client executes, by which the actions of a chunk are dated.
    #[arg(long, default_value_t = 30.0, value_parser = rate, requires = "lerobot_port")]
    pub lerobot_fps: f64,
    /// Whose protocol is spoken on paths that name none: openpi, roboarena, vllm-omni, vla-eval
    /// or auto (docs/protocol.md).
    #[arg(long, default_value_t = Dialect::Openpi)]
    pub dialect: Dialect,
    /// Actions of a chunk that a vla-eval client executes before the next inference.
    #[arg(long, default_value_t = 10, value_parser = at_least_one)]
    pub vla_eval_actions: usize,
    /// Most observations in one `batch` request.
    #[arg(long, default_value_t = 128, value_parser = at_least_one)]
    pub max_observations: usize,
    /// Most requests that wait for a device, and as many for their preparation; one more is
    /// refused at once. Each observation of a `batch` is one (default: 1024, or twice
    /// --max-observations if that is more).
    #[arg(long, value_parser = at_least_one)]
    pub queue: Option<usize>,
    /// Largest message accepted, MiB.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub max_frame_mib: u16,
    /// Write every request and answer, pictures included, into this folder, for `replay`.
    #[arg(long, value_name = "DIR", num_args = 0..=1, default_missing_value = RECORD_DIR)]
    pub record: Option<PathBuf>,
    /// As without --record: openpi's command line says it so, too. Of the two the last counts.
    #[arg(long, overrides_with = "record", hide = true)]
    pub no_record: bool,
    /// Most MiB in that folder; above it the oldest requests go.
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u64).range(1..))]
    pub record_limit_mib: u64,
}

/// Requests that may wait, if not said otherwise: one of each websocket.
const QUEUE: usize = 1024;

/// Where openpi records.
const RECORD_DIR: &str = "policy_records";

/// The configuration and the folder to record into, as they were meant: openpi's `--record` takes
/// no value, so a policy's name after it is that, and no folder.
fn typed(args: &ServeArgs) -> (Option<&str>, Option<&Path>) {
    let record = args.record.as_deref().filter(|_| !args.no_record);
    let policy = record.and_then(Path::to_str).filter(|value| {
        value.starts_with("policy:") || value.ends_with(".toml") || names().any(|n| n == *value)
    });
    match (args.open.config.name(), policy) {
        (None, Some(policy)) => (Some(policy), Some(Path::new(RECORD_DIR))),
        (config, _) => (config, record),
    }
}

/// Reads `--lerobot-fps`.
fn rate(text: &str) -> Result<f64, String> {
    let fps = text.parse().map_err(|_| format!("`{text}` is no number of actions a second"))?;
    if (0.1..=1000.0).contains(&fps) { Ok(fps) } else { Err("it must be from 0.1 to 1000".into()) }
}

/// How many requests may wait. A `batch` that is accepted must find room in an empty queue.
fn queue(args: &ServeArgs) -> Result<usize> {
    let most = args.max_observations;
    let queue = args.queue.unwrap_or(QUEUE.max(most.saturating_mul(2)));
    if most > queue {
        bail!(
            "--max-observations {most}: such a batch never fits a queue of {queue}: raise --queue, \
             or lower --max-observations (128 if not given)"
        );
    }
    Ok(queue)
}

/// Serves until SIGTERM or Ctrl-C.
pub fn run(args: &ServeArgs) -> Result<()> {
    log::start(args.open.log_format)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let context = runtime.enter();
    if args.api_key_file.is_some() || args.admin_key_file.is_some() || args.tls_cert.is_some() {
        // A reload while the model is still being opened must not be the server's end.
        pirouette_server::expect_hangup();
    }
    let termination = Termination::new();
    let opening = ending::at_once();
    drop(context);
    let (doors, queue) = (doors(args), queue(args)?);
    let serve = serve_options(args, &doors)?;
    let record = typed(args).1.map(|dir| RecordOptions {
        dir: dir.to_owned(),
        limit_bytes: args.record_limit_mib.saturating_mul(1 << 20),
    });
    // LeRobot's port has handshakes of its own; then the admin port's connections and the
    // checkpoint's files.
    let handshakes = serve.max_handshakes * (1 + usize::from(doors.lerobot.is_some()));
    descriptors::raise((serve.max_connections + handshakes + 256) as u64);
    let fits = |policy: &Policy| check_clients(args, policy);
    let service = load(&args.open, typed(args).0, queue, fits)?;
    let service = Arc::new(service);
    opening.abort();
    let served = runtime.block_on(listen(doors, &service, serve, record, termination));
    ending::leave(runtime, service);
    served
}

/// Whether the clients that were asked for could be served from this policy at all.
fn check_clients(args: &ServeArgs, policy: &Policy) -> Result<()> {
    if args.dialect == Dialect::Roboarena && policy.roboarena().is_none() {
        bail!(
            "RoboArena's robot is DROID's, {} is for another one ({}): leave --dialect out",
            policy.config().name,
            policy.config().robot.name()
        );
    }
    if args.lerobot_port.is_some() { check_lerobot(policy.config()) } else { Ok(()) }
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
    let max_frame_bytes = usize::from(args.max_frame_mib) << 20;
    Ok(ServeOptions {
        max_frame_bytes,
        dialect: args.dialect,
        lerobot_fps: args.lerobot_fps,
        vla_eval_actions: args.vla_eval_actions,
        max_batch_observations: args.max_observations,
        api_keys,
        admin_keys,
        tls,
        busy_poll: busy_poll(&args.open)?,
        ..ServeOptions::default()
    })
}

async fn listen(
    doors: Doors<SocketAddr>,
    service: &Arc<PolicyService>,
    mut options: ServeOptions,
    record: Option<RecordOptions>,
    mut termination: Termination,
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
            Ok(()) => {
                let devices = watched.model().engine.stats().devices;
                let names: Vec<String> = devices.into_iter().map(|device| device.name).collect();
                let seconds = started.elapsed().as_secs_f64();
                tracing::info!("ready after {seconds:.1} s on {}", names.join(", "));
            }
            // The first load failed: nobody is served yet, so say it and leave.
            Err(why) => drop(failed.send(why)),
        }
    });
    let mut cause = None;
    let shutdown = async {
        tokio::select! {
            () = termination.told() => {}
            Ok(why) = failure => cause = Some(why),
        }
    };
    let served =
        pirouette_server::serve_doors(listeners, Arc::clone(service) as _, options, shutdown).await;
    ending::settle(service, recorder).await;
    match cause {
        Some(why) => bail!("the model could not be loaded: {why}"),
        None if served.drained => tracing::info!("drained"),
        None => tracing::warn!("the time to drain was too short for some requests"),
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
    use crate::opening::what_to_open;

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
            let args = serve(line);
            let name = what_to_open(&args.open, typed(&args).0).unwrap().0;
            assert_eq!(name.as_deref(), Some("pi05_droid"), "{line}");
        }
        let place = |line: &str| {
            let args = serve(line);
            let (name, dir) = what_to_open(&args.open, typed(&args).0).unwrap();
            (name.unwrap(), dir.unwrap().display().to_string())
        };
        let sim = place("policy:default");
        assert_eq!(sim, place("--env ALOHA_SIM"), "openpi's default environment");
        assert!(sim.1.starts_with("gs://openpi-assets/"), "{sim:?}");
        assert_eq!(place("--env DROID policy:default"), place("--env DROID"));
        for command in ["serve", "infer", "replay d"] {
            let parse = |flags: &str| {
                Cli::try_parse_from(format!("pirouette {command} {flags}").split_whitespace())
            };
            assert!(parse("a.toml").is_ok() && parse("--config a.toml").is_ok(), "{command}");
            let twice = parse("a.toml --config b.toml").map(drop).unwrap_err().to_string();
            assert!(twice.contains("--config") && twice.contains("cannot be used"), "{twice}");
        }
    }

    /// A limit of nothing was served as another one, and `localhost` was no address.
    #[test]
    fn limits_begin_at_one_and_hosts_are_addresses_or_this_machine() {
        let parse = |flags: &str| {
            let line =
                format!("pirouette serve pi05_droid --admin-port 1 --lerobot-port 2 {flags}");
            Cli::try_parse_from(line.split_whitespace()).map(drop).map_err(|e| e.to_string())
        };
        let flags = ["--max-batch", "--max-frame-mib", "--max-observations", "--queue"];
        for flag in flags.into_iter().chain(["--vla-eval-actions"]) {
            assert_eq!(parse(&format!("{flag} 1")), Ok(()));
            for wrong in ["0", "-1", "x"] {
                let error = parse(&format!("{flag}={wrong}")).unwrap_err();
                assert!(error.contains(flag), "{flag} {wrong}: {error}");
            }
        }
        assert!(parse("--max-frame-mib 4097").unwrap_err().contains("1..=4096"));
        for flag in ["--host", "--admin-host", "--lerobot-host"] {
            assert_eq!(parse(&format!("{flag} localhost")), Ok(()));
            let error = parse(&format!("{flag} robot")).unwrap_err();
            assert!(error.contains("127.0.0.1 for this machine alone"), "{error}");
        }
        assert!(serve("pi05_droid --host localhost").host.is_loopback());
        assert_eq!(serve("pi05_droid --host ::1").host.to_string(), "::1");
    }

    /// What docs/operations.md starts services with: a service's user has no cache that a
    /// tokenizer could be in.
    #[test]
    fn the_services_of_the_documentation_are_understood_and_name_a_tokenizer() {
        let page = include_str!("../../../docs/operations.md");
        let unit = page.split("ExecStart=/usr/local/bin/pirouette serve ").nth(1).unwrap();
        let unit = unit.split("\n[").next().unwrap().replace("\\\n", " ");
        let unit = unit.lines().next().unwrap().split_whitespace().collect::<Vec<_>>().join(" ");
        let args = page.split("            - serve\n").nth(1).unwrap();
        let args = args.lines().map_while(|line| line.strip_prefix("            - "));
        for line in [unit, args.collect::<Vec<_>>().join(" ")] {
            let args = serve(&line);
            assert!(args.open.policy.tokenizer.is_some() && args.admin_port.is_some(), "{line}");
        }
    }

    #[test]
    fn the_queue_has_room_for_the_largest_batch() {
        for (flags, want) in [
            ("", 1024),
            ("--max-observations 512", 1024),
            ("--max-observations 600", 1200),
            ("--queue 128", 128),
            ("--queue 3 --max-observations 3", 3),
        ] {
            assert_eq!(queue(&serve(format!("pi05_droid {flags}").trim())).unwrap(), want);
        }
        let small = serve("pi05_droid --queue 127");
        assert!(queue(&small).unwrap_err().to_string().contains("raise --queue"));
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
            ("--env DROID --no-record --port 8000", None, None),
            ("pi05_droid --record my/dir --no-record", Some("pi05_droid"), None),
            ("pi05_droid --no-record --record my/dir", Some("pi05_droid"), Some("my/dir")),
            ("--no-record pi05_droid", Some("pi05_droid"), None),
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
