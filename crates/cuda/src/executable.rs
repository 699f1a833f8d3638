//! A program compiled to one graph: inputs in page-locked memory → kernels → actions.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use pirouette_model::program::{Op, Program, Stage};
use pirouette_model::{BackendError, Executable, Inputs, Rtc, StageTimes};
use rayon::iter::{IntoParallelIterator, ParallelIterator};

use crate::bind::{Binding, Forms};
use crate::denoise::Denoise;
use crate::device::{Choices, Shared, Tier};
use crate::driver::{Event, Graph, Launch, Pinned, Stream};
use crate::tier_beside::Beside;
use crate::{tier_hopper, tier_loop, tier_portable};

/// The norms of the loop's kernels take one modulation per step, not one per row.
const NO_GIVEN_ACTIONS: &str = "real-time chunking with given actions (rtc_mode \"trained\") does \
    not run on a GPU: use the guided mode, or serve with --device cpu";

/// What a program is compiled to.
pub(crate) struct Plan {
    /// The chain: every step, one after the other.
    pub(crate) launches: Vec<Launch>,
    /// Launches before each step, and their total.
    pub(crate) first_launch: Vec<usize>,
    /// What graphs do beside the chain instead of in it.
    beside: Option<BesidePlan>,
    /// Whether a launch may start before its predecessor ends.
    pub(crate) dependent: bool,
}

/// Launches on a stream of their own instead of a stretch of the chain, which goes on after them.
struct BesidePlan {
    instead_of: Range<usize>,
    launches: Vec<BesideLaunch>,
}

/// One of them.
struct BesideLaunch {
    launch: Launch,
    /// The first of the chain's launches whose work it does.
    at: usize,
    /// The launch of the chain that must be done before it starts.
    after: usize,
}

/// A compiled program. Fields drop in order: graphs before the memory they name.
pub struct CudaExecutable {
    whole: Graph,
    replay: Option<Graph>,
    stages: Option<Vec<Graph>>,
    marks: Option<[Event; 2]>,
    pub(crate) plan: Plan,
    pub(crate) host: Pinned,
    pub(crate) bound: Binding,
    pub(crate) shared: Arc<Shared>,
}

/// A run, and what the host and the GPU took of it.
#[derive(Clone, Copy, Debug)]
pub struct TimedRun {
    /// Of the whole.
    pub times: StageTimes,
    /// From the run's begin until the inputs were copied together and the graph was queued.
    pub queued_ms: f64,
    /// From before the graph was queued to its end, copies included, by the GPU's clock.
    pub device_ms: f64,
}

impl CudaExecutable {
    pub(crate) fn compile(
        shared: Arc<Shared>,
        program: Arc<Program>,
        tier: Tier,
        choices: Choices,
    ) -> Result<Self, BackendError> {
        check_weights(&shared, &program)?;
        if program.shape.rtc == Rtc::Trained {
            return Err(BackendError::Unsupported(NO_GIVEN_ACTIONS.into()));
        }
        shared.context.make_current()?;
        let hopper = shared.hopper.as_ref().filter(|_| tier == Tier::Auto);
        let forms = Forms {
            e4m3: tier_hopper::e4m3_buffers(&program, &shared.weights),
            e4m3_bytes: hopper.is_some(),
            ..hopper.map_or_else(Forms::default, |_| tier_loop::in_blocks(&program))
        };
        let sms = shared.context.properties.sms;
        let e4m3 = shared.weights.scales.any();
        let beside = hopper.filter(|_| choices.beside);
        let beside = beside.and_then(|_| Beside::of(&program, sms, e4m3));
        let (context, stream) = (&shared.context, &shared.stream);
        let bound = Binding::new(context, stream, program.clone(), forms, beside)?;
        let mut host = Pinned::new(&shared.context, bound.io_bytes)?;
        full_lengths(&bound, &mut host);
        let plan = plan(&shared, &bound, tier, choices)?;
        // Once outside a capture: whatever the driver sets up lazily happens here.
        bound.io.copy_in(&shared.stream, 0, &host, 0, bound.io_bytes)?;
        plan.issue(&shared, plan.all(), |_, _, _| Ok(()))?;
        shared.stream.synchronize()?;
        let whole = Graph::capture(&shared.stream, || {
            for part in copied_by_graph(&bound) {
                bound.io.copy_in(&shared.stream, part.start, &host, part.start, part.len())?;
            }
            plan.issue(&shared, plan.all(), |_, _, _| Ok(()))?;
            bound.io.copy_out(&shared.stream, 0, &host, 0, actions_bytes(&program))
        })?;
        shared.stream.synchronize()?;
        let (replay, stages, marks) = (None, None, None);
        Ok(CudaExecutable { whole, replay, stages, marks, plan, host, bound, shared })
    }

