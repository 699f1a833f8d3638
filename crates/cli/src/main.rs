//! The binary `pirouette`: arguments → one of the commands.

mod args;
mod bench;
mod descriptors;
mod device;
mod doctor;
mod golden;
mod infer;
mod inspect;
mod ladder;
mod lerobot;
mod load;
mod log;
mod model;
mod npz;
mod plan;
mod profile;
mod provenance;
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

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = args::Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("pirouette: {e:#}");
            ExitCode::FAILURE
        }
    }
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
    }
}
