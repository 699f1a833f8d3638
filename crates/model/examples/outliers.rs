//! What E4M3 operands cost one MLP whose weights or inputs have outliers: the table of
//! ARCHITECTURE.md, FP8. Relative error of its output against f32, median of the rows, in per cent.
//!
//!   cargo run --release -p pirouette-model --example outliers
//!
//! Three ways to round the same numbers: the scales of `fp8.rs`, a scale for each row of every
//! operand by its largest value, and bf16.

use pirouette_model::config::Gemma;
use pirouette_model::fp8::{MAX, Matrix, MlpScales, RowPowers, power, round};
use pirouette_model::{Config, MemorySource, SourceError, WeightTable};

const WIDTH: usize = 2048;
const UNITS: usize = 2048;
const ROWS: usize = 32;
const LAYER: &str = "paligemma_with_expert.paligemma.model.language_model.layers.0.";

/// The scale of the norm in front, gate, up and down, and rows of the stream.
struct Mlp {
    scale: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    down: Vec<f32>,
    stream: Vec<f32>,
}

/// A linear congruential generator, its upper bits mixed.
struct Random(u64);

impl Random {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let x = (self.0 ^ (self.0 >> 29)).wrapping_mul(0xbf58476d1ce4e5b9);
        ((x ^ (x >> 32)) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Box and Muller's.
    fn normal(&mut self) -> f32 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        (radius * (2.0 * std::f64::consts::PI * self.uniform()).cos()) as f32
    }

    fn normals(&mut self, n: usize, size: f32) -> Vec<f32> {
        (0..n).map(|_| self.normal() * size).collect()
    }
}

impl Mlp {
    fn random(random: &mut Random) -> Self {
        let size = 1.0 / (WIDTH as f32).sqrt();
        Mlp {
            scale: (0..WIDTH).map(|_| 1.0 + 0.1 * random.normal()).collect(),
            gate: random.normals(UNITS * WIDTH, size),
            up: random.normals(UNITS * WIDTH, size),
            down: random.normals(WIDTH * UNITS, size),
            stream: random.normals(ROWS * WIDTH, 1.0),
        }
    }

    /// Multiplies a column of gate and up.
    fn column(&mut self, channel: usize, factor: f32) {
        for matrix in [&mut self.gate, &mut self.up] {
            matrix.iter_mut().skip(channel).step_by(WIDTH).for_each(|w| *w *= factor);
        }
    }

    /// Multiplies four units' rows of gate and up.
    fn units(&mut self, factor: f32) {
        for matrix in [&mut self.gate, &mut self.up] {
            for unit in [7, 107, 207, 307] {
                matrix[unit * WIDTH..][..WIDTH].iter_mut().for_each(|w| *w *= factor);
            }
        }
    }

    /// Gives a channel of the stream one value in all rows; others are of size 1.
    fn set(&mut self, channel: usize, value: f32) {
        self.stream.iter_mut().skip(channel).step_by(WIDTH).for_each(|x| *x = value);
    }

    /// Large scales of the norm; `made_up`: for channels that are smaller by as much.
    fn scales(&mut self, scales: impl Iterator<Item = (usize, f32)>, made_up: bool) {
        for (channel, scale) in scales {
            self.scale[channel] = scale;
            let values = self.stream.iter_mut().skip(channel).step_by(WIDTH);
            values.filter(|_| made_up).for_each(|x| *x /= scale);
        }
    }

    fn measured(&self) -> Result<MlpScales, SourceError> {
        let prefix = Gemma { width: WIDTH, mlp: UNITS };
        let table = WeightTable::new(Config { prefix, depth: 2, ..Config::pi0() }, 1);
        let mut source = MemorySource::default();
        let norm: Vec<f32> = self.scale.iter().map(|s| s - 1.0).collect();
        for (name, shape, values) in [
            ("post_attention_layernorm", &[WIDTH][..], &norm),
            ("mlp.gate_proj", &[UNITS, WIDTH], &self.gate),
            ("mlp.up_proj", &[UNITS, WIDTH], &self.up),
            ("mlp.down_proj", &[WIDTH, UNITS], &self.down),
        ] {
            source.insert(&format!("{LAYER}{name}.weight"), shape, values);
        }
        MlpScales::measure(&table, &table.prefix_mlps()[0], &source)
    }

