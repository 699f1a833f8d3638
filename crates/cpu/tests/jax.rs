//! Actions against openpi's JAX model on the same weights: 3e-4 apart by the time embedding, which
//! JAX evaluates in f32, and 2e-5 where that is done here as well.

use std::sync::Arc;

use pirouette_cpu::{Options, Precision, load_table};
use pirouette_model::schedule::TimeEmbedding;
use pirouette_model::{Device, Family, WeightTable, record_with};
use pirouette_testing::fixture::{Fixture, max_abs, testdata};
use pirouette_testing::golden::{Case, Packed, TINY_CASES, tiny_config, tiny_source};

#[test]
fn jax_gives_the_same_actions() {
    for family in [Family::Pi0, Family::Pi05] {
        let (config, source) = (tiny_config(family).unwrap(), tiny_source(family).unwrap());
        for name in TINY_CASES {
            let case = Case::tiny(family, name).unwrap();
            let path = format!("B_jax/{}/{name}.jax.safetensors", family.name());
            let want = Fixture::open(testdata().join(path)).unwrap().f32("jax.actions").unwrap();
            let each = want.len() / case.observations.len();
            for (embedding, tolerance) in [(TimeEmbedding::F64, 3e-4), (TimeEmbedding::F32, 2e-5)] {
                let mut table = WeightTable::new(config, case.steps);
                table.time_embedding = embedding;
                let options = Options { precision: Precision::F32, ..Options::default() };
                let mut device =
                    load_table(table.clone(), &source, options, &mut |_, _| {}).unwrap();
                let table = Arc::new(table);
                for (b, o) in case.observations.iter().enumerate() {
                    let packed = Packed::new(&config, &[o], case.steps);
                    let program = Arc::new(record_with(table.clone(), packed.shape).unwrap());
                    let mut executable = device.compile(program).unwrap();
                    let mut got = vec![f32::NAN; each];
                    executable.run(&packed.inputs(), &mut got).unwrap();
                    let off = max_abs(&got, &want[b * each..][..each]);
                    assert!(off <= tolerance, "{family:?} {name} {b} {embedding:?}: {off:.2e}");
                }
            }
        }
    }
}
