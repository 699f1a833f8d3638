//! openpi's outputs and intermediates on tiny models against the program.

mod fixture;
mod reference;

use fixture::{CASES, Case, FileSource, Intermediates};
use std::sync::Arc;

use pirouette_cpu::{CpuDevice, Isa, Options, Precision, load};
use pirouette_model::{Config, record};
use reference::Reference;

/// Of the largest value of a tensor.
const TOLERANCE: f32 = 2e-5;

/// (samples, camera slots) a case can be run as.
fn arrangements(case: &Case) -> Vec<(Vec<usize>, usize)> {
    let mut all: Vec<(Vec<usize>, usize)> =
        (0..case.batch).map(|b| (vec![b], case.cameras[b].len())).collect();
    if case.is_leading() {
        all.push(((0..case.batch).collect(), 3));
    }
    all
}

#[test]
fn the_program_is_openpis_network() {
    for family in ["pi0", "pi05"] {
        let source = FileSource::open(&format!("{family}/model.safetensors"));
        let config = Config::infer(&source, None).unwrap();
        for name in CASES {
            let case = Case::open(family, name);
            for (samples, slots) in arrangements(&case) {
                let program = record(&config, case.program_shape(samples.len(), slots)).unwrap();
                let reference = Reference::load(&program.weights, &source);
                let mut check = Intermediates::new(&case, &program, &samples, TOLERANCE);
                let inputs = case.inputs(&samples, slots);
                let actions = reference.run(&program, &inputs.borrow(), |step, buffers| {
                    let values = |name: &str| -> Vec<f32> {
                        let id = program.buffer(name).unwrap();
                        buffers[id.0].iter().map(|v| *v as f32).collect()
                    };
                    check.check(step, &values);
                });
                let off = case.actions_error(&samples, &actions);
                assert!(off <= 2e-5, "{family} {name} {samples:?}: actions off by {off}");
                assert!(check.seen.len() > 20, "{family} {name}: {}", check.seen.len());
                let worst = check.seen.iter().max_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
                println!("{family} {name} {samples:?}: {} compared, {worst:?}", check.seen.len());
            }
        }
    }
}

fn device(
    source: &FileSource,
    case: &Case,
    precision: Precision,
    threads: usize,
    isa: Isa,
) -> CpuDevice {
    let config = Config::infer(source, None).unwrap();
    let options = Options { precision, threads: Some(threads), isa: Some(isa) };
    load(config, case.steps, source, options, &mut |_, _| {}).unwrap()
}

fn available() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.is_available())
}

#[test]
fn f32_follows_openpi_through_every_layer() {
    for family in ["pi0", "pi05"] {
        let source = FileSource::open(&format!("{family}/model.safetensors"));
        let config = Config::infer(&source, None).unwrap();
        for (name, isa) in CASES.iter().flat_map(|c| available().map(move |isa| (c, isa))) {
            let case = Case::open(family, name);
            let mut device = device(&source, &case, Precision::F32, 1, isa);
            for (samples, slots) in arrangements(&case) {
                let program = record(&config, case.program_shape(samples.len(), slots)).unwrap();
                let program = Arc::new(program);
                let mut executable = device.compile_cpu(program.clone()).unwrap();
                let inputs = case.inputs(&samples, slots);
                let mut actions = vec![0.0; inputs.noise.len()];
                let mut check = Intermediates::new(&case, &program, &samples, TOLERANCE);
                executable
                    .run_observed(&inputs.borrow(), &mut actions, &mut |step, arena| {
                        let values =
                            |name: &str| arena.floats(program.buffer(name).unwrap()).to_vec();
                        check.check(step, &values);
                    })
                    .unwrap();
                assert!(check.seen.len() > 20, "{family} {name}: {}", check.seen.len());
                let off = case.actions_error(&samples, &actions);
                assert!(off <= 2e-5, "{family} {name} {isa:?} {samples:?}: off by {off}");
                // In one go: the same bits.
                let mut again = vec![0.0; actions.len()];
                let times = executable.run_into(&inputs, &mut again);
                assert_eq!(actions, again);
                assert!(times > 0.0);
            }
        }
    }
}

