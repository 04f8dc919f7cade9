//! Good and bad folders; weight files are written by the `safetensors` crate.

use super::*;

use proptest::prelude::*;
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
    let half: Vec<u8> = values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect();
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
            &format!(r#"{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#),
            &[0; 8],
        )
    };
    let check = |bytes: &[u8], parts: &[&str]| damaged(&[CONFIG, (SINGLE_FILE, bytes)], parts);
    check(&(1u64 << 60).to_le_bytes(), &["header length 1152921504606846976"]);
    check(&entry("F32", "[2]", "[0,1152921504606846976]"), &["\"w\"", "0..1152921504606846976"]);
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

proptest! {
    #[test]
    fn mutated_weight_files_never_panic(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut bytes = weight_file(&[
            ("a", Dtype::F32, &[2], &[0; 8]),
            ("b", Dtype::F16, &[2, 1], &[0; 4]),
        ]);
        for (index, value) in edits {
            let index = index.index(bytes.len());
            bytes[index] = value;
        }
        if let Ok(tensors) = parse_weight_file(&bytes, Path::new("m.safetensors")) {
            for (_, _, range) in tensors {
                prop_assert!(bytes.get(range).is_some());
            }
        }
    }
}
