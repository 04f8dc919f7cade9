//! A run's directory: `config.json` (what decides the answers), `environment.json`, `samples.jsonl`, and `answers.jsonl`, to which a line is
//! added with every answer. What a run that was killed left is taken up again; half a line at its end is taken off.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::config::{Environment, SuiteConfig, VERSION};
use crate::error::{EvalError, Result};
use crate::predict::PromptFeatures;
use crate::tasks::Sample;

/// One answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// The sample's name.
    pub sample: String,
    /// The lane's name.
    pub lane: String,
    /// What was answered.
    pub text: String,
    /// Its score, where samples have one: 0 to 1.
    pub score: Option<f64>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens of the answer.
    pub output_tokens: usize,
    /// Whether it was cut at the most tokens allowed.
    pub capped: bool,
    /// Bytes that its keys and values would take in f16, where the server tells.
    pub logical_bytes: Option<usize>,
    /// Bytes that they took.
    pub physical_bytes: Option<usize>,
    /// What was known when the prompt was computed; of the uncompressed cache in this process only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub features: Option<PromptFeatures>,
}

/// A run's directory.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    config: SuiteConfig,
    environment: Environment,
    samples: Vec<Sample>,
    answers: Vec<Answer>,
    done: HashSet<(String, String)>,
    /// Where answers are added; none if the run is only read.
    out: Option<File>,
}

impl RunDir {
    /// Begins a run, or goes on with one of the same settings.
    ///
    /// # Errors
    /// [`EvalError::Settings`]; [`EvalError::RunDir`] for a directory of another version or of other settings, or of something
    /// else; [`EvalError::Write`].
    pub fn create(path: &Path, config: &SuiteConfig, environment: &Environment) -> Result<Self> {
        let write = |source| EvalError::Write { path: path.to_owned(), source };
        let samples = config.samples()?;
        fs::create_dir_all(path).map_err(write)?;
        if !path.join("config.json").exists() {
            let mut entries = fs::read_dir(path).map_err(write)?;
            // Files of a run that was killed before it wrote its settings are its own.
            let own = ["environment", "samples", "config"];
            let foreign = entries.any(|entry| {
                let name = entry.map(|entry| PathBuf::from(entry.file_name()));
                name.is_ok_and(|name| {
                    let stem = name.file_stem().and_then(|stem| stem.to_str());
                    !stem.is_some_and(|stem| own.contains(&stem))
                })
            });
            if foreign {
                let what = "has files, and is no run's".to_owned();
                return Err(EvalError::RunDir { path: path.to_owned(), what });
            }
            write_json(&path.join("environment.json"), environment)?;
            let lines: Result<Vec<Vec<u8>>> =
                samples.iter().map(|sample| line(path, sample)).collect();
            write_file(&path.join("samples.jsonl"), &lines?.concat())?;
            // Last: a directory with settings is whole.
            write_json(&path.join("config.json"), config)?;
        }
        let mut run = Self::open(path)?;
        if let Some(name) = run.config.difference(config) {
            let what = format!("was begun with other settings: the {name} differ");
            return Err(EvalError::RunDir { path: path.to_owned(), what });
        }
        if run.samples != samples {
            let what = "has other samples: a file of samples has changed since".to_owned();
            return Err(EvalError::RunDir { path: path.to_owned(), what });
        }
        let answers = path.join("answers.jsonl");
        let out = OpenOptions::new().create(true).append(true).open(&answers);
        let out = out.map_err(|source| EvalError::Write { path: answers.clone(), source })?;
        let whole = whole_lines(&answers)?.len() as u64;
        out.set_len(whole).map_err(|source| EvalError::Write { path: answers, source })?;
        run.out = Some(out);
        Ok(run)
    }

    /// Reads a run.
    ///
    /// # Errors
    /// [`EvalError::RunDir`]: no run, one of another version, a damaged one.
    pub fn open(path: &Path) -> Result<Self> {
        let version: Versioned = read_json(path, "config.json")?;
        if version.version != VERSION {
            let found = version.version;
            let what = format!("is of version {found}, and this program reads {VERSION}");
            return Err(EvalError::RunDir { path: path.to_owned(), what });
        }
        let config: SuiteConfig = read_json(path, "config.json")?;
        config.check().map_err(|error| {
            let what = format!("config.json: {error}");
            EvalError::RunDir { path: path.to_owned(), what }
        })?;
        let environment = read_json(path, "environment.json")?;
        let samples: Vec<Sample> = read_lines(path, "samples.jsonl")?;
        let answers: Vec<Answer> = match path.join("answers.jsonl").exists() {
            true => read_lines(path, "answers.jsonl")?,
            false => Vec::new(),
        };
        let done = answers.iter().map(|a| (a.lane.clone(), a.sample.clone())).collect();
        let path = path.to_owned();
        Ok(Self { path, config, environment, samples, answers, done, out: None })
    }

