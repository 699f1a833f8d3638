//! Sizes of a model → the canonical name and shape of every tensor it has.

use pirouette_model::config::{Gemma, names};
use pirouette_model::{Config, Family};

/// A tensor that a model of some [`Config`] has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    /// Canonical name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl Expected {
    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&e| e as u64).product()
    }
}

/// Every tensor of the model, tower by tower: 776 for full-size π0, 811 for π0.5.
pub fn expected_tensors(config: &Config) -> Vec<Expected> {
    let mut list = List(Vec::new());
    vision(config, &mut list);
    list.add(names::EMBED, &[config.vocab, config.prefix.width]);
    gemma(config, &config.prefix, names::PREFIX, false, &mut list);
    gemma(config, &config.expert, names::EXPERT, config.family == Family::Pi05, &mut list);
    action(config, &mut list);
    list.0
}

struct List(Vec<Expected>);

impl List {
    fn add(&mut self, name: impl Into<String>, shape: &[usize]) {
        self.0.push(Expected { name: name.into(), shape: shape.to_vec() });
    }

    /// `weight` [out, in] and `bias` [out].
    fn linear(&mut self, stem: &str, out: usize, input: usize) {
        self.add(format!("{stem}.weight"), &[out, input]);
        self.add(format!("{stem}.bias"), &[out]);
    }

    /// `weight` and `bias`, both [width].
    fn layer_norm(&mut self, stem: &str, width: usize) {
        self.add(format!("{stem}.weight"), &[width]);
        self.add(format!("{stem}.bias"), &[width]);
    }
}

fn vision(config: &Config, list: &mut List) {
    let v = &config.vision;
    let p = names::VISION;
    list.add(format!("{p}embeddings.patch_embedding.weight"), &[v.width, 3, v.patch, v.patch]);
    list.add(format!("{p}embeddings.patch_embedding.bias"), &[v.width]);
    list.add(format!("{p}embeddings.position_embedding.weight"), &[v.tokens(), v.width]);
    for i in 0..v.depth {
        let layer = format!("{p}encoder.layers.{i}.");
        list.layer_norm(&format!("{layer}layer_norm1"), v.width);
        for part in ["q_proj", "k_proj", "v_proj", "out_proj"] {
            list.linear(&format!("{layer}self_attn.{part}"), v.width, v.width);
        }
        list.layer_norm(&format!("{layer}layer_norm2"), v.width);
        list.linear(&format!("{layer}mlp.fc1"), v.mlp, v.width);
        list.linear(&format!("{layer}mlp.fc2"), v.width, v.mlp);
    }
    list.layer_norm(&format!("{p}post_layernorm"), v.width);
    list.linear(names::PROJECTOR.trim_end_matches('.'), config.prefix.width, v.width);
}

fn gemma(config: &Config, tower: &Gemma, prefix: &str, adaptive: bool, list: &mut List) {
    let w = tower.width;
    let norm = |list: &mut List, stem: String| match adaptive {
        true => list.linear(&format!("{stem}.dense"), 3 * w, w),
        false => list.add(format!("{stem}.weight"), &[w]),
    };
    for i in 0..config.depth {
        let layer = format!("{prefix}layers.{i}.");
        norm(list, format!("{layer}input_layernorm"));
        list.add(format!("{layer}self_attn.q_proj.weight"), &[config.q_dim(), w]);
        list.add(format!("{layer}self_attn.k_proj.weight"), &[config.kv_dim(), w]);
        list.add(format!("{layer}self_attn.v_proj.weight"), &[config.kv_dim(), w]);
        list.add(format!("{layer}self_attn.o_proj.weight"), &[w, config.q_dim()]);
        norm(list, format!("{layer}post_attention_layernorm"));
        list.add(format!("{layer}mlp.gate_proj.weight"), &[tower.mlp, w]);
        list.add(format!("{layer}mlp.up_proj.weight"), &[tower.mlp, w]);
        list.add(format!("{layer}mlp.down_proj.weight"), &[w, tower.mlp]);
    }
    norm(list, format!("{prefix}norm"));
}

fn action(config: &Config, list: &mut List) {
    let (w, a) = (config.expert.width, config.action_dim);
    list.linear("action_in_proj", w, a);
    list.linear("action_out_proj", a, w);
    match config.family {
        Family::Pi0 => {
            list.linear("state_proj", w, a);
            list.linear("action_time_mlp_in", w, 2 * w);
            list.linear("action_time_mlp_out", w, w);
        }
        Family::Pi05 => {
            list.linear("time_mlp_in", w, w);
            list.linear("time_mlp_out", w, w);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_size_counts_are_openpis() {
        for (config, tensors, parameters) in
            [(Config::pi0(), 776, 3_238_048_528), (Config::pi05(), 811, 3_353_433_872)]
        {
            let list = expected_tensors(&config);
            assert_eq!(list.len(), tensors);
            assert_eq!(list.iter().map(Expected::elements).sum::<u64>(), parameters);
        }
    }
}
