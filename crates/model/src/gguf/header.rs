//! Parses and checks everything before the tensor data.
//!
//! ```text
//! "GGUF"  version u32  tensor count u64  key-value count u64
//! key-value count × { key string, value type u32, value }
//! tensor count    × { name string, dimensions u32, dimension u64 …, type u32, offset u64 }
//! padding to general.alignment, tensor data
//! ```

use std::collections::HashMap;
use std::path::Path;

use super::ggml_type::GgmlType;
use super::metadata::{Metadata, Value};
use super::reader::{Reader, shown};
use super::tensor_info::TensorInfo;
use super::values::read_value;
use crate::error::{ModelError, Result};

const MAGIC: &[u8; 4] = b"GGUF";
const DEFAULT_ALIGNMENT: u64 = 32;
/// The format's limit for keys; tensor names get the same.
const MAX_NAME_BYTES: u64 = 65_535;
/// The format's limit.
const MAX_DIMENSIONS: u32 = 4;
/// Key length, one value type, one byte of value.
const MIN_KEY_VALUE_BYTES: u64 = 8 + 4 + 1;
/// Name length, number of dimensions, one dimension, type, offset.
const MIN_TENSOR_INFO_BYTES: u64 = 8 + 4 + 8 + 4 + 8;

/// A file's header: all that is known without reading tensor data.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    version: u32,
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
}

impl Header {
    /// Version of the format, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The key-value pairs.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Drops the keys that begin so.
    pub(super) fn forget(&mut self, prefix: &str) {
        self.metadata.forget(prefix);
    }

    /// All tensors in file order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).and_then(|index| self.tensors.get(*index))
    }
}

/// Parses the header of a whole GGUF file. `path` is only shown in messages.
///
/// Every length is checked against `bytes` before memory is allocated for it; what is allocated is
/// bounded by a small multiple of the file's size.
///
/// # Errors
/// [`ModelError::NotAModel`] for another magic, [`ModelError::Unsupported`] for another version or
/// byte order, [`ModelError::TensorType`] for a tensor type without a known size, and
/// [`ModelError::Damaged`] for everything else that breaks the format, tensor data that runs past
/// the end of the file included.
pub fn parse(bytes: &[u8], path: &Path) -> Result<Header> {
    let mut reader = Reader::new(bytes, path);
    read_magic(&mut reader, bytes, path)?;
    let version = read_version(&mut reader, path)?;
    let tensor_count =
        reader.count(MIN_TENSOR_INFO_BYTES, format_args!("the number of tensors"))?;
    let key_value_count =
        reader.count(MIN_KEY_VALUE_BYTES, format_args!("the number of metadata keys"))?;

    let mut metadata = Metadata::default();
    for i in 0..key_value_count {
        let start = reader.position();
        let key = reader.string(MAX_NAME_BYTES, format_args!("metadata key {i}"))?;
        if metadata.get(key).is_some() {
            return Err(
                reader.damaged(start, format!("metadata key '{}' appears twice", shown(key)))
            );
        }
        let value = read_value(&mut reader, key)?;
        metadata.insert(key, value);
    }
    let alignment = read_alignment(&reader, &metadata)?;

    let mut tensors = Vec::new();
    let mut by_name = HashMap::new();
    for i in 0..tensor_count {
        let start = reader.position();
        let tensor = read_tensor_info(&mut reader, i, alignment)?;
        if by_name.insert(tensor.name.clone(), i).is_some() {
            return Err(
                reader.damaged(start, format!("tensor '{}' appears twice", shown(&tensor.name)))
            );
        }
        tensors.push(tensor);
    }
    place_data(&reader, &mut tensors, alignment, bytes.len() as u64)?;
    Ok(Header { version, metadata, tensors, by_name })
}

fn read_magic(reader: &mut Reader<'_>, bytes: &[u8], path: &Path) -> Result<()> {
    let found = bytes.get(..MAGIC.len()).unwrap_or(bytes);
    if found == MAGIC {
        return reader.take(MAGIC.len() as u64, format_args!("the magic")).map(|_| ());
    }
    let what = if found.is_empty() {
        "the file is empty".to_owned()
    } else {
        format!("it starts with the bytes '{}', a GGUF file with 'GGUF'", found.escape_ascii())
    };
    Err(ModelError::NotAModel { path: path.to_owned(), what })
}

fn read_version(reader: &mut Reader<'_>, path: &Path) -> Result<u32> {
    let version = reader.u32(format_args!("the version"))?;
    let what = match version {
        2 | 3 => return Ok(version),
        _ if version != 0 && version & 0xffff == 0 => "big-endian GGUF".to_owned(),
        _ => format!("GGUF version {version} (versions 2 and 3 are read)"),
    };
    Err(ModelError::Unsupported { what: format!("{what}: {}", path.display()) })
}

