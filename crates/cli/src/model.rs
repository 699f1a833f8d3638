//! Flags and a checkpoint → a policy and the engine with its weights, which belong together and
//! are replaced together.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, RwLock, TryLockError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use pirouette_checkpoint::Identity;
use pirouette_cuda::gemm_tiles::MOST_ROWS;
use pirouette_engine::{Bucket, BucketRule, DeviceFactory, Engine, EngineOptions, SwapReport};
use pirouette_model::{BackendError, Config, Device, Rtc, WeightTable};
use pirouette_policy::{Policy, contract};
use serde::{Deserialize, Serialize};

use crate::args::{DeviceArgs, RopeArgs, WeightArgs};
use crate::device;
use crate::log::LogFormat;
use crate::setup::{self, PolicyArgs};
use crate::weights::Weights;

/// Time a new checkpoint may take to load, warm up and prove itself.
const SWAP_PATIENCE: Duration = Duration::from_secs(1800);

/// Time requests of the old checkpoint may take to be answered.
const RETIRE_PATIENCE: Duration = Duration::from_secs(600);

/// A policy and the engine with the weights its statistics and tokenizer belong to.
pub struct Model {
    /// Observation → model input, model output → actions.
    pub policy: Policy,
    /// Model input → model output.
    pub engine: Engine,
}

/// What a model is brought up from; the same again for another checkpoint.
#[derive(Clone, Debug)]
pub struct ModelPlan {
    /// The configuration; without one the checkpoint describes itself.
    pub name: Option<String>,
    /// How the weights were trained.
    pub rope: RopeArgs,
    /// Statistics, tokenizer, prompt.
    pub policy: PolicyArgs,
    /// One engine thread each, at least one.
    pub devices: Vec<DeviceArgs>,
    /// Most requests in one batch (default: 8 on a GPU, 1 on the CPU).
    pub max_batch: Option<usize>,
    /// Requests that may wait for a device, and as many for their preparation.
    pub queue: usize,
    /// Euler steps (default: the configuration's).
    pub steps: Option<usize>,
    /// One program for everybody.
    pub deterministic: bool,
    /// Real-time chunking is warm from the start.
    pub rtc: bool,
    /// How long a free device waits for company.
    pub window: Duration,
    /// How long device threads stay awake after each request.
    pub busy_poll: Duration,
    /// Whether devices are processes.
    pub isolate: Isolate,
    /// How those log.
    pub log: LogFormat,
}

/// Which devices run in a process of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Isolate {
    /// Of several GPUs all, a single one from its first failure on: a GPU that breaks ends all use
    /// of CUDA in its process.
    Auto,
    /// All.
    Always,
    /// None.
    Never,
}

impl Isolate {
    /// Opens one of `count` devices as this says. Processes are started as Linux does it.
    fn factory(self, open: Open, count: usize) -> Result<DeviceFactory> {
        let linux = cfg!(target_os = "linux");
        let gpu = matches!(device::target(&open.device)?, device::Target::Cuda(_));
        Ok(match self {
            Isolate::Always if !linux => bail!("--isolate always: only Linux can"),
            Isolate::Always => apart(open),
            Isolate::Auto if linux && gpu && count > 1 => apart(open),
            Isolate::Auto if linux && gpu => here_first(here(&open), apart(open), &CUDA_BROKE),
            Isolate::Auto | Isolate::Never => here(&open),
        })
    }
}

/// Whether a GPU that this process used has failed.
static CUDA_BROKE: AtomicBool = AtomicBool::new(false);

/// What an engine is started with, and the policy in front of it.
pub struct Parts {
    /// From the checkpoint's statistics and tokenizer.
    pub policy: Policy,
    /// Open the checkpoint's weights.
    pub devices: Vec<DeviceFactory>,
    /// For the engine.
    pub options: EngineOptions,
}

impl ModelPlan {
    /// Whether no model will run.
    pub fn is_null(&self) -> Result<bool> {
        Ok(device::null(&self.devices[0])?.is_some())
    }

