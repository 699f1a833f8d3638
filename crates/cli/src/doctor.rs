//! `pirouette doctor`: this machine → what is there, and for what is missing the fix.

use std::path::Path;

use anyhow::Result;
use pirouette_policy::tokenizer::find_tokenizer;
use serde::Serialize;

use crate::args::DoctorArgs;
use crate::text::write_json;

#[derive(Serialize)]
struct Finding {
    what: String,
    ok: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    fix: Option<String>,
}

/// Bytes of memory that BF16 weights and a server around them take.
const NEEDED_BYTES: u64 = 9_000_000_000;

/// Prints (or writes) the findings.
pub fn run(args: &DoctorArgs) -> Result<()> {
    let mut findings: Vec<Finding> = pirouette_cpu::features()
        .into_iter()
        .map(|(what, ok)| Finding { what: format!("cpu: {what}"), ok, fix: None })
        .collect();
    findings.push(memory());
    findings.extend(crate::device::gpu_findings().into_iter().map(|(what, fix)| Finding {
        what,
        ok: fix.is_none(),
        fix,
    }));
    findings.push(match find_tokenizer(None, None) {
        Ok(path) => Finding { what: format!("tokenizer: {}", path.display()), ok: true, fix: None },
        Err(e) => Finding { what: "tokenizer".into(), ok: false, fix: Some(e.to_string()) },
    });
    match &args.json {
        Some(path) => write_json(path, &findings),
        None => {
            for f in &findings {
                println!("{} {}", if f.ok { "✓" } else { "·" }, f.what);
                if let Some(fix) = &f.fix {
                    println!("    {}", fix.replace('\n', "\n    "));
                }
            }
            Ok(())
        }
    }
}

fn memory() -> Finding {
    let text = std::fs::read_to_string(Path::new("/proc/meminfo")).unwrap_or_default();
    let free = text
        .lines()
        .find_map(|l| l.strip_prefix("MemAvailable:"))
        .and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok())
        .map(|kib| kib * 1024);
    match free {
        None => Finding { what: "memory: unknown on this system".into(), ok: true, fix: None },
        Some(free) => {
            let ok = free >= NEEDED_BYTES;
            let fix = "a full-size model in bf16 wants 9 GB free: close something, or use a GPU";
            Finding {
                what: format!("memory: {:.1} GB available", free as f64 / 1e9),
                ok,
                fix: (!ok).then(|| fix.into()),
            }
        }
    }
}
