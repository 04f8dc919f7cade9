//! A profile of this machine: how long steps of every recipe take and what sequences hold, measured, and models fitted to it that say the
//! same of steps that were not measured.

mod measure;
mod nnls;
mod step_model;

pub use measure::measure;
pub use step_model::StepModel;

use std::collections::BTreeMap;

use kvasir_engine::{EngineConfig, StepWork};
use kvasir_model::arch::DecoderSpec;
use serde::{Deserialize, Serialize};

use crate::error::{EvalError, Result};
use crate::percentiles::median;
use crate::suite::Environment;

/// The form of a profile's file.
const VERSION: u32 = 1;

/// Every so many shapes one is kept from the models, to see how well they predict it.
const HELD_OUT: usize = 3;

/// Sequences that are computed together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// How many.
    pub num_seqs: usize,
    /// Tokens of each prompt.
    pub context: usize,
    /// Steps of decode after all have begun.
    pub decode: usize,
}

impl Shape {
    /// Shapes of a profile: few and many sequences, short and long ones, none larger than `max_len` and `max_tokens` together.
    pub fn profile(max_len: usize, max_tokens: usize) -> Vec<Self> {
        const DECODE: usize = 24;
        const ALL: [(usize, usize); 18] = [
            (1, 32),
            (1, 1024),
            (1, 256),
            (1, 3000),
            (2, 640),
            (2, 96),
            (2, 2048),
            (4, 320),
            (4, 32),
            (4, 1024),
            (8, 192),
            (8, 64),
            (8, 768),
            (16, 256),
            (16, 32),
            (16, 512),
            (32, 64),
            (32, 192),
        ];
        let fits = |(n, context): &(usize, usize)| {
            context + n + DECODE + 8 < max_len && n * context <= max_tokens
        };
        let shape = |(num_seqs, context)| Self { num_seqs, context, decode: DECODE };
        ALL.into_iter().filter(fits).map(shape).collect()
    }

    /// A grid, for a table of speeds.
    pub fn grid(num_seqs: &[usize], contexts: &[usize], decode: usize) -> Vec<Self> {
        let of = |context: &usize| {
            let context = *context;
            num_seqs.iter().map(move |num_seqs| Self { num_seqs: *num_seqs, context, decode })
        };
        contexts.iter().flat_map(of).collect()
    }
}

/// Raises limits of `config` to what `shapes` need, and turns the prefix cache off.
pub fn make_room(config: &mut EngineConfig, shapes: &[Shape], spec: &DecoderSpec) {
    let bytes_per_token = spec.layers.len() * spec.kv_heads * spec.head_dim * 2 * size_of::<u16>();
    for Shape { num_seqs, context, decode } in shapes {
        let tokens = num_seqs * (context + decode + num_seqs + 4 + 2 * config.block_size);
        // Twice for f32 and tables, as much again for prompts that wait for a policy in another form.
        let bytes = tokens.saturating_mul(4 * bytes_per_token);
        config.kv_cache_memory = config.kv_cache_memory.max(bytes);
        config.max_num_seqs = config.max_num_seqs.max(*num_seqs);
    }
    config.enable_prefix_caching = false;
}

/// A measured step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepSample {
    /// The recipe.
    pub recipe: String,
    /// Which of the profile's shapes it is of.
    pub shape: usize,
    /// [`StepWork::counts`].
    pub counts: [usize; StepWork::NAMES.len()],
    /// How long it took.
    pub seconds: f64,
}

/// A recipe at a shape.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// The recipe.
    pub recipe: String,
    /// Sequences.
    pub num_seqs: usize,
    /// Tokens of each prompt.
    pub context: usize,
    /// Prompt tokens a second until all sequences have begun.
    pub prefill: f64,
    /// Tokens a second of all sequences together, after that.
    pub decode: f64,
    /// Tokens that all held at the end.
    pub tokens: usize,
    /// Those of them that did not fill a block.
    pub tail_tokens: usize,
    /// Their bytes in f16.
    pub logical_bytes: usize,
    /// Their bytes.
    pub physical_bytes: usize,
    /// Bytes that the pool had taken for them: parts of slabs that only blocks of one size can use are in it.
    pub reserved_bytes: usize,
}

