//! Numbers → Prometheus' text form.

use std::fmt::Write;

use crate::service::GpuReading;
use pirouette_engine::{HISTOGRAM_BOUNDS_MS, Phase, StatsSnapshot};

/// `# HELP` and `# TYPE`. (Writing to a string can't fail, here and below.)
pub(crate) fn header(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

pub(crate) fn sample(out: &mut String, name: &str, labels: &[(&str, &str)], value: f64) {
    out.push_str(name);
    for (i, (label, text)) in labels.iter().enumerate() {
        let text = text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let _ = write!(out, "{}{label}=\"{text}\"", if i == 0 { '{' } else { ',' });
    }
    let _ = writeln!(out, "{} {value}", if labels.is_empty() { "" } else { "}" });
}

/// One series of a histogram: cumulative bins in seconds.
pub(crate) fn histogram(
    out: &mut String,
    name: &str,
    labels: &[(&str, &str)],
    bins: &[u64],
    sum_ms: f64,
) {
    let mut total = 0;
    for (i, n) in bins.iter().enumerate() {
        total += n;
        let bound = HISTOGRAM_BOUNDS_MS.get(i).map(|ms| format!("{}", ms / 1e3));
        let bound = bound.unwrap_or_else(|| "+Inf".into());
        let labels: Vec<_> = labels.iter().copied().chain([("le", bound.as_str())]).collect();
        sample(out, &format!("{name}_bucket"), &labels, total as f64);
    }
    sample(out, &format!("{name}_sum"), labels, sum_ms / 1e3);
    sample(out, &format!("{name}_count"), labels, total as f64);
}

/// Appends an engine's statistics; for [`crate::Service::metrics`] of services that have one.
pub fn render_engine(stats: &StatsSnapshot, out: &mut String) {
    let single = |out: &mut String, name: &str, kind: &str, help: &str, value: f64| {
        header(out, name, kind, help);
        sample(out, name, &[], value);
    };
    let count = |n: u64| n as f64;
    let name = "pirouette_engine_accepted_total";
    single(out, name, "counter", "Requests queued.", count(stats.accepted));
    let name = "pirouette_engine_completed_total";
    single(out, name, "counter", "Requests answered.", count(stats.completed));
    let name = "pirouette_engine_cancelled_total";
    single(out, name, "counter", "Requests whose client left.", count(stats.cancelled));
    let name = "pirouette_engine_canaries_total";
    single(out, name, "counter", "Canary forwards with the known answer.", count(stats.canaries));
    let name = "pirouette_non_finite_total";
    let non_finite = stats.errors_for("non_finite");
    single(out, name, "counter", "Answers withheld for NaN or infinity.", count(non_finite));
    let name = "pirouette_queue_depth";
    single(out, name, "gauge", "Requests waiting.", stats.queue_depth as f64);

    let name = "pirouette_rejected_total";
    header(out, name, "counter", "Requests refused or failed in the engine, by reason.");
    for (reason, n) in &stats.errors {
        sample(out, name, &[("reason", reason)], *n as f64);
    }
    let name = "pirouette_batches_total";
    header(out, name, "counter", "Batches run, by the requests in them.");
    for (size, n) in &stats.batches {
        sample(out, name, &[("size", &size.to_string())], *n as f64);
    }
    let name = "pirouette_stage_seconds";
    header(out, name, "histogram", "Time of answered requests in the engine, by stage.");
    for (stage, bins, sum_ms) in &stats.stages {
        histogram(out, name, &[("stage", stage.name())], bins, *sum_ms);
    }
    let device =
        |out: &mut String, name: &str, kind: &str, help: &str, of: &dyn Fn(usize) -> f64| {
            header(out, name, kind, help);
            for (i, status) in stats.devices.iter().enumerate() {
                let labels = [("device", &*i.to_string()), ("name", &*status.name)];
                sample(out, name, &labels, of(i));
            }
        };
    let devices = &stats.devices;
    device(out, "pirouette_device_ready", "gauge", "1 when the device serves.", &|i| {
        f64::from(u8::from(devices[i].phase == Phase::Ready))
    });
    device(out, "pirouette_device_busy", "gauge", "1 while a batch runs.", &|i| {
        f64::from(u8::from(devices[i].busy))
    });
    let help = "Times the device failed.";
    device(out, "pirouette_device_restarts_total", "counter", help, &|i| {
        devices[i].restarts as f64
    });
    let help = "Bytes of weights on the device.";
    device(out, "pirouette_device_weight_bytes", "gauge", help, &|i| {
        devices[i].weight_bytes as f64
    });
}

/// Appends the sensors of GPUs that have them.
pub(crate) fn render_gpus(gpus: &[GpuReading], out: &mut String) {
    let mut sensor = |name: &str, help: &str, of: &dyn Fn(&GpuReading) -> Option<f64>| {
        let values: Vec<_> =
            gpus.iter().enumerate().filter_map(|(i, g)| Some((i, g, of(g)?))).collect();
        if !values.is_empty() {
            header(out, name, "gauge", help);
        }
        for (i, gpu, value) in values {
            sample(out, name, &[("gpu", &*i.to_string()), ("name", &gpu.name)], value);
        }
    };
    sensor("pirouette_gpu_power_watts", "Power drawn.", &|g| g.power_watts);
    sensor("pirouette_gpu_sm_hertz", "Clock of the multiprocessors.", &|g| {
        g.sm_mhz.map(|mhz| f64::from(mhz) * 1e6)
    });
    sensor("pirouette_gpu_memory_hertz", "Clock of the memory.", &|g| {
        g.memory_mhz.map(|mhz| f64::from(mhz) * 1e6)
    });
    sensor("pirouette_gpu_temperature_celsius", "Temperature of the chip.", &|g| {
        g.temperature_celsius.map(f64::from)
    });
    sensor("pirouette_gpu_memory_used_bytes", "Memory used by all processes.", &|g| {
        g.memory_used_bytes.map(|b| b as f64)
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sensor_a_gpu_lacks_is_left_out() {
        let gpu = GpuReading {
            name: "H\"1".into(),
            power_watts: Some(321.5),
            sm_mhz: Some(1980),
            ..GpuReading::default()
        };
        let mut out = String::new();
        render_gpus(&[GpuReading::default(), gpu], &mut out);
        assert!(
            out.contains("pirouette_gpu_power_watts{gpu=\"1\",name=\"H\\\"1\"} 321.5\n"),
            "{out}"
        );
        assert!(out.contains("pirouette_gpu_sm_hertz{gpu=\"1\",name=\"H\\\"1\"} 1980000000\n"));
        assert!(!out.contains("temperature") && !out.contains("gpu=\"0\""), "{out}");
    }

    #[test]
    fn samples_escape_labels_and_histograms_accumulate() {
        let mut out = String::new();
        sample(&mut out, "a", &[], 1.0);
        sample(&mut out, "b", &[("x", "q\"\\\n"), ("y", "z")], 0.5);
        assert_eq!(out, "a 1\nb{x=\"q\\\"\\\\\\n\",y=\"z\"} 0.5\n");
        let mut bins = vec![0; HISTOGRAM_BOUNDS_MS.len() + 1];
        (bins[0], bins[2], bins[HISTOGRAM_BOUNDS_MS.len()]) = (2, 1, 4);
        let mut out = String::new();
        histogram(&mut out, "h", &[("s", "t")], &bins, 1500.0);
        assert!(out.starts_with("h_bucket{s=\"t\",le=\"0.00002\"} 2\n"), "{out}");
        assert!(out.contains("h_bucket{s=\"t\",le=\"0.0001\"} 3\n"), "{out}");
        assert!(out.contains("h_bucket{s=\"t\",le=\"+Inf\"} 7\n"));
        assert!(out.ends_with("h_sum{s=\"t\"} 1.5\nh_count{s=\"t\"} 7\n"));
    }
}
