//! The binary `pirouette`: arguments → one of the commands.

// `eprintln!` panics where nobody reads standard error: `log::note` does not.
#![deny(clippy::print_stderr)]

mod args;
mod bench;
mod descriptors;
mod device;
mod doctor;
mod ending;
mod energy;
#[cfg(feature = "fault-injection")]
mod fault;
mod golden;
mod infer;
mod inspect;
mod ladder;
mod lerobot;
mod load;
mod log;
mod meanwhile;
mod model;
mod npz;
mod opening;
mod plan;
mod profile;
mod provenance;
mod quantile;
mod random;
mod replay;
mod report;
mod rtc;
mod serve;
mod service;
mod setup;
mod stress;
mod text;
mod verify;
mod weights;
#[cfg(target_os = "linux")]
mod worker;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = args::Cli::parse();
    log::queue_panics();
    if !matches!(cli.command, args::Command::Serve(_)) {
        end_without_output();
    }
    let status = match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            log::tell(&format!("pirouette: {e:#}\n"));
            ExitCode::FAILURE
        }
    };
    log::flush();
    status
}

/// `println!` panics when it can't write. Where whoever reads the output has gone, as `head` does,
/// that is the end of the work, not a fault, with a shell's exit status for SIGPIPE; a full disk is
/// an error as others are.
fn end_without_output() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let text = panic.payload().downcast_ref::<String>().map_or("", String::as_str);
        let Some(why) = text.strip_prefix("failed printing to stdout: ") else {
            return usual(panic);
        };
        let reader = !why.contains("Broken pipe");
        if reader {
            log::note(format_args!("pirouette: can't write to standard output: {why}"));
        }
        log::flush();
        std::process::exit(if reader { 1 } else { 141 });
    }));
}

fn run(cli: args::Cli) -> anyhow::Result<()> {
    match cli.command {
        args::Command::Bench(a) => bench::run(&a),
        args::Command::Doctor(a) => doctor::run(&a),
        args::Command::Golden(a) => golden::run(&a),
        args::Command::Infer(a) => infer::run(&a),
        args::Command::Serve(a) => serve::run(&a),
        args::Command::Inspect(a) => inspect::run(&a),
        args::Command::Ladder(a) => ladder::run(&a),
        args::Command::Load(a) => load::run(&a),
        args::Command::Plan(a) => plan::run(&a),
        args::Command::Profile(a) => profile::run(&a),
        args::Command::Replay(a) => replay::run(&a),
        args::Command::Report(a) => report::run(&a),
        args::Command::Stress(a) => stress::run(&a),
        args::Command::Verify(a) => verify::run(&a),
        #[cfg(target_os = "linux")]
        args::Command::Worker => worker::run(),
    }
}
