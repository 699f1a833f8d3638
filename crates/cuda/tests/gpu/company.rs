//! What `serve --deterministic` rests on: in one program, a sample's actions have the same bits
//! in every slot and beside every other sample, on the portable kernels and on Hopper's.

use std::sync::Arc;

use pirouette_checkpoint::Synthetic;
use pirouette_cuda::{CudaDevice, Tier};
use pirouette_model::{Config, Executable, Rtc, Shape, WeightTable, record_with};

use crate::fixture::OwnedInputs;
use crate::limits::shallow;
use crate::{Random, has_gpu, models, quick};

pub const CAMERAS: usize = 2;
pub const PROMPT_TOKENS: usize = 12;
/// (real cameras, real prompt tokens) of each sample.
const LENGTHS: [(u32, u32); 3] = [(2, 12), (1, 5), (2, 1)];

/// Three requests that differ in everything.
pub fn samples(config: &Config, horizon: usize) -> Vec<OwnedInputs> {
    let mut random = Random(17);
    let sample = |(cameras, prompt_len): (u32, u32)| OwnedInputs {
        images: (0..CAMERAS * 224 * 224 * 3).map(|_| random.below(256) as u8).collect(),
        cameras: vec![cameras],
        tokens: (0..PROMPT_TOKENS).map(|_| random.below(config.vocab) as u32).collect(),
        prompt_len: vec![prompt_len],
        state: (0..config.action_dim).map(|_| random.value()).collect(),
        noise: (0..horizon * config.action_dim).map(|_| random.value()).collect(),
    };
    LENGTHS.into_iter().map(sample).collect()
}

pub fn batch(samples: &[OwnedInputs], order: &[usize]) -> OwnedInputs {
    let mut all = OwnedInputs::default();
    for sample in order.iter().map(|&at| &samples[at]) {
        all.images.extend(&sample.images);
        all.cameras.extend(&sample.cameras);
        all.tokens.extend(&sample.tokens);
        all.prompt_len.extend(&sample.prompt_len);
        all.state.extend(&sample.state);
        all.noise.extend(&sample.noise);
    }
    all
}

/// Every sample in every slot, a third of the slots taken by each, in three arrangements.
fn orders(slots: usize) -> Vec<Vec<usize>> {
    let turned = |by: usize| (0..slots).map(|slot| (slot * slot / 2 + slot + by) % 3).collect();
    (0..3).map(turned).collect()
}

#[test]
fn a_sample_has_the_same_bits_in_every_slot_and_company() {
    if !has_gpu() {
        return;
    }
    // The loop of few rows and the one of many run on different kernels.
    let arrangements: &[(usize, usize)] =
        if quick() { &[(4, 10)] } else { &[(2, 10), (4, 10), (8, 10), (16, 10), (4, 50)] };
    for (full, precision) in models() {
        let config = shallow(full);
        let table = Arc::new(WeightTable::new(config, 2));
        let source = Synthetic::new(&config, 5);
        let mut device = CudaDevice::open_with(0, table.clone(), precision, &source).unwrap();
        for tier in [Tier::Auto, Tier::Portable] {
            device.set_tier(tier);
            for &(slots, horizon) in arrangements {
                let shape = Shape {
                    batch: slots,
                    cameras: CAMERAS,
                    prompt_tokens: PROMPT_TOKENS,
                    horizon,
                    steps: 2,
                    rtc: Rtc::Off,
                };
                let program = Arc::new(record_with(table.clone(), shape).unwrap());
                let mut executable = device.compile_cuda(program).unwrap();
                let samples = samples(&config, horizon);
                let mut run = |order: &[usize]| -> Vec<Vec<u32>> {
                    let inputs = batch(&samples, order);
                    let mut actions = vec![f32::NAN; inputs.noise.len()];
                    executable.run(&inputs.borrow(), &mut actions).unwrap();
                    assert!(actions.iter().all(|v| v.is_finite()));
                    let rows = actions.chunks_exact(actions.len() / slots);
                    rows.map(|row| row.iter().map(|v| v.to_bits()).collect()).collect()
                };
                // Alone: the empty slots repeat the first one, as the engine fills them.
                let alone: Vec<_> = (0..3).map(|at| run(&vec![at; slots])[0].clone()).collect();
                assert_ne!(alone[0], alone[1]);
                for order in orders(slots) {
                    for (slot, got) in run(&order).into_iter().enumerate() {
                        let family = config.family.name();
                        let what = format!("{family} {precision:?} {tier:?} {shape:?} {order:?}");
                        assert!(got == alone[order[slot]], "{what}, slot {slot}: other bits");
                    }
                }
                let family = config.family.name();
                println!("{family} {precision:?} {tier:?}: {slots} slots, horizon {horizon}");
            }
        }
    }
}
