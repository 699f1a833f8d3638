//! The powers of two of an MLP at `fp8`: what they promise, on inputs made to break it.

use pirouette_model::config::Gemma;
use pirouette_model::fp8::{MAX, Matrix, Mlp, MlpScales, round};
use pirouette_model::{Config, MemorySource, WeightTable};

const WIDTH: usize = 48;
const UNITS: usize = 24;
const LAYER: &str = "paligemma_with_expert.paligemma.model.language_model.layers.0.";

/// An MLP by its parts; the norm's learned scale is 1 + `norm`.
struct Weights {
    norm: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    down: Vec<f32>,
}

impl Weights {
    /// Between −`size` and `size`.
    fn random(seed: u64, size: f32) -> Self {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        let mut many = |n: usize, size: f32| (0..n).map(|_| next() * size).collect::<Vec<_>>();
        Weights {
            norm: many(WIDTH, 0.9),
            gate: many(UNITS * WIDTH, size),
            up: many(UNITS * WIDTH, size),
            down: many(WIDTH * UNITS, size),
        }
    }

    fn table(&self) -> (WeightTable, Mlp, MemorySource) {
        let prefix = Gemma { width: WIDTH, mlp: UNITS };
        let table = WeightTable::new(Config { prefix, depth: 2, ..Config::pi0() }, 1);
        let mut source = MemorySource::default();
        let mut insert = |name: &str, shape: &[usize], values: &[f32]| {
            source.insert(&format!("{LAYER}{name}.weight"), shape, values);
        };
        insert("post_attention_layernorm", &[WIDTH], &self.norm);
        insert("mlp.gate_proj", &[UNITS, WIDTH], &self.gate);
        insert("mlp.up_proj", &[UNITS, WIDTH], &self.up);
        insert("mlp.down_proj", &[WIDTH, UNITS], &self.down);
        let mlp = table.prefix_mlps()[0];
        (table, mlp, source)
    }

    fn scales(&self) -> MlpScales {
        let (table, mlp, source) = self.table();
        MlpScales::measure(&table, &mlp, &source).unwrap()
    }

    /// Rows of gate‖up, then of down, as they are and scaled.
    fn rows(&self) -> Vec<(Matrix, usize, Vec<f32>, Vec<f32>)> {
        let scales = self.scales();
        let up = self.gate.chunks(WIDTH).chain(self.up.chunks(WIDTH)).enumerate();
        let down = self.down.chunks(UNITS).enumerate();
        let all = up.map(|(i, row)| (Matrix::Up, i, row.to_vec()));
        let all = all.chain(down.map(|(i, row)| (Matrix::Down, i, row.to_vec())));
        all.map(|(matrix, i, row)| {
            let mut scaled = row.clone();
            scales.scale_row(matrix, i, &mut scaled);
            (matrix, i, row, scaled)
        })
        .collect()
    }

    /// Row `row` of gate‖up, rounded.
    fn rounded(&self, scales: &MlpScales, row: usize) -> Vec<f64> {
        let mut values = [&self.gate[..], &self.up[..]].concat()[row * WIDTH..][..WIDTH].to_vec();
        scales.scale_row(Matrix::Up, row, &mut values);
        values.iter_mut().for_each(|v| *v = round(*v));
        scales.unscale_row(Matrix::Up, row, &mut values);
        values.iter().map(|v| *v as f64).collect()
    }
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |m, v| m.max(v.abs()))
}

fn gelu(y: f64) -> f64 {
    let inner = (2.0 / std::f64::consts::PI).sqrt() * (y + 0.044715 * y * y * y);
    y / (1.0 + (-2.0 * inner).exp())
}

