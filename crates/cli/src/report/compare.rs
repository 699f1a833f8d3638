//! Two saved reports → tables of what changed.

use super::data::{ModelReport, Report};
use super::html::Block;
use super::page::cells;
use crate::profile::{Group, Timing, milliseconds};

/// The page of a comparison; `names` are what to call the two.
pub fn page(a: &Report, b: &Report, names: [&str; 2]) -> Vec<Block> {
    let mut blocks = vec![
        Block::Heading(1, "Pirouette comparison".into()),
        Block::List(vec![
            format!("A: {} ({})", names[0], a.measured()),
            format!("B: {} ({})", names[1], b.measured()),
        ]),
        Block::Text("A / B above 1: B is that many times faster.".into()),
    ];
    let pairs: Vec<_> = a.models.iter().map(|m| (m, partner(m, a, b))).collect();
    let mut alone = Vec::new();
    for &(m, n) in &pairs {
        match n {
            Some(n) => blocks.extend(models(m, n)),
            None => alone.push(format!("{} is in A only", m.title())),
        }
    }
    let new = b.models.iter().filter(|&n| pairs.iter().all(|&(_, p)| p != Some(n)));
    alone.extend(new.map(|n| format!("{} is in B only", n.title())));
    if !alone.is_empty() {
        blocks.push(Block::List(alone));
    }
    blocks
}

/// What of B a model of A is compared with: itself; else the same at this precision on another
/// device, or else at another one, unless that is something else of A.
fn partner<'a>(m: &ModelReport, a: &Report, b: &'a Report) -> Option<&'a ModelReport> {
    let same = |m: &ModelReport, n: &ModelReport| m.title() == n.title();
    let free = |n: &&ModelReport| same(m, n) || a.models.iter().all(|other| !same(other, n));
    let of_model = b.models.iter().filter(|n| n.model == m.model).filter(free);
    of_model.min_by_key(|n| (!same(m, n), n.precision != m.precision))
}

fn models(a: &ModelReport, b: &ModelReport) -> Vec<Block> {
    let timing = |t: &Timing| {
        let other = b.timings().find(|o| o.workload == t.workload)?;
        let name = format!("batch {} · {}", t.workload.batch, t.workload.text());
        let mut row = vec![name];
        row.extend(pair(t.p50_ms, other.p50_ms));
        row.extend([milliseconds(t.p99_ms), milliseconds(other.p99_ms)]);
        Some(row)
    };
    let group = |a: &Group, others: &[Group]| {
        let other = others.iter().find(|o| o.name == a.name)?;
        let mut row = vec![a.name.clone()];
        row.extend(pair(a.ms, other.ms));
        row.push(milliseconds(a.limit_ms));
        Some(row)
    };
    let groups = |a: &[Group], b: &[Group]| a.iter().filter_map(|g| group(g, b)).collect();
    let (pa, pb) = (&a.profile.breakdown, &b.profile.breakdown);
    let group_header = |first: &str| cells([first, "A ms", "B ms", "A / B", "limit of A"]);
    let rungs =
        |m: &ModelReport| m.ladders.iter().flat_map(|l| l.rungs.clone()).collect::<Vec<_>>();
    let theirs = rungs(b);
    let rung_row = |r: crate::ladder::Rung| {
        let same =
            |o: &&crate::ladder::Rung| o.name == r.name && o.timing.workload == r.timing.workload;
        let other = theirs.iter().find(same)?;
        let mut row = vec![r.name.clone()];
        row.extend(pair(r.timing.p50_ms, other.timing.p50_ms));
        Some(row)
    };
    let rungs: Vec<Vec<String>> = rungs(a).into_iter().filter_map(rung_row).collect();
    let title = match a.precision == b.precision {
        true => a.name(),
        false => format!("{} against {}", a.name(), b.name()),
    };
    let mut blocks = vec![
        Block::Heading(2, title),
        Block::List(vec![
            format!("A: {}, {}, {}", a.device, a.precision, a.weights),
            format!("B: {}, {}, {}", b.device, b.precision, b.weights),
        ]),
        Block::Heading(3, "Whole runs, ms".into()),
        Block::Table(
            cells(["", "A p50", "B p50", "A / B", "A p99", "B p99"]),
            a.timings().filter_map(timing).collect(),
        ),
        Block::Heading(3, "Steps, ms".into()),
        Block::Table(group_header("stage"), groups(&pa.stages, &pb.stages)),
        Block::Table(group_header("category"), groups(&pa.categories, &pb.categories)),
        Block::Table(group_header("kind of step"), groups(&pa.kinds, &pb.kinds)),
    ];
    if !rungs.is_empty() {
        blocks.push(Block::Heading(3, "Ladder, ms".into()));
        blocks.push(Block::Table(cells(["choice", "A p50", "B p50", "A / B"]), rungs));
    }
    blocks
}

fn pair(a: f64, b: f64) -> [String; 3] {
    let ratio = if b > 0.0 { format!("{:.2}", a / b) } else { "–".into() };
    [milliseconds(a), milliseconds(b), ratio]
}
