//! What a run is of.

use kvasir_cache::Recipe;
use kvasir_engine::guard::RiskModel;
use serde::{Deserialize, Serialize};

use crate::error::{EvalError, Result};
use crate::random::hash;
use crate::tasks::{Generated, Longbench, Sample, Shape, read_longbench};

/// The layout of a run's directory.
pub(super) const VERSION: u32 = 2;

/// Most tokens of a generated prompt.
const MOST_TOKENS: usize = 131_072;

/// Depths of what is asked for, in turn.
const DEPTHS: [f64; 5] = [0.0, 0.5, 1.0, 0.25, 0.75];

/// One way to answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Lane {
    /// As reports call it, different from all others.
    pub name: String,
    /// How keys and values are stored; none for a server's own way.
    pub recipe: Option<String>,
    /// 0 takes the most likely token.
    pub temperature: f32,
    /// Of what is drawn.
    pub seed: u64,
    /// The largest risk that a guard takes, which then decides how each sample is stored.
    pub risk: Option<f64>,
    /// The server that answers, by the name that the backend knows; none for an engine.
    pub server: Option<String>,
}

impl Lane {
    /// A recipe, without drawing.
    pub fn greedy(recipe: &str) -> Self {
        Self {
            name: recipe.to_owned(),
            recipe: Some(recipe.to_owned()),
            temperature: 0.0,
            seed: 0,
            risk: None,
            server: None,
        }
    }

    /// A guard that takes risks up to `most`, without drawing.
    pub fn guarded(most: f64) -> Self {
        let recipe = Some(Recipe::AUTO.to_string());
        Self { recipe, risk: Some(most), ..Self::greedy(&format!("risk {most}")) }
    }

    /// The same with a temperature: what changes in lengths without any compression.
    pub fn drawn(recipe: &str, temperature: f32, seed: u64) -> Self {
        let name = format!("{recipe} at T={temperature}");
        Self { name, temperature, seed, ..Self::greedy(recipe) }
    }

    /// The seed of a sample's drawing: one seed for all would draw alike everywhere.
    pub fn seed_of(&self, sample: &str) -> u64 {
        // Servers in other languages take signed numbers, some of 32 bits.
        hash(self.seed, sample.bytes()) >> 33
    }

    /// Whether it is one of [`Self::drawn`].
    pub fn is_drawn(&self) -> bool {
        self.temperature > 0.0
    }
}

/// A task at some lengths.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TaskConfig {
    /// The task.
    pub task: Generated,
    /// Tokens of prompts, about; open questions have their own.
    pub tokens: Vec<usize>,
    /// Samples of each length.
    pub samples: usize,
}

/// Everything that decides what a run's answers are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SuiteConfig {
    /// Of the directory's layout.
    pub version: u32,
    /// The model, as it was named, and the form of its weights.
    pub model: String,
    /// The first is what all are compared with.
    pub lanes: Vec<Lane>,
    /// Of all generated samples.
    pub seed: u64,
    /// Generated tasks.
    pub tasks: Vec<TaskConfig>,
    /// Samples in files, by name and contents.
    pub files: Vec<FileConfig>,
    /// What risk model guards use: a hash of it.
    pub risk_model: Option<u64>,
}

/// A file of samples.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileConfig {
    /// Where it was.
    pub path: String,
    /// Most samples of it.
    pub samples: usize,
    /// Tokens of a context, about.
    pub context_tokens: usize,
}

impl SuiteConfig {
    /// Settings of this version.
    pub fn new(model: String, lanes: Vec<Lane>, seed: u64) -> Self {
        let (tasks, files) = (Vec::new(), Vec::new());
        Self { version: VERSION, model, lanes, seed, tasks, files, risk_model: None }
    }

    /// The same, where guards decide by a risk model.
    #[must_use]
    pub fn with_risk_model(self, model: Option<&RiskModel>) -> Self {
        Self { risk_model: model.map(|model| hash(0, model.to_json().bytes())), ..self }
    }

    /// Finds what no model could make right.
    ///
    /// # Errors
    /// [`EvalError::Settings`].
    pub fn check(&self) -> Result<()> {
        let wrong = |what: &str| Err(EvalError::Settings { what: what.to_owned() });
        if self.lanes.is_empty() {
            return wrong("a run needs a recipe");
        }
        if self.tasks.is_empty() && self.files.is_empty() {
            return wrong("a run needs a task");
        }
        for (i, lane) in self.lanes.iter().enumerate() {
            if self.lanes[..i].iter().any(|other| other.name == lane.name) {
                let what = format!("'{}' is there twice", lane.name);
                return Err(EvalError::Settings { what });
            }
        }
        if self.tasks.iter().any(|task| task.samples == 0 || task.tokens.is_empty()) {
            return wrong("a task needs a sample and a length");
        }
        if self.tasks.iter().flat_map(|task| &task.tokens).any(|tokens| *tokens > MOST_TOKENS) {
            let what = format!("prompts of more than {MOST_TOKENS} tokens are not generated");
            return Err(EvalError::Settings { what });
        }
        Ok(())
    }

    /// All samples, in order.
    ///
    /// # Errors
    /// As [`Self::check`] and [`read_longbench`].
    pub fn samples(&self) -> Result<Vec<Sample>> {
        self.check()?;
        let mut all = Vec::new();
        for TaskConfig { task, tokens, samples } in &self.tasks {
            for tokens in tokens {
                for index in 0..*samples {
                    let depth = DEPTHS[index % DEPTHS.len()];
                    let mut sample =
                        task.sample(self.seed, index, Shape { tokens: *tokens, depth });
                    if *task != Generated::Open {
                        sample.dataset = format!("{}-{tokens}", task.name());
                        sample.id = format!("{}-{index}", sample.dataset);
                    }
                    all.push(sample);
                }
            }
        }
        for (number, file) in self.files.iter().enumerate() {
            let FileConfig { path, samples, context_tokens } = file;
            let (samples, context_tokens) = (*samples, *context_tokens);
            let file = Longbench { path: path.into(), samples, context_tokens };
            for mut sample in read_longbench(&file)? {
                if number > 0 {
                    sample.id = format!("{}-{number}", sample.id);
                }
                all.push(sample);
            }
        }
        Ok(all)
    }

    /// The first setting that differs in another, if any does.
    pub(super) fn difference(&self, other: &Self) -> Option<&'static str> {
        [
            ("model", self.model != other.model),
            ("recipes", self.lanes != other.lanes),
            ("seed", self.seed != other.seed),
            ("tasks", self.tasks != other.tasks),
            ("files", self.files != other.files),
            ("risk model", self.risk_model != other.risk_model),
        ]
        .into_iter()
        .find_map(|(name, differs)| differs.then_some(name))
    }
}

/// What a run was made on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Environment {
    /// Of this program.
    pub version: String,
    /// The processor's name.
    pub processor: String,
    /// Threads that compute.
    pub threads: usize,
    /// Operating system and architecture.
    pub system: String,
    /// Seconds since 1970 at the start.
    pub started: u64,
}

impl Environment {
    /// Of this machine.
    pub fn here(version: &str, threads: usize) -> Self {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let name = cpuinfo.lines().find_map(|line| line.strip_prefix("model name"));
        let name = name.and_then(|rest| rest.split_once(':')).map(|(_, name)| name.trim());
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Self {
            version: version.to_owned(),
            processor: name.unwrap_or("not known").to_owned(),
            threads,
            system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            started: now.map_or(0, |now| now.as_secs()),
        }
    }
}
