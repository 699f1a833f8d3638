//! A measurement → what this machine did to it meanwhile, where Linux tells.

use anyhow::Result;
use serde::Serialize;

/// What may have made runs late that neither the program nor the GPU did.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Meanwhile {
    /// Seconds of this machine's cores that its host gave to others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stolen_s: Option<f64>,
    /// Page faults of this process: its memory is there from the warm-up on, so more than a few a
    /// run are the system's doing (it unmaps pages to see who uses them, or moves them).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub page_faults: Option<u64>,
}

impl Meanwhile {
    /// What `timed` gives, and what happened during it.
    pub fn of<T>(timed: impl FnOnce() -> Result<T>) -> Result<(T, Meanwhile)> {
        let read = |file| std::fs::read_to_string(file).ok();
        let stolen = || stolen_of(&read("/proc/stat")?);
        let faults = || faults_of(&read("/proc/self/stat")?);
        let before = (stolen(), faults());
        let value = timed()?;
        let since = |after: Option<u64>, before: Option<u64>| Some(after?.saturating_sub(before?));
        let stolen_s = since(stolen(), before.0).map(|hundredths| hundredths as f64 / 100.0);
        Ok((value, Meanwhile { stolen_s, page_faults: since(faults(), before.1) }))
    }
}

/// Hundredths of a second that the host of this virtual machine gave to others while its cores had
/// work, all cores together, since it started: the eighth number of /proc/stat's first line.
fn stolen_of(stat: &str) -> Option<u64> {
    let mut numbers = stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace();
    numbers.nth(7)?.parse().ok()
}

/// Minor and major faults of a process: the 10th and 12th field of its stat, whose second is a name
/// in brackets that may hold anything.
fn faults_of(stat: &str) -> Option<u64> {
    let (_, behind_name) = stat.rsplit_once(')')?;
    let mut fields = behind_name.split_whitespace().skip(7);
    let minor: u64 = fields.next()?.parse().ok()?;
    let major: u64 = fields.nth(1)?.parse().ok()?;
    Some(minor + major)
}

#[cfg(test)]
mod tests {
    use std::hint::black_box;

    use super::*;

    #[test]
    fn stolen_time_is_the_eighth_number_of_all_cores() {
        let stat = "cpu  49972 0 8179 583244 121 0 339 275 4 5\ncpu0 1 2 3 4 5 6 7 8 9 10\n";
        assert_eq!(stolen_of(stat), Some(275));
        assert_eq!(stolen_of("cpu  1 2 3\n"), None);
        assert_eq!(stolen_of("cpu0 1 2 3 4 5 6 7 8\n"), None);
        assert_eq!(stolen_of(""), None);
    }

    #[test]
    fn faults_are_counted_behind_any_name() {
        let stat =
            "7 (a) b (c)) S 1 7 7 0 -1 4194560 1234 5 67 8 9 10 11 12 20 0 1 0 100 200 300\n";
        assert_eq!(faults_of(stat), Some(1301));
        assert_eq!(faults_of("7 (a) S 1 7"), None);
        assert_eq!(faults_of(""), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn touched_memory_is_seen() {
        let (pages, meanwhile) =
            Meanwhile::of(|| Ok(black_box(vec![1u8; 64 << 20]).len() >> 12)).unwrap();
        let faults = meanwhile.page_faults.unwrap();
        // Of 4 KiB, or fewer larger ones.
        assert!((16..=100 * pages as u64).contains(&faults), "{faults} faults for {pages} pages");
    }
}
