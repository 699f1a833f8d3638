//! `pirouette inspect DIR`: what a checkpoint holds and what of it will be used.

use std::path::PathBuf;

use anyhow::{Context, Result};
use pirouette_checkpoint::Report;
use pirouette_policy::tokenizer::{tokenizers, unread_tokenizers};
use serde::Serialize;

use crate::args::InspectArgs;
use crate::text::write_json;
use crate::weights;

/// The checkpoint, and the tokenizers it would be served with.
#[derive(Serialize)]
struct Inspected {
    #[serde(flatten)]
    checkpoint: Report,
    /// Tokenizer files found, the one that is used first.
    tokenizers: Vec<PathBuf>,
    /// Those in a format that is not read.
    tokenizers_not_read: Vec<PathBuf>,
}

/// Prints (or writes) the report.
pub fn run(args: &InspectArgs) -> Result<()> {
    let checkpoint = pirouette_checkpoint::open(&weights::local(&args.dir)?)
        .with_context(|| format!("checkpoint {}", args.dir.display()))?;
    let inspected = Inspected {
        checkpoint: checkpoint.inspect(),
        tokenizers: tokenizers(&checkpoint.root),
        tokenizers_not_read: unread_tokenizers(&checkpoint.root),
    };
    match &args.json {
        Some(path) => write_json(path, &inspected),
        None => {
            print(&inspected);
            Ok(())
        }
    }
}

fn print(inspected: &Inspected) {
    print!("{}", inspected.checkpoint);
    for path in &inspected.tokenizers {
        println!("  tokenizer    {}", path.display());
    }
    for path in &inspected.tokenizers_not_read {
        println!("  tokenizer    {} (not read: no SentencePiece file)", path.display());
    }
    if inspected.tokenizers.is_empty() {
        println!("  tokenizer    none that is read; pass one with --tokenizer");
    }
}
