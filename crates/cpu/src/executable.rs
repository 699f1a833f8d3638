//! Interpreter: the planned steps, walked by all workers together.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytemuck::{cast_slice, cast_slice_mut};
use pirouette_model::program::{BufferId, Program, Stage, Step};
use pirouette_model::{BackendError, Executable, Inputs, StageTimes};

use crate::driver::memory::{Shared, Words, reserve};
use crate::driver::pool::{Abandoned, Pool, Worker};
use crate::gemm::operand::Matrix;
use crate::gemm::{Isa, Session, attention, edges, keys, product};
use crate::plan::{LiveRows, Plan, Planner, StepPlan};
use crate::weights::{Stored, Weights};

/// What a run's workers share.
pub(crate) struct Context<'a> {
    pub(crate) plan: &'a Plan,
    pub(crate) weights: &'a Weights,
    pub(crate) arena: &'a Shared,
    /// The packed A operand of the product under way.
    pub(crate) packed: &'a Shared,
    /// The A operand that a product packs for the next one; absent: through the arena.
    pub(crate) fed: Option<&'a Shared>,
    /// Of rows that the last E4M3 product read, a power of two for their hidden values.
    pub(crate) powers: &'a Shared,
    /// Packed keys and values.
    pub(crate) stores: &'a Shared,
    /// Live rows of each of the plan's row sets.
    pub(crate) rows: Vec<LiveRows>,
    /// Real prefix tokens of each sample.
    pub(crate) prefix_len: Vec<usize>,
    pub(crate) inputs: &'a Inputs<'a>,
}

impl Context<'_> {
    /// The matrix behind a weight; the planner has checked that it is one.
    #[inline]
    pub(crate) fn matrix(&self, weight: usize) -> &Matrix {
        match &self.weights.stored[weight] {
            Stored::Matrix(matrix) => matrix,
            _ => unreachable!("a product's weight is a matrix"),
        }
    }

    /// Whether a row of a suffix is a given action.
    #[inline]
    pub(crate) fn is_given(&self, (group, row): (u32, u32)) -> bool {
        let previous = self.inputs.previous;
        previous.is_some_and(|p| p.row(group as usize, row as usize).1 > 0.0)
    }

    /// The vector or table behind a weight.
    #[inline]
    pub(crate) fn vector(&self, weight: usize) -> &[f32] {
        match &self.weights.stored[weight] {
            Stored::Vector(values) => values,
            _ => unreachable!("biases and tables are vectors"),
        }
    }
}

/// The buffers of a program between two steps.
pub struct Arena<'a> {
    program: &'a Program,
    plan: &'a Plan,
    words: &'a [u32],
}

impl Arena<'_> {
    /// Values of an activation or f32 buffer, `[rows, cols]`. Only buffers that are alive at this
    /// point of the program hold what their name says.
    pub fn floats(&self, buffer: BufferId) -> &[f32] {
        let b = &self.program.buffers[buffer.0];
        let start = self.plan.arena.offsets[buffer.0] / 4;
        cast_slice(&self.words[start..][..b.rows * b.cols])
    }
}

/// Sees a step that has just run and all buffers.
pub type Observer<'a> = dyn FnMut(&Step, &Arena<'_>) + 'a;

/// A program compiled for the CPU.
pub struct CpuExecutable {
    program: Arc<Program>,
    plan: Plan,
    weights: Arc<Weights>,
    pool: Arc<Mutex<Pool>>,
    isa: Isa,
    arena: Shared,
    packed: Shared,
    fed: Shared,
    powers: Shared,
    stores: Shared,
    scratch: Vec<Mutex<Words>>,
    /// Task counters, two for each step.
    counters: Vec<AtomicUsize>,
    /// Milliseconds of each step of the last run; empty unless asked for.
    step_ms: Vec<f64>,
    timing: bool,
}

