//! The command line: commands, and the flags that mean the same everywhere.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use pirouette_model::{Config, Family, Rtc, Shape};
use serde::{Deserialize, Serialize};

/// π0 and π0.5 robot-policy inference: a drop-in for openpi's policy server.
#[derive(Parser)]
#[command(name = "pirouette", version, propagate_version = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// Serve a policy to robots over openpi's websocket protocol.
    Serve(crate::serve::ServeArgs),
    /// Run recorded requests again and say where the actions differ.
    Replay(crate::replay::ReplayArgs),
    /// Run one observation and print or save the actions.
    Infer(crate::infer::InferArgs),
    /// Time inference: medians, p99, stages. Random full-size weights without a checkpoint.
    Bench(BenchArgs),
    /// Say where the milliseconds of a run go, step by step against the limit.
    Profile(ProfileArgs),
    /// Measure what each choice is worth, switched on one after the other.
    Ladder(LadderArgs),
    /// Measure everything and write one page: HTML, Markdown, JSON. Or compare saved ones.
    Report(ReportArgs),
    /// Print the recorded program: steps with shapes, FLOPs, bytes and limits.
    Plan(PlanArgs),
    /// Say what is in a checkpoint directory and what of it will be used.
    Inspect(InspectArgs),
    /// Compare a device with openpi's recorded answers.
    Golden(GoldenArgs),
    /// Ask a server as many clients would: latencies, goodput, refusals.
    Load(crate::load::LoadArgs),
    /// Prove what the server promises under stress: overload, faults, swaps, hostile clients.
    Stress(crate::stress::StressArgs),
    /// Compare this backend at its precision with the F32 reference, step by step.
    Verify(VerifyArgs),
    /// Say what this machine offers, each line with its fix.
    Doctor(DoctorArgs),
    /// Serve one device to the `serve` that started this process.
    #[cfg(target_os = "linux")]
    #[command(hide = true)]
    Worker,
}

/// The two models, for commands that run on random weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum ModelName {
    Pi0,
    Pi05,
}

impl ModelName {
    /// Full-size configuration.
    pub fn config(self) -> Config {
        match self {
            ModelName::Pi0 => Config::pi0(),
            ModelName::Pi05 => Config::pi05(),
        }
    }
}

/// Stored precision of the matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum Precision {
    /// The reference, on the CPU alone.
    F32,
    /// As openpi serves.
    Bf16,
    /// bf16, but the MLPs of the prefix tower in E4M3: opt-in, see ARCHITECTURE.md.
    Fp8,
}

impl Precision {
    /// The spelling of the flag.
    pub fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
            Precision::Fp8 => "fp8",
        }
    }

    /// Bytes of a matrix element, E4M3 aside.
    pub fn matrix_bytes(self) -> f64 {
        match self {
            Precision::F32 => 4.0,
            Precision::Bf16 | Precision::Fp8 => 2.0,
        }
    }
}

/// Where and how to run.
#[derive(Args, Clone, Debug, Serialize, Deserialize)]
pub struct DeviceArgs {
    /// `auto` (a GPU if there is one), `cpu`, or `cuda:N`; `serve` also takes `cuda:0,cuda:1` and
    /// `null:1:30,8:60`: no model, made-up actions after these milliseconds (batch:ms).
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Precision of the weights and of what they meet.
    #[arg(long, value_enum, default_value = "bf16")]
    pub precision: Precision,
    /// CPU threads (default: all cores).
    #[arg(long)]
    pub threads: Option<usize>,
}

/// Frequencies of the rotary position embedding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum Rope {
    /// As in JAX and the paper.
    #[default]
    Exact,
    /// Rounded to bf16.
    Bf16,
}

/// How the weights were trained, where the files do not tell.
#[derive(Args, Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct RopeArgs {
    /// RoPE frequencies: `exact`, or rounded to `bf16` for checkpoints trained by PyTorch in bf16
    /// (openpi's and LeRobot's trainers round them so).
    #[arg(long, value_enum, default_value = "exact")]
    pub rope: Rope,
}