/// The largest scaled input and the largest scaled hidden value of a unit, over rows of some length
/// that lie along its gate, along its up, and between them, where |gate·y|·|up·y| is largest.
fn worst(weights: &Weights, scales: &MlpScales, unit: usize, size: f64) -> (f64, f64) {
    let unit_row = |row: &[f32]| {
        let length = row.iter().map(|v| (*v as f64).powi(2)).sum::<f64>().sqrt();
        row.iter().map(|v| *v as f64 / length.max(f64::MIN_POSITIVE)).collect::<Vec<_>>()
    };
    let [gate, up] = [&weights.gate, &weights.up].map(|m| unit_row(&m[unit * WIDTH..][..WIDTH]));
    let [gate_row, up_row] = [unit, UNITS + unit].map(|row| weights.rounded(scales, row));
    let mix = |a: f64, b: f64| gate.iter().zip(&up).map(|(g, u)| a * g + b * u).collect();
    let directions: [Vec<f64>; 6] =
        [mix(1., 0.), mix(0., 1.), mix(1., 1.), mix(1., -1.), mix(-1., 1.), mix(-1., -1.)];
    let (mut input, mut hidden) = (0.0f64, 0.0f64);
    for direction in directions {
        let length = direction.iter().map(|v| v * v).sum::<f64>().sqrt();
        if length == 0.0 {
            continue;
        }
        let row: Vec<f32> = direction.iter().map(|v| (v * size / length) as f32).collect();
        let powers = scales.row_powers(&row);
        input = input.max((largest(&row) * powers.row) as f64);
        let rounded: Vec<f64> =
            row.iter().map(|v| (round(v * powers.row) / powers.row) as f64).collect();
        let dot = |row: &[f64]| row.iter().zip(&rounded).map(|(w, x)| w * x).sum::<f64>();
        let h = gelu(dot(&gate_row)) * dot(&up_row);
        let scaled = h * 2f64.powi(scales.hidden[unit]) * powers.hidden as f64;
        hidden = hidden.max(scaled.abs());
    }
    (input, hidden)
}

#[test]
fn no_row_takes_a_product_out_of_range() {
    for (seed, size) in [(1, 0.05), (2, 1.0), (3, 1e-4), (4, 300.0)] {
        let mut weights = Weights::random(seed, size);
        // The same row twice is the worst there is.
        let first = weights.gate[..WIDTH].to_vec();
        weights.up[..WIDTH].copy_from_slice(&first);
        // Units far apart.
        for (unit, factor) in [(2, 30.0), (3, 1e-3), (4, 1e-6)] {
            weights.gate[unit * WIDTH..][..WIDTH].iter_mut().for_each(|w| *w *= factor);
        }
        let scales = weights.scales();
        for (unit, length) in (0..UNITS).flat_map(|u| [1e-3, 1.0, 45.0, 1e4].map(|l| (u, l))) {
            let (input, hidden) = worst(&weights, &scales, unit, length);
            let what = format!("size {size}, unit {unit}, length {length}: {input} {hidden}");
            assert!(input <= MAX as f64 && hidden <= MAX as f64, "{what}");
            // Nor is the range left unused: two powers of two, and what rounding might have added.
            // Small units are not raised, and where gelu is no identity it stays below its bound.
            assert!(input > MAX as f64 / 2.0, "{what}");
            let is_small = [3, 4].contains(&unit) || size as f64 * length < 40.0;
            assert!(is_small || hidden > 75.0, "{what}");
        }
    }
}

#[test]
fn scaling_is_exact_and_fills_the_range() {
    for (seed, size) in [(1, 0.05), (2, 1e-3), (3, 1e4), (4, 1.0)] {
        let weights = Weights::random(seed, size);
        let scales = weights.scales();
        let mut most = [0.0f32; 3];
        for (matrix, i, row, mut scaled) in weights.rows() {
            let at = match matrix {
                Matrix::Up => i / UNITS,
                Matrix::Down => 2,
            };
            most[at] = most[at].max(largest(&scaled));
            scales.unscale_row(matrix, i, &mut scaled);
            assert_eq!(scaled, row, "size {size}, {matrix:?} {i}");
        }
        let filled = most.map(|m| (MAX / 2.0..=MAX).contains(&m));
        assert_eq!(filled, [true; 3], "size {size}: {most:?}");
    }
}

/// Of all rows but those of `unit`, the most that rounding changes, as a share of the row.
fn error(weights: &Weights, unit: usize) -> f64 {
    let mut worst = 0.0f64;
    for (matrix, i, _, scaled) in weights.rows() {
        if matrix == Matrix::Up && i % UNITS == unit {
            continue;
        }
        let (mut off, mut all) = (0.0, 0.0);
        for (j, v) in scaled.iter().enumerate() {
            if matrix == Matrix::Down && j == unit {
                continue;
            }
            off += ((round(*v) - v) as f64).powi(2);
            all += (*v as f64).powi(2);
        }
        worst = worst.max((off / all).sqrt());
    }
    worst
}

