//! `kvasir eval suite`: many samples under many recipes, and what became of each.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use kvasir_cache::{Recipe, Sharing};
use kvasir_engine::guard::RiskModel;
use kvasir_engine::{Engine, EngineConfig};
use kvasir_eval::corpus::Corpus;
use kvasir_eval::dataset::{Dataset, LoadSize};
use kvasir_eval::profile::{self, Profile, Shape};
use kvasir_eval::quality::{self, Caches, Settings, Workload};
use kvasir_eval::suite::extras;
use kvasir_eval::suite::{
    self, Backend, EngineBackend, Environment, FileConfig, Lane, RunDir, SuiteConfig, TaskConfig,
};
use kvasir_eval::tasks::Generated;
use kvasir_eval::throughput::{self, AtMemory, Job};
use kvasir_model::{Model, Runner, Threads};

use super::backend::{HttpBackend, Servers};
use super::report;
use crate::options::{EncodingArgs, ModelArgs, parse_chance};
use crate::output::{print_json, print_line};
use crate::pull::{Progress, resolve_model};
use crate::risk;
use crate::session::load_model;
use crate::units::parse_bytes;

/// What recipes do to answers: scores, single samples that fail, lengths, bytes, speed; with a report
#[derive(Args)]
#[command(after_help = "\
Tasks with exact answers are generated (the same --seed gives the same samples everywhere), files in LongBench's
format add others. Every sample is answered under every recipe, without drawing; the first recipe, f16 unless it is
there, is what all are compared with. Open questions are answered with a temperature too, as a control of lengths.
Then predictions, speed of batches, and speed at equal memory are measured, unless a server answers.

DIR has all answers (answers.jsonl), and at the end report.html and report.md. A run that was cut short goes on
where it was: give the same command again.

Examples:
  kvasir eval suite --recipes f16,joint4,joint3,joint2,kivi4,kivi2 --quick --out RUN
  kvasir eval suite --recipes joint3,snapkv:0.5 --tasks keys,list --samples 20 --out RUN
  kvasir eval suite --recipes joint3 --longbench qasper.jsonl --longbench-samples 50 --out RUN
  kvasir eval suite --server exact=http://127.0.0.1:8000 --server coded=http://127.0.0.1:8001 --out RUN
  kvasir eval suite --server http://127.0.0.1:8000 --recipes f16,joint3 --out RUN")]
pub(super) struct SuiteCommand {
    /// Recipes to compare, comma separated
    #[arg(long, alias = "recipe", value_name = "RECIPES", value_delimiter = ',')]
    recipes: Vec<Recipe>,
    /// Further recipes whose predictions are measured, for the curve of rate and quality, comma separated; all is every codec and
    /// method as it is usually set
    #[arg(long, value_name = "RECIPES", value_delimiter = ',', value_parser = parse_curve)]
    curve: Vec<Curve>,
    /// Fewer and shorter samples: for minutes, not hours
    #[arg(long)]
    quick: bool,
    /// Where the run is kept
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Generated tasks, comma separated: passkey, keys, variables, list, json-copy, arithmetic, code, open [default: all of
    /// them]
    #[arg(long, value_name = "TASKS", value_delimiter = ',', value_parser = parse_task)]
    tasks: Vec<Generated>,
    /// Samples of each generated task and length [default: 60; with --quick 30]
    #[arg(long, value_name = "N")]
    samples: Option<NonZeroUsize>,
    /// Tokens of generated prompts, about, comma separated [default: what each task is best at telling recipes apart with]
    #[arg(long, value_name = "TOKENS", value_delimiter = ',')]
    lengths: Vec<NonZeroUsize>,
    /// Seed of the samples
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    seed: u64,
    /// A file in LongBench's format: context, input, answers, dataset; may be given several times
    #[arg(long, value_name = "FILE")]
    longbench: Vec<PathBuf>,
    /// Samples of each such file
    #[arg(long, value_name = "N", default_value = "20")]
    longbench_samples: NonZeroUsize,
    /// Tokens of their contexts, about; of longer ones the middle is left out
    #[arg(long, value_name = "TOKENS", default_value = "1500")]
    longbench_tokens: NonZeroUsize,
    /// Temperature of the control of lengths
    #[arg(long, value_name = "T", default_value_t = 0.7)]
    temperature: f32,
    /// Let a server with OpenAI's API answer: URL, or NAME=URL, several to compare them; --recipes are for Kvasir's
    #[arg(long, value_name = "URL")]
    server: Vec<String>,
    /// Key to present to servers
    #[arg(long, value_name = "KEY", env = "OPENAI_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Seconds after which a silent server has failed
    #[arg(long, value_name = "SECONDS", default_value = "600")]
    timeout: NonZeroUsize,
    /// Measure answers alone, not predictions and speed
    #[arg(long)]
    answers_only: bool,
    /// Memory of the KV cache while samples are answered
    #[arg(long, value_name = "BYTES", default_value = "256MiB", value_parser = parse_bytes)]
    kv_cache_memory: usize,
    /// Answer under a guard, too, which decides how each sample is stored (see `kvasir eval risk`); several limits, comma
    /// separated, are compared
    #[arg(long, value_name = "CHANCES", value_delimiter = ',', value_parser = parse_chance)]
    kv_risk: Vec<f64>,
    /// File that says what recipes risk (see `kvasir eval risk`) [default: the one beside the model]
    #[arg(long, value_name = "FILE")]
    kv_risk_model: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    encoding: EncodingArgs,
    #[command(flatten)]
    model: ModelArgs,
}

/// Keys are secrets.
impl std::fmt::Debug for SuiteCommand {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SuiteCommand").field("out", &self.out).finish_non_exhaustive()
    }
}

