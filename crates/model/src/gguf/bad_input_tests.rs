//! Files that break the format: each gives an error that says what and where, none a panic or a
//! large allocation.

use std::path::Path;

use proptest::prelude::*;

use super::testkit::GgufBuilder;
use super::values::type_number as t;
use super::{GgmlType, GgufFile, Header, Value, parse};
use crate::error::ModelError;
use crate::source::TensorSource;

const HUGE: u64 = 1 << 60;

fn parse_bytes(bytes: &[u8]) -> Result<Header, ModelError> {
    parse(bytes, Path::new("bad.gguf"))
}

/// The message of [`ModelError::Damaged`], checked to be one line that names the file.
#[track_caller]
fn damaged(builder: &GgufBuilder) -> String {
    let error = parse_bytes(&builder.build()).unwrap_err();
    assert!(matches!(error, ModelError::Damaged { .. }), "{error:?}");
    let message = error.to_string();
    assert!(message.starts_with("bad.gguf: damaged model file at byte "), "{message}");
    assert!(!message.contains('\n') && message.len() < 400, "{message}");
    message
}

#[track_caller]
fn assert_contains(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "'{message}' lacks '{part}'");
    }
}

/// One of everything: all value types, a nested array, tensors of three types.
fn sample() -> GgufBuilder {
    GgufBuilder::new()
        .string("general.architecture", "llama")
        .uint("a.u32", 7)
        .uint("a.u64", HUGE)
        .metadata("a.i32", Value::Int(-7))
        .float("a.f32", 0.5)
        .metadata("a.bool", Value::Bool(true))
        .metadata("a.tokens", Value::StringArray(["a", "", "ß"].iter().collect()))
        .metadata("a.scores", Value::FloatArray(vec![0.1, 0.2]))
        .metadata("a.types", Value::IntArray(vec![1, -1]))
        .metadata("a.flags", Value::BoolArray(vec![true, false]))
        .metadata(
            "a.nested",
            Value::NestedArray(vec![Value::UintArray(vec![1]), Value::UintArray(vec![2, 3])]),
        )
        .tensor_f32("norm", &[3], &[1.0, 2.0, 3.0])
        .tensor_q8_0("weight", &[2, 32], &[0.25; 64])
        .tensor("odd", &[1], GgmlType::I8, &[9])
}

/// Reads all that a file has; errors are fine, panics are not.
fn read_everything(bytes: &[u8]) -> Result<usize, ModelError> {
    let file = GgufFile::from_bytes(bytes.to_vec(), Path::new("bad.gguf"))?;
    let mut elements = 0;
    for tensor in file.tensors() {
        assert_eq!(file.tensor_bytes(&tensor.name)?.len() as u64, tensor.num_bytes);
        match file.read_f32(&tensor.name) {
            Ok(values) => {
                assert_eq!(values.len(), tensor.num_elements());
                elements += values.len();
            }
            Err(error) => assert!(!tensor.ty.is_readable(), "{error}"),
        }
    }
    Ok(elements)
}

#[test]
fn the_sample_reads_back() {
    for version in [2, 3] {
        let file =
            GgufFile::from_bytes(sample().version(version).build(), Path::new("x.gguf")).unwrap();
        assert_eq!(file.version(), version);
        let metadata = file.metadata();
        assert_eq!(metadata.str("general.architecture").unwrap(), Some("llama"));
        assert_eq!(metadata.get("a.u64"), Some(&Value::Uint(HUGE)));
        assert_eq!(metadata.get("a.i32"), Some(&Value::Int(-7)));
        assert_eq!(metadata.get("a.bool"), Some(&Value::Bool(true)));
        let tokens = metadata.strings("a.tokens").unwrap().unwrap();
        assert_eq!(tokens.iter().collect::<Vec<_>>(), ["a", "", "ß"]);
        assert_eq!(metadata.get("a.scores"), Some(&Value::FloatArray(vec![0.1, 0.2])));
        assert_eq!(
            metadata.get("a.nested"),
            Some(&Value::NestedArray(vec![
                Value::UintArray(vec![1]),
                Value::UintArray(vec![2, 3])
            ]))
        );
        let names: Vec<&str> = file.tensors().iter().map(|t| t.name.as_str()).collect();
        assert_eq!(names, ["norm", "weight", "odd"]);
        assert_eq!(file.shape("weight"), Some(vec![2, 32]));
        assert_eq!(file.shape("absent"), None);
        assert_eq!(file.read_f32("norm").unwrap(), [1.0, 2.0, 3.0]);
        let weight = file.read_f32("weight").unwrap();
        assert!(weight.iter().all(|v| (v - 0.25).abs() < 1e-3), "{weight:?}");
        assert_eq!(file.tensor_bytes("odd").unwrap(), [9]);
        assert!(matches!(file.read_f32("absent"), Err(ModelError::MissingTensor { .. })));
        let error = file.read_f32("odd").unwrap_err();
        assert_eq!(error.to_string(), "tensor 'odd' has type I8, which this build cannot read");
        let error = file.read_shaped("weight", &[32, 2]).unwrap_err();
        assert!(matches!(error, ModelError::TensorShape { .. }), "{error}");
    }
}

