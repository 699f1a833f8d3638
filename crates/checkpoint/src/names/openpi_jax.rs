//! Paths of openpi's JAX parameter tree ↔ canonical names: which part of which array, with its
//! axes in which order, is a tensor.

use pirouette_model::config::names;

/// How a pair of low-rank factors A, B beside an array combines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lora {
    /// ΔW = A·B, separately for every leading index (head).
    Each,
    /// ΔW[n] = A[n] · Σₘ B[m]: the labels of openpi's output einsum sum the second factor over
    /// heads before it is used.
    HeadsSummed,
}

/// One tensor inside an array.
#[derive(Clone, Debug)]
pub struct Part {
    /// Index on each axis after the layer axis that singles the block out.
    pub pick: &'static [usize],
    /// Canonical name after the rule's prefix (and layer).
    pub name: String,
    /// Order of the block's axes in the tensor.
    pub perm: &'static [usize],
    /// How many of those axes each tensor axis joins.
    pub join: &'static [usize],
}

/// One array of the tree.
#[derive(Clone, Debug)]
pub struct Rule {
    /// Path, components joined by `/`.
    pub path: String,
    /// Canonical prefix.
    pub prefix: String,
    /// Whether axis 0 is the layer.
    pub stacked: bool,
    /// The tensors it holds; their picks cover the picked axes.
    pub parts: Vec<Part>,
    /// How factors beside it combine, where there can be some.
    pub lora: Option<Lora>,
}

impl Rule {
    /// Number of axes the array has.
    pub fn rank(&self) -> usize {
        let part = |p: &Part| p.pick.len() + p.perm.len();
        usize::from(self.stacked) + self.parts.first().map_or(0, part)
    }

    /// Paths of the factors A and B.
    pub fn factors(&self) -> [String; 2] {
        match self.path.strip_suffix("/w") {
            Some(stem) => [format!("{stem}/lora_a"), format!("{stem}/lora_b")],
            None => [format!("{}_lora_a", self.path), format!("{}_lora_b", self.path)],
        }
    }

    /// Canonical name of a part.
    pub fn name(&self, part: &Part, layer: usize) -> String {
        match self.stacked {
            true => format!("{}{layer}.{}", self.prefix, part.name),
            false => format!("{}{}", self.prefix, part.name),
        }
    }

    fn holds(&self, canonical: &str) -> bool {
        let Some(rest) = canonical.strip_prefix(&self.prefix) else { return false };
        let name = match (self.stacked, rest.split_once('.')) {
            (false, _) => rest,
            (true, Some((layer, name))) if layer.parse::<usize>().is_ok() => name,
            (true, _) => return false,
        };
        self.parts.iter().any(|p| p.name == name)
    }
}

/// Path of the array that a canonical tensor comes from.
pub fn array_of(rules: &[Rule], canonical: &str) -> Option<String> {
    rules.iter().find(|rule| rule.holds(canonical)).map(|rule| rule.path.clone())
}

/// Every array of both models.
pub fn rules() -> Vec<Rule> {
    let mut rules = Vec::new();
    vision(&mut rules);
    gemma(&mut rules, "", names::PREFIX);
    gemma(&mut rules, "_1", names::EXPERT);
    for stem in [
        "action_in_proj",
        "action_out_proj",
        "state_proj",
        "action_time_mlp_in",
        "action_time_mlp_out",
        "time_mlp_in",
        "time_mlp_out",
    ] {
        linear(&mut rules, stem, "", false, stem);
    }
    rules
}

fn one(
    path: impl Into<String>,
    prefix: impl Into<String>,
    stacked: bool,
    name: &str,
    (perm, join): (&'static [usize], &'static [usize]),
) -> Rule {
    let part = Part { pick: &[], name: name.into(), perm, join };
    Rule { path: path.into(), prefix: prefix.into(), stacked, parts: vec![part], lora: None }
}

const VECTOR: (&[usize], &[usize]) = (&[0], &[1]);
const MATRIX: (&[usize], &[usize]) = (&[0, 1], &[1, 1]);
const TRANSPOSED: (&[usize], &[usize]) = (&[1, 0], &[1, 1]);
/// [width, heads, head] → [heads·head, width]
const INTO_HEADS: (&[usize], &[usize]) = (&[1, 2, 0], &[2, 1]);
/// [heads, head, width] → [width, heads·head]
const OUT_OF_HEADS: (&[usize], &[usize]) = (&[2, 0, 1], &[1, 2]);

/// `kernel` [in, out] and `bias` [out].
fn linear(rules: &mut Vec<Rule>, path: &str, prefix: &str, stacked: bool, stem: &str) {
    let name = format!("{stem}.weight");
    rules.push(one(format!("{path}/kernel"), prefix, stacked, &name, TRANSPOSED));
    rules.push(one(format!("{path}/bias"), prefix, stacked, &format!("{stem}.bias"), VECTOR));
}

fn layer_norm(rules: &mut Vec<Rule>, path: &str, prefix: &str, stacked: bool, stem: &str) {
    let name = format!("{stem}.weight");
    rules.push(one(format!("{path}/scale"), prefix, stacked, &name, VECTOR));
    rules.push(one(format!("{path}/bias"), prefix, stacked, &format!("{stem}.bias"), VECTOR));
}

