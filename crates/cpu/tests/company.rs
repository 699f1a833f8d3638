//! What `serve --deterministic` rests on: in one program, a sample's actions have the same bits
//! in every slot and beside every other sample, in every precision, on every instruction set.

mod fixture;

use std::sync::Arc;

use fixture::{Case, FileSource};
use pirouette_cpu::{Isa, Options, Precision, load};
use pirouette_model::{Config, Executable, record};

#[test]
fn a_sample_has_the_same_bits_in_every_slot_and_company() {
    for family in ["pi0", "pi05"] {
        let source = FileSource::open(&format!("{family}/model.safetensors"));
        let config = Config::infer(&source, None).unwrap();
        // Samples with different numbers of cameras and prompt tokens.
        let case = Case::open(family, "batch3_mixed");
        let slots = 4;
        let program = Arc::new(record(&config, case.program_shape(slots, 3)).unwrap());
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            for precision in [Precision::F32, Precision::Bf16, Precision::Fp8] {
                let options = Options { precision, threads: Some(2), isa: Some(isa) };
                let mut device =
                    load(config, case.steps, &source, options, &mut |_, _| {}).unwrap();
                let mut executable = device.compile_cpu(program.clone()).unwrap();
                let mut run = |samples: &[usize]| -> Vec<Vec<u32>> {
                    let inputs = case.inputs(samples, 3);
                    let mut actions = vec![0.0; inputs.noise.len()];
                    executable.run(&inputs.borrow(), &mut actions).unwrap();
                    let rows = actions.chunks_exact(actions.len() / slots);
                    rows.map(|row| row.iter().map(|v| v.to_bits()).collect()).collect()
                };
                // Alone: the empty slots repeat the first one, as the engine fills them.
                let alone: Vec<_> = (0..3).map(|b| run(&[b; 4])[0].clone()).collect();
                assert_ne!(alone[0], alone[1]);
                for order in [[0, 1, 2, 0], [2, 0, 1, 1], [1, 2, 0, 2], [0, 0, 0, 1], [2, 2, 1, 0]]
                {
                    for (slot, got) in run(&order).into_iter().enumerate() {
                        let what = format!("{family} {isa:?} {precision:?} {order:?} slot {slot}");
                        assert!(got == alone[order[slot]], "{what}: other bits than alone");
                    }
                }
            }
        }
    }
}
