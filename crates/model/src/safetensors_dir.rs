//! Safetensors folders: `config.json` and one or several memory-mapped weight files.
//!
//! A weight file is an 8-byte little-endian header length, a JSON header
//! `{ name: { "dtype", "shape", "data_offsets": [begin, end] } }`, and the tensors' bytes, to which
//! the offsets are relative. The header is read here and not by the `safetensors` crate, whose
//! errors name no tensor and no place; tests write files with that crate.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use crate::dequant;
use crate::error::{ModelError, Result};
use crate::file_bytes::FileBytes;
use crate::gguf::GgmlType;
use crate::source::TensorSource;

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";
const CONFIG_FILE: &str = "config.json";
/// The reference implementation's limit for a header.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// A folder with `config.json` and `model.safetensors`, or the shards that
/// `model.safetensors.index.json` lists. F32, F16 and BF16 tensors can be read.
#[derive(Debug)]
pub struct SafetensorsDir {
    path: PathBuf,
    config: Value,
    shards: Vec<FileBytes>,
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

/// A tensor as a header describes it.
#[derive(Deserialize)]
struct HeaderEntry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
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
        let file = FileBytes::map(path)?;
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
        self.shards.push(file);
        Ok(())
    }
}

impl TensorSource for SafetensorsDir {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensor(name).map(|tensor| tensor.shape.clone())
    }

    fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        let bytes = self.tensor_bytes(name)?;
        let dtype = self.tensor(name).map_or("", |tensor| tensor.dtype.as_str());
        match float_type(dtype) {
            Some(ty) => dequant::dequantize(name, ty, bytes),
            None => Err(ModelError::TensorType { name: name.to_owned(), ty: dtype.to_owned() }),
        }
    }
}

fn float_type(dtype: &str) -> Option<GgmlType> {
    match dtype {
        "F32" => Some(GgmlType::F32),
        "F16" => Some(GgmlType::F16),
        "BF16" => Some(GgmlType::BF16),
        _ => None,
    }
}

/// Whether a name from an index stays in the folder.
fn is_plain_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(_)), None))
}

/// The tensors of one weight file, in order of their data, with the bytes each has in the file.
fn parse_weight_file(
    bytes: &[u8],
    path: &Path,
) -> Result<Vec<(String, HeaderEntry, Range<usize>)>> {
    let damaged =
        |offset: u64, what: String| ModelError::Damaged { path: path.to_owned(), offset, what };
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(damaged(0, format!("the file has {} bytes, no header", bytes.len())));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES {
        return Err(damaged(0, format!("header length {length}, limit {MAX_HEADER_BYTES}")));
    }
    let Some((header, data)) = usize::try_from(length).ok().and_then(|n| rest.split_at_checked(n))
    else {
        return Err(damaged(
            8,
            format!("the file ends inside the header: {length} bytes needed, {} left", rest.len()),
        ));
    };
    let data_start = 8 + length;
    let entries: serde_json::Map<String, Value> = parse_json(header, path, 8)?;
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, entry) in entries {
        if name == "__metadata__" {
            continue;
        }
        let entry = HeaderEntry::deserialize(entry)
            .map_err(|error| damaged(8, format!("header entry {name:?}: {error}")))?;
        let [begin, end] = entry.data_offsets;
        if begin > end || end > data.len() as u64 {
            return Err(damaged(
                data_start,
                format!(
                    "the data of tensor {name:?} is at {begin}..{end} of {} bytes of data",
                    data.len()
                ),
            ));
        }
        if let Some(ty) = float_type(&entry.dtype) {
            let needed = entry
                .shape
                .iter()
                .try_fold(ty.block_bytes() as u64, |n, d| n.checked_mul(*d as u64));
            if needed != Some(end - begin) {
                return Err(damaged(
                    data_start.saturating_add(begin),
                    format!(
                        "tensor {name:?} of type {ty} and shape {:?} has {} bytes",
                        entry.shape,
                        end - begin
                    ),
                ));
            }
        }
        // Both are at most the file's length, so they fit in a usize.
        let range = (data_start + begin) as usize..(data_start + end) as usize;
        tensors.push((name, entry, range));
    }
    tensors.sort_by_key(|(_, _, range)| range.start);
    let data_end = tensors.iter().map(|(_, _, range)| range.end).max().unwrap_or(8 + header.len());
    if data_end != bytes.len() {
        return Err(damaged(
            data_end as u64,
            format!("{} bytes follow the last tensor", bytes.len() - data_end),
        ));
    }
    Ok(tensors)
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
mod tests {
    use super::*;