    /// Adds an answer, at once and for good.
    ///
    /// # Errors
    /// [`EvalError::Write`]: a full disk, say. Answers before it are kept.
    pub fn append(&mut self, answer: Answer) -> Result<()> {
        let path = self.path.join("answers.jsonl");
        let line = line(&path, &answer)?;
        let write = |source| EvalError::Write { path: path.clone(), source };
        let out = self.out.as_mut().ok_or_else(|| write(io::ErrorKind::PermissionDenied.into()))?;
        out.write_all(&line).map_err(write)?;
        self.done.insert((answer.lane.clone(), answer.sample.clone()));
        self.answers.push(answer);
        Ok(())
    }

    /// What was measured beside the answers and left under a name; none if nothing was.
    ///
    /// # Errors
    /// [`EvalError::RunDir`] for something else under that name.
    pub fn extra<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>> {
        match self.path.join(name).exists() {
            true => read_json(&self.path, name).map(Some),
            false => Ok(None),
        }
    }

    /// Leaves something beside the answers: as a whole or not at all.
    ///
    /// # Errors
    /// [`EvalError::Write`].
    pub fn set_extra<T: Serialize>(&self, name: &str, value: &T) -> Result<()> {
        write_json(&self.path.join(name), value)
    }

    /// Whether a sample was answered under a lane.
    pub fn has(&self, lane: &str, sample: &str) -> bool {
        self.done.contains(&(lane.to_owned(), sample.to_owned()))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its settings.
    pub fn config(&self) -> &SuiteConfig {
        &self.config
    }

    /// What it was made on.
    pub fn environment(&self) -> &Environment {
        &self.environment
    }

    /// All samples.
    pub fn samples(&self) -> &[Sample] {
        &self.samples
    }

    /// Answers so far, as they came.
    pub fn answers(&self) -> &[Answer] {
        &self.answers
    }
}

#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

fn line<T: Serialize>(path: &Path, value: &T) -> Result<Vec<u8>> {
    let mut line = serde_json::to_vec(value)
        .map_err(|error| EvalError::RunDir { path: path.to_owned(), what: error.to_string() })?;
    line.push(b'\n');
    Ok(line)
}

fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let text = serde_json::to_vec_pretty(value)
        .map_err(|error| EvalError::RunDir { path: path.to_owned(), what: error.to_string() })?;
    write_file(path, &text)
}

/// As one file or not at all.
fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = |source| EvalError::Write { path: path.to_owned(), source };
    let mut partial = path.to_owned();
    partial.set_extension("partial");
    fs::write(&partial, bytes).map_err(write)?;
    fs::rename(&partial, path).map_err(write)
}

fn read_json<T: DeserializeOwned>(folder: &Path, name: &str) -> Result<T> {
    let wrong = |what: String| EvalError::RunDir { path: folder.to_owned(), what };
    let text = fs::read(folder.join(name)).map_err(|error| wrong(format!("{name}: {error}")))?;
    serde_json::from_slice(&text).map_err(|error| wrong(format!("{name}: {error}")))
}

/// A file without what follows its last line.
fn whole_lines(path: &Path) -> Result<Vec<u8>> {
    let mut text =
        fs::read(path).map_err(|source| EvalError::Io { path: path.to_owned(), source })?;
    let whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    text.truncate(whole);
    Ok(text)
}

fn read_lines<T: DeserializeOwned>(folder: &Path, name: &str) -> Result<Vec<T>> {
    let text = whole_lines(&folder.join(name))?;
    let lines = text.split(|byte| *byte == b'\n').enumerate().filter(|(_, line)| !line.is_empty());
    lines
        .map(|(i, line)| {
            serde_json::from_slice(line).map_err(|error| EvalError::RunDir {
                path: folder.to_owned(),
                what: format!("{name}, line {}: {error}", i + 1),
            })
        })
        .collect()
}
