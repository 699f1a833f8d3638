//! Hopper kernels against the portable ones, step by step, at full widths and small depth.

use std::collections::BTreeSet;
use std::sync::Arc;

use pirouette_checkpoint::Synthetic;
use pirouette_cuda::{CudaDevice, Precision, Tier};
use pirouette_model::config::{Family, Vision};
use pirouette_model::program::Stage;
use pirouette_model::{Config, Program, Rtc, Shape, WeightTable, record_with};

use crate::{Random, has_gpu, is_measured_gpu, quick, relative_error};

/// Relative. Every step starts from the portable tier's values, so errors do not add up.
const TOLERANCE: f64 = 1e-2;
/// Of what is rounded to E4M3: where two results are 2⁻⁹ apart, one in thirty becomes another
/// number, up to 2⁻³ away. This happens to the rows that gate and up read, and to what they leave.
const E4M3_TOLERANCE: f64 = 5e-2;

#[test]
fn tiers_agree_step_by_step() {
    if !has_gpu() {
        return;
    }
    let (mut ran, mut all) = (BTreeSet::new(), !quick());
    for full in [Config::pi0(), Config::pi05()] {
        let (vision_depth, depth) = if quick() { (1, 2) } else { (2, 3) };
        let vision = Vision { depth: vision_depth, ..full.vision };
        let config = Config { vision, depth, vocab: 1000, ..full };
        let table = Arc::new(WeightTable::new(config, 2));
        let mut device = CudaDevice::open(0, table.clone(), &Synthetic::new(&config, 3)).unwrap();
        // The first three already run every kind of Hopper kernel: those of the loop with few
        // rows, with some and with many, with and without guidance. The others run every width,
        // and what a prompt too long for the loop's attention falls back to.
        let shapes = [
            (1, 3, 20, 10, Rtc::Off),
            (12, 1, 7, 20, Rtc::Off),
            (2, 1, 7, 10, Rtc::Guided),
            (3, 2, 13, 10, Rtc::Off),
            (1, 1, 200, 50, Rtc::Off),
            (8, 1, 7, 10, Rtc::Off),
            (2, 2, 48, 50, Rtc::Off),
            (16, 1, 7, 10, Rtc::Off),
            (4, 3, 20, 10, Rtc::Off),
            (9, 1, 7, 20, Rtc::Guided),
            (1, 3, 300, 10, Rtc::Off),
            (1, 1, 7, 50, Rtc::Off),
            (1, 1, 64, 50, Rtc::Off),
            (1, 1, 100, 50, Rtc::Off),
            (1, 1, 160, 50, Rtc::Off),
            (2, 1, 20, 50, Rtc::Off),
            (2, 1, 16, 288, Rtc::Off), // the state token sees nothing of most of the keys
            (7, 1, 7, 50, Rtc::Off),
            (12, 1, 16, 50, Rtc::Off),
            (16, 1, 20, 50, Rtc::Off),
            (20, 1, 7, 50, Rtc::Off),
            (32, 1, 7, 20, Rtc::Off),
            (40, 1, 48, 50, Rtc::Off),
            (64, 3, 20, 10, Rtc::Off),
        ];
        all &= is_measured_gpu(&device);
        let shapes = if quick() { &shapes[..3] } else { &shapes[..] };
        for &(batch, cameras, prompt_tokens, horizon, rtc) in shapes {
            // Half a minute of comparing, for products that both families have.
            if batch == 64 && full.family == Family::Pi05 {
                continue;
            }
            let shape = Shape { batch, cameras, prompt_tokens, horizon, steps: 2, rtc };
            let program = Arc::new(record_with(table.clone(), shape).unwrap());
            compare(&mut device, program, &spread(shape), &mut ran);
        }
    }
    let never = never(&ran, |file| !is_e4m3(file));
    assert!(!all || never.is_empty(), "no shape of this test runs {never:?}");
}

/// The same of precision fp8: gate, up and down in every width.
#[test]
fn tiers_agree_at_fp8() {
    if !has_gpu() {
        return;
    }
    let mut ran = BTreeSet::new();
    let shapes = [
        (1, 3, 20),
        (1, 1, 20),
        (1, 1, 84),
        (1, 1, 200),
        (1, 2, 20),
        (1, 2, 200),
        (1, 3, 200),
        (2, 3, 20),
        (4, 3, 20),
        (8, 3, 20),
        (16, 3, 20),
    ];
    let config = Config {
        vision: Vision { depth: 1, ..Config::pi0().vision },
        depth: if quick() { 2 } else { 3 },
        vocab: 1000,
        ..Config::pi0()
    };
    let table = Arc::new(WeightTable::new(config, 1));
    let source = Synthetic::new(&config, 4);
    let mut device = CudaDevice::open_with(0, table.clone(), Precision::Fp8, &source).unwrap();
    let shapes = if quick() { &shapes[..2] } else { &shapes[..] };
    for &(batch, cameras, prompt_tokens) in shapes {
        let shape = Shape { batch, cameras, prompt_tokens, horizon: 10, steps: 1, rtc: Rtc::Off };
        let program = Arc::new(record_with(table.clone(), shape).unwrap());
        compare(&mut device, program, &spread(shape), &mut ran);
    }
    let all = !quick() && is_measured_gpu(&device);
    let never = never(&ran, is_e4m3);
    assert!(!all || never.is_empty(), "no shape of this test runs {never:?}");
}

