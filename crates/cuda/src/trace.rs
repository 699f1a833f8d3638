//! Replays of the whole graph under CUPTI → when each of its nodes ran, step by step.

use std::collections::BTreeSet;
use std::path::Path;

use pirouette_model::BackendError;

use crate::driver::cupti::{Cupti, Tracing};
use crate::driver::{Activity, ActivityKind, Graph, Stream};
use crate::executable::{CudaExecutable, actions_bytes};
use crate::trace_order::{Expected, Order, shares};

/// Replays that are not looked at.
const WARM_UP: usize = 3;

/// What some replays of a graph spent their time on.
#[derive(Clone, Debug, Default)]
pub struct ReplayTrace {
    /// Kernels and copies in the graph's order.
    pub nodes: Vec<TracedNode>,
    /// Median from the first node's start to the last one's end.
    pub replay_ms: f64,
    /// Median of the part of it in which no node ran: under tracing, mostly between the copy in and
    /// the first kernel.
    pub idle_ms: f64,
    /// Host times of the replay whose spans the nodes have, from the first node's start: launch
    /// called, launch returned, stream synchronised.
    pub host_ms: [f64; 3],
    /// Replays measured.
    pub replays: usize,
    /// How records were told to belong to nodes.
    pub matched_by: &'static str,
    /// The library's version, `13.0`.
    pub version: String,
}

/// One node.
#[derive(Clone, Debug, PartialEq)]
pub struct TracedNode {
    /// The program's step it belongs to; `None` for copies.
    pub step: Option<usize>,
    /// The kernel's symbol, or what is copied.
    pub name: String,
    /// Begin and end in one replay near the median, from that replay's first start.
    pub span_ms: (f64, f64),
    /// Median of its own time; a dependent launch waits inside it for its predecessor.
    pub busy_ms: f64,
    /// Median of the time from the end of everything before it, or from its start if that is later,
    /// to its own end.
    pub share_ms: f64,
}

/// Records and host times of one replay.
struct Replay {
    records: Vec<Activity>,
    host_ns: [u64; 3],
}

impl CudaExecutable {
    /// Replays the graph `runs` times while CUPTI records every node; `cupti` as for
    /// [`Cupti::open`]. `log` hears what a person needs who wonders about the numbers.
    ///
    /// # Errors
    /// `Unavailable` where CUPTI is missing, refuses, or does not tell every kernel's time.
    pub fn trace_replays(
        &mut self,
        cupti: Option<&Path>,
        runs: usize,
        log: &mut dyn FnMut(String),
    ) -> Result<ReplayTrace, BackendError> {
        let cupti = Cupti::open(cupti)?;
        log(format!("{}, version {}", cupti.path, cupti.version));
        let before = median(self.replay_ms(runs)?);
        let traced = self.traced(cupti, runs, log);
        let after = median(self.replay_ms(runs)?);
        log(format!("replays without copies: {before:.3} ms before tracing, {after:.3} after"));
        traced
    }

    fn traced(
        &mut self,
        cupti: &'static Cupti,
        runs: usize,
        log: &mut dyn FnMut(String),
    ) -> Result<ReplayTrace, BackendError> {
        let stream = &self.shared.stream;
        let mut tracing = Tracing::start(cupti)?;
        let (graph, expected) = self.capture_for(&tracing)?;
        let clones = tracing.clones();
        describe(&expected, &clones, log);
        for _ in 0..WARM_UP {
            graph.launch(stream)?;
        }
        stream.synchronize()?;
        let warm_up = tracing.take()?;
        log(format!("{} records of {WARM_UP} replays to warm up", warm_up.len()));
        let mut replays = Vec::with_capacity(runs);
        for _ in 0..runs {
            let mut host_ns = [tracing.now_ns()?, 0, 0];
            graph.launch(stream)?;
            host_ns[1] = tracing.now_ns()?;
            stream.synchronize()?;
            host_ns[2] = tracing.now_ns()?;
            replays.push(Replay { records: tracing.take()?, host_ns });
        }
        for ((kind, bytes), count) in &tracing.sizes {
            log(format!("{count} records of kind {kind} are {bytes} bytes long"));
        }
        drop(tracing);
        describe_records(&replays, log);
        let mut trace = summarise(&expected, &clones, &replays, log)
            .map_err(|text| BackendError::Unavailable(format!("CUPTI's records: {text}")))?;
        for node in &mut trace.nodes {
            // Until here the index of a launch.
            node.step = node.step.map(|launch| self.step_of(launch));
        }
        trace.version = version_text(cupti.version);
        Ok(trace)
    }

