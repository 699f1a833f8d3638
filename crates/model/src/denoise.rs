//! Noise → actions: Euler steps of the action expert over the prefix cache.
//!
//! π0 has a state token before its action tokens. It sees only the prefix and itself and carries no
//! time, so its K and V are the same in every step: it is a row of step 0 alone, and the later
//! steps run the action rows against the K and V it left in the cache.

use crate::config::Family;
use crate::config::names::EXPERT;
use crate::program::{
    Attention, Bias, Element, Epilogue, Gate, Guidance, KeyMask, Linear, Norm, Op, Positions, View,
    WeightId,
};
use crate::record::Recorder;
use crate::rtc::{Rtc, strength};
use crate::schedule::{dt, times};
use crate::weights::{BiasPart, Columns, Kind, Part, Recipe, WeightTable};

/// Weights of the expert and of the action, state and time projections.
pub(crate) fn weights(table: &mut WeightTable) {
    let (c, steps) = (table.config, table.steps);
    let (d, a) = (c.expert.width, c.action_dim);
    let pi05 = c.family == Family::Pi05;
    for i in 0..c.depth {
        let layer = format!("{EXPERT}layers.{i}.");
        let norms = ["input_layernorm", "post_attention_layernorm"].map(|n| format!("{layer}{n}"));
        let name = format!("expert.{i}");
        crate::prefill::gemma_layer(table, &name, &layer, c.expert, false);
        if pi05 {
            for (norm, of) in norms.into_iter().zip(["attention", "mlp"]) {
                let name = format!("{name}.{of}.modulation");
                let rows = c.modulation_rows(steps);
                table.add(name, rows, 3 * d, Kind::Vector, Recipe::Modulation(norm));
            }
        } else {
            let tensor = |n: &str| format!("{layer}{n}.weight");
            crate::prefill::norm_scales(table, &name, d, tensor);
        }
    }
    let final_norm = format!("{EXPERT}norm");
    let mut out = Part::new("action_out_proj.weight".into(), a).scale(dt(steps));
    match c.family {
        Family::Pi0 => {
            out = out.columns(Columns::OnePlus(format!("{final_norm}.weight")));
            let composed = Recipe::ComposedActionIn;
            table.add("action.in".into(), d, a, Kind::RimMatrix, composed);
            let bias = Recipe::ComposedTimeBias;
            table.add("action.in.bias".into(), steps, d, Kind::Vector, bias);
            table.rim("action.mlp", d, Part::new("action_time_mlp_out.weight".into(), d));
            let mlp_bias = BiasPart::new("action_time_mlp_out.bias".into(), d);
            table.bias("action.mlp.bias".into(), vec![mlp_bias]);
            table.rim("state", a, Part::new("state_proj.weight".into(), d));
            table.bias("state.bias".into(), vec![BiasPart::new("state_proj.bias".into(), d)]);
        }
        Family::Pi05 => {
            table.rim("action.in", a, Part::new("action_in_proj.weight".into(), d));
            let bias = BiasPart::new("action_in_proj.bias".into(), d);
            table.bias("action.in.bias".into(), vec![bias]);
            let name = "expert.final.modulation".into();
            let rows = c.modulation_rows(steps);
            table.add(name, rows, 3 * d, Kind::Vector, Recipe::Modulation(final_norm));
        }
    }
    table.rim("action.out", d, out);
    let bias = BiasPart::new("action_out_proj.bias".into(), a);
    table.bias("action.out.bias".into(), vec![BiasPart { scale: dt(steps), ..bias }]);
}

/// Buffers of the loop.
struct Suffix {
    actions: View,
    q: crate::program::BufferId,
    attended: crate::program::BufferId,
    hidden: crate::program::BufferId,
    stream: crate::program::BufferId,
}

/// Records all Euler steps; `actions` holds noise before and the chunk after.
pub(crate) fn record(r: &mut Recorder) {
    let (c, shape) = (r.config, r.shape);
    let rows = shape.batch * r.suffix_rows();
    let actions = r.in_out("actions", shape.batch * shape.horizon, c.action_dim);
    let suffix = Suffix {
        actions: View::rows(actions, c.action_dim, shape.horizon),
        q: r.scratch("suffix.q", rows, c.q_dim()),
        attended: r.scratch("suffix.attended", rows, c.q_dim()),
        hidden: r.scratch("suffix.hidden", rows, c.expert.mlp),
        stream: r.scratch("suffix.stream", rows, c.expert.width),
    };
    let mixed = (c.family == Family::Pi0)
        .then(|| r.scratch("suffix.mixed", shape.batch * shape.horizon, c.expert.width));
    let guidance = guidance(r);
    for (step, time) in times(shape.steps).into_iter().enumerate() {
        let with_state = c.family == Family::Pi0 && step == 0;
        let x = embed(r, &suffix, mixed, step, with_state);
        for layer in 0..c.depth {
            expert_layer(r, &suffix, x, step, layer, with_state);
        }
        let last = View { first: x.count - shape.horizon, count: shape.horizon, ..x };
        let norm = modulation(r, "expert.final")
            // What becomes of given rows here is not stored.
            .map_or(Norm::Rms { scale: None }, |table| Norm::Adaptive {
                table,
                row: step,
                given_row: None,
            });
        let name = format!("denoise.step{step}.action.out");
        let bias = Some((r.weight("action.out.bias"), 0));
        let out = suffix.actions;
        let euler = match (guidance, shape.rtc) {
            (None, Rtc::Trained) => Epilogue::AddFree { out },
            (None, _) => Epilogue::Add { out, gate: None },
            (Some(g), _) => {
                let guidance = Guidance { time, strength: strength(time), ..g };
                Epilogue::Guide { out, guidance }
            }
        };
        linear(r, &name, "action.out", (last, norm), bias, euler);
    }
}

