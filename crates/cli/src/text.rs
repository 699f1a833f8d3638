//! Numbers and tables for people, and the files that results go to.

use std::fs::{File, remove_file};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// `1.23 T`, `45.6 G`, … with three digits.
pub fn scaled(value: f64) -> String {
    let (divisor, unit) = match value.abs() {
        v if v >= 1e12 => (1e12, "T"),
        v if v >= 1e9 => (1e9, "G"),
        v if v >= 1e6 => (1e6, "M"),
        v if v >= 1e3 => (1e3, "k"),
        _ => (1.0, ""),
    };
    let v = value / divisor;
    let digits = if v >= 100.0 {
        0
    } else if v >= 10.0 {
        1
    } else {
        2
    };
    format!("{v:.digits$} {unit}").trim_end().to_string()
}

/// A table with a header; the first column is left-aligned, the others right-aligned.
pub fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let columns = header.len();
    let width = |c: usize| {
        let cells = rows.iter().map(|r| r[c].chars().count());
        cells.chain([header[c].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |cells: &[String]| {
        let mut out = String::new();
        for (c, cell) in cells.iter().enumerate() {
            let pad = " ".repeat(widths[c] - cell.chars().count());
            let (left, right) = if c == 0 { ("", pad) } else { (pad.as_str(), String::new()) };
            out.push_str(if c == 0 { "" } else { "  " });
            out.push_str(&format!("{left}{cell}{right}"));
        }
        out.trim_end().to_string() + "\n"
    };
    let header: Vec<String> = header.iter().map(|h| h.to_string()).collect();
    let mut out = line(&header);
    for row in rows {
        out.push_str(&line(row));
    }
    out
}

/// Today as `2026-11-22`, UTC (civil date from days since 1970, Howard Hinnant's algorithm).
pub fn today() -> String {
    let days = std::time::UNIX_EPOCH.elapsed().map_or(0, |t| t.as_secs() as i64 / 86_400);
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let day_of_era = z.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

/// Fails where results could not be written, before they are measured. What is there stays as it
/// is, and nothing is left behind.
pub fn writable<'a>(paths: impl IntoIterator<Item = &'a PathBuf>) -> Result<()> {
    let mut files = paths.into_iter().filter(|path| path.as_os_str() != "-");
    files.try_for_each(|path| attempt(path).with_context(|| unwritten(path)))
}

fn attempt(path: &Path) -> io::Result<()> {
    match path.metadata() {
        // A pipe that is opened and closed would end for its reader.
        Ok(there) if !there.is_file() && !there.is_dir() => Ok(()),
        Ok(_) => File::options().write(true).open(path).map(drop),
        Err(error) if error.kind() == io::ErrorKind::NotFound => match path.read_link() {
            // A link to what is not there yet.
            Ok(target) => attempt(&path.parent().unwrap_or(path).join(target)),
            Err(_) => File::create_new(path).and_then(|_| remove_file(path)),
        },
        Err(error) => Err(error),
    }
}

fn unwritten(path: &Path) -> String {
    format!("can't write {}", path.display())
}

/// Writes JSON to a file, or to standard output for `-`.
pub fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value)? + "\n";
    if path.as_os_str() == "-" {
        print!("{text}");
        return Ok(());
    }
    std::fs::write(path, text).with_context(|| unwritten(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits() {
        assert_eq!(scaled(0.0), "0.00");
        assert_eq!(scaled(105.8e9), "106 G");
        assert_eq!(scaled(3.04e12), "3.04 T");
        assert_eq!(scaled(22_528.0), "22.5 k");
    }

    #[cfg(unix)]
    #[test]
    fn files_are_tried_without_a_trace() {
        let folder = tempfile::tempdir().unwrap();
        let [old, new, link] = ["old", "new", "link"].map(|name| folder.path().join(name));
        std::fs::write(&old, "kept").unwrap();
        // Relative to the folder that the link is in.
        std::os::unix::fs::symlink("new", &link).unwrap();
        writable([&old, &new, &link, &"-".into(), &"/dev/null".into()]).unwrap();
        assert_eq!(std::fs::read_to_string(&old).unwrap(), "kept");
        assert!(!new.exists() && link.is_symlink());
        std::fs::remove_file(&link).unwrap();
        std::os::unix::fs::symlink("/no/such/folder/file", &link).unwrap();
        for bad in [link, folder.path().into(), old.join("below"), folder.path().join("no/file")] {
            let error = format!("{:#}", writable([&old, &bad]).unwrap_err());
            assert!(error.starts_with(&format!("can't write {}: ", bad.display())), "{error}");
        }
    }

    #[test]
    fn columns_line_up() {
        let rows = vec![vec!["a".into(), "1".into()], vec!["bbb".into(), "22".into()]];
        assert_eq!(table(&["x", "n"], &rows), "x     n\na     1\nbbb  22\n");
    }
}