/// One of `--curve`.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Curve {
    All,
    Recipe(Recipe),
}

fn parse_curve(text: &str) -> Result<Curve, String> {
    match text {
        "all" => Ok(Curve::All),
        name => name.parse().map(Curve::Recipe).map_err(|error| format!("{error}")),
    }
}

/// Reads one of `--tasks`.
fn parse_task(name: &str) -> Result<Generated, String> {
    Generated::by_name(name)
        .ok_or_else(|| format!("must be one of {}", Generated::ALL.map(Generated::name).join(", ")))
}

/// Runs the command.
pub(super) fn execute(command: &SuiteCommand) -> Result<()> {
    let progress = Progress::stderr();
    match command.server.is_empty() {
        true => local(command, progress)?,
        false => served(command, progress)?,
    }
    let (page, runs) = report::write(std::slice::from_ref(&command.out), &command.out)?;
    if command.json {
        return print_json(&runs);
    }
    for run in &runs.runs {
        print_line(&report::short(run))?;
    }
    print_line(&format!("{} has all of it", page.display()))
}

/// Answers from an engine in this process, and everything else that needs one.
fn local(command: &SuiteCommand, progress: Progress) -> Result<()> {
    let recipes = command.recipes()?;
    let name = format!("{} ({:?})", command.model.model, command.model.load.dtype).to_lowercase();
    let config = command.config(name, command.lanes(&recipes))?;
    // Mistakes are found before a model is loaded; a run is begun only with a model that is there.
    config.samples()?;
    let begun = command.out.join("config.json").exists();
    if begun {
        RunDir::open(&command.out)?;
    }
    let path = resolve_model(&command.model.model)?;
    let risk_model = command.risk_model(&path)?;
    let config = config.with_risk_model(risk_model.as_deref());
    let version = env!("CARGO_PKG_VERSION");
    let threads = Threads::new(command.encoding.threads)?.count();
    let create = || RunDir::create(&command.out, &config, &Environment::here(version, threads));
    if begun {
        create()?;
    }
    let model = load_model(&path, command.model.load.options(command.encoding.threads), progress)?;
    let curve = command.curve(&recipes);
    let mut needed: Vec<Recipe> = recipes.iter().chain(&curve).copied().collect();
    if let Some(risks) = &risk_model {
        needed.extend(risks.parsed_recipes()?);
    }
    let (statistics, tables) = command.encoding.load(&model, &path, &needed, progress)?;
    let engine = EngineConfig {
        kv_cache_memory: command.kv_cache_memory,
        block_size: command.encoding.block_size,
        threads: command.encoding.threads,
        statistics,
        tables,
        ..EngineConfig::default()
    };
    // No recipe's answers depend on what was there before.
    let followers = recipes.iter().copied().filter(|recipe| recipe.follows_f16());
    let answering = EngineConfig {
        enable_prefix_caching: false,
        observe_prompts: Some(followers.filter(|recipe| *recipe != Recipe::F16).collect()),
        ..engine.clone()
    };
    let mut backend = EngineBackend::new(Engine::new(Arc::clone(&model), answering)?, risk_model);
    let mut dir = create()?;
    answer(&mut dir, &mut backend, progress)?;
    if command.answers_only {
        return Ok(());
    }
    measure(command, &dir, &model, (&recipes, &curve), &engine, progress)
}

