//! config.json.

use super::*;

#[test]
fn a_head_is_as_wide_as_the_file_or_its_class_says() {
    let head_dim =
        |model: &str, value| hf_spec(model, json!({"head_dim": value})).unwrap().head_dim;
    for model in ["llama", "mistral", "qwen2", "qwen3"] {
        assert_eq!(head_dim(model, json!(24)), 24);
        assert_eq!(head_dim(model, Json::Null), 16, "{model}: from the width");
    }
    assert_eq!(head_dim("llama", json!("absent")), 16);
    assert_eq!(head_dim("qwen3", json!("absent")), 128);
    assert_eq!(head_dim("gemma3_text", json!("absent")), 256);
    let kv_heads =
        |value| hf_spec("llama", json!({"num_key_value_heads": value})).unwrap().kv_heads;
    assert_eq!((kv_heads(json!(1)), kv_heads(Json::Null), kv_heads(json!("absent"))), (1, 4, 4));
}

#[test]
fn mistral_has_a_window_unless_it_is_null() {
    let windows_of =
        |model: &str, value| windows(&hf_spec(model, json!({"sliding_window": value})).unwrap());
    assert_eq!(windows_of("mistral", json!(100)), [Some(100); 4]);
    assert_eq!(windows_of("mistral", Json::Null), [None; 4]);
    assert_eq!(windows_of("mistral", json!("absent")), [Some(4096); 4]);
    assert_eq!(windows_of("llama", json!(100)), [None; 4]);
}

#[test]
fn qwen_has_windows_where_they_are_switched_on() {
    for model in ["qwen2", "qwen3"] {
        let of = |changes| windows(&hf_spec(model, changes).unwrap());
        let (none, some) = (None, Some(100));
        assert_eq!(of(json!({"max_window_layers": 2})), [none; 4]);
        let on = |first| json!({"use_sliding_window": true, "max_window_layers": first});
        assert_eq!(of(on(json!(3))), [none, none, none, some]);
        assert_eq!(of(on(json!("absent"))), [none; 4], "from layer 28 on");
        let types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"];
        let mut both = on(json!(1));
        both["layer_types"] = json!(types);
        assert_eq!(of(both), [some, none, none, some]);
        assert_eq!(of(json!({"use_sliding_window": false, "layer_types": types})), [none; 4]);
    }
    let bad =
        |types: Json| hf_spec("qwen2", json!({"use_sliding_window": true, "layer_types": types}));
    assert_message(bad(json!(["full_attention"])), &["layer_types", "4 entries", "found 1"]);
    assert_message(bad(json!(["full_attention", 1])), &["layer_types", "a list of strings"]);
    assert_message(bad(json!(vec!["linear_attention"; 4])), &["layer type 'linear_attention'"]);
}

/// google/gemma-3-4b-it: most fields are left to the class, the decoder's are nested.
#[test]
fn the_published_gemma_3_configuration_is_complete() {
    let config = json!({
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "mm_tokens_per_image": 256,
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27},
    });
    for prefix in ["language_model.model", "model.language_model"] {
        let name = format!("{prefix}.embed_tokens.weight");
        let spec = hf_spec_of(&config, &Shapes::default().with(&name, &[262_208, 2560])).unwrap();
        assert_eq!((spec.vocab_size, spec.layers.len()), (262_208, 34));
        assert_eq!((spec.query_heads, spec.kv_heads, spec.head_dim), (8, 4, 256));
        assert_eq!((spec.context_length, spec.norm_eps, spec.norm_offset), (131_072, 1e-6, 1.0));
        assert_eq!((spec.score_scale, spec.score_cap, spec.logit_cap), (1.0 / 16.0, None, None));
        assert_eq!(spec.layers[4], LayerSpec { window: Some(1024), rope: Some(1) });
        assert_eq!(spec.layers[5], LayerSpec { window: None, rope: Some(0) });
        let global = RopeScaling::Linear { factor: 8.0 };
        assert_eq!(
            spec.ropes,
            [
                RopeSpec { base: 1e6, scaling: global },
                RopeSpec { base: 1e4, scaling: RopeScaling::None }
            ]
        );
    }
}

