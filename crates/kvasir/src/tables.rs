//! The tables that methods need: loaded from beside the model, or made.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::Result;
use kvasir_cache::offline::{Method, Table, Tables};
use kvasir_eval::corpus::Corpus;
use kvasir_model::{Calibration, CorpusInfo, Model, ModelError, Runner, Threads, corpus};

use crate::pull::Progress;
use crate::statistics::{Wanted, default_tokens_per_text};

/// Where the table of a method is looked for: `FILE.bN.METHOD.kvtable` beside a file, `bN.METHOD.kvtable` in a folder, N
/// the block size.
pub(crate) fn file_of(model_path: &Path, block_size: usize, method: Method) -> PathBuf {
    let name = format!("b{block_size}.{method}.kvtable");
    if model_path.is_dir() {
        return model_path.join(name);
    }
    let mut path = OsString::from(model_path);
    path.push(".");
    path.push(name);
    path.into()
}

/// The tables of the model at `model_path`.
///
/// Those of `--kv-table` must be right. Those beside the model are taken if they are right, since a request may ask for
/// their methods; where one of the recipes needs one and there is none, it is made on the embedded corpus and left there
/// for the next start.
pub(crate) fn load_or_make(
    model: &Model,
    model_path: &Path,
    wanted: &Wanted<'_>,
    progress: Progress,
) -> Result<Tables> {
    let mut tables = Tables::default();
    for file in wanted.tables {
        tables.add(model.load_table(file, None, wanted.block_size)?);
    }
    for method in Method::ALL {
        if tables.get(method).is_some() {
            continue;
        }
        let needed = wanted
            .recipes
            .iter()
            .any(|recipe| recipe.needs_tables().any(|needed| needed == method));
        let path = file_of(model_path, wanted.block_size, method);
        let consequence = if needed { "making it anew" } else { "not used" };
        match model.load_table(&path, Some(method), wanted.block_size) {
            Ok(table) => {
                tables.add(table);
                continue;
            }
            Err(ModelError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            Err(error) => progress.note(&format!("warning: {error}; {consequence}")),
        }
        if needed {
            tables.add(make_and_keep(model, &path, method, wanted, progress)?);
        }
    }
    Ok(tables)
}

/// Tokens of each text that a method's table is made on, unless somebody says otherwise.
pub(crate) fn tokens_per_text(model: &Model, method: Method) -> usize {
    match method {
        Method::Less => Calibration::LESS_TOKENS_PER_TEXT.min(model.spec().context_length),
        _ => default_tokens_per_text(model),
    }
}

fn make_and_keep(
    model: &Model,
    path: &Path,
    method: Method,
    wanted: &Wanted<'_>,
    progress: Progress,
) -> Result<Table> {
    let texts: Vec<&str> = corpus::embedded().iter().map(|text| text.text).collect();
    let calibration = Calibration {
        texts: &texts,
        tokens_per_text: tokens_per_text(model, method),
        block_size: wanted.block_size,
    };
    let table = make(model, method, &calibration, wanted.threads, progress)?;
    let embedded = CorpusInfo::of(&Corpus::Embedded.to_string(), &calibration);
    if let Err(error) = model.save_table(path, &table, wanted.block_size, &embedded) {
        progress.note(&format!("warning: {error}; the table is made again at the next start"));
    }
    Ok(table)
}

/// Makes one, with a bar for whoever watches.
pub(crate) fn make(
    model: &Model,
    method: Method,
    calibration: &Calibration<'_>,
    threads: usize,
    progress: Progress,
) -> Result<Table> {
    let mut runner = Runner::new(Threads::new(threads)?);
    let bar = progress.steps("calibrating");
    let table = model.make_table(method, calibration, &mut runner, &mut |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    Ok(table?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvasir_cache::Recipe;
    use kvasir_model::testkit::tiny_model;

    #[test]
    fn needed_tables_are_made_once_and_wrong_ones_are_not_used() {
        let folder = tempfile::tempdir().unwrap();
        let model_path = folder.path().join("model.gguf");
        let model = tiny_model(1);
        let load = |recipe: &str, tables: &[PathBuf]| {
            let recipes: [Recipe; 1] = [recipe.parse().unwrap()];
            let wanted =
                Wanted { recipes: &recipes, block_size: 16, file: None, tables, threads: 1 };
            load_or_make(&model, &model_path, &wanted, Progress::silent())
        };
        assert!(load("f16", &[]).unwrap().is_empty());
        for method in Method::ALL {
            let path = file_of(&model_path, 16, method);
            assert!(!path.exists());
            // What it does at a share of its own needs none.
            let recipe = match method {
                Method::Compactor => "compactor:quality=90".to_owned(),
                method => format!("{method}:0.5"),
            };
            let made = load(&recipe, &[]).unwrap();
            // Found by a start that does not need it, and not made again.
            assert_eq!(load("f16", &[]).unwrap().get(method), made.get(method));
            // By name.
            let named = folder.path().join("named");
            std::fs::copy(&path, &named).unwrap();
            std::fs::write(&path, "?").unwrap();
            assert!(load("f16", &[]).unwrap().get(method).is_none());
            let found = load("f16", std::slice::from_ref(&named)).unwrap();
            assert_eq!(found.get(method), made.get(method));
            assert_eq!(load(&recipe, &[]).unwrap().get(method), made.get(method));
            std::fs::write(&named, "?").unwrap();
            assert!(load("f16", std::slice::from_ref(&named)).is_err());
        }
    }
}