    /// The graph that serves requests, captured once more, with CUPTI's numbers of its nodes. All
    /// inputs are copied by it, many images, too.
    fn capture_for(&self, tracing: &Tracing) -> Result<(Graph, Vec<Expected>), BackendError> {
        let (stream, bound, host) = (&self.shared.stream, &self.bound, &self.host);
        let mut kernels = Vec::with_capacity(self.kernel_count());
        let mut copies = Vec::with_capacity(2);
        let id = |stream: &Stream| -> Result<Option<u64>, BackendError> {
            Ok(tracing.node_id(stream.captured_node()?).ok())
        };
        let copy = |name: &str| -> Result<Expected, BackendError> {
            let (kind, name) = (ActivityKind::Copy, name.into());
            Ok(Expected { kind, name, launch: None, id: id(stream)? })
        };
        let graph = Graph::capture(stream, || {
            bound.io.copy_in(stream, 0, host, 0, bound.io_bytes)?;
            copies.push(copy("copy in")?);
            self.plan.issue(&self.shared, self.plan.all(), |stream, at, launch| {
                let (kind, name) = (ActivityKind::Kernel, launch.function.entry().into());
                kernels.push(Expected { kind, name, launch: Some(at), id: id(stream)? });
                Ok(())
            })?;
            bound.io.copy_out(stream, 0, host, 0, actions_bytes(&bound.program))?;
            copies.push(copy("copy out")?);
            Ok(())
        })?;
        stream.synchronize()?;
        // In the order of the program: what ran beside the chain takes a share of the time only
        // if the chain had to wait for it.
        kernels.sort_by_key(|kernel| kernel.launch);
        let last = copies.split_off(1);
        Ok((graph, copies.into_iter().chain(kernels).chain(last).collect()))
    }

    /// The step a launch belongs to. Steps without launches have the same first one as the next.
    fn step_of(&self, launch: usize) -> usize {
        self.plan.first_launch.partition_point(|&first| first <= launch).saturating_sub(1)
    }
}

