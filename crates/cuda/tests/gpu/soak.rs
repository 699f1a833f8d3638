//! Shapes and lengths that nobody chose: the Hopper kernels against the portable ones, step by step
//! and whole runs, for as long as `PIROUETTE_SOAK_S` says (seconds; 20).

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pirouette_checkpoint::Synthetic;
use pirouette_cuda::{CudaDevice, Precision, Tier};
use pirouette_model::config::Vision;
use pirouette_model::{
    Config, Executable, Inputs, Previous, Program, Rtc, Shape, WeightTable, record_with,
};

use crate::fixture::OwnedInputs;
use crate::tiers::{Lengths, compare};
use crate::{Random, has_gpu, models, quick, relative_error};

/// Relative to how far the run moves the actions: rounding adds up over three layers and steps.
const TOLERANCE: f64 = 3e-2;
const FP8_TOLERANCE: f64 = 8e-2;
/// Shapes of one device, before the next model's turn.
const TURN: usize = 6;
/// Of a shape, so that its comparison takes about a second.
const MOST_ROWS: usize = 6_000;

#[test]
fn random_shapes_agree() {
    if !has_gpu() || quick() {
        return;
    }
    let number = |name| std::env::var(name).ok().map(|v| v.parse::<u64>().unwrap());
    let seconds = number("PIROUETTE_SOAK_S").unwrap_or(20);
    let first = number("PIROUETTE_SOAK_SEED").unwrap_or(1);
    let end = Instant::now() + Duration::from_secs(seconds);
    let (mut shapes, mut ran) = (0, BTreeSet::new());
    for seed in first.. {
        let (full, precision) = models()[seed as usize % 3];
        let vision = Vision { depth: 1, ..full.vision };
        let config = Config { vision, depth: 3, vocab: 1000, ..full };
        let mut random = Random(seed);
        let steps = 1 + random.below(3);
        let table = Arc::new(WeightTable::new(config, steps));
        let source = Synthetic::new(&config, seed);
        let mut device = CudaDevice::open_with(0, table.clone(), precision, &source).unwrap();
        for _ in 0..TURN {
            if Instant::now() > end {
                println!("{shapes} shapes, seeds {first} to {seed}");
                return;
            }
            let shape = any_shape(&mut random, &config, steps);
            let lengths: Vec<[usize; 2]> = (0..shape.batch)
                .map(|_| [shape.cameras, shape.prompt_tokens].map(|most| 1 + random.below(most)))
                .collect();
            println!("seed {seed}: {shape:?}, {lengths:?}");
            let program = Arc::new(record_with(table.clone(), shape).unwrap());
            compare(&mut device, program.clone(), &lengths, &mut ran);
            whole_run(&mut device, program, &lengths, &mut random, precision);
            shapes += 1;
        }
    }
}

/// Most like a robot's, some long, some with many samples.
fn any_shape(random: &mut Random, config: &Config, steps: usize) -> Shape {
    loop {
        let batch = if random.below(2) == 0 { 1 } else { 1 + random.below(24) };
        let longest = [16, 64, 320][random.below(3)];
        let most_tokens = [50, 260][random.below(2)];
        let horizon = 1 + random.below(longest);
        let shape = Shape {
            batch,
            cameras: 1 + random.below(3),
            prompt_tokens: 1 + random.below(most_tokens),
            horizon,
            steps,
            rtc: if random.below(4) == 0 { Rtc::Guided } else { Rtc::Off },
        };
        if batch * (shape.prefix_rows(config) + horizon) <= MOST_ROWS {
            return shape;
        }
    }
}

/// The captured graph of both tiers, and of Hopper's again bit for bit.
fn whole_run(
    device: &mut CudaDevice,
    program: Arc<Program>,
    lengths: &Lengths,
    random: &mut Random,
    precision: Precision,
) {
    let (shape, config) = (program.shape, program.config);
    let count = shape.batch * shape.horizon * config.action_dim;
    let inputs = OwnedInputs {
        images: (0..shape.batch * shape.cameras * 224 * 224 * 3)
            .map(|_| random.below(256) as u8)
            .collect(),
        cameras: lengths.iter().map(|[cameras, _]| *cameras as u32).collect(),
        tokens: (0..shape.batch * shape.prompt_tokens).map(|_| random.below(1000) as u32).collect(),
        prompt_len: lengths.iter().map(|[_, tokens]| *tokens as u32).collect(),
        state: (0..shape.batch * config.action_dim).map(|_| random.value()).collect(),
        noise: (0..count).map(|_| random.value()).collect(),
    };
    let chunks: Vec<f32> = (0..count).map(|_| random.value()).collect();
    let weights: Vec<f32> = (0..shape.batch * shape.horizon).map(|_| random.unit()).collect();
    let limits: Vec<f32> = (0..shape.batch).map(|_| 0.5 + 5.0 * random.unit()).collect();
    let previous = Previous { chunks: &chunks, weights: &weights, limits: &limits };
    let previous = (shape.rtc == Rtc::Guided).then_some(previous);
    let mut run = |tier, times| {
        device.set_tier(tier);
        let mut executable = device.compile_cuda(program.clone()).unwrap();
        let mut results: Vec<Vec<f32>> = Vec::new();
        for _ in 0..times {
            let mut actions = vec![f32::NAN; count];
            executable.run(&Inputs { previous, ..inputs.borrow() }, &mut actions).unwrap();
            results.push(actions);
        }
        let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert!(results.iter().all(|v| bits(v) == bits(&results[0])), "{shape:?}: other bits");
        results.swap_remove(0)
    };
    let (want, got) = (run(Tier::Portable, 1), run(Tier::Auto, 3));
    let (moved, error) = (relative_error(&want, &inputs.noise), relative_error(&got, &want));
    let tolerance = if precision == Precision::Fp8 { FP8_TOLERANCE } else { TOLERANCE };
    println!("  whole run: {error:.2e}, the run itself {moved:.2e}");
    assert!(error < tolerance * moved.min(1.0), "{shape:?}: actions off by {error:.2e}");
}
