//! A kernel that writes to address 0 must surface as an error, and the device must stay dead.

use std::sync::Arc;

use pirouette_checkpoint::Synthetic;
use pirouette_cuda::CudaDevice;
use pirouette_model::config::Vision;
use pirouette_model::{
    BackendError, Config, Executable, Images, Inputs, Rtc, Shape, WeightTable, record_with,
};

use crate::has_gpu;

#[test]
fn an_illegal_address_kills_the_device_and_nothing_else() {
    if !has_gpu() {
        return;
    }
    let full = Config::pi0();
    let vision = Vision { depth: 1, ..full.vision };
    let config = Config { vision, depth: 1, vocab: 100, ..full };
    let table = Arc::new(WeightTable::new(config, 1));
    let shape =
        Shape { batch: 1, cameras: 1, prompt_tokens: 4, horizon: 2, steps: 1, rtc: Rtc::Off };
    let source = Synthetic::new(&config, 1);
    let mut device = CudaDevice::open(0, table.clone(), &source).unwrap();
    let program = Arc::new(record_with(table.clone(), shape).unwrap());
    let mut executable = device.compile_cuda(program.clone()).unwrap();
    let inputs = Inputs {
        images: Images::Packed(&vec![7; 224 * 224 * 3]),
        cameras: &[1],
        tokens: &[1, 2, 3, 4],
        prompt_len: &[4],
        state: &[0.1; 32],
        noise: &[0.2; 64],
        previous: None,
    };
    let mut actions = vec![0.0; 64];
    executable.run(&inputs, &mut actions).unwrap();
    let healthy = actions.clone();
    device.inject_fault().unwrap();
    for _ in 0..3 {
        let error = executable.run(&inputs, &mut actions).unwrap_err();
        assert!(matches!(error, BackendError::Device(_)), "{error}");
        assert!(error.to_string().contains("ILLEGAL_ADDRESS"), "{error}");
        println!("{error}");
    }
    assert_eq!(actions, healthy, "a failed run must not touch the answer");
    assert!(matches!(device.compile_cuda(program), Err(BackendError::Device(_))));
    assert!(device.failure().is_some());
}
