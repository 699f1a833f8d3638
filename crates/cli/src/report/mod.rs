//! `pirouette report`: every measurement of both models on one page; or saved ones compared.

mod compare;
mod data;
mod html;
mod page;
mod plot;

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use pirouette_model::{Config, Shape, WeightTable, record, record_with};

use crate::args::{ReportArgs, RopeArgs, WeightArgs};
use crate::device;
use crate::ladder::{self, WHOLE};
use crate::log;
use crate::profile::{
    Limits, Meter, Repeats, Workload, compile, limits, measure, step_times, time,
};
use crate::provenance::Provenance;
use crate::text::{writable, write_json};
use crate::weights::Weights;
use data::{ModelReport, Published, Report, read};
use html::{Block, html, markdown};

/// Measures (or reads), then writes the page.
pub fn run(args: &ReportArgs) -> Result<()> {
    // Before hours of measuring: a mistyped file should not cost them.
    writable(args.json.iter().chain(&args.html).chain(&args.markdown))?;
    if let [a, b] = args.compare.as_slice() {
        let names = [a, b].map(|p| p.display().to_string());
        let (left, right): (Report, Report) = (Report::read(a)?, Report::read(b)?);
        let page = compare::page(&left, &right, [&names[0], &names[1]]);
        return write_page(args, "Pirouette comparison", &page);
    }
    let published: Option<Published> = args.published.as_deref().map(read).transpose()?;
    let report = if args.from.is_empty() { measure_all(args)? } else { merge(&args.from)? };
    if let Some(path) = &args.json {
        write_json(path, &report)?;
    }
    write_page(args, "Pirouette report", &page::page(&report, published.as_ref()))
}

fn write_page(args: &ReportArgs, title: &str, page: &[Block]) -> Result<()> {
    let write = |path: &Path, text: String| {
        if path.as_os_str() == "-" {
            print!("{text}");
            return Ok(());
        }
        std::fs::write(path, text).with_context(|| format!("can't write {}", path.display()))
    };
    if let Some(path) = &args.html {
        write(path, html(title, page))?;
    }
    if let Some(path) = &args.markdown {
        write(path, markdown(page))?;
    }
    if args.html.is_none() && args.markdown.is_none() && args.json.is_none() {
        print!("{}", markdown(page));
    }
    Ok(())
}

fn merge(files: &[std::path::PathBuf]) -> Result<Report> {
    let mut parts = files.iter().map(|file| Report::read(file)).collect::<Result<Vec<_>>>()?;
    let mut whole = parts.remove(0);
    for part in parts {
        // Each model says where it is from; together they are from here.
        whole.provenance = Provenance::here();
        whole.models.extend(part.models);
    }
    Ok(whole)
}

fn measure_all(args: &ReportArgs) -> Result<Report> {
    let mut report = Report { provenance: Provenance::here(), clock: WHOLE.into(), models: vec![] };
    // A checkpoint says itself which model it is.
    let count = if args.checkpoint.is_some() { 1 } else { args.models.len() };
    let models: Vec<WeightArgs> = args.models[..count.min(args.models.len())]
        .iter()
        .map(|&model| WeightArgs {
            checkpoint: args.checkpoint.clone(),
            model,
            weight_seed: args.weight_seed,
            // It does not change the work.
            rope: RopeArgs::default(),
        })
        .collect();
    for weights in &models {
        report.models.push(measure_model(args, &Weights::open(weights)?)?);
    }
    // Last: what traces a GPU may slow what is measured after it in the same process.
    for (weights, model) in models.iter().zip(&mut report.models) {
        if model.device.starts_with("cuda") {
            trace_model(args, &Weights::open(weights)?, model)?;
        }
    }
    Ok(report)
}

/// Step times from inside the graph, if the tracing library is there.
fn trace_model(args: &ReportArgs, weights: &Weights, model: &mut ModelReport) -> Result<()> {
    let config = weights.config;
    let mut opened = device::open(&args.device, config, args.shape.steps, weights.source())?;
    let repeats = Repeats::choose(&model.device, args.runs, args.warmup)?;
    let program = Arc::new(record(&config, args.shape.shape(1))?);
    let mut meter = compile(&mut opened, program.clone())?;
    let steps = step_times(meter.as_mut(), &program, &config, repeats, Some(&args.tracing))?;
    if steps.replay.is_some() {
        model.profile.attribute(&program, &steps);
    }
    Ok(())
}

fn measure_model(args: &ReportArgs, weights: &Weights) -> Result<ModelReport> {
    let config = weights.config;
    let mut opened = device::open(&args.device, config, args.shape.steps, weights.source())?;
    let name = opened.device().name();
    log::note(format_args!("{} · {name} · {}", config.family.name(), weights.origin));
    let limits: Limits = limits(&name, &args.device, &args.rates)?;
    let repeats = Repeats::choose(&name, args.runs, args.warmup)?;
    let table = Arc::new(WeightTable::new(config, args.shape.steps));
    let mut meter_of = |shape: Shape| -> Result<Box<dyn Meter>> {
        let workload = Workload::from(shape);
        log::note(format_args!("batch {} · {}", workload.batch, workload.text()));
        compile(&mut opened, Arc::new(record_with(table.clone(), shape)?))
    };
    let mut time_all = |shapes: Vec<Shape>| -> Result<Vec<_>> {
        let one = |shape| time(meter_of(shape)?.as_mut(), &config, shape, repeats);
        shapes.into_iter().map(one).collect()
    };
    let batches = time_all(batches(args, &name).iter().map(|&b| args.shape.shape(b)).collect())?;
    let shapes = time_all(other_shapes(args.shape.shape(1)))?;
    let program = record_with(table.clone(), args.shape.shape(1))?;
    let mut meter = meter_of(args.shape.shape(1))?;
    let profile = measure(meter.as_mut(), &program, &config, repeats, limits, None)?.profile;
    let weight_bytes = opened.device().weight_bytes();
    // The ladder loads the weights anew: two copies at a time are enough for small machines.
    drop((meter, opened));
    let shape = args.shape.shape(1);
    let ladders = if args.no_ladder {
        vec![]
    } else {
        ladder::climb(weights, &args.device, shape, args.runs, args.warmup)?.1
    };
    Ok(ModelReport {
        provenance: Provenance::here(),
        model: config.family.name().into(),
        full_size: is_full_size(&config),
        device: name,
        weights: weights.origin.clone(),
        precision: args.device.precision.name().into(),
        weight_bytes,
        batches,
        shapes,
        profile,
        ladders,
    })
}

/// Whether this is the released model's size; how RoPE is rounded does not change the work.
fn is_full_size(config: &Config) -> bool {
    [Config::pi0(), Config::pi05()]
        .into_iter()
        .any(|full| *config == Config { rope_bf16: config.rope_bf16, ..full })
}

fn batches(args: &ReportArgs, device: &str) -> Vec<usize> {
    match (args.batch.as_slice(), device.starts_with("cpu")) {
        ([], true) => vec![1],
        ([], false) => vec![1, 2, 4, 8, 16, 32, 64],
        (typed, _) => typed.to_vec(),
    }
}

/// The shapes every table of this project reports beside the one asked for.
fn other_shapes(shape: Shape) -> Vec<Shape> {
    let long = Shape { horizon: 50, ..shape };
    let padded = Shape { horizon: 50, prompt_tokens: 200, ..shape };
    let two_cameras = Shape { cameras: 2, ..shape };
    let mut shapes = vec![long, padded, two_cameras, Shape { cameras: 2, ..long }];
    shapes.retain(|s| *s != shape);
    shapes.dedup();
    shapes
}

#[cfg(test)]
mod tests;