    fn normalised(&self) -> Vec<f32> {
        let rows = self.stream.chunks_exact(WIDTH).flat_map(|row| {
            let squares: f64 = row.iter().map(|v| (*v as f64).powi(2)).sum();
            let factor = 1.0 / (squares / WIDTH as f64 + 1e-6).sqrt();
            row.iter().zip(&self.scale).map(move |(x, s)| (*x as f64 * factor * *s as f64) as f32)
        });
        rows.collect()
    }
}

/// `[rows, k] · [n, k]ᵀ`
fn product(a: &[f32], b: &[f32], k: usize) -> Vec<f32> {
    let n = b.len() / k;
    let mut out = vec![0.0; a.len() / k * n];
    for (j, b) in b.chunks_exact(k).enumerate() {
        for (row, a) in a.chunks_exact(k).enumerate() {
            let mut sums = [0.0f32; 16];
            for (a, b) in a.chunks_exact(16).zip(b.chunks_exact(16)) {
                sums.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (a, b))| *sum += a * b);
            }
            out[row * n + j] = sums.iter().map(|v| *v as f64).sum::<f64>() as f32;
        }
    }
    out
}

fn gelu(y: f32) -> f32 {
    y / (1.0 + (-2.0 * 0.797_884_6 * (y + 0.044715 * y * y * y)).exp())
}

/// The MLP of these operands, `hidden` doing something to each row's hidden values.
fn output(
    [rows, gate, up, down]: [&[f32]; 4],
    mut hidden: impl FnMut(usize, &mut [f32]),
) -> Vec<f32> {
    let (gate, up) = (product(rows, gate, WIDTH), product(rows, up, WIDTH));
    let mut values: Vec<f32> = gate.iter().zip(&up).map(|(g, u)| gelu(*g) * u).collect();
    values.chunks_exact_mut(UNITS).enumerate().for_each(|(row, values)| hidden(row, values));
    product(&values, down, UNITS)
}

/// Rounded by scales that bring each row's largest value to the largest number.
fn by_largest(values: &[f32], k: usize) -> Vec<f32> {
    let rows = values.chunks_exact(k).flat_map(|row| {
        let factor = MAX / row.iter().fold(1e-30f32, |m, v| m.max(v.abs()));
        row.iter().map(move |v| round(v * factor) / factor)
    });
    rows.collect()
}

fn bf16(values: &[f32]) -> Vec<f32> {
    values.iter().map(|v| half::bf16::from_f32(*v).to_f32()).collect()
}

/// The median row's relative error, in per cent.
fn error(got: &[f32], want: &[f32]) -> f64 {
    let mut errors: Vec<f64> = got
        .chunks_exact(WIDTH)
        .zip(want.chunks_exact(WIDTH))
        .map(|(got, want)| {
            let off: f64 = got.iter().zip(want).map(|(g, w)| (*g as f64 - *w as f64).powi(2)).sum();
            (off / want.iter().map(|w| (*w as f64).powi(2)).sum::<f64>()).sqrt()
        })
        .collect();
    errors.sort_by(f64::total_cmp);
    100.0 * errors[ROWS / 2]
}

