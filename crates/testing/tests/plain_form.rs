//! The plain form against openpi's recorded answers, and each exact simplification against the
//! plain form: what the recorded program leaves out or folds changes nothing beyond rounding.

use pirouette_model::config::names::{EXPERT, PREFIX, VISION};
use pirouette_model::{Family, TensorSource, WeightTable};
use pirouette_testing::golden::{Case, TINY_CASES, tiny_config, tiny_source};
use pirouette_testing::plain::Plain;

const FAMILIES: [Family; 2] = [Family::Pi0, Family::Pi05];

/// openpi computes in f32: the f64 form must land within its rounding.
#[test]
fn the_plain_form_is_openpis_function() {
    for family in FAMILIES {
        let (config, source) = (tiny_config(family).unwrap(), tiny_source(family).unwrap());
        let plain = Plain::new(config, &source);
        for name in TINY_CASES {
            let case = Case::tiny(family, name).unwrap();
            let want = case.fixture.f64("out.actions").unwrap();
            let each = want.len() / case.observations.len();
            for (b, o) in case.observations.iter().enumerate() {
                let got = plain.sample(o, case.steps);
                for (g, w) in got.iter().zip(&want[b * each..][..each]) {
                    assert!((g - w).abs() < 2e-5, "{family:?} {name} sample {b}: {g} {w}");
                }
            }
        }
    }
}

/// Simplification 6: masked cameras and padding may be dropped (the plain form gives the same
/// whatever they hold), and swapping real cameras may not.
#[test]
fn masked_content_does_not_matter_and_real_content_does() {
    for family in FAMILIES {
        let (config, source) = (tiny_config(family).unwrap(), tiny_source(family).unwrap());
        let plain = Plain::new(config, &source);
        let case = Case::tiny(family, "masked_first_padded_3steps").unwrap();
        let original = case.observations[0].clone();
        let want = plain.sample(&original, 1);
        let mut other = original.clone();
        other.images[0].iter_mut().for_each(|p| *p = 255 - *p);
        let padding = other.token_mask.iter().position(|m| !m).unwrap();
        other.tokens[padding] = 77;
        assert_eq!(plain.sample(&other, 1), want);
        let mut swapped = original.clone();
        swapped.images.swap(1, 2);
        let got = plain.sample(&swapped, 1);
        let far = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(far > 1e-3, "swapping two cameras changed the actions by {far} only");
    }
}

fn vector(source: &dyn TensorSource, name: &str) -> Vec<f32> {
    source.load(name).unwrap().to_f32()
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(x, y)| *x as f64 * *y as f64).sum()
}

fn matrix(table: &WeightTable, source: &dyn TensorSource, name: &str) -> Vec<Vec<f32>> {
    let rows = table.open(table.id(name), source).unwrap();
    (0..rows.rows)
        .map(|r| {
            let mut row = vec![0.0; rows.cols];
            rows.fill(r, &mut row).unwrap();
            row
        })
        .collect()
}

/// Simplification 5: 1/√head_dim in q's weight, LayerNorm's shift in the bias that follows, the
/// pixel offset in the patch bias. (Learned scales stay out of the weights: see `Norm`.)
#[test]
fn folded_constants_are_the_same_product() {
    for family in FAMILIES {
        let (config, source) = (tiny_config(family).unwrap(), tiny_source(family).unwrap());
        let table = WeightTable::new(config, 10);
        let row_of = |name: &str, r: usize| matrix(&table, &source, name).swap_remove(r);

        let w = vector(&source, &format!("{PREFIX}layers.1.self_attn.q_proj.weight"));
        let q = row_of("prefill.1.qkv", 3);
        let scale = (1.0 / (config.head_dim as f64).sqrt()) as f32;
        for (folded, plain) in q.iter().zip(&w[3 * q.len()..]) {
            assert_eq!(*folded, plain * scale);
        }
        assert_eq!(row_of("prefill.1.attention.norm", 0)[5], {
            1.0 + vector(&source, &format!("{PREFIX}layers.1.input_layernorm.weight"))[5]
        });

        let layer = format!("{VISION}encoder.layers.0.");
        let w = vector(&source, &format!("{layer}mlp.fc1.weight"));
        let b = vector(&source, &format!("{layer}mlp.fc1.bias"));
        let shift = vector(&source, &format!("{layer}layer_norm2.bias"));
        for (n, got) in row_of("vision.0.fc1.bias", 0).into_iter().enumerate() {
            let want = dot(&w[n * shift.len()..][..shift.len()], &shift) + b[n] as f64;
            assert!((got as f64 - want).abs() < 1e-6, "{n}: {got} {want}");
        }

        let kernel = vector(&source, &format!("{VISION}embeddings.patch_embedding.weight"));
        let b = vector(&source, &format!("{VISION}embeddings.patch_embedding.bias"));
        let bias = row_of("vision.patch.bias", 0);
        let folded = row_of("vision.patch", 7);
        let pixels: Vec<u8> = (0..folded.len()).map(|i| (i * 31 % 251) as u8).collect();
        // The plain kernel is [channel, row, column], the folded one (row, column, channel).
        let values = folded.len() / 3;
        let plain: f64 = (0..folded.len())
            .map(|i| {
                let (channel, at) = (i / values, i % values);
                let x = pixels[at * 3 + channel] as f64 / 127.5 - 1.0;
                kernel[7 * folded.len() + i] as f64 * x
            })
            .sum();
        let centred: Vec<f32> = pixels.iter().map(|&p| p as f32 - 128.0).collect();
        let got = dot(&folded, &centred) / 127.5 + bias[7] as f64;
        assert!((got - plain - b[7] as f64).abs() < 2e-6, "{got} {plain}");
    }
}

