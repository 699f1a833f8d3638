//! A GPU → one that breaks at a given run, to see what becomes of a server around it. Only with
//! `--features fault-injection`: `PIROUETTE_FAULT=cuda:1@200` lets that GPU's 200th run in each
//! process meet a kernel that writes to address 0.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use pirouette_cuda::CudaDevice;
use pirouette_model::{BackendError, Device, Executable, Inputs, Program, StageTimes};

/// Runs of the GPU that is to break.
static RUNS: AtomicU64 = AtomicU64::new(0);

/// The device itself, or one that breaks if the environment asks for it.
pub fn wrap(device: Box<CudaDevice>) -> Box<dyn Device> {
    let asked = std::env::var("PIROUETTE_FAULT").unwrap_or_default();
    let (gpu, at) = asked.split_once('@').unwrap_or_default();
    let at: Option<u64> = at.parse().ok();
    if at.is_none() && !asked.is_empty() {
        tracing::warn!("PIROUETTE_FAULT={asked}: say which GPU at which run, as in cuda:1@200");
    }
    match at {
        Some(at) if Device::name(device.as_ref()).starts_with(&format!("{gpu} ")) => {
            Box::new(Faulty { device: Arc::new(Mutex::new(device)), at })
        }
        _ => device,
    }
}

struct Faulty {
    device: Arc<Mutex<Box<CudaDevice>>>,
    at: u64,
}

impl Faulty {
    fn with<T>(&self, f: impl FnOnce(&mut CudaDevice) -> T) -> T {
        f(&mut self.device.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Device for Faulty {
    fn name(&self) -> String {
        self.with(|device| device.name())
    }

    fn compile(&mut self, program: Arc<Program>) -> Result<Box<dyn Executable>, BackendError> {
        let inner = self.with(|device| device.compile(program))?;
        let device = Faulty { device: Arc::clone(&self.device), at: self.at };
        Ok(Box::new(FaultyExecutable { device, inner }))
    }

    fn weight_bytes(&self) -> u64 {
        self.with(|device| device.weight_bytes())
    }

    fn look(&mut self) -> Result<(), BackendError> {
        self.with(Device::look)
    }
}

struct FaultyExecutable {
    inner: Box<dyn Executable>,
    device: Faulty,
}

impl Executable for FaultyExecutable {
    fn program(&self) -> &Arc<Program> {
        self.inner.program()
    }

    fn run(
        &mut self,
        inputs: &Inputs<'_>,
        actions: &mut [f32],
    ) -> Result<StageTimes, BackendError> {
        if RUNS.fetch_add(1, Relaxed) + 1 == self.device.at {
            tracing::warn!(run = self.device.at, "the fault asked for is injected");
            self.device.with(CudaDevice::inject_fault)?;
        }
        self.inner.run(inputs, actions)
    }
}
