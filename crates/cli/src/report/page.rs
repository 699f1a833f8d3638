//! Measurements → the blocks of a page.

use super::data::{ModelReport, Published, Report};
use super::html::{Block, filled};
use super::plot::{Bar, Bars, Lines, Plot};
use crate::ladder;
use crate::profile::{
    GROUP_HEADER, Group, KERNEL_HEADER, STAGES, Timing, gaps, kernel_rows, milliseconds, percent,
    rows as group_rows,
};
use crate::provenance::Provenance;
use crate::text::scaled;

/// The whole page.
pub fn page(report: &Report, published: Option<&Published>) -> Vec<Block> {
    let mut page = vec![
        Block::Heading(1, "Pirouette report".into()),
        Block::Text(report.measured()),
        Block::Text(format!(
            "Milliseconds of a run: {}, unless a column says otherwise.",
            report.clock
        )),
        headline(report),
    ];
    page.extend(sweep_plots(report));
    for model in &report.models {
        page.extend(model_section(model));
    }
    if let Some(published) = published {
        page.extend(published_section(report, published));
    }
    page
}

/// Header cells.
pub fn cells<const N: usize>(names: [&str; N]) -> Vec<String> {
    names.map(String::from).into()
}

fn optional(ms: Option<f64>) -> String {
    ms.map_or("–".into(), milliseconds)
}

fn limit_ms(model: &ModelReport) -> f64 {
    model.profile.breakdown.stages.iter().map(|s| s.limit_ms).sum()
}

fn headline(report: &Report) -> Block {
    let header = cells([
        "model",
        "device",
        "weights",
        "ms",
        "device only",
        "limit",
        "best samples/s",
        "at batch",
    ]);
    let row = |m: &ModelReport| {
        let best = m.batches.iter().max_by(|a, b| a.samples_per_s.total_cmp(&b.samples_per_s));
        vec![
            m.model.clone(),
            m.device.clone(),
            m.precision.clone(),
            milliseconds(m.profile.end_to_end_ms),
            optional(m.profile.device_ms),
            milliseconds(limit_ms(m)),
            best.map_or("–".into(), |b| milliseconds(b.samples_per_s)),
            best.map_or("–".into(), |b| b.workload.batch.to_string()),
        ]
    };
    filled(header, report.models.iter().map(row).collect())
}

fn sweep_plots(report: &Report) -> Vec<Block> {
    let swept: Vec<&ModelReport> = report.models.iter().filter(|m| m.batches.len() > 1).collect();
    if swept.is_empty() {
        return vec![];
    }
    let one_device = swept.windows(2).all(|w| w[0].device == w[1].device);
    let lines = |title: &str, value: fn(&Timing) -> f64| {
        let series = |m: &&ModelReport| {
            let name = if one_device { m.name() } else { m.title() };
            let point = |t: &Timing| (t.workload.batch as f64, value(t));
            (name, m.batches.iter().map(point).collect())
        };
        let series = swept.iter().map(series).collect();
        Block::Plot(Plot::Lines(Lines { title: title.into(), series }))
    };
    vec![
        lines("Throughput over the batch size, samples/s", |t| t.samples_per_s),
        lines("Latency over the batch size, median ms", |t| t.p50_ms),
    ]
}

/// Header of [`timing_row`].
pub const TIMING_HEADER: [&str; 9] =
    ["", "p50", "p99", "min", "device only", "vision", "prefill", "denoise", "samples/s"];

fn timing_row(name: String, t: &Timing) -> Vec<String> {
    let [vision, prefill, denoise] = t.stage_ms.map(milliseconds);
    let total = [t.p50_ms, t.p99_ms, t.min_ms].map(milliseconds);
    let mut row = vec![name];
    row.extend(total);
    row.extend([optional(t.device_ms), vision, prefill, denoise, milliseconds(t.samples_per_s)]);
    row
}

/// When and by what, on which machine, with which command; older files tell less.
fn origin(provenance: &Provenance) -> Vec<String> {
    let mut made = format!("Measured on {} by Pirouette {}", provenance.date, provenance.version);
    if let Some(commit) = &provenance.commit {
        made.push_str(&format!(", commit {commit}"));
    }
    let machine = &provenance.machine;
    let cores = Some(machine.cores).filter(|&n| n > 0).map(|n| format!("{n} cores"));
    let memory = machine.memory_bytes.map(|n| format!("{}B of memory", scaled(n as f64)));
    let load = machine.load_average.as_ref().map(|load| format!("load average {load}"));
    let parts: Vec<String> =
        [machine.cpu.clone(), cores, memory, load].into_iter().flatten().collect();
    let mut lines = vec![made];
    if !parts.is_empty() {
        lines.push(format!("Machine: {}", parts.join(", ")));
    }
    if !provenance.command.is_empty() {
        lines.push(format!("Command: {}", provenance.command));
    }
    lines
}

fn model_section(m: &ModelReport) -> Vec<Block> {
    let p = &m.profile;
    let mut blocks = vec![
        Block::Heading(2, m.title()),
        Block::Text(format!(
            "{}, {}, {}B at rest. {}.",
            m.weights,
            m.precision,
            scaled(m.weight_bytes as f64),
            p.workload.text()
        )),
        Block::List(origin(&m.provenance)),
    ];
    blocks.push(Block::Heading(3, "Batch sizes, ms".into()));
    let mut header = TIMING_HEADER;
    header[0] = "batch";
    let rows = m.batches.iter().map(|t| timing_row(t.workload.batch.to_string(), t));
    blocks.push(filled(cells(header), rows.collect()));
    if !m.shapes.is_empty() {
        blocks.push(Block::Heading(3, "Other shapes at batch 1, ms".into()));
        let rows = m.shapes.iter().map(|t| timing_row(t.workload.short(), t));
        blocks.push(filled(cells(TIMING_HEADER), rows.collect()));
    }
    blocks.extend(stages(m));
    blocks.extend(profile(m));
    for l in &m.ladders {
        blocks.extend(ladder_section(l));
    }
    blocks
}