fn vision(rules: &mut Vec<Rule>) {
    let v = names::VISION;
    let layers = format!("{v}encoder.layers.");
    let img = "PaliGemma/img";
    let block = format!("{img}/Transformer/encoderblock");

    let patch: (&[usize], &[usize]) = (&[3, 2, 0, 1], &[1, 1, 1, 1]);
    let stem = "embeddings.patch_embedding";
    rules.push(one(format!("{img}/embedding/kernel"), v, false, &format!("{stem}.weight"), patch));
    rules.push(one(format!("{img}/embedding/bias"), v, false, &format!("{stem}.bias"), VECTOR));
    let mut positions = one(
        format!("{img}/pos_embedding"),
        v,
        false,
        "embeddings.position_embedding.weight",
        MATRIX,
    );
    positions.parts[0].pick = &[0];
    rules.push(positions);

    layer_norm(rules, &format!("{block}/LayerNorm_0"), &layers, true, "layer_norm1");
    layer_norm(rules, &format!("{block}/LayerNorm_1"), &layers, true, "layer_norm2");
    let attention = format!("{block}/MultiHeadDotProductAttention_0");
    for (path, name) in [("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")] {
        let path = format!("{attention}/{path}");
        let stem = format!("self_attn.{name}");
        let weight = format!("{stem}.weight");
        rules.push(one(format!("{path}/kernel"), &layers, true, &weight, INTO_HEADS));
        let joined: (&[usize], &[usize]) = (&[0, 1], &[2]);
        rules.push(one(format!("{path}/bias"), &layers, true, &format!("{stem}.bias"), joined));
    }
    let out = "self_attn.out_proj";
    let weight = format!("{out}.weight");
    rules.push(one(format!("{attention}/out/kernel"), &layers, true, &weight, OUT_OF_HEADS));
    let bias = format!("{out}.bias");
    rules.push(one(format!("{attention}/out/bias"), &layers, true, &bias, VECTOR));
    linear(rules, &format!("{block}/MlpBlock_0/Dense_0"), &layers, true, "mlp.fc1");
    linear(rules, &format!("{block}/MlpBlock_0/Dense_1"), &layers, true, "mlp.fc2");

    layer_norm(rules, &format!("{img}/Transformer/encoder_norm"), v, false, "post_layernorm");
    let projector = names::PROJECTOR.trim_end_matches('.');
    linear(rules, &format!("{img}/head"), "", false, projector);
    rules.push(one("PaliGemma/llm/embedder/input_embedding", "", false, names::EMBED, MATRIX));
}

fn gemma(rules: &mut Vec<Rule>, suffix: &str, tower: &str) {
    let prefix = format!("{tower}layers.");
    let layers = "PaliGemma/llm/layers";
    let part = |pick, name: &str, (perm, join)| Part { pick, name: name.into(), perm, join };
    let mut add = |path: String, parts, lora| {
        let path = format!("{layers}/{path}");
        rules.push(Rule { path, prefix: prefix.clone(), stacked: true, parts, lora: Some(lora) });
    };
    // [heads, width, head] → [heads·head, width]
    let query: (&[usize], &[usize]) = (&[0, 2, 1], &[2, 1]);
    let parts = vec![part(&[], "self_attn.q_proj.weight", query)];
    add(format!("attn/q_einsum{suffix}/w"), parts, Lora::Each);
    let parts = vec![
        part(&[0, 0], "self_attn.k_proj.weight", TRANSPOSED),
        part(&[1, 0], "self_attn.v_proj.weight", TRANSPOSED),
    ];
    add(format!("attn/kv_einsum{suffix}/w"), parts, Lora::Each);
    let parts = vec![part(&[], "self_attn.o_proj.weight", OUT_OF_HEADS)];
    add(format!("attn/attn_vec_einsum{suffix}/w"), parts, Lora::HeadsSummed);
    let parts = vec![
        part(&[0], "mlp.gate_proj.weight", TRANSPOSED),
        part(&[1], "mlp.up_proj.weight", TRANSPOSED),
    ];
    add(format!("mlp{suffix}/gating_einsum"), parts, Lora::Each);
    let parts = vec![part(&[], "mlp.down_proj.weight", TRANSPOSED)];
    add(format!("mlp{suffix}/linear"), parts, Lora::Each);

    for (path, prefix, stacked, stem) in [
        (format!("{layers}/pre_attention_norm{suffix}"), &*prefix, true, "input_layernorm"),
        (format!("{layers}/pre_ffw_norm{suffix}"), &*prefix, true, "post_attention_layernorm"),
        (format!("PaliGemma/llm/final_norm{suffix}"), tower, false, "norm"),
    ] {
        let weight = format!("{stem}.weight");
        rules.push(one(format!("{path}/scale"), prefix, stacked, &weight, VECTOR));
        linear(rules, &format!("{path}/Dense_0"), prefix, stacked, &format!("{stem}.dense"));
    }
}