/// Answers from servers.
fn served(command: &SuiteCommand, progress: Progress) -> Result<()> {
    if !command.kv_risk.is_empty() {
        bail!("--kv-risk is for answers of this process; a server has its own");
    }
    let timeout = Duration::from_secs(command.timeout.get() as u64);
    let servers = Servers::connect(&command.server, command.api_key.as_deref(), timeout)?;
    let recipes = match command.recipes.is_empty() {
        true => Vec::new(),
        false => command.recipes()?,
    };
    let mut lanes = servers.lanes(&recipes)?;
    if let Some(first) = lanes.first() {
        lanes.push(Lane { server: first.server.clone(), ..command.control(first) });
    }
    let config = command.config(servers.model().to_owned(), lanes)?;
    let environment = Environment::here(env!("CARGO_PKG_VERSION"), 0);
    let mut dir = RunDir::create(&command.out, &config, &environment)?;
    answer(&mut dir, &mut HttpBackend::new(servers), progress)
}

fn answer(dir: &mut RunDir, backend: &mut dyn Backend, progress: Progress) -> Result<()> {
    let bar = progress.steps("answering");
    let result = suite::run(dir, backend, &mut |at| {
        bar.set_length(at.all as u64);
        bar.set_position(at.done as u64);
        bar.set_message(at.lane.to_owned());
    });
    bar.finish_and_clear();
    let done = dir.answers().len();
    result.with_context(|| {
        format!("{done} answers are kept in {}; the same command goes on", dir.path().display())
    })
}

/// Predictions, speed of batches, speed at equal memory: each once.
fn measure(
    command: &SuiteCommand,
    dir: &RunDir,
    model: &Arc<Model>,
    (recipes, curve): (&[Recipe], &[Recipe]),
    engine: &EngineConfig,
    progress: Progress,
) -> Result<()> {
    if dir.extra::<serde_json::Value>(extras::QUALITY)?.is_none() {
        let (contexts, context_len) = if command.quick { (4, 512) } else { (8, 1024) };
        let settings = Settings {
            workload: Workload::Continuation { contexts, context_len },
            continuation: 32,
            block_size: command.encoding.block_size,
            chunk: engine.max_num_batched_tokens,
        };
        let others = recipes.iter().skip(1).chain(curve).copied().collect::<Vec<_>>();
        let caches = Caches {
            recipes: &others,
            statistics: engine.statistics.clone(),
            tables: engine.tables.clone(),
            sharing: Sharing::OFF,
            control: None,
        };
        let mut runner = Runner::new(Threads::new(command.encoding.threads)?);
        let bar = progress.steps("predictions");
        let texts = Corpus::Embedded.texts()?;
        let rows =
            quality::measure(model, &mut runner, &texts, &caches, &settings, &mut |at, of| {
                bar.set_length(of as u64);
                bar.set_position(at as u64);
            });
        bar.finish_and_clear();
        dir.set_extra(extras::QUALITY, &rows?)?;
    }
    if dir.extra::<serde_json::Value>(extras::PROFILE)?.is_none() {
        let shapes = match command.quick {
            true => Shape::grid(&[1, 8], &[256, 768], 12),
            false => Shape::grid(&[1, 4, 16], &[256, 1024, 2048], 24),
        };
        let profile = run_profile(model, engine, recipes, shapes, &dir.config().model, progress)?;
        dir.set_extra(extras::PROFILE, &profile)?;
    }
    if dir.extra::<Vec<AtMemory>>(extras::EQUAL_MEMORY)?.is_none() {
        let rows = equal_memory(command, model, recipes, engine, progress)?;
        dir.set_extra(extras::EQUAL_MEMORY, &rows)?;
    }
    Ok(())
}

/// Measures steps of every recipe at every shape.
pub(crate) fn run_profile(
    model: &Arc<Model>,
    engine: &EngineConfig,
    recipes: &[Recipe],
    shapes: Vec<Shape>,
    name: &str,
    progress: Progress,
) -> Result<Profile> {
    let mut config = engine.clone();
    profile::make_room(&mut config, &shapes, model.spec());
    let mut engine = Engine::new(Arc::clone(model), config.clone())?;
    let bar = progress.steps("speed");
    let found = profile::measure(&mut engine, recipes, &shapes, 0, &mut |at, of| {
        bar.set_length(of as u64);
        bar.set_position(at as u64);
    });
    bar.finish_and_clear();
    let environment = Environment::here(env!("CARGO_PKG_VERSION"), engine.num_threads());
    Ok(Profile::new(name.to_owned(), environment, &config, shapes, found?))
}

