//! A recorded program → a verdict: shapes agree, views stay inside their buffers, nothing is read
//! before it is written. The `null` backend of tests does this and nothing else.

use crate::program::{Attention, BufferId, Epilogue, Linear, Norm, Op, Program, Role, View};
use crate::weights::Kind;

/// A defect of a program, naming the step.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("step `{step}`: {defect}")]
pub struct Defect {
    /// Name of the step.
    pub step: String,
    /// What is wrong.
    pub defect: String,
}

impl Program {
    /// Checks every step.
    pub fn check(&self) -> Result<(), Defect> {
        let mut written: Vec<bool> = self.buffers.iter().map(|b| b.role != Role::Scratch).collect();
        for step in &self.steps {
            let fail = |defect| Defect { step: step.name.clone(), defect };
            self.check_op(&step.op).map_err(fail)?;
            for buffer in step.op.reads() {
                if !written[buffer.0] {
                    let name = &self.buffers[buffer.0].name;
                    return Err(fail(format!("reads `{name}` before anything wrote it")));
                }
            }
            for buffer in step.op.writes() {
                written[buffer.0] = true;
                if self.buffers[buffer.0].role == Role::Input {
                    return Err(fail(format!("writes input `{}`", self.buffers[buffer.0].name)));
                }
            }
        }
        Ok(())
    }

    fn check_op(&self, op: &Op) -> Result<(), String> {
        match op {
            Op::Patchify { images, patches, patch, side } => {
                let grid = side / patch;
                let (from, to) = (&self.buffers[images.0], &self.buffers[patches.0]);
                same("image size", from.cols, side * side * 3)?;
                same("patch rows", to.rows, from.rows * grid * grid)?;
                same("patch values", to.cols, patch * patch * 3)
            }
            Op::EmbedTokens { table, out, .. } => {
                let spec = self.weights.spec(*table);
                self.inside(self.shape.batch, out)?;
                same("table width", spec.cols, out.cols)?;
                if spec.kind != Kind::TokenTable {
                    return Err(format!("`{}` is not the token table", spec.name));
                }
                Ok(())
            }
            Op::Linear(linear) => self.check_linear(linear),
            Op::Attention(attention) => self.check_attention(attention),
        }
    }

    fn check_linear(&self, l: &Linear) -> Result<(), String> {
        let spec = self.weights.spec(l.weight);
        self.inside(l.groups, &l.input)?;
        same("input columns", l.input.cols, spec.cols)?;
        let table = |what: &str, id: crate::program::WeightId, row: usize, cols: usize| {
            let t = self.weights.spec(id);
            if row >= t.rows || t.cols != cols || t.kind != Kind::Vector {
                let (name, rows) = (&t.name, t.rows);
                return Err(format!("{what}: row {row} of `{name}` [{rows}, {}]", t.cols));
            }
            Ok(())
        };
        match l.norm {
            Norm::Adaptive { table: t, row, given_row } => {
                table("modulation", t, row, 3 * spec.cols)?;
                table("modulation", t, given_row.unwrap_or(row), 3 * spec.cols)?;
            }
            Norm::Rms { scale: Some(t) } | Norm::Layer { scale: t } => {
                table("norm scale", t, 0, spec.cols)?;
            }
            Norm::Rms { scale: None } | Norm::None => {}
        }
        if let Some(bias) = l.bias {
            table("bias", bias.table, bias.row, spec.rows)?;
        }
        let output = |out: &View, cols: usize| {
            self.inside(l.groups, out)?;
            same("output rows", out.count, l.input.count)?;
            same("output columns", out.cols, cols)
        };
        match &l.epilogue {
            Epilogue::Store { out } | Epilogue::Gelu { out } | Epilogue::Silu { out } => {
                output(out, spec.rows)
            }
            Epilogue::StorePosition { out, table: t } => {
                table("positions", *t, l.input.count - 1, spec.rows)?;
                output(out, spec.rows)
            }
            Epilogue::GeGlu { out } => output(out, spec.rows / 2),
            Epilogue::Add { out, gate } => {
                if let Some(gate) = gate {
                    table("gate", gate.table, gate.row, 3 * spec.rows)?;
                    let given_row = gate.given_row.unwrap_or(gate.row);
                    table("gate", gate.table, given_row, 3 * spec.rows)?;
                }
                output(out, spec.rows)
            }
            Epilogue::AddFree { out } => {
                same("rows of a chunk", out.count, self.shape.horizon)?;
                output(out, spec.rows)
            }
            Epilogue::Guide { out, guidance } => {
                let of = |id: BufferId| (self.buffers[id.0].rows, self.buffers[id.0].cols);
                let rows = l.groups * out.count;
                pair("previous chunk", of(guidance.chunk), (rows, out.cols))?;
                pair("weights", of(guidance.weights), (rows, 1))?;
                pair("limits", of(guidance.limits), (l.groups, 1))?;
                same("rows of a chunk", out.count, self.shape.horizon)?;
                output(out, spec.rows)
            }
            Epilogue::Rope { q, k, v, head_dim, .. } => {
                let q_cols = q.map_or(0, |q| q.cols);
                same("q‖k‖v columns", q_cols + k.cols + v.cols, spec.rows)?;
                same("q heads", q_cols % head_dim + k.cols % head_dim + v.cols % head_dim, 0)?;
                q.iter().chain([k, v]).try_for_each(|view| output(view, view.cols))
            }
        }
    }

