//! Flags → a device with weights on it.

use std::io::IsTerminal;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use indicatif::{ProgressBar, ProgressStyle};
use pirouette_cpu::{CpuDevice, Options};
use pirouette_cuda::CudaDevice;
use pirouette_cuda::driver::Driver;
use pirouette_cuda::gauge::Gauge;
use pirouette_engine::{NullDevice, NullTimes};
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
            #[cfg(feature = "fault-injection")]
            Opened::Cuda(d) => crate::fault::wrap(d),
            #[cfg(not(feature = "fault-injection"))]
            Opened::Cuda(d) => d,
        }
    }
}

/// What `--device` means on this machine.
#[derive(Clone, Debug, PartialEq)]
pub enum Target {
    /// The CPU.
    Cpu,
    /// A GPU by its number.
    Cuda(usize),
    /// Nothing: made-up actions after a given time.
    Null(NullTimes),
}

/// Reads `--device`; `auto` takes the first GPU if there is one, for f32 the CPU.
pub fn target(args: &DeviceArgs) -> Result<Target> {
    if let Some(table) = args.device.strip_prefix("null") {
        let table = table.strip_prefix(':').unwrap_or(if table.is_empty() { "0" } else { table });
        let times = table.parse().map_err(|e| anyhow!("`--device {}`: {e}", args.device))?;
        return Ok(Target::Null(times));
    }
    match args.device.as_str() {
        "cpu" => Ok(Target::Cpu),
        "auto" if args.precision == Precision::F32 => Ok(Target::Cpu),
        "auto" => Ok(if has_gpu() { Target::Cuda(0) } else { Target::Cpu }),
        other => match other.strip_prefix("cuda").map(|n| n.trim_start_matches(':')) {
            Some("") => Ok(Target::Cuda(0)),
            Some(n) if n.parse::<usize>().is_ok() => Ok(Target::Cuda(n.parse()?)),
            _ => bail!("`--device {other}`: use auto, cpu or cuda:N (or null:TABLE to serve)"),
        },
    }
}

fn numbered(number: &str) -> Result<String> {
    let parsed = number.trim().parse::<usize>();
    let ordinal = parsed.with_context(|| format!("--gpus: `{number}` is no number of a GPU"))?;
    Ok(format!("cuda:{ordinal}"))
}

/// The devices of a server, one engine thread each: those of `--gpus`, of a `--device` that
/// lists several, or `replicas` of a null device.
pub fn targets(args: &DeviceArgs, gpus: Option<&str>, replicas: usize) -> Result<Vec<DeviceArgs>> {
    let count = || -> Result<usize> { Ok(Driver::open().context("--gpus")?.device_count()) };
    let named = match gpus {
        Some("all") => (0..count()?).map(|n| format!("cuda:{n}")).collect(),
        Some(list) => list.split(',').map(numbered).collect::<Result<Vec<_>>>()?,
        None if args.device.starts_with("cuda") => {
            args.device.split(',').map(|d| d.trim().to_string()).collect()
        }
        None => vec![args.device.clone()],
    };
    if named.is_empty() {
        bail!("--gpus all: the driver shows no GPU; check `nvidia-smi` and CUDA_VISIBLE_DEVICES");
    }
    let each = |device: String| DeviceArgs { device, ..args.clone() };
    let mut all: Vec<DeviceArgs> = named.into_iter().map(each).collect();
    let mut targets = all.iter().map(target).collect::<Result<Vec<_>>>()?;
    if replicas > 1 && !matches!(targets[..], [Target::Null(_)]) {
        bail!("--replicas is for one null device: name several GPUs with --gpus all or --gpus 0,1");
    }
    let gpu = |t: &Target| matches!(t, Target::Cuda(_));
    if targets.iter().any(gpu) && args.precision == Precision::F32 {
        bail!("GPUs run in bf16 or fp8: use `--precision bf16`, or `--device cpu` for f32");
    }
    while let Some(last) = targets.pop() {
        if targets.contains(&last) {
            bail!("{last:?} is named twice");
        }
    }
    all.resize(all.len().max(replicas), all[0].clone());
    Ok(all)
}

/// A null device, where the flags name one.
pub fn null(args: &DeviceArgs) -> Result<Option<NullDevice>> {
    Ok(match target(args)? {
        Target::Null(times) => Some(NullDevice::new(times)),
        Target::Cpu | Target::Cuda(_) => None,
    })
}

/// Bytes free where a device keeps its weights; `None` where nothing is kept or nothing is known.
pub fn free_bytes(args: &DeviceArgs) -> Result<Option<u64>> {
    Ok(match target(args)? {
        Target::Null(_) => None,
        Target::Cpu => available_memory(),
        Target::Cuda(ordinal) => {
            // Without a context: the server may have none of its own, or a broken one.
            let gauge = Driver::open()?.inspect(ordinal).and_then(|p| Gauge::open(&p));
            gauge.ok().and_then(|gauge| gauge.read().memory_free_bytes)
        }
    })
}

/// What Linux says can be had without swapping.
fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kib * 1024)
}

fn has_gpu() -> bool {
    no_gpu().is_none()
}

