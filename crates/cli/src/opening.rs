//! Flags that name a policy, its weights and its devices → the policy behind an engine. `serve`
//! and `replay` have them in common.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, bail};
use pirouette_policy::Policy;
use pirouette_policy::config::environment;

use crate::args::{DeviceArgs, RopeArgs, at_least_one, euler_steps};
use crate::device::{self, Target};
use crate::log::LogFormat;
use crate::model::{Isolate, ModelPlan, Served};
use crate::service::PolicyService;
use crate::setup::{ConfigArgs, PolicyArgs};

/// What is opened, and where.
#[derive(clap::Args)]
pub struct OpenArgs {
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
    /// Most requests in one batch (default: 8 on a GPU, 1 on the CPU).
    #[arg(long, value_parser = at_least_one)]
    pub max_batch: Option<usize>,
    /// Euler steps (default: the configuration's).
    #[arg(long, value_parser = euler_steps)]
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

/// The policy and its engine, as the flags say; the devices open on their own threads. `config`:
/// the one that was meant; `queue`: how many requests may wait; `fits` may refuse the policy
/// before the devices open.
pub fn load(
    args: &OpenArgs,
    config: Option<&str>,
    queue: usize,
    fits: impl FnOnce(&Policy) -> Result<()>,
) -> Result<PolicyService> {
    let (name, checkpoint) = what_to_open(args, config)?;
    let plan = ModelPlan {
        name,
        rope: args.rope,
        policy: args.policy.clone(),
        devices: device::targets(&args.device, args.gpus.as_deref(), args.replicas.into())?,
        max_batch: args.max_batch,
        queue,
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
    if let Some(warning) = device::on_cpu(&plan.devices[0]) {
        tracing::warn!("{warning}");
    }
    if plan.is_null()? {
        tracing::warn!(
            "NULL DEVICE: no model runs and the actions are MADE UP. Do not connect a robot."
        );
    }
    let parts = plan.open(checkpoint.clone())?;
    fits(&parts.policy)?;
    for line in parts.policy.contract().lines() {
        tracing::info!("{line}");
    }
    PolicyService::new(Served::new(plan, checkpoint, parts.start()?))
}

/// How long threads stay awake after each answer. If not said otherwise, as long as a client that
/// asks again at once needs; a CPU that runs the model has better things to do.
pub fn busy_poll(args: &OpenArgs) -> Result<Duration> {
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

/// The configuration's name (none: the checkpoint describes itself) and the checkpoint.
pub fn what_to_open(
    args: &OpenArgs,
    config: Option<&str>,
) -> Result<(Option<String>, Option<PathBuf>)> {
    let (openpi, own) = match config {
        Some(policy) if policy.starts_with("policy:") => (Some(policy), None),
        other => (None, other),
    };
    check_openpi(args, openpi)?;
    let named = one_of("configuration", own, ("--policy.config", args.policy_config.as_deref()))?;
    let checkpoint = args.checkpoint.as_deref();
    let dir = args.policy_dir.as_deref().map(Path::new);
    let dir = one_of("checkpoint", checkpoint, ("--policy.dir", dir))?;
    // openpi's default environment, for those who ask for the default.
    let env = args.env.as_deref().or((openpi == Some("policy:default")).then_some("ALOHA_SIM"));
    let env = env.map(environment).transpose()?;
    let dir = match (dir, named, env) {
        (None, None, Some(env)) => Some(PathBuf::from(env.checkpoint)),
        (dir, ..) => dir.map(PathBuf::from),
    };
    Ok((named.or(env.map(|env| env.config)).map(str::to_string), dir))
}

/// What openpi's own server refuses of its `policy:…`.
fn check_openpi(args: &OpenArgs, openpi: Option<&str>) -> Result<()> {
    match openpi {
        None => Ok(()),
        // It would be random weights, whose actions nobody means who types this.
        Some("policy:checkpoint") if args.policy_dir.is_none() && args.checkpoint.is_none() => {
            bail!(
                "policy:checkpoint needs the checkpoint's directory: add --policy.dir=DIR, or take \
                 openpi's own checkpoint of the environment with policy:default (random weights, \
                 for trying things out: name the configuration alone, without policy:checkpoint)"
            )
        }
        Some("policy:default") if args.policy_config.is_some() || args.policy_dir.is_some() => {
            bail!(
                "policy:default is the environment's own configuration and checkpoint: with \
                 --policy.config and --policy.dir say policy:checkpoint"
            )
        }
        Some("policy:checkpoint" | "policy:default") => Ok(()),
        Some(other) => bail!("`{other}`: openpi knows policy:checkpoint and policy:default"),
    }
}

/// What was said in Pirouette's spelling or in openpi's. Said twice it must be the same: which one
/// was meant can't be known.
fn one_of<'a, T: ?Sized + PartialEq + AsRef<Path>>(
    what: &str,
    own: Option<&'a T>,
    (flag, openpi): (&str, Option<&'a T>),
) -> Result<Option<&'a T>> {
    if let (Some(own), Some(openpi)) = (own, openpi)
        && own != openpi
    {
        let (own, openpi) = (own.as_ref().display(), openpi.as_ref().display());
        bail!(
            "which {what}, `{own}` or `{openpi}`? Both are given, the latter as {flag}: leave one"
        );
    }
    Ok(own.or(openpi))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        open: OpenArgs,
    }

    fn open(line: &str) -> OpenArgs {
        Line::try_parse_from(["open"].into_iter().chain(line.split(' '))).unwrap().open
    }

    fn meant(line: &str) -> Result<(Option<String>, Option<PathBuf>)> {
        let args = open(line);
        what_to_open(&args, args.config.name())
    }

    #[test]
    fn what_is_said_twice_and_differs_is_refused() {
        let openpi = "policy:checkpoint --policy.config=pi05_droid --policy.dir=d";
        for line in [
            openpi,
            &format!("--env DROID {openpi}"),
            &format!("{openpi} --checkpoint d/"),
            "policy:checkpoint --policy.config=pi05_droid --checkpoint d",
            "pi05_droid --policy.dir=d",
            "--config pi05_droid --policy.config=pi05_droid --checkpoint d",
        ] {
            let (name, dir) = meant(line).unwrap();
            assert_eq!(
                (name.as_deref(), dir.as_deref()),
                (Some("pi05_droid"), Some(Path::new("d")))
            );
        }
        for (line, says) in [
            ("pi05_droid --checkpoint d --policy.dir=/e", "which checkpoint, `d` or `/e`?"),
            ("pi05_droid --policy.config=pi0_libero", "`pi05_droid` or `pi0_libero`?"),
            ("--config a.toml --policy.config=pi0_libero", "the latter as --policy.config"),
            ("policy:checkpoint --policy.config=pi05_droid", "add --policy.dir=DIR"),
            ("--env DROID policy:checkpoint", "add --policy.dir=DIR"),
            ("policy:default --policy.config=pi05_droid", "say policy:checkpoint"),
            ("policy:default --policy.dir=d", "say policy:checkpoint"),
            ("policy:other", "openpi knows policy:checkpoint and policy:default"),
        ] {
            let error = meant(line).unwrap_err().to_string();
            assert!(error.contains(says), "{line}: {error}");
        }
    }

    #[test]
    fn threads_that_stay_awake_want_as_many_cores_again() {
        assert_eq!([few_cores(1, 4), few_cores(8, 18)], [None, None]);
        let warning = few_cores(1, 2).unwrap();
        assert!(warning.contains("2 threads awake and wants 4 cores, here are 2"), "{warning}");
        assert!(few_cores(8, 16).is_some());
        let patience = |flag: &str| busy_poll(&open(&format!("--device null:1:9 {flag}"))).unwrap();
        let usual = if cores() < 4 { Duration::ZERO } else { Duration::from_millis(1) };
        assert_eq!(patience("pi05_droid"), usual);
        assert_eq!(patience("--busy-poll pi05_droid"), Duration::from_secs(1));
        assert_eq!(patience("pi05_droid --busy-poll=0.5"), Duration::from_micros(500));
        assert_eq!(patience("pi05_droid --busy-poll=0"), Duration::ZERO);
    }
}