/// Which weights.
#[derive(Args, Clone, Debug, Serialize, Deserialize)]
pub struct WeightArgs {
    /// Checkpoint directory: openpi safetensors, openpi JAX (Orbax) or LeRobot.
    #[arg(long)]
    pub checkpoint: Option<PathBuf>,
    /// Without a checkpoint: which full-size model to fill with random weights.
    #[arg(long, value_enum, default_value = "pi0")]
    pub model: ModelName,
    /// Without a checkpoint: seed of the random weights.
    #[arg(long, default_value_t = 1)]
    pub weight_seed: u64,
    #[command(flatten)]
    pub rope: RopeArgs,
}

impl WeightArgs {
    /// A checkpoint, or random weights of that family.
    pub fn for_family(checkpoint: Option<PathBuf>, family: Family, rope: RopeArgs) -> Self {
        let model = match family {
            Family::Pi0 => ModelName::Pi0,
            Family::Pi05 => ModelName::Pi05,
        };
        WeightArgs { checkpoint, model, weight_seed: 1, rope }
    }
}

/// A count: 0 of something is a mistake, and no other number is put in its place.
pub fn at_least_one(text: &str) -> Result<usize, String> {
    let count = text.parse().ok().filter(|&count| count > 0);
    count.ok_or_else(|| "it must be a whole number from 1".into())
}

/// An address to listen on. `localhost` is this machine alone, as 127.0.0.1.
pub fn host(text: &str) -> Result<IpAddr, String> {
    if text.eq_ignore_ascii_case("localhost") {
        return Ok(Ipv4Addr::LOCALHOST.into());
    }
    text.parse().map_err(|_| {
        "an IP address is wanted: 127.0.0.1 for this machine alone, 0.0.0.0 for all its addresses"
            .into()
    })
}

/// A number of Euler steps: tables are made of it before a program's shape is checked.
pub fn euler_steps(text: &str) -> Result<usize, String> {
    let steps = text.parse().ok().filter(|steps| (1..=1000).contains(steps));
    steps.ok_or_else(|| "1 to 1000 steps".into())
}

/// A rate that limits are computed for, in 10¹² a second: they are divided by it.
fn rate(text: &str) -> Result<f64, String> {
    let rate = text.parse().ok().filter(|rate| (1e-6..=1e6).contains(rate));
    rate.ok_or_else(|| "a rate from 0.000001 to 1000000".into())
}

/// Most runs of a measurement: their times are kept.
const MOST_RUNS: usize = 1_000_000;

/// A number of measured runs.
fn runs(text: &str) -> Result<usize, String> {
    let runs = text.parse().ok().filter(|runs| (1..=MOST_RUNS).contains(runs));
    runs.ok_or_else(|| format!("1 to {MOST_RUNS} runs"))
}

/// A number of runs before those.
fn warmup(text: &str) -> Result<usize, String> {
    let runs = text.parse().ok().filter(|runs| *runs <= MOST_RUNS);
    runs.ok_or_else(|| format!("0 to {MOST_RUNS} runs"))
}

/// The shape of a run.
#[derive(Args, Clone, Debug)]
pub struct ShapeArgs {
    /// Cameras that are really there (1 to 3); masked ones are dropped, not computed.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=3))]
    pub cameras: u8,
    /// Prompt tokens.
    #[arg(long, default_value_t = 20)]
    pub prompt_tokens: usize,
    /// Actions per chunk.
    #[arg(long, default_value_t = 10)]
    pub horizon: usize,
    /// Euler steps.
    #[arg(long, default_value_t = 10, value_parser = euler_steps)]
    pub steps: usize,
}

impl ShapeArgs {
    /// The shape for a batch size.
    pub fn shape(&self, batch: usize) -> Shape {
        Shape {
            batch,
            cameras: self.cameras as usize,
            prompt_tokens: self.prompt_tokens,
            horizon: self.horizon,
            steps: self.steps,
            rtc: Rtc::Off,
        }
    }
}

