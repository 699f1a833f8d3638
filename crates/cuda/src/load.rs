//! Weight table + tensors → one block on the device. Several host threads compute and round rows
//! into page-locked slots, the calling thread sends them off.

use std::collections::{BTreeMap, VecDeque};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use pirouette_model::fp8::{self, Matrix, MlpScales};
use pirouette_model::program::{Program, WeightId};
use pirouette_model::{BackendError, SourceError, TensorSource, WeightRows, WeightTable};
use rayon::iter::{IntoParallelRefIterator, ParallelIterator};

use crate::driver::{Context, DeviceMemory, Event, Pinned, Stream};
use crate::layout::{Layout, Place};

/// Bytes of a slot; rows are longer only in absurd models, then the slot grows with them.
const SLOT_BYTES: usize = 8 << 20;
const MAX_THREADS: usize = 16;
/// Values of a weight read at a time, if a row is not longer: they stay in a core's cache.
const READ_AT_ONCE: usize = 1 << 14;

/// MLPs measured at a time: some sources hold a whole tensor for each.
const MEASURED: usize = 8;

/// How a device stores matrices and multiplies by them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Precision {
    /// bf16, sums in f32.
    #[default]
    Bf16,
    /// As bf16, but for the products of [`pirouette_model::fp8`], whose operands are E4M3.
    Fp8,
}

/// What puts the matrices that are E4M3, and what they meet, into range.
#[derive(Default)]
pub struct Scales(BTreeMap<WeightId, (Arc<MlpScales>, Matrix)>);

impl Scales {
    /// Reads the MLPs that are E4M3 at this precision through once.
    fn measure(
        precision: Precision,
        table: &WeightTable,
        source: &dyn TensorSource,
    ) -> Result<Self, SourceError> {
        let mlps = match precision {
            Precision::Bf16 => Vec::new(),
            Precision::Fp8 => table.prefix_mlps(),
        };
        let measure = |mlp: &fp8::Mlp| {
            let scales = Arc::new(MlpScales::measure(table, mlp, source)?);
            Ok([(mlp.up, (scales.clone(), Matrix::Up)), (mlp.down, (scales, Matrix::Down))])
        };
        let mut scales = BTreeMap::new();
        for mlps in mlps.chunks(MEASURED) {
            let measured: Vec<_> =
                mlps.par_iter().map(measure).collect::<Result<_, SourceError>>()?;
            scales.extend(measured.into_iter().flatten());
        }
        Ok(Scales(scales))
    }

    /// Whether any weight is E4M3.
    pub fn any(&self) -> bool {
        !self.0.is_empty()
    }

    /// Those of each MLP, by its gate‖up.
    pub fn inputs(&self) -> impl Iterator<Item = (WeightId, &MlpScales)> {
        let of_up = self.0.iter().filter(|(_, (_, matrix))| *matrix == Matrix::Up);
        of_up.map(|(id, (scales, _))| (*id, &**scales))
    }

    /// Those of a weight and which of its MLP's matrices it is; `None`: it is no E4M3.
    pub fn of(&self, id: WeightId) -> Option<(&MlpScales, Matrix)> {
        self.0.get(&id).map(|(scales, matrix)| (&**scales, *matrix))
    }
}

/// Weights on the device.
pub struct Weights {
    /// What they are.
    pub table: Arc<WeightTable>,
    /// Of those that are E4M3.
    pub scales: Scales,
    memory: DeviceMemory,
    layout: Layout,
}

