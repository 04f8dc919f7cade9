//! The statistics that joint recipes need: loaded from beside the model, or measured.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use kvasir_cache::Recipe;
use kvasir_cache::stats::Statistics;
use kvasir_eval::corpus::Corpus;
use kvasir_model::{Calibration, CorpusInfo, Model, ModelError, Runner, Threads, corpus};

use crate::pull::Progress;

/// What statistics are wanted for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted<'a> {
    /// Recipes that must work.
    pub(crate) recipes: &'a [Recipe],
    /// Tokens per block of the caches.
    pub(crate) block_size: usize,
    /// `--kv-statistics`.
    pub(crate) file: Option<&'a Path>,
    /// `--kv-table`.
    pub(crate) tables: &'a [PathBuf],
    /// Threads to measure with, 0 for all cores.
    pub(crate) threads: usize,
}

/// Where statistics of the model at `model_path` are looked for: `FILE.bN.kvstats` beside a file,
/// `bN.kvstats` in a folder, N the block size.
pub(crate) fn file_of(model_path: &Path, block_size: usize) -> PathBuf {
    if model_path.is_dir() {
        return model_path.join(format!("b{block_size}.kvstats"));
    }
    let mut path = OsString::from(model_path);
    path.push(format!(".b{block_size}.kvstats"));
    path.into()
}

/// The statistics of the model at `model_path`.
///
/// Those of `--kv-statistics` must be right. Those beside the model are taken if they are right, since
/// a request may ask for a joint recipe; where one of the recipes needs them and there are none, they
/// are measured on the embedded corpus and left there for the next start.
pub(crate) fn load_or_calibrate(
    model: &Model,
    model_path: &Path,
    wanted: &Wanted<'_>,
    progress: Progress,
) -> Result<Option<Arc<Statistics>>> {
    if let Some(file) = wanted.file {
        return Ok(Some(Arc::new(model.load_statistics(file, wanted.block_size)?.0)));
    }
    let needed = wanted.recipes.iter().any(|recipe| recipe.needs_statistics());
    let path = file_of(model_path, wanted.block_size);
    let texts: Vec<&str> = corpus::embedded().iter().map(|text| text.text).collect();
    let calibration = Calibration {
        texts: &texts,
        tokens_per_text: default_tokens_per_text(model),
        block_size: wanted.block_size,
    };
    let embedded = CorpusInfo::of(&Corpus::Embedded.to_string(), &calibration);
    let consequence = if needed { "measuring anew" } else { "not used" };
    match find(model, &path, wanted.block_size, &embedded) {
        Ok(Some(statistics)) => return Ok(Some(Arc::new(statistics))),
        Ok(None) => {}
        Err(error) => progress.note(&format!("warning: {error}; {consequence}")),
    }
    if !needed {
        return Ok(None);
    }
    let statistics = measure(model, &calibration, wanted.threads, progress)?;
    if let Err(error) = model.save_statistics(&path, &statistics, &embedded) {
        progress
            .note(&format!("warning: {error}; statistics are measured again at the next start"));
    }
    Ok(Some(Arc::new(statistics)))
}