    /// Kernels per run.
    pub fn kernel_count(&self) -> usize {
        let beside = self.plan.beside.as_ref();
        self.plan.launches.len() + beside.map_or(0, |b| b.launches.len())
            - beside.map_or(0, |b| b.instead_of.len())
    }

    /// Those of them that run beside the prefill.
    pub fn kernels_beside(&self) -> usize {
        self.plan.beside.as_ref().map_or(0, |beside| beside.launches.len())
    }

    /// The kernel of every launch, those that graphs do beside the chain last.
    pub fn kernel_names(&self) -> impl Iterator<Item = &str> {
        let beside = self.plan.beside.iter().flat_map(|b| &b.launches).map(|b| &b.launch);
        self.plan.launches.iter().chain(beside).map(|launch| launch.function.entry())
    }

    /// Bytes of device memory beside the weights.
    pub fn activation_bytes(&self) -> u64 {
        self.bound.bytes()
    }

    /// As [`Executable::run`], with what the host and the GPU take of it.
    pub fn run_timed(
        &mut self,
        inputs: &Inputs<'_>,
        actions: &mut [f32],
    ) -> Result<TimedRun, BackendError> {
        let marks = match self.marks.take() {
            Some(marks) => marks,
            None => [Event::new(&self.shared.context)?, Event::new(&self.shared.context)?],
        };
        let (times, queued_ms) = self.run_between(inputs, actions, Some(&marks))?;
        let device_ms = marks[1].ms_since(&marks[0])?;
        self.marks = Some(marks);
        Ok(TimedRun { times, queued_ms, device_ms })
    }

    /// A run, with events on both sides of its graph if they are given; and the milliseconds until
    /// the graph was queued.
    fn run_between(
        &mut self,
        inputs: &Inputs<'_>,
        actions: &mut [f32],
        marks: Option<&[Event; 2]>,
    ) -> Result<(StageTimes, f64), BackendError> {
        let program = self.bound.program.clone();
        inputs.check(&program)?;
        let want = actions_bytes(&program) / 4;
        if actions.len() != want {
            return Err(BackendError::InputSize { name: "actions", got: actions.len(), want });
        }
        self.shared.context.make_current()?;
        let begin = Instant::now();
        self.write_inputs(inputs)?;
        let stream = &self.shared.stream;
        if let Some([first, _]) = marks {
            first.record(stream)?;
        }
        self.whole.launch(stream)?;
        let queued_ms = begin.elapsed().as_secs_f64() * 1e3;
        if let Some([_, last]) = marks {
            last.record(stream)?;
        }
        stream.synchronize()?;
        let bytes = &self.host.as_slice()[..want * 4];
        actions.copy_from_slice(bytemuck::cast_slice(bytes));
        let total_ms = begin.elapsed().as_secs_f64() * 1e3;
        Ok((StageTimes { total_ms, ..StageTimes::default() }, queued_ms))
    }

    /// Milliseconds of `n` replays without copies. Each starts from the actions the one before
    /// left, so they are for timing only.
    pub fn replay_ms(&mut self, n: usize) -> Result<Vec<f64>, BackendError> {
        let shared = self.shared.clone();
        shared.context.make_current()?;
        if self.replay.is_none() {
            let issue = || self.plan.issue(&shared, self.plan.all(), |_, _, _| Ok(()));
            self.replay = Some(Graph::capture(&shared.stream, issue)?);
        }
        let Some(graph) = &self.replay else { return Ok(Vec::new()) };
        let (begin, end) = (Event::new(&shared.context)?, Event::new(&shared.context)?);
        let mut ms = Vec::with_capacity(n);
        for _ in 0..n {
            begin.record(&shared.stream)?;
            graph.launch(&shared.stream)?;
            end.record(&shared.stream)?;
            end.synchronize()?;
            ms.push(end.ms_since(&begin)?);
        }
        Ok(ms)
    }

