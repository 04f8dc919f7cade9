//! Every type that tensors are stored in: a small random model in it against the same model in f32, however the file comes into
//! memory. (That dequantisation is the reference implementation's, `src/dequant/tests.rs` checks.)
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::Path;

use kvasir_cache::{BatchSlice, Recipe};
use kvasir_model::dequant::dequantize;
use kvasir_model::gguf::testkit::GgufBuilder;
use kvasir_model::gguf::{GgmlType, GgufFile, Value};
use kvasir_model::{
    Access, CacheOptions, Dtype, Footprint, ForwardBatch, LoadOptions, Model, ModelError, Quantize,
    Runner, Threads,
};

/// Wide enough for a superblock; rows in whole tiles.
const HIDDEN: usize = 256;
const FFN: usize = 512;
const VOCAB: usize = 288;

/// Where blocks have numbers in f16, and what they are to be there, so that weights are about a tenth.
const TYPES: [(GgmlType, &[(usize, f32)]); 16] = [
    (GgmlType::F32, &[]),
    (GgmlType::F16, &[]),
    (GgmlType::BF16, &[]),
    (GgmlType::Q4_0, &[(0, 0.012)]),
    (GgmlType::Q4_1, &[(0, 0.012), (2, -0.1)]),
    (GgmlType::Q5_0, &[(0, 0.006)]),
    (GgmlType::Q5_1, &[(0, 0.006), (2, -0.1)]),
    (GgmlType::Q8_0, &[(0, 0.0008)]),
    (GgmlType::Q2_K, &[(80, 0.002), (82, 0.004)]),
    (GgmlType::Q3_K, &[(108, 0.0008)]),
    (GgmlType::Q4_K, &[(0, 1e-4), (2, 8e-4)]),
    (GgmlType::Q5_K, &[(0, 5e-5), (2, 8e-4)]),
    (GgmlType::Q6_K, &[(208, 2.5e-5)]),
    (GgmlType::IQ4_NL, &[(0, 0.0008)]),
    (GgmlType::IQ4_XS, &[(0, 2.5e-5)]),
    (GgmlType::MXFP4, &[]),
];

/// Random blocks of a type.
fn blocks(ty: GgmlType, elements: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        (state >> 33) as u32
    };
    let mut unit = || random() as f32 / (1u64 << 30) as f32 - 1.0;
    match ty {
        GgmlType::F32 => return (0..elements).flat_map(|_| (unit() * 0.1).to_le_bytes()).collect(),
        GgmlType::F16 => {
            let number = |_| half::f16::from_f32(unit() * 0.1).to_le_bytes();
            return (0..elements).flat_map(number).collect();
        }
        GgmlType::BF16 => {
            let number = |_| half::bf16::from_f32(unit() * 0.1).to_le_bytes();
            return (0..elements).flat_map(number).collect();
        }
        _ => {}
    }
    let mut bytes: Vec<u8> =
        (0..elements / ty.block_elements() * ty.block_bytes()).map(|_| random() as u8).collect();
    let (_, numbers) = TYPES.iter().find(|(known, _)| *known == ty).unwrap();
    for block in bytes.chunks_exact_mut(ty.block_bytes()) {
        for (at, number) in *numbers {
            block[*at..at + 2].copy_from_slice(&half::f16::from_f32(*number).to_le_bytes());
        }
        if ty == GgmlType::MXFP4 {
            block[0] = 121 - block[0] % 3;
        }
    }
    bytes
}