/// A predicted step beside a measured one: means over a phase of a cell.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Predicted {
    /// The recipe.
    pub recipe: String,
    /// The cell's sequences.
    pub num_seqs: usize,
    /// The cell's tokens of a prompt.
    pub context: usize,
    /// Whether sequences were generating, or some still in their prompt.
    pub decode: bool,
    /// Mean seconds of a step.
    pub measured: f64,
    /// The same, predicted by models that have not seen the cell.
    pub predicted: f64,
}

impl Predicted {
    /// Relative error, from 0.
    pub fn error(&self) -> f64 {
        (self.predicted / self.measured - 1.0).abs()
    }
}

/// Bytes of sequences.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct BytesModel {
    /// Of a sequence, however short.
    pub per_sequence: f64,
    /// Of a token in a full block.
    pub per_token: f64,
    /// Of a token in a block that is not full.
    pub per_tail_token: f64,
    /// Which no sequence can use: statistics, slabs that are not full.
    pub slack: f64,
}

impl BytesModel {
    /// Of `num_seqs` sequences with as many tokens in full blocks, and in others.
    pub fn bytes(&self, num_seqs: usize, full: usize, tail: usize) -> f64 {
        self.per_sequence * num_seqs as f64
            + self.per_token * full as f64
            + self.per_tail_token * tail as f64
    }

    /// Whether full blocks are coded: then a chunk of a prompt stands beside its code for a moment.
    pub fn is_coded(&self) -> bool {
        self.per_token < 0.9 * self.per_tail_token
    }
}

/// What a machine was found to do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    /// Of the file's form.
    pub version: u32,
    /// The model, as it was named.
    pub model: String,
    /// The machine.
    pub environment: Environment,
    /// Tokens per block.
    pub block_size: usize,
    /// Most tokens computed in a step.
    pub max_num_batched_tokens: usize,
    /// Bytes of the budget that statistics take, whatever the recipe.
    pub statistics_bytes: usize,
    /// Names of the counts of steps.
    pub counts: Vec<String>,
    /// What was computed.
    pub shapes: Vec<Shape>,
    /// Every step.
    pub steps: Vec<StepSample>,
    /// Every recipe at every shape.
    pub cells: Vec<Cell>,
}

impl Profile {
    /// Of measured steps.
    pub fn new(
        model: String,
        environment: Environment,
        config: &EngineConfig,
        shapes: Vec<Shape>,
        (steps, cells): (Vec<StepSample>, Vec<Cell>),
    ) -> Self {
        Self {
            version: VERSION,
            model,
            environment,
            block_size: config.block_size,
            max_num_batched_tokens: config.max_num_batched_tokens,
            statistics_bytes: config.statistics.as_ref().map_or(0, |s| s.num_bytes()),
            counts: StepWork::NAMES.map(str::to_owned).to_vec(),
            shapes,
            steps,
            cells,
        }
    }

    /// Reads a profile's text.
    ///
    /// # Errors
    /// [`EvalError::Settings`]: no profile, one of another version or of other counts.
    pub fn parse(text: &str) -> Result<Self> {
        let wrong = |what: String| EvalError::Settings { what };
        let found: Self =
            serde_json::from_str(text).map_err(|error| wrong(format!("no profile: {error}")))?;
        if found.version != VERSION || found.counts != StepWork::NAMES {
            let what =
                format!("a profile of version {}, and this program reads {VERSION}", found.version);
            return Err(wrong(what));
        }
        let shapes = found.shapes.len();
        if let Some(step) = found.steps.iter().find(|step| step.shape >= shapes) {
            return Err(wrong(format!("a step is of shape {} of {shapes}", step.shape)));
        }
        if !matches!(found.block_size, 16 | 32 | 64) || found.max_num_batched_tokens == 0 {
            let what = format!(
                "blocks of {} tokens, steps of {}",
                found.block_size, found.max_num_batched_tokens
            );
            return Err(wrong(what));
        }
        Ok(found)
    }

