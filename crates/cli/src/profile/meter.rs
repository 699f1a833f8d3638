//! A compiled program on any backend → its times: whole, by stage, by step.

use std::sync::Arc;

use anyhow::Result;
use pirouette_cpu::CpuExecutable;
use pirouette_cuda::ReplayTrace;
use pirouette_model::program::Stage;
use pirouette_model::{BackendError, Executable, Inputs, Program, StageTimes};

use super::cuda::CudaMeter;
use crate::args::TracingArgs;
use crate::device::Opened;
use crate::quantile::quantile;

/// What every step takes.
pub struct StepTimes {
    /// Milliseconds of every step: medians.
    pub ms: Vec<f64>,
    /// How they were taken: what they include and what they don't.
    pub clock: String,
    /// The kernels behind them, where they were looked at inside the device's own queue.
    pub replay: Option<ReplayTrace>,
}

/// A compiled program whose insides can be timed.
pub trait Meter {
    /// One run, inputs in host memory to actions in host memory.
    fn run(&mut self, inputs: &Inputs<'_>, actions: &mut [f32])
    -> Result<StageTimes, BackendError>;

    /// Milliseconds of vision, prefill and denoise in each of `n` runs.
    fn stages(
        &mut self,
        inputs: &Inputs<'_>,
        actions: &mut [f32],
        n: usize,
    ) -> Result<Vec<[f64; 3]>, BackendError>;

    /// Times of every step over `n` runs; inside a GPU's graph if `tracing` says where to look for
    /// the library and it is there.
    fn steps(
        &mut self,
        inputs: &Inputs<'_>,
        actions: &mut [f32],
        n: usize,
        tracing: Option<&TracingArgs>,
    ) -> Result<StepTimes, BackendError>;

    /// Milliseconds of `n` runs without copies, where the device can run apart from the host.
    fn device_only(&mut self, n: usize) -> Result<Option<Vec<f64>>, BackendError>;

    /// Kernels per run, where a step is not one unit of work.
    fn kernels(&self) -> Option<usize>;
}

/// Compiles a program on the opened device, ready to be timed.
pub fn compile(opened: &mut Opened, program: Arc<Program>) -> Result<Box<dyn Meter>> {
    match opened {
        Opened::Cpu(device) => Ok(Box::new(CpuMeter(device.compile_cpu(program)?))),
        Opened::Cuda(device) => Ok(Box::new(CudaMeter(device.compile_cuda(program)?))),
    }
}

/// The CPU takes the time of every step in passing.
pub struct CpuMeter(pub CpuExecutable);

impl Meter for CpuMeter {
    fn run(
        &mut self,
        inputs: &Inputs<'_>,
        actions: &mut [f32],
    ) -> Result<StageTimes, BackendError> {
        self.0.run(inputs, actions)
    }

    fn stages(
        &mut self,
        inputs: &Inputs<'_>,
        actions: &mut [f32],
        n: usize,
    ) -> Result<Vec<[f64; 3]>, BackendError> {
        let by_stage = |t: StageTimes| [t.vision_ms, t.prefill_ms, t.denoise_ms];
        (0..n).map(|_| self.0.run(inputs, actions).map(by_stage)).collect()
    }

    fn steps(
        &mut self,
        inputs: &Inputs<'_>,
        actions: &mut [f32],
        n: usize,
        _: Option<&TracingArgs>,
    ) -> Result<StepTimes, BackendError> {
        self.0.time_steps(true);
        let mut samples = vec![Vec::new(); self.0.program().steps.len()];
        for _ in 0..n {
            self.0.run(inputs, actions)?;
            for (sample, &ms) in samples.iter_mut().zip(self.0.step_ms()) {
                sample.push(ms);
            }
        }
        self.0.time_steps(false);
        let ms = samples.into_iter().map(median).collect();
        Ok(StepTimes { ms, clock: BARRIERS.into(), replay: None })
    }

    fn device_only(&mut self, _: usize) -> Result<Option<Vec<f64>>, BackendError> {
        Ok(None)
    }

    fn kernels(&self) -> Option<usize> {
        None
    }
}

const BARRIERS: &str =
    "taken in ordinary runs, from barrier to barrier; their sum is the run without its copies";

/// The middle of some values; zero of none.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    if values.is_empty() { 0.0 } else { quantile(&values, 0.5) }
}

/// The stages with their names, in order.
pub const STAGES: [(Stage, &str); 3] =
    [(Stage::Vision, "vision"), (Stage::Prefill, "prefill"), (Stage::Denoise, "denoise")];
