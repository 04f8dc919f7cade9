//! How a prompt is cut and cached changes no bit of the real model's logits; in f32, blocks of another size
//! change none beyond 1e-4.

use kvasir_cache::{BatchSlice, Recipe};
use kvasir_model::{CacheOptions, Dtype, ForwardBatch, LoadOptions, Model, Runner, Threads};

use crate::models;

/// Logits of the last of `tokens`, computed in chunks of `chunk`; with a prefix hit if asked.
fn logits(
    model: &Model,
    recipe: Recipe,
    block_size: usize,
    chunk: usize,
    tokens: &[u32],
    hit: bool,
) -> Vec<f32> {
    let mut runner = Runner::new(Threads::new(0).unwrap());
    let options = CacheOptions { block_size, prefix_caching: hit, ..CacheOptions::of(recipe) };
    let mut cache = model.new_cache(options).unwrap();
    let mut out = Vec::new();
    for _ in 0..=usize::from(hit) {
        let id = cache.add_sequence(None).unwrap();
        let mut start = cache.match_prefix(id, tokens).unwrap();
        while start < tokens.len() {
            let len = chunk.min(tokens.len() - start);
            let tokens = &tokens[start..start + len];
            cache.reserve(id, len).unwrap();
            let slices = [BatchSlice { sequence: id, row: 0, start, len }];
            let batch = ForwardBatch { tokens, slices: &slices };
            model.forward(batch, &mut cache, &mut runner).unwrap();
            cache.commit(id, tokens).unwrap();
            model.logits(&[len - 1], &mut runner, &mut out);
            start += len;
        }
        cache.remove_sequence(id).unwrap();
        cache.check_integrity().unwrap();
    }
    out
}

#[test]
fn blocks_chunks_and_prefix_hits() {
    let packed = models::smollm2();
    // A difference in the last bits becomes one of .1 where inputs are rounded to bf16: blocks of another
    // size are compared in f32.
    let options = LoadOptions { dtype: Dtype::Float32, ..LoadOptions::default() };
    let exact = Model::load(&models::path("smollm2"), &options).unwrap();
    let tokens =
        packed.tokenizer().encode(&include_str!("../../../../LICENSE")[..1200], true).unwrap();
    assert!(tokens.len() > 200);
    // One chunk, one block size: what `golden` ties to an independent dense implementation.
    let dense = logits(&exact, Recipe::F32, 64, tokens.len(), &tokens, false);
    let mut worst = 0.0f32;
    for (block_size, chunk, hit) in
        [(16, 1000, false), (32, 50, false), (64, 7, false), (32, 90, true)]
    {
        let got = logits(&exact, Recipe::F32, block_size, chunk, &tokens, hit);
        let error = got.iter().zip(&dense).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        worst = worst.max(error);
        assert!(error < 1e-4, "blocks of {block_size}, chunks of {chunk}, hit {hit}: {error}");
    }
    eprintln!("worst difference {worst:e}");
    // In f16 the block size decides how keys are rounded; cutting and hits change no bit.
    for model in [&exact, &*packed] {
        let whole = logits(model, Recipe::F16, 32, 1000, &tokens, false);
        assert_eq!(logits(model, Recipe::F16, 32, 33, &tokens, false), whole);
        assert_eq!(logits(model, Recipe::F16, 32, 64, &tokens, true), whole);
    }
}