fn compare(what: &str, mlp: &Mlp) -> Result<(), SourceError> {
    let rows = mlp.normalised();
    let want = output([&rows, &mlp.gate, &mlp.up, &mlp.down], |_, _| {});

    let scales = mlp.measured()?;
    let powers: Vec<RowPowers> = rows.chunks_exact(WIDTH).map(|r| scales.row_powers(r)).collect();
    let weights = |matrix, first: usize, values: &[f32], k: usize| {
        let mut values = values.to_vec();
        for (row, values) in (first..).zip(values.chunks_exact_mut(k)) {
            scales.scale_row(matrix, row, values);
            values.iter_mut().for_each(|v| *v = round(*v));
            scales.unscale_row(matrix, row, values);
        }
        values
    };
    let gate = weights(Matrix::Up, 0, &mlp.gate, WIDTH);
    let up = weights(Matrix::Up, UNITS, &mlp.up, WIDTH);
    let down = weights(Matrix::Down, 0, &mlp.down, UNITS);
    let mut rounded = rows.clone();
    for (row, p) in rounded.chunks_exact_mut(WIDTH).zip(&powers) {
        row.iter_mut().for_each(|v| *v = round(*v * p.row) / p.row);
    }
    let ours = output([&rounded, &gate, &up, &down], |row, values| {
        for (v, e) in values.iter_mut().zip(&scales.hidden) {
            let factor = power(*e) * powers[row].hidden;
            assert!((*v * factor).abs() <= MAX, "{what}: {v} is out of range");
            *v = round(*v * factor) / factor;
        }
    });

    let [x, g, u] = [&rows, &mlp.gate, &mlp.up].map(|m| by_largest(m, WIDTH));
    let largest = output([&x, &g, &u, &by_largest(&mlp.down, UNITS)], |_, values| {
        values.copy_from_slice(&by_largest(values, UNITS));
    });
    let [x, g, u, d] = [&rows, &mlp.gate, &mlp.up, &mlp.down].map(|m| bf16(m));
    let halves = output([&x, &g, &u, &d], |_, values| values.copy_from_slice(&bf16(values)));
    let [ours, largest, halves] = [&ours, &largest, &halves].map(|got| error(got, &want));
    println!("| {what} | {ours:.1} | {largest:.1} | {halves:.1} |");
    Ok(())
}

fn main() -> Result<(), SourceError> {
    println!("| | fp8 | largest of the row | bf16 |\n|---|---|---|---|");
    let case = |what: &str, change: &dyn Fn(&mut Mlp, &mut Random)| {
        let mut random = Random(7);
        let mut mlp = Mlp::random(&mut random);
        change(&mut mlp, &mut random);
        compare(what, &mlp)
    };
    let some = |n: usize, random: &mut Random| {
        let each = (0..n).map(|i| (13 + i * 37, 20.0 + 60.0 * random.uniform() as f32));
        each.collect::<Vec<_>>().into_iter()
    };
    case("none", &|_, _| {})?;
    case("values of 20–50 σ", &|mlp, random| {
        for matrix in [&mut mlp.gate, &mut mlp.up, &mut mlp.down] {
            for w in matrix.iter_mut().filter(|_| random.uniform() < 2e-4).collect::<Vec<_>>() {
                *w = w.signum() * (20.0 + 30.0 * random.uniform() as f32) / (WIDTH as f32).sqrt();
            }
        }
    })?;
    case("four columns of gate and up × 30", &|mlp, _| {
        [3, 99, 700, 1500].into_iter().for_each(|channel| mlp.column(channel, 30.0));
    })?;
    case("four rows of down × 30", &|mlp, _| {
        for row in [3, 99, 700, 1500] {
            mlp.down[row * UNITS..][..UNITS].iter_mut().for_each(|w| *w *= 30.0);
        }
    })?;
    case("all rows with one channel of 1000", &|mlp, _| mlp.set(5, 1000.0))?;
    for value in [300.0, 1000.0, 10_000.0] {
        case(&format!("all rows with one of {value} that gate and up do not read"), &|mlp, _| {
            mlp.set(5, value);
            mlp.column(5, 0.0);
        })?;
    }
    case("all rows with one of 1000 that gate and up read × 30", &|mlp, _| {
        mlp.set(5, 1000.0);
        mlp.column(5, 30.0);
    })?;
    for factor in [10.0, 100.0] {
        case(&format!("four units × {factor} in gate and up"), &|mlp, _| mlp.units(factor))?;
    }
    case("8 of the norm's scales 20–80, the channels as large as others", &|mlp, random| {
        mlp.scales(some(8, random), false);
    })?;
    for n in [8, 40] {
        case(&format!("{n} such, the channels smaller by as much"), &|mlp, random| {
            mlp.scales(some(n, random), true);
        })?;
    }
    case(
        "all of its scales log-normal (σ = 1), all channels smaller by as much",
        &|mlp, random| {
            let all: Vec<_> = (0..WIDTH).map(|channel| (channel, random.normal().exp())).collect();
            mlp.scales(all.into_iter(), true);
        },
    )?;
    case("8 of its scales 20–80 and smaller channels, all others' 0.1", &|mlp, random| {
        mlp.scale.iter_mut().for_each(|s| *s *= 0.1);
        mlp.scales(some(8, random), true);
    })
}
