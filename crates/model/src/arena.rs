//! Buffers of a program → offsets in one allocation; buffers that never live together share bytes.

use crate::program::{Attention, BufferId, Element, Epilogue, Linear, Op, Program, Role};

/// Where every buffer lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArenaPlan {
    /// Byte offset of each buffer, by [`BufferId`].
    pub offsets: Vec<usize>,
    /// Bytes of the whole arena.
    pub bytes: usize,
}

/// First and last step that touches a buffer, both inclusive.
pub type Lifetime = Option<(usize, usize)>;

impl Op {
    /// Buffers the step reads, those it updates in place included. `lengths`, which masks,
    /// positions and padding depend on, is not listed: it is an input and always alive.
    pub fn reads(&self) -> Vec<BufferId> {
        match self {
            Op::Patchify { images, .. } => vec![*images],
            Op::EmbedTokens { tokens, .. } => vec![*tokens],
            Op::Linear(Linear { input, epilogue, .. }) => match epilogue {
                Epilogue::Add { out, .. } | Epilogue::AddFree { out } => {
                    vec![input.buffer, out.buffer]
                }
                Epilogue::Guide { out, guidance: g } => {
                    vec![input.buffer, out.buffer, g.chunk, g.weights, g.limits]
                }
                _ => vec![input.buffer],
            },
            Op::Attention(Attention { q, k, v, .. }) => vec![q.buffer, k.buffer, v.buffer],
        }
    }

    /// Buffers the step writes, wholly or in part.
    pub fn writes(&self) -> Vec<BufferId> {
        match self {
            Op::Patchify { patches, .. } => vec![*patches],
            Op::EmbedTokens { out, .. } => vec![out.buffer],
            Op::Linear(linear) => match linear.epilogue {
                Epilogue::Store { out }
                | Epilogue::StorePosition { out, .. }
                | Epilogue::Gelu { out }
                | Epilogue::Silu { out }
                | Epilogue::GeGlu { out }
                | Epilogue::Add { out, .. }
                | Epilogue::AddFree { out }
                | Epilogue::Guide { out, .. } => vec![out.buffer],
                Epilogue::Rope { q, k, v, .. } => {
                    q.iter().chain([&k, &v]).map(|view| view.buffer).collect()
                }
            },
            Op::Attention(attention) => vec![attention.out.buffer],
        }
    }
}

/// Lifetimes over the flat step list. Inputs and in-outs live from before the first step to after
/// the last; a scratch buffer that no step touches has none.
pub fn lifetimes(program: &Program) -> Vec<Lifetime> {
    let always = Some((0, usize::MAX));
    let mut lives: Vec<Lifetime> = program
        .buffers
        .iter()
        .map(|b| if b.role == Role::Scratch { None } else { always })
        .collect();
    for (at, step) in program.steps.iter().enumerate() {
        for buffer in step.op.reads().into_iter().chain(step.op.writes()) {
            let life = &mut lives[buffer.0];
            let (first, last) = life.unwrap_or((at, at));
            *life = Some((first, last.max(at)));
        }
    }
    lives
}

