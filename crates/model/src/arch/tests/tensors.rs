//! Tensors that are missing or have another shape than the metadata asks for.

use super::*;
use crate::weights::{ReadOptions, Weights};

/// All tensors of a spec under both schemes' names.
fn tensors(spec: &DecoderSpec, gguf: bool) -> Shapes {
    let (hidden, ffn) = (spec.hidden_size, spec.ffn_size);
    let (q, kv) = (spec.query_heads * spec.head_dim, spec.kv_heads * spec.head_dim);
    let mut layer: Vec<(&str, &str, Vec<usize>)> = vec![
        ("attn_norm", "input_layernorm", vec![hidden]),
        ("attn_q", "self_attn.q_proj", vec![q, hidden]),
        ("attn_k", "self_attn.k_proj", vec![kv, hidden]),
        ("attn_v", "self_attn.v_proj", vec![kv, hidden]),
        ("attn_output", "self_attn.o_proj", vec![hidden, q]),
        ("ffn_gate", "mlp.gate_proj", vec![ffn, hidden]),
        ("ffn_up", "mlp.up_proj", vec![ffn, hidden]),
        ("ffn_down", "mlp.down_proj", vec![hidden, ffn]),
    ];
    if spec.qk_norm {
        layer.push(("attn_q_norm", "self_attn.q_norm", vec![spec.head_dim]));
        layer.push(("attn_k_norm", "self_attn.k_norm", vec![spec.head_dim]));
    }
    if spec.post_norms {
        layer.push(("post_attention_norm", "post_attention_layernorm", vec![hidden]));
        layer.push(("ffn_norm", "pre_feedforward_layernorm", vec![hidden]));
        layer.push(("post_ffw_norm", "post_feedforward_layernorm", vec![hidden]));
    } else {
        layer.push(("ffn_norm", "post_attention_layernorm", vec![hidden]));
    }
    let pick = |names: (&str, &str)| if gguf { names.0.to_owned() } else { names.1.to_owned() };
    let vocab = spec.vocab_size;
    let mut all = Shapes::default()
        .with(&pick(("token_embd.weight", "model.embed_tokens.weight")), &[vocab, hidden])
        .with(&pick(("output_norm.weight", "model.norm.weight")), &[hidden]);
    for index in 0..spec.layers.len() {
        let prefix = pick(("blk", "model.layers"));
        for (gguf_name, hf_name, shape) in &layer {
            let name = format!("{prefix}.{index}.{}", pick((gguf_name, hf_name)));
            all = all.with(&format!("{name}.weight"), shape);
            if spec.qkv_bias && ["attn_q", "attn_k", "attn_v"].contains(gguf_name) {
                all = all.with(&format!("{name}.bias"), &shape[..1]);
            }
        }
    }
    all
}

fn read(spec: &DecoderSpec, tensors: &Shapes, gguf: bool) -> Result<Weights> {
    Weights::read(spec, tensors, gguf, ReadOptions::default(), &|| ())
}

#[test]
fn every_tensor_is_needed_and_checked() {
    for (architecture, model_type) in
        [("llama", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3"), ("gemma3", "gemma3_text")]
    {
        for gguf in [true, false] {
            let spec = if gguf {
                gguf_spec(architecture, &[("attention.sliding_window", uint(100))]).unwrap()
            } else {
                hf_spec(model_type, json!({})).unwrap()
            };
            let whole = tensors(&spec, gguf);
            read(&spec, &whole, gguf).unwrap();
            for (name, shape) in &whole.0 {
                let missing = read(&spec, &whole.clone().without(name), gguf);
                assert_message(missing, &[&format!("no tensor '{name}'")]);
                let mut longer = shape.clone();
                longer[shape.len() - 1] += 1;
                let wrong = read(&spec, &whole.clone().with(name, &longer), gguf);
                let (expected, found) = (format!("{shape:?}"), format!("{longer:?}"));
                assert_message(wrong, &[&format!("'{name}'"), &expected, &found]);
            }
        }
    }
}

#[test]
fn other_biases_and_the_head_are_optional_but_checked() {
    let spec = gguf_spec("llama", &[]).unwrap();
    let whole = tensors(&spec, true);
    for (name, shape) in [
        ("blk.1.attn_q.bias", [64].as_slice()),
        ("blk.1.attn_output.bias", &[64]),
        ("blk.1.ffn_gate.bias", &[96]),
        ("blk.1.ffn_up.bias", &[96]),
        ("blk.1.ffn_down.bias", &[64]),
        ("output.weight", &[10, 64]),
    ] {
        read(&spec, &whole.clone().with(name, shape), true).unwrap();
        let wrong = read(&spec, &whole.clone().with(name, &[7]), true);
        assert_message(wrong, &[&format!("'{name}'"), "[7]", &format!("{shape:?}")]);
    }
}
