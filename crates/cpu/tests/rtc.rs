//! Programs with real-time chunking on openpi's tiny models against the plain f64 form, and against
//! themselves without a previous chunk.

use std::sync::Arc;

use pirouette_cpu::{CpuDevice, Isa, Options, Precision, load};
use pirouette_model::rtc::{Schedule, Settings};
use pirouette_model::{
    BackendError, Config, Device, Family, Inputs, Previous, PreviousChunk, Program, Rtc, Shape,
    record,
};
use pirouette_testing::golden::{Case, Packed, tiny_config, tiny_source};
use pirouette_testing::plain::{Observation, Plain};

const CASE: &str = "batch3_mixed";

/// The previous chunks of a batch, laid side by side.
struct Chunks([Vec<f32>; 3]);

impl Chunks {
    /// `None`: a sample without a previous chunk, whose values must not matter.
    fn new(shape: &Shape, dim: usize, samples: &[Option<PreviousChunk>]) -> Self {
        let absent = PreviousChunk {
            rtc: shape.rtc,
            chunk: vec![1e30; shape.horizon * dim],
            weights: vec![0.0; shape.horizon],
            limit: 10.0,
        };
        let mut all = Chunks::default();
        for p in samples.iter().map(|p| p.as_ref().unwrap_or(&absent)) {
            all.0[0].extend(&p.chunk);
            all.0[1].extend(&p.weights);
            all.0[2].push(p.limit);
        }
        all
    }

    fn default() -> Self {
        Chunks([vec![], vec![], vec![]])
    }

    fn borrow(&self) -> Previous<'_> {
        let [chunks, weights, limits] = &self.0;
        Previous { chunks, weights, limits }
    }
}

/// What is left of a chunk that nobody computed: rows that move through the actions' range.
fn left_over(sample: usize, rows: usize, cols: usize) -> Vec<f32> {
    (0..rows * cols).map(|i| ((i * 7 + sample * 3) % 13) as f32 / 6.0 - 1.0).collect()
}

/// Three samples: one with 6 actions left, one without a previous chunk, one with all of them.
fn samples(shape: &Shape, dim: usize) -> [Option<PreviousChunk>; 3] {
    let chunk = |sample, rows: usize, cols, settings: Settings| {
        let values = left_over(sample, rows, cols);
        let sizes = [shape.horizon, dim];
        Some(PreviousChunk::new(&values, [rows, cols], &settings, sizes).unwrap())
    };
    let exp = Settings { delay: 3, execution_horizon: 8, schedule: Schedule::Exp, limit: 4.0 };
    let linear = Settings { delay: 2, ..Settings::default() };
    [chunk(0, 6, dim - 2, linear), None, chunk(2, shape.horizon, dim, exp)]
}

fn device(family: Family, steps: usize, precision: Precision, isa: Isa) -> CpuDevice {
    let (config, source) = (tiny_config(family).unwrap(), tiny_source(family).unwrap());
    let options = Options { precision, threads: Some(2), isa: Some(isa) };
    load(config, steps, &source, options, &mut |_, _| {}).unwrap()
}

fn run(device: &mut CpuDevice, program: Program, inputs: &Inputs<'_>) -> Vec<f32> {
    let mut actions = vec![f32::NAN; inputs.noise.len()];
    device.compile(Arc::new(program)).unwrap().run(inputs, &mut actions).unwrap();
    actions
}

#[test]
fn guided_actions_are_the_plain_forms() {
    for family in [Family::Pi0, Family::Pi05] {
        let (config, source) = (tiny_config(family).unwrap(), tiny_source(family).unwrap());
        let case = Case::tiny(family, CASE).unwrap();
        let packed =
            Packed::new(&config, &case.observations.iter().collect::<Vec<_>>(), case.steps);
        let shape = Shape { rtc: Rtc::Guided, ..packed.shape };
        let samples = samples(&shape, config.action_dim);
        let chunks = Chunks::new(&shape, config.action_dim, &samples);
        let plain = Plain::new(config, &source);
        let row = shape.horizon * config.action_dim;
        let want: Vec<f64> = case
            .observations
            .iter()
            .zip(&samples)
            .flat_map(|(o, p)| plain.sample_after(o, case.steps, p.as_ref()))
            .collect();
        let free = plain.sample(&case.observations[0], case.steps);
        let moved = far(&want[..row], &free);
        assert!(moved > 0.1, "{family:?}: the guidance moves the actions by {moved} only");

        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            for (precision, tolerance) in [(Precision::F32, 4e-5), (Precision::Bf16, 5e-2)] {
                let mut device = device(family, case.steps, precision, isa);
                let inputs = Inputs { previous: Some(chunks.borrow()), ..packed.inputs() };
                let got = run(&mut device, record(&config, shape).unwrap(), &inputs);
                let got: Vec<f64> = got.into_iter().map(f64::from).collect();
                let off = far(&got, &want);
                assert!(off <= tolerance, "{family:?} {isa:?} {precision:?}: off by {off}");
            }
        }
    }
}

fn far(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |m, d| if d > m { d } else { m + 0.0 * d })
}

