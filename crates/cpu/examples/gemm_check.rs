//! Every instruction set of this machine × the products of π0: right or wrong, GFLOP/s, GB/s.
//!
//! `cargo run --release -p pirouette-cpu --example gemm_check [threads] [instruction set]
//! [shape index]`

use pirouette_cpu::{Isa, Precision, features, probe};

const SHAPES: [[usize; 3]; 6] = [
    [788, 2048, 32768],
    [788, 16384, 2048],
    [768, 1152, 3456],
    [10, 1024, 8192],
    [10, 4096, 1024],
    [50, 1024, 8192],
];

fn main() -> Result<(), pirouette_model::BackendError> {
    for (name, found) in features() {
        println!("{} {name}", if found { "+" } else { "-" });
    }
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let number = |at: usize| std::env::args().nth(at).and_then(|a| a.parse::<usize>().ok());
    let threads = number(1).unwrap_or(cores);
    let only = std::env::args().nth(2).unwrap_or_default();
    let wanted = |isa: &Isa| isa.is_available() && isa.name().starts_with(&only);
    println!("{threads} threads; rows × K × N, fastest of some repetitions, weights cold");
    for isa in Isa::ALL.into_iter().rev().filter(wanted) {
        for precision in [Precision::Bf16, Precision::F32] {
            for (at, shape) in SHAPES.into_iter().enumerate() {
                if number(3).is_some_and(|only| only != at) {
                    continue;
                }
                let large = shape[0] > 100;
                let slow = large && (isa == Isa::Portable || precision == Precision::F32);
                let repetitions = if slow {
                    1
                } else if large {
                    3
                } else {
                    40
                };
                let cold = if large { 0 } else { 256 << 20 };
                let p = probe::product(isa, precision, shape, threads, repetitions, cold)?;
                let verdict = if p.worst_error < 2e-6 { "right" } else { "WRONG" };
                println!(
                    "{:13} {:4} {:>5}×{:>5}×{:>5} {verdict} (error {:.1e}) {:8.1} GFLOP/s \
                     ({:7.1} per core and CPU second) {:6.1} GB/s",
                    isa.name(),
                    if precision == Precision::F32 { "f32" } else { "bf16" },
                    shape[0],
                    shape[1],
                    shape[2],
                    p.worst_error,
                    p.gflop_per_s,
                    p.gflop_per_cpu_s,
                    p.weight_gb_per_s,
                );
            }
        }
    }
    Ok(())
}
