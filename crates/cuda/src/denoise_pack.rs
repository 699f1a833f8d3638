//! Host twin of `kernels/denoise_load.cu` and `denoise_rim_load.cu`: the loop's weights as its
//! kernels want them, made on the device when the first program wants them. Of few rows these are
//! all of the expert's, in the order of the denoise products; of many rows those at the rim, and
//! what adaptive shifts add to the tower products.

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
    fold_rows: Function,
    transpose: Function,
    round: Function,
    split: Function,
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
            fold_rows: rim.function("denoise_fold_rows", 0)?,
            transpose: rim.function("denoise_transpose", 0)?,
            round: rim.function("denoise_round", 0)?,
            split: rim.function("denoise_split", 0)?,
        })
    }

    /// Packs what the products of a loop of `size` need, and folds adaptive shifts into biases.
    pub fn pack(
        &self,
        stream: &Stream,
        weights: &Weights,
        program: &Program,
        size: Size,
    ) -> Result<Packed, BackendError> {
        let packed = Packed::plan(&self.context, weights, program, size)?;
        let base = packed.memory.address();
        let threads = |count: usize| [count.div_ceil(256) as u32, 1, 1];
        for (&weight, &Reshaped { at, how }) in &packed.rims {
            let place = weights.place(weight);
            let (rows, cols) = (place.rows as u32, place.ld as u32);
            let grid = threads(place.rows * place.ld);
            let from = Arg::of(&weights.address(weight));
            let to_rows = |function: &Function| {
                let to = Arg::of(&(base + at as u64));
                let args = vec![from.clone(), to, Arg::of(&rows), Arg::of(&cols)];
                Launch::new(function.clone(), grid, 256, args)
            };
            let launch = match how {
                Reshaping::Transposed => to_rows(&self.transpose),
                Reshaping::Split => to_rows(&self.split),
                Reshaping::Packed { staging } => {
                    let to = base + staging as u64;
                    let args = vec![from.clone(), Arg::of(&to), Arg::of(&(rows * cols))];
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
            let (rows, cols, steps) = (place.rows as u32, place.ld as u32, bias.steps as u32);
            let from = packed.matrices.get(&weight).map(|at| base + *at as u64);
            let mut args = vec![
                Arg::of(&from.unwrap_or(weights.address(weight))),
                Arg::of(&weights.address(table)),
                Arg::of(&(base + bias.at as u64)),
                Arg::of(&rows),
                Arg::of(&cols),
            ];
            let launch = if from.is_some() {
                args.push(Arg::of(&(bias.gate_up as u32)));
                Launch::new(self.fold_shift.clone(), [rows / 16, steps, 1], 32, args)
            } else {
                Launch::new(self.fold_rows.clone(), [rows.div_ceil(8), steps, 1], 256, args)
            };
            stream.launch(&launch, false)?;
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

/// Which kernels a loop runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// The denoise products.
    Few,
    /// Tower products.
    Many,
}

/// A matrix of the rim, f32 where it comes from, and where it goes.
struct Reshaped {
    at: usize,
    how: Reshaping,
}

#[derive(Clone, Copy)]
enum Reshaping {
    /// f32, input-major.
    Transposed,
    /// bf16 in the order of the products; `staging` is for its rows.
    Packed { staging: usize },
    /// Two bf16 matrices side by side, the rounded and what that left.
    Split,
}

/// A folded bias table f32 [steps][rows].
struct FoldedBias {
    at: usize,
    steps: usize,
    rows: usize,
    gate_up: bool,
}

/// The loop's weights as its kernels want them.
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
        size: Size,
    ) -> Result<Self, BackendError> {
        let (mut bytes, mut matrices, mut biases) = (0, BTreeMap::new(), BTreeMap::new());
        let mut rims = BTreeMap::new();
        for linear in products(program) {
            let place = weights.place(linear.weight);
            if weights.table.spec(linear.weight).kind == Kind::RimMatrix {
                rims.entry(linear.weight).or_insert_with(|| {
                    let at = bytes;
                    bytes += place.bytes().next_multiple_of(256);
                    let how = match (place.rows == place.ld, size) {
                        (false, _) => Reshaping::Transposed,
                        (true, Size::Few) => Reshaping::Packed { staging: at + place.bytes() / 2 },
                        (true, Size::Many) => Reshaping::Split,
                    };
                    Reshaped { at, how }
                });
                continue;
            }
            if size == Size::Few {
                matrices.entry(linear.weight).or_insert_with(|| {
                    let at = bytes;
                    bytes += place.bytes().next_multiple_of(256);
                    at
                });
            }
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

    /// Address of a packed (at the rim, transposed or split) matrix.
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
