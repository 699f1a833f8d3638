//! A device → the rates its limits are computed for, and where they come from.

use anyhow::{Result, bail};
use pirouette_cpu::{Isa, probe};
use pirouette_model::cost::Rates;
use serde::{Deserialize, Serialize};

use crate::args::{DeviceArgs, Precision, RateArgs};

/// Rates with their origin.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// Matrix products, TFLOP/s.
    pub tflops: f64,
    /// Weight bytes from memory, TB/s.
    pub tbps: f64,
    /// Bytes of a stored matrix element.
    pub weight_bytes: f64,
    /// Whether products that are E4M3 at `fp8` have a byte an element and twice the rate.
    #[serde(default)]
    pub e4m3: bool,
    /// How they were found.
    pub origin: String,
}

impl Limits {
    /// For the cost functions.
    pub fn rates(&self) -> Rates {
        Rates {
            flops: self.tflops * 1e12,
            bandwidth: self.tbps * 1e12,
            weight_bytes: self.weight_bytes,
            e4m3: self.e4m3,
        }
    }

    /// The rates for people, and where they come from.
    pub fn text(&self) -> String {
        let twice = if self.e4m3 { " (E4M3 twice that)" } else { "" };
        let (tflops, tbps, origin) = (self.tflops, self.tbps, &self.origin);
        format!("{tflops:.2} TFLOP/s{twice} and {tbps:.3} TB/s: {origin}")
    }
}

/// Typed rates, else an H200's as measured for a GPU, else this CPU's, measured now.
pub fn limits(device: &str, args: &DeviceArgs, typed: &RateArgs) -> Result<Limits> {
    let weight_bytes = args.precision.matrix_bytes();
    // The CPU holds E4M3 numbers as bf16.
    let e4m3 = args.precision == Precision::Fp8 && !device.starts_with("cpu");
    let made = |tflops: f64, tbps: f64, origin: String| {
        if !(tflops > 0.0 && tbps > 0.0 && tflops.is_finite() && tbps.is_finite()) {
            bail!(
                "limits need rates above zero, not {tflops} and {tbps}: give --tflops and --tbps"
            );
        }
        Ok(Limits { tflops, tbps, weight_bytes, e4m3, origin })
    };
    if let (Some(tflops), Some(tbps)) = (typed.tflops, typed.tbps) {
        return made(tflops, tbps, "as typed".into());
    }
    let (tflops, tbps, origin) = if device.starts_with("cpu") {
        cpu(args)?
    } else {
        let origin = "one H200 as measured: products of 8192³, device copies";
        (Rates::H200.flops / 1e12, Rates::H200.bandwidth / 1e12, origin.to_string())
    };
    made(typed.tflops.unwrap_or(tflops), typed.tbps.unwrap_or(tbps), origin)
}

/// One large product, and one narrow product whose weights come from memory.
fn cpu(args: &DeviceArgs) -> Result<(f64, f64, String)> {
    let cores = || std::thread::available_parallelism().map_or(1, |n| n.get());
    let threads = args.threads.unwrap_or_else(cores);
    let stored = args.precision.on_cpu();
    let isa = Isa::best();
    let large = probe::product(isa, stored, [768, 2048, 2048], threads, 3, 0)?;
    let narrow = probe::product(isa, stored, [8, 1024, 4096], threads, 30, 128 << 20)?;
    let origin = format!(
        "measured just now, {threads} × {}: a product of 768×2048×2048 by itself, and 8×1024×4096 \
         with weights from memory",
        isa.name()
    );
    Ok((large.gflop_per_s / 1e3, narrow.weight_gb_per_s / 1e3, origin))
}