impl Weights {
    /// Loads every weight of the program's table, in the orders its steps want.
    pub fn load(
        context: &Arc<Context>,
        stream: &Stream,
        program: &Program,
        precision: Precision,
        source: &dyn TensorSource,
    ) -> Result<Weights, BackendError> {
        let table = program.weights.clone();
        let scales = Scales::measure(precision, &table, source)?;
        let layout = Layout::new(program, &scales);
        let memory = DeviceMemory::new(context, "the weights", layout.bytes)?;
        let longest = layout.places.iter().map(|p| p.ld * p.element).max().unwrap_or(0);
        let slot_bytes = SLOT_BYTES.max(longest);
        let threads = std::thread::available_parallelism().map_or(4, |n| n.get()).min(MAX_THREADS);
        let (free_out, free_in) = channel();
        for _ in 0..threads + 2 {
            let _ = free_out.send(Pinned::new(context, slot_bytes)?);
        }
        // What has just been measured first: a reader of stacked arrays still has them decoded.
        let mut order = table.loading_order();
        order.sort_by_key(|id| scales.of(*id).is_none());
        let work = Work {
            table: &table,
            layout: &layout,
            scales: &scales,
            source,
            order,
            queue: Mutex::new(Queue::default()),
            changed: Condvar::new(),
            free: Mutex::new(free_in),
            slot_bytes,
        };
        let (filled_out, filled_in) = channel();
        let sums = std::thread::scope(|scope| {
            for _ in 0..threads {
                let (work, filled) = (&work, filled_out.clone());
                scope.spawn(move || work.run(&filled));
            }
            drop(filled_out);
            let sent = send(context, stream, &memory, filled_in, free_out, &layout);
            if sent.is_err() {
                work.stop();
            }
            sent
        })?;
        drop(work);
        let mut last = Pinned::new(context, sums.len() * 4)?;
        last.as_mut_slice().copy_from_slice(bytemuck::cast_slice(&sums));
        memory.copy_in(stream, layout.column_sums, &last, 0, sums.len() * 4)?;
        stream.synchronize()?;
        for (id, scales) in scales.inputs() {
            // bf16 is the upper half of f32.
            let bits: Vec<u16> =
                scales.channel_powers().iter().map(|v| (v.to_bits() >> 16) as u16).collect();
            let mut host = Pinned::new(context, bits.len() * 2)?;
            host.as_mut_slice().copy_from_slice(bytemuck::cast_slice(&bits));
            memory.copy_in(stream, layout.channels[&id], &host, 0, bits.len() * 2)?;
            stream.synchronize()?;
        }
        Ok(Weights { table, scales, memory, layout })
    }

    /// Where a weight lies.
    pub fn place(&self, id: WeightId) -> &Place {
        &self.layout.places[id.0]
    }

    /// Device address of a weight.
    pub fn address(&self, id: WeightId) -> u64 {
        self.memory.address() + self.place(id).offset as u64
    }

    /// Device address of f32 Σ_k scale[k] · W[n, k] over the stored rows of a bf16 matrix behind a
    /// LayerNorm; 0 for others.
    pub fn column_sums(&self, id: WeightId) -> u64 {
        let base = self.memory.address() + self.layout.column_sums as u64;
        self.place(id).column_sum.map_or(0, |first| base + first as u64 * 4)
    }

    /// Device address of bf16 [cols] by which the channels that a gate‖up of E4M3 reads count; 0
    /// for others.
    pub fn channels(&self, id: WeightId) -> u64 {
        self.layout.channels.get(&id).map_or(0, |at| self.memory.address() + *at as u64)
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> u64 {
        self.memory.bytes() as u64
    }
}

/// Queues copies as slots come in, hands slots back once copied; returns all column sums.
fn send(
    context: &Arc<Context>,
    stream: &Stream,
    memory: &DeviceMemory,
    filled: Receiver<Result<Filled, BackendError>>,
    free: Sender<Pinned>,
    layout: &Layout,
) -> Result<Vec<f32>, BackendError> {
    let mut sums = vec![0.0; layout.column_sum_count];
    let mut in_flight: VecDeque<(Pinned, Event)> = VecDeque::new();
    let sent = filled.into_iter().try_for_each(|part| {
        let part = part?;
        in_flight.push_back((part.slot, Event::new(context)?));
        let Some((slot, event)) = in_flight.back() else { return Ok(()) };
        memory.copy_in(stream, part.offset, slot, 0, part.bytes)?;
        event.record(stream)?;
        if let Some(first) = part.first_sum {
            sums[first..first + part.sums.len()].copy_from_slice(&part.sums);
        }
        if in_flight.len() > 1
            && let Some((slot, event)) = in_flight.pop_front()
        {
            event.synchronize()?;
            // Workers that have finished no longer want it.
            let _ = free.send(slot);
        }
        Ok(())
    });
    // Also after an error: slots may be freed once nothing is copied from them.
    let idle = stream.synchronize();
    sent.and(idle).map(|()| sums)
}

/// A slot full of rows.
struct Filled {
    slot: Pinned,
    bytes: usize,
    offset: usize,
    first_sum: Option<usize>,
    sums: Vec<f32>,
}

/// A learned scale.
type Scale = Arc<Vec<f32>>;

/// Some rows of an opened weight.
struct Task<'s> {
    rows: Arc<WeightRows<'s>>,
    /// The scale in the column sums; none: no sums.
    scale: Option<Scale>,
    id: WeightId,
    first: usize,
    count: usize,
}

