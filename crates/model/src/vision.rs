//! Images → image tokens in the prefix stream: SigLIP over all cameras of all samples at once,
//! then the projector.

use crate::config::names::{PROJECTOR, VISION};
use crate::program::{Attention, Bias, Epilogue, KeyMask, Linear, Norm, Op, View};
use crate::record::Recorder;
use crate::weights::{BiasPart, Kind, Part, Recipe, WeightTable};

/// Weights of SigLIP and the projector. LayerNorm's shifts are folded into the biases that follow.
pub(crate) fn weights(table: &mut WeightTable) {
    let v = table.config.vision;
    let d = v.width;
    table.add("vision.patch".into(), d, v.patch_values(), Kind::Matrix, Recipe::PatchKernel);
    table.add("vision.patch.bias".into(), 1, d, Kind::Vector, Recipe::PatchBias);
    let positions = Recipe::Copy(format!("{VISION}embeddings.position_embedding.weight"));
    table.add("vision.positions".into(), v.tokens(), d, Kind::Vector, positions);

    for i in 0..v.depth {
        let layer = format!("{VISION}encoder.layers.{i}.");
        let attention = |p: &str| format!("{layer}self_attn.{p}");
        normed(
            table,
            &format!("vision.{i}.qkv"),
            d,
            &format!("{layer}layer_norm1"),
            &["q_proj", "k_proj", "v_proj"].map(|p| (attention(p), d)),
        );
        plain(table, &format!("vision.{i}.out"), d, attention("out_proj"), d);
        let fc1 = (format!("{layer}mlp.fc1"), v.mlp);
        normed(table, &format!("vision.{i}.fc1"), d, &format!("{layer}layer_norm2"), &[fc1]);
        plain(table, &format!("vision.{i}.fc2"), v.mlp, format!("{layer}mlp.fc2"), d);
    }
    let projector = PROJECTOR.trim_end_matches('.').to_string();
    let width = table.config.prefix.width;
    let norm = format!("{VISION}post_layernorm");
    normed(table, "vision.projector", d, &norm, &[(projector, width)]);
}

/// A product with bias behind a LayerNorm: `parts` are (linear, rows).
fn normed(table: &mut WeightTable, name: &str, cols: usize, norm: &str, parts: &[(String, usize)]) {
    let weights = parts.iter().map(|(linear, rows)| Part::new(format!("{linear}.weight"), *rows));
    let biases = parts.iter().map(|(linear, rows)| BiasPart {
        shifted: Some((format!("{linear}.weight"), format!("{norm}.bias"))),
        ..BiasPart::new(format!("{linear}.bias"), *rows)
    });
    table.norm_scale(format!("{name}.norm"), cols, format!("{norm}.weight"), false);
    table.matrix(name.into(), cols, weights.collect());
    table.bias(format!("{name}.bias"), biases.collect());
}

/// A product with bias.
fn plain(table: &mut WeightTable, name: &str, cols: usize, linear: String, rows: usize) {
    table.matrix(name.into(), cols, vec![Part::new(format!("{linear}.weight"), rows)]);
    table.bias(format!("{name}.bias"), vec![BiasPart::new(format!("{linear}.bias"), rows)]);
}

/// Records the steps; image tokens end in rows `camera · tokens + i` of `prefix.stream`.
pub(crate) fn record(r: &mut Recorder) {
    let (v, shape) = (r.config.vision, r.shape);
    let (images, tokens) = (shape.batch * shape.cameras, v.tokens());
    let rows = images * tokens;
    let pixels = r.input("images", images, v.image * v.image * 3, crate::program::Element::U8);
    let patches = r.scratch("vision.patches", rows, v.patch_values());
    let stream = r.scratch("vision.stream", rows, v.width);
    let qkv = r.scratch("vision.qkv", rows, 3 * v.width);
    let attended = r.scratch("vision.attended", rows, v.width);
    let hidden = r.scratch("vision.hidden", rows, v.mlp);

    r.push(
        "vision.patchify",
        Op::Patchify { images: pixels, patches, patch: v.patch, side: v.image },
    );
    let per_image = |buffer, cols| View::rows(buffer, cols, tokens);
    let table = r.weight("vision.positions");
    let x = per_image(stream, v.width);
    linear(
        r,
        "vision.patch",
        images,
        (per_image(patches, v.patch_values()), Norm::None),
        Epilogue::StorePosition { out: x, table },
    );
    for i in 0..v.depth {
        let out = per_image(qkv, 3 * v.width);
        let step = |op: &str| format!("vision.{i}.{op}");
        let norm = |r: &Recorder, op: &str| Norm::Layer {
            scale: r.weight(&format!("vision.{i}.{op}.norm")),
        };
        let attention_norm = norm(r, "qkv");
        linear(r, &step("qkv"), images, (x, attention_norm), Epilogue::Store { out });
        let attention = Attention {
            groups: images,
            heads: v.heads,
            kv_heads: v.heads,
            head_dim: v.head_dim(),
            q: out.columns(0, v.width),
            k: out.columns(v.width, v.width),
            v: out.columns(2 * v.width, v.width),
            out: per_image(attended, v.width),
            scale: (1.0 / (v.head_dim() as f64).sqrt()) as f32,
            mask: KeyMask::All,
        };
        r.push(&step("attention"), Op::Attention(attention));
        let add = Epilogue::Add { out: x, gate: None };
        linear(r, &step("out"), images, (per_image(attended, v.width), Norm::None), add);
        let gelu = Epilogue::Gelu { out: per_image(hidden, v.mlp) };
        let mlp_norm = norm(r, "fc1");
        linear(r, &step("fc1"), images, (x, mlp_norm), gelu);
        linear(r, &step("fc2"), images, (per_image(hidden, v.mlp), Norm::None), add);
    }
    // The projector's groups are samples: all images of a sample are consecutive prefix rows.
    let slots = shape.cameras * tokens;
    let prefix = r.prefix_rows();
    let width = r.config.prefix.width;
    let stream_out = r.scratch("prefix.stream", shape.batch * prefix, width);
    let out = View { count: slots, ..View::rows(stream_out, width, prefix) };
    let input = View::rows(stream, v.width, slots);
    let norm = Norm::Layer { scale: r.weight("vision.projector.norm") };
    linear(r, "vision.projector", shape.batch, (input, norm), Epilogue::Store { out });
}

/// Records a product with the bias of the same name.
fn linear(
    r: &mut Recorder,
    name: &str,
    groups: usize,
    (input, norm): (View, Norm),
    epilogue: Epilogue,
) {
    let weight = r.weight(name);
    let bias = Some(Bias { table: r.weight(&format!("{name}.bias")), row: 0 });
    // Pixels come as p − 128; the model wants p / 127.5 − 1.
    let scale = if matches!(epilogue, Epilogue::StorePosition { .. }) { 1.0 / 127.5 } else { 1.0 };
    r.push(name, Op::Linear(Linear { input, groups, norm, weight, scale, bias, epilogue }));
}
