//! The first Euler step beside the prefill against the same steps one after the other.

use std::sync::Arc;

use pirouette_checkpoint::Synthetic;
use pirouette_cuda::{CudaDevice, CudaExecutable};
use pirouette_model::config::Vision;
use pirouette_model::{Config, Executable, Inputs, Previous, Rtc, Shape, WeightTable, record_with};

use crate::fixture::OwnedInputs;
use crate::{Random, has_gpu, is_measured_gpu, models, quick, relative_error};

/// Relative: both round to bf16 in the same places, but add in another order.
const TOLERANCE: f64 = 2e-2;

#[test]
fn the_first_step_beside_the_prefill_is_the_first_step() {
    if !has_gpu() {
        return;
    }
    // (cameras, real ones, prompt slots, real tokens, horizon)
    let shapes = [
        ([3, 3, 20, 20, 10], Rtc::Off),
        ([3, 2, 48, 5, 15], Rtc::Off),
        ([2, 2, 20, 1, 1], Rtc::Off),
        ([1, 1, 16, 13, 8], Rtc::Off),
        ([3, 3, 200, 187, 14], Rtc::Off),
        ([3, 2, 20, 20, 10], Rtc::Guided),
    ];
    // At fp8 the prefill has time for one of two layers.
    let (depth, replays) = if quick() { (3, 2) } else { (5, 200) };
    for (full, precision) in models() {
        let vision = Vision { depth: 1, ..full.vision };
        let config = Config { vision, depth, vocab: 1000, ..full };
        // One step, so that nothing comes after what is compared; and the loop as it is.
        for steps in [1, 2] {
            let table = Arc::new(WeightTable::new(config, steps));
            let source = Synthetic::new(&config, 11);
            let mut device = CudaDevice::open_with(0, table.clone(), precision, &source).unwrap();
            let measured = is_measured_gpu(&device);
            for ([cameras, real, prompt_tokens, prompt_len, horizon], rtc) in shapes {
                let shape = Shape { batch: 1, cameras, prompt_tokens, horizon, steps, rtc };
                let program = Arc::new(record_with(table.clone(), shape).unwrap());
                let mut executable = device.compile_cuda(program).unwrap();
                // A short prefill has time for a part of the layers only, of two for none.
                let beside = executable.kernels_beside();
                assert!(beside > 0 || cameras < 3 || !measured, "{shape:?}");
                let mut random = Random(horizon as u64 * 7 + steps as u64);
                let inputs = OwnedInputs {
                    images: (0..cameras * 224 * 224 * 3).map(|_| random.below(256) as u8).collect(),
                    cameras: vec![real as u32],
                    tokens: (0..prompt_tokens).map(|_| random.below(1000) as u32).collect(),
                    prompt_len: vec![prompt_len as u32],
                    state: (0..config.action_dim).map(|_| random.value()).collect(),
                    noise: (0..horizon * config.action_dim).map(|_| random.value()).collect(),
                };
                compare(&mut executable, &inputs, replays);
            }
        }
    }
}

fn compare(executable: &mut CudaExecutable, inputs: &OwnedInputs, replays: usize) {
    let program = executable.program().clone();
    let chunks: Vec<f32> = inputs.noise.iter().map(|v| v * 0.5).collect();
    let weights: Vec<f32> = (0..program.shape.horizon).map(|i| (i % 4) as f32 / 3.0).collect();
    let previous = Previous { chunks: &chunks, weights: &weights, limits: &[5.0] };
    let previous = (program.shape.rtc == Rtc::Guided).then_some(previous);
    let run = |executable: &mut CudaExecutable| {
        let mut actions = vec![f32::NAN; inputs.noise.len()];
        executable.run(&Inputs { previous, ..inputs.borrow() }, &mut actions).unwrap();
        actions
    };
    let beside = run(executable);
    let mut caches = Vec::new();
    for name in suffix_caches(executable) {
        caches.push((executable.read_buffer(&name).unwrap().unwrap(), name));
    }
    for replay in 0..replays {
        let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert!(bits(&run(executable)) == bits(&beside), "replay {replay} has other bits");
    }
    // The chain, on the same inputs.
    executable.write_buffer("actions", &inputs.noise).unwrap();
    executable.run_steps(0..program.steps.len()).unwrap();
    let chain = executable.read_buffer("actions").unwrap().unwrap();
    let moved = relative_error(&chain, &inputs.noise);
    let error = relative_error(&beside, &chain);
    let what = format!("{} {:?}", program.config.family.name(), program.shape);
    println!("{what}: {error:.2e}, the step itself {moved:.2e}");
    assert!(error < TOLERANCE * moved.min(1.0), "{what}: actions off by {error:.2e}");
    let prefix = program.shape.prefix_rows(&program.config);
    for (got, name) in caches {
        let want = executable.read_buffer(&name).unwrap().unwrap();
        let from = prefix * program.config.head_dim;
        let error = relative_error(&got[from..], &want[from..]);
        assert!(error < TOLERANCE, "{what}: {name} off by {error:.2e}");
    }
}

/// Keys and values of all layers.
fn suffix_caches(executable: &CudaExecutable) -> Vec<String> {
    let program = executable.program();
    let names = program.buffers.iter().map(|buffer| buffer.name.clone());
    let caches: Vec<String> = names.filter(|name| name.starts_with("cache.")).collect();
    assert_eq!(caches.len(), 2 * program.config.depth, "{caches:?}");
    caches
}
