//! Test support: builds small GGUF files, and deliberately broken ones, in memory.
//!
//! Not a general writer: everything is kept in memory and misuse panics. It is public, and hidden
//! from the documentation, because tests of several crates make their models with it.

use super::ggml_type::GgmlType;
use super::metadata::Value;
use super::values::type_number as t;

/// A GGUF file under construction. Integers are written as 32 bits where they fit, floats as f32
/// where that is exact.
#[derive(Debug, Clone)]
pub struct GgufBuilder {
    version: u32,
    alignment: u64,
    key_value_count: Option<u64>,
    tensor_count: Option<u64>,
    metadata: Vec<(Vec<u8>, u32, Vec<u8>)>,
    tensors: Vec<RawTensor>,
}

#[derive(Debug, Clone)]
struct RawTensor {
    name: Vec<u8>,
    /// Innermost first, as in the file.
    dimensions: Vec<u64>,
    ty: u32,
    /// Replaces the offset at which the data is written.
    offset: Option<u64>,
    data: Vec<u8>,
}

impl Default for GgufBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl GgufBuilder {
    /// An empty version-3 file.
    pub fn new() -> Self {
        Self {
            version: 3,
            alignment: 32,
            key_value_count: None,
            tensor_count: None,
            metadata: Vec::new(),
            tensors: Vec::new(),
        }
    }

    /// Sets the version.
    #[must_use]
    pub fn version(mut self, version: u32) -> Self {
        self.version = version;
        self
    }

    /// Writes tensor data at multiples of `alignment` and says so in `general.alignment`.
    #[must_use]
    pub fn alignment(mut self, alignment: u32) -> Self {
        self.alignment = u64::from(alignment);
        self.metadata("general.alignment", Value::Uint(u64::from(alignment)))
    }

    /// Adds a key and its value.
    #[must_use]
    #[expect(clippy::needless_pass_by_value, reason = "callers make the value in the call")]
    pub fn metadata(self, key: &str, value: Value) -> Self {
        let (ty, bytes) = encode(&value);
        self.raw_metadata(key.as_bytes(), ty, &bytes)
    }

    /// Adds a string value.
    #[must_use]
    pub fn string(self, key: &str, value: &str) -> Self {
        self.metadata(key, Value::String(value.to_owned()))
    }

    /// Adds an unsigned value.
    #[must_use]
    pub fn uint(self, key: &str, value: u64) -> Self {
        self.metadata(key, Value::Uint(value))
    }

    /// Adds a float value.
    #[must_use]
    pub fn float(self, key: &str, value: f64) -> Self {
        self.metadata(key, Value::Float(value))
    }

    /// Adds an F32 tensor. `shape` is row-major, outermost first.
    ///
    /// # Panics
    /// If `values` has another length than `shape` asks for.
    #[must_use]
    pub fn tensor_f32(self, name: &str, shape: &[usize], values: &[f32]) -> Self {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "values of tensor {name}");
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.tensor(name, shape, GgmlType::F32, &bytes)
    }

    /// Adds a tensor quantised to Q8_0. `shape` is row-major, outermost first; its last dimension
    /// is a multiple of 32.
    ///
    /// # Panics
    /// If `values` has another length than `shape` asks for.
    #[must_use]
    pub fn tensor_q8_0(self, name: &str, shape: &[usize], values: &[f32]) -> Self {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "values of tensor {name}");
        self.tensor(name, shape, GgmlType::Q8_0, &quantize_q8_0(values))
    }

    /// Adds a tensor from its stored bytes, unchecked. `shape` is row-major, outermost first.
    #[must_use]
    pub fn tensor(self, name: &str, shape: &[usize], ty: GgmlType, bytes: &[u8]) -> Self {
        let dimensions: Vec<u64> = shape.iter().rev().map(|d| *d as u64).collect();
        self.raw_tensor(name.as_bytes(), &dimensions, ty.number(), None, bytes)
    }

    /// Adds a key-value pair that need not be valid: any bytes as key, any type number, any bytes
    /// as value.
    #[must_use]
    pub fn raw_metadata(mut self, key: &[u8], ty: u32, value: &[u8]) -> Self {
        self.metadata.push((key.to_owned(), ty, value.to_owned()));
        self
    }

    /// Adds a tensor that need not be valid: any bytes as name, any dimensions (innermost first),
    /// any type number. `offset` replaces the offset at which `data` is written.
    #[must_use]
    pub fn raw_tensor(
        mut self,
        name: &[u8],
        dimensions: &[u64],
        ty: u32,
        offset: Option<u64>,
        data: &[u8],
    ) -> Self {
        self.tensors.push(RawTensor {
            name: name.to_owned(),
            dimensions: dimensions.to_owned(),
            ty,
            offset,
            data: data.to_owned(),
        });
        self
    }

    /// Writes this instead of the number of keys.
    #[must_use]
    pub fn key_value_count(mut self, count: u64) -> Self {
        self.key_value_count = Some(count);
        self
    }

    /// Writes this instead of the number of tensors.
    #[must_use]
    pub fn tensor_count(mut self, count: u64) -> Self {
        self.tensor_count = Some(count);
        self
    }

    /// The file. No padding follows the last tensor, so that cutting off any byte of a file with
    /// tensors damages it.
    pub fn build(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        put_u32(&mut out, self.version);
        put_u64(&mut out, self.tensor_count.unwrap_or(self.tensors.len() as u64));
        put_u64(&mut out, self.key_value_count.unwrap_or(self.metadata.len() as u64));
        for (key, ty, value) in &self.metadata {
            put_string(&mut out, key);
            put_u32(&mut out, *ty);
            out.extend_from_slice(value);
        }
        let mut data = Vec::new();
        for tensor in &self.tensors {
            pad(&mut data, self.alignment);
            put_string(&mut out, &tensor.name);
            put_u32(&mut out, tensor.dimensions.len() as u32);
            for dimension in &tensor.dimensions {
                put_u64(&mut out, *dimension);
            }
            put_u32(&mut out, tensor.ty);
            put_u64(&mut out, tensor.offset.unwrap_or(data.len() as u64));
            data.extend_from_slice(&tensor.data);
        }
        if !self.tensors.is_empty() {
            pad(&mut out, self.alignment);
        }
        out.extend_from_slice(&data);
        out
    }
}

