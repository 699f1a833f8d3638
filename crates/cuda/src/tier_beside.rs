//! The first Euler step beside the prefill: which of its steps go there, and their launches.
//!
//! A layer of the first step needs of the prefix only that layer's keys and values. The prefill
//! leaves a few multiprocessors idle, so all layers but the last run there meanwhile, each once the
//! prefill has written what it attends to (`kernels/denoise_beside.cu`).

use std::ops::Range;

use pirouette_model::BackendError;
use pirouette_model::program::{Attention, Epilogue, KeyMask, Linear, Op, Program, Stage};

use crate::denoise::{BesideParams, Denoise, ProductParams};
use crate::denoise_pack::Packed;
use crate::driver::Launch;
use crate::tier_loop::LoopPlan;

/// Steps of a layer that one launch does: attention, out, up, down, and the next layer's qkv.
const STEPS: usize = 5;

/// What a layer takes beside the prefill, about, and what it costs the prefill. Layers that the
/// loop would have to wait for stay in the chain.
const BESIDE_NS: usize = 250_000;
/// What a layer of the prefill takes beside, and for each row; with its MLP's products in E4M3.
const PREFILL_NS: usize = 30_000;
const PREFILL_ROW_NS: usize = 290;
const PREFILL_E4M3_ROW_NS: usize = 170;

/// The steps of a program that may run beside its prefill.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Beside {
    /// From the loop's first step to the qkv of the layer behind the last of `layers`.
    pub steps: Range<usize>,
    /// The first step of the prefill.
    pub prefill: usize,
    /// Attention of each layer from the first on, and the step of the prefill that writes its keys
    /// and values.
    pub layers: Vec<(usize, usize)>,
}

impl Beside {
    /// Which steps of a program these are; `None` where there is no room for them, or no kernel:
    /// a multiprocessor count of `sms` must leave what the prefill of a batch of 1 is cut into.
    /// `e4m3`: the prefill's MLPs are.
    pub fn of(program: &Program, sms: u32, e4m3: bool) -> Option<Beside> {
        const PREFILL: u32 = 128;
        let shape = &program.shape;
        let rows = shape.suffix_rows(&program.config);
        if shape.batch != 1 || !Denoise::few(rows as u32) || sms < PREFILL + Denoise::BESIDE_CTAS {
            return None;
        }
        let first = |stage| program.steps.iter().position(|step| step.stage() == stage);
        let (prefill, denoise) = (first(Stage::Prefill)?, first(Stage::Denoise)?);
        let is_attention = |at: &usize| matches!(program.steps[*at].op, Op::Attention(_));
        let first_layer = (denoise..program.steps.len()).find(is_attention)?;
        let mut layers: Vec<(usize, usize)> = (first_layer..program.steps.len())
            .step_by(STEPS)
            .map_while(|at| Some((at, Layer::of(program, at)?.written_by(program)?)))
            .collect();
        let row_ns = if e4m3 { PREFILL_E4M3_ROW_NS } else { PREFILL_ROW_NS };
        let prefill_ns = PREFILL_NS + row_ns * shape.prefix_rows(&program.config);
        layers.truncate(layers.len() * prefill_ns / BESIDE_NS);
        let end = layers.last()?.0 + STEPS;
        Some(Beside { steps: denoise..end, prefill, layers })
    }
}

/// The steps of one launch.
struct Layer<'a> {
    attention: &'a Attention,
    products: [&'a Linear; 4],
}

impl<'a> Layer<'a> {
    /// Those from step `at` on; `None` for the last layer, behind which no qkv comes.
    fn of(program: &'a Program, at: usize) -> Option<Self> {
        let ops = program.steps.get(at..at + STEPS)?;
        let Op::Attention(attention) = &ops[0].op else { return None };
        let linear = |i: usize| match &ops[i].op {
            Op::Linear(linear) => Some(linear),
            _ => None,
        };
        let products = [linear(1)?, linear(2)?, linear(3)?, linear(4)?];
        let epilogues = products.map(|linear| &linear.epilogue);
        let expected = matches!(
            epilogues,
            [
                Epilogue::Add { .. },
                Epilogue::GeGlu { .. },
                Epilogue::Add { .. },
                Epilogue::Rope { q: Some(_), .. }
            ]
        );
        expected.then_some(Layer { attention, products })
    }