    /// Milliseconds of vision, prefill and denoise, each a graph of its own, for `n` runs. What
    /// runs beside the prefill is in the prefill's, what is launched in front of it in vision's.
    pub fn stage_ms(&mut self, n: usize) -> Result<Vec<[f64; 3]>, BackendError> {
        let shared = self.shared.clone();
        shared.context.make_current()?;
        if self.stages.is_none() {
            let mut graphs = Vec::with_capacity(3);
            for stage in [Stage::Vision, Stage::Prefill, Stage::Denoise] {
                let part = self.stage_launches(stage);
                let issue = || self.plan.issue(&shared, part, |_, _, _| Ok(()));
                graphs.push(Graph::capture(&shared.stream, issue)?);
            }
            self.stages = Some(graphs);
        }
        let Some(graphs) = &self.stages else { return Ok(Vec::new()) };
        let marks = (0..4).map(|_| Event::new(&shared.context)).collect::<Result<Vec<_>, _>>()?;
        let mut times = Vec::with_capacity(n);
        for _ in 0..n {
            marks[0].record(&shared.stream)?;
            for (graph, mark) in graphs.iter().zip(&marks[1..]) {
                graph.launch(&shared.stream)?;
                mark.record(&shared.stream)?;
            }
            marks[3].synchronize()?;
            let mut ms = [0.0; 3];
            for (i, ms) in ms.iter_mut().enumerate() {
                *ms = marks[i + 1].ms_since(&marks[i])?;
            }
            times.push(ms);
        }
        Ok(times)
    }

    /// Launches of one stage: stages are consecutive stretches of the program.
    fn stage_launches(&self, stage: Stage) -> Range<usize> {
        let steps = &self.bound.program.steps;
        let first = steps.iter().position(|s| s.stage() == stage).unwrap_or(steps.len());
        let last = steps.iter().rposition(|s| s.stage() == stage).map_or(first, |at| at + 1);
        self.plan.first_launch[first]..self.plan.first_launch[last]
    }

    /// Milliseconds of every step, timed one by one outside the graph (launch overhead included,
    /// nothing overlaps): the median of `n` passes. They say where time goes, not how much.
    pub fn step_ms(&mut self, n: usize) -> Result<Vec<f64>, BackendError> {
        let shared = &self.shared;
        shared.context.make_current()?;
        let steps = self.bound.program.steps.len();
        let marks =
            (0..=steps).map(|_| Event::new(&shared.context)).collect::<Result<Vec<_>, _>>()?;
        let mut samples = vec![Vec::with_capacity(n); steps];
        for _ in 0..n {
            marks[0].record(&shared.stream)?;
            for step in 0..steps {
                for launch in &self.plan.launches[self.plan.of_steps(step..step + 1)] {
                    shared.stream.launch(launch, false)?;
                }
                marks[step + 1].record(&shared.stream)?;
            }
            marks[steps].synchronize()?;
            for (step, samples) in samples.iter_mut().enumerate() {
                samples.push(marks[step + 1].ms_since(&marks[step])?);
            }
        }
        Ok(samples
            .into_iter()
            .map(|mut s| {
                s.sort_by(f64::total_cmp);
                s.get(s.len() / 2).copied().unwrap_or(0.0)
            })
            .collect())
    }

    /// Puts the inputs where the graph takes them from; many images also where it brings them to.
    fn write_inputs(&mut self, inputs: &Inputs<'_>) -> Result<(), BackendError> {
        let program = &self.bound.program;
        if let Some(images) = self.bound.images() {
            let apart = images.len() >= APART;
            let pieces: Vec<&[u8]> =
                inputs.images.pieces().flat_map(|piece| piece.chunks(AT_A_TIME)).collect();
            let mut at = images.start;
            for pieces in pieces.chunks(PIECES) {
                let part = at..at + pieces.iter().map(|piece| piece.len()).sum::<usize>();
                join(pieces, &mut self.host.as_mut_slice()[part.clone()], apart);
                if apart {
                    let stream = &self.shared.stream;
                    self.bound.io.copy_in(stream, at, &self.host, at, part.len())?;
                }
                at = part.end;
            }
        }
        let slots = self.host.as_mut_slice();
        let mut put = |name: &str, bytes: &[u8]| {
            if let Some(at) = program.buffer(name).and_then(|id| self.bound.io_offsets[id.0]) {
                slots[at..at + bytes.len()].copy_from_slice(bytes);
            }
        };
        put("tokens", bytemuck::cast_slice(inputs.tokens));
        put("state", bytemuck::cast_slice(inputs.state));
        put("actions", bytemuck::cast_slice(inputs.noise));
        if let Some(previous) = &inputs.previous {
            put("previous.chunk", bytemuck::cast_slice(previous.chunks));
            put("previous.weights", bytemuck::cast_slice(previous.weights));
            put("previous.limits", bytemuck::cast_slice(previous.limits));
        }
        let lengths: Vec<u32> = inputs
            .cameras
            .iter()
            .zip(inputs.prompt_len)
            .flat_map(|(&cameras, &prompt)| [cameras, prompt])
            .collect();
        put("lengths", bytemuck::cast_slice(&lengths));
        Ok(())
    }
}

