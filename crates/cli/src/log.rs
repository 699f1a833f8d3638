//! What `serve` tells while it runs → standard error, as text for people or JSON for collectors.

use std::io::IsTerminal;

use serde::{Deserialize, Serialize};
use tracing_subscriber::EnvFilter;

/// The form of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Starts logging. `PIROUETTE_LOG` chooses what is told: `info` unless it is set, requests one by
/// one with `info,pirouette::request=debug`.
pub fn start(format: LogFormat) {
    let filter = EnvFilter::try_from_env("PIROUETTE_LOG").unwrap_or(EnvFilter::new("info"));
    // A line that can't be written, to a file on a full disk, is lost: to say so on standard error
    // would panic.
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // Colours are for a terminal, not for a file or a collector.
        .with_ansi(std::io::stderr().is_terminal())
        .log_internal_errors(false);
    match format {
        LogFormat::Text => lines.init(),
        LogFormat::Json => lines.json().flatten_event(true).init(),
    }
}