    /// The step of the prefill that writes the prefix half of the cache.
    fn written_by(&self, program: &Program) -> Option<usize> {
        program.steps.iter().position(|step| match &step.op {
            Op::Linear(Linear { epilogue: Epilogue::Rope { k, .. }, .. }) => {
                step.stage() == Stage::Prefill && k.buffer == self.attention.k.buffer
            }
            _ => false,
        })
    }
}

impl LoopPlan<'_> {
    /// The launch of the layer whose attention is step `at`; `None` where no kernel takes it.
    pub fn beside(
        &self,
        denoise: &Denoise,
        packed: &Packed,
        at: usize,
    ) -> Result<Option<Launch>, BackendError> {
        let bound = self.bound;
        let Some(Layer { attention, products }) = Layer::of(&bound.program, at) else {
            return Ok(None);
        };
        let KeyMask::Suffix { prefix_rows, state_row } = attention.mask else { return Ok(None) };
        let mut found = Vec::<ProductParams>::with_capacity(products.len());
        for (i, linear) in products.into_iter().enumerate() {
            match self.params(packed, at + 1 + i, linear) {
                Some((_, params)) => found.push(params),
                None => return Ok(None),
            }
        }
        let &[out, up, down, qkv] = found.as_slice() else { return Ok(None) };
        let address = |view| bound.view(view).base;
        let (meet, [front, stats, _]) = (bound.beside_scratch(), Denoise::BESIDE_SCRATCH);
        let params = BesideParams {
            out,
            up,
            down,
            qkv,
            q: address(&attention.q),
            k: address(&attention.k),
            v: address(&attention.v),
            parts: meet + (front + stats) as u64,
            part_stats: meet + front as u64,
            arrivals: meet,
            q_rows: bound.rows(&attention.q),
            prefix_rows: prefix_rows as u32,
            suffix_keys: (attention.k.count - prefix_rows) as u32,
            state_row: state_row as u32,
        };
        Ok(denoise.beside(params))
    }
}

#[cfg(test)]
mod tests {
    use pirouette_model::{Config, Rtc, Shape, record};

    use super::*;

    fn program(config: Config, batch: usize, horizon: usize) -> Program {
        let shape =
            Shape { batch, cameras: 3, prompt_tokens: 20, horizon, steps: 10, rtc: Rtc::Off };
        record(&config, shape).unwrap()
    }

    #[test]
    fn all_layers_of_the_first_step_but_the_last() {
        for config in [Config::pi0(), Config::pi05()] {
            let program = program(config, 1, 10);
            let beside = Beside::of(&program, 132, false).unwrap();
            assert_eq!(beside.layers.len(), config.depth - 1);
            let names: Vec<&str> =
                program.steps[beside.steps.clone()].iter().map(|s| s.name.as_str()).collect();
            assert!(names.iter().all(|name| name.starts_with("denoise.step0.")), "{names:?}");
            let last = format!("denoise.step0.{}.qkv", config.depth - 1);
            assert_eq!(names.last(), Some(&last.as_str()));
            for (layer, &(attention, writer)) in beside.layers.iter().enumerate() {
                let step = |at: usize| program.steps[at].name.as_str();
                assert_eq!(step(attention), format!("denoise.step0.{layer}.attention"));
                assert_eq!(step(writer), format!("prefill.{layer}.qkv"));
            }
        }
    }

    /// As many layers as the prefill has time for.
    #[test]
    fn fewer_layers_beside_a_short_prefill() {
        for (cameras, e4m3, want) in
            [(1, false, 6..9), (2, false, 11..14), (3, true, 10..13), (1, true, 4..7)]
        {
            let shape = Shape {
                batch: 1,
                cameras,
                prompt_tokens: 20,
                horizon: 10,
                steps: 10,
                rtc: Rtc::Off,
            };
            let program = record(&Config::pi0(), shape).unwrap();
            let beside = Beside::of(&program, 132, e4m3).unwrap();
            assert!(want.contains(&beside.layers.len()), "{cameras}: {}", beside.layers.len());
            let next = &program.steps[beside.steps.end].name;
            assert_eq!(*next, format!("denoise.step0.{}.attention", beside.layers.len()));
        }
    }

    #[test]
    fn none_where_there_is_no_room() {
        let one = program(Config::pi0(), 1, 10);
        assert!(Beside::of(&one, 114, false).is_none());
        assert!(Beside::of(&program(Config::pi0(), 2, 5), 132, false).is_none());
        assert!(Beside::of(&program(Config::pi0(), 1, 50), 132, false).is_none());
    }
}