fn read_alignment(reader: &Reader<'_>, metadata: &Metadata) -> Result<u64> {
    match metadata.get("general.alignment") {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(Value::Uint(alignment)) if alignment.is_power_of_two() => Ok(*alignment),
        Some(other) => Err(reader.damaged(
            reader.position(),
            format!("'general.alignment' is {}, not a power of two", shown(&format!("{other:?}"))),
        )),
    }
}

/// Reads one tensor info; its `offset` still counts from the start of the tensor data.
fn read_tensor_info(reader: &mut Reader<'_>, index: usize, alignment: u64) -> Result<TensorInfo> {
    let start = reader.position();
    let name =
        reader.string(MAX_NAME_BYTES, format_args!("the name of tensor {index}"))?.to_owned();
    let shown_name = shown(&name);
    let damaged = |reader: &Reader<'_>, what: String| {
        reader.damaged(start, format!("tensor '{shown_name}' {what}"))
    };
    let num_dimensions =
        reader.u32(format_args!("the number of dimensions of tensor '{shown_name}'"))?;
    if num_dimensions == 0 || num_dimensions > MAX_DIMENSIONS {
        return Err(damaged(
            reader,
            format!("has {num_dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}"),
        ));
    }
    let mut shape = Vec::with_capacity(MAX_DIMENSIONS as usize);
    let mut num_elements = 1u64;
    for _ in 0..num_dimensions {
        let dimension = reader.u64(format_args!("the shape of tensor '{shown_name}'"))?;
        let product = num_elements.checked_mul(dimension).filter(|product| *product > 0);
        match (usize::try_from(dimension), product) {
            (Ok(length), Some(product)) => {
                shape.push(length);
                num_elements = product;
            }
            _ => {
                return Err(damaged(
                    reader,
                    format!("has a dimension of {dimension} after {shape:?}, innermost first"),
                ));
            }
        }
    }
    let row = shape.first().copied().unwrap_or(1);
    shape.reverse();

    let number = reader.u32(format_args!("the type of tensor '{shown_name}'"))?;
    let Some(ty) = GgmlType::from_number(number) else {
        return Err(ModelError::TensorType { name: shown_name, ty: format!("number {number}") });
    };
    if row % ty.block_elements() != 0 {
        return Err(damaged(
            reader,
            format!("has rows of {row} elements, {ty} needs a multiple of {}", ty.block_elements()),
        ));
    }
    let num_blocks = num_elements / ty.block_elements() as u64;
    let Some(num_bytes) = num_blocks.checked_mul(ty.block_bytes() as u64) else {
        return Err(damaged(reader, format!("of shape {shape:?} is too large")));
    };
    let offset = reader.u64(format_args!("the offset of tensor '{shown_name}'"))?;
    if !offset.is_multiple_of(alignment) {
        return Err(damaged(
            reader,
            format!("has the data offset {offset}, not a multiple of the alignment {alignment}"),
        ));
    }
    Ok(TensorInfo { name, shape, ty, offset, num_bytes })
}

/// Turns offsets into file offsets and checks that the data lies in the file without overlaps.
fn place_data(
    reader: &Reader<'_>,
    tensors: &mut [TensorInfo],
    alignment: u64,
    file_bytes: u64,
) -> Result<()> {
    let data_start = (reader.position() as u64).checked_next_multiple_of(alignment);
    for tensor in tensors.iter_mut() {
        let start = data_start.and_then(|start| start.checked_add(tensor.offset));
        let end = start.and_then(|start| start.checked_add(tensor.num_bytes));
        match (start, end) {
            (Some(start), Some(end)) if end <= file_bytes => tensor.offset = start,
            _ => {
                return Err(reader.damaged(
                    reader.position(),
                    format!(
                        "the data of tensor '{}' ({} bytes at offset {} of the tensor data) runs \
                         past the end of the file ({file_bytes} bytes)",
                        shown(&tensor.name),
                        tensor.num_bytes,
                        tensor.offset,
                    ),
                ));
            }
        }
    }
    let mut order: Vec<&TensorInfo> = tensors.iter().collect();
    order.sort_by_key(|tensor| tensor.offset);
    for (a, b) in order.iter().zip(order.iter().skip(1)) {
        if a.offset + a.num_bytes > b.offset {
            return Err(ModelError::Damaged {
                path: reader.path().to_owned(),
                offset: b.offset,
                what: format!(
                    "the data of tensors '{}' and '{}' overlaps",
                    shown(&a.name),
                    shown(&b.name)
                ),
            });
        }
    }
    Ok(())
}
