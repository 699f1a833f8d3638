//! Records of one replay, in any order → the graph's nodes in theirs, with their shares of the
//! critical path.

use std::collections::HashMap;

use crate::driver::{Activity, ActivityKind};

/// A node of the captured graph.
#[derive(Clone, Debug)]
pub struct Expected {
    /// What it does.
    pub kind: ActivityKind,
    /// The kernel's symbol, or what is copied.
    pub name: String,
    /// Which launch of the executable it is.
    pub launch: Option<usize>,
    /// The number CUPTI gives it.
    pub id: Option<u64>,
}

/// How records are told to belong to nodes.
pub enum Order {
    /// By node numbers: which node each number means.
    Ids(HashMap<u64, usize>),
    /// By time: a graph without branches starts its nodes in their order.
    Time,
}

impl Order {
    /// By the captured nodes' numbers, and those of their clones (clone, original). `None` if a
    /// node has no number.
    pub fn by_ids(expected: &[Expected], clones: &[(u64, u64)]) -> Option<Order> {
        let ids = expected.iter().map(|e| e.id).collect::<Option<Vec<u64>>>()?;
        let mut nodes: HashMap<u64, usize> =
            ids.into_iter().enumerate().map(|(i, id)| (id, i)).collect();
        // Clones come after what they were cloned from, be that a clone itself.
        for (clone, original) in clones {
            if let Some(&node) = nodes.get(original) {
                nodes.insert(*clone, node);
            }
        }
        Some(Order::Ids(nodes))
    }

    /// Each node's record. All kernels must be there exactly once; copies may be missing.
    pub fn arrange<'a>(
        &self,
        expected: &[Expected],
        records: &'a [Activity],
    ) -> Result<Vec<Option<&'a Activity>>, String> {
        let kernels = |r: &&Activity| r.kind == ActivityKind::Kernel;
        let want = expected.iter().filter(|e| e.kind == ActivityKind::Kernel).count();
        let got = records.iter().filter(kernels).count();
        if got != want {
            return Err(format!("{got} kernels were recorded in a replay of {want}"));
        }
        let arranged = match self {
            Order::Ids(nodes) => by_ids(nodes, expected, records)?,
            Order::Time => by_time(expected, records)?,
        };
        let missing = expected
            .iter()
            .zip(&arranged)
            .find(|(e, found)| e.kind == ActivityKind::Kernel && found.is_none());
        match missing {
            Some((e, _)) => Err(format!("no record is of the kernel `{}`", e.name)),
            None => Ok(arranged),
        }
    }
}

fn by_ids<'a>(
    nodes: &HashMap<u64, usize>,
    expected: &[Expected],
    records: &'a [Activity],
) -> Result<Vec<Option<&'a Activity>>, String> {
    let mut arranged = vec![None; expected.len()];
    for record in records {
        let Some(&at) = nodes.get(&record.node) else {
            return Err(format!("node {} of a record is none of the graph's", record.node));
        };
        if let Some(Activity { node, .. }) = arranged[at].replace(record) {
            let name = &expected[at].name;
            return Err(format!("nodes {node} and {} are both `{name}`", record.node));
        }
    }
    Ok(arranged)
}

fn by_time<'a>(
    expected: &[Expected],
    records: &'a [Activity],
) -> Result<Vec<Option<&'a Activity>>, String> {
    let mut sorted: Vec<&Activity> = records.iter().collect();
    sorted.sort_by_key(|r| (r.start_ns, r.end_ns));
    let of = |kind| sorted.iter().copied().filter(move |r| r.kind == kind);
    let (mut kernels, mut copies) = (of(ActivityKind::Kernel), of(ActivityKind::Copy));
    let all_copies = of(ActivityKind::Copy).count()
        == expected.iter().filter(|e| e.kind == ActivityKind::Copy).count();
    let mut arranged = Vec::with_capacity(expected.len());
    for e in expected {
        let record = match e.kind {
            ActivityKind::Kernel => kernels.next(),
            _ if all_copies => copies.next(),
            _ => None,
        };
        if let Some(name) = record.and_then(|r| r.name.as_ref())
            && *name != e.name
        {
            return Err(format!("`{name}` ran where the graph has `{}`", e.name));
        }
        arranged.push(record);
    }
    Ok(arranged)
}

