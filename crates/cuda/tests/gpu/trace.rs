//! Times inside the replayed graph: every kernel has its record, and the shares add up.

use std::sync::Arc;

use pirouette_checkpoint::Synthetic;
use pirouette_cuda::CudaDevice;
use pirouette_cuda::driver::cupti::Cupti;
use pirouette_model::{Config, Rtc, Shape, WeightTable, record_with};

use crate::has_gpu;
use crate::limits::shallow;

#[test]
fn every_kernel_of_a_replay_has_its_times() {
    if !has_gpu() {
        return;
    }
    if let Err(error) = Cupti::open(None) {
        println!("skipped: {error}");
        return;
    }
    let config = shallow(Config::pi0());
    let table = Arc::new(WeightTable::new(config, 2));
    let mut device = CudaDevice::open(0, table.clone(), &Synthetic::new(&config, 5)).unwrap();
    let shape =
        Shape { batch: 1, cameras: 2, prompt_tokens: 12, horizon: 10, steps: 2, rtc: Rtc::Off };
    let program = Arc::new(record_with(table, shape).unwrap());
    let mut executable = device.compile_cuda(program.clone()).unwrap();
    // Twice: what the first leaves behind must not spoil the second.
    for _ in 0..2 {
        let mut log = |line: String| println!("{line}");
        let trace = executable.trace_replays(None, 10, &mut log).unwrap();
        assert_eq!(trace.matched_by, "by node");
        let kernels = trace.nodes.iter().filter(|n| n.step.is_some()).count();
        assert_eq!(kernels, executable.kernel_count());
        let steps: Vec<usize> = trace.nodes.iter().filter_map(|n| n.step).collect();
        assert!(steps.is_sorted() && steps.iter().all(|&s| s < program.steps.len()));
        let shares: f64 = trace.nodes.iter().map(|n| n.share_ms).sum();
        let sum = shares + trace.idle_ms;
        println!("replay {:.4} ms, sum of medians {sum:.4} ms", trace.replay_ms);
        // Medians of parts do not add up to the median of the whole exactly.
        assert!((sum / trace.replay_ms - 1.0).abs() < 0.1, "{sum} of {}", trace.replay_ms);
        for node in &trace.nodes {
            assert!(node.busy_ms > 0.0 && node.span_ms.0 <= node.span_ms.1, "{node:?}");
        }
        let untraced = executable.replay_ms(10).unwrap();
        assert!(untraced.iter().all(|ms| *ms > 0.0));
    }
}
