//! A program's actions with choices left out that the ladder switches on (the third: `beside`).

use std::sync::Arc;

use pirouette_checkpoint::Synthetic;
use pirouette_cuda::{Choices, CudaDevice};
use pirouette_model::{Config, Executable, Rtc, Shape, WeightTable, record_with};

use crate::company::{CAMERAS, PROMPT_TOKENS, batch, samples};
use crate::limits::shallow;
use crate::{has_gpu, quick, relative_error};

/// Relative: attention's portable kernels add in another order and round in other places.
const TOLERANCE: f64 = 2e-2;

#[test]
fn what_is_left_out_changes_the_time_alone() {
    if !has_gpu() {
        return;
    }
    let all = Choices::default();
    for full in [Config::pi0(), Config::pi05()] {
        let config = shallow(full);
        let table = Arc::new(WeightTable::new(config, 2));
        let mut device = CudaDevice::open(0, table.clone(), &Synthetic::new(&config, 5)).unwrap();
        for batch_size in if quick() { vec![2] } else { vec![1, 2, 12] } {
            let order: Vec<usize> = (0..batch_size).map(|slot| slot % 3).collect();
            let inputs = batch(&samples(&config, 10), &order);
            let mut run = |choices| {
                let shape = Shape {
                    batch: batch_size,
                    cameras: CAMERAS,
                    prompt_tokens: PROMPT_TOKENS,
                    horizon: 10,
                    steps: 2,
                    rtc: Rtc::Off,
                };
                let program = Arc::new(record_with(table.clone(), shape).unwrap());
                device.set_choices(choices);
                let mut executable = device.compile_cuda(program).unwrap();
                let mut actions = vec![f32::NAN; inputs.noise.len()];
                executable.run(&inputs.borrow(), &mut actions).unwrap();
                actions
            };
            let want = run(all);
            let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            let waiting = run(Choices { dependent: false, ..all });
            assert!(bits(&waiting) == bits(&want), "waiting for the kernel in front: other bits");
            let moved = relative_error(&want, &inputs.noise).min(1.0);
            let error = relative_error(&run(Choices { attention: false, ..all }), &want);
            let what = format!("{} × {batch_size}, portable attention", config.family.name());
            println!("{what}: {error:.2e}, the loop itself {moved:.2e}");
            assert!(error > 0.0 && error < TOLERANCE * moved, "{what}: off by {error:.2e}");
        }
    }
}