#[test]
fn metadata_of_every_type_written_by_the_reference() {
    let bytes = include_bytes!("../dequant/fixtures/all_types.gguf");
    let header = parse_bytes(bytes).unwrap();
    let metadata = header.metadata();
    let uint = |v: u64| (Value::Uint(v), Value::UintArray(vec![v, 1]));
    let int = |v: i64| (Value::Int(v), Value::IntArray(vec![v, 1]));
    let float = |v: f64| (Value::Float(v), Value::FloatArray(vec![v, 1.0]));
    for (name, (scalar, array)) in [
        ("uint8", uint(255)),
        ("int8", int(-128)),
        ("uint16", uint(65_535)),
        ("int16", int(-32_768)),
        ("uint32", uint(u64::from(u32::MAX))),
        ("int32", int(i64::from(i32::MIN))),
        ("uint64", uint(u64::MAX)),
        ("int64", int(i64::MIN)),
        ("float32", float(0.5)),
        ("float64", float(0.1)),
        ("bool", (Value::Bool(true), Value::BoolArray(vec![true, false]))),
        (
            "string",
            (
                Value::String("größe ≤ 1".into()),
                Value::StringArray(["", "a", "▁the"].iter().collect()),
            ),
        ),
    ] {
        assert_eq!(metadata.get(&format!("test.{name}")), Some(&scalar));
        assert_eq!(metadata.get(&format!("test.{name}_array")), Some(&array));
    }
    assert_eq!(header.tensor("Q4_K").unwrap().shape, [2, 256]);
}

#[test]
fn truncated_anywhere() {
    let bytes = sample().build();
    for len in 0..bytes.len() {
        let error = read_everything(&bytes[..len]).unwrap_err();
        match len {
            0..4 => assert!(matches!(error, ModelError::NotAModel { .. }), "{len}: {error}"),
            _ => assert!(matches!(error, ModelError::Damaged { .. }), "{len}: {error}"),
        }
    }
    assert_eq!(read_everything(&bytes).unwrap(), 3 + 64);
}

#[test]
fn wrong_magic_names_the_bytes_found() {
    let mut bytes = sample().build();
    bytes[..4].copy_from_slice(b"\x7fELF");
    let error = parse_bytes(&bytes).unwrap_err();
    assert!(matches!(error, ModelError::NotAModel { .. }));
    assert_contains(&error.to_string(), &["bad.gguf", "\\x7fELF"]);
    let error = parse_bytes(b"").unwrap_err();
    assert_eq!(error.to_string(), "bad.gguf is not a model: the file is empty");
}

#[test]
fn other_versions_and_byte_order() {
    for version in [0, 1, 4, u32::MAX] {
        let error = parse_bytes(&sample().version(version).build()).unwrap_err();
        assert!(matches!(error, ModelError::Unsupported { .. }));
        assert_contains(&error.to_string(), &["bad.gguf", &format!("version {version} ")]);
    }
    let error = parse_bytes(&sample().version(3u32.swap_bytes()).build()).unwrap_err();
    assert_contains(&error.to_string(), &["bad.gguf", "big-endian"]);
}

#[test]
fn huge_counts() {
    for count in [HUGE, u64::MAX, 1000] {
        let message = damaged(&sample().tensor_count(count));
        assert_contains(&message, &["number of tensors", &count.to_string()]);
        let message = damaged(&sample().key_value_count(count));
        assert_contains(&message, &["number of metadata keys", &count.to_string()]);
    }
}