/// What is 0 or next to it contributes nothing, and must not cost the others their bits.
#[test]
fn units_that_do_nothing_leave_the_others_alone() {
    let plain = error(&Weights::random(1, 0.05), 5);
    assert!((0.02..0.05).contains(&plain), "{plain}");
    for factor in [0.0, 1e-30, 1e-9, 1e-5, 1e-2] {
        for which in 0..3 {
            let mut weights = Weights::random(1, 0.05);
            let row = 5 * WIDTH..6 * WIDTH;
            if which != 1 {
                weights.gate[row.clone()].iter_mut().for_each(|w| *w *= factor);
            }
            if which != 0 {
                weights.up[row].iter_mut().for_each(|w| *w *= factor);
            }
            let scales = weights.scales();
            let (_, hidden) = worst(&weights, &scales, 5, 7.0);
            assert!(hidden <= MAX as f64, "{factor} {which}: {hidden}");
            let off = error(&weights, 5);
            assert!(off < 1.2 * plain, "{factor} {which}: {off}, else {plain}");
            assert!(weights.rows().iter().all(|(.., v)| largest(v) <= MAX), "{factor} {which}");
        }
    }
}

/// No model has such weights, but a scale must stay a number.
#[test]
fn absurd_weights_have_scales_all_the_same() {
    for size in [0.0, 1e-38, 1e30] {
        let mut weights = Weights::random(1, 0.05);
        weights.gate.fill(size);
        weights.down.fill(size);
        for which in [Matrix::Up, Matrix::Down] {
            let scales = weights.scales();
            for row in [0, WIDTH - 1] {
                let mut ones = vec![1.0; if which == Matrix::Up { WIDTH } else { UNITS }];
                scales.scale_row(which, row, &mut ones);
                assert!(ones.iter().all(|v| *v > 0.0 && v.is_finite()), "{size}: {ones:?}");
            }
        }
    }
}

/// E4M3 would make 448 or 480 of them, and nobody would notice.
#[test]
fn weights_that_are_not_finite_are_refused() {
    for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
        for (which, name) in [(0, "mlp.norm"), (1, "up"), (2, "up"), (3, "down")] {
            let mut weights = Weights::random(1, 0.05);
            let Weights { norm, gate, up, down } = &mut weights;
            [norm, gate, up, down][which][17] = bad;
            let (table, mlp, source) = weights.table();
            let error = MlpScales::measure(&table, &mlp, &source).unwrap_err().to_string();
            let named = error.contains(&format!("`prefill.0.{name}`"));
            assert!(named && error.contains("fp8"), "{error}");
        }
    }
}

/// The relative error of a row's hidden values by being rounded themselves.
fn hidden_error(weights: &Weights, row: &[f32]) -> f64 {
    let scales = weights.scales();
    let powers = scales.row_powers(row);
    let dot = |w: &[f32]| w.iter().zip(row).map(|(w, x)| (w * x) as f64).sum::<f64>();
    let (mut off, mut all) = (0.0, 0.0);
    for j in 0..UNITS {
        let [gate, up] = [&weights.gate, &weights.up].map(|m| dot(&m[j * WIDTH..][..WIDTH]));
        let h = gelu(gate) * up;
        let factor = 2f64.powi(scales.hidden[j]) * powers.hidden as f64;
        assert!((h * factor).abs() <= MAX as f64, "{h}");
        off += (round((h * factor) as f32) as f64 / factor - h).powi(2);
        all += h * h;
    }
    (off / all).sqrt()
}

/// A norm's scales that make up for channels that are always small leave rows as they are, and so
/// must what their largest value could be under other channels.
#[test]
fn norms_do_not_cost_hidden_values_their_bits() {
    let row: Vec<f32> = Weights::random(9, 1.0).gate[..WIDTH].to_vec();
    let error = |norm: f32| {
        let mut weights = Weights::random(1, 0.2);
        weights.norm.fill(norm - 1.0);
        hidden_error(&weights, &row)
    };
    assert!(error(1.0) < 0.04, "{}", error(1.0));
    assert_eq!(error(80.0), error(1.0), "rows that reach the MLP are the same");
}

/// A channel that is huge in some rows costs nothing where no unit reads it, nor where all do.
#[test]
fn huge_channels_do_not_cost_hidden_values_their_bits() {
    let mut row: Vec<f32> = Weights::random(9, 1.0).gate[..WIDTH].to_vec();
    row[7] = 1000.0;
    for factor in [0.0, 1e-3, 1.0, 30.0] {
        let mut weights = Weights::random(1, 0.2);
        for w in [&mut weights.gate, &mut weights.up] {
            w.iter_mut().skip(7).step_by(WIDTH).for_each(|w| *w *= factor);
        }
        let error = hidden_error(&weights, &row);
        assert!(error < 0.05, "{factor}: {error}");
    }
}