/// The same requests for every recipe, with memory for a few of them in f16.
fn equal_memory(
    command: &SuiteCommand,
    model: &Arc<Model>,
    recipes: &[Recipe],
    engine: &EngineConfig,
    progress: Progress,
) -> Result<Vec<AtMemory>> {
    let (num_prompts, input_len, output_len) =
        if command.quick { (12, 256, 128) } else { (32, 512, 256) };
    let spec = model.spec();
    let bytes_per_token = spec.layers.len() * spec.kv_heads * spec.head_dim * 2 * size_of::<u16>();
    let budget = num_prompts / 4 * (input_len + output_len) * bytes_per_token;
    let size = LoadSize { num_prompts, output_len, seed: command.seed };
    let mut encode = |text: &str, special: bool| Ok(model.tokenizer().encode(text, special)?);
    let requests = Dataset::Random { input_len }.requests(size, spec.vocab_size, &mut encode)?;
    let jobs: Result<Vec<Job>> = requests
        .iter()
        .map(|request| {
            Ok(Job { prompt: request.tokens(&mut encode)?, output_len: request.output_len })
        })
        .collect();
    let jobs = jobs?;
    let bar = progress.steps("equal memory");
    let mut rows = Vec::new();
    for (number, recipe) in recipes.iter().enumerate() {
        let config = EngineConfig { kv_cache: *recipe, kv_cache_memory: budget, ..engine.clone() };
        let mut engine = Engine::new(Arc::clone(model), config)?;
        let throughput = throughput::measure(&mut engine, jobs.clone(), &mut |at, of| {
            bar.set_length((of * recipes.len()) as u64);
            bar.set_position((of * number + at) as u64);
        })?;
        rows.push(AtMemory { recipe: recipe.to_string(), budget, throughput });
    }
    bar.finish_and_clear();
    Ok(rows)
}

impl SuiteCommand {
    /// What is compared, the uncompressed cache first.
    fn recipes(&self) -> Result<Vec<Recipe>> {
        if self.recipes.is_empty() {
            bail!(
                "--recipes is needed, as in --recipes f16,joint3; or --server for somebody else's answers"
            );
        }
        let others = self.recipes.iter().copied().filter(|recipe| *recipe != Recipe::F16);
        Ok(std::iter::once(Recipe::F16).chain(others).collect())
    }

    /// Recipes of the curve that nobody answers by.
    fn curve(&self, answered: &[Recipe]) -> Vec<Recipe> {
        let mut found: Vec<Recipe> = Vec::new();
        for one in &self.curve {
            let recipes = match one {
                Curve::All => Recipe::all(),
                Curve::Recipe(recipe) => vec![*recipe],
            };
            // Without pressure it is joint4.
            let new = recipes.into_iter().filter(|r| !answered.contains(r) && *r != Recipe::AUTO);
            for recipe in new {
                if !found.contains(&recipe) {
                    found.push(recipe);
                }
            }
        }
        found
    }

    fn lanes(&self, recipes: &[Recipe]) -> Vec<Lane> {
        let greedy = recipes.iter().map(|recipe| Lane::greedy(&recipe.to_string()));
        let guarded = self.kv_risk.iter().map(|most| Lane::guarded(*most));
        let mut lanes: Vec<Lane> = greedy.chain(guarded).collect();
        if let Some(first) = lanes.first() {
            lanes.push(self.control(first));
        }
        lanes
    }

    /// What guarded lanes are decided by, of the model at `path`.
    fn risk_model(&self, path: &Path) -> Result<Option<Arc<RiskModel>>> {
        if self.kv_risk.is_empty() {
            return Ok(None);
        }
        let beside = risk::file_of(path, self.encoding.block_size);
        Ok(Some(Arc::new(risk::load(self.kv_risk_model.as_deref().unwrap_or(&beside))?)))
    }

    /// The same as `lane` with a temperature.
    fn control(&self, lane: &Lane) -> Lane {
        let drawn = Lane::drawn(&lane.name, self.temperature, self.seed + 1);
        Lane { recipe: lane.recipe.clone(), ..drawn }
    }

