//! Normalisation, masks, relative actions, ALOHA's grippers.

use crate::fixture::{self, Tensors, assert_exact};
use pirouette_policy::NormStats;
use pirouette_policy::config::make_bool_mask;
use pirouette_policy::norm::{NormMode, Normalizer};
use pirouette_policy::robots::aloha::{gripper_from_angular, gripper_to_angular};

fn rows(flat: &[f64], width: usize, map: impl Fn(&[f64]) -> Vec<f64>) -> Vec<f64> {
    flat.chunks_exact(width).flat_map(map).collect()
}

fn narrow(row: &[f64]) -> Vec<f32> {
    row.iter().map(|&x| x as f32).collect()
}

#[test]
fn every_number_of_every_mode() {
    for dims in ["dims_14_14", "dims_32_32", "dims_8_7"] {
        let folder = format!("D_preprocess/normalise/{dims}");
        let stats = NormStats::from_file(&fixture::path(&format!("{folder}/norm_stats.json")));
        let stats = stats.unwrap();
        let t = Tensors::open(&format!("{folder}/cases.safetensors"));
        for feature in ["state", "actions"] {
            for name in ["mean", "std", "q01", "q99"] {
                let read = stats.get(feature).unwrap().get(name).unwrap();
                assert_exact(name, read, &t.numbers(&format!("stats.{feature}.{name}")));
            }
        }
        for (name, mode) in
            [("zscore", NormMode::OpenpiZScore), ("quantile", NormMode::OpenpiQuantile)]
        {
            let normalizer =
                |feature| Normalizer::new(mode, feature, stats.get(feature).unwrap()).unwrap();
            let (state, actions) = (normalizer("state"), normalizer("actions"));
            let width = actions.covered().unwrap();
            for float in ["f32", "f64"] {
                let expect = |what: &str, actual: &[f64]| {
                    let key = format!("out.{float}.{name}.{what}");
                    assert_exact(&format!("{dims} {key}"), actual, &t.numbers(&key));
                };
                let given = |what: &str| t.numbers(&format!("in.{float}.{what}"));
                expect("normalize.state", &state.normalize(&given("state")).unwrap());
                let native =
                    rows(&given("actions_native"), width, |row| actions.normalize(row).unwrap());
                expect("normalize.actions", &native);
                let wide = rows(&given("actions_model32"), 32, |row| match float {
                    "f32" => actions.unnormalize_f32(&narrow(row)),
                    _ => actions.unnormalize(row),
                });
                expect("unnormalize.actions32", &wide);
                let mut padded = state.normalize(&given("state")).unwrap();
                padded.resize(32, 0.0);
                expect("unnormalize.state_from_padded32", &state.unnormalize(&padded));
            }
            if let Some(short) = t.find("in.short_state") {
                let actual = state.normalize(&short.to_f64().unwrap()).unwrap();
                assert_exact("short", &actual, &t.numbers(&format!("out.{name}.short_state")));
            }
        }
    }
}

#[test]
fn statistics_without_quantiles() {
    for file in ["no_quantiles", "quantiles_absent"] {
        let path = fixture::path(&format!("D_preprocess/normalise/variants/{file}.json"));
        let stats = NormStats::from_file(&path).unwrap();
        let state = stats.get("state").unwrap();
        assert!(Normalizer::new(NormMode::OpenpiZScore, "state", state).is_ok());
        assert!(Normalizer::new(NormMode::OpenpiQuantile, "state", state).is_err());
    }
}

#[test]
fn masks() {
    let cases = fixture::json("D_preprocess/normalise/make_bool_mask.json");
    let cases = cases.as_array().unwrap();
    assert_eq!(cases.len(), 7);
    for case in cases {
        let runs: Vec<i32> = serde_json::from_value(case["args"].clone()).unwrap();
        let mask: Vec<bool> = serde_json::from_value(case["mask"].clone()).unwrap();
        assert_eq!(make_bool_mask(&runs), mask);
    }
}

#[test]
fn grippers() {
    let t = Tensors::open("D_preprocess/policies/aloha_gripper.safetensors");
    let grid = t.numbers("in.grid");
    let from: Vec<f64> = grid.iter().map(|&x| gripper_from_angular(x)).collect();
    assert_exact("from angular", &from, &t.numbers("out.gripper_from_angular"));
    let to = t.numbers("out.gripper_to_angular");
    assert_eq!(grid.len(), to.len());
    for (x, expected) in grid.iter().zip(to) {
        // NumPy's arcsin and ours may differ in the last place.
        let actual = gripper_to_angular(*x);
        assert!((actual - expected).abs() <= 1e-15 * expected.abs().max(1.0), "{x}: {actual}");
    }
}
