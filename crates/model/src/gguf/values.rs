//! Reads metadata values.

use super::metadata::Value;
use super::reader::{Reader, shown};
use super::strings::Strings;
use crate::error::Result;

/// Arrays of arrays deeper than this are refused, so that a file cannot exhaust the stack.
const MAX_NESTING: usize = 4;

/// Numbers of the value types in a file.
pub(super) mod type_number {
    pub(crate) const U8: u32 = 0;
    pub(crate) const I8: u32 = 1;
    pub(crate) const U16: u32 = 2;
    pub(crate) const I16: u32 = 3;
    pub(crate) const U32: u32 = 4;
    pub(crate) const I32: u32 = 5;
    pub(crate) const F32: u32 = 6;
    pub(crate) const BOOL: u32 = 7;
    pub(crate) const STRING: u32 = 8;
    pub(crate) const ARRAY: u32 = 9;
    pub(crate) const U64: u32 = 10;
    pub(crate) const I64: u32 = 11;
    pub(crate) const F64: u32 = 12;
}
use type_number as t;

/// Reads the type number and the value of `key`.
pub(super) fn read_value(reader: &mut Reader<'_>, key: &str) -> Result<Value> {
    let start = reader.position();
    let ty = reader.u32(format_args!("the type of '{}'", shown(key)))?;
    if ty == t::ARRAY {
        return read_array(reader, key, 0);
    }
    // A scalar is read as an array of one, so that each type is decoded in one place.
    let scalar = match read_items(reader, key, ty, 1, start)? {
        Value::UintArray(v) => v.first().copied().map(Value::Uint),
        Value::IntArray(v) => v.first().copied().map(Value::Int),
        Value::FloatArray(v) => v.first().copied().map(Value::Float),
        Value::BoolArray(v) => v.first().copied().map(Value::Bool),
        Value::StringArray(v) => v.get(0).map(|string| Value::String(string.to_owned())),
        other => Some(other),
    };
    scalar.ok_or_else(|| reader.damaged(start, format!("'{}' has no value", shown(key))))
}

fn read_array(reader: &mut Reader<'_>, key: &str, depth: usize) -> Result<Value> {
    let start = reader.position();
    let ty = reader.u32(format_args!("the element type of '{}'", shown(key)))?;
    let min_bytes = match ty {
        t::U8 | t::I8 | t::BOOL => 1,
        t::U16 | t::I16 => 2,
        t::U32 | t::I32 | t::F32 => 4,
        t::STRING | t::U64 | t::I64 | t::F64 => 8,
        // Element type and length.
        t::ARRAY => 12,
        _ => return Err(unknown_type(reader, key, ty, start)),
    };
    let count =
        reader.count(min_bytes, format_args!("the number of elements of '{}'", shown(key)))?;
    if ty != t::ARRAY {
        return read_items(reader, key, ty, count, start);
    }
    if depth >= MAX_NESTING {
        return Err(reader
            .damaged(start, format!("'{}' nests arrays deeper than {MAX_NESTING}", shown(key))));
    }
    let mut items = Vec::new();
    for _ in 0..count {
        items.push(read_array(reader, key, depth + 1)?);
    }
    Ok(Value::NestedArray(items))
}

/// Reads `count` values of a type that is not an array.
fn read_items(
    reader: &mut Reader<'_>,
    key: &str,
    ty: u32,
    count: usize,
    start: usize,
) -> Result<Value> {
    let value = match ty {
        t::U8 => Value::UintArray(numbers(reader, key, count, |b: [u8; 1]| b[0].into())?),
        t::U16 => Value::UintArray(numbers(reader, key, count, |b| u16::from_le_bytes(b).into())?),
        t::U32 => Value::UintArray(numbers(reader, key, count, |b| u32::from_le_bytes(b).into())?),
        t::U64 => Value::UintArray(numbers(reader, key, count, u64::from_le_bytes)?),
        t::I8 => Value::IntArray(numbers(reader, key, count, |b| i8::from_le_bytes(b).into())?),
        t::I16 => Value::IntArray(numbers(reader, key, count, |b| i16::from_le_bytes(b).into())?),
        t::I32 => Value::IntArray(numbers(reader, key, count, |b| i32::from_le_bytes(b).into())?),
        t::I64 => Value::IntArray(numbers(reader, key, count, i64::from_le_bytes)?),
        t::F32 => Value::FloatArray(numbers(reader, key, count, |b| f32::from_le_bytes(b).into())?),
        t::F64 => Value::FloatArray(numbers(reader, key, count, f64::from_le_bytes)?),
        t::BOOL => {
            let position = reader.position();
            let bytes = take_items(reader, key, count, 1)?;
            if let Some(bad) = bytes.iter().position(|b| *b > 1) {
                return Err(reader.damaged(
                    position + bad,
                    format!("'{}' is a boolean that is neither 0 nor 1", shown(key)),
                ));
            }
            Value::BoolArray(bytes.iter().map(|b| *b == 1).collect())
        }
        t::STRING => {
            // `count` was checked against the bytes left, at 8 bytes for each length.
            let mut strings = Strings::with_capacity(count);
            for i in 0..count {
                let what = format_args!("string {i} of '{}'", shown(key));
                strings.push(reader.string(u64::MAX, what)?);
            }
            Value::StringArray(strings)
        }
        _ => return Err(unknown_type(reader, key, ty, start)),
    };
    Ok(value)
}

fn unknown_type(reader: &Reader<'_>, key: &str, ty: u32, start: usize) -> crate::ModelError {
    reader.damaged(start, format!("'{}' has the unknown value type {ty}", shown(key)))
}

fn take_items<'a>(
    reader: &mut Reader<'a>,
    key: &str,
    count: usize,
    item_bytes: usize,
) -> Result<&'a [u8]> {
    // An overflowing product asks for more than any file has.
    let bytes = (count as u64).saturating_mul(item_bytes as u64);
    reader.take(bytes, format_args!("the value of '{}'", shown(key)))
}

fn numbers<const N: usize, T>(
    reader: &mut Reader<'_>,
    key: &str,
    count: usize,
    decode: impl Fn([u8; N]) -> T,
) -> Result<Vec<T>> {
    let bytes = take_items(reader, key, count, N)?;
    Ok(bytes.as_chunks::<N>().0.iter().map(|item| decode(*item)).collect())
}