#[derive(Default)]
struct Queue<'s> {
    next: usize,
    opening: usize,
    tasks: VecDeque<Task<'s>>,
    stopped: bool,
}

struct Work<'s> {
    table: &'s WeightTable,
    layout: &'s Layout,
    scales: &'s Scales,
    source: &'s dyn TensorSource,
    order: Vec<WeightId>,
    queue: Mutex<Queue<'s>>,
    changed: Condvar,
    free: Mutex<Receiver<Pinned>>,
    slot_bytes: usize,
}

impl<'s> Work<'s> {
    fn lock(&self) -> MutexGuard<'_, Queue<'s>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
    }

    /// One thread: fills slots until nothing is left; opens the next weight when idle.
    fn run(&self, filled: &Sender<Result<Filled, BackendError>>) {
        while let Some(task) = self.next_task(filled) {
            let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
            // The sender is gone after a failure.
            let Ok(slot) = free.recv() else { return };
            drop(free);
            if filled.send(self.fill(&task, slot)).is_err() {
                return;
            }
        }
    }

    fn next_task(&self, filled: &Sender<Result<Filled, BackendError>>) -> Option<Task<'s>> {
        let mut queue = self.lock();
        loop {
            if queue.stopped {
                return None;
            }
            if let Some(task) = queue.tasks.pop_front() {
                return Some(task);
            }
            if let Some(&id) = self.order.get(queue.next) {
                queue.next += 1;
                queue.opening += 1;
                drop(queue);
                let opened = self.open(id);
                queue = self.lock();
                queue.opening -= 1;
                match opened {
                    Ok((rows, scale)) => queue.tasks.extend(self.split(id, rows, scale)),
                    Err(error) => {
                        let _ = filled.send(Err(error));
                        queue.stopped = true;
                    }
                }
                self.changed.notify_all();
            } else if queue.opening > 0 {
                queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
            } else {
                return None;
            }
        }
    }

    /// A weight and the scale of the LayerNorm in front of it.
    fn open(&self, id: WeightId) -> Result<(Arc<WeightRows<'s>>, Option<Scale>), BackendError> {
        let rows = Arc::new(self.table.open(id, self.source)?);
        let Some(norm) = self.layout.places[id.0].norm_scale else { return Ok((rows, None)) };
        let mut scale = vec![0.0; self.table.spec(norm).cols];
        self.table.open(norm, self.source)?.fill(0, &mut scale)?;
        Ok((rows, Some(Arc::new(scale))))
    }

    /// Cuts a weight into slots.
    fn split(
        &self,
        id: WeightId,
        rows: Arc<WeightRows<'s>>,
        scale: Option<Scale>,
    ) -> Vec<Task<'s>> {
        let place = &self.layout.places[id.0];
        let step = self.slot_bytes / (place.ld * place.element);
        (0..place.rows)
            .step_by(step)
            .map(|first| Task {
                rows: rows.clone(),
                scale: scale.clone(),
                id,
                first,
                count: step.min(place.rows - first),
            })
            .collect()
    }

    fn fill(&self, task: &Task<'_>, mut slot: Pinned) -> Result<Filled, BackendError> {
        let (spec, place) = (self.table.spec(task.id), &self.layout.places[task.id.0]);
        let row_bytes = place.ld * place.element;
        let bytes = task.count * row_bytes;
        let mut sums = Vec::with_capacity(task.scale.as_ref().map_or(0, |_| task.count));
        let source = |row: usize| place.order.source(row, spec.rows);
        let mut buffer = vec![0.0f32; spec.cols * (READ_AT_ONCE / spec.cols).max(1)];
        let mut read: &[f32] = &[];
        let scales = self.scales.of(task.id);
        let mut scaled = vec![0.0; scales.map_or(0, |_| spec.cols)];
        for (i, to) in slot.as_mut_slice()[..bytes].chunks_exact_mut(row_bytes).enumerate() {
            let at = task.first + i;
            let Some(first) = source(at) else {
                to.fill(0);
                if task.scale.is_some() {
                    sums.push(0.0);
                }
                continue;
            };
            if read.is_empty() {
                // Rows that follow one another in the tensor too are read in one go.
                let longest = (buffer.len() / spec.cols).min(task.count - i);
                let run =
                    (1..longest).take_while(|n| source(at + n) == Some(first + n)).count() + 1;
                task.rows.fill(first, &mut buffer[..run * spec.cols])?;
                read = &buffer[..run * spec.cols];
            }
            let (row, rest) = read.split_at(spec.cols);
            read = rest;
            let (to, padding) = to.split_at_mut(spec.cols * place.element);
            padding.fill(0);
            if let Some((scales, matrix)) = scales {
                scaled.copy_from_slice(row);
                scales.scale_row(matrix, first, &mut scaled);
                for (to, v) in to.iter_mut().zip(&scaled) {
                    *to = fp8::encode(*v);
                }
                continue;
            }
            if place.element == 4 {
                to.copy_from_slice(bytemuck::cast_slice(row));
                continue;
            }
            let to: &mut [u16] = bytemuck::cast_slice_mut(to);
            round_row(row, to);
            if let Some(scale) = &task.scale {
                sums.push(weighted_sum(scale, to));
            }
        }
        let offset = place.offset + task.first * row_bytes;
        let first_sum = place.column_sum.map(|first| first + task.first);
        Ok(Filled { slot, bytes, offset, first_sum, sums })
    }
}

