//! A model's weights on the CPU.

use std::sync::{Arc, Mutex};

use pirouette_model::{
    BackendError, Config, Device, Executable, Program, TensorSource, WeightTable,
};

use crate::driver::pool::Pool;
use crate::executable::CpuExecutable;
use crate::gemm::{Isa, Storage};
use crate::weights::Weights;

/// Storage of matrices, keys and values, and of the operands they meet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Precision {
    /// f32 throughout: the reference. The same bits for the same sample, whatever the batch, the
    /// padding and the number of threads.
    F32,
    /// Weights bf16, activations f32 and rounded to bf16 as they enter a product, sums f32.
    #[default]
    Bf16,
    /// As `Bf16`, but both operands of the prefix tower's MLPs are E4M3 numbers times powers of
    /// two ([`pirouette_model::fp8`]), which bf16 holds exactly: the same arithmetic as a GPU's,
    /// as a reference for it. It takes the memory and the time of `Bf16`.
    Fp8,
}

impl Precision {
    pub(crate) fn storage(self) -> Storage {
        match self {
            Precision::F32 => Storage::F32,
            Precision::Bf16 | Precision::Fp8 => Storage::Bf16,
        }
    }
}

/// Choices made at load.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Storage of matrices.
    pub precision: Precision,
    /// Threads; all cores when absent.
    pub threads: Option<usize>,
    /// Instruction set; the best one here when absent.
    pub isa: Option<Isa>,
}

/// Most threads of a device.
const MAX_THREADS: usize = 1024;

/// The CPU with the weights of one model.
pub struct CpuDevice {
    weights: Arc<Weights>,
    pool: Arc<Mutex<Pool>>,
    isa: Isa,
    threads: usize,
    precision: Precision,
}

/// Loads a model for programs of `steps` Euler steps. `progress(done, total)` counts weights'
/// elements.
pub fn load(
    config: Config,
    steps: usize,
    source: &dyn TensorSource,
    options: Options,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<CpuDevice, BackendError> {
    load_table(WeightTable::new(config, steps), source, options, progress)
}

/// As [`load`], for a table that was made before.
pub fn load_table(
    table: WeightTable,
    source: &dyn TensorSource,
    options: Options,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<CpuDevice, BackendError> {
    let isa = options.isa.unwrap_or_else(Isa::best);
    if !isa.is_available() {
        return Err(BackendError::Unavailable(format!(
            "this machine has no {}; the best it has is {}",
            isa.name(),
            Isa::best().name()
        )));
    }
    let threads = options.threads.unwrap_or_else(cores);
    if threads == 0 || threads > MAX_THREADS {
        return Err(BackendError::Unavailable(format!(
            "{threads} threads asked for, 1..={MAX_THREADS} are possible"
        )));
    }
    let weights = Weights::load(table, options.precision, source, threads, progress)?;
    Ok(CpuDevice {
        weights: Arc::new(weights),
        pool: Arc::new(Mutex::new(Pool::new(threads)?)),
        isa,
        threads,
        precision: options.precision,
    })
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

impl CpuDevice {
    /// As [`Device::compile`], with the methods that only this backend has.
    pub fn compile_cpu(&mut self, program: Arc<Program>) -> Result<CpuExecutable, BackendError> {
        let (ours, theirs) = (&self.weights.table, &program.weights);
        if ours.config != theirs.config
            || ours.steps != theirs.steps
            || ours.time_embedding != theirs.time_embedding
        {
            return Err(BackendError::Unavailable(format!(
                "the program wants other weights than were loaded: {} with {} steps instead of \
                 {} with {}; load the model for that many steps",
                theirs.config.family.name(),
                theirs.steps,
                ours.config.family.name(),
                ours.steps
            )));
        }
        CpuExecutable::new(program, self.weights.clone(), self.pool.clone(), self.isa)
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }
}

impl Device for CpuDevice {
    fn name(&self) -> String {
        let precision = match self.precision {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
            Precision::Fp8 => "fp8",
        };
        format!("cpu ({}, {precision}, {} threads)", self.isa.name(), self.threads)
    }

    fn compile(&mut self, program: Arc<Program>) -> Result<Box<dyn Executable>, BackendError> {
        Ok(Box::new(self.compile_cpu(program)?))
    }

    fn weight_bytes(&self) -> u64 {
        self.weights.bytes() as u64
    }
}

/// What was found, for `doctor`: instruction sets, the one that would be chosen, cores, caches.
pub fn features() -> Vec<(String, bool)> {
    let best = Isa::best();
    let mut found: Vec<(String, bool)> =
        Isa::ALL.iter().map(|isa| (isa.name().to_string(), isa.is_available())).collect();
    found.push((format!("chosen: {}", best.name()), true));
    found.push((format!("{} cores", cores()), true));
    for index in 0..8 {
        let cache = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/");
        let read = |file: &str| std::fs::read_to_string(format!("{cache}{file}"));
        if let (Ok(level), Ok(kind), Ok(size)) = (read("level"), read("type"), read("size")) {
            let text = format!("L{} {} cache {}", level.trim(), kind.trim(), size.trim());
            found.push((text, true));
        }
    }
    found
}