/// What the Euler steps are drawn to, but for their times.
fn guidance(r: &mut Recorder) -> Option<Guidance> {
    let (a, shape) = (r.config.action_dim, r.shape);
    let rows = shape.batch * shape.horizon;
    let weights =
        (shape.rtc != Rtc::Off).then(|| r.input("previous.weights", rows, 1, Element::F32))?;
    (shape.rtc == Rtc::Guided).then(|| Guidance {
        chunk: r.input("previous.chunk", rows, a, Element::F32),
        weights,
        limits: r.input("previous.limits", shape.batch, 1, Element::F32),
        time: 0.0,
        strength: 0.0,
        pull: -dt(shape.steps),
    })
}

/// Noise (and state) → the suffix stream; returns its view.
fn embed(
    r: &mut Recorder,
    suffix: &Suffix,
    mixed: Option<crate::program::BufferId>,
    step: usize,
    with_state: bool,
) -> View {
    let (c, h) = (r.config, r.shape.horizon);
    let width = c.expert.width;
    let name = |op: &str| format!("denoise.step{step}.{op}");
    let x = View::rows(suffix.stream, width, h + with_state as usize);
    let bias = r.weight("action.in.bias");
    let input = (suffix.actions, Norm::None);
    let Some(mixed) = mixed else {
        linear(
            r,
            &name("action.in"),
            "action.in",
            input,
            Some((bias, 0)),
            Epilogue::Store { out: x },
        );
        return x;
    };
    let mixed = View::rows(mixed, width, h);
    if with_state {
        let state = r.input("state", r.shape.batch, c.action_dim, Element::F32);
        let state = View::rows(state, c.action_dim, 1);
        let bias = Some((r.weight("state.bias"), 0));
        let out = View { count: 1, ..x };
        linear(r, &name("state"), "state", (state, Norm::None), bias, Epilogue::Store { out });
    }
    let silu = Epilogue::Silu { out: mixed };
    linear(r, &name("action.in"), "action.in", input, Some((bias, step)), silu);
    let bias = Some((r.weight("action.mlp.bias"), 0));
    let out = View { first: with_state as usize, count: h, ..x };
    let input = (mixed, Norm::None);
    linear(r, &name("action.mlp"), "action.mlp", input, bias, Epilogue::Store { out });
    x
}

fn expert_layer(
    r: &mut Recorder,
    suffix: &Suffix,
    x: View,
    step: usize,
    layer: usize,
    with_state: bool,
) {
    let (c, prefix, cache_rows) = (r.config, r.prefix_rows(), r.cache_rows());
    let [k, v] = r.cache(layer);
    let state_only = (c.family == Family::Pi0 && !with_state) as usize;
    let new = |buffer| View {
        first: prefix + state_only,
        count: x.count,
        ..View::rows(buffer, c.kv_dim(), cache_rows)
    };
    let q = View::rows(suffix.q, c.q_dim(), x.count);
    let attended = View::rows(suffix.attended, c.q_dim(), x.count);
    let hidden = View::rows(suffix.hidden, c.expert.mlp, x.count);
    let name = |op: &str| format!("denoise.step{step}.{layer}.{op}");
    let weight = |op: &str| format!("expert.{layer}.{op}");
    let given_row = (r.shape.rtc == Rtc::Trained).then_some(r.shape.steps);
    let adaptive = |r: &Recorder, of: &str| {
        let table = modulation(r, &weight(of));
        let norm = match table {
            Some(table) => Norm::Adaptive { table, row: step, given_row },
            None => Norm::Rms { scale: Some(r.weight(&weight(&format!("{of}.norm")))) },
        };
        (norm, table.map(|table| Gate { table, row: step, given_row }))
    };

    let (norm, gate) = adaptive(r, "attention");
    let rope = Epilogue::Rope {
        q: Some(q),
        k: new(k),
        v: new(v),
        head_dim: c.head_dim,
        positions: Positions::Suffix { first: state_only },
    };
    linear(r, &name("qkv"), &weight("qkv"), (x, norm), None, rope);
    let attention = Attention {
        groups: r.shape.batch,
        heads: c.heads,
        kv_heads: 1,
        head_dim: c.head_dim,
        q,
        k: View::rows(k, c.kv_dim(), cache_rows),
        v: View::rows(v, c.kv_dim(), cache_rows),
        out: attended,
        scale: 1.0,
        mask: KeyMask::Suffix { prefix_rows: prefix, state_row: with_state },
    };
    r.push(&name("attention"), Op::Attention(attention));
    let add = Epilogue::Add { out: x, gate };
    linear(r, &name("out"), &weight("out"), (attended, Norm::None), None, add);

    let (norm, gate) = adaptive(r, "mlp");
    linear(r, &name("up"), &weight("up"), (x, norm), None, Epilogue::GeGlu { out: hidden });
    let add = Epilogue::Add { out: x, gate };
    linear(r, &name("down"), &weight("down"), (hidden, Norm::None), None, add);
}

/// The modulation table behind a norm, π0.5 only.
fn modulation(r: &Recorder, of: &str) -> Option<WeightId> {
    (r.config.family == Family::Pi05).then(|| r.weight(&format!("{of}.modulation")))
}

fn linear(
    r: &mut Recorder,
    name: &str,
    weight: &str,
    (input, norm): (View, Norm),
    bias: Option<(WeightId, usize)>,
    epilogue: Epilogue,
) {
    let weight = r.weight(weight);
    let bias = bias.map(|(table, row)| Bias { table, row });
    let groups = r.shape.batch;
    let scale = 1.0;
    r.push(name, Op::Linear(Linear { input, groups, norm, weight, scale, bias, epilogue }));
}