/// Places every buffer: the largest first, each at the lowest aligned offset free throughout its
/// lifetime. `bytes_per` is the size of one element on the backend, `align` a power of two.
///
/// Buffers of different [`Element`]s never share bytes: the padding rows of a buffer may hold what
/// its predecessors left, and that must be a finite number when read. Zero the arena once.
pub fn plan(program: &Program, bytes_per: impl Fn(Element) -> usize, align: usize) -> ArenaPlan {
    assert!(align.is_power_of_two(), "alignment {align} is not a power of two");
    let lives = lifetimes(program);
    let size = |id: usize| {
        let b = &program.buffers[id];
        (b.rows * b.cols * bytes_per(b.element)).next_multiple_of(align)
    };
    let together = |a: usize, b: usize| match (lives[a], lives[b]) {
        (Some((a0, a1)), Some((b0, b1))) => {
            let (x, y) = (&program.buffers[a], &program.buffers[b]);
            x.element != y.element || (a0 <= b1 && b0 <= a1)
        }
        _ => false,
    };
    let mut order: Vec<usize> = (0..program.buffers.len()).collect();
    order.sort_by_key(|&id| (std::cmp::Reverse(size(id)), id));

    let mut offsets = vec![0; program.buffers.len()];
    let mut placed: Vec<usize> = Vec::new();
    let mut bytes = 0;
    for id in order.into_iter().filter(|&id| lives[id].is_some()) {
        let mut taken: Vec<(usize, usize)> = placed
            .iter()
            .filter(|&&other| together(id, other))
            .map(|&other| (offsets[other], offsets[other] + size(other)))
            .collect();
        taken.sort_unstable();
        let mut at = 0;
        for (start, end) in taken {
            if at + size(id) <= start {
                break;
            }
            at = at.max(end);
        }
        offsets[id] = at;
        bytes = bytes.max(at + size(id));
        placed.push(id);
    }
    ArenaPlan { offsets, bytes }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::program::Shape;
    use crate::record::record;
    use crate::rtc::Rtc;

    fn bytes_per(element: Element) -> usize {
        match element {
            Element::Activation => 2,
            Element::F32 | Element::U32 => 4,
            Element::U8 => 1,
        }
    }

    fn check(program: &Program, align: usize) -> ArenaPlan {
        let plan = plan(program, bytes_per, align);
        let lives = lifetimes(program);
        let range = |id: usize| {
            let b = &program.buffers[id];
            plan.offsets[id]..plan.offsets[id] + b.rows * b.cols * bytes_per(b.element)
        };
        for a in 0..program.buffers.len() {
            let Some((a0, a1)) = lives[a] else { continue };
            assert!(plan.offsets[a].is_multiple_of(align) && range(a).end <= plan.bytes);
            for (b, life) in lives.iter().enumerate().take(a) {
                let Some((b0, b1)) = *life else { continue };
                let (x, y) = (range(a), range(b));
                let apart = x.end <= y.start || y.end <= x.start;
                let (name_a, name_b) = (&program.buffers[a].name, &program.buffers[b].name);
                if a0 <= b1 && b0 <= a1 {
                    assert!(apart, "{name_a} and {name_b} live together and overlap");
                }
                if program.buffers[a].element != program.buffers[b].element {
                    assert!(apart, "{name_a} and {name_b} differ in element and overlap");
                }
            }
        }
        plan
    }

    #[test]
    fn buffers_alive_together_never_overlap() {
        for config in [Config::pi0(), Config::pi05()] {
            for (batch, cameras, prompt_tokens, horizon, steps, rtc) in [
                (1, 1, 1, 1, 1, Rtc::Guided),
                (1, 3, 20, 10, 10, Rtc::Off),
                (3, 2, 48, 50, 2, Rtc::Guided),
                (8, 3, 200, 50, 3, Rtc::Off),
            ] {
                let shape = Shape { batch, cameras, prompt_tokens, horizon, steps, rtc };
                let program = record(&config, shape).unwrap();
                for align in [1, 64, 256] {
                    check(&program, align);
                }
            }
        }
    }

    #[test]
    fn vision_prefix_and_suffix_share_memory() {
        let shape = Shape {
            batch: 1,
            cameras: 3,
            prompt_tokens: 20,
            horizon: 10,
            steps: 10,
            rtc: Rtc::Off,
        };
        let program = record(&Config::pi0(), shape).unwrap();
        let plan = check(&program, 256);
        let all: usize =
            program.buffers.iter().map(|b| b.rows * b.cols * bytes_per(b.element)).sum();
        let largest: usize = 788 * 16384 * 2;
        assert!(plan.bytes > largest && plan.bytes < all, "{} of {all}", plan.bytes);
        // MLP, q, attended, stream and the caches live together; all of vision fits beside them.
        let prefix = 788 * (16384 + 2048 * 3) * 2 + 2 * 18 * 799 * 256 * 2;
        assert!(plan.bytes < prefix + (1 << 20) + 3 * 224 * 224 * 3, "{}", plan.bytes);
    }

    #[test]
    fn every_read_of_scratch_follows_a_write() {
        let shape = Shape {
            batch: 2,
            cameras: 2,
            prompt_tokens: 5,
            horizon: 4,
            steps: 2,
            rtc: Rtc::Guided,
        };
        for config in [Config::pi0(), Config::pi05()] {
            let program = record(&config, shape).unwrap();
            let mut written: Vec<bool> =
                program.buffers.iter().map(|b| b.role != Role::Scratch).collect();
            for step in &program.steps {
                for read in step.op.reads() {
                    let name = &program.buffers[read.0].name;
                    assert!(written[read.0], "{} reads {name} before any write", step.name);
                }
                for write in step.op.writes() {
                    written[write.0] = true;
                }
            }
            assert!(written.iter().all(|w| *w), "a buffer is never written");
        }
    }
}