    fn config(&self, model: String, lanes: Vec<Lane>) -> Result<SuiteConfig> {
        if !self.temperature.is_finite() || self.temperature <= 0.0 {
            bail!("--temperature must be above 0: it is of the control that draws");
        }
        let mut config = SuiteConfig::new(model, lanes, self.seed);
        let samples = self.samples.map_or(if self.quick { 30 } else { 60 }, NonZeroUsize::get);
        let all = Generated::ALL.into_iter();
        let chosen: Vec<Generated> = match (self.tasks.is_empty(), self.longbench.is_empty()) {
            (true, true) => all.collect(),
            // Files alone are asked for.
            (true, false) => Vec::new(),
            _ => self.tasks.clone(),
        };
        let lengths: Vec<usize> = self.lengths.iter().map(|length| length.get()).collect();
        config.tasks = chosen
            .into_iter()
            .map(|task| TaskConfig {
                task,
                tokens: match lengths.is_empty() || task == Generated::Open {
                    true => task.lengths(self.quick).to_vec(),
                    false => lengths.clone(),
                },
                samples,
            })
            .collect();
        config.files = self.longbench.iter().map(|path| self.file(path)).collect();
        config.check()?;
        Ok(config)
    }

    fn file(&self, path: &Path) -> FileConfig {
        FileConfig {
            path: path.display().to_string(),
            samples: self.longbench_samples.get(),
            context_tokens: self.longbench_tokens.get(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        suite: SuiteCommand,
    }

    fn parse(args: &str) -> SuiteCommand {
        let args = ["x", "--out", "run"].into_iter().chain(args.split_whitespace());
        Line::try_parse_from(args).unwrap().suite
    }

    #[test]
    fn the_uncompressed_cache_is_the_control_of_every_run() {
        for recipes in ["joint3,f16,int8", "joint3,int8", "f16,joint3,int8"] {
            let command = parse(&format!("--recipes {recipes}"));
            let names: Vec<String> =
                command.recipes().unwrap().iter().map(Recipe::to_string).collect();
            assert_eq!(names, ["f16", "joint3", "int8"]);
            let lanes = command.lanes(&command.recipes().unwrap());
            assert_eq!(lanes.last().unwrap().name, "f16 at T=0.7");
            assert_eq!(lanes.last().unwrap().recipe.as_deref(), Some("f16"));
        }
    }

    #[test]
    fn files_alone_or_with_tasks() {
        let config = |args: &str| {
            let command = parse(args);
            command.config("m".to_owned(), command.lanes(&[Recipe::F16])).unwrap()
        };
        let all = config("--quick");
        assert_eq!((all.tasks.len(), all.files.len()), (8, 0));
        assert!(all.tasks.iter().all(|task| task.samples == 30));
        let files = config("--longbench a.jsonl --longbench b.jsonl --longbench-samples 3");
        assert_eq!((files.tasks.len(), files.files.len(), files.files[1].samples), (0, 2, 3));
        let both =
            config("--longbench a.jsonl --tasks keys,json-copy --lengths 100,200 --samples 2");
        assert_eq!((both.tasks.len(), both.files.len()), (2, 1));
        assert_eq!((&both.tasks[1].tokens[..], both.tasks[1].samples), (&[100, 200][..], 2));
    }

    #[test]
    fn a_curve_has_every_recipe_once() {
        let command = parse("--recipes joint3 --curve all,int8,joint:2.5");
        let answered = command.recipes().unwrap();
        let curve = command.curve(&answered);
        let mut both: Vec<String> = curve.iter().chain(&answered).map(Recipe::to_string).collect();
        let count = both.len();
        both.sort();
        both.dedup();
        assert_eq!(both.len(), count);
        assert_eq!(count, Recipe::all().len(), "all but auto, and joint:2.5");
        assert!(both.contains(&"joint:2.5".to_owned()) && both.contains(&"snapkv:0.5".to_owned()));
        assert!(parse("--recipes int8").curve(&[Recipe::F16]).is_empty());
        assert!(parse_curve("joint99").is_err());
    }

    #[test]
    fn help_names_every_task() {
        use clap::CommandFactory;
        let help = Line::command().render_long_help().to_string();
        let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(help.contains(&Generated::ALL.map(Generated::name).join(", ")), "{help}");
        let error = parse_task("sums").unwrap_err();
        assert!(error.starts_with("must be one of passkey, keys"), "{error}");
    }

    #[test]
    fn mistakes_are_found_before_anything_is_read() {
        let error = parse("").recipes().unwrap_err().to_string();
        assert!(error.starts_with("--recipes is needed"), "{error}");
        let command = parse("--recipes int8 --temperature 0");
        let error = command.config("m".to_owned(), command.lanes(&[Recipe::F16])).unwrap_err();
        assert!(error.to_string().starts_with("--temperature must be"), "{error}");
        let command = parse("--recipes int8,int8");
        let lanes = command.lanes(&command.recipes().unwrap());
        let error = command.config("m".to_owned(), lanes).unwrap_err().to_string();
        assert_eq!(error, "'int8' is there twice");
    }
}