#[test]
fn gemma_3_has_a_rope_for_each_kind_of_layer() {
    let ropes = |changes| hf_spec("gemma3_text", changes).unwrap().ropes;
    let rope = |base, scaling| RopeSpec { base, scaling };
    let linear = RopeScaling::Linear { factor: 4.0 };
    assert_eq!(ropes(json!({})), [rope(1e6, RopeScaling::None), rope(1e4, RopeScaling::None)]);
    assert_eq!(
        ropes(json!({"rope_theta": 5e5, "rope_local_base_freq": 2e4,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0}})),
        [rope(5e5, linear.clone()), rope(2e4, RopeScaling::None)]
    );
    assert_eq!(
        ropes(json!({"rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}})),
        [rope(5e5, linear.clone()), rope(2e4, RopeScaling::None)]
    );
    // One part of the new form, the rest by default.
    assert_eq!(
        ropes(json!({"rope_parameters": {
            "full_attention": null,
            "sliding_attention": {"rope_type": "linear", "factor": 4.0}}})),
        [rope(1e6, RopeScaling::None), rope(1e4, linear)]
    );
}

#[test]
fn gemma_3_layers_follow_types_or_a_pattern() {
    let of = |changes| windows(&hf_spec("gemma3_text", changes).unwrap());
    let (none, some) = (None, Some(100));
    assert_eq!(of(json!({})), [some; 4], "every sixth is global");
    assert_eq!(of(json!({"sliding_window_pattern": 2})), [some, none, some, none]);
    assert_eq!(of(json!({"sliding_window_pattern": 1})), [none; 4]);
    let types = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"];
    assert_eq!(
        of(json!({"sliding_window_pattern": 2, "layer_types": types})),
        [none, some, some, none]
    );
    assert_message(
        hf_spec("gemma3_text", json!({"sliding_window": null})),
        &["lacks", "sliding_window (config.json)"],
    );
}

fn rope_of(changes: Json) -> Result<RopeSpec> {
    hf_spec("llama", changes).map(|spec| spec.ropes.into_iter().next().unwrap())
}

#[test]
fn rope_parameters_have_an_old_and_a_new_place() {
    let plain = |base| RopeSpec { base, scaling: RopeScaling::None };
    let linear = |base, factor| RopeSpec { base, scaling: RopeScaling::Linear { factor } };
    for (changes, expected) in [
        (json!({}), plain(1e4)),
        (json!({"rope_theta": 5e5, "rope_scaling": null}), plain(5e5)),
        (json!({"rope_theta": 5e5, "rope_scaling": {}}), plain(5e5)),
        (json!({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}), plain(5e5)),
        (json!({"rope_theta": 3.0, "rope_parameters": {"rope_theta": 5e5}}), plain(5e5)),
        (json!({"rope_scaling": {"type": "linear", "factor": 2}}), linear(1e4, 2.0)),
        (json!({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}), linear(1e4, 2.0)),
        (
            json!({"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 7.0}}),
            linear(1e4, 2.0),
        ),
        (
            json!({"rope_scaling": {},
                "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 7.0}}),
            linear(7.0, 3.0),
        ),
    ] {
        assert_eq!(rope_of(changes.clone()).unwrap(), expected, "{changes}");
    }
}

#[test]
fn llama_3_scaling_falls_back_to_the_context_length() {
    let scaling = |changes| match rope_of(changes).unwrap().scaling {
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            [factor, low_freq_factor, high_freq_factor, original_context]
        }
        other => panic!("{other:?}"),
    };
    let mut rope = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 512});
    assert_eq!(scaling(json!({"rope_scaling": rope})), [8.0, 1.0, 4.0, 512.0]);
    rope.as_object_mut().unwrap().remove("original_max_position_embeddings");
    assert_eq!(scaling(json!({"rope_parameters": rope})), [8.0, 1.0, 4.0, 1024.0]);
    rope["high_freq_factor"] = json!(1.0);
    assert_message(rope_of(json!({"rope_scaling": rope})), &["low_freq_factor below"]);
    rope["low_freq_factor"] = Json::Null;
    assert_message(
        rope_of(json!({"rope_scaling": rope})),
        &["lacks", "rope_scaling.low_freq_factor (config.json)"],
    );
}

#[test]
fn yarn_has_defaults() {
    let yarn = |rope: Json| match rope_of(json!({"rope_scaling": rope})).unwrap().scaling {
        RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, attention_factor } => {
            ([factor, original_context, beta_fast, beta_slow], attention_factor)
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(yarn(json!({"type": "yarn", "factor": 4.0})), ([4.0, 1024.0, 32.0, 1.0], None));
    assert_eq!(
        yarn(json!({"type": "yarn", "factor": null, "original_max_position_embeddings": 256,
            "beta_fast": 0, "beta_slow": 0.5, "attention_factor": 1.25, "mscale": 2.0})),
        ([4.0, 256.0, 32.0, 0.5], Some(1.25))
    );
    let (_, attention) =
        yarn(json!({"type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.5}));
    let expected = (0.1 * 40f32.ln() + 1.0) / (0.05 * 40f32.ln() + 1.0);
    assert!((attention.unwrap() - expected).abs() < 1e-6);
    assert_message(
        rope_of(json!({"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 0.5}})),
        &["beta_slow below beta_fast"],
    );
}

#[test]
fn what_is_not_supported_is_named() {
    let llama = |changes| hf_spec("llama", changes);
    for kind in ["longrope", "dynamic", "su"] {
        assert_message(
            llama(json!({"rope_scaling": {"rope_type": kind, "factor": 2.0}})),
            &["not supported", &format!("'{kind}'"), "linear, llama3, yarn"],
        );
    }
    for changes in [
        json!({"partial_rotary_factor": 0.5}),
        json!({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    ] {
        assert_message(llama(changes), &["not supported", "RoPE over 0.5 of a head"]);
    }
    for (changes, part) in [
        (json!({"num_local_experts": 8}), "mixture of experts"),
        (json!({"v_head_dim": 8}), "values of 8 channels beside keys of 16"),
        (json!({"hidden_act": "gelu"}), "activation 'gelu'"),
        (json!({"quantization_config": {"quant_method": "gptq"}}), "quantised with 'gptq'"),
        (json!({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": false}}), "truncate"),
        (
            json!({"rope_parameters": {"full_attention": {"rope_type": "default"}}}),
            "RoPE parameters by layer type",
        ),
    ] {
        assert_message(llama(changes), &["not supported", part]);
    }
    assert_message(
        hf_spec("gemma3_text", json!({"use_bidirectional_attention": true})),
        &["bidirectional attention"],
    );
    assert_message(
        hf_spec("gemma3_text", json!({"hidden_activation": "gelu"})),
        &["activation 'gelu' (hidden_activation"],
    );
    assert_message(
        hf_spec("mixtral", json!({})),
        &["'mixtral'", "llama, mistral, qwen2, qwen3, gemma3_text, gemma3"],
    );
}

#[test]
fn missing_and_wrong_fields_are_named() {
    let needed = [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "rms_norm_eps",
    ];
    for field in needed {
        for value in [json!("absent"), Json::Null] {
            let result = hf_spec("llama", json!({field: value}));
            assert_message(result, &["lacks", &format!("{field} (config.json)")]);
        }
        let result = hf_spec("llama", json!({field: "many"}));
        assert_message(result, &[field, "(config.json)", "expected", "found \"many\""]);
    }
    assert_message(hf_spec("llama", json!({"model_type": "absent"})), &["lacks", "model_type"]);
    assert_message(hf_spec("llama", json!({"hidden_size": -1})), &["hidden_size", "found -1"]);
    assert_message(hf_spec("llama", json!({"attention_bias": 1})), &["attention_bias", "true or"]);
    assert_message(
        hf_spec("llama", json!({"num_hidden_layers": 1u64 << 40})),
        &["num_hidden_layers (config.json)", "at most 4096", "1099511627776"],
    );
    for (field, value) in [
        ("rope_theta", json!(-1.0)),
        ("rope_theta", json!(1e300)),
        ("rms_norm_eps", json!(-1.0)),
        ("num_attention_heads", json!(0)),
        ("num_attention_heads", json!(3)),
        ("head_dim", json!(15)),
        ("intermediate_size", json!(1u64 << 60)),
    ] {
        let result = hf_spec("llama", json!({field: value}));
        assert!(matches!(result, Err(ModelError::BadKey { .. })), "{field} {value}: {result:?}");
    }
    let result = hf_spec("gemma3_text", json!({"query_pre_attn_scalar": 0}));
    assert_message(result, &["score scale", "inf"]);
}

#[test]
fn an_untied_head_must_be_there() {
    let untied = config_json("llama", json!({"tie_word_embeddings": false}));
    let headless = embeddings().without("lm_head.weight");
    assert_message(hf_spec_of(&untied, &headless), &["no tensor 'lm_head.weight'"]);
    assert!(hf_spec_of(&untied, &embeddings()).is_ok());
    let tied = config_json("llama", json!({"tie_word_embeddings": true}));
    assert!(hf_spec_of(&tied, &headless).is_ok());
    assert!(hf_spec_of(&config_json("llama", json!({})), &headless).is_ok());
}