#[derive(Args)]
pub struct PlanArgs {
    /// Which model.
    #[arg(value_enum, default_value = "pi0")]
    pub model: ModelName,
    #[command(flatten)]
    pub shape: ShapeArgs,
    /// Samples per run.
    #[arg(long, default_value_t = 1)]
    pub batch: usize,
    /// Matrix rate the limit is computed for, TFLOP/s.
    #[arg(long, default_value_t = 790.0, value_parser = rate)]
    pub tflops: f64,
    /// Memory bandwidth the limit is computed for, TB/s.
    #[arg(long, default_value_t = 4.3, value_parser = rate)]
    pub tbps: f64,
    /// Stored precision of the matrices.
    #[arg(long, value_enum, default_value = "bf16")]
    pub precision: Precision,
    /// Write the plan as JSON to this file (`-` for standard output).
    #[arg(long)]
    pub json: Option<PathBuf>,
    /// Every step, not only the rim and one layer of each tower.
    #[arg(long)]
    pub all: bool,
}

#[derive(Args)]
pub struct BenchArgs {
    #[command(flatten)]
    pub weights: WeightArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    #[command(flatten)]
    pub shape: ShapeArgs,
    /// Batch sizes, each measured.
    #[arg(long, value_delimiter = ',', default_value = "1")]
    pub batch: Vec<usize>,
    /// What one request costs under `serve --deterministic --max-batch N`, N being this.
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "8")]
    pub deterministic: Option<usize>,
    /// Measured runs of each batch size (default: 200 on a GPU, 5 on the CPU).
    #[arg(long, value_parser = runs)]
    pub runs: Option<usize>,
    /// Runs before measuring (default: 20 on a GPU, 1 on the CPU).
    #[arg(long, value_parser = warmup)]
    pub warmup: Option<usize>,
    /// Runs a second, as a robot asks for them, with pauses between (default: one after another).
    #[arg(long, value_name = "HZ")]
    pub rate: Option<f64>,
    /// Write the results as JSON to this file (`-` for standard output).
    #[arg(long)]
    pub json: Option<PathBuf>,
}

#[derive(Args)]
pub struct InspectArgs {
    /// Checkpoint directory.
    pub dir: PathBuf,
    /// Write the report as JSON to this file (`-` for standard output).
    #[arg(long)]
    pub json: Option<PathBuf>,
}

#[derive(Args)]
pub struct GoldenArgs {
    #[command(flatten)]
    pub device: DeviceArgs,
    /// The full-size models too (random reproducible weights; minutes on a CPU).
    #[arg(long)]
    pub full: bool,
    /// Only this model.
    #[arg(long, value_enum)]
    pub model: Option<ModelName>,
    /// Write the results as JSON to this file (`-` for standard output).
    #[arg(long)]
    pub json: Option<PathBuf>,
}

#[derive(Args)]
pub struct VerifyArgs {
    /// Checkpoint directory (default: random full-size weights).
    pub dir: Option<PathBuf>,
    /// Without a checkpoint: which full-size model.
    #[arg(long, value_enum, default_value = "pi0")]
    pub model: ModelName,
    #[command(flatten)]
    pub rope: RopeArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    #[command(flatten)]
    pub shape: ShapeArgs,
    /// Seed of the random observation.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Write the results as JSON to this file (`-` for standard output).
    #[arg(long)]
    pub json: Option<PathBuf>,
}

#[derive(Args)]
pub struct DoctorArgs {
    /// Write the findings as JSON to this file (`-` for standard output).
    #[arg(long)]
    pub json: Option<PathBuf>,
}

/// Rates that limits are computed for.
#[derive(Args, Clone, Debug)]
pub struct RateArgs {
    /// Matrix rate the limits are computed for, TFLOP/s (default: an H200's as measured; on the
    /// CPU one product measured now).
    #[arg(long, value_parser = rate)]
    pub tflops: Option<f64>,
    /// Memory bandwidth the limits are computed for, TB/s (default: likewise).
    #[arg(long, value_parser = rate)]
    pub tbps: Option<f64>,
}

/// How times inside a GPU's graph are read.
#[derive(Args, Clone, Debug, Default)]
pub struct TracingArgs {
    /// NVIDIA's tracing library CUPTI: its file, a CUDA folder, or a Python environment that has
    /// nvidia-cuda-cupti (default: PIROUETTE_CUPTI, else the usual places). For GPUs.
    #[arg(long, value_name = "PATH")]
    pub cupti: Option<PathBuf>,
    /// Tell what CUPTI answers: its version, sizes, numbers and counts of records.
    #[arg(long)]
    pub verbose: bool,
}

