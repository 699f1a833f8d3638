//! `pirouette golden`: a device against openpi's recorded answers.

use anyhow::{Result, bail};
use pirouette_model::{BackendError, Device, Family};
use pirouette_testing::golden::{tiny_config, tiny_source};
use pirouette_testing::parity::{self, Bar, FULL_SEED, Parity};
use serde::Serialize;

use crate::args::{DeviceArgs, GoldenArgs, ModelName, Precision};
use crate::device;
use crate::log;
use crate::provenance::Provenance;
use crate::text::{table, writable, write_json};
use crate::weights::Weights;

#[derive(Serialize)]
struct Row {
    #[serde(flatten)]
    provenance: Provenance,
    device: String,
    precision: &'static str,
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
    let mut name = String::new();
    for &model in &models {
        let (device, cases) = tiny(model.config().family, &args.device, bar)?;
        rows.extend(cases);
        name = device;
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
    let (provenance, precision) = (Provenance::here(), args.device.precision.name());
    let row = |p| row(p, provenance.clone(), name.clone(), precision);
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

/// The device's name, and its cases.
fn tiny(family: Family, args: &DeviceArgs, bar: Bar) -> Result<(String, Vec<Parity>)> {
    let config = tiny_config(family)?;
    let source = tiny_source(family)?;
    let mut name = String::new();
    let mut reload = |steps: usize| -> Result<Box<dyn Device>, BackendError> {
        let opened = device::open(args, config, steps, &source);
        let device = opened.map_err(|e| BackendError::Unavailable(format!("{e:#}")))?.boxed();
        name = device.name();
        Ok(device)
    };
    let cases = parity::tiny(&mut reload, &config, bar)?;
    Ok((name, cases))
}

fn row(p: &Parity, provenance: Provenance, device: String, precision: &'static str) -> Row {
    Row {
        provenance,
        device,
        precision,
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
