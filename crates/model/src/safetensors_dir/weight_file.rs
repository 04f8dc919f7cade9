//! The header of one weight file.
//!
//! A weight file is an 8-byte little-endian header length, a JSON header
//! `{ name: { "dtype", "shape", "data_offsets": [begin, end] } }`, and the tensors' bytes, to which
//! the offsets are relative. The header is read here and not by the `safetensors` crate, whose
//! errors name no tensor and no place.

use std::ops::Range;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::parse_json;
use crate::error::{ModelError, Result};
use crate::gguf::GgmlType;

/// The reference implementation's limit for a header.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// A tensor as a header describes it.
#[derive(Deserialize)]
pub(super) struct HeaderEntry {
    pub(super) dtype: String,
    pub(super) shape: Vec<usize>,
    data_offsets: [u64; 2],
}

/// The type of a tensor that can be read as f32.
pub(super) fn float_type(dtype: &str) -> Option<GgmlType> {
    match dtype {
        "F32" => Some(GgmlType::F32),
        "F16" => Some(GgmlType::F16),
        "BF16" => Some(GgmlType::BF16),
        _ => None,
    }
}

/// The tensors of one weight file, in order of their data, with the bytes each has in the file.
pub(super) fn parse_weight_file(
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
