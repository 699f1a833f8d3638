//! The commit of the working tree → `PIROUETTE_COMMIT`, for what release builds measure.

use std::process::Command;

fn git(words: &[&str]) -> Option<String> {
    let output = Command::new("git").args(words).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // Others measure nothing that is kept, and would be built anew with every commit.
    if std::env::var("PROFILE").as_deref() != Ok("release") {
        return;
    }
    // Sources that only lie inside somebody else's repository are of none of its commits.
    if git(&["ls-files", "--error-unmatch", "build.rs"]).is_none() {
        return;
    }
    let Some(mut commit) = git(&["rev-parse", "HEAD"]) else { return };
    if git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|s| !s.is_empty()) {
        commit += "-changed";
    }
    println!("cargo:rustc-env=PIROUETTE_COMMIT={commit}");
    println!("cargo:rerun-if-changed=../../crates");
    if let Some(log) = git(&["rev-parse", "--path-format=absolute", "--git-path", "logs/HEAD"]) {
        println!("cargo:rerun-if-changed={log}");
    }
}
