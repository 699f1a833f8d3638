//! Checkpoint → packed weights, once at load, row by row: no weight is ever whole in f32 unless it
//! is stored so.

use std::sync::Mutex;
use std::sync::PoisonError;

use pirouette_model::fp8::{self, Mlp, MlpScales};
use pirouette_model::program::WeightId;
use pirouette_model::weights::{Kind, WeightSpec};
use pirouette_model::{BackendError, SourceError, TensorSource, WeightRows, WeightTable};

use crate::device::Precision;
use crate::driver::memory::{Words, reserve};
use crate::gemm::operand::{Matrix, Meets, bf16_bits, pack_columns};
use crate::gemm::{CHUNK, Storage};

/// Rows of the token table that a thread takes at a time.
const TABLE_ROWS: usize = 64;
/// MLPs measured at a time: some sources hold a whole tensor for each.
const MEASURED: usize = 8;

/// One loaded weight.
pub(crate) enum Stored {
    Matrix(Matrix),
    /// The token table: pairs of bf16, or f32.
    Table {
        cols: usize,
        storage: Storage,
        words: Words,
    },
    Vector(Vec<f32>),
}

/// All weights of a model.
pub(crate) struct Weights {
    pub(crate) table: WeightTable,
    /// Storage of matrices.
    pub(crate) storage: Storage,
    /// By [`WeightId`].
    pub(crate) stored: Vec<Stored>,
}

impl Weights {
    /// Loads in `loading_order`, all `threads` on the rows of one weight at a time. MLPs whose
    /// products are E4M3 come first, each with all that its scales depend on: a reader of stacked
    /// arrays decodes those once.
    pub(crate) fn load(
        table: WeightTable,
        precision: Precision,
        source: &dyn TensorSource,
        threads: usize,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Weights, BackendError> {
        let storage = precision.storage();
        let bytes = table.specs.iter().map(|s| stored_bytes(s, storage)).sum();
        reserve(bytes, "the model")?;
        let total = table.specs.iter().map(|s| s.len() as u64).sum();
        let mut stored: Vec<Option<Stored>> = table.specs.iter().map(|_| None).collect();
        let mut done = 0;
        progress(done, total);
        let mut load = |id: WeightId, rounding: Option<Rounding<'_>>| -> Result<(), BackendError> {
            let rows = table.open(id, source)?;
            let spec = table.spec(id);
            stored[id.0] = Some(pack(spec, &rows, rounding, storage, threads)?);
            done += spec.len() as u64;
            progress(done, total);
            Ok(())
        };
        let mlps = if precision == Precision::Fp8 { table.prefix_mlps() } else { Vec::new() };
        for mlps in mlps.chunks(threads.min(MEASURED)) {
            for (mlp, scales) in mlps.iter().zip(&measure(&table, mlps, source)?) {
                load(mlp.up, Some(Rounding { scales, matrix: fp8::Matrix::Up }))?;
                load(mlp.down, Some(Rounding { scales, matrix: fp8::Matrix::Down }))?;
            }
        }
        let loaded = |id: &WeightId| mlps.iter().any(|mlp| [mlp.up, mlp.down].contains(id));
        for id in table.loading_order().into_iter().filter(|id| !loaded(id)) {
            load(id, None)?;
        }
        let stored = stored.into_iter().flatten().collect();
        Ok(Weights { table, storage, stored })
    }

    /// Bytes of all of them.
    pub(crate) fn bytes(&self) -> usize {
        let each = self.stored.iter().map(|s| match s {
            Stored::Matrix(matrix) => matrix.words.bytes(),
            Stored::Table { words, .. } => words.bytes(),
            Stored::Vector(values) => values.len() * 4,
        });
        each.sum()
    }

    /// Row of a token table, to f32.
    pub(crate) fn token_row(&self, id: usize, row: usize, out: &mut [f32]) {
        let Stored::Table { cols, storage, words } = &self.stored[id] else {
            panic!("weight {} is no token table", self.table.spec(WeightId(id)).name);
        };
        let width = row_words(*cols, *storage);
        let words = &words.as_slice()[row * width..][..width];
        match storage {
            Storage::F32 => {
                for (o, w) in out.iter_mut().zip(words) {
                    *o = f32::from_bits(*w);
                }
            }
            Storage::Bf16 => {
                for (i, o) in out.iter_mut().enumerate() {
                    *o = f32::from_bits(words[i / 2] >> (16 * (i % 2)) << 16);
                }
            }
        }
    }
}

/// Words of a row of the token table.
fn row_words(cols: usize, storage: Storage) -> usize {
    match storage {
        Storage::F32 => cols,
        Storage::Bf16 => cols.div_ceil(2),
    }
}

/// Bytes of a weight once stored, padding aside.
fn stored_bytes(spec: &WeightSpec, storage: Storage) -> u64 {
    let each = match (spec.kind, storage) {
        (Kind::Matrix | Kind::TokenTable, Storage::Bf16) => 2,
        _ => 4,
    };
    spec.len() as u64 * each
}

/// A matrix whose product takes both operands as E4M3.
#[derive(Clone, Copy)]
struct Rounding<'a> {
    scales: &'a MlpScales,
    matrix: fp8::Matrix,
}

