//! Statistics on disk: a safetensors file, by custom beside the model.
//!
//! Tensors `layers.L.groups.G.{keys,values}.{mean,weights,basis,scales}`, the basis in f16 and the
//! others in f32. The header's metadata says what they are of: the format and its version, the block
//! size, the fingerprint of the model (which must match), the corpus (which need not), and a checksum
//! of all of these and of the tensors' bytes.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use half::f16;
use kvasir_cache::stats::{PartStatistics, STATISTICS_VERSION, Statistics, group_shapes};
use safetensors::SafeTensorError;
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};

use crate::calibrate::CorpusInfo;
use crate::error::{ModelError, Result};
use crate::model::Model;

const FORMAT: &str = "kvasir-statistics";
const PARTS: [&str; 2] = ["keys", "values"];
/// More than the header has for a tensor, and for the metadata. A file that is longer than its tensors
/// and this is something else, and is not read into memory.
const MOST_HEADER_BYTES: (usize, usize) = (256, 64 << 10);

impl Model {
    /// Writes statistics of this model, as one file or not at all: other processes may write and read
    /// the same file meanwhile. Returns its length in bytes.
    ///
    /// # Errors
    /// [`ModelError::Write`]; [`ModelError::Statistics`] if they are not this model's and this
    /// corpus's.
    pub fn save_statistics(
        &self,
        path: &Path,
        statistics: &Statistics,
        corpus: &CorpusInfo,
    ) -> Result<usize> {
        let model = self.fingerprint(statistics.block_size);
        let refused = |what: String| ModelError::Statistics { path: path.to_owned(), what };
        if corpus.fingerprint(&model) != statistics.fingerprint {
            return Err(refused("of another model or corpus than they are saved for".to_owned()));
        }
        let bytes = to_bytes(statistics, corpus, &model).map_err(refused)?;
        write_whole(path, &bytes)
            .map_err(|source| ModelError::Write { path: path.to_owned(), source })?;
        Ok(bytes.len())
    }

    /// Reads statistics of this model for caches of one block size, and what they were measured on.
    ///
    /// # Errors
    /// [`ModelError::Io`]; [`ModelError::Statistics`] for those of another model, block size or
    /// version, and for a damaged file.
    pub fn load_statistics(
        &self,
        path: &Path,
        block_size: usize,
    ) -> Result<(Statistics, CorpusInfo)> {
        let io = |source| ModelError::Io { path: path.to_owned(), source };
        let refused = |what: String| ModelError::Statistics { path: path.to_owned(), what };
        // Opened first, so that the fingerprint is not computed for a file that is not there.
        let mut file = File::open(path).map_err(io)?;
        let (geometry, _) = self.cache_shapes(block_size)?;
        let shapes = group_shapes(&geometry)?;
        let most = most_bytes(&shapes) as u64;
        let len = file.metadata().map_err(io)?.len();
        if len > most {
            return Err(refused(format!(
                "{len} bytes, where those of this model have at most {most}"
            )));
        }
        let mut bytes = Vec::with_capacity(len as usize);
        io::Read::read_to_end(&mut io::Read::take(&mut file, most), &mut bytes).map_err(io)?;
        let model = self.fingerprint(block_size);
        let (statistics, corpus) =
            from_bytes(&bytes, &shapes, block_size, &model).map_err(refused)?;
        statistics.check(&geometry).map_err(|error| refused(error.to_string()))?;
        Ok((statistics, corpus))
    }
}

/// Upper bound of a file of statistics, from `(groups, width)` of every layer.
fn most_bytes(shapes: &[(usize, usize)]) -> usize {
    let part = |width: usize| 2 * width * width + 12 * width + 4 * MOST_HEADER_BYTES.0;
    let tensors: usize = shapes.iter().map(|(groups, width)| 2 * groups * part(*width)).sum();
    tensors + MOST_HEADER_BYTES.1
}

fn tensor_name(layer: usize, group: usize, part: &str, field: &str) -> String {
    format!("layers.{layer}.groups.{group}.{part}.{field}")
}

