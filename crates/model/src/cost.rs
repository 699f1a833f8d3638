//! What a step costs: floating-point operations, bytes, and the time below which no device gets.

use crate::program::{
    Attention, Element, Epilogue, KeyMask, Linear, Op, Program, Stage, Step, View,
};
use crate::weights::{Kind, WeightSpec};

/// Rates a limit is computed for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Matrix products, FLOP per second.
    pub flops: f64,
    /// Device memory, bytes per second.
    pub bandwidth: f64,
    /// Bytes of a matrix element as stored.
    pub weight_bytes: f64,
    /// Whether the device multiplies E4M3 numbers where `fp8` has them: stored in a byte, at twice
    /// the rate.
    pub e4m3: bool,
}

impl Rates {
    /// One H200 as measured: 790 TFLOP/s BF16, 4.3 TB/s.
    pub const H200: Rates =
        Rates { flops: 790e12, bandwidth: 4.3e12, weight_bytes: 2.0, e4m3: false };

    /// Bytes of an element of a weight.
    fn element_bytes(&self, spec: &WeightSpec) -> f64 {
        match spec.kind {
            Kind::RimMatrix | Kind::Vector => 4.0,
            Kind::Matrix if self.e4m3 && spec.is_e4m3() => 1.0,
            Kind::Matrix | Kind::TokenTable => self.weight_bytes,
        }
    }
}

/// Cost of one step or of several.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Multiplications and additions of products and attention (2 per multiply-add).
    pub flops: f64,
    /// Elements of matrices and tables read.
    pub weight_elements: f64,
    /// Elements of activations read and written.
    pub activation_elements: f64,
    /// Of `flops`, those of products that are E4M3 at `fp8`.
    pub e4m3_flops: f64,
    /// Of `weight_elements`, those that are.
    pub e4m3_elements: f64,
}

impl Cost {
    /// Bytes of weights read.
    pub fn weight_bytes(&self, rates: &Rates) -> f64 {
        let bytes = if rates.e4m3 { self.e4m3_elements } else { 0.0 };
        (self.weight_elements - bytes) * rates.weight_bytes + bytes
    }

    /// Milliseconds no execution of this alone gets below: arithmetic or weight traffic, whichever
    /// is longer. Activations are not counted: they stay in cache.
    pub fn limit_ms(&self, rates: &Rates) -> f64 {
        let twice_as_fast = if rates.e4m3 { self.e4m3_flops } else { 0.0 };
        let arithmetic = (self.flops - twice_as_fast / 2.0) / rates.flops;
        let memory = self.weight_bytes(rates) / rates.bandwidth;
        arithmetic.max(memory) * 1e3
    }

    /// Sum.
    pub fn plus(self, other: Cost) -> Cost {
        Cost {
            flops: self.flops + other.flops,
            weight_elements: self.weight_elements + other.weight_elements,
            activation_elements: self.activation_elements + other.activation_elements,
            e4m3_flops: self.e4m3_flops + other.e4m3_flops,
            e4m3_elements: self.e4m3_elements + other.e4m3_elements,
        }
    }
}

fn elements(groups: usize, view: &View) -> f64 {
    (groups * view.count * view.cols) as f64
}

impl Program {
    /// Cost of one step.
    pub fn cost(&self, step: &Step) -> Cost {
        match &step.op {
            Op::Patchify { patches, .. } => {
                let b = &self.buffers[patches.0];
                let n = (b.rows * b.cols) as f64;
                Cost { activation_elements: 2.0 * n, ..Cost::default() }
            }
            Op::EmbedTokens { .. } => {
                let rows = (self.shape.batch * self.shape.prompt_tokens) as f64;
                let n = rows * self.config.prefix.width as f64;
                Cost { weight_elements: n, activation_elements: n, ..Cost::default() }
            }
            Op::Linear(linear) => self.linear_cost(linear),
            Op::Attention(attention) => self.attention_cost(attention),
        }
    }

    fn linear_cost(&self, linear: &Linear) -> Cost {
        let spec = self.weights.spec(linear.weight);
        let rows = (linear.groups * linear.input.count) as f64;
        let read = elements(linear.groups, &linear.input);
        let written = match &linear.epilogue {
            Epilogue::Add { out, .. } | Epilogue::AddFree { out } => {
                2.0 * elements(linear.groups, out)
            }
            Epilogue::Guide { out, .. } => 3.0 * elements(linear.groups, out),
            Epilogue::GeGlu { out } => elements(linear.groups, out),
            _ => rows * spec.rows as f64,
        };
        let (elements, of_e4m3) = (spec.len() as f64, f64::from(spec.is_e4m3()));
        Cost {
            flops: 2.0 * rows * elements,
            weight_elements: elements,
            activation_elements: read + written,
            e4m3_flops: 2.0 * rows * elements * of_e4m3,
            e4m3_elements: elements * of_e4m3,
        }
    }

    fn attention_cost(&self, a: &Attention) -> Cost {
        let queries = (a.groups * a.q.count * a.heads) as f64;
        let keys = match a.mask {
            KeyMask::All | KeyMask::Prefix => a.k.count,
            // Every key of the cache is visible to the action rows.
            KeyMask::Suffix { .. } => a.k.count,
        };
        Cost {
            flops: 4.0 * queries * (keys * a.head_dim) as f64,
            activation_elements: 2.0 * elements(a.groups, &a.q)
                + elements(a.groups, &a.k)
                + elements(a.groups, &a.v),
            ..Cost::default()
        }
    }

    /// Cost of a stage.
    pub fn stage_cost(&self, stage: Stage) -> Cost {
        let of = self.steps.iter().filter(|s| s.stage() == stage);
        of.fold(Cost::default(), |sum, s| sum.plus(self.cost(s)))
    }

