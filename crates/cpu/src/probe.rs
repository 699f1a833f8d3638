//! One product on made-up numbers, by itself: is it right, and how fast? For `gemm_check` and for
//! trying kernels on a new machine.

use std::sync::atomic::AtomicUsize;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use bytemuck::cast_slice_mut;
use pirouette_model::arena::ArenaPlan;
use pirouette_model::program::{BufferId, Epilogue, Norm, View};
use pirouette_model::{BackendError, Config, Images, Inputs, WeightTable};

use crate::device::Precision;
use crate::driver::clock::process_seconds;
use crate::driver::memory::{Shared, Words};
use crate::driver::pool::{Pool, Worker};
use crate::executable::Context;
use crate::gemm::operand::Matrix;
use crate::gemm::product::{multiply, pack, pairs};
use crate::gemm::{CHUNK, Isa, Kernel, Session, Storage};
use crate::plan::{Feeding, LinearPlan, LiveRows, Place, Places, Plan, RowSet};
use crate::weights::{Stored, Weights, pack_columns_of};

/// What a probe found.
#[derive(Clone, Copy, Debug)]
pub struct Probe {
    /// Of the fastest repetition.
    pub gflop_per_s: f64,
    /// The same by the CPU time of all threads: what a core does while it has the machine to
    /// itself. Zero where the system has no such clock.
    pub gflop_per_cpu_s: f64,
    /// Weight bytes per time of the fastest repetition.
    pub weight_gb_per_s: f64,
    /// Largest difference of a sampled element from its f64 value, divided by the sum of its
    /// terms' magnitudes.
    pub worst_error: f64,
}

/// Multiplies `rows × k` by `k × n` some times. The weights of all repetitions together exceed
/// `cold_bytes`, so that with a large value each finds its weight in memory, not in cache.
pub fn product(
    isa: Isa,
    precision: Precision,
    [rows, k, n]: [usize; 3],
    threads: usize,
    repetitions: usize,
    cold_bytes: usize,
) -> Result<Probe, BackendError> {
    let kernel = Kernel::choose(isa, precision.storage());
    let measured = measure(kernel, [rows, k, n], threads, repetitions, cold_bytes)?;
    Ok(measured.0)
}

/// As [`product`], with any kernel; with the bits of the last repetition's result.
fn measure(
    kernel: Kernel,
    [rows, k, n]: [usize; 3],
    threads: usize,
    repetitions: usize,
    cold_bytes: usize,
) -> Result<(Probe, Vec<u32>), BackendError> {
    let (isa, storage) = (kernel.isa, kernel.storage);
    let one = (n * k * storage.bytes()).max(1);
    let copies = cold_bytes.div_ceil(one).clamp(1, 64);
    let weights = weights(storage, n, k, threads, copies)?;
    let mut linear = linear(kernel, [rows, k, n]);
    let plan = plan(&linear, storage, [rows, k]);
    let mut arena = Shared::zeroed(rows * (k + n), "a probe's arena")?;
    for (i, v) in arena.exclusive()[..rows * k].iter_mut().enumerate() {
        *v = activation(i).to_bits();
    }
    let packed = Shared::zeroed(plan.packed_words, "a probe's operand")?;
    let stores = Shared::zeroed(0, "nothing")?;
    let scratch = (0..threads)
        .map(|_| Ok(Mutex::new(Words::zeroed(plan.scratch_words, "scratch memory")?)))
        .collect::<Result<Vec<_>, BackendError>>()?;
    let inputs = Inputs {
        images: Images::Packed(&[]),
        cameras: &[],
        tokens: &[],
        prompt_len: &[],
        state: &[],
        noise: &[],
        previous: None,
    };
    let live =
        || LiveRows { segments: vec![(0, rows)], rows: (0..rows as u32).map(|r| (0, r)).collect() };
    let mut pool = Pool::new(threads)?;
    let (mut fastest, mut least_cpu) = (f64::INFINITY, f64::INFINITY);
    for repetition in 0..repetitions.max(1) {
        linear.weight = repetition % copies;
        let context = Context {
            plan: &plan,
            weights: &weights,
            arena: &arena,
            packed: &packed,
            fed: None,
            powers: &stores,
            stores: &stores,
            rows: vec![live()],
            prefix_len: Vec::new(),
            inputs: &inputs,
        };
        let counter = AtomicUsize::new(0);
        let (start, cpu) = (Instant::now(), process_seconds());
        pool.run(&|worker: &Worker<'_>| {
            let _session = Session::enter(isa);
            let mut scratch = scratch[worker.index].lock().unwrap_or_else(PoisonError::into_inner);
            pack(&context, &linear, worker);
            worker.barrier()?;
            let scratch = cast_slice_mut(scratch.as_mut_slice());
            multiply(&context, &linear, worker, &counter, scratch);
            Ok(())
        })?;
        fastest = fastest.min(start.elapsed().as_secs_f64());
        if let (Some(before), Some(after)) = (cpu, process_seconds()) {
            least_cpu = least_cpu.min(after - before);
        }
    }
    let flop = 2.0 * (rows * k * n) as f64;
    let result = &arena.exclusive()[rows * k..];
    let probe = Probe {
        gflop_per_s: flop / fastest / 1e9,
        gflop_per_cpu_s: flop / least_cpu / 1e9,
        weight_gb_per_s: one as f64 / fastest / 1e9,
        worst_error: worst_error(result, storage, [rows, k, n]),
    };
    Ok((probe, result.to_vec()))
}