fn no_gpu() -> Option<String> {
    match Driver::open() {
        Err(error) => Some(error.to_string()),
        Ok(driver) if driver.device_count() == 0 => Some("the driver shows none".into()),
        Ok(_) => None,
    }
}

/// What to say where `auto` means the CPU because there is no GPU.
pub fn on_cpu(args: &DeviceArgs) -> Option<String> {
    if args.device != "auto" || args.precision == Precision::F32 {
        return None;
    }
    no_gpu().map(|why| format!("no GPU can be used ({why}): the model runs on the CPU"))
}

/// The sensors of the GPUs the flags name, with the GPUs' names.
pub fn gauges(devices: &[DeviceArgs]) -> Vec<(String, Gauge)> {
    let gauge = |args: &DeviceArgs| -> Option<Result<(String, Gauge)>> {
        let Ok(Target::Cuda(ordinal)) = target(args) else { return None };
        Some((|| {
            let properties = Driver::open()?.inspect(ordinal)?;
            Ok((format!("cuda:{ordinal} {}", properties.name), Gauge::open(&properties)?))
        })())
    };
    let opened = devices.iter().filter_map(gauge);
    opened
        .filter_map(|gauge| {
            gauge.inspect_err(|error| tracing::warn!(%error, "a GPU's sensors can't be read")).ok()
        })
        .collect()
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
            bail!("GPUs run in bf16 or fp8: use `--precision bf16`, or `--device cpu` for f32")
        }
        Target::Null(_) => bail!("a null device has no model: it is for `pirouette serve`"),
        Target::Cuda(ordinal) => {
            let table = Arc::new(WeightTable::new(config, steps));
            let precision = match args.precision {
                Precision::Fp8 => pirouette_cuda::Precision::Fp8,
                _ => pirouette_cuda::Precision::Bf16,
            };
            let device = CudaDevice::open_with(ordinal, table, precision, source)?;
            Ok(Opened::Cuda(Box::new(device)))
        }
    }
}

impl Precision {
    /// As the CPU backend knows it.
    pub fn on_cpu(self) -> pirouette_cpu::Precision {
        match self {
            Precision::F32 => pirouette_cpu::Precision::F32,
            Precision::Bf16 => pirouette_cpu::Precision::Bf16,
            Precision::Fp8 => pirouette_cpu::Precision::Fp8,
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
    let precision = args.precision.on_cpu();
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

#[cfg(test)]
mod tests {
    use super::*;

    fn args(device: &str) -> DeviceArgs {
        DeviceArgs { device: device.into(), precision: Precision::Bf16, threads: None }
    }

    fn names(device: &str, gpus: Option<&str>, replicas: usize) -> Result<Vec<String>> {
        Ok(targets(&args(device), gpus, replicas)?.into_iter().map(|a| a.device).collect())
    }

    #[test]
    fn devices_are_named_in_lists_and_never_twice() {
        assert_eq!(names("auto", Some("0,2"), 1).unwrap(), ["cuda:0", "cuda:2"]);
        assert_eq!(names("cuda:1,cuda:3", None, 1).unwrap(), ["cuda:1", "cuda:3"]);
        assert_eq!(names("cpu", None, 1).unwrap(), ["cpu"]);
        assert_eq!(names("null:1:9,8:60", None, 2).unwrap(), ["null:1:9,8:60"; 2]);
        for (device, gpus, replicas) in [
            ("auto", Some("0,0"), 1),
            ("auto", Some("x"), 1),
            ("auto", Some(""), 1),
            ("cuda:0,cuda:", None, 1),
            ("cpu", None, 2),
            ("cuda:0", None, 2),
            ("gpu", None, 1),
        ] {
            assert!(names(device, gpus, replicas).is_err(), "{device} {gpus:?} {replicas}");
        }
    }

    #[test]
    fn a_null_device_is_named_with_its_times() {
        assert_eq!(target(&args("null")).unwrap(), Target::Null(NullTimes::constant(0.0)));
        assert_eq!(target(&args("null:30")).unwrap(), Target::Null(NullTimes::constant(30.0)));
        let table = NullTimes(vec![(1, 9.5), (8, 60.0)]);
        assert_eq!(target(&args("null:1:9.5,8:60")).unwrap(), Target::Null(table));
        for wrong in ["null:", "null:x", "nullx", "null:8:1,1:2"] {
            assert!(target(&args(wrong)).is_err(), "{wrong}");
        }
        assert!(null(&args("cpu")).unwrap().is_none());
        assert!(open(&args("null"), Config::pi0(), 10, &Nothing).is_err(), "only serve has one");
    }

    struct Nothing;

    impl TensorSource for Nothing {
        fn origin(&self) -> String {
            "nothing".into()
        }

        fn names(&self) -> Vec<String> {
            vec![]
        }

        fn shape(&self, _: &str) -> Option<Vec<usize>> {
            None
        }

        fn load(
            &self,
            name: &str,
        ) -> Result<pirouette_model::Tensor<'_>, pirouette_model::SourceError> {
            let (name, origin) = (name.to_string(), self.origin());
            Err(pirouette_model::SourceError::Missing { name, origin })
        }
    }
}
