//! This process → where its measurements come from: program, date, commit, machine, command.

use serde::{Deserialize, Serialize};

use crate::text::today;

/// What stands at the head of a file of measurements. Of older files version and date alone.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// Of this program.
    pub version: String,
    /// Day of the measurement, UTC.
    pub date: String,
    /// Of the working tree that this program was built in, with `-changed` where files differed
    /// from it; none of builds without optimisation or outside git. (Until 2026-11-27: of the
    /// folder that the command ran in.)
    #[serde(default)]
    pub commit: Option<String>,
    #[serde(default)]
    pub machine: Machine,
    /// As it was typed.
    #[serde(default)]
    pub command: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Machine {
    pub cpu: Option<String>,
    /// That this process may use.
    pub cores: usize,
    pub memory_bytes: Option<u64>,
    pub load_average: Option<String>,
}

impl Provenance {
    /// Of this process, now.
    pub fn here() -> Self {
        let arguments = std::env::args().skip(1);
        let words: Vec<String> = std::iter::once("pirouette".into()).chain(arguments).collect();
        Provenance {
            version: env!("CARGO_PKG_VERSION").into(),
            date: today(),
            commit: option_env!("PIROUETTE_COMMIT").map(String::from),
            machine: Machine::here(),
            command: words.join(" "),
        }
    }
}

impl Machine {
    fn here() -> Self {
        let line = |file: &str, key: &str| {
            let text = std::fs::read_to_string(file).ok()?;
            let (_, value) = text.lines().find(|l| l.starts_with(key))?.split_once(':')?;
            Some(value.trim().to_string())
        };
        let kib = line("/proc/meminfo", "MemTotal");
        let memory = kib.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok());
        Machine {
            cpu: line("/proc/cpuinfo", "model name"),
            cores: std::thread::available_parallelism().map_or(1, |n| n.get()),
            memory_bytes: memory.map(|kib| kib * 1024),
            load_average: std::fs::read_to_string("/proc/loadavg").ok().map(|l| l.trim().into()),
        }
    }
}