#[test]
fn huge_lengths_in_metadata() {
    let huge = HUGE.to_le_bytes();
    let base = GgufBuilder::new();
    let message = damaged(&base.clone().raw_metadata(b"k.name", t::STRING, &huge));
    assert_contains(&message, &["k.name", &HUGE.to_string()]);

    for element in [t::U8, t::I16, t::F32, t::F64, t::BOOL, t::STRING, t::ARRAY] {
        let mut array = element.to_le_bytes().to_vec();
        array.extend(huge);
        let message = damaged(&base.clone().raw_metadata(b"k.list", t::ARRAY, &array));
        assert_contains(&message, &["k.list", &HUGE.to_string()]);
        array[4..].copy_from_slice(&u64::MAX.to_le_bytes());
        damaged(&base.clone().raw_metadata(b"k.list", t::ARRAY, &array));
    }
    // The length of a key itself: after magic, version and two counts.
    let mut bytes = base.uint("key", 1).build();
    bytes[24..32].copy_from_slice(&huge);
    let error = parse_bytes(&bytes).unwrap_err();
    assert!(matches!(&error, ModelError::Damaged { offset: 24, .. }), "{error}");
    assert_contains(&error.to_string(), &["metadata key 0", &HUGE.to_string()]);
}

#[test]
fn shapes_that_cannot_be() {
    let tensor = |dimensions: &[u64]| {
        damaged(&GgufBuilder::new().raw_tensor(b"w", dimensions, 0, None, &[0; 64]))
    };
    assert_contains(&tensor(&[HUGE]), &["'w'"]);
    assert_contains(&tensor(&[HUGE, HUGE]), &["'w'", &HUGE.to_string()]);
    assert_contains(&tensor(&[u64::MAX, 2]), &["'w'"]);
    assert_contains(&tensor(&[1 << 62]), &["'w'"]);
    assert_contains(&tensor(&[4, 0]), &["'w'", "dimension of 0"]);
    assert_contains(&tensor(&[0, HUGE]), &["'w'", "dimension of 0"]);
    assert_contains(&tensor(&[]), &["'w'", "0 dimensions"]);
    assert_contains(&tensor(&[1, 1, 1, 1, 1]), &["'w'", "5 dimensions"]);
    let message = damaged(&GgufBuilder::new().raw_tensor(b"w", &[33], 8, None, &[0; 68]));
    assert_contains(&message, &["'w'", "rows of 33", "Q8_0", "32"]);
}

#[test]
fn tensor_types() {
    let unknown = GgufBuilder::new().raw_tensor(b"w", &[32], 4, None, &[0; 64]);
    let error = parse_bytes(&unknown.build()).unwrap_err();
    assert_eq!(error.to_string(), "tensor 'w' has type number 4, which this build cannot read");
    // A known type that cannot be dequantised: the file opens, and only reading it fails.
    let listed = GgufBuilder::new().tensor("w", &[256], GgmlType::IQ2_S, &[0; 82]);
    assert_eq!(read_everything(&listed.build()).unwrap(), 0);
}

#[test]
fn data_outside_the_file() {
    let at = |offset: u64| {
        GgufBuilder::new().raw_tensor(b"before", &[1], 0, None, &[0; 4]).raw_tensor(
            b"w",
            &[8],
            0,
            Some(offset),
            &[0; 32],
        )
    };
    assert_eq!(read_everything(&at(32).build()).unwrap(), 9);
    for offset in [64, 1 << 20, HUGE, u64::MAX - 31] {
        let message = damaged(&at(offset));
        assert_contains(&message, &["'w'", "past the end", &offset.to_string()]);
    }
    assert_contains(&damaged(&at(33)), &["'w'", "33", "alignment 32"]);
    assert_contains(&damaged(&at(0)), &["'before' and 'w'", "overlap"]);
}

#[test]
fn alignment() {
    let file = sample().alignment(128).build();
    let header = parse_bytes(&file).unwrap();
    assert!(header.tensors().iter().all(|tensor| tensor.offset.is_multiple_of(128)));
    assert_eq!(read_everything(&file).unwrap(), 67);
    for bad in [Value::Uint(0), Value::Uint(24), Value::Int(32), Value::String("32".into())] {
        let message = damaged(&sample().metadata("general.alignment", bad));
        assert_contains(&message, &["general.alignment", "power of two"]);
    }
    damaged(&sample().metadata("general.alignment", Value::Uint(1 << 63)));
}