fn to_bytes(
    statistics: &Statistics,
    corpus: &CorpusInfo,
    model: &[u8; 32],
) -> Result<Vec<u8>, String> {
    let f32s = |x: &[f32]| -> Vec<u8> { x.iter().flat_map(|x| x.to_le_bytes()).collect() };
    let f16s = |x: &[f16]| -> Vec<u8> { x.iter().flat_map(|x| x.to_le_bytes()).collect() };
    let mut tensors = Vec::new();
    for (layer, groups) in statistics.layers.iter().enumerate() {
        for (group, parts) in groups.iter().enumerate() {
            for (name, part) in PARTS.into_iter().zip(parts) {
                let width = part.mean.len();
                for (field, ty, shape, bytes) in [
                    ("mean", Dtype::F32, vec![width], f32s(&part.mean)),
                    ("weights", Dtype::F32, vec![width], f32s(&part.weights)),
                    ("basis", Dtype::F16, vec![width, width], f16s(&part.basis)),
                    ("scales", Dtype::F32, vec![part.scales.len()], f32s(&part.scales)),
                ] {
                    tensors.push((tensor_name(layer, group, name, field), ty, shape, bytes));
                }
            }
        }
    }
    let views: Result<Vec<(String, TensorView<'_>)>, _> = tensors
        .iter()
        .map(|(name, ty, shape, bytes)| {
            Ok((name.clone(), TensorView::new(*ty, shape.clone(), bytes)?))
        })
        .collect();
    let views = views.map_err(|error: SafeTensorError| error.to_string())?;
    let mut metadata: HashMap<String, String> = [
        ("format", FORMAT.to_owned()),
        ("version", STATISTICS_VERSION.to_string()),
        ("block_size", statistics.block_size.to_string()),
        ("tokens", statistics.tokens.to_string()),
        ("model", hex(model)),
        ("corpus", corpus.name.clone()),
        ("corpus_hash", hex(&corpus.hash)),
        ("tokens_per_text", corpus.tokens_per_text.to_string()),
        ("fingerprint", hex(&statistics.fingerprint)),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_owned(), value))
    .collect();
    metadata.insert("checksum".to_owned(), checksum(&metadata, views.clone()));
    serialize(views, Some(metadata)).map_err(|error| error.to_string())
}

fn from_bytes(
    bytes: &[u8],
    shapes: &[(usize, usize)],
    block_size: usize,
    model: &[u8; 32],
) -> Result<(Statistics, CorpusInfo), String> {
    let damaged = |error: SafeTensorError| format!("damaged: {error}");
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(damaged)?;
    let tensors = SafeTensors::deserialize(bytes).map_err(damaged)?;
    let metadata = header.metadata().clone().unwrap_or_default();
    let text = |key: &str| {
        metadata.get(key).map(String::as_str).ok_or_else(|| format!("its header lacks '{key}'"))
    };
    let number = |key: &str| -> Result<usize, String> {
        let found = text(key)?;
        found.parse().map_err(|_| format!("'{key}' of its header is '{found}', not a number"))
    };
    if metadata.get("format").is_none_or(|format| format != FORMAT) {
        return Err("not a file of statistics".to_owned());
    }
    let version = text("version")?;
    if version != STATISTICS_VERSION.to_string() {
        return Err(format!("of version {version}; this program has version {STATISTICS_VERSION}"));
    }
    if text("checksum")? != checksum(&metadata, tensors.tensors()) {
        return Err("damaged: the checksum is not that of its content".to_owned());
    }
    let theirs = number("block_size")?;
    if theirs != block_size {
        return Err(format!("for blocks of {theirs} tokens, not {block_size}"));
    }
    if text("model")? != hex(model) {
        return Err("of another model".to_owned());
    }
    let corpus = CorpusInfo {
        name: text("corpus")?.to_owned(),
        hash: from_hex(text("corpus_hash")?).ok_or("'corpus_hash' of its header is no hash")?,
        tokens_per_text: number("tokens_per_text")?,
    };
    let expected = 8 * shapes.iter().map(|(groups, _)| groups).sum::<usize>();
    if tensors.len() != expected {
        return Err(format!("{} tensors, not {expected}", tensors.len()));
    }
    let layers = shapes.iter().enumerate();
    let layers: Result<Vec<_>, String> = layers
        .map(|(layer, (groups, width))| {
            let part = |group, part| read_part(&tensors, (layer, group, part), *width);
            (0..*groups).map(|group| Ok([part(group, PARTS[0])?, part(group, PARTS[1])?])).collect()
        })
        .collect();
    let fingerprint = corpus.fingerprint(model);
    let statistics =
        Statistics { fingerprint, block_size, tokens: number("tokens")?, layers: layers? };
    Ok((statistics, corpus))
}

