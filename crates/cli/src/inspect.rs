//! `pirouette inspect DIR`: what a checkpoint holds and what of it will be used.

use anyhow::{Context, Result};

use crate::args::InspectArgs;
use crate::text::write_json;

/// Prints (or writes) the report.
pub fn run(args: &InspectArgs) -> Result<()> {
    let checkpoint = pirouette_checkpoint::open(&args.dir)
        .with_context(|| format!("checkpoint {}", args.dir.display()))?;
    let report = checkpoint.inspect();
    match &args.json {
        Some(path) => write_json(path, &report),
        None => {
            print!("{report}");
            Ok(())
        }
    }
}