    fn check_attention(&self, a: &Attention) -> Result<(), String> {
        [&a.q, &a.k, &a.v, &a.out].into_iter().try_for_each(|v| self.inside(a.groups, v))?;
        same("q columns", a.q.cols, a.heads * a.head_dim)?;
        same("k columns", a.k.cols, a.kv_heads * a.head_dim)?;
        same("v columns", a.v.cols, a.kv_heads * a.head_dim)?;
        same("output columns", a.out.cols, a.q.cols)?;
        same("output rows", a.out.count, a.q.count)?;
        same("v rows", a.v.count, a.k.count)?;
        same("heads per K/V head", a.heads % a.kv_heads, 0)
    }

    fn inside(&self, groups: usize, view: &View) -> Result<(), String> {
        let BufferId(id) = view.buffer;
        let b = &self.buffers[id];
        let rows_end = (groups - 1) * view.stride + view.first + view.count;
        let fits = view.count > 0
            && view.first + view.count <= view.stride
            && rows_end <= b.rows
            && view.col + view.cols <= b.cols;
        if fits {
            return Ok(());
        }
        Err(format!("{view:?} reaches outside `{}` [{}, {}]", b.name, b.rows, b.cols))
    }
}

fn same(what: &str, got: usize, want: usize) -> Result<(), String> {
    if got == want { Ok(()) } else { Err(format!("{what}: {got}, expected {want}")) }
}

fn pair(what: &str, got: (usize, usize), want: (usize, usize)) -> Result<(), String> {
    same(what, got.0, want.0)?;
    same(what, got.1, want.1)
}

#[cfg(test)]
mod tests {
    use crate::program::{Op, Shape};
    use crate::{Config, Rtc, record};

    fn shape() -> Shape {
        Shape { batch: 2, cameras: 2, prompt_tokens: 7, horizon: 5, steps: 2, rtc: Rtc::Off }
    }

    #[test]
    fn recorded_programs_pass() {
        let trained = Config { rtc_max_delay: 8, ..Config::pi05() };
        for config in [Config::pi0(), Config::pi05(), trained] {
            for batch in [1, 2, 64] {
                for cameras in 1..=3 {
                    for rtc in [Rtc::Off, Rtc::Guided, Rtc::Trained] {
                        let shape = Shape { batch, cameras, rtc, ..shape() };
                        match record(&config, shape) {
                            Ok(program) => assert_eq!(program.check(), Ok(())),
                            Err(e) => assert!(rtc == Rtc::Trained && config != trained, "{e}"),
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn defects_are_named() {
        let mut program = record(&Config::pi0(), shape()).unwrap();
        program.steps.remove(0);
        let defect = program.check().unwrap_err();
        assert_eq!(defect.step, "vision.patch");
        assert!(defect.defect.contains("before anything wrote it"), "{defect}");

        let mut program = record(&Config::pi0(), shape()).unwrap();
        for step in &mut program.steps {
            if let (true, Op::Linear(linear)) = (step.name == "prefill.3.up", &mut step.op) {
                linear.input.first = 1;
            }
        }
        let defect = program.check().unwrap_err();
        assert_eq!(defect.step, "prefill.3.up");
    }

    /// The shape limits are errors, not panics.
    #[test]
    fn shapes_out_of_range_are_refused() {
        for bad in [
            Shape { batch: 0, ..shape() },
            Shape { cameras: 4, ..shape() },
            Shape { prompt_tokens: 0, ..shape() },
            Shape { horizon: 5000, ..shape() },
            Shape { steps: 0, ..shape() },
        ] {
            assert!(record(&Config::pi0(), bad).is_err(), "{bad:?}");
        }
    }
}
