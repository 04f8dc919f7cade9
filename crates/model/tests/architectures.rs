//! Every architecture against transformers: tiny random models whose logits
//! `scripts/make_arch_goldens.py` computed, read from a safetensors folder and from GGUF.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::{Path, PathBuf};

use kvasir_cache::{BatchSlice, Recipe};
use kvasir_model::{CacheOptions, Dtype, ForwardBatch, LoadOptions, Model, Runner, Threads};
use safetensors::SafeTensors;
use serde::Deserialize;

/// Largest error of a logit in f32. Both sides compute in f32, in another order: 2e-5 was measured.
const LIMIT: f32 = 1e-4;
/// The same with weights and inputs rounded to bf16, as a share of the largest logit, in
/// models whose random weights know no rounding: .031 was measured.
const BF16_LIMIT: f32 = 0.06;
const BLOCK_SIZES: [usize; 2] = [16, 32];
/// Random ways to cut the sequence, for each model and block size.
const RANDOM_CUTS: u64 = 4;

#[derive(Deserialize)]
struct Expected {
    tokens: Vec<u32>,
    /// Positions whose logits are listed.
    positions: Vec<usize>,
    logits: Vec<Vec<f32>>,
}

fn folder(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/arch").join(case)
}

/// Logits after each of `tokens`, run in chunks of these lengths.
fn logits(model: &Model, block_size: usize, tokens: &[u32], chunks: &[usize]) -> Vec<Vec<f32>> {
    logits_of(model, block_size, tokens, chunks, 1)
}

/// The same after every `every`-th token of a chunk; the others have none.
fn logits_of(
    model: &Model,
    block_size: usize,
    tokens: &[u32],
    chunks: &[usize],
    every: usize,
) -> Vec<Vec<f32>> {
    let mut runner = Runner::new(Threads::new(1).unwrap());
    let options = CacheOptions { block_size, ..CacheOptions::of(Recipe::F32) };
    let mut cache = model.new_cache(options).unwrap();
    let id = cache.add_sequence(None).unwrap();
    let (mut all, mut start) = (Vec::new(), 0);
    for len in chunks {
        let chunk = &tokens[start..start + len];
        cache.reserve(id, *len).unwrap();
        let slices = [BatchSlice { sequence: id, row: 0, start, len: *len }];
        let batch = ForwardBatch { tokens: chunk, slices: &slices };
        let wanted: Vec<usize> = (0..*len).skip(every - 1).step_by(every).collect();
        if every == 1 {
            model.forward(batch, &mut cache, &mut runner).unwrap();
        } else {
            model.forward_for(&wanted, batch, &mut cache, &mut runner).unwrap();
        }
        cache.commit(id, chunk).unwrap();
        let mut out = Vec::new();
        model.logits(&wanted, &mut runner, &mut out);
        all.resize(start + len, Vec::new());
        for (row, logits) in wanted.iter().zip(out.chunks_exact(model.spec().vocab_size)) {
            all[start + row] = logits.to_vec();
        }
        start += len;
    }
    cache.check_integrity().unwrap();
    assert_eq!(start, tokens.len(), "chunks cover the sequence");
    all
}

/// Lengths from 1 to 32 that add up to `total`.
fn random_chunks(total: usize, seed: u64) -> Vec<usize> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let (mut chunks, mut left) = (Vec::new(), total);
    while left > 0 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        let len = (1 + (state >> 40) as usize % 32).min(left);
        chunks.push(len);
        left -= len;
    }
    chunks
}

fn largest_error(found: &[Vec<f32>], expected: &[Vec<f32>]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let rows = found.iter().zip(expected).flat_map(|(found, expected)| {
        assert_eq!(found.len(), expected.len(), "logits of a row");
        found.iter().zip(expected).map(|(f, e)| (f - e).abs())
    });
    // `max` of floats would drop a NaN.
    rows.fold(0.0, |worst, error| if error <= worst { worst } else { error })
}

fn check_model(path: &Path, expected: &Expected) -> Vec<Vec<f32>> {
    let load = |dtype| {
        let options = LoadOptions { threads: 1, dtype, ..LoadOptions::default() };
        Model::load(path, &options).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    };
    check_bf16(path, &load(Dtype::Auto), expected);
    let model = load(Dtype::Float32);
    assert_eq!(model.tokenizer().encode("abc", false).unwrap(), [61, 2]);
    let tokens = &expected.tokens;
    let total = tokens.len();
    let mut worst = 0.0f32;
    for block_size in BLOCK_SIZES {
        let mut cuts = vec![("one chunk".to_owned(), vec![total])];
        cuts.push(("token by token".to_owned(), vec![1; total]));
        cuts.extend((0..RANDOM_CUTS).map(|s| (format!("seed {s}"), random_chunks(total, s))));
        for (name, chunks) in cuts {
            let found = logits(&model, block_size, tokens, &chunks);
            let found: Vec<_> = expected.positions.iter().map(|p| found[*p].clone()).collect();
            let error = largest_error(&found, &expected.logits);
            assert!(
                error < LIMIT,
                "{}: blocks of {block_size}, {name}: logits are off by {error}",
                path.display()
            );
            worst = worst.max(error);
        }
    }
    eprintln!("{}: logits ±{worst:.6}", path.display());
    logits(&model, 16, tokens, &[total])
}

