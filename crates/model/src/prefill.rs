//! Prefix stream → K and V of every layer: Gemma-2B over image and prompt tokens.

use crate::config::names::{EMBED, PREFIX};
use crate::program::{
    Attention, Element, Epilogue, KeyMask, Linear, Norm, Op, Positions, View, WeightId,
};
use crate::record::Recorder;
use crate::weights::{Kind, Part, Recipe, WeightTable};

/// Weights of Gemma-2B as far as they are used: the last layer has K and V only, the final norm is
/// never read. 1/√head_dim, a power of two, lies in q.
pub(crate) fn weights(table: &mut WeightTable) {
    let c = table.config;
    let embed = Recipe::Copy(EMBED.into());
    table.add("prefill.embed".into(), c.vocab, c.prefix.width, Kind::TokenTable, embed);
    for i in 0..c.depth {
        let norm = |n: &str| format!("{PREFIX}layers.{i}.{n}.weight");
        norm_scales(table, &format!("prefill.{i}"), c.prefix.width, norm);
        let last = i + 1 == c.depth;
        gemma_layer(
            table,
            &format!("prefill.{i}"),
            &format!("{PREFIX}layers.{i}."),
            c.prefix,
            last,
        );
    }
}

/// The learned scales of a layer's two norms.
pub(crate) fn norm_scales(
    table: &mut WeightTable,
    name: &str,
    width: usize,
    tensor: impl Fn(&str) -> String,
) {
    for (norm, of) in [("input_layernorm", "attention"), ("post_attention_layernorm", "mlp")] {
        table.norm_scale(format!("{name}.{of}.norm"), width, tensor(norm), true);
    }
}

/// One Gemma layer: `qkv`, `out`, `up` (gate‖up), `down`; `kv` alone when `kv_only`.
pub(crate) fn gemma_layer(
    table: &mut WeightTable,
    name: &str,
    layer: &str,
    sizes: crate::config::Gemma,
    kv_only: bool,
) {
    let c = table.config;
    let (width, mlp) = (sizes.width, sizes.mlp);
    let scale = (1.0 / (c.head_dim as f64).sqrt()) as f32;
    let part = |p: &str, rows| Part::new(format!("{layer}self_attn.{p}_proj.weight"), rows);
    let (k, v) = (part("k", c.kv_dim()), part("v", c.kv_dim()));
    if kv_only {
        table.matrix(format!("{name}.kv"), width, vec![k, v]);
        return;
    }
    let q = part("q", c.q_dim()).scale(scale);
    table.matrix(format!("{name}.qkv"), width, vec![q, k, v]);
    let out = Part::new(format!("{layer}self_attn.o_proj.weight"), width);
    table.matrix(format!("{name}.out"), c.q_dim(), vec![out]);
    let gate_up = ["gate", "up"].map(|p| Part::new(format!("{layer}mlp.{p}_proj.weight"), mlp));
    table.matrix(format!("{name}.up"), width, gate_up.to_vec());
    let down = Part::new(format!("{layer}mlp.down_proj.weight"), width);
    table.matrix(format!("{name}.down"), mlp, vec![down]);
}

/// Records the steps; K and V of layer i end in rows `0..prefix_rows` of `cache.k.i`, `cache.v.i`.
pub(crate) fn record(r: &mut Recorder) {
    let (c, shape) = (r.config, r.shape);
    let prefix = r.prefix_rows();
    let rows = shape.batch * prefix;
    let width = c.prefix.width;
    let tokens = r.input("tokens", shape.batch, shape.prompt_tokens, Element::U32);
    let stream = r.buffer("prefix.stream");
    let x = View::rows(stream, width, prefix);
    let table = r.weight("prefill.embed");
    let scale = (width as f64).sqrt() as f32;
    let image_tokens = c.vision.tokens();
    r.push("prefill.embed", Op::EmbedTokens { tokens, table, scale, image_tokens, out: x });

    let q = r.scratch("prefix.q", rows, c.q_dim());
    let attended = r.scratch("prefix.attended", rows, c.q_dim());
    let hidden = r.scratch("prefix.hidden", rows, c.prefix.mlp);
    let [q, attended] = [q, attended].map(|b| View::rows(b, c.q_dim(), prefix));
    let hidden = View::rows(hidden, c.prefix.mlp, prefix);
    let cache_rows = r.cache_rows();
    for i in 0..c.depth {
        let last = i + 1 == c.depth;
        let [k, v] = r.cache(i);
        let rows = |buffer| View { count: prefix, ..View::rows(buffer, c.kv_dim(), cache_rows) };
        let step = |op: &str| format!("prefill.{i}.{op}");
        let rope = Epilogue::Rope {
            q: (!last).then_some(q),
            k: rows(k),
            v: rows(v),
            head_dim: c.head_dim,
            positions: Positions::Prefix,
        };
        let norm = |r: &Recorder, of: &str| Norm::Rms {
            scale: Some(r.weight(&format!("prefill.{i}.{of}.norm"))),
        };
        let attention_norm = norm(r, "attention");
        linear(r, &step(if last { "kv" } else { "qkv" }), (x, attention_norm), rope);
        if last {
            break;
        }
        let attention = Attention {
            groups: shape.batch,
            heads: c.heads,
            kv_heads: 1,
            head_dim: c.head_dim,
            q,
            k: rows(k),
            v: rows(v),
            out: attended,
            scale: 1.0,
            mask: KeyMask::Prefix,
        };
        r.push(&step("attention"), Op::Attention(attention));
        let add = Epilogue::Add { out: x, gate: None };
        linear(r, &step("out"), (attended, Norm::None), add);
        let mlp_norm = norm(r, "mlp");
        linear(r, &step("up"), (x, mlp_norm), Epilogue::GeGlu { out: hidden });
        linear(r, &step("down"), (hidden, Norm::None), add);
    }
}

fn linear(r: &mut Recorder, name: &str, (input, norm): (View, Norm), epilogue: Epilogue) {
    let weight: WeightId = r.weight(name);
    let groups = r.shape.batch;
    let (scale, bias) = (1.0, None);
    r.push(name, Op::Linear(Linear { input, groups, norm, weight, scale, bias, epilogue }));
}