/// Those in a file, if there is one. A corpus of the user's is theirs to choose, but the embedded one
/// must be that of this program.
fn find(
    model: &Model,
    path: &Path,
    block_size: usize,
    embedded: &CorpusInfo,
) -> Result<Option<Statistics>, ModelError> {
    match model.load_statistics(path, block_size) {
        Ok((_, corpus)) if corpus.name == embedded.name && corpus.hash != embedded.hash => {
            let what = "measured on the embedded corpus of another version".to_owned();
            Err(ModelError::Statistics { path: path.to_owned(), what })
        }
        Ok((statistics, _)) => Ok(Some(statistics)),
        Err(ModelError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// [`Calibration::TOKENS_PER_TEXT`], or the model's context if that is less.
pub(crate) fn default_tokens_per_text(model: &Model) -> usize {
    Calibration::TOKENS_PER_TEXT.min(model.spec().context_length)
}

/// Measures, with a bar for whoever watches.
pub(crate) fn measure(
    model: &Model,
    calibration: &Calibration<'_>,
    threads: usize,
    progress: Progress,
) -> Result<Statistics> {
    let mut runner = Runner::new(Threads::new(threads)?);
    let bar = progress.steps("calibrating");
    let statistics = model.calibrate(calibration, &mut runner, &mut |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    Ok(statistics?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvasir_model::testkit::tiny_model;
    use std::fs;

    struct Place {
        folder: tempfile::TempDir,
        model: Arc<Model>,
    }

    impl Place {
        fn new() -> Self {
            Self { folder: tempfile::tempdir().unwrap(), model: tiny_model(1) }
        }

        fn model_path(&self) -> PathBuf {
            self.folder.path().join("tiny.gguf")
        }

        fn statistics_path(&self) -> PathBuf {
            self.folder.path().join("tiny.gguf.b16.kvstats")
        }

        fn load(&self, recipe: &str, file: Option<&Path>) -> Result<Option<Arc<Statistics>>> {
            let recipes = [recipe.parse().unwrap()];
            let wanted =
                Wanted { recipes: &recipes, block_size: 16, file, tables: &[], threads: 1 };
            load_or_calibrate(&self.model, &self.model_path(), &wanted, Progress::silent())
        }

        /// Statistics on a corpus of that name, in the usual place.
        fn calibrate(&self, corpus: &str) -> Statistics {
            let text = "abcdefghijklmnopqrstuvwxyz".repeat(9);
            let calibration = Calibration { texts: &[&text], tokens_per_text: 200, block_size: 16 };
            let statistics = measure(&self.model, &calibration, 1, Progress::silent()).unwrap();
            let corpus = CorpusInfo::of(corpus, &calibration);
            self.model.save_statistics(&self.statistics_path(), &statistics, &corpus).unwrap();
            statistics
        }
    }

    #[test]
    fn files_are_beside_the_model() {
        let folder = tempfile::tempdir().unwrap();
        let path = file_of(&folder.path().join("m.gguf"), 32);
        assert_eq!(path, folder.path().join("m.gguf.b32.kvstats"));
        assert_eq!(file_of(folder.path(), 64), folder.path().join("b64.kvstats"));
    }

    #[test]
    fn recipes_without_statistics_measure_nothing() {
        let place = Place::new();
        assert_eq!(place.load("int8", None).unwrap(), None);
        assert_eq!(fs::read_dir(place.folder.path()).unwrap().count(), 0);
        // What is there serves requests with recipes of their own, unless it is no use.
        let statistics = place.calibrate("mine.txt");
        assert_eq!(place.load("int8", None).unwrap().as_deref(), Some(&statistics));
        fs::write(place.statistics_path(), "?").unwrap();
        assert_eq!(place.load("int8", None).unwrap(), None);
        assert_eq!(fs::read(place.statistics_path()).unwrap(), b"?");
    }

    #[test]
    fn measured_once() {
        let place = Place::new();
        let first = place.load("joint:4", None).unwrap().unwrap();
        let bytes = fs::read(place.statistics_path()).unwrap();
        assert_eq!(place.load("joint:4", None).unwrap().unwrap(), first);
        assert_eq!(fs::read(place.statistics_path()).unwrap(), bytes);
    }

    #[test]
    fn a_corpus_of_the_users_is_kept_and_an_outdated_one_is_not() {
        let place = Place::new();
        let mine = place.calibrate("mine.txt");
        assert_eq!(*place.load("joint:4", None).unwrap().unwrap(), mine);
        let outdated = place.calibrate("embedded");
        let found = place.load("joint:4", None).unwrap().unwrap();
        assert_ne!(found.fingerprint, outdated.fingerprint);
        assert_eq!(place.load("int8", None).unwrap().unwrap(), found);
    }

    #[test]
    fn a_damaged_file_is_replaced_and_a_folder_that_cannot_be_written_is_no_obstacle() {
        let place = Place::new();
        fs::write(place.statistics_path(), "?").unwrap();
        let found = place.load("joint:4", None).unwrap().unwrap();
        let (saved, _) = place.model.load_statistics(&place.statistics_path(), 16).unwrap();
        assert_eq!(saved, *found);
        fs::remove_file(place.statistics_path()).unwrap();
        fs::create_dir(place.statistics_path()).unwrap();
        assert_eq!(place.load("joint:4", None).unwrap().unwrap(), found);
    }

    #[test]
    fn a_named_file_is_used_or_refused() {
        let place = Place::new();
        let statistics = place.calibrate("mine.txt");
        let named = place.folder.path().join("named");
        fs::rename(place.statistics_path(), &named).unwrap();
        for recipe in ["f16", "joint:4"] {
            let found = place.load(recipe, Some(&named)).unwrap();
            assert_eq!(found.as_deref(), Some(&statistics));
        }
        let other = Place { model: tiny_model(2), ..Place::new() };
        let error = other.load("joint:4", Some(&named)).unwrap_err().to_string();
        assert!(error.ends_with("named refused: of another model"), "{error}");
        assert!(place.load("f16", Some(Path::new("/no/such/file"))).is_err());
        assert!(!place.statistics_path().exists());
    }
}