/// Medians over all replays; `step` of the nodes is the index of their launch.
fn summarise(
    expected: &[Expected],
    clones: &[(u64, u64)],
    replays: &[Replay],
    log: &mut dyn FnMut(String),
) -> Result<ReplayTrace, String> {
    let all = |order: &Order| -> Result<Vec<Vec<Option<&Activity>>>, String> {
        replays.iter().map(|r| order.arrange(expected, &r.records)).collect()
    };
    let by_ids = Order::by_ids(expected, clones)
        .ok_or("CUPTI gave some nodes no number".to_string())
        .and_then(|order| all(&order));
    let (arranged, matched_by) = match by_ids {
        Ok(arranged) => (arranged, "by node"),
        Err(text) => {
            log(format!("nodes can't be told by number ({text}): by the order of their starts"));
            (all(&Order::Time)?, "by order")
        }
    };
    compare_names(expected, &arranged, log);
    // A copy that not every replay has a record of is left out of all.
    let kept: Vec<usize> =
        (0..expected.len()).filter(|&i| arranged.iter().all(|r| r[i].is_some())).collect();
    let spans: Vec<Vec<(u64, u64)>> = arranged
        .iter()
        .map(|nodes| {
            let of = |&i: &usize| nodes[i].map(|r| (r.start_ns, r.end_ns));
            kept.iter().filter_map(of).collect()
        })
        .collect();
    let shares: Vec<Vec<(u64, u64)>> = spans.iter().map(|s| shares(s)).collect();
    let totals: Vec<u64> = shares.iter().map(|s| s.iter().map(|n| n.0 + n.1).sum()).collect();
    let idle = shares.iter().map(|s| ms(s.iter().map(|n| n.1).sum())).collect();
    let replay_ms = median(totals.iter().map(|&ns| ms(ns)).collect());
    let off = |i: &usize| (ms(totals[*i]) - replay_ms).abs();
    let drawn = (0..totals.len()).min_by(|a, b| off(a).total_cmp(&off(b)));
    let drawn = drawn.ok_or("there are none")?;
    let zero = spans[drawn].first().map_or(0, |s| s.0);
    let from_zero = |ns: u64| (ns as i128 - zero as i128) as f64 / 1e6;
    let node = |(at, &i): (usize, &usize)| TracedNode {
        step: expected[i].launch,
        name: expected[i].name.clone(),
        span_ms: (from_zero(spans[drawn][at].0), from_zero(spans[drawn][at].1)),
        busy_ms: median(spans.iter().map(|s| ms(s[at].1 - s[at].0)).collect()),
        share_ms: median(shares.iter().map(|s| ms(s[at].0)).collect()),
    };
    Ok(ReplayTrace {
        nodes: kept.iter().enumerate().map(node).collect(),
        replay_ms,
        idle_ms: median(idle),
        host_ms: replays[drawn].host_ns.map(from_zero),
        replays: replays.len(),
        matched_by,
        version: String::new(),
    })
}

fn describe(expected: &[Expected], clones: &[(u64, u64)], log: &mut dyn FnMut(String)) {
    let kernels = expected.iter().filter(|e| e.kind == ActivityKind::Kernel).count();
    let numbered = expected.iter().filter(|e| e.id.is_some()).count();
    log(format!(
        "{} nodes captured, {kernels} of them kernels, {numbered} with a number; {} clones",
        expected.len(),
        clones.len()
    ));
    let ids: Vec<Option<u64>> = expected.iter().take(4).map(|e| e.id).collect();
    let some = &clones[..clones.len().min(4)];
    log(format!("first numbers {ids:?}; first clones (clone, original) {some:?}"));
}

fn describe_records(replays: &[Replay], log: &mut dyn FnMut(String)) {
    let counts: BTreeSet<usize> = replays.iter().map(|r| r.records.len()).collect();
    let all = || replays.iter().flat_map(|r| &r.records);
    let set = |of: fn(&Activity) -> u32| all().map(of).collect::<BTreeSet<u32>>();
    let (graphs, streams) = (set(|r| r.graph), set(|r| r.stream));
    let launches = set(|r| r.correlation).len();
    log(format!(
        "records of a replay: {counts:?}; {launches} launches of graphs {graphs:?} on streams \
         {streams:?}"
    ));
    if let Some(replay) = replays.first() {
        for r in replay.records.iter().take(4) {
            log(format!("for example {r:?}"));
        }
    }
}

fn compare_names(
    expected: &[Expected],
    arranged: &[Vec<Option<&Activity>>],
    log: &mut dyn FnMut(String),
) {
    let Some(nodes) = arranged.first() else { return };
    let pairs = expected.iter().zip(nodes).filter_map(|(e, r)| Some((&e.name, r.as_ref()?)));
    let named = pairs.filter_map(|(name, r)| Some((name, r.name.as_ref()?)));
    let (same, other): (Vec<_>, Vec<_>) = named.partition(|(want, got)| want == got);
    log(format!("{} kernels have the name expected, {} another", same.len(), other.len()));
    if let Some((want, got)) = other.first() {
        log(format!("for example `{got}` where the graph has `{want}`"));
    }
}

