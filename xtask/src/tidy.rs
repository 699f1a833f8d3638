//! The rules of STYLE.md that a machine can check: line and file lengths, opening comments,
//! forbidden names, `unsafe` in its place, dependency arrows.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

const MAX_COLUMNS: usize = 100;
const MAX_LINES: usize = 600;

/// Layers, lowest first: a crate may depend on crates of lower layers only.
const LAYERS: &[&[&str]] = &[
    &["pirouette-model"],
    &["pirouette-policy", "pirouette-checkpoint", "pirouette-cpu", "pirouette-cuda"],
    &["pirouette-engine"],
    &["pirouette-server", "pirouette-testing"],
    &["pirouette", "pirouette-fuzz"],
];

const FORBIDDEN_STEMS: &[&str] = &["utils", "util", "common", "types", "manager", "helpers"];

/// Checks the whole tree; the error lists every finding.
pub fn run(root: &Path) -> Result<()> {
    let mut findings = Vec::new();
    for file in tracked(root)? {
        let path = root.join(&file);
        let Some(extension) = path.extension().and_then(|e| e.to_str()) else { continue };
        if !["rs", "cu", "cuh", "py"].contains(&extension) || !path.exists() {
            continue;
        }
        let text = std::fs::read_to_string(&path).with_context(|| format!("can't read {file}"))?;
        check_text(&file, extension, &text, &mut findings);
    }
    findings.extend(arrows(root)?);
    if findings.is_empty() {
        println!("tidy: no findings");
        return Ok(());
    }
    bail!("{} findings:\n{}", findings.len(), findings.join("\n"))
}

/// Files git tracks, and new ones it does not ignore.
pub fn tracked(root: &Path) -> Result<Vec<String>> {
    let output = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root)
        .output()
        .context("git is needed to list the tree")?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().map(str::to_string).collect())
}

fn check_text(file: &str, extension: &str, text: &str, findings: &mut Vec<String>) {
    let lines: Vec<&str> = text.lines().collect();
    if lines.len() > MAX_LINES {
        findings.push(format!("{file}: {} lines, the limit is {MAX_LINES}", lines.len()));
    }
    for (i, line) in lines.iter().enumerate() {
        let columns = line.chars().count();
        if columns > MAX_COLUMNS {
            findings.push(format!("{file}:{}: {columns} columns", i + 1));
        }
    }
    let opens_with = match extension {
        "rs" => lines.first().is_some_and(|l| l.starts_with("//!")),
        "py" => lines.iter().take(2).any(|l| l.starts_with("\"\"\"")),
        _ => lines.first().is_some_and(|l| l.starts_with("//") || l.starts_with("/*")),
    };
    if !opens_with {
        findings.push(format!("{file}: does not open with what it turns into what"));
    }
    let stem = Path::new(file).file_stem().and_then(|s| s.to_str()).unwrap_or("");
    if FORBIDDEN_STEMS.contains(&stem) {
        findings.push(format!("{file}: `{stem}` says nothing; name it after what it holds"));
    }
    let unsafe_allowed = ["/driver/", "/gemm/"].iter().any(|d| file.contains(d));
    let uses_unsafe = lines.iter().any(|l| {
        let code = l.split("//").next().unwrap_or("");
        ["unsafe {", "unsafe fn", "unsafe impl"].iter().any(|u| code.contains(u))
    });
    // This file spells the words it looks for.
    if extension == "rs" && uses_unsafe && !unsafe_allowed && !file.ends_with("xtask/src/tidy.rs") {
        findings.push(format!("{file}: `unsafe` outside */driver/ and */gemm/"));
    }
}

/// Dependencies between crates of the workspace point down the layers.
fn arrows(root: &Path) -> Result<Vec<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root)
        .output()
        .context("cargo metadata")?;
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    let layer = |name: &str| LAYERS.iter().position(|l| l.contains(&name));
    let mut findings = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let name = package["name"].as_str().unwrap_or("");
        let Some(own) = layer(name) else { continue };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let on = dependency["name"].as_str().unwrap_or("");
            let is_test = dependency["kind"] == "dev";
            if let Some(theirs) = layer(on)
                && theirs >= own
                && !is_test
            {
                findings.push(format!("{name} depends on {on}: the arrow points up"));
            }
        }
    }
    Ok(findings)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `cargo test` keeps the tree tidy.
    #[test]
    fn the_tree_is_tidy() {
        if let Err(e) = run(&crate::root()) {
            panic!("{e:#}");
        }
    }

    #[test]
    fn findings_are_found() {
        let mut findings = Vec::new();
        let long = format!("//! x\n{}\n", "a".repeat(101));
        check_text("crates/x/src/utils.rs", "rs", &long, &mut findings);
        let body = "fn f() { unsafe { g() } }\n";
        check_text("crates/x/src/y.rs", "rs", body, &mut findings);
        assert_eq!(findings.len(), 4, "{findings:#?}");
    }
}
