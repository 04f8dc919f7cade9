//! GGUF metadata.

use super::*;

fn rope_of(changes: &[(&str, Option<Value>)]) -> Result<RopeSpec> {
    gguf_spec("qwen2", changes).map(|spec| spec.ropes.into_iter().next().unwrap())
}

#[test]
fn rope_scaling_is_llama_cpps() {
    let linear = |factor| RopeScaling::Linear { factor };
    let (kind, factor) = ("rope.scaling.type", "rope.scaling.factor");
    for (changes, expected) in [
        (vec![], RopeScaling::None),
        (vec![(kind, text("none")), (factor, float(4.0))], RopeScaling::None),
        (vec![(kind, text("linear"))], RopeScaling::None),
        (vec![(kind, text("linear")), (factor, float(4.0))], linear(4.0)),
        (vec![(factor, float(4.0))], linear(4.0)),
        (vec![(factor, float(0.0))], RopeScaling::None),
        (vec![("rope.scale_linear", float(2.0))], linear(2.0)),
    ] {
        let rope = rope_of(&changes).unwrap();
        assert_eq!(rope, RopeSpec { base: 1e4, scaling: expected }, "{changes:?}");
    }
    assert_eq!(rope_of(&[("rope.freq_base", float(1e6))]).unwrap().base, 1e6);
    assert_message(rope_of(&[(kind, text("yarn"))]), &["lacks 'qwen2.rope.scaling.factor'"]);
    assert_message(
        rope_of(&[(kind, text("longrope"))]),
        &["not supported", "'longrope'", "linear, llama3, yarn"],
    );
    assert_message(
        rope_of(&[("rope.scaling.attn_factor", float(1.5))]),
        &["not supported", "attn_factor 1.5 without YaRN"],
    );
    assert_message(
        rope_of(&[(factor, float(-2.0))]),
        &["'qwen2.rope.scaling.factor'", "a positive number", "-2"],
    );
    assert_message(
        rope_of(&[("rope.freq_base", float(0.0))]),
        &["'qwen2.rope.freq_base'", "a positive number", "0"],
    );
}

