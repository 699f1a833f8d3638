//! `record(Config, Shape) -> Program`: the whole network written down, stage by stage.

use std::collections::HashMap;
use std::sync::Arc;

use crate::config::Config;
use crate::program::{Buffer, BufferId, Element, Op, Program, Role, Shape, Step, View, WeightId};
use crate::rtc::Rtc;
use crate::weights::WeightTable;

/// Why a shape can't be recorded.
#[derive(Debug, thiserror::Error)]
pub enum ShapeError {
    /// An extent.
    #[error("{what} must be in 1..={limit}, got {got}")]
    Extent {
        /// Which.
        what: &'static str,
        /// Its limit.
        limit: usize,
        /// What was asked for.
        got: usize,
    },
    /// Actions may be given only to a model that was trained for it.
    #[error(
        "this model was not trained to take actions as given (rtc_training_max_delay is 0): use \
         guided real-time chunking"
    )]
    Untrained,
}

impl Shape {
    /// Longest prompt, tokens.
    pub const MAX_PROMPT: usize = 4096;
    /// Longest chunk, actions.
    pub const MAX_HORIZON: usize = 1024;
    /// Most Euler steps.
    pub const MAX_STEPS: usize = 1000;

    /// Limits of every extent: batch 256, cameras 3, prompt 4096, horizon 1024, steps 1000.
    pub fn check(&self) -> Result<(), ShapeError> {
        for (what, limit, got) in [
            ("batch", 256, self.batch),
            ("cameras", 3, self.cameras),
            ("prompt tokens", Self::MAX_PROMPT, self.prompt_tokens),
            ("horizon", Self::MAX_HORIZON, self.horizon),
            ("steps", Self::MAX_STEPS, self.steps),
        ] {
            if got == 0 || got > limit {
                return Err(ShapeError::Extent { what, limit, got });
            }
        }
        Ok(())
    }
}

/// Records the network: observation → vision → prefill → denoise → actions.
pub fn record(config: &Config, shape: Shape) -> Result<Program, ShapeError> {
    record_with(Arc::new(WeightTable::new(*config, shape.steps)), shape)
}

/// The same over a table that was made before (programs of one model share it).
pub fn record_with(weights: Arc<WeightTable>, shape: Shape) -> Result<Program, ShapeError> {
    shape.check()?;
    if shape.rtc == Rtc::Trained && weights.config.rtc_max_delay == 0 {
        return Err(ShapeError::Untrained);
    }
    let mut r = Recorder::new(weights, shape);
    crate::vision::record(&mut r);
    crate::prefill::record(&mut r);
    crate::denoise::record(&mut r);
    Ok(r.finish())
}

/// The pen: collects buffers and steps.
pub(crate) struct Recorder {
    pub(crate) config: Config,
    pub(crate) shape: Shape,
    weights: Arc<WeightTable>,
    buffers: Vec<Buffer>,
    by_name: HashMap<String, BufferId>,
    steps: Vec<Step>,
}

impl Recorder {
    fn new(weights: Arc<WeightTable>, shape: Shape) -> Self {
        let config = weights.config;
        let mut r = Recorder {
            config,
            shape,
            weights,
            buffers: Vec::new(),
            by_name: HashMap::new(),
            steps: Vec::new(),
        };
        r.input("lengths", shape.batch, 2, Element::U32);
        for layer in 0..config.depth {
            for part in ["k", "v"] {
                let rows = shape.batch * r.cache_rows();
                r.scratch(&format!("cache.{part}.{layer}"), rows, config.kv_dim());
            }
        }
        r
    }

    fn finish(self) -> Program {
        Program {
            config: self.config,
            shape: self.shape,
            buffers: self.buffers,
            steps: self.steps,
            weights: self.weights,
        }
    }

    fn add(
        &mut self,
        name: &str,
        rows: usize,
        cols: usize,
        element: Element,
        role: Role,
    ) -> BufferId {
        let id = BufferId(self.buffers.len());
        let previous = self.by_name.insert(name.into(), id);
        assert!(previous.is_none(), "buffer {name} recorded twice");
        self.buffers.push(Buffer { name: name.into(), rows, cols, element, role });
        id
    }

    pub(crate) fn input(&mut self, name: &str, rows: usize, cols: usize, e: Element) -> BufferId {
        self.add(name, rows, cols, e, Role::Input)
    }

    pub(crate) fn in_out(&mut self, name: &str, rows: usize, cols: usize) -> BufferId {
        self.add(name, rows, cols, Element::F32, Role::InOut)
    }

    pub(crate) fn scratch(&mut self, name: &str, rows: usize, cols: usize) -> BufferId {
        self.add(name, rows, cols, Element::Activation, Role::Scratch)
    }

    pub(crate) fn buffer(&self, name: &str) -> BufferId {
        self.by_name[name]
    }

    pub(crate) fn cache(&self, layer: usize) -> [BufferId; 2] {
        ["k", "v"].map(|part| self.by_name[&format!("cache.{part}.{layer}")])
    }

    pub(crate) fn weight(&self, name: &str) -> WeightId {
        self.weights.id(name)
    }

    pub(crate) fn push(&mut self, name: &str, op: Op) {
        self.steps.push(Step { name: name.into(), op });
    }

    /// Prefix slots of a sample.
    pub(crate) fn prefix_rows(&self) -> usize {
        self.shape.prefix_rows(&self.config)
    }

    /// Suffix tokens of a sample: the state token (π0) and the actions.
    pub(crate) fn suffix_rows(&self) -> usize {
        self.shape.suffix_rows(&self.config)
    }

    /// Rows of a sample in the K/V cache.
    pub(crate) fn cache_rows(&self) -> usize {
        self.prefix_rows() + self.suffix_rows()
    }
}

impl View {
    /// All columns of all rows, `rows` per group.
    pub(crate) fn rows(buffer: BufferId, cols: usize, rows: usize) -> Self {
        View { buffer, col: 0, cols, stride: rows, first: 0, count: rows }
    }

    /// A column range of this view.
    pub(crate) fn columns(self, col: usize, cols: usize) -> Self {
        View { col: self.col + col, cols, ..self }
    }
}