impl Executable for CudaExecutable {
    fn program(&self) -> &Arc<Program> {
        &self.bound.program
    }

    fn run(
        &mut self,
        inputs: &Inputs<'_>,
        actions: &mut [f32],
    ) -> Result<StageTimes, BackendError> {
        self.run_between(inputs, actions, None).map(|(times, _)| times)
    }
}

impl Plan {
    /// The chain's launches of some steps.
    pub(crate) fn of_steps(&self, steps: Range<usize>) -> Range<usize> {
        self.first_launch[steps.start]..self.first_launch[steps.end]
    }

    pub(crate) fn all(&self) -> Range<usize> {
        0..self.launches.len()
    }

    /// Queues a stretch of the chain as graphs have it, each launch allowed to start before its
    /// predecessor ends but the first, with what starts beside it. Tells of every launch right
    /// after it is queued: the stream, which of the chain's it is or replaces the first of, and it.
    pub(crate) fn issue(
        &self,
        shared: &Shared,
        part: Range<usize>,
        mut queued: impl FnMut(&Stream, usize, &Launch) -> Result<(), BackendError>,
    ) -> Result<(), BackendError> {
        let (stream, (side, mark)) = (&shared.stream, &shared.side);
        let (instead_of, aside) = match &self.beside {
            Some(beside) => (beside.instead_of.clone(), beside.launches.as_slice()),
            None => (0..0, [].as_slice()),
        };
        let (mut fresh, mut side_fresh, mut forked) = (true, true, false);
        for at in part.filter(|at| !instead_of.contains(at)) {
            if forked && at >= instead_of.end {
                stream.wait_for(side, mark)?;
                (fresh, forked) = (true, false);
            }
            stream.launch(&self.launches[at], self.dependent && !fresh)?;
            queued(stream, at, &self.launches[at])?;
            fresh = false;
            for (i, beside) in aside.iter().filter(|b| b.after == at).enumerate() {
                if i == 0 {
                    side.wait_for(stream, mark)?;
                }
                side.launch(&beside.launch, self.dependent && !side_fresh)?;
                queued(side, beside.at, &beside.launch)?;
                (side_fresh, forked) = (false, true);
            }
        }
        if forked {
            stream.wait_for(side, mark)?;
        }
        Ok(())
    }
}

/// Bytes of images from which one core would keep the GPU waiting (64 samples are 29 MB, 4 ms of a
/// core's time): all cores put them together, and each part goes to the device while they are at
/// the next.
const APART: usize = 2 << 20;
/// Bytes a core copies at a time, and how many times that a part is.
const AT_A_TIME: usize = 256 << 10;
const PIECES: usize = 32;

/// Parts of the block of inputs that a graph brings to the device: all but many images.
fn copied_by_graph(bound: &Binding) -> impl Iterator<Item = Range<usize>> + use<> {
    let end = bound.io_bytes;
    let apart = bound.images().filter(|images| images.len() >= APART).unwrap_or(end..end);
    [0..apart.start, apart.end..end].into_iter().filter(|part| !part.is_empty())
}

/// Copies pieces one behind the other to `to`, which has room for exactly them.
fn join(pieces: &[&[u8]], mut to: &mut [u8], by_all_cores: bool) {
    let mut copies = Vec::with_capacity(pieces.len());
    for from in pieces {
        let (part, rest) = to.split_at_mut(from.len());
        copies.push((part, *from));
        to = rest;
    }
    let copy = |(part, from): (&mut [u8], &[u8])| part.copy_from_slice(from);
    if by_all_cores {
        copies.into_par_iter().for_each(copy);
    } else {
        copies.into_iter().for_each(copy);
    }
}

