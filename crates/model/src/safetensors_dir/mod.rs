//! Safetensors folders: `config.json` and one or several memory-mapped weight files.

mod weight_file;

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;

use crate::error::{ModelError, Result};
use crate::file_bytes::{Access, FileBytes};
use crate::source::TensorSource;
use crate::stored_tensor::StoredTensor;
use weight_file::{float_type, parse_weight_file};

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";
const CONFIG_FILE: &str = "config.json";

/// A folder with `config.json` and `model.safetensors`, or the shards that
/// `model.safetensors.index.json` lists. F32, F16 and BF16 tensors can be read.
#[derive(Debug)]
pub struct SafetensorsDir {
    path: PathBuf,
    config: Value,
    access: Access,
    shards: Vec<Arc<FileBytes>>,
    tensors: Vec<SafetensorsTensor>,
    by_name: HashMap<String, usize>,
}

/// One tensor of a safetensors folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SafetensorsTensor {
    /// Name, unique in the folder.
    pub name: String,
    /// Row-major shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// Element type as the file names it.
    pub dtype: String,
    shard: usize,
    /// Bytes of the shard, checked to lie in it.
    bytes: Range<usize>,
}

impl SafetensorsTensor {
    /// Bytes in the file.
    pub fn num_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: serde_json::Map<String, Value>,
}

impl SafetensorsDir {
    /// Opens a folder, maps its weight files and checks their headers.
    ///
    /// # Errors
    /// [`ModelError::NotAModel`] if `config.json` or the weights are absent,
    /// [`ModelError::Damaged`] for bad JSON, a missing shard, a tensor that the index lists and
    /// its shard lacks, and tensor data outside its file; [`ModelError::Io`].
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_as(path, Access::Mapped)
    }

    /// [`Self::open`] with tensors that come into memory in some way.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_as(path: &Path, access: Access) -> Result<Self> {
        let missing = |what: String| Err(ModelError::NotAModel { path: path.to_owned(), what });
        if !path.is_dir() {
            return missing("not a folder".to_owned());
        }
        if !path.join(CONFIG_FILE).exists() {
            return missing(format!("it has no {CONFIG_FILE}"));
        }
        let mut dir = Self {
            path: path.to_owned(),
            config: read_json(&path.join(CONFIG_FILE))?,
            access,
            shards: Vec::new(),
            tensors: Vec::new(),
            by_name: HashMap::new(),
        };
        if path.join(SINGLE_FILE).exists() {
            dir.add_shard(&path.join(SINGLE_FILE), |_| true)?;
        } else if path.join(INDEX_FILE).exists() {
            dir.add_indexed_shards(&path.join(INDEX_FILE))?;
        } else {
            return missing(format!("it has neither {SINGLE_FILE} nor {INDEX_FILE}"));
        }
        dir.by_name =
            dir.tensors.iter().enumerate().map(|(i, tensor)| (tensor.name.clone(), i)).collect();
        Ok(dir)
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The content of `config.json`.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// All tensors, shard after shard.
    pub fn tensors(&self) -> &[SafetensorsTensor] {
        &self.tensors
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&SafetensorsTensor> {
        self.by_name.get(name).and_then(|index| self.tensors.get(*index))
    }

    /// A tensor's bytes as stored.
    ///
    /// # Errors
    /// [`ModelError::MissingTensor`].
    pub fn tensor_bytes(&self, name: &str) -> Result<&[u8]> {
        self.tensor(name)
            .and_then(|tensor| self.shards.get(tensor.shard)?.as_slice().get(tensor.bytes.clone()))
            .ok_or_else(|| ModelError::MissingTensor { name: name.to_owned() })
    }

    /// Size of all weight files.
    pub fn file_bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.as_slice().len() as u64).sum()
    }

    /// Takes the mappings' pages out of the resident set, to be called when the weights have been
    /// read. The folder stays usable: pages come back when they are read again.
    pub fn release_pages(&self) {
        for shard in &self.shards {
            shard.release_pages();
        }
    }

    fn add_indexed_shards(&mut self, index_path: &Path) -> Result<()> {
        let damaged =
            |what: String| ModelError::Damaged { path: index_path.to_owned(), offset: 0, what };
        let index: Index = read_json(index_path)?;
        let mut shard_of = HashMap::new();
        let mut file_names: Vec<&str> = Vec::new();
        for (tensor, file_name) in &index.weight_map {
            let file_name = file_name.as_str().ok_or_else(|| {
                damaged(format!("the shard of tensor {tensor:?} is {file_name}, not a file name"))
            })?;
            if !is_plain_file_name(file_name) {
                return Err(damaged(format!(
                    "the shard of tensor {tensor:?} is {file_name:?}, not a plain file name"
                )));
            }
            if !self.path.join(file_name).exists() {
                return Err(damaged(format!(
                    "it names the shard {file_name:?}, which is not in the folder"
                )));
            }
            if shard_of.insert(tensor.as_str(), file_name).is_none()
                && !file_names.contains(&file_name)
            {
                file_names.push(file_name);
            }
        }
        file_names.sort_unstable();
        for file_name in file_names {
            let shard_path = self.path.join(file_name);
            // A tensor is taken from the shard that the index names, even if another has it too.
            self.add_shard(&shard_path, |tensor| shard_of.get(tensor) == Some(&file_name))?;
        }
        let found: std::collections::HashSet<&str> =
            self.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        match shard_of.iter().find(|(tensor, _)| !found.contains(*tensor)) {
            None => Ok(()),
            Some((tensor, file_name)) => Err(damaged(format!(
                "it lists the tensor {tensor:?} in {file_name:?}, which does not have it"
            ))),
        }
    }

    /// Maps a weight file and takes the tensors that `wanted` accepts.
    fn add_shard(&mut self, path: &Path, wanted: impl Fn(&str) -> bool) -> Result<()> {
        let file = FileBytes::open(path, self.access)?;
        let shard = self.shards.len();
        let tensors = parse_weight_file(file.as_slice(), path)?;
        self.tensors.extend(tensors.into_iter().filter(|(name, ..)| wanted(name)).map(
            |(name, entry, bytes)| SafetensorsTensor {
                name,
                shape: entry.shape,
                dtype: entry.dtype,
                shard,
                bytes,
            },
        ));
        self.shards.push(Arc::new(file));
        Ok(())
    }
}