impl CpuExecutable {
    pub(crate) fn new(
        program: Arc<Program>,
        weights: Arc<Weights>,
        pool: Arc<Mutex<Pool>>,
        isa: Isa,
    ) -> Result<Self, BackendError> {
        let threads = lock(&pool).count();
        let plan = Planner::plan(&program, &weights, isa);
        let words = 2 * plan.packed_words + plan.store_words + threads * plan.scratch_words;
        reserve((plan.arena.bytes + 4 * words) as u64, "the arena")?;
        let scratch = (0..threads)
            .map(|_| Ok(Mutex::new(Words::zeroed(plan.scratch_words, "scratch memory")?)))
            .collect::<Result<_, BackendError>>()?;
        Ok(CpuExecutable {
            arena: Shared::zeroed(plan.arena.bytes.div_ceil(4), "the arena")?,
            packed: Shared::zeroed(plan.packed_words, "packed activations")?,
            fed: Shared::zeroed(plan.packed_words, "packed activations")?,
            powers: Shared::zeroed(plan.power_words, "powers of two")?,
            stores: Shared::zeroed(plan.store_words, "packed keys and values")?,
            scratch,
            counters: (0..2 * program.steps.len()).map(|_| AtomicUsize::new(0)).collect(),
            step_ms: Vec::new(),
            timing: false,
            program,
            plan,
            weights,
            pool,
            isa,
        })
    }

    /// Bytes of activations, packed operands and scratch memory.
    pub fn arena_bytes(&self) -> usize {
        let scratch = self.scratch.len() * self.plan.scratch_words * 4;
        self.arena.bytes() + 2 * self.packed.bytes() + self.stores.bytes() + scratch
    }

    /// Switches timing of single steps on or off; see [`CpuExecutable::step_ms`].
    pub fn time_steps(&mut self, on: bool) {
        self.timing = on;
    }

    /// Milliseconds of each step of the last run, by step; empty unless timing is on.
    pub fn step_ms(&self) -> &[f64] {
        &self.step_ms
    }

    /// Runs step by step; `observe` sees all buffers after each, and the times include it.
    pub fn run_observed(
        &mut self,
        inputs: &Inputs<'_>,
        actions: &mut [f32],
        observe: &mut Observer<'_>,
    ) -> Result<StageTimes, BackendError> {
        self.walk(inputs, actions, Some(observe))
    }

    fn walk(
        &mut self,
        inputs: &Inputs<'_>,
        actions: &mut [f32],
        observe: Option<&mut Observer<'_>>,
    ) -> Result<StageTimes, BackendError> {
        let start = Instant::now();
        let program = self.program.clone();
        inputs.check(&program)?;
        if actions.len() != inputs.noise.len() {
            let (got, want) = (actions.len(), inputs.noise.len());
            return Err(BackendError::InputSize { name: "actions", got, want });
        }
        self.copy_in(&program, inputs);
        let copied = Instant::now();
        let stamps = match observe {
            None => self.run_steps(&program, inputs, 0..program.steps.len())?,
            Some(observe) => {
                let mut stamps = vec![copied];
                for at in 0..program.steps.len() {
                    let ran = self.run_steps(&program, inputs, at..at + 1)?;
                    stamps.extend(ran.last());
                    let (plan, words) = (&self.plan, &*self.arena.exclusive());
                    observe(&program.steps[at], &Arena { program: &program, plan, words });
                }
                stamps
            }
        };
        let ran = Instant::now();
        if let Some(id) = program.buffer("actions") {
            let at = self.plan.arena.offsets[id.0] / 4;
            let words = &self.arena.exclusive()[at..at + actions.len()];
            actions.copy_from_slice(cast_slice(words));
        }
        let mut times = self.stage_times(&program, &stamps);
        let ms = |from: Instant, to: Instant| (to - from).as_secs_f64() * 1e3;
        let end = Instant::now();
        times.copy_in_ms = ms(start, copied);
        times.copy_out_ms = ms(ran, end);
        times.total_ms = ms(start, end);
        Ok(times)
    }

    /// State and noise; pixels and token ids are read where they are.
    fn copy_in(&mut self, program: &Program, inputs: &Inputs<'_>) {
        let offsets = &self.plan.arena.offsets;
        let arena = self.arena.exclusive();
        for (name, values) in [("state", inputs.state), ("actions", inputs.noise)] {
            if let Some(id) = program.buffer(name) {
                let words = &mut arena[offsets[id.0] / 4..][..values.len()];
                words.copy_from_slice(cast_slice(values));
            }
        }
    }