fn is_e4m3(file: &str) -> bool {
    file.contains("e4m3")
}

/// Kernels of some files that no shape has launched. Packing at load and what `beside` covers are
/// not launched here.
fn never(ran: &BTreeSet<String>, of: impl Fn(&str) -> bool) -> Vec<String> {
    let elsewhere = ["denoise_load", "denoise_rim_load", "denoise_beside"];
    let lock: serde_json::Value =
        serde_json::from_str(include_str!("../../cubin/kernels.lock.json")).unwrap();
    let files = lock["kernels"].as_object().unwrap().iter();
    let files = files.filter(|(file, _)| {
        of(file) && !file.starts_with("portable_") && !elsewhere.contains(&file.as_str())
    });
    files
        .flat_map(|(_, kernels)| kernels["entries"].as_object().unwrap().keys().cloned())
        .filter(|name| !ran.contains(name))
        .collect()
}

/// Real cameras and real prompt tokens of every sample.
pub type Lengths = [[usize; 2]];

/// Samples with every number of cameras, and prompts of three lengths.
fn spread(shape: Shape) -> Vec<[usize; 2]> {
    (0..shape.batch).map(|b| [b % shape.cameras + 1, shape.prompt_tokens - b % 3]).collect()
}

/// Every step of the Hopper tier against the portable one's, from the same values.
pub fn compare(
    device: &mut CudaDevice,
    program: Arc<Program>,
    lengths: &Lengths,
    ran: &mut BTreeSet<String>,
) {
    let shape = program.shape;
    device.set_tier(Tier::Portable);
    let mut portable = device.compile_cuda(program.clone()).unwrap();
    device.set_tier(Tier::Auto);
    let mut auto = device.compile_cuda(program.clone()).unwrap();
    ran.extend(auto.kernel_names().map(String::from));
    let mut random = Random(shape.batch as u64 * 31 + shape.horizon as u64);
    for buffer in &program.buffers {
        let count = buffer.rows * buffer.cols;
        let values: Vec<f32> = match buffer.name.as_str() {
            "images" => (0..count).map(|_| random.below(256) as f32).collect(),
            "tokens" => (0..count).map(|_| random.below(1000) as f32).collect(),
            "lengths" => lengths.iter().flatten().map(|&n| n as f32).collect(),
            "state" | "actions" | "previous.chunk" => (0..count).map(|_| random.value()).collect(),
            "previous.weights" => (0..count).map(|i| (i % 4) as f32 / 3.0).collect(),
            "previous.limits" => vec![5.0; count],
            _ => continue,
        };
        portable.write_buffer(&buffer.name, &values).unwrap();
        auto.write_buffer(&buffer.name, &values).unwrap();
    }
    let mut worst = (0.0, String::new());
    for (at, step) in program.steps.iter().enumerate() {
        portable.run_steps(at..at + 1).unwrap();
        auto.run_steps(at..at + 1).unwrap();
        // The state token is written together with the first action rows, one step later.
        if step.name.ends_with(".state") {
            continue;
        }
        for written in step.op.writes() {
            let name = &program.buffers[written.0].name;
            let want = portable.read_buffer(name).unwrap().unwrap();
            let got = auto.read_buffer(name).unwrap().unwrap();
            auto.write_buffer(name, &want).unwrap();
            let (got, want) = real_rows(&program, step.stage(), name, lengths, got, want);
            let error = relative_error(&got, &want);
            let tolerance = if auto.is_e4m3(name) { E4M3_TOLERANCE } else { TOLERANCE };
            assert!(
                error < tolerance,
                "{} of {shape:?} leaves {name} off by {error:.2e}",
                step.name
            );
            if error > worst.0 {
                worst = (error, step.name.clone());
            }
        }
    }
    println!("{} {shape:?}: worst {:.2e} at {}", program.config.family.name(), worst.0, worst.1);
}

/// Prefix rows behind the prompt hold what nobody reads, those of the prompt are not written before
/// vision is done, and the loop's rows of the cache not before the loop: they are left out.
fn real_rows(
    program: &Program,
    stage: Stage,
    name: &str,
    lengths: &Lengths,
    got: Vec<f32>,
    want: Vec<f32>,
) -> (Vec<f32>, Vec<f32>) {
    let shape = program.shape;
    let tokens = program.config.vision.tokens();
    let id = program.buffer(name).unwrap();
    let buffer = &program.buffers[id.0];
    let (rows, cols) = (buffer.rows / shape.batch, buffer.cols);
    let prefix = shape.prefix_rows(&program.config);
    if !(name.starts_with("prefix.") || name.starts_with("cache.")) {
        return (got, want);
    }
    let keep = |at: usize| {
        let (sample, row) = (at / rows, at % rows);
        let [cameras, prompt] = lengths[sample];
        let real = cameras * tokens + if stage == Stage::Vision { 0 } else { prompt };
        row < real || (row >= prefix && stage == Stage::Denoise)
    };
    let pick = |values: Vec<f32>| {
        let mut kept = Vec::with_capacity(values.len());
        for (at, row) in values.chunks_exact(cols).enumerate() {
            if keep(at) {
                kept.extend_from_slice(row);
            }
        }
        kept
    };
    (pick(got), pick(want))
}
