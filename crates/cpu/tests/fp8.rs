//! Products of E4M3 operands against their definition: every operand rounded by itself, sums in
//! f64.

mod fixture;

use std::sync::Arc;

use fixture::{Case, FileSource, OwnedInputs};
use pirouette_checkpoint::Synthetic;
use pirouette_cpu::{Arena, Isa, Options, Precision, load};
use pirouette_model::config::Gemma;
use pirouette_model::fp8::{Mlp, MlpScales, decode, encode};
use pirouette_model::program::WeightId;
use pirouette_model::{Config, Program, TensorSource, WeightTable, record};

/// What one MLP of a run read and wrote: rows of real tokens.
#[derive(Clone, Default)]
struct Seen {
    input: Vec<f32>,
    hidden: Vec<f32>,
    output: Vec<f32>,
}

/// Runs step by step; returns what each MLP of the prefix tower saw.
fn observe(
    source: &dyn TensorSource,
    program: &Arc<Program>,
    inputs: &OwnedInputs,
    precision: Precision,
    isa: Isa,
) -> Vec<Seen> {
    let config = program.config;
    let options = Options { precision, threads: Some(2), isa: Some(isa) };
    let mut device = load(config, program.shape.steps, source, options, &mut |_, _| {}).unwrap();
    let mut executable = device.compile_cpu(program.clone()).unwrap();
    let real = inputs.cameras[0] as usize * config.vision.tokens() + inputs.prompt_len[0] as usize;
    let rows = |arena: &Arena<'_>, name: &str, width: usize| {
        arena.floats(program.buffer(name).unwrap())[..real * width].to_vec()
    };
    let mut seen = vec![Seen::default(); config.depth - 1];
    let mut actions = vec![0.0; inputs.noise.len()];
    executable
        .run_observed(&inputs.borrow(), &mut actions, &mut |step, arena| {
            let parts: Vec<&str> = step.name.split('.').collect();
            let ["prefill", layer, of] = parts[..] else { return };
            let stream = || rows(arena, "prefix.stream", config.prefix.width);
            let Ok(layer) = layer.parse::<usize>() else { return };
            match of {
                "out" => seen[layer].input = stream(),
                "up" => seen[layer].hidden = rows(arena, "prefix.hidden", config.prefix.mlp),
                "down" => seen[layer].output = stream(),
                _ => {}
            }
        })
        .unwrap();
    seen
}

fn weight(table: &WeightTable, id: WeightId, source: &dyn TensorSource) -> Vec<f32> {
    let mut values = vec![0.0; table.spec(id).len()];
    table.open(id, source).unwrap().fill(0, &mut values).unwrap();
    values
}

/// The nearest E4M3 number times 2^−`exponent`.
fn nearest(v: f64, exponent: i32) -> f64 {
    let scaled = v * 2f64.powi(exponent);
    assert!(scaled.abs() <= 448.0, "{v} is out of range");
    decode(encode(scaled as f32)) as f64 * 2f64.powi(-exponent)
}

/// `[rows, K] · [N, K]ᵀ`
fn product(a: &[f64], b: &[f64], k: usize) -> Vec<f64> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum();
    a.chunks_exact(k).flat_map(|a| b.chunks_exact(k).map(move |b| dot(a, b))).collect()
}

fn gelu(y: f64) -> f64 {
    let inner = (2.0 / std::f64::consts::PI).sqrt() * (y + 0.044715 * y * y * y);
    y / (1.0 + (-2.0 * inner).exp())
}

