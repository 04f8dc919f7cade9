//! What methods need of a model before they serve it: made, written to a safetensors file, and read back.
//!
//! A file holds the tensors of one [`Table`]. Its header's metadata says what they are of: the format and its version, the
//! method, the fingerprint of the model (which must match), the corpus (which need not), and a checksum of all of these
//! and of the tensors' bytes.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use kvasir_cache::offline::{LowRankTable, Method, Squares, TABLE_VERSION, Table, Tensor};
use kvasir_cache::{CacheError, Geometry};
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};

use crate::calibrate::{Calibration, CorpusInfo};
use crate::decoder::Runner;
use crate::error::{ModelError, Result};
use crate::model::Model;
use crate::statistics_file::write_whole;

const FORMAT: &str = "kvasir-table";

/// Larger files are something else, and are not read.
const MOST_BYTES: u64 = 4 << 30;

impl Model {
    /// Makes the table of a method. `progress` is told (steps done, steps).
    ///
    /// # Errors
    /// A corpus that is too short for the method; keys or values that are not finite.
    pub fn make_table(
        &self,
        method: Method,
        calibration: &Calibration<'_>,
        runner: &mut Runner,
        progress: &mut (dyn FnMut(usize, usize) + Send),
    ) -> Result<Table> {
        let (geometry, _) = self.cache_shapes(calibration.block_size)?;
        Ok(match method {
            Method::Lorc => {
                let layers = geometry.layers().len();
                let mut weights = Vec::with_capacity(layers);
                for layer in 0..layers {
                    progress(layer, layers);
                    weights.push(self.decoder().weight_squares(layer));
                }
                progress(layers, layers);
                Table::Lorc(LowRankTable::lorc(&weights, &geometry).into())
            }
            Method::Less => self.train_less(calibration, runner, progress)?,
            Method::Compactor => self.weigh_contexts(calibration, runner, progress)?,
            Method::KvSharer => self.search_shared_layers(calibration, runner, progress)?,
            Method::ReCalKv => {
                let mut squares = Squares::new(geometry.clone());
                self.observe(calibration, runner, &mut squares, progress)?;
                let squares = squares.finish(method)?;
                Table::ReCalKv(LowRankTable::recalkv(&squares, &geometry).into())
            }
        })
    }

