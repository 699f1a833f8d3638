//! `pirouette golden`: a device against openpi's recorded answers.

use anyhow::{Result, bail};
use pirouette_model::{BackendError, Device, Family};
use pirouette_testing::golden::{tiny_config, tiny_source};
use pirouette_testing::parity::{self, Bar, FULL_SEED, Parity};
use serde::Serialize;

use crate::args::{DeviceArgs, GoldenArgs, ModelName, Precision};
use crate::device;
use crate::log;
use crate::text::{table, writable, write_json};
use crate::weights::Weights;

#[derive(Serialize)]
struct Row {
    case: String,
    relative_l2: f64,
    max_abs: f64,
    bar: f64,
    bar_on: &'static str,
    holds: bool,
}

/// Runs the cases; fails when one is over its bar.
pub fn run(args: &GoldenArgs) -> Result<()> {
    writable(&args.json)?;
    let bar = match args.device.precision {
        Precision::F32 => Bar::F32,
        Precision::Bf16 => Bar::Bf16,
        Precision::Fp8 => Bar::Fp8,
    };
    let models = match args.model {
        Some(model) => vec![model],
        None => vec![ModelName::Pi0, ModelName::Pi05],
    };
    let mut rows = Vec::new();
    for &model in &models {
        rows.extend(tiny(model.config().family, &args.device, bar)?);
    }
    if args.full {
        for &model in &models {
            let weights = Weights::synthetic(model.config(), FULL_SEED);
            let mut opened = device::open(&args.device, weights.config, 10, weights.source())?;
            log::note(format_args!(
                "{} full size on {}",
                model.config().family.name(),
                opened.device().name()
            ));
            let report = |p: &Parity| log::note(format_args!("{}: {:.3e}", p.case, p.relative_l2));
            rows.extend(parity::full(opened.device(), &weights.config, bar, report)?);
        }
    }
    let failed: Vec<&str> = rows.iter().filter(|p| !p.holds()).map(|p| p.case.as_str()).collect();
    let failed = failed.join(", ");
    let rows: Vec<Row> = rows.iter().map(row).collect();
    match &args.json {
        Some(path) => write_json(path, &rows)?,
        None => print(&rows),
    }
    if !failed.is_empty() {
        bail!("over the bar: {failed}");
    }
    Ok(())
}

fn tiny(family: Family, args: &DeviceArgs, bar: Bar) -> Result<Vec<Parity>> {
    let config = tiny_config(family)?;
    let source = tiny_source(family)?;
    let mut reload = |steps: usize| -> Result<Box<dyn Device>, BackendError> {
        device::open(args, config, steps, &source)
            .map(device::Opened::boxed)
            .map_err(|e| BackendError::Unavailable(format!("{e:#}")))
    };
    Ok(parity::tiny(&mut reload, &config, bar)?)
}

fn row(p: &Parity) -> Row {
    Row {
        case: p.case.clone(),
        relative_l2: p.relative_l2,
        max_abs: p.max_abs,
        bar: p.bar,
        bar_on: if p.absolute { "max abs" } else { "relative L2" },
        holds: p.holds(),
    }
}

fn print(rows: &[Row]) {
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|r| {
            vec![
                r.case.clone(),
                format!("{:.2e}", r.relative_l2),
                format!("{:.2e}", r.max_abs),
                format!("{:.2e} {}", r.bar, r.bar_on),
                if r.holds { "holds".into() } else { "FAILS".into() },
            ]
        })
        .collect();
    print!("{}", table(&["case", "relative L2", "max abs", "bar", ""], &cells));
}