#[derive(Args)]
pub struct ProfileArgs {
    #[command(flatten)]
    pub weights: WeightArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    #[command(flatten)]
    pub shape: ShapeArgs,
    #[command(flatten)]
    pub rates: RateArgs,
    /// Samples per run.
    #[arg(long, default_value_t = 1)]
    pub batch: usize,
    /// Measured runs (default: 200 on a GPU, 5 on the CPU).
    #[arg(long, value_parser = runs)]
    pub runs: Option<usize>,
    /// Runs before measuring (default: 20 on a GPU, 1 on the CPU).
    #[arg(long, value_parser = warmup)]
    pub warmup: Option<usize>,
    #[command(flatten)]
    pub tracing: TracingArgs,
    /// Write a trace for Perfetto or chrome://tracing to this file.
    #[arg(long)]
    pub trace: Option<PathBuf>,
    /// Write the profile as JSON to this file (`-` for standard output).
    #[arg(long)]
    pub json: Option<PathBuf>,
}

#[derive(Args)]
pub struct LadderArgs {
    #[command(flatten)]
    pub weights: WeightArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    #[command(flatten)]
    pub shape: ShapeArgs,
    /// Measured runs of each rung (default: 200 on a GPU; on the CPU 3, 1 where it is slow).
    #[arg(long, value_parser = runs)]
    pub runs: Option<usize>,
    /// Runs before measuring (default: 20 on a GPU, 1 on the CPU).
    #[arg(long, value_parser = warmup)]
    pub warmup: Option<usize>,
    /// Write the ladder as JSON to this file (`-` for standard output).
    #[arg(long)]
    pub json: Option<PathBuf>,
}

#[derive(Args)]
pub struct ReportArgs {
    /// Models to measure on random weights; a checkpoint brings its own.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "pi0,pi05")]
    pub models: Vec<ModelName>,
    /// Checkpoint directory to measure instead.
    #[arg(long)]
    pub checkpoint: Option<PathBuf>,
    /// Seed of the random weights.
    #[arg(long, default_value_t = 1)]
    pub weight_seed: u64,
    #[command(flatten)]
    pub device: DeviceArgs,
    #[command(flatten)]
    pub shape: ShapeArgs,
    #[command(flatten)]
    pub rates: RateArgs,
    /// Batch sizes (default: 1,2,4,8,16,32,64 on a GPU, 1 on the CPU).
    #[arg(long, value_delimiter = ',')]
    pub batch: Vec<usize>,
    /// Measured runs of each row (default: 200 on a GPU; on the CPU 5, 3 on the ladder).
    #[arg(long, value_parser = runs)]
    pub runs: Option<usize>,
    /// Runs before measuring (default: 20 on a GPU, 1 on the CPU).
    #[arg(long, value_parser = warmup)]
    pub warmup: Option<usize>,
    #[command(flatten)]
    pub tracing: TracingArgs,
    /// Leave the ladder out.
    #[arg(long)]
    pub no_ladder: bool,
    /// Render these saved reports instead of measuring.
    #[arg(long, num_args = 1.., value_name = "FILE", conflicts_with = "compare")]
    pub from: Vec<PathBuf>,
    /// Compare two saved reports instead of measuring.
    #[arg(long, num_args = 2, value_names = ["A", "B"])]
    pub compare: Vec<PathBuf>,
    /// Numbers published by others, shown beside ours and labelled as theirs.
    #[arg(long, conflicts_with = "compare")]
    pub published: Option<PathBuf>,
    /// Write the page as HTML to this file (`-` for standard output).
    #[arg(long)]
    pub html: Option<PathBuf>,
    /// Write it as Markdown to this file (`-`, and the default if nothing else is asked for:
    /// standard output).
    #[arg(long)]
    pub markdown: Option<PathBuf>,
    /// Write the measurements as JSON to this file (`-` for standard output).
    #[arg(long, conflicts_with = "compare")]
    pub json: Option<PathBuf>,
}
