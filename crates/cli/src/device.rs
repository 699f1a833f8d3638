//! Flags → a device with weights on it.

use std::io::IsTerminal;
use std::sync::Arc;

use anyhow::{Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use pirouette_cpu::{CpuDevice, Options};
use pirouette_cuda::CudaDevice;
use pirouette_cuda::driver::Driver;
use pirouette_cuda::gauge::Gauge;
use pirouette_model::{Config, Device, TensorSource, WeightTable};

use crate::args::{DeviceArgs, Precision};

/// A device of either kind, for commands that know more than the trait tells.
pub enum Opened {
    /// The CPU backend.
    Cpu(CpuDevice),
    /// A GPU.
    Cuda(Box<CudaDevice>),
}

impl Opened {
    /// The device behind it.
    pub fn device(&mut self) -> &mut dyn Device {
        match self {
            Opened::Cpu(d) => d,
            Opened::Cuda(d) => d.as_mut(),
        }
    }

    /// Boxed for the engine.
    pub fn boxed(self) -> Box<dyn Device> {
        match self {
            Opened::Cpu(d) => Box::new(d),
            Opened::Cuda(d) => d,
        }
    }
}

/// What `--device` means on this machine.
enum Target {
    Cpu,
    Cuda(usize),
}

/// Reads `--device`; `auto` takes the first GPU if there is one that can be used in bf16.
fn target(args: &DeviceArgs) -> Result<Target> {
    match args.device.as_str() {
        "cpu" => Ok(Target::Cpu),
        "auto" if args.precision == Precision::F32 => Ok(Target::Cpu),
        "auto" => Ok(if has_gpu() { Target::Cuda(0) } else { Target::Cpu }),
        other => match other.strip_prefix("cuda").map(|n| n.trim_start_matches(':')) {
            Some("") => Ok(Target::Cuda(0)),
            Some(n) if n.parse::<usize>().is_ok() => Ok(Target::Cuda(n.parse()?)),
            _ => bail!("`--device {other}`: use auto, cpu or cuda:N"),
        },
    }
}

fn has_gpu() -> bool {
    Driver::open().is_ok_and(|driver| driver.device_count() > 0)
}

/// Whether the flags name a GPU (or `auto` finds one); an error when they name nothing.
pub fn is_gpu(args: &DeviceArgs) -> Result<bool> {
    Ok(matches!(target(args)?, Target::Cuda(_)))
}

/// Sensors of the GPU the flags name, with its name; none on a machine without.
pub fn gauges(args: &DeviceArgs) -> Vec<(String, Gauge)> {
    let Ok(Target::Cuda(ordinal)) = target(args) else { return Vec::new() };
    let properties = Driver::open().and_then(|driver| driver.inspect(ordinal));
    match properties.and_then(|p| Ok((format!("cuda:{ordinal} {}", p.name), Gauge::open(&p)?))) {
        Ok(gauge) => vec![gauge],
        Err(error) => {
            tracing::warn!(%error, "the GPU's sensors can't be read");
            Vec::new()
        }
    }
}

/// Loads weights for `steps` Euler steps onto the device the flags name.
pub fn open(
    args: &DeviceArgs,
    config: Config,
    steps: usize,
    source: &dyn TensorSource,
) -> Result<Opened> {
    match target(args)? {
        Target::Cpu => Ok(Opened::Cpu(open_cpu(args, config, steps, source)?)),
        Target::Cuda(_) if args.precision == Precision::F32 => {
            bail!("GPUs run in bf16: use `--precision bf16`, or `--device cpu` for f32")
        }
        Target::Cuda(ordinal) => {
            let table = Arc::new(WeightTable::new(config, steps));
            Ok(Opened::Cuda(Box::new(CudaDevice::open(ordinal, table, source)?)))
        }
    }
}

/// Loads weights onto the CPU.
pub fn open_cpu(
    args: &DeviceArgs,
    config: Config,
    steps: usize,
    source: &dyn TensorSource,
) -> Result<CpuDevice> {
    let precision = match args.precision {
        Precision::F32 => pirouette_cpu::Precision::F32,
        Precision::Bf16 => pirouette_cpu::Precision::Bf16,
    };
    let options = Options { precision, threads: args.threads, ..Options::default() };
    let bar = Progress::new("loading weights");
    let device = pirouette_cpu::load(config, steps, source, options, &mut |done, total| {
        bar.set(done, total);
    })?;
    bar.finish();
    Ok(device)
}

/// A progress bar on standard error; silent when that is no terminal.
pub struct Progress(Option<ProgressBar>);

impl Progress {
    /// With this label.
    pub fn new(label: &'static str) -> Self {
        if !std::io::stderr().is_terminal() {
            return Progress(None);
        }
        let bar = ProgressBar::new(0);
        if let Ok(style) = ProgressStyle::with_template("{msg} {bar:40} {bytes}/{total_bytes}") {
            bar.set_style(style);
        }
        bar.set_message(label);
        Progress(Some(bar))
    }

    /// Where it stands.
    pub fn set(&self, done: u64, total: u64) {
        if let Some(bar) = &self.0 {
            bar.set_length(total);
            bar.set_position(done);
        }
    }

    /// Takes it off the screen.
    pub fn finish(self) {
        if let Some(bar) = self.0 {
            bar.finish_and_clear();
        }
    }
}

/// What there is of GPUs, for `doctor`: a line, and the fix if something is missing.
pub fn gpu_findings() -> Vec<(String, Option<String>)> {
    let driver = match Driver::open() {
        Ok(driver) => driver,
        Err(e) => return vec![("cuda".into(), Some(e.to_string()))],
    };
    let version = format!("CUDA {}.{}", driver.version / 1000, driver.version % 1000 / 10);
    let device = |ordinal: usize| match driver.context(ordinal) {
        Err(e) => (format!("cuda:{ordinal}"), Some(e.to_string())),
        Ok(context) => {
            let memory = context.make_current().and_then(|()| context.memory_info());
            let free = memory.map_or(0, |(free, _)| free) as f64 / 1e9;
            let name = &context.properties.name;
            let fix = (free < 8.0).then(|| "a full-size model wants 8 GB: free the GPU".into());
            (format!("cuda:{ordinal}: {name}, {free:.1} GB free, driver {version}"), fix)
        }
    };
    match driver.device_count() {
        0 => vec![(
            format!("cuda: driver {version}, no device"),
            Some("check `nvidia-smi` and CUDA_VISIBLE_DEVICES".into()),
        )],
        n => (0..n).map(device).collect(),
    }
}