    /// Writes a table of this model, as one file or not at all. Returns its length in bytes.
    ///
    /// # Errors
    /// [`ModelError::Write`].
    pub fn save_table(
        &self,
        path: &Path,
        table: &Table,
        block_size: usize,
        corpus: &CorpusInfo,
    ) -> Result<usize> {
        let refused = |what: String| ModelError::Statistics { path: path.to_owned(), what };
        let tensors = table.to_tensors();
        let bytes: Vec<Vec<u8>> = tensors
            .iter()
            .map(|t| t.data.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())
            .collect();
        let views: Result<Vec<(String, TensorView<'_>)>, _> = tensors
            .iter()
            .zip(&bytes)
            .map(|(t, bytes)| {
                let view = TensorView::new(Dtype::F32, t.shape.clone(), bytes);
                view.map(|view| (t.name.clone(), view))
            })
            .collect();
        let views = views.map_err(|error| refused(error.to_string()))?;
        let mut metadata = self.table_metadata(table.method(), block_size);
        metadata.insert("corpus".to_owned(), corpus.name.clone());
        let checksum = checksum(&metadata, tensors.iter().map(|t| &*t.name).zip(&bytes));
        metadata.insert("checksum".to_owned(), checksum);
        let file = serialize(views, Some(metadata)).map_err(|error| refused(error.to_string()))?;
        write_whole(path, &file)
            .map_err(|source| ModelError::Write { path: path.to_owned(), source })?;
        Ok(file.len())
    }

    /// Reads a table that was made of this model, for caches of one block size; of `method`, or of any if that is not said.
    ///
    /// # Errors
    /// [`ModelError::Io`]; [`ModelError::Statistics`] for one of another model, method or version, and for a damaged file.
    pub fn load_table(
        &self,
        path: &Path,
        method: Option<Method>,
        block_size: usize,
    ) -> Result<Table> {
        let io = |source| ModelError::Io { path: path.to_owned(), source };
        let refused = |what: String| ModelError::Statistics { path: path.to_owned(), what };
        let file = File::open(path).map_err(io)?;
        let len = file.metadata().map_err(io)?.len();
        if len > MOST_BYTES {
            return Err(refused(format!("{len} bytes are no table of a method")));
        }
        let mut bytes = Vec::with_capacity(len as usize);
        file.take(MOST_BYTES).read_to_end(&mut bytes).map_err(io)?;
        let (geometry, _) = self.cache_shapes(block_size)?;
        let method = match method {
            Some(method) => method,
            None => method_of(&bytes).map_err(refused)?,
        };
        let expected = self.table_metadata(method, block_size);
        read(&bytes, &expected, &geometry, method).map_err(refused)
    }

    /// What a file must say.
    fn table_metadata(&self, method: Method, block_size: usize) -> HashMap<String, String> {
        let model = blake3::Hash::from(self.fingerprint(block_size)).to_hex().to_string();
        [
            ("format", FORMAT.to_owned()),
            ("version", TABLE_VERSION.to_string()),
            ("method", method.to_string()),
            ("model", model),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .into()
    }
}

fn checksum<'a>(
    metadata: &HashMap<String, String>,
    tensors: impl Iterator<Item = (&'a str, &'a Vec<u8>)>,
) -> String {
    let mut hasher = blake3::Hasher::new();
    let mut pairs: Vec<_> = metadata.iter().filter(|(key, _)| *key != "checksum").collect();
    pairs.sort();
    let mut part = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    for (key, value) in pairs {
        part(key.as_bytes());
        part(value.as_bytes());
    }
    let mut tensors: Vec<_> = tensors.collect();
    tensors.sort();
    for (name, bytes) in tensors {
        part(name.as_bytes());
        part(bytes);
    }
    hasher.finalize().to_hex().to_string()
}

/// The method that a file says it is for.
fn method_of(bytes: &[u8]) -> Result<Method, String> {
    let read = SafeTensors::read_metadata(bytes);
    let (_, header) = read.map_err(|error| format!("no safetensors file: {error}"))?;
    let name = header.metadata().as_ref().and_then(|m| m.get("method"));
    name.and_then(|name| Method::by_name(name))
        .ok_or_else(|| format!("no table of a method: it says {}", name.map_or("none", |n| n)))
}

fn read(
    bytes: &[u8],
    expected: &HashMap<String, String>,
    geometry: &Geometry,
    method: Method,
) -> Result<Table, String> {
    let damaged = |error: safetensors::SafeTensorError| format!("no safetensors file: {error}");
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(damaged)?;
    let found = header.metadata().clone().unwrap_or_default();
    for key in ["format", "version", "method", "model"] {
        let (found, expected) = (found.get(key).map_or("nothing", |v| v), &expected[key]);
        if found != expected {
            return Err(match key {
                "model" => "made of another model, or for another block size".to_owned(),
                _ => format!("{key} is {found}, not {expected}"),
            });
        }
    }
    let file = SafeTensors::deserialize(bytes).map_err(damaged)?;
    let data: Vec<(String, Vec<u8>)> =
        file.iter().map(|(name, view)| (name.to_owned(), view.data().to_vec())).collect();
    let sum = checksum(&found, data.iter().map(|(name, bytes)| (&**name, bytes)));
    if found.get("checksum") != Some(&sum) {
        return Err("the checksum is wrong: the file is damaged".to_owned());
    }
    let tensor = |(name, view): (&str, TensorView<'_>)| match view.dtype() {
        Dtype::F32 => Ok(Tensor {
            name: name.to_owned(),
            shape: view.shape().to_vec(),
            data: view
                .data()
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect(),
        }),
        other => Err(format!("{name} is {other:?}, not F32")),
    };
    let tensors = file.iter().map(tensor).collect::<Result<_, String>>()?;
    Table::from_tensors(method, geometry, tensors).map_err(|error: CacheError| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testkit::tiny_model;
    use kvasir_kernels::Threads;

    fn made(model: &Model, method: Method, texts: &[&str]) -> Result<Table> {
        let calibration = Calibration { texts, tokens_per_text: 200, block_size: 16 };
        let mut runner = Runner::new(Threads::new(1).unwrap());
        model.make_table(method, &calibration, &mut runner, &mut |_, _| {})
    }

    const TEXT: &str = "Some words that are said again and again, some words that are said once, and no more \
                        of them than a model of this size can take in before it has seen enough.";

    #[test]
    fn tables_come_back_from_their_files() {
        let folder = tempfile::tempdir().unwrap();
        let (model, other) = (tiny_model(1), tiny_model(2));
        let corpus = CorpusInfo { name: "mine".to_owned(), hash: [0; 32], tokens_per_text: 200 };
        for method in Method::ALL {
            let path = folder.path().join(method.name());
            let table = made(&model, method, &[TEXT; 2]).unwrap();
            model.save_table(&path, &table, 16, &corpus).unwrap();
            assert_eq!(model.load_table(&path, None, 16).unwrap(), table);
            let refused = |model: &Model, method, block_size, expected: &str| {
                let error =
                    model.load_table(&path, Some(method), block_size).unwrap_err().to_string();
                assert!(error.contains(expected), "{error}");
            };
            refused(&other, method, 16, "made of another model, or for another block size");
            refused(&model, method, 32, "made of another model, or for another block size");
            let wrong = Method::ALL.into_iter().find(|m| *m != method).unwrap();
            refused(&model, wrong, 16, &format!("method is {method}, not {wrong}"));
            let mut bytes = std::fs::read(&path).unwrap();
            let last = bytes.len() - 3;
            bytes[last] ^= 1;
            std::fs::write(&path, &bytes).unwrap();
            refused(&model, method, 16, "the checksum is wrong");
            std::fs::write(&path, &bytes[..40]).unwrap();
            refused(&model, method, 16, "no safetensors file");
        }
    }

    #[test]
    fn a_corpus_may_be_too_short() {
        let error = made(&tiny_model(1), Method::ReCalKv, &["one"]).unwrap_err().to_string();
        assert!(error.contains("too few to show"), "{error}");
    }
}