/// Hidden values and what is added to the stream, both from what the device itself had before.
fn reference(
    table: &WeightTable,
    mlp: &Mlp,
    source: &dyn TensorSource,
    seen: &Seen,
) -> [Vec<f64>; 2] {
    let (width, units) = (table.spec(mlp.up).cols, table.spec(mlp.down).cols);
    let scales = MlpScales::measure(table, mlp, source).unwrap();
    let norm = weight(table, mlp.norm, source);
    let mut powers = Vec::new();
    let mut rows = Vec::new();
    for row in seen.input.chunks_exact(width) {
        let squares: f64 = row.iter().map(|x| (*x as f64).powi(2)).sum();
        let factor = 1.0 / (squares / width as f64 + 1e-6).sqrt();
        let values: Vec<f64> =
            row.iter().zip(&norm).map(|(x, s)| *x as f64 * factor * *s as f64).collect();
        let of = scales.row_powers(&values.iter().map(|v| *v as f32).collect::<Vec<_>>());
        let exponent = of.row.log2() as i32;
        rows.extend(values.into_iter().map(|v| nearest(v, exponent)));
        powers.push(of.hidden.log2() as i32);
    }
    let exponents = |row: usize| match row.checked_sub(units) {
        None => scales.gate,
        Some(unit) => scales.up + scales.hidden[unit],
    };
    let up = weight(table, mlp.up, source);
    let up: Vec<f64> =
        up.iter().enumerate().map(|(i, w)| nearest(*w as f64, exponents(i / width))).collect();
    let both = product(&rows, &up, width);
    let hidden = both.chunks_exact(2 * units).flat_map(|row| {
        let (gate, up) = row.split_at(units);
        gate.iter().zip(up).map(|(gate, up)| gelu(*gate) * up)
    });

    let of_column = |i: usize| scales.hidden[i % units];
    let down = weight(table, mlp.down, source);
    let down = down.iter().enumerate();
    let down: Vec<f64> =
        down.map(|(i, w)| nearest(*w as f64, scales.down - of_column(i))).collect();
    let met = seen.hidden.iter().enumerate();
    let met: Vec<f64> =
        met.map(|(i, h)| nearest(*h as f64, of_column(i) + powers[i / units])).collect();
    [hidden.collect(), product(&met, &down, units)]
}

fn relative(got: impl Iterator<Item = f64>, want: &[f64]) -> f64 {
    let (mut off, mut all) = (0.0, 0.0);
    for (got, want) in got.zip(want) {
        off += (got - want).powi(2);
        all += want.powi(2);
    }
    (off / all).sqrt()
}

/// Widths of the stream and of the hidden layer: whole panels, panels that the next product is not
/// fed with, and neither.
const SIZES: [[usize; 2]; 3] = [[64, 128], [96, 112], [70, 40]];

#[test]
fn both_operands_are_rounded_and_nothing_else() {
    for family in ["pi0", "pi05"] {
        let file = FileSource::open(&format!("{family}/model.safetensors"));
        let tiny = Config::infer(&file, None).unwrap();
        let case = Case::open(family, "padded_prompt");
        for [width, mlp_width] in SIZES {
            let config = Config { prefix: Gemma { width, mlp: mlp_width }, ..tiny };
            let source = Synthetic::unrounded(&config, 3);
            let program = Arc::new(record(&config, case.program_shape(1, 3)).unwrap());
            let inputs = case.inputs(&[0], 3);
            let mlps = program.weights.prefix_mlps();
            assert_eq!(mlps.len(), config.depth - 1);
            for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
                let what = format!("{family} {width}×{mlp_width} {isa:?}");
                let all = observe(&source, &program, &inputs, Precision::Fp8, isa);
                for (mlp, seen) in mlps.iter().zip(&all) {
                    let [hidden, added] = reference(&program.weights, mlp, &source, seen);
                    let rows = seen.hidden.chunks(mlp_width).zip(hidden.chunks(mlp_width));
                    let off = rows.map(|(got, want)| relative(got.iter().map(|h| *h as f64), want));
                    let mut off: Vec<f64> = off.collect();
                    off.sort_unstable_by(f64::total_cmp);
                    // A normalised value beside the middle of two numbers may go the other way: a
                    // row here and there.
                    let (most, all) = (off[off.len() * 9 / 10], off[off.len() - 1]);
                    assert!(most < 1e-6 && all < 0.02, "{what}: hidden values off by {off:?}");
                    let streams = seen.output.iter().zip(&seen.input);
                    let got = streams.map(|(after, before)| *after as f64 - *before as f64);
                    let off = relative(got, &added);
                    assert!(off < 1e-5, "{what}: output off by {off}");
                }
                let bf16 = observe(&source, &program, &inputs, Precision::Bf16, isa);
                let plain: Vec<f64> = bf16[0].hidden.iter().map(|h| *h as f64).collect();
                let off = relative(all[0].hidden.iter().map(|h| *h as f64), &plain);
                assert_eq!(all[0].input, bf16[0].input, "{what}: all before is bf16");
                assert!((0.01..0.1).contains(&off), "{what}: {off} from bf16");
            }
        }
    }
}
