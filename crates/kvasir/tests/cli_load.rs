//! How a model comes into memory: `--no-mmap`, `--mlock`, `--quantize`, and what `inspect` foretells of it.
#![allow(missing_docs, clippy::unwrap_used)]

mod tiny;

use tiny::{json, run, stderr, tiny};

#[test]
fn text_is_the_same_however_the_file_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny(folder.path());
    let text = |options: &[&str]| {
        let common = [
            "run",
            "a b c",
            "--model",
            &model,
            "--max-tokens",
            "12",
            "--temperature",
            "0",
            "--json",
        ];
        let output = run(&[&common[..], options].concat());
        assert!(output.status.success(), "{options:?}: {}", stderr(&output));
        (json(&output)["text"].clone(), stderr(&output))
    };
    let (expected, _) = text(&[]);
    for options in [&["--no-mmap"][..], &["--mlock"], &["--no-mmap", "--mlock"]] {
        let (found, said) = text(options);
        assert_eq!(found, expected, "{options:?}");
        // A system that refuses to lock so much is told of, and no reason to stop.
        assert!(said.is_empty() || said.contains("--mlock: "), "{options:?}: {said}");
    }
    // Other weights, and so perhaps other text.
    assert!(text(&["--quantize", "q8_0"]).0.is_string());
}

#[test]
fn only_known_types_are_quantised_to() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny(folder.path());
    let output = run(&["run", "a", "--model", &model, "--quantize", "q3"]);
    assert_eq!(output.status.code(), Some(2));
    let said = stderr(&output);
    assert!(said.contains("q8_0, q4_1") && said.contains("q3"), "{said}");
}

#[test]
fn inspect_says_what_serving_takes() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny(folder.path());
    let inspect = |options: &[&str]| {
        let output = run(&[&["inspect", &model, "--json", "--tensors"], options].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        json(&output)
    };
    let bf16 = inspect(&["--kv-cache-memory", "1MiB"]);
    let memory = &bf16["memory"];
    assert_eq!(memory["kv_cache_bytes"], 1 << 20);
    let part = |name: &str| memory[name].as_u64().unwrap();
    let parts = ["weight_bytes", "tokenizer_bytes", "kv_cache_bytes", "program_bytes"].map(part);
    assert_eq!(parts.iter().sum::<u64>(), part("total_bytes"));
    // 288 rows of 32 inputs, in whole tiles.
    let embedding = &bf16["tensors"][0];
    assert_eq!(
        (&embedding["held"], &embedding["resident_bytes"]),
        (&"bf16".into(), &(288 * 64).into())
    );
    let f32 = inspect(&["--dtype", "float32"]);
    assert_eq!(f32["tensors"][0]["resident_bytes"], 288 * 128);
    let codes = inspect(&["--quantize", "q8_0"]);
    assert_eq!(
        (&codes["tensors"][0]["held"], &codes["tensors"][0]["resident_bytes"]),
        (&"codes".into(), &(288 * 34).into())
    );

    let plain = String::from_utf8(run(&["inspect", &model]).stdout).unwrap();
    assert!(
        plain.contains("to serve it: weights ") && plain.contains("KV cache 256.0 MiB"),
        "{plain}"
    );
}