/// Keys or values of a (layer, group), with the shapes that `width` asks for.
fn read_part(
    tensors: &SafeTensors<'_>,
    (layer, group, part): (usize, usize, &str),
    width: usize,
) -> Result<PartStatistics, String> {
    let data = |field: &str, ty: Dtype, shape: &[usize]| {
        let name = tensor_name(layer, group, part, field);
        let tensor = tensors.tensor(&name).map_err(|_| format!("it lacks tensor '{name}'"))?;
        if tensor.dtype() != ty || tensor.shape() != shape {
            let (found, found_shape) = (tensor.dtype(), tensor.shape());
            return Err(format!(
                "tensor '{name}' is {found} of shape {found_shape:?}, expected {ty} of {shape:?}"
            ));
        }
        Ok(tensor.data())
    };
    let f32s = |field: &str, len: usize| -> Result<Vec<f32>, String> {
        let (values, _) = data(field, Dtype::F32, &[len])?.as_chunks();
        Ok(values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
    };
    let (basis, _) = data("basis", Dtype::F16, &[width, width])?.as_chunks();
    Ok(PartStatistics {
        mean: f32s("mean", width)?,
        weights: f32s("weights", width)?,
        basis: basis.iter().map(|bytes| f16::from_le_bytes(*bytes)).collect(),
        scales: f32s("scales", width / 16)?,
    })
}

/// Of metadata and tensors in the order of their names, whatever that of the file.
fn checksum(
    metadata: &HashMap<String, String>,
    mut tensors: Vec<(String, TensorView<'_>)>,
) -> String {
    let mut hasher = blake3::Hasher::new();
    let mut entries: Vec<_> = metadata.iter().filter(|(key, _)| *key != "checksum").collect();
    entries.sort();
    hasher.update(format!("{entries:?}").as_bytes());
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    for (name, tensor) in tensors {
        hasher.update(format!("{name} {} {:?}\0", tensor.dtype(), tensor.shape()).as_bytes());
        hasher.update(tensor.data());
    }
    hasher.finalize().to_hex().to_string()
}

fn hex(hash: &[u8; 32]) -> String {
    blake3::Hash::from_bytes(*hash).to_hex().to_string()
}

fn from_hex(text: &str) -> Option<[u8; 32]> {
    blake3::Hash::from_hex(text).ok().map(|hash| *hash.as_bytes())
}

/// Writes beside `path` and renames, so that no reader sees half a file.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let (mut file, part) = create_part(path)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    drop(file);
    let renamed = written.and_then(|()| fs::rename(&part, path));
    if renamed.is_err() {
        let _ = fs::remove_file(&part);
    }
    renamed
}

/// A new file in the folder of `path` that no other process has. Process ids are not enough: a folder
/// may be shared between machines, or hold what a process left that was killed.
fn create_part(path: &Path) -> io::Result<(File, PathBuf)> {
    const ATTEMPTS: usize = 100;
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_string_lossy();
    let mut attempt = 0;
    loop {
        let part = path.with_file_name(format!("{name}.{}-{attempt}.part", std::process::id()));
        match OpenOptions::new().write(true).create_new(true).open(&part) {
            Ok(file) => return Ok((file, part)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && attempt < ATTEMPTS => {
                attempt += 1;
            }
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests;
