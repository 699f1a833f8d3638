//! Looking into a compiled program: buffers read and written by name, steps run one at a time.
//! For conformance tests and for finding the first step that diverges; not on the fast path.

use std::ops::Range;

use pirouette_model::program::{BufferId, Element, Epilogue, Op, Program};
use pirouette_model::{BackendError, fp8};
use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::ParallelSliceMut;

use crate::denoise::{BLOCK_ROWS, block_element};
use crate::driver::Pinned;
use crate::executable::CudaExecutable;

impl CudaExecutable {
    /// A buffer's values, `rows · cols`, in the recorded order of columns (`lengths`, `tokens`
    /// and images as numbers). `None` if the program has no such buffer. At fp8 hidden values of
    /// the prefix tower are 2^n times themselves, n of each unit in each layer (`model::fp8`), and
    /// speak of the layer whose `up` ran last.
    pub fn read_buffer(&self, name: &str) -> Result<Option<Vec<f32>>, BackendError> {
        let program = &self.bound.program;
        let Some(id) = program.buffer(name) else { return Ok(None) };
        let buffer = &program.buffers[id.0];
        let (memory, at) = self.bound.locate(id);
        let bytes = self.stored_bytes(id);
        let host = Pinned::new(&self.shared.context, bytes)?;
        memory.copy_out(&self.shared.stream, at, &host, 0, bytes)?;
        self.shared.stream.synchronize()?;
        let (place, order) = (self.places(id), column_order(program, id));
        let (stored, form) = (host.as_slice(), self.form(id));
        let factors = self.row_factors(id)?;
        let mut values = vec![0.0; buffer.rows * buffer.cols];
        let rows = values.par_chunks_exact_mut(buffer.cols.max(1)).enumerate();
        rows.for_each(|(row, out)| {
            let factor = factors.get(row).unwrap_or(&1.0);
            for (c, out) in out.iter_mut().enumerate() {
                let at = place(row, order.as_ref().map_or(c, |o| o(c)));
                *out = decode(stored, at, form) * factor;
            }
        });
        Ok(Some(values))
    }

    /// Fills a buffer of f32 or bf16, `rows · cols` values in the recorded order of columns.
    ///
    /// # Panics
    /// If there is no such buffer or the number of values is wrong: callers name their own.
    pub fn write_buffer(&mut self, name: &str, values: &[f32]) -> Result<(), BackendError> {
        let program = &self.bound.program;
        let id = program.buffer(name).unwrap_or_else(|| panic!("no buffer `{name}`"));
        let buffer = &program.buffers[id.0];
        assert_eq!(values.len(), buffer.rows * buffer.cols, "values of `{name}`");
        let (memory, at) = self.bound.locate(id);
        let bytes = self.stored_bytes(id);
        let mut host = Pinned::new(&self.shared.context, bytes)?;
        let (place, order) = (self.places(id), column_order(program, id));
        let (stored, form) = (host.as_mut_slice(), self.form(id));
        let factors = self.row_factors(id)?;
        let write = |to: &mut [u8], place_row: usize, row: usize, values: &[f32]| {
            let factor = factors.get(row).unwrap_or(&1.0);
            for (c, value) in values.iter().enumerate() {
                let at = place(place_row, order.as_ref().map_or(c, |o| o(c)));
                encode(to, at, form, *value / factor);
            }
        };
        let rows = values.chunks_exact(buffer.cols.max(1)).enumerate();
        if self.bound.in_blocks(id) {
            rows.for_each(|(row, values)| write(stored, row, row, values));
        } else {
            let pitch = self.bound.pitch(id) * form.bytes();
            let parts = stored.par_chunks_mut(pitch).zip(rows.collect::<Vec<_>>());
            parts.for_each(|(to, (row, values))| write(to, 0, row, values));
        }
        memory.copy_in(&self.shared.stream, at, &host, 0, bytes)?;
        self.shared.stream.synchronize()
    }

    /// Of a buffer of E4M3 numbers, the factors of the rows' product, as the last step that made
    /// such rows left them: they take the row's own power of two out. Else nothing.
    fn row_factors(&self, id: BufferId) -> Result<Vec<f32>, BackendError> {
        if !self.bound.is_e4m3(id) {
            return Ok(Vec::new());
        }
        let (memory, place) = self.bound.locate_hidden_factors();
        let host = Pinned::new(&self.shared.context, place.len())?;
        memory.copy_out(&self.shared.stream, place.start, &host, 0, place.len())?;
        self.shared.stream.synchronize()?;
        let factor = |pair: &[u8; 8]| f32::from_le_bytes([pair[0], pair[1], pair[2], pair[3]]);
        Ok(host.as_slice().as_chunks().0.iter().map(factor).collect())
    }

