//! Repository chores: `cargo xtask kernels [--check] | tidy | sizes`.

mod kernels;
mod sizes;
mod tidy;

use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["tidy"] => tidy::run(&root()),
        ["kernels", ..] => kernels::main(&arguments[1..]),
        ["sizes"] => sizes::run(&root()),
        _ => Err(anyhow::anyhow!("usage: cargo xtask kernels [--check] | tidy | sizes")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("xtask: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// The workspace's root.
fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}
