//! What goes wrong is said, with the name of the thing.

mod fixture;

use std::sync::Arc;

use fixture::{Case, FileSource};
use pirouette_cpu::{Isa, Options, load};
use pirouette_model::{BackendError, Config, Device, MemorySource, Shape, SourceError, record};

fn tiny() -> (FileSource, Config, Case) {
    let source = FileSource::open("pi0/model.safetensors");
    let config = Config::infer(&source, None).unwrap();
    (source, config, Case::open("pi0", "all_cameras"))
}

#[test]
fn a_missing_tensor_is_named() {
    let (_, config, _) = tiny();
    let error = load(config, 10, &MemorySource::default(), Options::default(), &mut |_, _| {});
    let Err(BackendError::Source(SourceError::Missing { name, .. })) = error else {
        panic!("loaded from nothing");
    };
    assert!(!name.is_empty());
}

#[test]
fn other_weights_than_the_programs_are_refused() {
    let (source, config, case) = tiny();
    let mut device = load(config, 10, &source, Options::default(), &mut |_, _| {}).unwrap();
    let shape = Shape { steps: 7, ..case.program_shape(1, 3) };
    let error = device.compile(Arc::new(record(&config, shape).unwrap())).err().unwrap();
    assert!(error.to_string().contains("7 steps"), "{error}");
}

#[test]
fn absent_instruction_sets_and_absurd_thread_counts_are_refused() {
    let (source, config, _) = tiny();
    for isa in Isa::ALL.into_iter().filter(|isa| !isa.is_available()) {
        let options = Options { isa: Some(isa), ..Options::default() };
        let error = load(config, 10, &source, options, &mut |_, _| {}).err().unwrap();
        assert!(error.to_string().contains(isa.name()), "{error}");
    }
    for threads in [0, 100_000] {
        let options = Options { threads: Some(threads), ..Options::default() };
        let error = load(config, 10, &source, options, &mut |_, _| {}).err().unwrap();
        assert!(error.to_string().contains("threads"), "{error}");
    }
}

#[test]
fn wrong_inputs_are_named_and_the_next_run_is_right() {
    let (source, config, case) = tiny();
    let mut reports = Vec::new();
    let options = Options { threads: Some(2), ..Options::default() };
    let mut device =
        load(config, 10, &source, options, &mut |done, total| reports.push((done, total))).unwrap();
    assert!(reports.windows(2).all(|w| w[0].0 <= w[1].0), "progress goes back");
    assert_eq!(reports.last().map(|r| r.0), reports.last().map(|r| r.1));
    let program = Arc::new(record(&config, case.program_shape(1, 3)).unwrap());
    let mut executable = device.compile(program).unwrap();
    let inputs = case.inputs(&[0], 3);
    let mut actions = vec![0.0; inputs.noise.len()];

    let short = &mut actions[1..];
    let error = executable.run(&inputs.borrow(), short).unwrap_err();
    assert!(matches!(error, BackendError::InputSize { name: "actions", .. }), "{error}");
    let mut bad = case.inputs(&[0], 3);
    bad.tokens[0] = config.vocab as u32;
    let error = executable.run(&bad.borrow(), &mut actions).unwrap_err();
    assert!(matches!(error, BackendError::InputValue { name: "tokens", .. }), "{error}");

    let times = executable.run(&inputs.borrow(), &mut actions).unwrap();
    assert!(times.vision_ms > 0.0 && times.prefill_ms > 0.0 && times.denoise_ms > 0.0);
    assert!(times.total_ms >= times.vision_ms + times.prefill_ms + times.denoise_ms);
    assert!(case.actions_error(&[0], &actions) < 0.1);
}