/// A Llama of two layers whose matrices are random blocks of a type, or what these dequantise to.
fn model(ty: GgmlType, dequantised: bool, tied: bool) -> Vec<u8> {
    let tokens: Vec<String> =
        (0..VOCAB).map(|i| char::from_u32(0x100 + i as u32).map(String::from).unwrap()).collect();
    let strings = |strings: &[String]| Value::StringArray(strings.iter().collect());
    let mut file = GgufBuilder::new()
        .string("general.architecture", "llama")
        .uint("llama.block_count", 2)
        .uint("llama.context_length", 512)
        .uint("llama.embedding_length", HIDDEN as u64)
        .uint("llama.feed_forward_length", FFN as u64)
        .uint("llama.attention.head_count", 4)
        .uint("llama.attention.head_count_kv", 2)
        .float("llama.attention.layer_norm_rms_epsilon", 1e-5)
        .float("llama.rope.freq_base", 10_000.0)
        .string("tokenizer.ggml.model", "gpt2")
        .string("tokenizer.ggml.pre", "gpt-2")
        .metadata("tokenizer.ggml.tokens", strings(&tokens))
        .metadata("tokenizer.ggml.merges", strings(&[]))
        .uint("tokenizer.ggml.eos_token_id", 7)
        .tensor_f32("output_norm.weight", &[HIDDEN], &[1.0; HIDDEN]);
    let mut matrices = vec![("token_embd.weight".to_owned(), [VOCAB, HIDDEN])];
    if !tied {
        matrices.push(("output.weight".to_owned(), [VOCAB, HIDDEN]));
    }
    for layer in 0..2 {
        for norm in ["attn_norm", "ffn_norm"] {
            let name = format!("blk.{layer}.{norm}.weight");
            file = file.tensor_f32(&name, &[HIDDEN], &[1.0; HIDDEN]);
        }
        let shapes = [
            ("attn_q", [HIDDEN, HIDDEN]),
            ("attn_k", [HIDDEN / 2, HIDDEN]),
            ("attn_v", [HIDDEN / 2, HIDDEN]),
            ("attn_output", [HIDDEN, HIDDEN]),
            ("ffn_gate", [FFN, HIDDEN]),
            ("ffn_up", [FFN, HIDDEN]),
            ("ffn_down", [HIDDEN, FFN]),
        ];
        let name = |name: &str| format!("blk.{layer}.{name}.weight");
        matrices.extend(shapes.map(|(matrix, shape)| (name(matrix), shape)));
    }
    for (seed, (name, shape)) in (1..).zip(matrices) {
        let bytes = blocks(ty, shape[0] * shape[1], seed);
        file = match dequantised {
            true => file.tensor_f32(&name, &shape, &dequantize(&name, ty, &bytes).unwrap()),
            false => file.tensor(&name, &shape, ty, &bytes),
        };
    }
    file.build()
}

fn logits(model: &Model) -> Vec<f32> {
    let tokens: Vec<u32> = (0..40).map(|i| i * 37 % VOCAB as u32).collect();
    let mut runner = Runner::new(Threads::new(1).unwrap());
    let mut cache = model.new_cache(CacheOptions::of(Recipe::F32)).unwrap();
    let id = cache.add_sequence(None).unwrap();
    cache.reserve(id, tokens.len()).unwrap();
    let slices = [BatchSlice { sequence: id, row: 0, start: 0, len: tokens.len() }];
    let batch = ForwardBatch { tokens: &tokens, slices: &slices };
    model.forward(batch, &mut cache, &mut runner).unwrap();
    cache.commit(id, &tokens).unwrap();
    let mut out = Vec::new();
    model.logits(&[0, 17, 39], &mut runner, &mut out);
    out
}

fn load(bytes: Vec<u8>, dtype: Dtype) -> Model {
    let file = GgufFile::from_bytes(bytes, Path::new("types.gguf")).unwrap();
    let options = LoadOptions { threads: 2, dtype, ..LoadOptions::default() };
    Model::from_gguf(&file, &options).unwrap()
}

/// Largest difference, as a share of the largest logit.
fn difference(found: &[f32], expected: &[f32]) -> f32 {
    let largest = expected.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    assert!(largest > 0.1 && largest.is_finite(), "logits up to {largest}");
    let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
    // `max` of floats would drop a NaN.
    worst.fold(0.0, |worst, x| if x <= worst { worst } else { x }) / largest
}