impl Rounding<'_> {
    /// Each value to the nearest that is an E4M3 number times its power of two.
    fn round_row(self, row: usize, values: &mut [f32]) {
        self.scales.scale_row(self.matrix, row, values);
        for v in &mut *values {
            *v = fp8::round(*v);
        }
        self.scales.unscale_row(self.matrix, row, values);
    }

    /// What becomes of the rows that the matrix meets.
    fn meets(self) -> Meets {
        match self.matrix {
            fp8::Matrix::Up => Meets::Rows(self.scales.channel_powers()),
            fp8::Matrix::Down => {
                Meets::Hidden(self.scales.hidden.iter().map(|e| fp8::power(*e)).collect())
            }
        }
    }
}

/// The scales of some MLPs, each measured by a thread.
fn measure(
    table: &WeightTable,
    mlps: &[Mlp],
    source: &dyn TensorSource,
) -> Result<Vec<MlpScales>, SourceError> {
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            mlps.iter().map(|mlp| scope.spawn(|| MlpScales::measure(table, mlp, source))).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, _>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        threads.into_iter().map(join).collect()
    })
}

fn pack(
    spec: &WeightSpec,
    rows: &WeightRows<'_>,
    rounding: Option<Rounding<'_>>,
    storage: Storage,
    threads: usize,
) -> Result<Stored, BackendError> {
    match spec.kind {
        Kind::Matrix | Kind::RimMatrix => {
            let storage = if spec.kind == Kind::Matrix { storage } else { Storage::F32 };
            let mut matrix = Matrix::zeroed(spec.rows, spec.cols, storage, &spec.name)?;
            matrix.meets = rounding.map(Rounding::meets);
            pack_columns_of(&mut matrix, threads, |row, out| {
                rows.fill(row, out)?;
                if let Some(rounding) = rounding {
                    for (row, values) in (row..).zip(out.chunks_exact_mut(spec.cols)) {
                        rounding.round_row(row, values);
                    }
                }
                Ok(())
            })?;
            Ok(Stored::Matrix(matrix))
        }
        Kind::TokenTable => {
            let width = row_words(spec.cols, storage);
            let mut words = Words::zeroed(spec.rows * width, &spec.name)?;
            let part = TABLE_ROWS * width;
            in_parallel(words.as_mut_slice(), part, threads, |index, out| {
                let mut values = vec![0.0; out.len() / width * spec.cols];
                rows.fill(index * TABLE_ROWS, &mut values)?;
                for (out, row) in out.chunks_exact_mut(width).zip(values.chunks_exact(spec.cols)) {
                    pack_table_row(row, storage, out);
                }
                Ok(())
            })?;
            Ok(Stored::Table { cols: spec.cols, storage, words })
        }
        Kind::Vector => {
            let mut values = vec![0.0; spec.len()];
            rows.fill(0, &mut values)?;
            Ok(Stored::Vector(values))
        }
    }
}

/// Packs a matrix, `fill(row, out)` giving its rows from `row` on; threads take panels in turn.
pub(crate) fn pack_columns_of(
    matrix: &mut Matrix,
    threads: usize,
    fill: impl Fn(usize, &mut [f32]) -> Result<(), SourceError> + Sync,
) -> Result<(), SourceError> {
    let (n, k, storage, panel) = (matrix.n, matrix.k, matrix.storage, matrix.panel_words());
    in_parallel(matrix.words.as_mut_slice(), panel, threads, |index, out| {
        let rows = index * CHUNK..((index + 1) * CHUNK).min(n);
        let mut values = vec![0.0f32; rows.len() * k];
        fill(rows.start, &mut values)?;
        let columns: Vec<&[f32]> = values.chunks_exact(k).collect();
        pack_columns(&columns, storage, |chunk, column, words| {
            let block = &mut out[chunk * CHUNK * CHUNK..][..CHUNK * CHUNK];
            for (w, word) in words.iter().enumerate() {
                block[w * CHUNK + column] = *word;
            }
        });
        Ok(())
    })
}

fn pack_table_row(row: &[f32], storage: Storage, out: &mut [u32]) {
    match storage {
        Storage::F32 => {
            for (o, v) in out.iter_mut().zip(row) {
                *o = v.to_bits();
            }
        }
        Storage::Bf16 => {
            for (o, pair) in out.iter_mut().zip(row.chunks(2)) {
                *o = bf16_bits(pair[0]) | pair.get(1).map_or(0, |v| bf16_bits(*v) << 16);
            }
        }
    }
}

/// Calls `fill(index, part)` for every part of `part` words, parts taken by the threads in turn,
/// until one fails.
fn in_parallel(
    words: &mut [u32],
    part: usize,
    threads: usize,
    fill: impl Fn(usize, &mut [u32]) -> Result<(), SourceError> + Sync,
) -> Result<(), SourceError> {
    let parts = Mutex::new(words.chunks_mut(part.max(1)).enumerate());
    let failed = Mutex::new(None);
    let work = || {
        loop {
            let next = parts.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some((index, part)) = next else { return };
            if let Err(error) = fill(index, part) {
                failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                // Nothing is left for the others.
                parts.lock().unwrap_or_else(PoisonError::into_inner).by_ref().for_each(drop);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(work);
        }
        work();
    });
    failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}