/// Launches of all steps, and what runs beside them.
fn plan(
    shared: &Shared,
    bound: &Binding,
    tier: Tier,
    choices: Choices,
) -> Result<Plan, BackendError> {
    let program = &bound.program;
    let hopper = shared.hopper.as_ref().filter(|_| tier == Tier::Auto);
    if let Some(hopper) = hopper {
        hopper.prepare(&shared.stream, &shared.weights, program)?;
    }
    let mut launches = Vec::new();
    let mut first_launch = Vec::with_capacity(program.steps.len() + 1);
    for (at, step) in program.steps.iter().enumerate() {
        first_launch.push(launches.len());
        let (portable, weights) = (&shared.portable, &shared.weights);
        let plain = !choices.attention
            && step.stage() != Stage::Denoise
            && matches!(step.op, Op::Attention(_));
        let fast = match hopper.filter(|_| !plain) {
            Some(hopper) => hopper.plan(portable, weights, bound, at)?,
            None => None,
        };
        match fast {
            Some(fast) => launches.extend(fast),
            None => tier_portable::plan(portable, weights, bound, step, &mut launches)?,
        }
    }
    first_launch.push(launches.len());
    let mut plan = Plan { launches, first_launch, beside: None, dependent: choices.dependent };
    if let (Some(hopper), Some(beside)) = (hopper, bound.beside())
        && let Some(layers) =
            hopper.plan_beside(&shared.portable, &shared.weights, bound, beside)?
    {
        plan.beside = plan_beside(&plan, beside, layers, shared.context.properties.sms);
    }
    Ok(plan)
}

/// Shared memory beyond which only one block fits a multiprocessor.
const ALONE: u32 = 113 << 10;

/// The launches of layers beside the prefill, and before them those in front of the first layer;
/// `None` if a launch of the prefill needs the multiprocessors they would take.
fn plan_beside(plan: &Plan, beside: &Beside, layers: Vec<Launch>, sms: u32) -> Option<BesidePlan> {
    // The last launch of a step of the prefill.
    let done = |step: usize| plan.first_launch[step + 1].checked_sub(1);
    let prefill = plan.first_launch[beside.prefill];
    let instead_of = plan.of_steps(beside.steps.clone());
    // Those whose blocks need a multiprocessor alone.
    let blocks = |launch: &Launch| match launch.shared_bytes {
        0..=ALONE => 0,
        _ => launch.grid.iter().product::<u32>(),
    };
    let room = sms - Denoise::BESIDE_CTAS;
    if plan.launches[prefill..instead_of.start].iter().any(|launch| blocks(launch) > room) {
        return None;
    }
    let first_layer = plan.first_launch[beside.layers.first()?.0];
    let mut launches: Vec<BesideLaunch> = (instead_of.start..first_layer)
        .map(|at| BesideLaunch { launch: plan.launches[at].clone(), at, after: 0 })
        .collect();
    for (launch, &(attention, writer)) in layers.into_iter().zip(&beside.layers) {
        let at = plan.first_launch[attention];
        launches.push(BesideLaunch { launch, at, after: done(writer)? });
    }
    Some(BesidePlan { instead_of, launches })
}

/// Lengths of a request that fills every slot, so that runs before the first request are sound.
fn full_lengths(bound: &Binding, host: &mut Pinned) {
    let shape = &bound.program.shape;
    let lengths = bound.program.buffer("lengths").and_then(|id| bound.io_offsets[id.0]);
    if let Some(at) = lengths {
        let full = [shape.cameras as u32, shape.prompt_tokens as u32].repeat(shape.batch);
        host.as_mut_slice()[at..at + full.len() * 4].copy_from_slice(bytemuck::cast_slice(&full));
    }
}

/// Bytes of the actions, which lie at the head of the input and output block.
pub(crate) fn actions_bytes(program: &Program) -> usize {
    program.shape.batch * program.shape.horizon * program.config.action_dim * 4
}

/// A program names weights by index: it must come from the table that was loaded.
fn check_weights(shared: &Shared, program: &Program) -> Result<(), BackendError> {
    let loaded = &shared.weights.table;
    let same = Arc::ptr_eq(loaded, &program.weights)
        || (loaded.config == program.config
            && loaded.steps == program.weights.steps
            && loaded.time_embedding == program.weights.time_embedding);
    if same {
        return Ok(());
    }
    Err(BackendError::Unavailable(format!(
        "the program was recorded for other weights than those on cuda:{}: record it with the \
         loaded table",
        shared.context.properties.ordinal
    )))
}

#[cfg(test)]
mod tests {
    use super::join;

    #[test]
    fn pieces_follow_each_other() {
        let all: Vec<u8> = (0..6_000_001).map(|i| (i * 31 % 251) as u8).collect();
        for size in [3, 150_528, 256 << 10, 7_000_000] {
            for by_all_cores in [false, true] {
                let pieces: Vec<&[u8]> = all.chunks(size).collect();
                let mut to = vec![255; all.len()];
                join(&pieces, &mut to, by_all_cores);
                assert_eq!(to, all);
            }
        }
    }
}
