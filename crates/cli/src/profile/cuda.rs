//! A program compiled for a GPU → its times.

use pirouette_cuda::CudaExecutable;
use pirouette_model::{BackendError, Executable, Inputs, StageTimes};

use super::meter::Meter;

/// A GPU runs the whole program as one graph; stages are graphs of their own, steps run apart.
pub struct CudaMeter(pub CudaExecutable);

impl Meter for CudaMeter {
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
        self.0.run(inputs, actions)?;
        self.0.stage_ms(n)
    }

    fn steps(
        &mut self,
        inputs: &Inputs<'_>,
        actions: &mut [f32],
        n: usize,
    ) -> Result<Vec<f64>, BackendError> {
        self.0.run(inputs, actions)?;
        self.0.step_ms(n)
    }

    fn device_only(&mut self, n: usize) -> Result<Option<Vec<f64>>, BackendError> {
        self.0.replay_ms(n).map(Some)
    }

    fn kernels(&self) -> Option<usize> {
        Some(self.0.kernel_count())
    }

    fn step_clock(&self) -> &'static str {
        "taken one by one outside the graph, with the launch and without overlap; they say where \
         time goes, and their sum is above the graph's own time"
    }
}
