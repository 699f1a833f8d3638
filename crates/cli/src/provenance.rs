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
    /// Of the working tree that the command ran in, where that is a git one.
    #[serde(default)]
    commit: Option<String>,
    #[serde(default)]
    machine: Machine,
    #[serde(default)]
    command: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct Machine {
    cpu: Option<String>,
    /// That this process may use.
    cores: usize,
    memory_bytes: Option<u64>,
    load_average: Option<String>,
}

impl Provenance {
    /// Of this process, now.
    pub fn here() -> Self {
        let arguments = std::env::args().skip(1);
        let words: Vec<String> = std::iter::once("pirouette".into()).chain(arguments).collect();
        Provenance {
            version: env!("CARGO_PKG_VERSION").into(),
            date: today(),
            commit: commit(),
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

/// Hundredths of a second that the host of this virtual machine gave to others while its cores had
/// work, all cores together, since it started; none where Linux does not tell.
pub fn stolen() -> Option<u64> {
    stolen_of(&std::fs::read_to_string("/proc/stat").ok()?)
}

/// The eighth number of /proc/stat's first line.
fn stolen_of(stat: &str) -> Option<u64> {
    let mut numbers = stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace();
    numbers.nth(7)?.parse().ok()
}

fn commit() -> Option<String> {
    let git = std::process::Command::new("git").args(["rev-parse", "HEAD"]).output().ok()?;
    let text = String::from_utf8(git.stdout).ok()?;
    git.status.success().then(|| text.trim().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stolen_time_is_the_eighth_number_of_all_cores() {
        let stat = "cpu  49972 0 8179 583244 121 0 339 275 4 5\ncpu0 1 2 3 4 5 6 7 8 9 10\n";
        assert_eq!(stolen_of(stat), Some(275));
        assert_eq!(stolen_of("cpu  1 2 3\n"), None);
        assert_eq!(stolen_of("cpu0 1 2 3 4 5 6 7 8\n"), None);
        assert_eq!(stolen_of(""), None);
    }
}
