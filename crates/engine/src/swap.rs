//! An engine at work and other weights → an engine with those, loaded, warm and verified beside it.
//!
//! The caller sends new requests to the successor, waits until those of the old engine are
//! answered, and drops it. A request runs on one set of weights from beginning to end, whatever
//! happens around it, and a successor that fails has changed nothing.

use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tokio::sync::oneshot::error::TryRecvError;

use crate::engine::Engine;
use crate::options::{DeviceFactory, EngineOptions};
use crate::request::EngineError;
use crate::shared::{DeviceState, Phase};

/// Longest sleep between looks at devices that load.
const LOOK: Duration = Duration::from_millis(50);

/// How a successor came about.
#[derive(Clone, Debug, PartialEq)]
pub struct SwapReport {
    /// Its devices that are ready.
    pub devices: usize,
    /// Loading, warm-up and canaries.
    pub took: Duration,
    /// Whether the canary's answer differs from the old engine's: other weights.
    pub changed: bool,
}

/// Why there is no successor. The old engine serves on.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SwapError {
    /// The new weights are of another model than the old ones.
    #[error("the new weights do not fit what is served: {0}; start another server for them")]
    Contract(String),
    /// The engine could not be started.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The devices did not load, warm up and prove themselves.
    #[error("the new weights could not be brought up: {0}")]
    Device(String),
    /// It took too long.
    #[error("the new weights were not ready within {0:?}")]
    TimedOut(Duration),
}

impl Engine {
    /// Starts an engine on `devices` beside this one, whose counts it continues, and waits until
    /// as many devices as are ready here have loaded, warmed up, and twice given the same finite
    /// answer to the canary (`options.canary.expected`, where it is known). Blocks.
    ///
    /// # Errors
    /// [`SwapError`]; what was started is stopped again, and this engine has noticed nothing.
    pub fn successor(
        &self,
        devices: Vec<DeviceFactory>,
        options: EngineOptions,
        patience: Duration,
    ) -> Result<(Engine, SwapReport), SwapError> {
        let began = Instant::now();
        same_contract(self.options(), &options)?;
        let wanted = self.shared.lock().ready().count().max(1);
        let new = Engine::start_with(devices, options, self.shared.stats.clone())?;
        let until = began + patience;
        let verified = new
            .wait_for_devices(wanted, until)
            .and_then(|()| new.prove(wanted, until))
            .map_err(|why| why.map_or(SwapError::TimedOut(patience), SwapError::Device));
        if let Err(error) = verified {
            // Closing a device may hang; that must not keep the answer.
            std::thread::spawn(move || drop(new));
            return Err(error);
        }
        // The lock is a guard: taken inside the report it would be held across `reference`.
        let devices = new.shared.lock().ready().count();
        let changed = new.reference() != self.reference();
        Ok((new, SwapReport { devices, took: began.elapsed(), changed }))
    }

    /// The canary's answer of the first ready device, or else of one that was ready once.
    fn reference(&self) -> Option<Vec<f32>> {
        let state = self.shared.lock();
        let known = |d: &DeviceState| d.reference.clone();
        state.ready().find_map(known).or_else(|| state.devices.iter().find_map(known))
    }

    /// An error without text: the time is over.
    fn wait_for_devices(&self, wanted: usize, until: Instant) -> Result<(), Option<String>> {
        let mut state = self.shared.lock();
        loop {
            // Also one that is being reopened by now: its first life is what counts.
            let failed = |d: &DeviceState| d.failure.clone();
            let reasons: Vec<String> = state.devices.iter().filter_map(failed).collect();
            if state.devices.len() - reasons.len() < wanted {
                return Err(Some(reasons.join("; ")));
            }
            if state.ready().count() >= wanted {
                return Ok(());
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(None);
            }
            state = self.shared.wait(state, left.min(LOOK));
        }
    }

    /// Runs the canary again on every ready device: its answer must be finite and the same.
    fn prove(&self, wanted: usize, until: Instant) -> Result<(), Option<String>> {
        let mut probes = Vec::new();
        {
            let mut state = self.shared.lock();
            for device in state.devices.iter_mut().filter(|d| d.phase == Phase::Ready) {
                let (sender, receiver) = oneshot::channel();
                device.canary_waiters.push(sender);
                probes.push(receiver);
            }
        }
        self.shared.wake.notify_all();
        let (mut good, mut reasons) = (0, Vec::new());
        for mut probe in probes {
            match self.outcome(&mut probe, until)? {
                Ok(()) => good += 1,
                Err(reason) => reasons.push(reason),
            }
        }
        if good >= wanted { Ok(()) } else { Err(Some(reasons.join("; "))) }
    }

    fn outcome(
        &self,
        probe: &mut oneshot::Receiver<Result<(), String>>,
        until: Instant,
    ) -> Result<Result<(), String>, Option<String>> {
        loop {
            match probe.try_recv() {
                Ok(result) => return Ok(result),
                Err(TryRecvError::Closed) => return Ok(Err("the device stopped".into())),
                Err(TryRecvError::Empty) if Instant::now() >= until => return Err(None),
                Err(TryRecvError::Empty) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }
}

/// Requests accepted by one engine must be right for the other.
fn same_contract(old: &EngineOptions, new: &EngineOptions) -> Result<(), SwapError> {
    let differ = |what: &str| Err(SwapError::Contract(what.into()));
    let config = |o: &EngineOptions| o.tables.first().map(|t| t.config);
    let steps = |o: &EngineOptions| o.tables.iter().map(|t| t.steps).collect::<Vec<_>>();
    if config(old) != config(new) {
        return differ("the model's sizes differ");
    }
    if steps(old) != steps(new) {
        return differ("the numbers of Euler steps differ");
    }
    if (old.horizon, old.max_prompt_tokens) != (new.horizon, new.max_prompt_tokens) {
        return differ("the horizon or the longest prompt differs");
    }
    Ok(())
}