/// Simplification 3: two products and a concatenation of π0 are one product and a bias per step.
#[test]
fn the_composed_action_product_is_the_same() {
    let (config, source) = (tiny_config(Family::Pi0).unwrap(), tiny_source(Family::Pi0).unwrap());
    let table = WeightTable::new(config, 10);
    let (d, a) = (config.expert.width, config.action_dim);
    let composed = matrix(&table, &source, "action.in");
    let bias = matrix(&table, &source, "action.in.bias");
    let w_in = vector(&source, "action_in_proj.weight");
    let b_in = vector(&source, "action_in_proj.bias");
    let mlp = vector(&source, "action_time_mlp_in.weight");
    let b_mlp = vector(&source, "action_time_mlp_in.bias");
    let x: Vec<f32> = (0..a).map(|i| ((i * 29 % 23) as f32 - 11.0) / 7.0).collect();
    for (step, t) in pirouette_model::schedule::times(10).into_iter().enumerate() {
        let mode = pirouette_model::schedule::TimeEmbedding::F64;
        let embedding = pirouette_model::schedule::time_embedding(t, d, mode);
        let inner = w_in.chunks_exact(a).zip(&b_in).map(|(r, b)| (dot(r, &x) + *b as f64) as f32);
        let both: Vec<f32> = inner.chain(embedding).collect();
        for n in 0..d {
            let want = dot(&mlp[n * 2 * d..][..2 * d], &both) + b_mlp[n] as f64;
            let got = dot(&composed[n], &x) + bias[step][n] as f64;
            assert!((got - want).abs() < 2e-6, "step {step} row {n}: {got} {want}");
        }
    }
}

/// Simplification 2: the adaRMS modulations depend on the schedule alone.
#[test]
fn modulation_tables_are_the_dense_layers_output() {
    let (config, source) = (tiny_config(Family::Pi05).unwrap(), tiny_source(Family::Pi05).unwrap());
    let table = WeightTable::new(config, 10);
    let d = config.expert.width;
    let case = Case::tiny(Family::Pi05, "all_cameras").unwrap();
    let dense = format!("{EXPERT}layers.2.post_attention_layernorm.dense");
    let w = vector(&source, &format!("{dense}.weight"));
    let b = vector(&source, &format!("{dense}.bias"));
    let rows = matrix(&table, &source, "expert.2.mlp.modulation");
    for (step, row) in rows.iter().enumerate() {
        // openpi's own conditioning vector of that step.
        let condition = case.fixture.f32(&format!("out.step.{step}.adarms_cond")).unwrap();
        for n in 0..3 * d {
            let one = if n < d { 1.0 } else { 0.0 };
            let want = dot(&w[n * d..][..d], &condition) + b[n] as f64 + one;
            assert!((row[n] as f64 - want).abs() < 3e-6, "step {step} {n}: {} {want}", row[n]);
        }
    }
}

/// Simplifications 1 and 4 in the recording: the last prefill layer is K and V alone, π0's state
/// token is a row of the first step alone. (That they change nothing is the golden tests' matter:
/// the backends run this program against openpi's answers.)
#[test]
fn the_program_leaves_out_what_nobody_reads() {
    for family in FAMILIES {
        let config = tiny_config(family).unwrap();
        let shape = pirouette_model::Shape {
            batch: 1,
            cameras: 3,
            prompt_tokens: 16,
            horizon: 10,
            steps: 10,
            rtc: pirouette_model::Rtc::Off,
        };
        let program = pirouette_model::record(&config, shape).unwrap();
        let last: Vec<&str> = program
            .steps
            .iter()
            .filter(|s| s.name.starts_with("prefill.2."))
            .map(|s| s.name.as_str())
            .collect();
        assert_eq!(last, ["prefill.2.kv"]);
        let state = program.steps.iter().filter(|s| s.name.ends_with(".state")).count();
        assert_eq!(state, (family == Family::Pi0) as usize);
        let time_network = program.weights.specs.iter().any(|s| s.name.contains("time_mlp"));
        assert!(!time_network);
    }
}