    /// Reads what is small of a checkpoint (without one: random weights); the weights themselves
    /// are read by the devices.
    pub fn open(&self, checkpoint: Option<PathBuf>) -> Result<Parts> {
        let family = match &self.name {
            Some(name) => setup::policy_config(name)?.family,
            None => pirouette_model::Family::Pi0,
        };
        let weight_args = WeightArgs::for_family(checkpoint, family, self.rope);
        let weights = Weights::open(&weight_args)?;
        let mut config = setup::choose(self.name.as_deref(), weights.checkpoint())?;
        config.steps = self.steps.unwrap_or(config.steps);
        let steps = config.steps;
        let (model, identity) = (weights.config, weights.identity());
        let (policy, warnings) = setup::policy(config, &model, weights.checkpoint(), &self.policy)?;
        for warning in &warnings {
            tracing::warn!("{warning}");
        }
        tracing::info!("{}; {}", setup::describe(&policy), weights.origin);
        let options = self.options(&policy, WeightTable::new(model, steps))?;
        let open = |device: &DeviceArgs| {
            let (device, weights) = (device.clone(), weight_args.clone());
            let identity = identity.clone();
            let open = Open { device, weights, identity, steps, log: self.log };
            self.isolate.factory(open, self.devices.len())
        };
        let devices = self.devices.iter().map(open).collect::<Result<_>>()?;
        Ok(Parts { policy, devices, options })
    }

    fn options(&self, policy: &Policy, table: WeightTable) -> Result<EngineOptions> {
        let target = device::target(&self.devices[0])?;
        let on_gpu = target != device::Target::Cpu;
        let most = self.max_batch.unwrap_or(if on_gpu { 8 } else { 1 });
        let c = policy.config();
        let cameras = c.robot.cameras().min(3);
        let tokens = cameras * table.config.vision.tokens() + c.max_token_len;
        if let device::Target::Cuda(_) = target {
            check_batch(most, tokens)?;
        }
        let mut options = EngineOptions::new(vec![Arc::new(table)], c.horizon, c.max_token_len);
        options.queue_capacity = self.queue;
        options.window = self.window;
        options.busy_poll = self.busy_poll;
        options.rule = match (self.deterministic, on_gpu) {
            (true, _) => BucketRule::deterministic(most, cameras, c.max_token_len),
            (false, true) => BucketRule::gpu(most),
            (false, false) => BucketRule::cpu(most),
        };
        if let device::Target::Null(_) = target {
            // Its times do not depend on the prompt: one program of each size is enough.
            options.rule.prompt_multiple = c.max_token_len;
        }
        if on_gpu || self.deterministic {
            let prompts = (1..=6).map(|i| 16 * i).filter(|p| *p <= c.max_token_len.max(16));
            options.warm = prompts.map(|p| options.bucket(cameras, p)).collect();
            options.warm.dedup();
            if self.rtc {
                let guided = options.warm.iter().map(|b| Bucket { rtc: Rtc::Guided, ..*b });
                options.warm.extend(guided.collect::<Vec<_>>());
            }
            // What is warm stays; and some room for the canary and for rare shapes.
            let warm = options.warm.len() * options.rule.batches.len();
            options.executables = options.executables.max(warm + 8);
        }
        if !on_gpu {
            // A request on a CPU takes seconds, on two cores tens of them.
            options.watchdog = Duration::from_secs(600);
        }
        Ok(options)
    }

    /// Whether weights as large as these fit beside those every device holds already.
    fn check_memory(&self, weight_bytes: u64) -> Result<()> {
        for device in &self.devices {
            let Some(free) = device::free_bytes(device)? else { continue };
            // Activations and packing buffers come on top.
            let needed = weight_bytes + weight_bytes / 4;
            if free < needed {
                bail!(
                    "{}: a second copy of the weights needs {:.1} GB, {:.1} are free: start \
                     another server instead",
                    device.device,
                    needed as f64 / 1e9,
                    free as f64 / 1e9
                );
            }
        }
        Ok(())
    }
}

/// Whether a GPU takes batches of so many requests, each of so many tokens at most.
fn check_batch(requests: usize, tokens: usize) -> Result<()> {
    let most = MOST_ROWS as usize / tokens;
    if requests > most {
        bail!(
            "--max-batch {requests}: a request has up to {tokens} tokens, and a GPU's products \
             take {MOST_ROWS} rows: at most {most} of them"
        );
    }
    Ok(())
}

impl Parts {
    /// Starts the engine.
    pub fn start(self) -> Result<Model> {
        let engine = Engine::start(self.devices, self.options)?;
        Ok(Model { policy: self.policy, engine })
    }
}

/// Which device with which weights.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Open {
    /// Flags of the device.
    pub device: DeviceArgs,
    /// Flags of the weights.
    pub weights: WeightArgs,
    /// Which files they are, for all openings of a model.
    pub identity: Identity,
    /// Euler steps of the tables that are computed at load.
    pub steps: usize,
    /// How a process of its own logs.
    pub log: LogFormat,
}