#[test]
fn yarn_keys() {
    let yarn = |more: &[(&str, Option<Value>)]| {
        let mut changes =
            vec![("rope.scaling.type", text("yarn")), ("rope.scaling.factor", float(4.0))];
        changes.extend(more.iter().cloned());
        rope_of(&changes)
    };
    let numbers = |more: &[(&str, Option<Value>)]| match yarn(more).unwrap().scaling {
        RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, attention_factor } => {
            ([factor, original_context, beta_fast, beta_slow], attention_factor)
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(numbers(&[]), ([4.0, 1024.0, 32.0, 1.0], None));
    assert_eq!(
        numbers(&[
            ("rope.scaling.original_context_length", uint(256)),
            ("rope.scaling.yarn_beta_fast", float(16.0)),
            ("rope.scaling.yarn_beta_slow", float(2.0)),
            ("rope.scaling.yarn_attn_factor", float(1.5)),
            ("rope.scaling.yarn_ext_factor", float(1.0)),
        ]),
        ([4.0, 256.0, 16.0, 2.0], Some(1.5))
    );
    // Unlike `yarn_attn_factor`, `attn_factor` multiplies what YaRN does by itself.
    let (_, attention) = numbers(&[("rope.scaling.attn_factor", float(0.5))]);
    assert!((attention.unwrap() - 0.5 * (0.1 * 4f32.ln() + 1.0)).abs() < 1e-6);
    for (key, value) in
        [("rope.scaling.yarn_ext_factor", 0.5), ("rope.scaling.yarn_log_multiplier", 0.1)]
    {
        assert_message(yarn(&[(key, float(value))]), &["not supported", key]);
    }
}

#[test]
fn llama_3_divisors_are_a_tensor() {
    let with = |len: usize, changes: &[(&str, Option<Value>)]| {
        gguf_spec_of("llama", changes, &embeddings().with("rope_freqs.weight", &[len]))
    };
    let scaling = |spec: DecoderSpec| spec.ropes[0].scaling.clone();
    assert_eq!(scaling(with(8, &[]).unwrap()), RopeScaling::Factors(vec![1.0; 8]));
    let linear = [("rope.scaling.factor", float(2.0))];
    assert_eq!(scaling(with(8, &linear).unwrap()), RopeScaling::Factors(vec![2.0; 8]));
    assert_message(with(9, &[]), &["'rope_freqs.weight'", "[9]", "[8]"]);
    let yarn = [("rope.scaling.type", text("yarn")), ("rope.scaling.factor", float(2.0))];
    assert_message(with(8, &yarn), &["not supported", "rope_freqs.weight together with YaRN"]);
}

#[test]
fn gemma_3_scales_global_layers_only() {
    let spec = gguf_spec(
        "gemma3",
        &[
            ("attention.sliding_window", uint(100)),
            ("rope.freq_base", float(1e6)),
            ("rope.scaling.type", text("linear")),
            ("rope.scaling.factor", float(8.0)),
            ("rope.freq_base_swa", float(2e4)),
        ],
    )
    .unwrap();
    let global = RopeScaling::Linear { factor: 8.0 };
    assert_eq!(spec.ropes[0], RopeSpec { base: 1e6, scaling: global });
    assert_eq!(spec.ropes[1], RopeSpec { base: 2e4, scaling: RopeScaling::None });
    assert_eq!((spec.norm_offset, spec.score_scale), (0.0, 0.25));
}

#[test]
fn gemma_3_windows() {
    let of = |changes: &[(&str, Option<Value>)]| windows(&gguf_spec("gemma3", changes).unwrap());
    let (none, some) = (None, Some(100));
    let window = ("attention.sliding_window", uint(100));
    let pattern = |value| ("attention.sliding_window_pattern", Some(value));
    assert_eq!(of(&[]), [none; 4], "no window, no local layers");
    assert_eq!(of(std::slice::from_ref(&window)), [some; 4]);
    assert_eq!(of(&[window.clone(), pattern(Value::Uint(3))]), [some, some, none, some]);
    assert_eq!(of(&[window.clone(), pattern(Value::Uint(0))]), [some; 4]);
    assert_eq!(of(&[window.clone(), pattern(Value::Uint(1))]), [none; 4]);
    let flags = Value::BoolArray(vec![false, true, true, false]);
    assert_eq!(of(&[window.clone(), pattern(flags)]), [none, some, some, none]);
    let short = Value::BoolArray(vec![false, true]);
    assert_message(
        gguf_spec("gemma3", &[window, pattern(short)]),
        &["'gemma3.attention.sliding_window_pattern'", "4 entries", "found 2"],
    );
}

#[test]
fn gemma_3_27b_scales_scores_by_the_width() {
    let spec =
        gguf_spec("gemma3", &[("block_count", uint(62)), ("attention.key_length", uint(32))])
            .unwrap();
    assert_eq!((spec.head_dim, spec.score_scale), (32, 0.25));
}

#[test]
fn llama_rows_are_reordered_and_others_are_not() {
    for (architecture, adjacent) in
        [("llama", true), ("qwen2", false), ("qwen3", false), ("gemma3", false)]
    {
        assert_eq!(gguf_spec(architecture, &[]).unwrap().adjacent_pairs, adjacent);
    }
    let window = [("attention.sliding_window", uint(100))];
    assert_eq!(windows(&gguf_spec("llama", &window).unwrap()), [Some(100); 4]);
}

#[test]
fn what_is_not_supported_is_named() {
    for (changes, part) in [
        (("expert_count", uint(8)), "mixture of experts"),
        (("attention.value_length", uint(8)), "values of 8 channels beside keys of 16"),
        (("rope.dimension_count", uint(8)), "RoPE over 8 of 16 channels"),
    ] {
        assert_message(gguf_spec("llama", &[changes]), &["not supported", part]);
    }
    assert_message(
        gguf_spec("phi3", &[]),
        &["unknown architecture 'phi3'", "known: llama, qwen2, qwen3, gemma3)"],
    );
}

#[test]
fn missing_and_wrong_keys_are_named() {
    let needed = [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
    ];
    for architecture in ["llama", "qwen2", "qwen3", "gemma3"] {
        for key in needed {
            let named = format!("'{architecture}.{key}'");
            assert_message(gguf_spec(architecture, &[(key, None)]), &["lacks", &named]);
            let wrong = gguf_spec(architecture, &[(key, text("many"))]);
            assert_message(wrong, &[&named, "expected", "many"]);
        }
    }
    assert_message(
        gguf_spec("llama", &[("block_count", uint(1 << 40))]),
        &["'llama.block_count'", "at most 4096", "1099511627776"],
    );
    let empty = embeddings().with("token_embd.weight", &[0, HIDDEN]);
    assert_message(gguf_spec_of("llama", &[], &empty), &["vocabulary", "between 1 and", "found 0"]);
    let scalar = embeddings().with("token_embd.weight", &[]);
    assert_message(gguf_spec_of("llama", &[], &scalar), &["vocabulary", "found 0"]);
    assert_message(
        gguf_spec_of("llama", &[], &Shapes::default()),
        &["no tensor 'token_embd.weight'"],
    );
    for (key, value) in [
        ("block_count", uint(0)),
        ("embedding_length", uint(0)),
        ("feed_forward_length", uint(u64::MAX)),
        ("attention.head_count", uint(0)),
        ("attention.head_count_kv", uint(0)),
        ("attention.head_count_kv", uint(3)),
        ("attention.key_length", uint(7)),
        ("attention.head_count_kv", Some(Value::UintArray(vec![2; 4]))),
        ("attention.layer_norm_rms_epsilon", float(f64::NAN)),
        ("final_logit_softcapping", float(-1.0)),
    ] {
        let result = gguf_spec("gemma3", &[(key, value.clone())]);
        assert!(matches!(result, Err(ModelError::BadKey { .. })), "{key} {value:?}: {result:?}");
    }
}