    /// Where an element of a buffer is stored, by row and stored column.
    fn places(&self, id: BufferId) -> impl Fn(usize, usize) -> usize + use<> {
        let (in_blocks, pitch) = (self.bound.in_blocks(id), self.bound.pitch(id));
        move |row, column| {
            if in_blocks { block_element(row, column) } else { row * pitch + column }
        }
    }

    /// Bytes that a buffer's elements lie in.
    fn stored_bytes(&self, id: BufferId) -> usize {
        let buffer = &self.bound.program.buffers[id.0];
        let rows = if self.bound.in_blocks(id) { BLOCK_ROWS } else { buffer.rows };
        rows * self.bound.pitch(id) * self.form(id).bytes()
    }

    /// How a buffer's elements are stored.
    fn form(&self, id: BufferId) -> Form {
        match self.bound.program.buffers[id.0].element {
            Element::Activation if self.bound.in_bytes(id) => Form::E4m3,
            Element::Activation => Form::Bf16,
            Element::F32 => Form::F32,
            Element::U32 => Form::U32,
            Element::U8 => Form::U8,
        }
    }

    /// Whether a buffer holds E4M3 numbers.
    pub fn is_e4m3(&self, name: &str) -> bool {
        self.bound.program.buffer(name).is_some_and(|id| self.bound.is_e4m3(id))
    }

    /// Runs some steps on what the buffers hold.
    pub fn run_steps(&mut self, steps: Range<usize>) -> Result<(), BackendError> {
        self.shared.context.make_current()?;
        for (i, launch) in self.plan.launches[self.plan.of_steps(steps)].iter().enumerate() {
            self.shared.stream.launch(launch, self.plan.dependent && i > 0)?;
        }
        self.shared.stream.synchronize()
    }
}

/// Where a recorded column lies: q and k keep the packed order of their heads.
fn column_order(program: &Program, id: BufferId) -> Option<impl Fn(usize) -> usize> {
    let head_dim = program.steps.iter().find_map(|step| match &step.op {
        Op::Linear(linear) => match &linear.epilogue {
            Epilogue::Rope { q, k, head_dim, .. } => {
                let is_q = q.is_some_and(|q| q.buffer == id);
                (is_q || k.buffer == id).then_some(*head_dim)
            }
            _ => None,
        },
        _ => None,
    })?;
    (head_dim % 16 == 0).then_some(move |c: usize| {
        let (head, d, half) = (c / head_dim, c % head_dim, head_dim / 2);
        let j = d % half;
        head * head_dim + j / 8 * 16 + j % 8 + if d < half { 0 } else { 8 }
    })
}

/// How an element is stored.
#[derive(Clone, Copy)]
enum Form {
    Bf16,
    E4m3,
    F32,
    U32,
    U8,
}

impl Form {
    fn bytes(self) -> usize {
        match self {
            Form::E4m3 | Form::U8 => 1,
            Form::Bf16 => 2,
            Form::F32 | Form::U32 => 4,
        }
    }
}

fn decode(stored: &[u8], at: usize, form: Form) -> f32 {
    let word = |at: usize| [stored[at], stored[at + 1], stored[at + 2], stored[at + 3]];
    match form {
        Form::Bf16 => half::bf16::from_le_bytes([stored[2 * at], stored[2 * at + 1]]).to_f32(),
        Form::E4m3 => fp8::decode(stored[at]),
        Form::F32 => f32::from_le_bytes(word(4 * at)),
        Form::U32 => u32::from_le_bytes(word(4 * at)) as f32,
        Form::U8 => stored[at] as f32,
    }
}

fn encode(stored: &mut [u8], at: usize, form: Form, value: f32) {
    match form {
        Form::Bf16 => {
            let bytes = half::bf16::from_f32(value).to_le_bytes();
            stored[2 * at..2 * at + 2].copy_from_slice(&bytes);
        }
        Form::E4m3 => stored[at] = fp8::encode(value),
        Form::F32 => stored[4 * at..4 * at + 4].copy_from_slice(&value.to_le_bytes()),
        Form::U32 => stored[4 * at..4 * at + 4].copy_from_slice(&(value as u32).to_le_bytes()),
        Form::U8 => stored[at] = value as u8,
    }
}