#[test]
fn text_that_is_not_utf8() {
    let base = GgufBuilder::new();
    let message = damaged(&base.clone().raw_metadata(b"bad\xffkey", t::U8, &[1]));
    assert_contains(&message, &["metadata key 0", "bad\u{fffd}key", "UTF-8"]);
    let value = [&2u64.to_le_bytes()[..], b"\xc3\x28"].concat();
    let message = damaged(&base.clone().raw_metadata(b"general.name", t::STRING, &value));
    assert_contains(&message, &["general.name", "UTF-8", "after 0 bytes"]);
    let list =
        [&t::STRING.to_le_bytes()[..], &2u64.to_le_bytes(), &0u64.to_le_bytes(), &value].concat();
    let message = damaged(&base.clone().raw_metadata(b"tokens", t::ARRAY, &list));
    assert_contains(&message, &["string 1 of 'tokens'", "UTF-8"]);
    let message = damaged(&base.raw_tensor(b"\xfe", &[1], 0, None, &[0; 4]));
    assert_contains(&message, &["name of tensor 0", "UTF-8"]);
}

#[test]
fn names_that_appear_twice() {
    let message = damaged(&GgufBuilder::new().uint("k", 1).uint("k", 2));
    assert_contains(&message, &["'k' appears twice"]);
    let twice = GgufBuilder::new().tensor_f32("w", &[1], &[0.0]).tensor_f32("w", &[1], &[0.0]);
    assert_contains(&damaged(&twice), &["'w' appears twice"]);
}

#[test]
fn values_that_cannot_be() {
    let base = GgufBuilder::new();
    let message = damaged(&base.clone().raw_metadata(b"flag", t::BOOL, &[2]));
    assert_contains(&message, &["flag", "neither 0 nor 1"]);
    let message = damaged(&base.clone().raw_metadata(b"k", 13, &[0; 8]));
    assert_contains(&message, &["'k'", "value type 13"]);
    let array = [&99u32.to_le_bytes()[..], &0u64.to_le_bytes()].concat();
    let message = damaged(&base.clone().raw_metadata(b"k", t::ARRAY, &array));
    assert_contains(&message, &["'k'", "value type 99"]);
    // 100,000 levels written by hand: a recursive reader without a limit would overflow the stack.
    let level = [&t::ARRAY.to_le_bytes()[..], &1u64.to_le_bytes()].concat();
    let message = damaged(&base.raw_metadata(b"deep", t::ARRAY, &level.repeat(100_000)));
    assert_contains(&message, &["'deep'", "deeper"]);
}

#[test]
fn control_characters_and_long_names_stay_on_one_line() {
    let name = format!("line\nbreak{}", "x".repeat(5000));
    let message = damaged(&GgufBuilder::new().raw_tensor(name.as_bytes(), &[0], 0, None, &[]));
    assert_contains(&message, &["line\\nbreak"]);
    let key = vec![b'k'; 70_000];
    assert_contains(&damaged(&GgufBuilder::new().raw_metadata(&key, t::U8, &[1])), &["65535"]);
}

proptest! {
    #[test]
    fn mutated_files_never_panic(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in any::<Option<prop::sample::Index>>(),
    ) {
        let mut bytes = sample().build();
        for (index, value) in edits {
            let index = index.index(bytes.len());
            bytes[index] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len() + 1));
        }
        let _ = read_everything(&bytes);
    }

    #[test]
    fn mutated_headers_never_panic(
        word in prop::sample::select(vec![0, 1, 4, 31, 33, 1 << 31, 1 << 32, HUGE, u64::MAX]),
        at in any::<prop::sample::Index>(),
    ) {
        let mut bytes = sample().build();
        let at = at.index(bytes.len() - 8);
        bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
        let _ = read_everything(&bytes);
    }

    #[test]
    fn random_bytes_never_panic(rest in prop::collection::vec(any::<u8>(), 0..256)) {
        let _ = read_everything(&rest);
        let _ = read_everything(&[b"GGUF\x03\0\0\0", &rest[..]].concat());
    }
}
