//! Power, clocks and temperature of a GPU through NVML, for reports and metrics.

use nvml_wrapper::Nvml;
use nvml_wrapper::enum_wrappers::device::{Clock, TemperatureSensor};
use pirouette_model::BackendError;

use crate::driver::Properties;

/// Reads one GPU's sensors. NVML is opened at run time, like the driver.
pub struct Gauge {
    nvml: Nvml,
    uuid: String,
}

/// One reading; a sensor that the GPU does not have reads as `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Reading {
    /// Power drawn, watts (the driver's average over its own interval).
    pub power_watts: Option<f64>,
    /// Clock of the multiprocessors, MHz.
    pub sm_mhz: Option<u32>,
    /// Clock of the memory, MHz.
    pub memory_mhz: Option<u32>,
    /// Temperature of the chip, °C.
    pub temperature_celsius: Option<u32>,
    /// Memory used by all processes, bytes.
    pub memory_used_bytes: Option<u64>,
    /// Memory that can still be had, bytes.
    pub memory_free_bytes: Option<u64>,
    /// Energy since the driver was loaded, joules.
    pub energy_joules: Option<f64>,
}

impl Gauge {
    /// Opens NVML for the device with these properties.
    pub fn open(properties: &Properties) -> Result<Self, BackendError> {
        let missing = |error: nvml_wrapper::error::NvmlError| {
            BackendError::Unavailable(format!(
                "power and clocks can't be read through NVML: {error}"
            ))
        };
        let nvml = Nvml::init().map_err(missing)?;
        let [uuid, slice] = ["GPU", "MIG"].map(|kind| uuid_text(kind, properties.uuid));
        let found = match nvml.device_by_uuid(uuid.as_str()) {
            Ok(_) => Ok(uuid),
            // CUDA gives the identity of a MIG slice without saying that it is one.
            Err(error) => nvml.device_by_uuid(slice.as_str()).map(|_| slice).map_err(|_| error),
        };
        Ok(Gauge { uuid: found.map_err(missing)?, nvml })
    }

    /// Reads all sensors.
    pub fn read(&self) -> Reading {
        let Ok(device) = self.nvml.device_by_uuid(self.uuid.as_str()) else {
            return Reading::default();
        };
        let memory = device.memory_info().ok();
        Reading {
            power_watts: device.power_usage().ok().map(|mw| mw as f64 / 1e3),
            sm_mhz: device.clock_info(Clock::SM).ok(),
            memory_mhz: device.clock_info(Clock::Memory).ok(),
            temperature_celsius: device.temperature(TemperatureSensor::Gpu).ok(),
            memory_used_bytes: memory.as_ref().map(|m| m.used),
            memory_free_bytes: memory.as_ref().map(|m| m.free),
            energy_joules: self.energy_joules(),
        }
    }

    /// Energy used since the driver was loaded, joules. The counter moves some ten times a second.
    pub fn energy_joules(&self) -> Option<f64> {
        let device = self.nvml.device_by_uuid(self.uuid.as_str()).ok()?;
        device.total_energy_consumption().ok().map(|mj| mj as f64 / 1e3)
    }

    /// What holds the clocks down now, in NVML's words (`SW_POWER_CAP`, …); empty: nothing known.
    pub fn clock_limits(&self) -> Vec<&'static str> {
        let device = self.nvml.device_by_uuid(self.uuid.as_str());
        let reasons = device.and_then(|device| device.current_throttle_reasons());
        reasons.map_or_else(|_| vec![], |r| r.iter_names().map(|(name, _)| name).collect())
    }
}

/// `GPU-8e2f…`, as NVML and `nvidia-smi -L` spell it.
fn uuid_text(kind: &str, bytes: [u8; 16]) -> String {
    let mut text = format!("{kind}-");
    for (i, byte) in bytes.iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_are_spelled_as_nvml_does() {
        let bytes = std::array::from_fn(|i| i as u8 * 17);
        assert_eq!(uuid_text("GPU", bytes), "GPU-00112233-4455-6677-8899-aabbccddeeff");
    }
}