/// Opens the device and its weights, on the engine's thread and again after every failure.
pub fn here(open: &Open) -> DeviceFactory {
    // One null device for all lives: it counts its runs.
    let null = device::null(&open.device).ok().flatten();
    let open = open.clone();
    Arc::new(move || match &null {
        Some(null) => Ok(Box::new(null.clone()) as Box<dyn Device>),
        None => open_here(&open).map(|(_, device)| device),
    })
}

/// The same in a process of its own, a new one after every failure.
#[cfg(target_os = "linux")]
fn apart(open: Open) -> DeviceFactory {
    Arc::new(move || {
        let device = crate::worker::ProcessDevice::open(open.clone())?;
        Ok(Box::new(device) as Box<dyn Device>)
    })
}

#[cfg(not(target_os = "linux"))]
fn apart(open: Open) -> DeviceFactory {
    here(&open)
}

/// `here` until a device that it opened must be opened again: `broke` is set then, and whoever sees
/// it set takes `apart`.
fn here_first(
    here: DeviceFactory,
    apart: DeviceFactory,
    broke: &'static AtomicBool,
) -> DeviceFactory {
    let opened = AtomicBool::new(false);
    Arc::new(move || {
        if opened.load(Relaxed) {
            broke.store(true, Relaxed);
        }
        if broke.load(Relaxed) {
            return apart();
        }
        let device = here()?;
        opened.store(true, Relaxed);
        Ok(device)
    })
}

/// Opens the device and its weights in this process.
pub fn open_here(open: &Open) -> Result<(Config, Box<dyn Device>), BackendError> {
    let unavailable = |e: anyhow::Error| BackendError::Unavailable(format!("{e:#}"));
    let weights = Weights::open(&open.weights).map_err(unavailable)?;
    if let Some(file) = open.identity.difference(&weights.identity()) {
        return Err(BackendError::Stale(format!(
            "{file} is not what it was when its model was opened: the checkpoint was replaced or \
             written to; POST /swap to serve the new files, or restart"
        )));
    }
    let config = weights.config;
    if let Some(null) = device::null(&open.device).map_err(unavailable)? {
        return Ok((config, Box::new(null)));
    }
    let opened = device::open(&open.device, config, open.steps, weights.source());
    let opened = opened.map_err(unavailable)?;
    Ok((config, opened.boxed()))
}

/// The model that is served, and how it is replaced while it is.
pub struct Served {
    plan: ModelPlan,
    current: RwLock<Arc<Model>>,
    /// The checkpoint served; held while it is being replaced.
    checkpoint: Mutex<Option<PathBuf>>,
}

impl Served {
    /// Serves a model that was brought up from this plan and checkpoint.
    pub fn new(plan: ModelPlan, checkpoint: Option<PathBuf>, model: Model) -> Self {
        let current = RwLock::new(Arc::new(model));
        Served { plan, current, checkpoint: Mutex::new(checkpoint) }
    }

    /// What it was brought up from.
    pub fn plan(&self) -> &ModelPlan {
        &self.plan
    }

    /// The model for a request. It keeps this one to its end, whatever is swapped meanwhile.
    pub fn model(&self) -> Arc<Model> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Replaces the model by another checkpoint (`None`: the same one, read again): loads it
    /// beside the old one, proves it, sends new requests to it, and lets the old one go when its
    /// last request is answered. Blocks.
    ///
    /// # Errors
    /// Why the old model serves on.
    pub fn swap(&self, checkpoint: Option<PathBuf>) -> Result<SwapReport> {
        let mut served = match self.checkpoint.try_lock() {
            Ok(served) => served,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => bail!("another swap is under way: try again later"),
        };
        let checkpoint = checkpoint.or_else(|| served.clone());
        let old = self.model();
        let parts = self.plan.open(checkpoint.clone())?;
        if contract(parts.policy.config()) != contract(old.policy.config()) {
            bail!("the new checkpoint asks for other observations or gives other actions");
        }
        let weights = old.engine.stats().devices.iter().map(|d| d.weight_bytes).max();
        self.plan.check_memory(weights.unwrap_or(0))?;
        let (engine, report) = old.engine.successor(parts.devices, parts.options, SWAP_PATIENCE)?;
        let new = Arc::new(Model { policy: parts.policy, engine });
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = new;
        *served = checkpoint;
        retire(old);
        tracing::info!(
            devices = report.devices,
            other_weights = report.changed,
            "swapped after {:.1} s",
            report.took.as_secs_f64()
        );
        Ok(report)
    }
}

