//! `CudaDevice`: one GPU with a model's weights, compiling programs into graphs.

use std::sync::Arc;

use pirouette_model::{
    BackendError, Device, Executable, Program, Rtc, Shape, TensorSource, WeightTable, record_with,
};

use crate::cubins;
use crate::driver::{Context, Driver, Event, Stream};
use crate::executable::CudaExecutable;
use crate::load::{Precision, Weights};
use crate::portable::Portable;
use crate::tier_hopper::Hopper;

/// Which kernels a program is compiled to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tier {
    /// The fastest that takes each step.
    #[default]
    Auto,
    /// The portable ones only: the reference on the same GPU.
    Portable,
}

/// What makes the fast kernels' graph faster; each can be left out to see what it is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choices {
    /// Attention of vision and prefill by kernels of its own; else by the portable ones, which
    /// take the same memory.
    pub attention: bool,
    /// Kernels may start before the one in front has ended (programmatic dependent launch).
    pub dependent: bool,
    /// A part of the first Euler step may run beside the prefill.
    pub beside: bool,
}

impl Default for Choices {
    fn default() -> Self {
        Choices { attention: true, dependent: true, beside: true }
    }
}

/// What executables of one device share.
pub(crate) struct Shared {
    pub(crate) context: Arc<Context>,
    pub(crate) stream: Stream,
    /// For what a graph does beside its chain, and the mark by which the two wait for each other.
    pub(crate) side: (Stream, Event),
    pub(crate) weights: Weights,
    pub(crate) portable: Portable,
    pub(crate) hopper: Option<Hopper>,
}

/// A GPU with the weights of one model on it. Used from one thread at a time.
pub struct CudaDevice {
    shared: Arc<Shared>,
    tier: Tier,
    choices: Choices,
}

impl CudaDevice {
    /// Opens `cuda:<ordinal>` and loads every weight of `table`, in bf16.
    pub fn open(
        ordinal: usize,
        table: Arc<WeightTable>,
        source: &dyn TensorSource,
    ) -> Result<Self, BackendError> {
        Self::open_with(ordinal, table, Precision::Bf16, source)
    }

    /// Opens `cuda:<ordinal>` and loads every weight of `table`.
    pub fn open_with(
        ordinal: usize,
        table: Arc<WeightTable>,
        precision: Precision,
        source: &dyn TensorSource,
    ) -> Result<Self, BackendError> {
        // Any shape will do: the same steps use the same weights.
        let shape = Shape {
            batch: 1,
            cameras: 1,
            prompt_tokens: 1,
            horizon: 1,
            steps: table.steps,
            rtc: Rtc::Off,
        };
        let program = record_with(table, shape)
            .map_err(|error| BackendError::Unavailable(error.to_string()))?;
        Self::load(ordinal, &program, precision, source)
    }

    /// Opens `cuda:<ordinal>` for programs that use weights as this one does, in bf16.
    pub fn open_for(
        ordinal: usize,
        program: &Program,
        source: &dyn TensorSource,
    ) -> Result<Self, BackendError> {
        Self::load(ordinal, program, Precision::Bf16, source)
    }

    fn load(
        ordinal: usize,
        program: &Program,
        precision: Precision,
        source: &dyn TensorSource,
    ) -> Result<Self, BackendError> {
        let context = Driver::open()?.context(ordinal)?;
        let stream = Stream::new(&context)?;
        let side = (Stream::urgent(&context)?, Event::new(&context)?);
        let portable = Portable::load(&context)?;
        let fits = cubins::is_hopper(&context) && Hopper::takes(&program.config);
        let hopper = if fits { Some(Hopper::load(&context)?) } else { None };
        let weights = Weights::load(&context, &stream, program, precision, source)?;
        let shared = Arc::new(Shared { context, stream, side, weights, portable, hopper });
        Ok(CudaDevice { shared, tier: Tier::Auto, choices: Choices::default() })
    }

    /// Chooses the kernels of programs compiled from now on.
    pub fn set_tier(&mut self, tier: Tier) {
        self.tier = tier;
    }

    /// What programs compiled from now on make use of: all of it, unless told otherwise.
    pub fn set_choices(&mut self, choices: Choices) {
        self.choices = choices;
    }

    /// The same as [`Device::compile`], with the GPU's own methods on the result.
    pub fn compile_cuda(&mut self, program: Arc<Program>) -> Result<CudaExecutable, BackendError> {
        CudaExecutable::compile(self.shared.clone(), program, self.tier, self.choices)
    }

    /// Bytes of device memory free and in total.
    pub fn memory_info(&self) -> Result<(u64, u64), BackendError> {
        self.shared.context.make_current()?;
        self.shared.context.memory_info()
    }

    /// The failure that killed the device, if any: reopen it in a fresh process.
    pub fn failure(&self) -> Option<&str> {
        self.shared.context.failure()
    }

    /// Queues a kernel that writes to address 0.
    #[cfg(feature = "fault-injection")]
    pub fn inject_fault(&mut self) -> Result<(), BackendError> {
        let module = cubins::load(&self.shared.context, "portable_fault")?;
        let function = module.function("portable_fault", 0)?;
        let launch = crate::driver::Launch::new(function, [1; 3], 1, Vec::new());
        self.shared.stream.launch(&launch, false)
    }

    /// The device and its driver.
    pub fn context(&self) -> &Arc<Context> {
        &self.shared.context
    }
}

impl Device for CudaDevice {
    fn name(&self) -> String {
        let properties = &self.shared.context.properties;
        // Bits differ by precision: a recording of the one is not the other's.
        let precision = if self.shared.weights.scales.any() { " (fp8)" } else { "" };
        format!("cuda:{} {}{precision}", properties.ordinal, properties.name)
    }

    fn compile(&mut self, program: Arc<Program>) -> Result<Box<dyn Executable>, BackendError> {
        Ok(Box::new(self.compile_cuda(program)?))
    }

    fn weight_bytes(&self) -> u64 {
        let packed = self.shared.hopper.as_ref().map_or(0, Hopper::packed_bytes);
        self.shared.weights.bytes() + packed
    }
}
