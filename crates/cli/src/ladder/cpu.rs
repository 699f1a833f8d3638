//! The CPU's ladder: portable loops → each instruction set → threads.

use std::sync::Arc;

use anyhow::Result;
use pirouette_cpu::{Isa, Options};
use pirouette_model::{Shape, WeightTable, record_with};

use super::{Ladder, Rung, WHOLE};
use crate::args::{DeviceArgs, Precision};
use crate::log;
use crate::profile::{CpuMeter, Repeats, Timing, time};
use crate::weights::Weights;

/// Portable loops on one thread → every instruction set the machine has → all threads.
pub fn choices(
    weights: &Weights,
    args: &DeviceArgs,
    shape: Shape,
    repeats: Repeats,
) -> Result<Ladder> {
    let mut rungs = Vec::new();
    for isa in Isa::ALL.into_iter().filter(|&isa| isa.is_available() && differs(isa, args)) {
        let change = match isa {
            Isa::Portable => "plain loops, compiled for what the target guarantees; 1 thread",
            _ => "the same steps with kernels for this instruction set; 1 thread",
        };
        rungs.push(Rung {
            name: format!("{}, 1 thread", isa.name()),
            change: change.into(),
            timing: measure(weights, args, (isa, 1), shape, repeats)?,
        });
    }
    for threads in thread_counts(args.threads) {
        let timing = measure(weights, args, (Isa::best(), threads), shape, repeats)?;
        rungs.push(Rung {
            name: format!("{}, {threads} threads", Isa::best().name()),
            change: format!("one pool of {threads} threads walks the steps together"),
            timing,
        });
    }
    let title = "Instruction sets and threads, the same program".into();
    Ok(Ladder { title, clock: WHOLE.into(), rungs })
}

/// BF16 instructions change nothing for f32 matrices.
fn differs(isa: Isa, args: &DeviceArgs) -> bool {
    args.precision != Precision::F32 || !matches!(isa, Isa::Avx512Bf16 | Isa::Amx)
}

/// 2, 4, 8, … and all of them.
fn thread_counts(asked: Option<usize>) -> Vec<usize> {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let most = asked.unwrap_or(cores);
    let mut counts: Vec<usize> = std::iter::successors(Some(2usize), |n| n.checked_mul(2))
        .take_while(|&n| n < most)
        .collect();
    if most > 1 {
        counts.push(most);
    }
    counts
}

fn options(args: &DeviceArgs, isa: Isa, threads: usize) -> Options {
    Options { precision: args.precision.on_cpu(), threads: Some(threads), isa: Some(isa) }
}

fn measure(
    weights: &Weights,
    args: &DeviceArgs,
    (isa, threads): (Isa, usize),
    shape: Shape,
    repeats: Repeats,
) -> Result<Timing> {
    log::note(format_args!("ladder: {}, threads: {threads}", isa.name()));
    let config = weights.config;
    let options = options(args, isa, threads);
    let mut device =
        pirouette_cpu::load(config, shape.steps, weights.source(), options, &mut |_, _| {})?;
    let table = Arc::new(WeightTable::new(config, shape.steps));
    let program = Arc::new(record_with(table, shape)?);
    time(&mut CpuMeter(device.compile_cpu(program)?), &config, shape, repeats)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_double_up_to_what_was_asked() {
        assert!(thread_counts(Some(1)).is_empty());
        assert_eq!(thread_counts(Some(2)), [2]);
        assert_eq!(thread_counts(Some(6)), [2, 4, 6]);
        assert_eq!(thread_counts(Some(8)), [2, 4, 8]);
    }
}