fn stages(m: &ModelReport) -> Vec<Block> {
    let p = &m.profile;
    let limit =
        |name: &str| p.breakdown.stages.iter().find(|s| s.name == name).map_or(0.0, |s| s.limit_ms);
    let mut rows = Vec::new();
    let mut bars = Vec::new();
    let named = STAGES.iter().map(|(_, name)| *name).zip(p.stage_ms);
    let (sum, limits): (f64, f64) = (p.stage_ms.iter().sum(), limit_ms(m));
    let sum = std::iter::once(("sum", sum));
    for (name, ms) in named.chain(sum) {
        let limit = if name == "sum" { limits } else { limit(name) };
        let of = if ms > 0.0 { percent(limit / ms) } else { "–".into() };
        rows.push(vec![name.into(), milliseconds(ms), milliseconds(limit), of]);
        bars.push(Bar { label: name.into(), value: ms, mark: Some(limit) });
    }
    let title = format!("{}: stages, ms", m.name());
    let mark = Some("the limit: all arithmetic, or all weight traffic".into());
    vec![
        Block::Heading(3, "Stages against their limits".into()),
        Block::Plot(Plot::Bars(Bars { title, mark, bars })),
        Block::Table(cells(["stage", "ms", "limit ms", "of limit"]), rows),
        Block::Text(format!("Limits at {}.", p.limits.text())),
    ]
}

fn profile(m: &ModelReport) -> Vec<Block> {
    let p = &m.profile;
    let header = |first: &str| {
        let mut header = GROUP_HEADER;
        header[0] = first;
        cells(header)
    };
    let gap = |g: &Group| {
        vec![g.name.clone(), milliseconds(g.ms), milliseconds(g.limit_ms), milliseconds(g.gap_ms())]
    };
    let b = &p.breakdown;
    let largest = gaps(&b.kinds, 5).into_iter().map(gap).collect();
    let mut facts = vec![format!("Step times: {}.", p.step_clock)];
    facts.push(format!("End to end: {} ms.", milliseconds(p.end_to_end_ms)));
    if let Some(ms) = p.device_ms {
        facts.push(format!("Device only: {} ms.", milliseconds(ms)));
    }
    if let Some(kernels) = p.kernels {
        let steps: usize = b.categories.iter().map(|c| c.steps).sum();
        facts.push(format!("{kernels} kernels for {steps} steps."));
    }
    let mut blocks = vec![Block::Heading(3, "Where the time goes".into()), Block::List(facts)];
    if !p.kernel_groups.is_empty() {
        blocks.push(Block::Table(cells(KERNEL_HEADER), kernel_rows(&p.kernel_groups)));
    }
    blocks.extend([
        Block::Table(header("category"), group_rows(&b.categories, true)),
        Block::Table(header("kind of step"), group_rows(&b.kinds, false)),
        Block::Heading(3, "The largest gaps to the limit".into()),
        Block::Table(cells(["kind of step", "ms", "limit ms", "gap ms"]), largest),
    ]);
    blocks
}

fn ladder_section(l: &ladder::Ladder) -> Vec<Block> {
    let bar = |r: &ladder::Rung| Bar { label: r.name.clone(), value: r.timing.p50_ms, mark: None };
    let bars = l.rungs.iter().map(bar).collect();
    let same = l.rungs.windows(2).all(|w| w[0].timing.workload == w[1].timing.workload);
    let changes = l.rungs.iter().map(|r| {
        let runs = match r.timing.runs {
            1 => "1 run".into(),
            n => format!("{n} runs"),
        };
        let what = if same { String::new() } else { format!("{}, ", r.timing.workload.short()) };
        format!("{}: {} ({what}{runs})", r.name, r.change)
    });
    vec![
        Block::Heading(3, format!("Ladder: {}", l.title)),
        Block::Text(format!("Each rung keeps what the ones above it brought. Clock: {}.", l.clock)),
        Block::Plot(Plot::Bars(Bars { title: "median ms".into(), mark: None, bars })),
        Block::Table(cells(ladder::HEADER), ladder::rows(l)),
        Block::List(changes.collect()),
    ]
}

fn published_section(report: &Report, published: &Published) -> Vec<Block> {
    let header = cells([
        "system",
        "GPU",
        "model",
        "shape",
        "ms",
        "samples/s",
        "how",
        "ours, ms",
        "ours is × faster",
        "ours is",
        "source",
    ]);
    let mut rows = Vec::new();
    for r in &published.rows {
        let ours = r.ours(&report.models);
        let factor = ours.and_then(|(_, t)| Some(r.run_ms()? / t.p50_ms));
        let source = match &r.note {
            Some(note) => format!("{} ({note})", r.source),
            None => r.source.clone(),
        };
        rows.push(vec![
            r.system.clone(),
            r.gpu.clone(),
            r.model.clone().unwrap_or("–".into()),
            r.shape(),
            optional(r.ms),
            optional(r.samples_per_s),
            r.measured.clone(),
            optional(ours.map(|(_, t)| t.p50_ms)),
            factor.map_or("–".into(), |f| format!("{f:.2}")),
            ours.map_or("–".into(), |(m, _)| format!("{} on {}", m.precision, m.device)),
            source,
        ]);
    }
    vec![
        Block::Heading(2, "Published by others".into()),
        Block::Text(format!(
            "{} Clocks and cards differ from system to system; “ours” is the median above at the \
             same full-size model and shape, on the same GPU where that was measured.",
            published.note
        )),
        filled(header, rows),
    ]
}