/// Waits until no request holds the old model, then ends it, which frees its memory.
fn retire(old: Arc<Model>) {
    let until = Instant::now() + RETIRE_PATIENCE;
    let mut held = Some(old);
    while let Some(model) = held.take() {
        if Instant::now() > until {
            tracing::warn!("requests of the old checkpoint never ended; it is cut off");
            model.engine.drain(Duration::ZERO);
            return;
        }
        held = Arc::try_unwrap(model).err();
        if held.is_some() {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::atomic::AtomicUsize;

    use pirouette_engine::{Noise, Request};
    use pirouette_model::{Executable, Program};
    use pirouette_policy::sample_observation;
    use pirouette_testing::fixture::testdata;

    use super::*;
    use crate::args::{Precision, Rope};

    #[test]
    fn a_gpu_takes_batches_of_so_many_rows() {
        // Three cameras of 256 tokens, prompts of 200.
        assert!(check_batch(135, 968).is_ok());
        let error = check_batch(136, 968).unwrap_err().to_string();
        assert!(error.contains("--max-batch 136") && error.contains("at most 135"), "{error}");
    }

    fn plan() -> ModelPlan {
        let tokenizer = Some(testdata().join("D_preprocess/tokenizer/tok_bpe.model"));
        let device = "cpu".to_string();
        ModelPlan {
            name: Some("pi05_droid".into()),
            rope: RopeArgs::default(),
            policy: PolicyArgs { tokenizer, norm_stats: None, default_prompt: None },
            devices: vec![DeviceArgs { device, precision: Precision::F32, threads: Some(1) }],
            max_batch: None,
            queue: 256,
            steps: None,
            deterministic: false,
            rtc: false,
            window: Duration::ZERO,
            busy_poll: Duration::ZERO,
            isolate: Isolate::Never,
            log: LogFormat::Text,
        }
    }

    struct Named(&'static str);

    impl Device for Named {
        fn name(&self) -> String {
            self.0.into()
        }

        fn compile(&mut self, _: Arc<Program>) -> Result<Box<dyn Executable>, BackendError> {
            Err(BackendError::Unavailable(self.0.into()))
        }

        fn weight_bytes(&self) -> u64 {
            0
        }
    }

    /// The first life is here, and so is one after an attempt that failed; the next is apart, as
    /// is the first of another device when this one has broken.
    #[test]
    fn a_device_is_opened_here_until_it_breaks() {
        static BROKE: AtomicBool = AtomicBool::new(false);
        let named = |name: &'static str, fails: usize| -> DeviceFactory {
            let calls = AtomicUsize::new(0);
            Arc::new(move || match calls.fetch_add(1, Relaxed) {
                call if call < fails => Err(BackendError::Unavailable(name.into())),
                _ => Ok(Box::new(Named(name)) as _),
            })
        };
        let open = |factory: &DeviceFactory| factory().map(|device| device.name());
        let one = here_first(named("here", 1), named("apart", 0), &BROKE);
        let other = here_first(named("other", 0), named("apart", 0), &BROKE);
        assert!(open(&one).is_err());
        assert_eq!(open(&one).unwrap(), "here");
        assert_eq!(open(&one).unwrap(), "apart");
        assert_eq!(open(&other).unwrap(), "apart");
    }

    fn checkpoint(name: &str) -> PathBuf {
        testdata().join("A_tiny/e2e").join(name).join("checkpoint")
    }

    fn served(checkpoint: PathBuf) -> Served {
        served_by(plan(), checkpoint)
    }

    fn served_by(plan: ModelPlan, checkpoint: PathBuf) -> Served {
        let model = plan.open(Some(checkpoint.clone())).unwrap().start().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(model.engine.wait_ready()).unwrap();
        Served::new(plan, Some(checkpoint), model)
    }

    fn actions(served: &Served) -> Vec<f64> {
        let model = served.model();
        let prepared = model.policy.prepare(&sample_observation(model.policy.config(), 3)).unwrap();
        let input = prepared.input.clone();
        let pending = model.engine.submit(Request {
            previous: None,
            images: input.images,
            tokens: input.tokens,
            state: input.state,
            noise: Noise::Seed(5),
            steps: None,
            deadline: None,
            company: None,
        });
        let answer = pending.unwrap().wait().unwrap();
        model.policy.finish(&prepared, &answer.actions).unwrap().to_f64().unwrap()
    }

    fn copy(from: &Path, to: &Path) {
        std::fs::create_dir_all(to).unwrap();
        for entry in std::fs::read_dir(from).unwrap() {
            let (path, name) = (entry.as_ref().unwrap().path(), entry.unwrap().file_name());
            if path.is_dir() {
                copy(&path, &to.join(name));
            } else {
                std::fs::copy(&path, to.join(name)).unwrap();
            }
        }
    }

    #[test]
    fn statistics_move_with_the_weights_and_what_does_not_fit_is_refused() {
        let served = served(checkpoint("pi05_droid"));
        let before = actions(&served);
        assert!(!served.swap(None).unwrap().changed, "the same weights, read again");
        assert_eq!(actions(&served), before);

        let folder = tempfile::tempdir().unwrap();
        copy(&checkpoint("pi05_droid"), folder.path());
        let stats = folder.path().join("assets/droid/norm_stats.json");
        let text = std::fs::read_to_string(&stats).unwrap();
        let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
        let q99 = json["norm_stats"]["actions"]["q99"].as_array_mut().unwrap();
        q99.iter_mut().for_each(|v| *v = (v.as_f64().unwrap() + 10.0).into());
        std::fs::write(&stats, json.to_string()).unwrap();
        let report = served.swap(Some(folder.path().into())).unwrap();
        assert!(!report.changed, "the weights are the same, the statistics are not");
        let after = actions(&served);
        assert_ne!(after, before);
        assert_eq!(after, actions(&self::served(folder.path().into())), "as if started with it");

        for other in [checkpoint("pi0_libero"), folder.path().join("missing")] {
            assert!(served.swap(Some(other)).is_err());
            assert_eq!(actions(&served), after, "what was served is served on");
        }
        let weights = folder.path().join("model.safetensors");
        let bytes = std::fs::read(&weights).unwrap();
        std::fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
        assert!(served.swap(None).is_err(), "a truncated file");
        assert_eq!(actions(&served), after);
    }

    #[test]
    fn the_plan_of_a_null_device_is_one_program_of_each_size() {
        let device = "null:1:5,8:20".to_string();
        let devices = vec![DeviceArgs { device, ..plan().devices[0].clone() }; 2];
        let plan = ModelPlan { devices, name: Some("pi05_droid".into()), ..plan() };
        assert!(plan.is_null().unwrap());
        let parts = plan.open(None).unwrap();
        assert_eq!((parts.devices.len(), parts.options.warm.len()), (2, 1));
        assert_eq!(parts.options.rule.batches, [1, 2, 4, 8]);
        let fixed = ModelPlan { deterministic: true, ..plan }.open(None).unwrap().options;
        assert_eq!((fixed.rule.batches, fixed.warm.len()), (vec![8], 1));
        assert_eq!(fixed.warm[0].prompt_tokens, 200);
    }

    #[test]
    fn rope_is_rounded_where_it_is_asked_for_and_stays_so() {
        let exact = actions(&served(checkpoint("pi05_droid")));
        let plan = ModelPlan { rope: RopeArgs { rope: Rope::Bf16 }, ..plan() };
        let rounded = served_by(plan, checkpoint("pi05_droid"));
        assert!(rounded.model().engine.options().tables[0].config.rope_bf16);
        let before = actions(&rounded);
        assert_ne!(before, exact);
        assert!(!rounded.swap(None).unwrap().changed);
        assert_eq!(actions(&rounded), before);
    }

    #[test]
    fn flags_are_in_the_contract() {
        let card = |steps, prompt: Option<&str>| {
            let policy = PolicyArgs { default_prompt: prompt.map(String::from), ..plan().policy };
            let plan =
                ModelPlan { steps, policy, name: Some("pi05_aloha_pen_uncap".into()), ..plan() };
            plan.open(None).map(|parts| parts.policy.contract())
        };
        let own = card(None, None).unwrap();
        assert_eq!((own.model.steps, own.prompt.default.as_deref()), (10, Some("uncap the pen")));
        let flagged = card(Some(4), Some("wait")).unwrap();
        assert_eq!((flagged.model.steps, flagged.prompt.default.as_deref()), (4, Some("wait")));
        let error = card(Some(0), None).unwrap_err().to_string();
        assert!(error.contains("`steps` is 0; it must be 1 to 1000"), "{error}");
    }
}
