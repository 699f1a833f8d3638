//! Lines per crate: code, comments and tests, so that growth is seen.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;

/// Prints a table of lines per crate.
pub fn run(root: &Path) -> Result<()> {
    let mut lines: BTreeMap<String, [usize; 3]> = BTreeMap::new();
    for file in crate::tidy::tracked(root)? {
        let parts: Vec<&str> = file.split('/').collect();
        let is_code = [".rs", ".cu", ".cuh", ".py"].iter().any(|e| file.ends_with(e));
        let Ok(text) = std::fs::read_to_string(root.join(&file)) else { continue };
        if !is_code {
            continue;
        }
        let name = match parts.as_slice() {
            ["crates", name, ..] => format!("crates/{name}"),
            [first, _, ..] => first.to_string(),
            _ => ".".into(),
        };
        let is_test = file.contains("/tests/") || file.contains("/examples/");
        let entry = lines.entry(name).or_default();
        for line in text.lines().map(str::trim).filter(|l| !l.is_empty()) {
            let kind = if line.starts_with("//") {
                1
            } else if is_test {
                2
            } else {
                0
            };
            entry[kind] += 1;
        }
    }
    println!("{:<20} {:>7} {:>9} {:>7}", "", "code", "comments", "tests");
    let mut sum = [0; 3];
    for (name, counts) in &lines {
        println!("{name:<20} {:>7} {:>9} {:>7}", counts[0], counts[1], counts[2]);
        sum.iter_mut().zip(counts).for_each(|(s, c)| *s += c);
    }
    println!("{:<20} {:>7} {:>9} {:>7}", "all", sum[0], sum[1], sum[2]);
    Ok(())
}