/// Packed weights: near enough, and the same to the bit however the sequence is cut.
fn check_bf16(path: &Path, model: &Model, expected: &Expected) {
    let tokens = &expected.tokens;
    let whole = logits(model, 16, tokens, &[tokens.len()]);
    let found: Vec<_> = expected.positions.iter().map(|p| whole[*p].clone()).collect();
    let error = largest_error(&found, &expected.logits);
    let largest = expected.logits.iter().flatten().fold(0.0f32, |a, b| a.max(b.abs()));
    eprintln!("{}: bf16: logits ±{:.5} of {largest}", path.display(), error / largest);
    assert!(error < BF16_LIMIT * largest, "{}: bf16: {error} of {largest}", path.display());
    for seed in 0..RANDOM_CUTS {
        let cut = logits(model, 16, tokens, &random_chunks(tokens.len(), seed));
        assert!(cut == whole, "{}: seed {seed}", path.display());
        // Rows that nobody wants are left out of the last layer, and change nothing.
        for every in [2, 7, 33] {
            let chunks = random_chunks(tokens.len(), seed);
            let some = logits_of(model, 16, tokens, &chunks, every);
            for (row, whole) in some.iter().zip(&whole).filter(|(row, _)| !row.is_empty()) {
                assert!(row == whole, "{}: seed {seed}, every {every}", path.display());
            }
            assert_eq!(some.len(), whole.len());
            let wanted: usize = chunks.iter().map(|len| len / every).sum();
            assert_eq!(some.iter().filter(|row| !row.is_empty()).count(), wanted);
        }
    }
}

/// Checks both files of a case, and that they agree at every position.
fn check(case: &str, gguf: bool) {
    let folder = folder(case);
    let expected = std::fs::read(folder.join("expected.json")).unwrap();
    let expected: Expected = serde_json::from_slice(&expected).unwrap();
    let from_folder = check_model(&folder, &expected);
    let file = folder.join("model.gguf");
    assert_eq!(file.exists(), gguf, "{}", file.display());
    if gguf {
        let error = largest_error(&check_model(&file, &expected), &from_folder);
        assert!(error < LIMIT, "{case}: the GGUF file differs from the folder by {error}");
    }
}

macro_rules! cases {
    ($($name:ident: $gguf:literal),* $(,)?) => {
        $(#[test]
        fn $name() {
            check(stringify!($name), $gguf);
        })*

        #[test]
        fn every_folder_has_a_test() {
            let mut folders: Vec<String> = std::fs::read_dir(folder(""))
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            folders.sort();
            let mut names = [$(stringify!($name)),*];
            names.sort_unstable();
            assert_eq!(folders, names);
        }
    };
}

// Without a GGUF file: what llama.cpp has no key for.
cases! {
    llama3: true,
    llama_linear_biases: true,
    llama_yarn: true,
    mistral_window: true,
    qwen2_yarn: true,
    qwen2_window: false,
    qwen3: true,
    gemma3: true,
    gemma3_pattern: false,
}

/// Multi-modal checkpoints nest the decoder's configuration and tensors.
#[test]
fn the_decoder_of_a_multi_modal_model() {
    let source = folder("gemma3");
    let expected = std::fs::read(source.join("expected.json")).unwrap();
    let expected: Expected = serde_json::from_slice(&expected).unwrap();
    let config = std::fs::read(source.join("config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    let nested = serde_json::json!({"model_type": "gemma3", "text_config": config});
    let weights = std::fs::read(source.join("model.safetensors")).unwrap();
    let weights = SafeTensors::deserialize(&weights).unwrap();
    for prefix in ["model.language_model.", "language_model.model."] {
        let target = tempfile::tempdir().unwrap();
        let renamed = weights.iter().map(|(name, view)| (name.replacen("model.", prefix, 1), view));
        let renamed = safetensors::serialize(renamed, None).unwrap();
        std::fs::write(target.path().join("model.safetensors"), renamed).unwrap();
        std::fs::write(target.path().join("config.json"), nested.to_string()).unwrap();
        std::fs::copy(source.join("tokenizer.json"), target.path().join("tokenizer.json")).unwrap();
        check_model(target.path(), &expected);
    }
}
