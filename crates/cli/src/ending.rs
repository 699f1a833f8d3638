//! The end of `serve`: at once before it listens; after its connections what was recorded is
//! written, and devices stop. Each has a limit, so that all of it fits a grace of 30 s; what has
//! not come back by then (a long run, a model that loads or warms, a swap) ends with the process.

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use pirouette_server::{Recorder, Termination};
use tokio::runtime::Runtime;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::timeout;

use crate::log;
use crate::service::PolicyService;

/// For the recorder, whose queue may hold 256 MiB.
const WRITING: Duration = Duration::from_secs(8);

/// For the batches that run: whoever waited for one has had the time of the drain.
const RUNNING: Duration = Duration::from_secs(3);

/// For tasks and threads of the runtime.
const TASKS: Duration = Duration::from_secs(1);

/// For devices to give their memory back.
const DEVICES: Duration = Duration::from_secs(3);

/// Ends the process at SIGTERM or Ctrl-C while there is nothing to drain: until it is aborted.
///
/// # Panics
/// Outside a Tokio runtime.
pub fn at_once() -> JoinHandle<()> {
    let mut termination = Termination::new();
    tokio::spawn(async move {
        termination.told().await;
        log::note("pirouette: ended before anything was served");
        log::flush();
        std::process::exit(0);
    })
}

/// Writes what was recorded, and lets running batches end.
pub async fn settle(service: &Arc<PolicyService>, recorder: Option<Arc<Recorder>>) {
    let service = Arc::clone(service);
    let idle = spawn_blocking(move || service.model().engine.drain(RUNNING));
    let written = spawn_blocking(move || recorder.inspect(|recorder| recorder.finish()));
    if timeout(WRITING, written).await.is_err() {
        tracing::error!("the disk is too slow: the last recorded requests are lost");
    }
    // Whether it is idle by now shows when it is dropped.
    let _ = idle.await;
}

/// Ends the runtime and the devices, or leaves them to the end of the process.
pub fn leave(runtime: Runtime, service: Arc<PolicyService>) {
    runtime.shutdown_timeout(TASKS);
    let (ended, wait) = channel::<()>();
    let thread = std::thread::Builder::new().name("ending".into());
    let dropping = thread.spawn(move || {
        drop(service);
        drop(ended);
    });
    if dropping.is_ok() && wait.recv_timeout(DEVICES) == Err(RecvTimeoutError::Timeout) {
        tracing::warn!("a device that runs, loads or warms up ends with the process");
    }
}
