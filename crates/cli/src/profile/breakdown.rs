//! Milliseconds per step → tables: by category, by stage, by kind of step, largest gaps.

use pirouette_model::Program;
use pirouette_model::cost::{Cost, Rates};
use pirouette_model::program::{Op, Step};
use serde::{Deserialize, Serialize};

use super::meter::STAGES;

/// Steps that belong together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Group {
    /// `products`, `prefill`, `prefill.up`, ….
    pub name: String,
    /// Steps in it.
    pub steps: usize,
    /// Milliseconds of all of them.
    pub ms: f64,
    /// Part of the sum over all steps, 0 to 1.
    pub share: f64,
    /// FLOPs of products and attention.
    pub flops: f64,
    /// Bytes of weights read.
    pub weight_bytes: f64,
    /// Milliseconds no execution gets below.
    pub limit_ms: f64,
}

impl Group {
    /// Milliseconds above the limit.
    pub fn gap_ms(&self) -> f64 {
        self.ms - self.limit_ms
    }
}

/// What the steps' times add up to.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Breakdown {
    /// By what a step does; norms, biases and activations run inside products and count there.
    pub categories: Vec<Group>,
    /// Vision, prefill, denoise.
    pub stages: Vec<Group>,
    /// By name without layer and Euler step, largest first.
    pub kinds: Vec<Group>,
    /// Sum over all steps.
    pub total_ms: f64,
}

/// Adds the steps' times up.
pub fn breakdown(program: &Program, step_ms: &[f64], rates: &Rates) -> Breakdown {
    let total_ms: f64 = step_ms.iter().sum();
    let mut sums = Sums { program, rates, total_ms, step_ms };
    let categories = sums.by(|s| category(s).into());
    let stages = sums.by(|s| stage_name(s).into());
    let mut kinds = sums.by(|s| kind(&s.name));
    kinds.sort_by(|a, b| b.ms.total_cmp(&a.ms));
    Breakdown { categories, stages, kinds, total_ms }
}

/// The kinds furthest above their limits, at most `n`.
pub fn gaps(kinds: &[Group], n: usize) -> Vec<&Group> {
    let mut sorted: Vec<&Group> = kinds.iter().filter(|k| k.gap_ms() > 0.0).collect();
    sorted.sort_by(|a, b| b.gap_ms().total_cmp(&a.gap_ms()));
    sorted.truncate(n);
    sorted
}

struct Sums<'a> {
    program: &'a Program,
    rates: &'a Rates,
    total_ms: f64,
    step_ms: &'a [f64],
}

impl Sums<'_> {
    /// Groups by a name, in order of first appearance. A group's limit is that of all its work
    /// together: weights can be fetched ahead while other steps compute.
    fn by(&mut self, name: impl Fn(&Step) -> String) -> Vec<Group> {
        let mut groups: Vec<(String, usize, f64, Cost)> = Vec::new();
        for (step, &ms) in self.program.steps.iter().zip(self.step_ms) {
            let name = name(step);
            let at = groups.iter().position(|g| g.0 == name).unwrap_or_else(|| {
                groups.push((name, 0, 0.0, Cost::default()));
                groups.len() - 1
            });
            let group = &mut groups[at];
            group.1 += 1;
            group.2 += ms;
            group.3 = group.3.plus(self.program.cost(step));
        }
        let share = |ms: f64| if self.total_ms > 0.0 { ms / self.total_ms } else { 0.0 };
        groups
            .into_iter()
            .map(|(name, steps, ms, cost)| Group {
                name,
                steps,
                ms,
                share: share(ms),
                flops: cost.flops,
                weight_bytes: cost.weight_bytes(self.rates),
                limit_ms: cost.limit_ms(self.rates),
            })
            .collect()
    }
}

/// What a step does, in the words of a category table.
pub fn category(step: &Step) -> &'static str {
    match step.op {
        Op::Linear(_) => "products, with their norms and activations",
        Op::Attention(_) => "attention",
        Op::Patchify { .. } | Op::EmbedTokens { .. } => "fill and gather",
    }
}

fn stage_name(step: &Step) -> &'static str {
    let found = STAGES.iter().find(|(stage, _)| *stage == step.stage());
    found.map_or("denoise", |(_, name)| name)
}

/// A step's name without its layer and its Euler step: `denoise.step3.7.up` → `denoise.up`.
pub fn kind(name: &str) -> String {
    let is_number = |p: &str| !p.is_empty() && p.bytes().all(|b| b.is_ascii_digit());
    let counts = |p: &str| is_number(p) || p.strip_prefix("step").is_some_and(is_number);
    let parts: Vec<&str> = name.split('.').filter(|p| !counts(p)).collect();
    parts.join(".")
}

#[cfg(test)]
mod tests {
    use pirouette_model::{Config, Rtc, Shape, record};

    use super::*;

    fn program() -> Program {
        let shape =
            Shape { batch: 1, cameras: 2, prompt_tokens: 20, horizon: 10, steps: 3, rtc: Rtc::Off };
        record(&Config::pi0(), shape).unwrap()
    }

    #[test]
    fn names_lose_their_numbers_only() {
        assert_eq!(kind("denoise.step3.7.up"), "denoise.up");
        assert_eq!(kind("prefill.17.kv"), "prefill.kv");
        assert_eq!(kind("vision.patchify"), "vision.patchify");
        assert_eq!(kind("denoise.step.up2"), "denoise.step.up2");
    }

    #[test]
    fn every_grouping_adds_up_to_the_same() {
        let program = program();
        let ms: Vec<f64> = (0..program.steps.len()).map(|i| 0.01 + i as f64 * 1e-4).collect();
        let b = breakdown(&program, &ms, &Rates::H200);
        let total: f64 = ms.iter().sum();
        let flops: f64 = program.steps.iter().map(|s| program.cost(s).flops).sum();
        for groups in [&b.categories, &b.stages, &b.kinds] {
            let sum = |f: fn(&Group) -> f64| groups.iter().map(f).sum::<f64>();
            assert!((sum(|g| g.ms) - total).abs() < 1e-9);
            assert!((sum(|g| g.share) - 1.0).abs() < 1e-12);
            assert!((sum(|g| g.flops) / flops - 1.0).abs() < 1e-12);
            assert_eq!(groups.iter().map(|g| g.steps).sum::<usize>(), program.steps.len());
        }
        assert_eq!(b.stages.len(), 3);
        for (group, (stage, name)) in b.stages.iter().zip(STAGES) {
            assert_eq!(group.name, name);
            let limit = program.stage_limit_ms(stage, &Rates::H200);
            assert!((group.limit_ms / limit - 1.0).abs() < 1e-12);
        }
        assert!(b.kinds.windows(2).all(|w| w[0].ms >= w[1].ms));
    }

    #[test]
    fn gaps_are_the_largest_and_never_negative() {
        let group = |name: &str, ms: f64, limit_ms: f64| Group {
            name: name.into(),
            steps: 1,
            ms,
            share: 0.0,
            flops: 0.0,
            weight_bytes: 0.0,
            limit_ms,
        };
        let kinds = [group("a", 5.0, 4.0), group("b", 9.0, 2.0), group("c", 1.0, 1.5)];
        let names: Vec<&str> = gaps(&kinds, 5).iter().map(|g| g.name.as_str()).collect();
        assert_eq!(names, ["b", "a"]);
        assert_eq!(gaps(&kinds, 1).len(), 1);
    }

    #[test]
    fn nothing_measured_divides_by_nothing() {
        let b = breakdown(&program(), &[], &Rates::H200);
        assert!(b.kinds.is_empty() && b.total_ms == 0.0);
    }
}
