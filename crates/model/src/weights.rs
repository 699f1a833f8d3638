//! The weights table: every matrix, vector and table the steps name, and how each is made from a
//! checkpoint's tensors.
//!
//! All exact simplifications that concern weights live in these recipes. They are evaluated in
//! f32 or better, row by row, before any rounding, so that a backend can pack a weight without
//! ever holding it whole in f32.

use std::collections::HashMap;

use crate::config::Config;
use crate::program::WeightId;
use crate::schedule::TimeEmbedding;

/// How a backend may store a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A product's matrix `[N, K]`: stored at the precision chosen at load.
    Matrix,
    /// A small matrix at the rim of the network (actions, state): stored in f32 at any precision,
    /// as openpi holds them.
    RimMatrix,
    /// The token table `[vocab, width]`: rows are gathered, never multiplied.
    TokenTable,
    /// Biases, position and modulation tables: f32.
    Vector,
}

/// How the columns of a matrix part are scaled.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Columns {
    /// As stored.
    Plain,
    /// Column k times (1 + tensor[k]): RMSNorm's offset weight, folded where the matrix stays f32.
    OnePlus(String),
}

/// One tensor stacked into a matrix: rows · scale, columns scaled.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// Canonical tensor name, `[rows, K]`.
    pub tensor: String,
    /// Rows it brings.
    pub rows: usize,
    /// Factor of every element (1/√d for queries, dt for the action output).
    pub scale: f32,
    /// Column factors.
    pub columns: Columns,
}

/// One stretch of a bias vector: scale · (bias + weight · shift).
#[derive(Clone, Debug, PartialEq)]
pub struct BiasPart {
    /// Canonical bias name.
    pub bias: String,
    /// Values it brings.
    pub rows: usize,
    /// LayerNorm's shift pushed through the weight: (weight name, shift name).
    pub shifted: Option<(String, String)>,
    /// Factor.
    pub scale: f32,
}

/// How a weight is made.
#[derive(Clone, Debug, PartialEq)]
pub enum Recipe {
    /// Parts stacked along rows.
    Stack(Vec<Part>),
    /// Bias parts one after the other, one row.
    Bias(Vec<BiasPart>),
    /// The tensor as it is, `[rows, cols]`.
    Copy(String),
    /// A norm's learned scale: the tensor, plus 1 where it is an offset (RMSNorm).
    NormScale {
        /// Canonical tensor name.
        tensor: String,
        /// Whether 1 is added.
        plus_one: bool,
    },
    /// Patch kernel `[D, 3, p, p]` → `[D, (row, column, channel)]`.
    PatchKernel,
    /// Patch bias + (0.5 / 127.5) · Σ kernel, for pixels − 128.
    PatchBias,
    /// π0: action half of `action_time_mlp_in` times `action_in_proj`, `[D, A]`.
    ComposedActionIn,
    /// π0: time half of `action_time_mlp_in` for each step's time, plus its bias and the action
    /// half applied to `action_in_proj`'s bias, `[steps, D]`.
    ComposedTimeBias,
    /// π0.5: adaRMS dense of the given prefix (`….input_layernorm`) for each step's conditioning
    /// vector, `[steps, 1 + scale ‖ shift ‖ gate]`, and a row more for given actions
    /// ([`Config::modulation_rows`]).
    Modulation(String),
}

/// One entry of the table.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightSpec {
    /// Name, unique: `prefill.3.qkv`, `expert.7.down`, `vision.0.fc1.bias`, ….
    pub name: String,
    /// Rows (outputs).
    pub rows: usize,
    /// Columns (inputs; the vector's length for a bias).
    pub cols: usize,
    /// Storage.
    pub kind: Kind,
    /// Making.
    pub recipe: Recipe,
}

impl WeightSpec {
    /// Elements.
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// All weights of a model for a number of Euler steps. It depends on `(Config, steps)` only, never
/// on batch, cameras, prompt or horizon: programs of one model share one set of loaded weights.
#[derive(Clone, Debug)]
pub struct WeightTable {
    /// Sizes.
    pub config: Config,
    /// Euler steps the schedule tables are for.
    pub steps: usize,
    /// Evaluation of the time embedding.
    pub time_embedding: TimeEmbedding,
    /// Entries; a [`WeightId`] is an index.
    pub specs: Vec<WeightSpec>,
    index: HashMap<String, WeightId>,
}

impl WeightTable {
    /// The table of a model.
    pub fn new(config: Config, steps: usize) -> Self {
        let mut table = WeightTable {
            config,
            steps,
            time_embedding: TimeEmbedding::F64,
            specs: Vec::new(),
            index: HashMap::new(),
        };
        crate::vision::weights(&mut table);
        crate::prefill::weights(&mut table);
        crate::denoise::weights(&mut table);
        table
    }

    /// The weight of that name.
    ///
    /// # Panics
    /// If there is none: names come from the recording code alone.
    pub fn id(&self, name: &str) -> WeightId {
        self.index[name]
    }

    /// The entry behind an id.
    pub fn spec(&self, id: WeightId) -> &WeightSpec {
        &self.specs[id.0]
    }

    /// Ids in loading order: all layers of one kind after each other, so that a reader of stacked
    /// arrays decodes each array once.
    pub fn loading_order(&self) -> Vec<WeightId> {
        let key = |spec: &WeightSpec| {
            let kind: Vec<&str> =
                spec.name.split('.').filter(|p| p.parse::<usize>().is_err()).collect();
            kind.join(".")
        };
        let mut ids: Vec<WeightId> = (0..self.specs.len()).map(WeightId).collect();
        ids.sort_by_cached_key(|id| (key(self.spec(*id)), id.0));
        ids
    }

    pub(crate) fn add(
        &mut self,
        name: String,
        rows: usize,
        cols: usize,
        kind: Kind,
        recipe: Recipe,
    ) {
        let id = WeightId(self.specs.len());
        let previous = self.index.insert(name.clone(), id);
        assert!(previous.is_none(), "weight {name} recorded twice");
        self.specs.push(WeightSpec { name, rows, cols, kind, recipe });
    }

    pub(crate) fn matrix(&mut self, name: String, cols: usize, parts: Vec<Part>) {
        let rows = parts.iter().map(|p| p.rows).sum();
        self.add(name, rows, cols, Kind::Matrix, Recipe::Stack(parts));
    }

    pub(crate) fn norm_scale(&mut self, name: String, cols: usize, tensor: String, plus_one: bool) {
        self.add(name, 1, cols, Kind::Vector, Recipe::NormScale { tensor, plus_one });
    }

    pub(crate) fn rim(&mut self, name: &str, cols: usize, part: Part) {
        let rows = part.rows;
        self.add(name.into(), rows, cols, Kind::RimMatrix, Recipe::Stack(vec![part]));
    }

    pub(crate) fn bias(&mut self, name: String, parts: Vec<BiasPart>) {
        let cols = parts.iter().map(|p| p.rows).sum();
        self.add(name, 1, cols, Kind::Vector, Recipe::Bias(parts));
    }
}

impl Part {
    pub(crate) fn new(tensor: String, rows: usize) -> Self {
        Part { tensor, rows, scale: 1.0, columns: Columns::Plain }
    }

    pub(crate) fn scale(self, scale: f32) -> Self {
        Part { scale, ..self }
    }

    pub(crate) fn columns(self, columns: Columns) -> Self {
        Part { columns, ..self }
    }
}

impl BiasPart {
    pub(crate) fn new(bias: String, rows: usize) -> Self {
        BiasPart { bias, rows, shifted: None, scale: 1.0 }
    }
}