    /// Recipes, in order of first appearance.
    pub fn recipes(&self) -> Vec<&str> {
        let mut all: Vec<&str> = Vec::new();
        for cell in &self.cells {
            if !all.contains(&&*cell.recipe) {
                all.push(&cell.recipe);
            }
        }
        all
    }

    /// Steps of a recipe at some shapes.
    fn steps_of(&self, recipe: &str, shapes: impl Fn(usize) -> bool) -> Vec<(StepWork, f64)> {
        let of = self.steps.iter().filter(|step| step.recipe == recipe && shapes(step.shape));
        of.map(|step| (StepWork::from_counts(step.counts), step.seconds)).collect()
    }

    /// The model of a recipe's steps, fitted to all of them; none for a recipe that was not measured.
    pub fn step_model(&self, recipe: &str) -> Option<StepModel> {
        let steps = self.steps_of(recipe, |_| true);
        (!steps.is_empty()).then(|| StepModel::fit(&steps))
    }

    /// The model of a recipe's bytes, fitted to all cells; none for a recipe that was not measured.
    pub fn bytes_model(&self, recipe: &str) -> Option<BytesModel> {
        let cells: Vec<&Cell> = self.cells.iter().filter(|cell| cell.recipe == recipe).collect();
        let first = cells.first()?;
        // Tails are not coded.
        let per_tail_token = first.logical_bytes as f64 / first.tokens.max(1) as f64;
        let of = |cell: &&Cell| vec![cell.num_seqs as f64, (cell.tokens - cell.tail_tokens) as f64];
        let rows: Vec<Vec<f64>> = cells.iter().map(of).collect();
        let rest = |cell: &&Cell| {
            (cell.physical_bytes as f64 - per_tail_token * cell.tail_tokens as f64).max(1.0)
        };
        let bytes: Vec<f64> = cells.iter().map(rest).collect();
        let unused: Vec<f64> = cells
            .iter()
            .map(|c| c.reserved_bytes.saturating_sub(c.physical_bytes) as f64)
            .collect();
        match nnls::solve(&rows, &bytes, &[])[..] {
            [per_sequence, per_token] => {
                let slack = median(&unused) + self.statistics_bytes as f64;
                Some(BytesModel { per_sequence, per_token, per_tail_token, slack })
            }
            _ => None,
        }
    }

    /// Every third shape, predicted from the others. O(recipes · steps).
    pub fn held_out(&self) -> Vec<Predicted> {
        let mut all = Vec::new();
        for recipe in self.recipes() {
            let model = StepModel::fit(&self.steps_of(recipe, |shape| shape % HELD_OUT != 1));
            let mut phases: BTreeMap<(usize, bool), (usize, f64, f64)> = BTreeMap::new();
            for step in &self.steps {
                if step.recipe != recipe || step.shape % HELD_OUT != 1 {
                    continue;
                }
                let work = StepWork::from_counts(step.counts);
                let decode = work.rows == work.sequences && work.completed_tokens == 0;
                let (n, measured, predicted) = phases.entry((step.shape, decode)).or_default();
                *n += 1;
                *measured += step.seconds;
                *predicted += model.seconds(&work);
            }
            for ((shape, decode), (n, measured, predicted)) in phases {
                let Shape { num_seqs, context, .. } = self.shapes[shape];
                let recipe = recipe.to_owned();
                let (measured, predicted) = (measured / n as f64, predicted / n as f64);
                all.push(Predicted { recipe, num_seqs, context, decode, measured, predicted });
            }
        }
        all
    }
}

/// Mean relative error by recipe, in order of first appearance.
pub fn mean_errors(predicted: &[Predicted]) -> Vec<(String, f64)> {
    let mut all: Vec<(String, f64, usize)> = Vec::new();
    for one in predicted {
        match all.iter_mut().find(|(recipe, ..)| *recipe == one.recipe) {
            Some((_, sum, n)) => (*sum, *n) = (*sum + one.error(), *n + 1),
            None => all.push((one.recipe.clone(), one.error(), 1)),
        }
    }
    all.into_iter().map(|(recipe, sum, n)| (recipe, sum / n as f64)).collect()
}

#[cfg(test)]
mod tests;
