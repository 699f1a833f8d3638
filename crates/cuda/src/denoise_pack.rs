//! Host twin of `kernels/denoise_load.cu` and `denoise_rim_load.cu`: the expert's weights in the
//! order of the denoise products, packed on the device when the first program wants them.

use std::collections::BTreeMap;
use std::sync::Arc;

use pirouette_model::BackendError;
use pirouette_model::program::{Linear, Norm, Op, Program, Stage, WeightId};
use pirouette_model::weights::Kind;

use crate::cubins;
use crate::driver::{Arg, Context, DeviceMemory, Function, Launch, Stream};
use crate::load::Weights;

/// The loaded packing kernels.
pub struct Packing {
    context: Arc<Context>,
    pack: Function,
    fold_shift: Function,
    transpose: Function,
    round: Function,
}

impl Packing {
    /// Loads them; Hopper only.
    pub fn load(context: &Arc<Context>) -> Result<Self, BackendError> {
        let load = cubins::load(context, "denoise_load")?;
        let rim = cubins::load(context, "denoise_rim_load")?;
        Ok(Packing {
            context: context.clone(),
            pack: load.function("denoise_pack", 0)?,
            fold_shift: load.function("denoise_fold_shift", 0)?,
            transpose: rim.function("denoise_transpose", 0)?,
            round: rim.function("denoise_round", 0)?,
        })
    }

    /// Packs what the loop's products need, and folds adaptive shifts into biases.
    pub fn pack(
        &self,
        stream: &Stream,
        weights: &Weights,
        program: &Program,
    ) -> Result<Packed, BackendError> {
        let packed = Packed::plan(&self.context, weights, program)?;
        let base = packed.memory.address();
        let threads = |count: usize| [count.div_ceil(256) as u32, 1, 1];
        for (&weight, &Reshaped { at, staging, .. }) in &packed.rims {
            let place = weights.place(weight);
            let (rows, cols) = (place.rows as u32, place.ld as u32);
            let grid = threads(place.rows * place.ld);
            let from = Arg::of(&weights.address(weight));
            let launch = match staging {
                None => {
                    let args =
                        vec![from, Arg::of(&(base + at as u64)), Arg::of(&rows), Arg::of(&cols)];
                    Launch::new(self.transpose.clone(), grid, 256, args)
                }
                Some(staging) => {
                    let to = base + staging as u64;
                    let args = vec![from, Arg::of(&to), Arg::of(&(rows * cols))];
                    stream.launch(&Launch::new(self.round.clone(), grid, 256, args), false)?;
                    self.packing(to, base + at as u64, place.rows, place.ld)
                }
            };
            stream.launch(&launch, false)?;
        }
        for (&weight, &at) in &packed.matrices {
            let place = weights.place(weight);
            let from = weights.address(weight);
            let launch = self.packing(from, base + at as u64, place.rows, place.ld);
            stream.launch(&launch, false)?;
        }
        for (&(weight, table), bias) in &packed.biases {
            let place = weights.place(weight);
            let args = vec![
                Arg::of(&(base + packed.matrices[&weight] as u64)),
                Arg::of(&weights.address(table)),
                Arg::of(&(base + bias.at as u64)),
                Arg::of(&(place.rows as u32)),
                Arg::of(&(place.ld as u32)),
                Arg::of(&(bias.gate_up as u32)),
            ];
            let grid = [place.rows as u32 / 16, bias.steps as u32, 1];
            stream.launch(&Launch::new(self.fold_shift.clone(), grid, 32, args), false)?;
        }
        stream.synchronize()?;
        Ok(packed)
    }

    /// bf16 rows → the order of the products. Rows that meet already lie 8 apart: kind 0, plain.
    fn packing(&self, from: u64, to: u64, rows: usize, cols: usize) -> Launch {
        let args = vec![
            Arg::of(&from),
            Arg::of(&to),
            Arg::of(&(rows as u32)),
            Arg::of(&(cols as u32)),
            Arg::of(&0u32),
        ];
        let grid = [(rows * cols / 8).div_ceil(256) as u32, 1, 1];
        Launch::new(self.pack.clone(), grid, 256, args)
    }
}

/// A rim matrix: transposed f32 at `at`, or, with staging for its bf16 rows, packed.
struct Reshaped {
    at: usize,
    staging: Option<usize>,
}

/// A folded bias table f32 [steps][rows].
struct FoldedBias {
    at: usize,
    steps: usize,
    rows: usize,
    gate_up: bool,
}

/// The expert's matrices in the order of the denoise products.
pub struct Packed {
    memory: DeviceMemory,
    matrices: BTreeMap<WeightId, usize>,
    rims: BTreeMap<WeightId, Reshaped>,
    biases: BTreeMap<(WeightId, WeightId), FoldedBias>,
}

impl Packed {
    fn plan(
        context: &Arc<Context>,
        weights: &Weights,
        program: &Program,
    ) -> Result<Self, BackendError> {
        let (mut bytes, mut matrices, mut biases) = (0, BTreeMap::new(), BTreeMap::new());
        let mut rims = BTreeMap::new();
        for linear in products(program) {
            let place = weights.place(linear.weight);
            if weights.table.spec(linear.weight).kind == Kind::RimMatrix {
                let square = place.rows == place.ld;
                rims.entry(linear.weight).or_insert_with(|| {
                    let at = bytes;
                    bytes += place.bytes().next_multiple_of(256);
                    Reshaped { at, staging: square.then_some(at + place.bytes() / 2) }
                });
                continue;
            }
            matrices.entry(linear.weight).or_insert_with(|| {
                let at = bytes;
                bytes += place.bytes().next_multiple_of(256);
                at
            });
            if let Norm::Adaptive { table, .. } = linear.norm {
                biases.entry((linear.weight, table)).or_insert_with(|| {
                    let at = bytes;
                    let steps = weights.table.spec(table).rows;
                    bytes += (steps * place.rows * 4).next_multiple_of(256);
                    let gate_up = place.order == crate::layout::RowOrder::GateUp;
                    FoldedBias { at, steps, rows: place.rows, gate_up }
                });
            }
        }
        let memory = DeviceMemory::new(context, "the packed expert weights", bytes)?;
        Ok(Packed { memory, matrices, rims, biases })
    }

    /// Address of a packed (or, of the narrow ones at the rim, transposed) matrix.
    pub fn matrix(&self, weight: WeightId) -> Option<u64> {
        let rim = self.rims.get(&weight).map(|rim| rim.at);
        let at = self.matrices.get(&weight).copied().or(rim)?;
        Some(self.memory.address() + at as u64)
    }

    /// Address of the bias that stands for an adaptive shift in one step.
    pub fn bias(&self, weight: WeightId, table: WeightId, row: usize) -> Option<u64> {
        let bias = self.biases.get(&(weight, table))?;
        Some(self.memory.address() + (bias.at + row * bias.rows * 4) as u64)
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> u64 {
        self.memory.bytes() as u64
    }
}

/// The loop's products.
fn products(program: &Program) -> impl Iterator<Item = &Linear> {
    program.steps.iter().filter_map(|step| match &step.op {
        Op::Linear(linear) if step.stage() == Stage::Denoise => Some(linear),
        _ => None,
    })
}
