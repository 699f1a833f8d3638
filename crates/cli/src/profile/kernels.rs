//! Kernels and copies of a replay → what they do, how many, what they take.

use pirouette_cuda::TracedNode;
use pirouette_model::Program;
use serde::{Deserialize, Serialize};

use super::{milliseconds, percent};

/// Kernels that do the same kind of work.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KernelGroup {
    /// `GEMM`, `attention`, ….
    pub name: String,
    /// Kernels (or copies) per run.
    pub count: usize,
    /// Milliseconds of the critical path.
    pub ms: f64,
    /// Part of the critical path, 0 to 1.
    pub share: f64,
    /// Milliseconds from each one's start to its end, added up: overlap and waiting count twice.
    pub busy_ms: f64,
}

/// One kernel or copy.
#[derive(Debug, Serialize)]
pub struct Kernel<'a> {
    step: Option<&'a str>,
    name: &'a str,
    what: &'static str,
    start_ms: f64,
    end_ms: f64,
    busy_ms: f64,
    share_ms: f64,
}

/// Every node with the name of its step.
pub fn list<'a>(program: &'a Program, nodes: &'a [TracedNode]) -> Vec<Kernel<'a>> {
    let kernel = |node: &'a TracedNode| Kernel {
        step: node.step.and_then(|at| program.steps.get(at)).map(|step| step.name.as_str()),
        name: &node.name,
        what: work(node),
        start_ms: node.span_ms.0,
        end_ms: node.span_ms.1,
        busy_ms: node.busy_ms,
        share_ms: node.share_ms,
    };
    nodes.iter().map(kernel).collect()
}

/// The nodes by what they do, in order of first appearance.
pub fn groups(nodes: &[TracedNode]) -> Vec<KernelGroup> {
    let total: f64 = nodes.iter().map(|n| n.share_ms).sum();
    let mut groups: Vec<KernelGroup> = Vec::new();
    for node in nodes {
        let name = work(node);
        let at = groups.iter().position(|g| g.name == name).unwrap_or_else(|| {
            let (count, ms, share, busy_ms) = (0, 0.0, 0.0, 0.0);
            groups.push(KernelGroup { name: name.into(), count, ms, share, busy_ms });
            groups.len() - 1
        });
        groups[at].count += 1;
        groups[at].ms += node.share_ms;
        groups[at].busy_ms += node.busy_ms;
    }
    for group in &mut groups {
        group.share = if total > 0.0 { group.ms / total } else { 0.0 };
    }
    groups
}

/// What a node does, told by its kernel's name.
pub fn work(node: &TracedNode) -> &'static str {
    if node.step.is_none() {
        return "copies";
    }
    let name = node.name.as_str();
    let begins = |prefixes: &[&str]| prefixes.iter().any(|p| name.starts_with(p));
    if begins(&["attention_", "portable_attention"]) {
        "attention"
    } else if begins(&["denoise_edge", "portable_guide", "portable_finish"]) {
        // Euler steps with the products around them; what comes after a product.
        "fused ops"
    } else if begins(&["portable_norm", "rows_e4m3"]) {
        "norm"
    } else if begins(&["patchify", "embed", "portable_patchify", "portable_embed"]) {
        "fill and elementwise"
    } else if begins(&["gemm_", "denoise_", "portable_linear", "portable_rim"]) {
        "GEMM, with norms and activations inside"
    } else {
        "other"
    }
}

/// Header of the table of [`kernel_rows`].
pub const KERNEL_HEADER: [&str; 5] = ["kernels", "number", "ms", "share", "from start to end ms"];

/// Rows of a table of kernels, and their sum.
pub fn kernel_rows(groups: &[KernelGroup]) -> Vec<Vec<String>> {
    let row = |name: &str, count: usize, ms: f64, share: f64, busy_ms: f64| {
        let (ms, busy) = (milliseconds(ms), milliseconds(busy_ms));
        vec![name.to_string(), count.to_string(), ms, percent(share), busy]
    };
    let of = |g: &KernelGroup| row(&g.name, g.count, g.ms, g.share, g.busy_ms);
    let mut rows: Vec<Vec<String>> = groups.iter().map(of).collect();
    let sum = |f: fn(&KernelGroup) -> f64| groups.iter().map(f).sum::<f64>();
    let count = groups.iter().map(|g| g.count).sum();
    rows.push(row("total", count, sum(|g| g.ms), sum(|g| g.share), sum(|g| g.busy_ms)));
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(step: Option<usize>, name: &str, share_ms: f64) -> TracedNode {
        let span_ms = (0.0, 0.0);
        TracedNode { step, name: name.into(), span_ms, busy_ms: 2.0 * share_ms, share_ms }
    }

    #[test]
    fn groups_add_up_to_the_critical_path() {
        let nodes = [
            node(None, "copy in", 1.0),
            node(Some(0), "patchify", 0.5),
            node(Some(1), "gemm_store_192x112", 4.0),
            node(Some(2), "attention_vision_sm90", 2.0),
            node(Some(3), "denoise_o_16", 1.5),
            node(Some(4), "denoise_edge", 1.0),
            node(None, "copy out", 0.0),
        ];
        let groups = groups(&nodes);
        let ms: Vec<(&str, usize, f64)> =
            groups.iter().map(|g| (g.name.as_str(), g.count, g.ms)).collect();
        assert_eq!(ms[0], ("copies", 2, 1.0));
        assert_eq!(ms[2], ("GEMM, with norms and activations inside", 2, 5.5));
        assert_eq!(ms.iter().map(|g| g.1).sum::<usize>(), nodes.len());
        assert!((groups.iter().map(|g| g.share).sum::<f64>() - 1.0).abs() < 1e-12);
        assert_eq!(kernel_rows(&groups).last().unwrap()[..3], ["total", "7", "10.0"]);
    }

    /// Every kernel of the sources is known: a new name must be given a place.
    #[test]
    fn every_kernel_has_a_kind() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../cuda/cubin");
        let mut seen = 0;
        for file in std::fs::read_dir(folder).unwrap().flatten() {
            let name = file.file_name().to_string_lossy().into_owned();
            let Some((name, _)) = name.split_once(".sm_90a.cubin") else { continue };
            // Modules are named as their kernels begin; those that load weights never replay.
            if name.ends_with("_load") || name.ends_with("_fault") {
                continue;
            }
            let module = if name == "portable_rows" { "portable_norm" } else { name };
            assert_ne!(work(&node(Some(0), module, 1.0)), "other", "{module}");
            seen += 1;
        }
        assert!(seen > 8, "{seen} modules");
    }
}