#[test]
fn logits_are_those_of_the_dequantised_weights() {
    for (ty, _) in TYPES {
        let expected = logits(&load(model(ty, true, false), Dtype::Float32));
        let found = difference(&logits(&load(model(ty, false, false), Dtype::Float32)), &expected);
        assert!(found < 1e-4, "{ty}: {found}");
        // With rounded inputs, in models whose random weights know no rounding.
        let rounded = [Dtype::Bfloat16, Dtype::Auto]
            .map(|dtype| difference(&logits(&load(model(ty, false, false), dtype)), &expected));
        eprintln!("{ty}: float32 {found:.1e}, bfloat16 {:.4}, auto {:.4}", rounded[0], rounded[1]);
        assert!(rounded[0] < 0.03 && rounded[1] < 0.1, "{ty}: {rounded:?}");
    }
}

#[test]
fn it_does_not_matter_how_a_file_comes_into_memory() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    for (ty, _) in TYPES {
        for tied in [false, true] {
            let bytes = model(ty, false, tied);
            std::fs::write(&path, &bytes).unwrap();
            // A table that is looked up in the file is not rounded, which one of f32 in memory is, and with AMX one of f16.
            let rounded = matches!(ty, GgmlType::F32 | GgmlType::F16);
            let dtype = if rounded { Dtype::Float32 } else { Dtype::Auto };
            let owned = load(bytes.clone(), dtype);
            let expected = logits(&owned);
            let mut sizes = Vec::new();
            for (access, resident) in
                [(Access::Mapped, false), (Access::Mapped, true), (Access::Read, false)]
            {
                let options =
                    LoadOptions { threads: 2, access, resident, dtype, ..LoadOptions::default() };
                let model = Model::load(&path, &options).unwrap();
                assert!(logits(&model) == expected, "{ty}, {access:?}");
                let file = GgufFile::open_as(&path, access).unwrap();
                let footprint = Footprint::of(&file, &options).unwrap();
                let matrices = footprint.tensors.iter().filter(|t| !t.name.contains("norm"));
                assert_eq!(matrices.map(|t| t.bytes).sum::<usize>(), model.weight_bytes(), "{ty}");
                sizes.push(model.weight_bytes());
            }
            // An embedding table that is only looked up stays in the mapped file.
            assert_eq!(sizes[0] < sizes[1], !tied, "{ty}: {sizes:?}");
            assert_eq!(sizes[1..], [owned.weight_bytes(); 2], "{ty}");
            let bound = bytes.len() as f64 * 1.06;
            assert!((sizes[1] as f64) < bound, "{ty}: {} of {}", sizes[1], bytes.len());
        }
    }
}

#[test]
fn floats_are_quantised_as_they_are_read() {
    for ty in [GgmlType::F32, GgmlType::F16, GgmlType::BF16] {
        let bytes = model(ty, false, true);
        let file = GgufFile::from_bytes(bytes, Path::new("types.gguf")).unwrap();
        let of = |quantize| {
            let options = LoadOptions {
                threads: 2,
                quantize,
                dtype: Dtype::Float32,
                ..LoadOptions::default()
            };
            let model = Model::from_gguf(&file, &options).unwrap();
            (model.weight_bytes(), logits(&model))
        };
        let (_, expected) = of(None);
        let (q8_0, q4_1) = (of(Some(Quantize::Q8_0)), of(Some(Quantize::Q4_1)));
        let errors = [&q8_0, &q4_1].map(|(_, found)| difference(found, &expected));
        eprintln!("{ty}: q8_0 {:.4}, q4_1 {:.4}", errors[0], errors[1]);
        assert!(errors[0] < 0.02 && errors[1] < 0.3, "{ty}: {errors:?}");
        assert!(errors[0] * 4.0 < errors[1] && q4_1.0 < q8_0.0, "{ty}: {errors:?}");
    }
}

