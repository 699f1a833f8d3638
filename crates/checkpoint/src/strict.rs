//! Canonical tensors of a source → the model's sizes, or the list of what does not fit.

use std::collections::{BTreeMap, BTreeSet};

use pirouette_model::config::{MAX_EXTENT, names};
use pirouette_model::{Config, TensorSource};

use crate::error::{CheckpointError, Mismatch};
use crate::expected::expected_tensors;

/// Layers beyond this are no π0: the index is taken for a foreign name.
const MAX_LAYERS: usize = 1024;

/// Reads the sizes off `source` and checks that it holds exactly the tensors of such a model.
///
/// `extra` are stored names without any canonical meaning. `stored` turns a canonical name into
/// the one a user finds in the file.
pub(crate) fn model_of(
    source: &dyn TensorSource,
    vision_heads: Option<usize>,
    extra: Vec<String>,
    stored: &dyn Fn(&str) -> String,
) -> Result<Config, CheckpointError> {
    let origin = source.origin();
    let fail = |mut mismatches: Vec<Mismatch>| {
        mismatches.extend(extra.iter().cloned().map(Mismatch::Extra));
        let mut seen = BTreeSet::new();
        mismatches.retain(|m| seen.insert(m.to_string()));
        CheckpointError::Tensors { origin: origin.clone(), mismatches }
    };

    let present: BTreeMap<String, Vec<usize>> = source
        .names()
        .into_iter()
        .map(|name| (source.shape(&name).unwrap_or_default(), name))
        .map(|(shape, name)| (name, shape))
        .collect();
    for (name, shape) in &present {
        if shape.iter().any(|&e| e > MAX_EXTENT) {
            let axes = format!("of at most {MAX_EXTENT}");
            let found = shape.clone();
            return Err(fail(vec![Mismatch::Axes { name: stored(name), found, axes }]));
        }
    }
    let gaps = layer_gaps(&present);
    let missing = gaps.iter().map(|name| Mismatch::Missing(stored(name)));
    let missing: Vec<Mismatch> = missing.chain(layers_lost(&present)).collect();
    if !missing.is_empty() {
        return Err(fail(missing));
    }
    let config = Config::infer(source, vision_heads)?;

    let mut mismatches = Vec::new();
    let mut left: BTreeSet<&str> = present.keys().map(String::as_str).collect();
    for wanted in expected_tensors(&config) {
        left.remove(wanted.name.as_str());
        match present.get(&wanted.name) {
            None => mismatches.push(Mismatch::Missing(stored(&wanted.name))),
            Some(found) if *found != wanted.shape => mismatches.push(Mismatch::Shape {
                name: match stored(&wanted.name) {
                    same if same == wanted.name => same,
                    other => format!("{}, stored as {other}", wanted.name),
                },
                found: found.clone(),
                expected: wanted.shape,
            }),
            Some(_) => {}
        }
    }
    mismatches.extend(left.into_iter().map(|name| Mismatch::Extra(stored(name))));
    if mismatches.is_empty() && extra.is_empty() { Ok(config) } else { Err(fail(mismatches)) }
}

/// The three towers: prefix of their layers, and the tensor of a layer that depth is counted on.
fn towers() -> [(String, &'static str); 3] {
    [
        (format!("{}encoder.layers.", names::VISION), "mlp.fc1.weight"),
        (format!("{}layers.", names::PREFIX), "self_attn.q_proj.weight"),
        (format!("{}layers.", names::EXPERT), "self_attn.q_proj.weight"),
    ]
}

/// One more than the highest layer present.
fn depth(present: &BTreeMap<String, Vec<usize>>, prefix: &str) -> usize {
    let layers = present.keys().filter_map(|name| name.strip_prefix(prefix)?.split('.').next());
    let layers =
        layers.filter_map(|layer| layer.parse().ok()).filter(|&layer: &usize| layer < MAX_LAYERS);
    layers.max().map_or(0, |layer: usize| layer + 1)
}

/// Towers of a released width that end before their time: a shallower model as it were, but its
/// last layers were lost.
fn layers_lost(present: &BTreeMap<String, Vec<usize>>) -> Vec<Mismatch> {
    let released = Config::pi0();
    let of = [
        (released.vision.width, released.vision.depth),
        (released.prefix.width, released.depth),
        (released.expert.width, released.depth),
    ];
    let mut lost = Vec::new();
    for ((prefix, counted), (width, of)) in towers().into_iter().zip(of) {
        let first = present.get(&format!("{prefix}0.{counted}"));
        let found = depth(present, &prefix);
        // The counted tensors are [out, in]; in is the width of the tower.
        if found < of && first.is_some_and(|shape| shape.get(1) == Some(&width)) {
            lost.push(Mismatch::Layers { prefix, found, of });
        }
    }
    lost
}

/// Tensors that depth is counted on and that are absent below the highest layer present.
/// Without this a hole would be reported as a shallower model with hundreds of extra tensors.
fn layer_gaps(present: &BTreeMap<String, Vec<usize>>) -> Vec<String> {
    let mut gaps = Vec::new();
    for (prefix, counted) in towers() {
        gaps.extend(
            (0..depth(present, &prefix))
                .map(|i| format!("{prefix}{i}.{counted}"))
                .filter(|name| !present.contains_key(name)),
        );
    }
    gaps
}