    /// Milliseconds below which nothing runs a stage: all its arithmetic, or all its weight
    /// traffic. (Steps depend on each other, but their weights can be fetched ahead.)
    pub fn stage_limit_ms(&self, stage: Stage, rates: &Rates) -> f64 {
        self.stage_cost(stage).limit_ms(rates)
    }

    /// Bytes of the weights at rest: the token table like a matrix, everything else in f32.
    pub fn weight_bytes(&self, rates: &Rates) -> u64 {
        let bytes = |spec: &WeightSpec| spec.len() as f64 * rates.element_bytes(spec);
        self.weights.specs.iter().map(bytes).sum::<f64>() as u64
    }

    /// Shape of a step for people: `[788, 2048] · [2560, 2048]ᵀ`.
    pub fn shape_text(&self, step: &Step) -> String {
        match &step.op {
            Op::Patchify { patches, .. } => {
                let b = &self.buffers[patches.0];
                format!("u8 → [{}, {}]", b.rows, b.cols)
            }
            Op::EmbedTokens { .. } => {
                let (b, n) = (self.shape.batch, self.shape.prompt_tokens);
                format!("[{b}, {n}] tokens → [{}, {}]", b * n, self.config.prefix.width)
            }
            Op::Linear(l) => {
                let spec = self.weights.spec(l.weight);
                let rows = l.groups * l.input.count;
                format!("[{rows}, {}] · [{}, {}]ᵀ", spec.cols, spec.rows, spec.cols)
            }
            Op::Attention(a) => format!(
                "{} × {} heads × [{}, {d}] · [{}, {d}]ᵀ",
                a.groups,
                a.heads,
                a.q.count,
                a.k.count,
                d = a.head_dim
            ),
        }
    }

    /// Bytes of a buffer element when activations take `activation` bytes.
    pub fn element_bytes(element: Element, activation: usize) -> usize {
        match element {
            Element::Activation => activation,
            Element::F32 | Element::U32 => 4,
            Element::U8 => 1,
        }
    }
}

impl Op {
    /// Kind of work, for tables: `patchify`, `embed`, `product`, `attention`.
    pub fn kind(&self) -> &'static str {
        match self {
            Op::Patchify { .. } => "patchify",
            Op::EmbedTokens { .. } => "embed",
            Op::Linear(_) => "product",
            Op::Attention(_) => "attention",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Config, Rtc, Shape, record};

    fn reference() -> Program {
        let shape = Shape {
            batch: 1,
            cameras: 3,
            prompt_tokens: 20,
            horizon: 10,
            steps: 10,
            rtc: Rtc::Off,
        };
        record(&Config::pi0(), shape).expect("the reference workload is within limits")
    }

    /// The table of "The physical limit": 0.66 T, 3.04 T and 0.08 T FLOP.
    #[test]
    fn the_reference_workload_costs_what_the_budget_says() {
        let p = reference();
        let tera = |s| p.stage_cost(s).flops / 1e12;
        assert!((tera(Stage::Vision) - 0.66).abs() < 0.02, "{}", tera(Stage::Vision));
        assert!((tera(Stage::Prefill) - 3.04).abs() < 0.06, "{}", tera(Stage::Prefill));
        assert!((tera(Stage::Denoise) - 0.08).abs() < 0.02, "{}", tera(Stage::Denoise));
        let denoise = p.stage_cost(Stage::Denoise).weight_bytes(&Rates::H200) / 1e9;
        assert!((denoise - 6.23).abs() < 0.1, "{denoise}");
    }

    /// 17 layers' MLPs: half the bytes, half the time of what arithmetic limits.
    #[test]
    fn e4m3_takes_half_of_the_prefix_towers_mlps() {
        let p = reference();
        let fp8 = Rates { e4m3: true, ..Rates::H200 };
        let elements = (17 * 3 * 2048 * 16384) as u64;
        assert_eq!(p.weight_bytes(&Rates::H200) - p.weight_bytes(&fp8), elements);
        let cost = p.stage_cost(Stage::Prefill);
        let share = cost.e4m3_flops / cost.flops;
        assert!((share - 0.888).abs() < 1e-3, "{share}");
        assert_eq!(cost.e4m3_elements, elements as f64);
        let [bf16, fp8] = [Rates::H200, fp8].map(|r| p.stage_limit_ms(Stage::Prefill, &r));
        assert!((fp8 / bf16 - (1.0 - share / 2.0)).abs() < 1e-9, "{fp8} {bf16}");
        for stage in [Stage::Vision, Stage::Denoise] {
            assert_eq!(p.stage_cost(stage).e4m3_flops, 0.0, "{stage:?}");
        }
    }

    /// Every parameter of openpi's model is in the table, except what is never read.
    #[test]
    fn the_table_holds_all_parameters_that_matter() {
        for (config, total) in
            [(Config::pi0(), 3_238_048_528usize), (Config::pi05(), 3_353_433_872)]
        {
            let table = crate::WeightTable::new(config, 10);
            let n: usize = table
                .specs
                .iter()
                .filter(|s| matches!(s.kind, Kind::Matrix | Kind::TokenTable))
                .map(|s| s.len())
                .sum();
            let unused = 2048 * 2048 * 2 + 3 * 2048 * 16384; // q, o and MLP of the last layer
            let modulation = match config.family {
                crate::Family::Pi0 => 0,
                crate::Family::Pi05 => 37 * 1024 * 3072,
            };
            let missing = total - n - unused - modulation;
            // What is left: rim projections, biases, norms, the position table.
            assert!(missing < 4_200_000, "{missing} parameters are neither in nor explained");
        }
    }
}
