//! What happens at the edges: no memory, wrong inputs, thousands of replays.

use std::sync::Arc;

use pirouette_checkpoint::Synthetic;
use pirouette_cuda::driver::{DeviceMemory, Driver};
use pirouette_cuda::{CudaDevice, TimedRun};
use pirouette_model::config::Vision;
use pirouette_model::{
    BackendError, Config, Executable, Images, Inputs, Previous, Rtc, Shape, WeightTable, record,
    record_with,
};

use crate::{Random, has_gpu, models, quick};

/// Full widths, so that the Hopper kernels run, in few layers.
pub fn shallow(full: Config) -> Config {
    let vision = Vision { depth: 2, ..full.vision };
    Config { vision, depth: 2, vocab: 500, ..full }
}

#[test]
fn memory_that_is_not_there_is_an_answer() {
    if !has_gpu() {
        return;
    }
    let context = Driver::open().unwrap().context(0).unwrap();
    let needed = 1usize << 42;
    match DeviceMemory::new(&context, "a test block", needed).map(|_| ()) {
        Err(BackendError::OutOfMemory { what, needed_bytes, free_bytes, .. }) => {
            assert_eq!((what.as_str(), needed_bytes), ("a test block", needed as u64));
            assert!(free_bytes > 0 && free_bytes < needed_bytes);
        }
        other => panic!("{other:?}"),
    }
    assert!(context.failure().is_none(), "the device must stay usable");
    DeviceMemory::new(&context, "a small block", 1 << 20).unwrap();
}

#[test]
fn a_missing_device_is_named() {
    if !has_gpu() {
        return;
    }
    let error = Driver::open().unwrap().context(999).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("cuda:999"), "{error}");
}

#[test]
fn thousands_of_replays_give_the_same_bits() {
    if !has_gpu() {
        return;
    }
    for (full, precision) in models() {
        let config = shallow(full);
        let table = Arc::new(WeightTable::new(config, 3));
        let source = Synthetic::new(&config, 5);
        let mut device = CudaDevice::open_with(0, table.clone(), precision, &source).unwrap();
        let [one, nine] = if quick() { [5, 2] } else { [5000, 500] };
        let cases = [(1, one, Rtc::Off), (9, nine, Rtc::Off), (1, nine, Rtc::Guided)];
        for (batch, runs, rtc) in cases {
            let shape = Shape { batch, cameras: 2, prompt_tokens: 12, horizon: 10, steps: 3, rtc };
            let program = Arc::new(record_with(table.clone(), shape).unwrap());
            let mut executable = device.compile_cuda(program).unwrap();
            let mut random = Random(3);
            let images: Vec<u8> =
                (0..batch * 2 * 224 * 224 * 3).map(|_| random.below(256) as u8).collect();
            let tokens: Vec<u32> = (0..batch * 12).map(|_| random.below(500) as u32).collect();
            let state: Vec<f32> = (0..batch * 32).map(|_| random.value()).collect();
            let noise: Vec<f32> = (0..batch * 320).map(|_| random.value()).collect();
            let lengths: Vec<u32> = (0..batch as u32).map(|b| 12 - b % 4).collect();
            let chunks: Vec<f32> = noise.iter().map(|v| v * 0.5).collect();
            let weights: Vec<f32> = (0..batch * 10).map(|i| (i % 4) as f32 / 3.0).collect();
            let limits = vec![5.0; batch];
            let guided = Previous { chunks: &chunks, weights: &weights, limits: &limits };
            let inputs = Inputs {
                images: Images::Packed(&images),
                cameras: &vec![2; batch],
                tokens: &tokens,
                prompt_len: &lengths,
                state: &state,
                noise: &noise,
                previous: (rtc == Rtc::Guided).then_some(guided),
            };
            let mut first = vec![f32::NAN; noise.len()];
            executable.run(&inputs, &mut first).unwrap();
            assert!(first.iter().all(|v| v.is_finite()));
            let mut actions = first.clone();
            for run in 0..runs {
                executable.run(&inputs, &mut actions).unwrap();
                assert_eq!(actions, first, "run {run} of batch {batch} differs");
            }
            let TimedRun { times, queued_ms, device_ms } =
                executable.run_timed(&inputs, &mut actions).unwrap();
            assert_eq!(actions, first, "a timed run of batch {batch} differs");
            let total_ms = times.total_ms;
            assert!(0.0 < device_ms && device_ms < total_ms, "{device_ms} of {total_ms} ms");
            assert!(0.0 < queued_ms && queued_ms < total_ms, "{queued_ms} of {total_ms} ms");
        }
    }
}

#[test]
fn wrong_inputs_and_programs_are_refused_and_nothing_breaks() {
    if !has_gpu() {
        return;
    }
    let config = shallow(Config::pi0());
    let table = Arc::new(WeightTable::new(config, 1));
    let mut device = CudaDevice::open(0, table.clone(), &Synthetic::new(&config, 1)).unwrap();
    let shape =
        Shape { batch: 1, cameras: 1, prompt_tokens: 4, horizon: 2, steps: 1, rtc: Rtc::Off };
    let mut executable = device.compile_cuda(Arc::new(record_with(table, shape).unwrap())).unwrap();
    let images = vec![9; 224 * 224 * 3];
    let good = Inputs {
        images: Images::Packed(&images),
        cameras: &[1],
        tokens: &[1, 2, 3, 4],
        prompt_len: &[4],
        state: &[0.5; 32],
        noise: &[0.5; 64],
        previous: None,
    };
    let mut actions = vec![0.0; 64];
    executable.run(&good, &mut actions).unwrap();
    let first = actions.clone();
    let apart = Inputs { images: Images::Each(&[&images]), ..good };
    executable.run(&apart, &mut actions).unwrap();
    assert_eq!(actions, first, "images that lie apart");
    for bad in [
        Inputs { images: Images::Packed(&images[1..]), ..good },
        Inputs { images: Images::Each(&[&images, &images]), ..good },
        Inputs { images: Images::Each(&[&images[1..]]), ..good },
        Inputs { cameras: &[2], ..good },
        Inputs { tokens: &[1, 2, 3, 500], ..good },
        Inputs { prompt_len: &[0], ..good },
        Inputs { noise: &[f32::NAN; 64], ..good },
    ] {
        assert!(executable.run(&bad, &mut actions).is_err());
    }
    assert!(executable.run(&good, &mut [0.0; 63]).is_err());
    executable.run(&good, &mut actions).unwrap();
    assert_eq!(actions, first);

    let steps = Shape { steps: 2, ..shape };
    let other = Arc::new(record(&config, steps).unwrap());
    let error = device.compile_cuda(other).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("other weights"), "{error}");
}