/// Runs and returns the milliseconds of the whole run.
trait RunInto {
    fn run_into(&mut self, inputs: &fixture::OwnedInputs, actions: &mut [f32]) -> f64;
}

impl<E: pirouette_model::Executable> RunInto for E {
    fn run_into(&mut self, inputs: &fixture::OwnedInputs, actions: &mut [f32]) -> f64 {
        self.run(&inputs.borrow(), actions).unwrap().total_ms
    }
}

#[test]
fn f32_bits_do_not_depend_on_batch_padding_or_threads() {
    for family in ["pi0", "pi05"] {
        let source = FileSource::open(&format!("{family}/model.safetensors"));
        let config = Config::infer(&source, None).unwrap();
        let case = Case::open(family, "batch3_mixed");
        for isa in available() {
            let mut alone = Vec::new();
            for (samples, slots, threads) in
                [(vec![0], 3, 1), (vec![1], 2, 2), (vec![2], 1, 1), (vec![0, 1, 2], 3, 3)]
            {
                let mut device = device(&source, &case, Precision::F32, threads, isa);
                let shape = case.program_shape(samples.len(), slots);
                let program = Arc::new(record(&config, shape).unwrap());
                let mut executable = device.compile_cpu(program).unwrap();
                let inputs = case.inputs(&samples, slots);
                let mut actions = vec![0.0; inputs.noise.len()];
                executable.run_into(&inputs, &mut actions);
                if samples.len() == 1 {
                    alone.extend(actions);
                } else {
                    assert_eq!(alone, actions, "{family} {isa:?}");
                }
            }
        }
    }
}

#[test]
fn bf16_is_as_close_as_openpis_bf16() {
    let rms = |a: &[f32], b: &[f32]| {
        let sum: f64 = a.iter().zip(b).map(|(a, b)| (*a as f64 - *b as f64).powi(2)).sum();
        (sum / a.len() as f64).sqrt()
    };
    for family in ["pi0", "pi05"] {
        let source = FileSource::open(&format!("{family}/model.safetensors"));
        let config = Config::infer(&source, None).unwrap();
        for (name, isa) in CASES.iter().flat_map(|c| available().map(move |isa| (c, isa))) {
            let case = Case::open(family, name);
            let mut device = device(&source, &case, Precision::Bf16, 1, isa);
            for b in 0..case.batch {
                let slots = case.cameras[b].len();
                let program = record(&config, case.program_shape(1, slots)).unwrap();
                let mut executable = device.compile_cpu(Arc::new(program)).unwrap();
                let inputs = case.inputs(&[b], slots);
                let mut actions = vec![0.0; inputs.noise.len()];
                executable.run_into(&inputs, &mut actions);
                let want = case.sample("out.actions", b);
                let theirs = rms(&case.sample("out_bf16.actions", b), &want);
                let ours = rms(&actions, &want);
                println!("{family} {name} {b} {isa:?}: {ours:.5}, openpi {theirs:.5}");
                assert!(ours <= 1.5 * theirs, "{family} {name} {b} {isa:?}: {ours} {theirs}");
                assert!(ours > 1e-5, "bf16 was asked for");
            }
        }
    }
}

#[test]
fn observed_runs_and_others_give_the_same_bits() {
    for family in ["pi0", "pi05"] {
        let source = FileSource::open(&format!("{family}/model.safetensors"));
        let config = Config::infer(&source, None).unwrap();
        let case = Case::open(family, CASES[0]);
        let precisions = [Precision::Bf16, Precision::Fp8];
        for (isa, precision) in available().flat_map(|isa| precisions.map(|p| (isa, p))) {
            let mut device = device(&source, &case, precision, 2, isa);
            let slots = case.cameras[0].len();
            let program = record(&config, case.program_shape(1, slots)).unwrap();
            let mut executable = device.compile_cpu(Arc::new(program)).unwrap();
            let inputs = case.inputs(&[0], slots);
            let mut actions = vec![0.0; inputs.noise.len()];
            executable.run_into(&inputs, &mut actions);
            let mut observed = vec![0.0; inputs.noise.len()];
            executable.run_observed(&inputs.borrow(), &mut observed, &mut |_, _| {}).unwrap();
            assert_eq!(actions, observed, "{family} {isa:?} {precision:?}");
        }
    }
}