/// Given actions: the plain form puts them back before each call of the network and after each
/// step, and gives them time 0; the program never moves them.
#[test]
fn given_actions_are_the_plain_forms() {
    let (family, trained) = (Family::Pi05, 5);
    let source = tiny_source(family).unwrap();
    let config = Config { rtc_max_delay: trained, ..tiny_config(family).unwrap() };
    let case = Case::tiny(family, CASE).unwrap();
    let mut packed =
        Packed::new(&config, &case.observations.iter().collect::<Vec<_>>(), case.steps);
    let shape = Shape { rtc: Rtc::Trained, ..packed.shape };
    let (dim, row) = (config.action_dim, shape.horizon * config.action_dim);
    let given = |sample, rows, cols, delay| {
        let (values, sizes) = (left_over(sample, rows, cols), [shape.horizon, dim]);
        Some(PreviousChunk::given(&values, [rows, cols], delay, trained, sizes).unwrap())
    };
    let samples = [given(0, 6, dim - 2, 3), None, given(2, shape.horizon, dim, 5)];
    let plain = Plain::new(config, &source);
    let of = |(o, p): (&Observation, &Option<PreviousChunk>)| {
        plain.sample_after(o, case.steps, p.as_ref())
    };
    let want: Vec<f64> = case.observations.iter().zip(&samples).flat_map(of).collect();
    let free = plain.sample(&case.observations[0], case.steps);
    let moved = far(&want[3 * dim..row], &free[3 * dim..]);
    assert!(moved > 1e-3, "given actions move the others by {moved} only");
    for (noise, p) in packed.noise.chunks_mut(row).zip(&samples) {
        p.iter().for_each(|p| p.give(noise));
    }
    let chunks = Chunks::new(&shape, dim, &samples);
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        for (precision, tolerance) in [(Precision::F32, 2e-5), (Precision::Bf16, 5e-2)] {
            let options = Options { precision, threads: Some(2), isa: Some(isa) };
            let mut device = load(config, case.steps, &source, options, &mut |_, _| {}).unwrap();
            let inputs = Inputs { previous: Some(chunks.borrow()), ..packed.inputs() };
            let got = run(&mut device, record(&config, shape).unwrap(), &inputs);
            assert_eq!(got[..3 * dim], packed.noise[..3 * dim], "given actions stay as they are");
            let wide: Vec<f64> = got.iter().map(|v| *v as f64).collect();
            let off = far(&wide, &want);
            assert!(off <= tolerance, "{isa:?} {precision:?}: off by {off}");
            // Beside them, a sample without given actions has the plain program's bits.
            let plain = run(&mut device, record(&config, packed.shape).unwrap(), &packed.inputs());
            assert_eq!(bits(&got[row..2 * row]), bits(&plain[row..2 * row]), "{isa:?}");
        }
    }
    let untrained = tiny_config(family).unwrap();
    assert!(record(&untrained, shape).unwrap_err().to_string().contains("not trained"));
}

/// A sample without a previous chunk gets the bits of the program without real-time chunking,
/// beside samples that have one; and a sample with one gets the same bits alone.
#[test]
fn free_samples_get_the_plain_bits() {
    for family in [Family::Pi0, Family::Pi05] {
        let config = tiny_config(family).unwrap();
        let case = Case::tiny(family, CASE).unwrap();
        let packed =
            Packed::new(&config, &case.observations.iter().collect::<Vec<_>>(), case.steps);
        let guided = Shape { rtc: Rtc::Guided, ..packed.shape };
        let row = guided.horizon * config.action_dim;
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            for precision in [Precision::F32, Precision::Bf16] {
                let mut device = device(family, case.steps, precision, isa);
                let plain =
                    run(&mut device, record(&config, packed.shape).unwrap(), &packed.inputs());
                let with = |device: &mut CpuDevice, samples: &[Option<PreviousChunk>]| {
                    let chunks = Chunks::new(&guided, config.action_dim, samples);
                    let inputs = Inputs { previous: Some(chunks.borrow()), ..packed.inputs() };
                    run(device, record(&config, guided).unwrap(), &inputs)
                };
                let none = with(&mut device, &[None, None, None]);
                assert_eq!(bits(&none), bits(&plain), "{family:?} {isa:?} {precision:?}");
                let mixed = with(&mut device, &samples(&guided, config.action_dim));
                assert_eq!(bits(&mixed[row..2 * row]), bits(&plain[row..2 * row]));
                assert_ne!(bits(&mixed[..row]), bits(&plain[..row]));
            }
        }
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn previous_chunks_are_checked() {
    let family = Family::Pi05;
    let config = tiny_config(family).unwrap();
    let case = Case::tiny(family, CASE).unwrap();
    let packed = Packed::new(&config, &case.observations.iter().collect::<Vec<_>>(), case.steps);
    let shape = Shape { rtc: Rtc::Guided, ..packed.shape };
    let good = Chunks::new(&shape, config.action_dim, &samples(&shape, config.action_dim));
    let mut device = device(family, case.steps, Precision::F32, Isa::best());
    let program = Arc::new(record(&config, shape).unwrap());
    let mut executable = device.compile(program).unwrap();
    let mut actions = vec![0.0; packed.noise.len()];
    let mut refused = |previous: Option<Previous<'_>>| -> BackendError {
        let inputs = Inputs { previous, ..packed.inputs() };
        executable.run(&inputs, &mut actions).map(|_| ()).unwrap_err()
    };
    assert!(matches!(refused(None), BackendError::InputValue { name: "previous", .. }));
    let p = good.borrow();
    for (bad, name) in [
        (Previous { chunks: &p.chunks[1..], ..p }, "previous.chunks"),
        (Previous { weights: &p.weights[1..], ..p }, "previous.weights"),
        (Previous { limits: &p.limits[1..], ..p }, "previous.limits"),
    ] {
        let error = refused(Some(bad));
        assert!(matches!(error, BackendError::InputSize { name: n, .. } if n == name), "{error}");
    }
    let mut over = p.weights.to_vec();
    over[4] = 1.5;
    let error = refused(Some(Previous { weights: &over, ..p })).to_string();
    assert!(error.contains("weight 4 of the previous chunk is 1.5"), "{error}");
}
