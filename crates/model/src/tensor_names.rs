//! What tensors are called, in GGUF files and in safetensors folders.

use crate::source::TensorSource;

/// Tensor names of one scheme; layer tensors get `blk.3.` or `model.layers.3.` in front.
pub(crate) struct Names {
    pub(crate) embedding: &'static str,
    pub(crate) output: &'static str,
    pub(crate) output_norm: &'static str,
    pub(crate) layer: &'static str,
    pub(crate) attention_norm: &'static str,
    pub(crate) q: &'static str,
    pub(crate) k: &'static str,
    pub(crate) v: &'static str,
    pub(crate) o: &'static str,
    pub(crate) q_norm: &'static str,
    pub(crate) k_norm: &'static str,
    pub(crate) post_attention_norm: &'static str,
    pub(crate) ffn_norm: &'static str,
    /// `ffn_norm` in models with norms after each block.
    pub(crate) ffn_norm_of_four: &'static str,
    pub(crate) gate: &'static str,
    pub(crate) up: &'static str,
    pub(crate) down: &'static str,
    pub(crate) post_ffn_norm: &'static str,
}

const GGUF: Names = Names {
    embedding: "token_embd.weight",
    output: "output.weight",
    output_norm: "output_norm.weight",
    layer: "blk",
    attention_norm: "attn_norm",
    q: "attn_q",
    k: "attn_k",
    v: "attn_v",
    o: "attn_output",
    q_norm: "attn_q_norm",
    k_norm: "attn_k_norm",
    post_attention_norm: "post_attention_norm",
    ffn_norm: "ffn_norm",
    ffn_norm_of_four: "ffn_norm",
    gate: "ffn_gate",
    up: "ffn_up",
    down: "ffn_down",
    post_ffn_norm: "post_ffw_norm",
};

const HF: Names = Names {
    embedding: "model.embed_tokens.weight",
    output: "lm_head.weight",
    output_norm: "model.norm.weight",
    layer: "model.layers",
    attention_norm: "input_layernorm",
    q: "self_attn.q_proj",
    k: "self_attn.k_proj",
    v: "self_attn.v_proj",
    o: "self_attn.o_proj",
    q_norm: "self_attn.q_norm",
    k_norm: "self_attn.k_norm",
    post_attention_norm: "post_attention_layernorm",
    ffn_norm: "post_attention_layernorm",
    ffn_norm_of_four: "pre_feedforward_layernorm",
    gate: "mlp.gate_proj",
    up: "mlp.up_proj",
    down: "mlp.down_proj",
    post_ffn_norm: "post_feedforward_layernorm",
};

/// The decoder of a multi-modal model, as transformers 5 and 4 save it.
const HF_NESTED: [Names; 2] = [
    Names {
        embedding: "model.language_model.embed_tokens.weight",
        output_norm: "model.language_model.norm.weight",
        layer: "model.language_model.layers",
        ..HF
    },
    Names {
        embedding: "language_model.model.embed_tokens.weight",
        output: "language_model.lm_head.weight",
        output_norm: "language_model.model.norm.weight",
        layer: "language_model.model.layers",
        ..HF
    },
];

/// The naming scheme of a file.
pub(crate) fn names(gguf: bool, source: &dyn TensorSource) -> &'static Names {
    if gguf {
        return &GGUF;
    }
    HF_NESTED.iter().find(|names| source.shape(names.embedding).is_some()).unwrap_or(&HF)
}

impl Names {
    /// What a layer's matrices are called, without what is in front and behind.
    pub(crate) fn matrices(&self) -> [&'static str; 7] {
        [self.q, self.k, self.v, self.o, self.gate, self.up, self.down]
    }

    /// The name of a layer's matrix.
    pub(crate) fn weight(&self, layer: usize, matrix: &str) -> String {
        format!("{}.{layer}.{matrix}.weight", self.layer)
    }
}