    use safetensors::tensor::{Dtype, TensorView, serialize};
    use tempfile::TempDir;

    fn weight_file(tensors: &[(&str, Dtype, &[usize], &[u8])]) -> Vec<u8> {
        let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
            (*name, TensorView::new(*dtype, shape.to_vec(), bytes).unwrap())
        });
        serialize(views, None).unwrap()
    }

    fn f32_bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    fn folder(files: &[(&str, &[u8])]) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, content) in files {
            std::fs::write(dir.path().join(name), content).unwrap();
        }
        dir
    }

    fn error(dir: &TempDir) -> (ModelError, String) {
        let error = SafetensorsDir::open(dir.path()).unwrap_err();
        let message = error.to_string();
        assert!(!message.contains('\n'), "{message}");
        (error, message)
    }

    /// The message of [`ModelError::Damaged`].
    #[track_caller]
    fn damaged(files: &[(&str, &[u8])], parts: &[&str]) {
        let (error, message) = error(&folder(files));
        assert!(matches!(error, ModelError::Damaged { .. }), "{message}");
        for part in parts {
            assert!(message.contains(part), "'{message}' lacks '{part}'");
        }
    }

    const CONFIG: (&str, &[u8]) = (CONFIG_FILE, br#"{"model_type": "llama", "hidden_size": 8}"#);

    #[test]
    fn one_file_with_every_float_type() {
        let values = [1.5f32, -2.0, 0.25, 3.0];
        let half: Vec<u8> =
            values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect();
        let brain: Vec<u8> =
            values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
        let bytes = weight_file(&[
            ("a", Dtype::F32, &[2, 2], &f32_bytes(&values)),
            ("b", Dtype::F16, &[4], &half),
            ("c", Dtype::BF16, &[1, 4], &brain),
            ("ids", Dtype::I64, &[1], &[0; 8]),
            ("empty", Dtype::F32, &[0, 4], &[]),
        ]);
        let folder = folder(&[CONFIG, (SINGLE_FILE, &bytes)]);
        let dir = SafetensorsDir::open(folder.path()).unwrap();
        assert_eq!(dir.config()["hidden_size"], 8);
        assert_eq!(dir.file_bytes(), bytes.len() as u64);
        assert_eq!(dir.tensors().len(), 5);
        for name in ["a", "b", "c"] {
            assert_eq!(dir.read_f32(name).unwrap(), values, "{name}");
        }
        dir.release_pages();
        assert_eq!(dir.read_shaped("a", &[2, 2]).unwrap(), values);
        assert_eq!(dir.shape("c"), Some(vec![1, 4]));
        assert_eq!(dir.read_f32("empty").unwrap(), [0f32; 0]);
        assert_eq!(
            dir.read_f32("ids").unwrap_err().to_string(),
            "tensor 'ids' has type I64, which this build cannot read"
        );
        assert!(matches!(dir.read_f32("x"), Err(ModelError::MissingTensor { .. })));
    }

    #[test]
    fn shards() {
        let one = weight_file(&[("a", Dtype::F32, &[1], &f32_bytes(&[1.0]))]);
        let two = weight_file(&[
            ("b", Dtype::F32, &[1], &f32_bytes(&[2.0])),
            ("a", Dtype::F32, &[1], &f32_bytes(&[9.0])),
        ]);
        let index: &[u8] = br#"{"metadata": {}, "weight_map":
            {"b": "m-2.safetensors", "a": "m-1.safetensors"}}"#;
        let folder = folder(&[
            CONFIG,
            (INDEX_FILE, index),
            ("m-1.safetensors", &one),
            ("m-2.safetensors", &two),
        ]);
        let dir = SafetensorsDir::open(folder.path()).unwrap();
        assert_eq!(dir.read_f32("a").unwrap(), [1.0]);
        assert_eq!(dir.read_f32("b").unwrap(), [2.0]);
        assert_eq!(dir.tensors().len(), 2);
        assert_eq!(dir.file_bytes(), (one.len() + two.len()) as u64);
    }

    #[test]
    fn folders_that_are_no_model() {
        for (files, part) in [
            (vec![], "no config.json"),
            (vec![CONFIG], "neither model.safetensors nor"),
            (vec![(SINGLE_FILE, &b""[..])], "no config.json"),
        ] {
            let (error, message) = error(&folder(&files));
            assert!(matches!(error, ModelError::NotAModel { .. }), "{message}");
            assert!(message.contains(part), "{message}");
        }
        let error = SafetensorsDir::open(Path::new("no/such/folder")).unwrap_err();
        assert!(error.to_string().contains("no/such/folder"), "{error}");
    }

    #[test]
    fn bad_json_names_file_and_place() {
        let weights = weight_file(&[("a", Dtype::F32, &[1], &[0; 4])]);
        let config: (&str, &[u8]) = (CONFIG_FILE, b"{\n  \"a\": oops\n}");
        damaged(&[config, (SINGLE_FILE, &weights)], &["config.json", "byte 9", "bad JSON"]);
        damaged(&[CONFIG, (INDEX_FILE, b"{")], &["index.json", "bad JSON"]);
        damaged(&[CONFIG, (INDEX_FILE, b"{}")], &["index.json", "weight_map"]);
    }

    #[test]
    fn index_and_shards_that_disagree() {
        let one = weight_file(&[("a", Dtype::F32, &[1], &[0; 4])]);
        let index: &[u8] = br#"{"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}"#;
        let files = [CONFIG, (INDEX_FILE, index), ("m-1.safetensors", &one)];
        damaged(&files, &["index.json", "m-2.safetensors", "not in the folder"]);
        let files = [files[0], files[1], files[2], ("m-2.safetensors", &one)];
        damaged(&files, &["index.json", "\"b\"", "m-2.safetensors", "does not have it"]);
        for name in ["../m.safetensors", "/etc/passwd", "..", "", "a/b"] {
            let index = format!(r#"{{"weight_map": {{"a": "{name}"}}}}"#);
            damaged(&[CONFIG, (INDEX_FILE, index.as_bytes())], &["not a plain file name"]);
        }
        let index: (&str, &[u8]) = (INDEX_FILE, br#"{"weight_map": {"a": 3}}"#);
        damaged(&[CONFIG, index], &["not a file name"]);
    }

    #[test]
    fn truncated_anywhere() {
        let bytes = weight_file(&[
            ("a", Dtype::F32, &[2], &f32_bytes(&[1.0, 2.0])),
            ("b", Dtype::F16, &[2, 1], &[0; 4]),
        ]);
        let path = Path::new("m.safetensors");
        for len in 0..bytes.len() {
            let error = parse_weight_file(&bytes[..len], path).err().unwrap();
            assert!(matches!(error, ModelError::Damaged { .. }), "{len}: {error}");
        }
        assert_eq!(parse_weight_file(&bytes, path).unwrap().len(), 2);
        let longer = [&bytes[..], b"x"].concat();
        let error = parse_weight_file(&longer, path).err().unwrap();
        assert!(error.to_string().contains("1 bytes follow"), "{error}");
    }

    fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
    }

    #[test]
    fn headers_that_lie() {
        let entry = |dtype: &str, shape: &str, offsets: &str| {
            with_header(
                &format!(
                    r#"{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#
                ),
                &[0; 8],
            )
        };
        let check = |bytes: &[u8], parts: &[&str]| damaged(&[CONFIG, (SINGLE_FILE, bytes)], parts);
        check(&(1u64 << 60).to_le_bytes(), &["header length 1152921504606846976"]);
        check(
            &entry("F32", "[2]", "[0,1152921504606846976]"),
            &["\"w\"", "0..1152921504606846976"],
        );
        check(&entry("F32", "[2]", "[8,0]"), &["\"w\"", "8..0"]);
        check(&entry("F32", "[3]", "[0,8]"), &["\"w\"", "[3]", "8 bytes"]);
        check(&entry("F32", "[4294967296,4294967296,4294967296]", "[0,8]"), &["\"w\""]);
        check(&entry("F32", "[-2]", "[0,8]"), &["\"w\"", "-2"]);
        check(&entry("F32", "[2]", "[0]"), &["\"w\""]);
        check(&with_header("[1]", &[]), &["bad JSON"]);
        check(&with_header("{\"\u{7f}", &[]), &["bad JSON"]);
        let mut invalid = with_header("{\"aa\":1}", &[]);
        invalid[10] = 0xff;
        check(&invalid, &["bad JSON"]);
        // A type that cannot be read as floats still opens.
        let folder = folder(&[CONFIG, (SINGLE_FILE, &entry("U8", "[8]", "[0,8]"))]);
        SafetensorsDir::open(folder.path()).unwrap();
    }
}