/// Rounds to nearest even.
fn round_row(row: &[f32], to: &mut [u16]) {
    for (to, &x) in to.iter_mut().zip(row) {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        *to = if x.is_nan() { 0x7fff } else { rounded as u16 };
    }
}

/// Σ scale · w over the bf16 values of a row.
fn weighted_sum(scale: &[f32], row: &[u16]) -> f32 {
    let value = |w: u16| f32::from_bits((w as u32) << 16) as f64;
    scale.iter().zip(row).map(|(s, w)| *s as f64 * value(*w)).sum::<f64>() as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_as_the_half_crate_does() {
        let row: Vec<f32> =
            [0.0, -0.0, 1.0, 257.0 / 256.0, 259.0 / 256.0, 3.4e38, -1e-40, f32::INFINITY]
                .into_iter()
                .chain((0..1000).map(|i| (i as f32 - 500.0).powi(3) * 0.000_123))
                .collect();
        let mut got = vec![0; row.len()];
        round_row(&row, &mut got);
        let want: Vec<u16> = row.iter().map(|&x| half::bf16::from_f32(x).to_bits()).collect();
        assert_eq!(got, want);
        let mut nan = [0; 2];
        round_row(&[f32::from_bits(0x7fff_ffff), f32::from_bits(u32::MAX)], &mut nan);
        assert!(nan.iter().all(|&bits| half::bf16::from_bits(bits).is_nan()));
        let scale: Vec<f32> = (0..1000).map(|i| 1.0 + i as f32 / 7.0).collect();
        let terms = want[8..].iter().zip(&scale);
        let sum: f64 = terms.map(|(&b, s)| half::bf16::from_bits(b).to_f64() * *s as f64).sum();
        let got = weighted_sum(&scale, &got[8..]) as f64;
        assert!((got - sum).abs() <= 1e-6 * sum.abs().max(1.0));
    }
}