impl TensorSource for SafetensorsDir {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensor(name).map(|tensor| tensor.shape.clone())
    }

    fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        let Some(tensor) = self.tensor(name) else {
            return Err(ModelError::MissingTensor { name: name.to_owned() });
        };
        let bad_type =
            || ModelError::TensorType { name: name.to_owned(), ty: tensor.dtype.clone() };
        self.stored(name).ok_or_else(bad_type)?.read_f32()
    }

    fn stored(&self, name: &str) -> Option<StoredTensor> {
        let tensor = self.tensor(name)?;
        let (ty, file) = (float_type(&tensor.dtype)?, self.shards.get(tensor.shard)?);
        // A number alone is a row of one.
        let shape = if tensor.shape.is_empty() { &[1] } else { &tensor.shape[..] };
        StoredTensor::new((name, ty), shape, file, tensor.bytes.start)
    }
}

/// Whether a name from an index stays in the folder.
fn is_plain_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(_)), None))
}

fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T> {
    let bytes =
        std::fs::read(path).map_err(|source| ModelError::Io { path: path.to_owned(), source })?;
    parse_json(&bytes, path, 0)
}

/// Parses JSON that starts at byte `start` of the file `path`.
fn parse_json<T: for<'de> Deserialize<'de>>(bytes: &[u8], path: &Path, start: u64) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|error| {
        let lines = error.line().saturating_sub(1);
        let before: usize =
            bytes.split_inclusive(|b| *b == b'\n').take(lines).map(<[u8]>::len).sum();
        ModelError::Damaged {
            path: path.to_owned(),
            offset: start + (before + error.column().saturating_sub(1)) as u64,
            what: format!("bad JSON: {error}"),
        }
    })
}

#[cfg(test)]
mod tests;