    /// Runs some steps; returns the time before the first and after each of them.
    fn run_steps(
        &mut self,
        program: &Program,
        inputs: &Inputs<'_>,
        range: std::ops::Range<usize>,
    ) -> Result<Vec<Instant>, BackendError> {
        let (shape, tokens) = (&program.shape, program.config.vision.tokens());
        let context = Context {
            plan: &self.plan,
            weights: &self.weights,
            arena: &self.arena,
            packed: &self.packed,
            // Steps that run one by one leave everything in the arena, to be seen.
            fed: (range.len() == program.steps.len()).then_some(&self.fed),
            powers: &self.powers,
            stores: &self.stores,
            rows: self.plan.row_sets.iter().map(|s| s.live(shape, tokens, inputs)).collect(),
            prefix_len: (0..shape.batch)
                .map(|b| inputs.cameras[b] as usize * tokens + inputs.prompt_len[b] as usize)
                .collect(),
            inputs,
        };
        for counter in &self.counters[2 * range.start..2 * range.end] {
            counter.store(0, Ordering::Relaxed);
        }
        let stamps = Mutex::new(Vec::with_capacity(range.len() + 1));
        let (counters, isa, scratch) = (&self.counters, self.isa, &self.scratch);
        let job = |worker: &Worker<'_>| {
            let _session = Session::enter(isa);
            let mut scratch = lock(&scratch[worker.index]);
            // Only worker 0 takes times, so nobody waits for this lock.
            let mut stamps = (worker.index == 0).then(|| lock(&stamps));
            let mut stamp = || {
                if let Some(stamps) = &mut stamps {
                    stamps.push(Instant::now());
                }
            };
            stamp();
            for at in range.clone() {
                let counters = [&counters[2 * at], &counters[2 * at + 1]];
                step(&context, &context.plan.steps[at], worker, counters, &mut scratch)?;
                stamp();
            }
            Ok(())
        };
        lock(&self.pool).run(&job)?;
        Ok(stamps.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    fn stage_times(&mut self, program: &Program, stamps: &[Instant]) -> StageTimes {
        let mut times = StageTimes::default();
        let ms = stamps.windows(2).map(|w| (w[1] - w[0]).as_secs_f64() * 1e3);
        self.step_ms.clear();
        for (step, ms) in program.steps.iter().zip(ms) {
            *match step.stage() {
                Stage::Vision => &mut times.vision_ms,
                Stage::Prefill => &mut times.prefill_ms,
                Stage::Denoise => &mut times.denoise_ms,
            } += ms;
            if self.timing {
                self.step_ms.push(ms);
            }
        }
        times
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic on a worker has been reported; the memory behind it is rewritten by every run.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Executable for CpuExecutable {
    fn program(&self) -> &Arc<Program> {
        &self.program
    }

    fn run(
        &mut self,
        inputs: &Inputs<'_>,
        actions: &mut [f32],
    ) -> Result<StageTimes, BackendError> {
        self.walk(inputs, actions, None)
    }
}

/// One step, this worker's part; all have finished it on return.
fn step(
    context: &Context<'_>,
    plan: &StepPlan,
    worker: &Worker<'_>,
    [first, second]: [&AtomicUsize; 2],
    scratch: &mut Words,
) -> Result<(), Abandoned> {
    let scratch = scratch.as_mut_slice();
    match plan {
        StepPlan::Patchify(p) => edges::patchify(context, p, context.inputs, worker),
        StepPlan::Embed(p) => edges::embed(context, p, context.inputs, worker),
        StepPlan::Linear(linear) => {
            product::pack(context, linear, worker);
            worker.barrier()?;
            product::multiply(context, linear, worker, first, cast_slice_mut(scratch));
        }
        StepPlan::Attention(planned) => {
            keys::pack(context, planned, first);
            worker.barrier()?;
            attention::attend(context, planned, worker, second, scratch);
        }
    }
    worker.barrier()
}