/// The same file with another tensor of that name.
fn with_tensor(
    file: Vec<u8>,
    name: &str,
    (shape, ty): (&[usize], GgmlType),
    bytes: &[u8],
) -> Vec<u8> {
    let file = GgufFile::from_bytes(file, Path::new("types.gguf")).unwrap();
    let mut changed = GgufBuilder::new();
    for (key, value) in file.metadata().iter() {
        changed = changed.metadata(key, value.clone());
    }
    for tensor in file.tensors() {
        let own = file.tensor_bytes(&tensor.name).unwrap();
        changed = match tensor.name == name {
            true => changed.tensor(name, shape, ty, bytes),
            false => changed.tensor(&tensor.name, &tensor.shape, tensor.ty, own),
        };
    }
    changed.build()
}

#[test]
fn types_that_cannot_be_read_are_named() {
    let name = "blk.1.ffn_down.weight";
    let bytes = vec![0; HIDDEN * FFN / 256 * GgmlType::IQ1_S.block_bytes()];
    let file = model(GgmlType::Q4_K, false, true);
    let file = with_tensor(file, name, (&[HIDDEN, FFN], GgmlType::IQ1_S), &bytes);
    let file = GgufFile::from_bytes(file, Path::new("types.gguf")).unwrap();
    let options = LoadOptions { threads: 1, ..LoadOptions::default() };
    let errors = [
        Model::from_gguf(&file, &options).unwrap_err().to_string(),
        Footprint::of(&file, &options).unwrap_err().to_string(),
    ];
    assert!(errors.iter().all(|e| e.contains(name) && e.contains("IQ1_S")), "{errors:?}");
}

#[test]
fn a_scale_of_mxfp4_that_f16_has_not_is_kept() {
    let mut bytes = blocks(GgmlType::MXFP4, VOCAB * HIDDEN, 3);
    // 2^-78: far below what f16 has.
    bytes.iter_mut().step_by(17).for_each(|exponent| *exponent = 50);
    let with = |ty, bytes: &[u8]| {
        let file = model(GgmlType::MXFP4, false, true);
        load(with_tensor(file, "token_embd.weight", (&[VOCAB, HIDDEN], ty), bytes), Dtype::Float32)
    };
    let plain = dequantize("x", GgmlType::MXFP4, &bytes).unwrap();
    let plain: Vec<u8> = plain.iter().flat_map(|x| x.to_le_bytes()).collect();
    // Logits are tiny; norms make hidden states what they are otherwise.
    let [found, expected] =
        [with(GgmlType::MXFP4, &bytes), with(GgmlType::F32, &plain)].map(|model| logits(&model));
    assert!(expected.iter().any(|x| *x != 0.0) && found == expected);
}

/// Damage anywhere in a file of any type is an error or another model, never a panic.
#[test]
fn damaged_files_are_errors() {
    for (ty, _) in TYPES {
        let bytes = model(ty, false, true);
        let open = |bytes: Vec<u8>| {
            let file = GgufFile::from_bytes(bytes, Path::new("types.gguf"))?;
            let options = LoadOptions { threads: 1, ..LoadOptions::default() };
            Model::from_gguf(&file, &options)
        };
        for cut in [1, 17, bytes.len() / 2] {
            let error = open(bytes[..bytes.len() - cut].to_vec()).unwrap_err();
            assert!(matches!(error, ModelError::Damaged { .. }), "{ty}, {cut} bytes less: {error}");
        }
        // In the tensors' descriptions, where types, shapes and offsets are.
        let at = bytes.windows(10).position(|w| w == b"ffn_down.w").unwrap();
        for at in (at..at + 80).step_by(3) {
            for with in [0, 1, 9, 0xff] {
                let mut damaged = bytes.clone();
                damaged[at] = with;
                let _ = open(damaged);
            }
        }
    }
}