fn version_text(version: u32) -> String {
    match version {
        130_000.. => format!("{}.{}", version / 10_000, version / 100 % 100),
        _ => format!("12 (API {version})"),
    }
}

fn ms(ns: u64) -> f64 {
    ns as f64 / 1e6
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace_order::tests::{expected, records};

    fn replay(base: u64, at: u64) -> Replay {
        Replay { records: records(base, at), host_ns: [at - 50, at - 40, at + 80] }
    }

    #[test]
    fn medians_over_replays_in_the_order_of_the_graph() {
        let clones: Vec<(u64, u64)> = (10..15).map(|n| (n + 100, n)).collect();
        let mut replays = [replay(100, 1_000_000), replay(100, 2_000_000), replay(100, 3_000_000)];
        // One replay in which the copy out took its time.
        replays[2].records[2].end_ns += 1000;
        let mut lines = Vec::new();
        let trace =
            summarise(&expected(), &clones, &replays, &mut |line| lines.push(line)).unwrap();
        assert_eq!((trace.matched_by, trace.replays), ("by node", 3));
        let names: Vec<&str> = trace.nodes.iter().map(|n| n.name.as_str()).collect();
        assert_eq!(names, ["copy in", "a", "b", "a", "copy out"]);
        let near = |got: f64, want_ns: f64| assert!((got - want_ns / 1e6).abs() < 1e-12, "{got}");
        near(trace.replay_ms, 65.0);
        near(trace.idle_ms, 3.0);
        for (node, (busy, share, from)) in trace.nodes.iter().zip([
            (10.0, 10.0, 0.0),
            (8.0, 8.0, 12.0),
            (12.0, 10.0, 18.0),
            (35.0, 30.0, 25.0),
            (4.0, 4.0, 61.0),
        ]) {
            near(node.busy_ms, busy);
            near(node.share_ms, share);
            near(node.span_ms.0, from);
        }
        near(trace.host_ms[0], -50.0);
        near(trace.host_ms[2], 80.0);
        assert!(lines.iter().any(|l| l.contains("3 kernels have the name")), "{lines:?}");
    }

    #[test]
    fn unknown_numbers_fall_back_to_the_order_and_say_so() {
        let replays = [replay(900, 1_000_000), replay(900, 2_000_000)];
        let mut lines = Vec::new();
        let trace = summarise(&expected(), &[], &replays, &mut |line| lines.push(line)).unwrap();
        assert_eq!(trace.matched_by, "by order");
        assert_eq!(trace.nodes[2].step, Some(1));
        assert!(lines.iter().any(|l| l.contains("none of the graph's")), "{lines:?}");
    }

    #[test]
    fn a_kernel_without_a_record_is_an_error() {
        let mut broken = replay(0, 1_000_000);
        broken.records.remove(0);
        let replays = [replay(0, 2_000_000), broken];
        let error = summarise(&expected(), &[], &replays, &mut |_| {}).unwrap_err();
        assert!(error.contains("2 kernels were recorded in a replay of 3"), "{error}");
        assert!(summarise(&expected(), &[], &[], &mut |_| {}).is_err());
    }

    #[test]
    fn a_copy_without_records_is_left_out() {
        let mut replays = [replay(0, 1_000_000), replay(0, 2_000_000)];
        for r in &mut replays {
            r.records.remove(4);
        }
        let trace = summarise(&expected(), &[], &replays, &mut |_| {}).unwrap();
        assert_eq!(trace.nodes.len(), 4);
        assert_eq!((trace.nodes[0].step, trace.nodes[0].share_ms), (Some(0), 8.0 / 1e6));
    }

    #[test]
    fn versions_are_read() {
        assert_eq!(version_text(130_001), "13.0");
        assert_eq!(version_text(130_401), "13.4");
        assert_eq!(version_text(28), "12 (API 28)");
    }
}