/// Of each node, its share of the critical path and the time before its start in which nothing ran.
/// The share is the time from the end of all nodes before it, or its own start if that is later, to
/// its end; 0 for a node that ends before an earlier one does. All together are the time from the
/// first start to the last end.
pub fn shares(spans: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let mut reached = spans.first().map_or(0, |s| s.0);
    let share = |&(start, end): &(u64, u64)| {
        let idle = start.saturating_sub(reached);
        reached = reached.max(start);
        let share = end.saturating_sub(reached);
        reached = reached.max(end);
        (share, idle)
    };
    spans.iter().map(share).collect()
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub fn expected() -> Vec<Expected> {
        let node = |kind, name: &str, launch, id| Expected {
            kind,
            name: name.into(),
            launch,
            id: Some(id),
        };
        vec![
            node(ActivityKind::Copy, "copy in", None, 10),
            node(ActivityKind::Kernel, "a", Some(0), 11),
            node(ActivityKind::Kernel, "b", Some(1), 12),
            node(ActivityKind::Kernel, "a", Some(2), 13),
            node(ActivityKind::Copy, "copy out", None, 14),
        ]
    }

    pub fn record(kind: ActivityKind, name: &str, node: u64, span: (u64, u64)) -> Activity {
        let name = (kind == ActivityKind::Kernel).then(|| name.into());
        let (start_ns, end_ns) = span;
        let (correlation, graph, device, stream) = (1, 2, 0, 7);
        Activity { kind, start_ns, end_ns, correlation, node, graph, device, stream, name }
    }

    /// Overlapping as dependent launches do, and handed over out of order.
    pub fn records(base: u64, at: u64) -> Vec<Activity> {
        let kernel = |name: &str, node, from, to| {
            record(ActivityKind::Kernel, name, base + node, (at + from, at + to))
        };
        vec![
            kernel("a", 13, 25, 60),
            kernel("a", 11, 12, 20),
            record(ActivityKind::Copy, "", base + 14, (at + 61, at + 65)),
            kernel("b", 12, 18, 30),
            record(ActivityKind::Copy, "", base + 10, (at, at + 10)),
        ]
    }

    fn starts(order: &Order, records: &[Activity]) -> Result<Vec<u64>, String> {
        let arranged = order.arrange(&expected(), records)?;
        Ok(arranged.into_iter().map(|r| r.map_or(0, |r| r.start_ns)).collect())
    }

    #[test]
    fn nodes_clones_and_clones_of_clones_are_found() {
        let clones: Vec<(u64, u64)> =
            (10..15).map(|n| (n + 100, n)).chain((10..15).map(|n| (n + 200, n + 100))).collect();
        let order = Order::by_ids(&expected(), &clones).unwrap();
        for base in [0, 100, 200] {
            let records = records(base, 1000);
            assert_eq!(starts(&order, &records).unwrap(), [1000, 1012, 1018, 1025, 1061]);
        }
        assert!(starts(&order, &records(300, 0)).unwrap_err().contains("none of the graph's"));
        let mut twice = records(0, 1);
        twice[0].node = 11;
        assert!(starts(&order, &twice).unwrap_err().contains("both"));
        let mut nameless = expected();
        nameless[2].id = None;
        assert!(Order::by_ids(&nameless, &clones).is_none());
    }

    #[test]
    fn without_numbers_the_order_of_starts_decides_and_names_must_agree() {
        let records = records(0, 1000);
        assert_eq!(starts(&Order::Time, &records).unwrap(), [1000, 1012, 1018, 1025, 1061]);
        let mut other = records.clone();
        other[1].name = Some("b".into());
        assert!(starts(&Order::Time, &other).unwrap_err().contains("`b` ran where"));
        let kernels: Vec<Activity> =
            records.iter().filter(|r| r.kind == ActivityKind::Kernel).cloned().collect();
        assert_eq!(starts(&Order::Time, &kernels).unwrap(), [0, 1012, 1018, 1025, 0]);
        assert!(starts(&Order::Time, &kernels[1..]).unwrap_err().contains("2 kernels"));
    }

    #[test]
    fn shares_add_up_to_the_replay() {
        let spans = [(100, 110), (112, 120), (118, 130), (125, 128), (125, 160), (161, 165)];
        let shares_of = [(10, 0), (8, 2), (10, 0), (0, 0), (30, 0), (4, 1)];
        assert_eq!(shares(&spans), shares_of);
        assert_eq!(shares(&spans).iter().map(|s| s.0 + s.1).sum::<u64>(), 165 - 100);
        assert!(shares(&[]).is_empty());
    }
}
