//! A program compiled for a GPU → its times.

use pirouette_cuda::{CudaExecutable, ReplayTrace};
use pirouette_model::{BackendError, Executable, Inputs, StageTimes};

use super::meter::{Meter, StepTimes};
use crate::args::TracingArgs;
use crate::log;

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
        tracing: Option<&TracingArgs>,
    ) -> Result<StepTimes, BackendError> {
        self.0.run(inputs, actions)?;
        if let Some(tracing) = tracing {
            let mut log = |line: String| {
                if tracing.verbose {
                    log::note(format_args!("cupti: {line}"));
                }
            };
            match self.0.trace_replays(tracing.cupti.as_deref(), n, &mut log) {
                Ok(replay) => return Ok(inside(self.0.program().steps.len(), replay)),
                Err(BackendError::Unavailable(why)) => {
                    log::note(format_args!("no times from inside the graph: {why}"));
                }
                Err(other) => return Err(other),
            }
        }
        Ok(StepTimes { ms: self.0.step_ms(n)?, clock: OUTSIDE.into(), replay: None })
    }

    fn device_only(&mut self, n: usize) -> Result<Option<Vec<f64>>, BackendError> {
        self.0.replay_ms(n).map(Some)
    }

    fn kernels(&self) -> Option<usize> {
        Some(self.0.kernel_count())
    }
}

const OUTSIDE: &str = "taken one by one outside the graph, with the launch and without overlap; \
    they say where time goes, and their sum is above the graph's own time";

/// A step's time is the critical path's share of its kernels.
fn inside(steps: usize, replay: ReplayTrace) -> StepTimes {
    let mut ms = vec![0.0; steps];
    for node in &replay.nodes {
        if let Some(step) = node.step {
            ms[step] += node.share_ms;
        }
    }
    let clock = format!(
        "taken inside the replayed graph by CUPTI {}, medians of {} replays, kernels matched {}; a \
         kernel counts from the end of all before it to its own, so overlap is counted once; a \
         traced replay with its copies takes {:.2} ms, and in {:.2} of them nothing runs",
        replay.version, replay.replays, replay.matched_by, replay.replay_ms, replay.idle_ms
    );
    StepTimes { ms, clock, replay: Some(replay) }
}

#[cfg(test)]
mod tests {
    use pirouette_cuda::TracedNode;

    use super::*;

    #[test]
    fn steps_get_the_shares_of_their_kernels() {
        let node = |step, share_ms| TracedNode {
            step,
            name: "k".into(),
            span_ms: (0.0, 1.0),
            busy_ms: 1.0,
            share_ms,
        };
        let nodes =
            vec![node(None, 9.0), node(Some(0), 1.0), node(Some(2), 2.0), node(Some(2), 4.0)];
        let replay = ReplayTrace {
            nodes,
            replay_ms: 16.0,
            replays: 20,
            matched_by: "by node",
            version: "13.0".into(),
            ..ReplayTrace::default()
        };
        let times = inside(3, replay);
        assert_eq!(times.ms, [1.0, 0.0, 6.0]);
        assert!(times.clock.contains("CUPTI 13.0") && times.clock.contains("by node"));
    }
}