/// Q8_0 blocks of `values`, whose length is a multiple of 32: scale = largest magnitude / 127.
pub fn quantize_q8_0(values: &[f32]) -> Vec<u8> {
    let (blocks, rest) = values.as_chunks::<32>();
    assert!(rest.is_empty(), "{} values are no whole blocks of 32", values.len());
    let mut out = Vec::with_capacity(blocks.len() * 34);
    for block in blocks {
        let d = block.iter().fold(0f32, |max, v| max.max(v.abs())) / 127.0;
        let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
        out.extend_from_slice(&half::f16::from_f32(d).to_le_bytes());
        out.extend(block.iter().map(|v| (v * inverse).round() as i8 as u8));
    }
    out
}

fn encode(value: &Value) -> (u32, Vec<u8>) {
    let items = |ty: u32, count: usize, bytes: Vec<u8>| {
        let mut out = Vec::new();
        put_u32(&mut out, ty);
        put_u64(&mut out, count as u64);
        out.extend(bytes);
        (t::ARRAY, out)
    };
    match value {
        Value::Uint(v) => encode_uints(&[*v]),
        Value::Int(v) => encode_ints(&[*v]),
        Value::Float(v) => encode_floats(&[*v]),
        Value::Bool(v) => (t::BOOL, vec![u8::from(*v)]),
        Value::String(v) => (t::STRING, encode_strings([v.as_str()].into_iter())),
        Value::UintArray(v) => {
            let (ty, bytes) = encode_uints(v);
            items(ty, v.len(), bytes)
        }
        Value::IntArray(v) => {
            let (ty, bytes) = encode_ints(v);
            items(ty, v.len(), bytes)
        }
        Value::FloatArray(v) => {
            let (ty, bytes) = encode_floats(v);
            items(ty, v.len(), bytes)
        }
        Value::BoolArray(v) => items(t::BOOL, v.len(), v.iter().map(|b| u8::from(*b)).collect()),
        Value::StringArray(v) => items(t::STRING, v.len(), encode_strings(v.iter())),
        Value::NestedArray(v) => {
            items(t::ARRAY, v.len(), v.iter().flat_map(|item| encode(item).1).collect())
        }
    }
}

fn encode_uints(values: &[u64]) -> (u32, Vec<u8>) {
    let small: Result<Vec<u32>, _> = values.iter().map(|v| u32::try_from(*v)).collect();
    match small {
        Ok(small) => (t::U32, small.iter().flat_map(|v| v.to_le_bytes()).collect()),
        Err(_) => (t::U64, values.iter().flat_map(|v| v.to_le_bytes()).collect()),
    }
}

fn encode_ints(values: &[i64]) -> (u32, Vec<u8>) {
    let small: Result<Vec<i32>, _> = values.iter().map(|v| i32::try_from(*v)).collect();
    match small {
        Ok(small) => (t::I32, small.iter().flat_map(|v| v.to_le_bytes()).collect()),
        Err(_) => (t::I64, values.iter().flat_map(|v| v.to_le_bytes()).collect()),
    }
}

fn encode_floats(values: &[f64]) -> (u32, Vec<u8>) {
    if values.iter().all(|v| f64::from(*v as f32) == *v) {
        (t::F32, values.iter().flat_map(|v| (*v as f32).to_le_bytes()).collect())
    } else {
        (t::F64, values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }
}

fn encode_strings<'a>(values: impl Iterator<Item = &'a str>) -> Vec<u8> {
    let mut out = Vec::new();
    for value in values {
        put_string(&mut out, value.as_bytes());
    }
    out
}

fn put_u32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_u64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_string(out: &mut Vec<u8>, value: &[u8]) {
    put_u64(out, value.len() as u64);
    out.extend_from_slice(value);
}

fn pad(out: &mut Vec<u8>, alignment: u64) {
    out.resize(out.len().next_multiple_of(alignment.max(1) as usize), 0);
}