fn activation(i: usize) -> f32 {
    noise(i as u64) as f32
}

fn weight(i: usize) -> f32 {
    noise(i as u64 ^ 0x9e37_79b9_7f4a_7c15) as f32
}

/// `copies` weights `[n, k]`, all the same.
fn weights(
    storage: Storage,
    n: usize,
    k: usize,
    threads: usize,
    copies: usize,
) -> Result<Weights, BackendError> {
    let mut stored = Vec::new();
    for _ in 0..copies {
        let mut matrix = Matrix::zeroed(n, k, storage, "a probe's weight")?;
        pack_columns_of(&mut matrix, threads, |row, out| {
            for (i, o) in out.iter_mut().enumerate() {
                *o = weight(row * k + i);
            }
            Ok(())
        })?;
        stored.push(Stored::Matrix(matrix));
    }
    // The table is not looked at: weights are found by their index.
    Ok(Weights { table: WeightTable::new(Config::pi0(), 1), storage, stored })
}

/// The arena is the input, then the output.
fn linear(kernel: Kernel, [rows, k, n]: [usize; 3]) -> LinearPlan {
    let buffer = BufferId(0);
    let out = View { buffer, col: 0, cols: n, stride: rows, first: 0, count: rows };
    let epilogue = Epilogue::Store { out };
    let (pairs, whole) = pairs(&epilogue, n);
    LinearPlan {
        input: Place::matrix(0, k),
        rows: 0,
        norm: Norm::None,
        weight: 0,
        scale: 1.0,
        bias: None,
        epilogue,
        places: Places::One(Place::matrix(rows * k, n)),
        kernel,
        pairs,
        whole,
        feeding: Feeding::Apart,
    }
}

fn plan(linear: &LinearPlan, storage: Storage, [rows, k]: [usize; 2]) -> Plan {
    Plan {
        arena: ArenaPlan { offsets: Vec::new(), bytes: 0 },
        steps: Vec::new(),
        row_sets: vec![RowSet::All { groups: 1, count: rows }],
        ropes: Vec::new(),
        packed_words: (rows + linear.kernel.rows)
            * linear.kernel.panel_chunks(storage.chunks(k))
            * CHUNK,
        power_words: 0,
        store_words: 0,
        scratch_words: linear.scratch_words(),
    }
}

/// Compares some elements with f64.
fn worst_error(got: &[u32], storage: Storage, [rows, k, n]: [usize; 3]) -> f64 {
    let error = |sample: usize| {
        let (r, c) = (sample * 31 % rows, sample * 7919 % n);
        let terms = (0..k).map(|i| {
            let (x, w) = (activation(r * k + i), weight(c * k + i));
            storage.round(x) as f64 * storage.round(w) as f64
        });
        let (sum, size) = terms.fold((0.0, 0.0), |(s, a), t: f64| (s + t, a + t.abs()));
        let off = (f32::from_bits(got[r * n + c]) as f64 - sum).abs() / size;
        if off.is_nan() { f64::INFINITY } else { off }
    };
    (0..997).map(error).fold(0.0, f64::max)
}

/// −1 … 1, the same for the same index.
fn noise(index: u64) -> f64 {
    let mut z = index.wrapping_mul(0xbf58_476d_1ce4_e5b9).wrapping_add(0x94d0_49bb_1331_11eb);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 52) as f64 - 1.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gemm::Ahead;

    #[test]
    fn every_kernel_multiplies_odd_and_even_sizes() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            for precision in [Precision::F32, Precision::Bf16] {
                for shape in [
                    [1, 1, 1],
                    [3, 17, 5],
                    [14, 64, 48],
                    [29, 100, 33],
                    [50, 1056, 160],
                    [65, 588, 112],
                    [300, 2100, 80],
                ] {
                    let probe = product(isa, precision, shape, 2, 1, 0).unwrap();
                    let off = probe.worst_error;
                    assert!(off < 2e-6, "{isa:?} {precision:?} {shape:?}: {off}");
                }
            }
        }
    }
    #[test]
    fn no_cutting_and_no_fetching_ahead_changes_a_bit() {
        let fetch = |rows, bytes| Some(Ahead { rows, bytes });
        let cuts = [
            (16, 256, 8, None),
            (16, 256, 8, fetch(false, 4096)),
            (16, 416, 12, fetch(true, 4096)),
            (18, 800, 16, fetch(true, 0)),
            (3, 64, 1, fetch(true, 8192)),
        ];
        for isa in Isa::ALL {
            if !isa.is_available() {
                println!("skipped {}: this machine does not have it", isa.name());
                continue;
            }
            for storage in [Storage::Bf16, Storage::F32] {
                for shape in [[10, 1024, 96], [50, 2048, 80], [100, 2100, 336]] {
                    let mut first = None;
                    for (chunks_per_block, block_rows, block_pairs, ahead) in cuts {
                        let chosen = Kernel::choose(isa, storage);
                        let cut =
                            Kernel { chunks_per_block, block_rows, block_pairs, ahead, ..chosen };
                        let (_, bits) = measure(cut, shape, 2, 1, 0).unwrap();
                        let same = *first.get_or_insert_with(|| bits.clone()) == bits;
                        assert!(same, "{isa:?} {storage:?} {shape:?}: {block_rows} rows");
                    }
                }
            }
        }
    }
}
