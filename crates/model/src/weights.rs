//! A decoder's weights, read from any [`TensorSource`] under either naming scheme.

use kvasir_kernels::{ActivationKind, GROUP, Linear};
use rayon::prelude::*;

use crate::arch::DecoderSpec;
use crate::error::{ModelError, Result};
use crate::source::TensorSource;

/// In what form weights are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Dtype {
    /// As the file has them: K types and 4- and 8-bit codes in groups of 32 as they are, all else rounded to bf16.
    /// (With AMX scales of Q4_K and Q5_K are rounded to f16, and layers in Q2_K, Q3_K and Q6_K become bf16.) Inputs are what the processor multiplies fastest: of layers with codes bytes with a step
    /// for 16, of others bf16 where products of it are faster than those of f32, else f32.
    #[default]
    Auto,
    /// The same with all inputs in bf16.
    Bfloat16,
    /// Weights, inputs and products of attention in f32: slow and large, a control for the others.
    Float32,
}

/// One transformer layer.
#[derive(Debug)]
pub(crate) struct LayerWeights {
    pub(crate) attention_norm: Vec<f32>,
    pub(crate) q: Linear,
    pub(crate) k: Linear,
    pub(crate) v: Linear,
    pub(crate) q_norm: Option<Vec<f32>>,
    pub(crate) k_norm: Option<Vec<f32>>,
    pub(crate) o: Linear,
    pub(crate) post_attention_norm: Option<Vec<f32>>,
    pub(crate) ffn_norm: Vec<f32>,
    pub(crate) gate: Linear,
    pub(crate) up: Linear,
    pub(crate) down: Linear,
    pub(crate) post_ffn_norm: Option<Vec<f32>>,
}

/// All weights.
#[derive(Debug)]
pub(crate) struct Weights {
    /// `[vocab, hidden]`; also the output head where the model ties them.
    pub(crate) embedding: Linear,
    pub(crate) output: Option<Linear>,
    pub(crate) output_norm: Vec<f32>,
    pub(crate) layers: Vec<LayerWeights>,
}

/// Tensor names of one scheme; layer tensors get `blk.3.` or `model.layers.3.` in front.
pub(crate) struct Names {
    pub(crate) embedding: &'static str,
    pub(crate) output: &'static str,
    output_norm: &'static str,
    layer: &'static str,
    attention_norm: &'static str,
    q: &'static str,
    k: &'static str,
    v: &'static str,
    o: &'static str,
    q_norm: &'static str,
    k_norm: &'static str,
    post_attention_norm: &'static str,
    ffn_norm: &'static str,
    /// `ffn_norm` in models with norms after each block.
    ffn_norm_of_four: &'static str,
    gate: &'static str,
    up: &'static str,
    down: &'static str,
    post_ffn_norm: &'static str,
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

impl Weights {
    /// Reads everything, layers in parallel on the current rayon pool. `progress` is told after each
    /// layer, from any thread.
    pub(crate) fn read(
        spec: &DecoderSpec,
        source: &dyn TensorSource,
        gguf: bool,
        dtype: Dtype,
        progress: &(dyn Fn() + Sync),
    ) -> Result<Self> {
        let names = names(gguf, source);
        let form = Form::of(dtype);
        let reader = Reader { spec, source, names, form };
        let (hidden, vocab) = (spec.hidden_size, spec.vocab_size);
        let embedding =
            reader.linear(names.embedding, None, [vocab, hidden], Rows::AsStored, form.head())?;
        let output = match source.shape(names.output) {
            Some(_) => Some(reader.linear(
                names.output,
                None,
                [vocab, hidden],
                Rows::AsStored,
                form.head(),
            )?),
            None => None,
        };
        let output_norm = reader.norm(names.output_norm, hidden)?;
        let layers = (0..spec.layers.len()).into_par_iter().map(|i| {
            let layer = reader.layer(i);
            progress();
            layer
        });
        Ok(Self { embedding, output, output_norm, layers: layers.collect::<Result<_>>()? })
    }

    /// What is multiplied with what: every form once.
    pub(crate) fn form(&self) -> String {
        let mut forms: Vec<String> = Vec::new();
        let layers =
            self.layers.iter().flat_map(|l| [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down]);
        for linear in layers.chain(self.output.as_ref()).chain([&self.embedding]) {
            let form = linear.form();
            if !forms.contains(&form) {
                forms.push(form);
            }
        }
        forms.join(", ")
    }

    /// Bytes held in memory.
    pub(crate) fn num_bytes(&self) -> usize {
        let layers = self.layers.iter().map(|l| {
            [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down]
                .iter()
                .map(|w| w.num_bytes())
                .sum::<usize>()
        });
        self.embedding.num_bytes()
            + self.output.as_ref().map_or(0, Linear::num_bytes)
            + layers.sum::<usize>()
    }
}

struct Reader<'a> {
    spec: &'a DecoderSpec,
    source: &'a dyn TensorSource,
    names: &'a Names,
    form: Form,
}

/// In which form a matrix is held.
#[derive(Debug, Clone, Copy)]
struct Form {
    /// What codes are multiplied with; `None` if there are none to be.
    codes: Option<ActivationKind>,
    /// What other weights are multiplied with, themselves in f32 or rounded to bf16.
    others: ActivationKind,
    exact: bool,
}

impl Form {
    fn of(dtype: Dtype) -> Self {
        let (f32, bf16) = (ActivationKind::F32, ActivationKind::Bf16);
        match dtype {
            Dtype::Auto => Self {
                codes: Some(ActivationKind::fastest(true)),
                others: ActivationKind::fastest(false),
                exact: false,
            },
            Dtype::Bfloat16 => Self { codes: Some(bf16), others: bf16, exact: false },
            Dtype::Float32 => Self { codes: None, others: f32, exact: true },
        }
    }

    /// Of a head, which is read for the last token of a prompt and for each one that is generated, so for few rows: codes that
    /// layers have as tiles it has for bytes, which then need no turning.
    fn head(self) -> Self {
        let codes = self.codes.map(|kind| match kind {
            ActivationKind::Tiles => ActivationKind::Bytes,
            kind => kind,
        });
        Self { codes, ..self }
    }

    /// With the same inputs for all weights.
    fn alike(self) -> Self {
        Self { codes: self.codes.map(|_| self.others), ..self }
    }
}

/// In which order a matrix's rows are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rows {
    AsStored,
    /// Pairs of RoPE channels are split: (i, i + dim / 2) instead of (2 i, 2 i + 1), head by head.
    SplitPairs,
}

impl Reader<'_> {
    fn layer(&self, index: usize) -> Result<LayerWeights> {
        let (s, n) = (self.spec, self.names);
        let weight = |name: &str| format!("{}.{index}.{name}.weight", n.layer);
        let ffn_norm = if s.post_norms { n.ffn_norm_of_four } else { n.ffn_norm };
        let q_size = s.query_heads * s.head_dim;
        let qkv = |(name, heads, rotated): (&str, usize, bool), form: Form| {
            let size = heads * s.head_dim;
            let rows = if rotated && s.adjacent_pairs { Rows::SplitPairs } else { Rows::AsStored };
            let bias_name = format!("{}.{index}.{name}.bias", n.layer);
            let mut bias = match (s.qkv_bias, self.source.shape(&bias_name)) {
                (true, None) => return Err(ModelError::MissingTensor { name: bias_name }),
                (_, Some(_)) => Some(self.read(&bias_name, &[size])?),
                (false, None) => None,
            };
            if rows == Rows::SplitPairs {
                bias = bias.map(|b| split_pairs(&b, s.head_dim, 1));
            }
            self.linear(&weight(name), bias, [size, s.hidden_size], rows, form)
        };
        let optional = |wanted: bool, name: &str, size: usize| {
            wanted.then(|| self.norm(&weight(name), size)).transpose()
        };
        let [q, k, v] = alike(self.form, |form| {
            let parts =
                [(n.q, s.query_heads, true), (n.k, s.kv_heads, true), (n.v, s.kv_heads, false)];
            let [q, k, v] = parts.map(|part| qkv(part, form));
            Ok([q?, k?, v?])
        })?;
        let [gate, up] = alike(self.form, |form| {
            let of = |name| self.linear_with_bias(name, index, s.hidden_size, s.ffn_size, form);
            Ok([of(n.gate)?, of(n.up)?])
        })?;
        Ok(LayerWeights {
            attention_norm: self.norm(&weight(n.attention_norm), s.hidden_size)?,
            q,
            k,
            v,
            q_norm: optional(s.qk_norm, n.q_norm, s.head_dim)?,
            k_norm: optional(s.qk_norm, n.k_norm, s.head_dim)?,
            o: self.linear_with_bias(n.o, index, q_size, s.hidden_size, self.form)?,
            post_attention_norm: optional(s.post_norms, n.post_attention_norm, s.hidden_size)?,
            ffn_norm: self.norm(&weight(ffn_norm), s.hidden_size)?,
            gate,
            up,
            down: self.linear_with_bias(n.down, index, s.ffn_size, s.hidden_size, self.form)?,
            post_ffn_norm: optional(s.post_norms, n.post_ffn_norm, s.hidden_size)?,
        })
    }

    fn read(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        self.source.read_shaped(name, shape)
    }

    /// A matrix in the form given, as far as the file's type has it.
    fn linear(
        &self,
        name: &str,
        bias: Option<Vec<f32>>,
        [outputs, inputs]: [usize; 2],
        rows: Rows,
        form: Form,
    ) -> Result<Linear> {
        self.source.check_shape(name, &[outputs, inputs])?;
        let dim = self.spec.head_dim;
        let stored = |row| if rows == Rows::SplitPairs { paired_row(row, dim) } else { row };
        let tiles = form.codes == Some(ActivationKind::Tiles);
        let k_codes = self.source.k_codes(name);
        if let (Some(tensor), Some(kind), false) = (k_codes, form.codes, tiles) {
            let format = (tensor.format, kind);
            return Linear::from_k(format, bias, inputs, outputs, |row, out| {
                tensor.row(stored(row), out);
                Ok(())
            });
        }
        let coded = self.source.codes(name).filter(|_| inputs.is_multiple_of(GROUP));
        if let (Some(coded), Some(kind)) = (coded, form.codes) {
            // Without products with bytes it is like other weights.
            let kind = if coded.format.takes(kind) { kind } else { form.others };
            let format = (coded.format, kind);
            let linear = Linear::from_codes(format, bias.clone(), inputs, outputs, |row, out| {
                coded.row(stored(row), out);
                Ok::<(), ModelError>(())
            })?;
            if let Some(linear) = linear {
                return Ok(linear);
            }
        }
        let mut weight = self.read(name, &[outputs, inputs])?;
        if rows == Rows::SplitPairs {
            weight = split_pairs(&weight, dim, inputs);
        }
        Ok(match form.exact {
            true => Linear::new(&weight, bias, inputs, outputs),
            false => Linear::bf16(form.others, &weight, bias, inputs, outputs),
        })
    }

    /// A layer's linear with its bias if the file has one.
    fn linear_with_bias(
        &self,
        name: &str,
        index: usize,
        inputs: usize,
        outputs: usize,
        form: Form,
    ) -> Result<Linear> {
        let of = |what: &str| format!("{}.{index}.{name}.{what}", self.names.layer);
        let bias = of("bias");
        let bias = self.source.shape(&bias).map(|_| self.read(&bias, &[outputs])).transpose()?;
        self.linear(&of("weight"), bias, [outputs, inputs], Rows::AsStored, form)
    }

    fn norm(&self, name: &str, size: usize) -> Result<Vec<f32>> {
        let mut weight = self.read(name, &[size])?;
        if self.spec.norm_offset != 0.0 {
            weight.iter_mut().for_each(|w| *w += self.spec.norm_offset);
        }
        Ok(weight)
    }
}

/// Layers that read the same inputs, and so in the same form.
fn alike<const N: usize>(
    form: Form,
    read: impl Fn(Form) -> Result<[Linear; N]>,
) -> Result<[Linear; N]> {
    let all = read(form)?;
    // One of them may have no codes.
    let same = all.iter().all(|linear| linear.activation_kind() == all[0].activation_kind());
    if same { Ok(all) } else { read(form.alike()) }
}

/// Which row of adjacent pairs (2i, 2i + 1) becomes row `row` of split pairs (i, i + dim / 2), in its head.
fn paired_row(row: usize, head_dim: usize) -> usize {
    let (head, i) = (row / head_dim, row % head_dim);
    head * head_dim + 2 * (i % (head_dim / 2)) + i / (head_dim / 2)
}

/// Reorders the rows of every head from adjacent to split pairs. `rows`: `[heads · head_dim, width]`.
fn split_pairs(rows: &[f32], head_dim: usize, width: usize) -> Vec<f32> {
    (0..rows.len() / width)
        .flat_map(|row| &rows[paired_row(row, head_dim) * width..][..width])
        .copied()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_split_per_head() {
        // Two heads of four rows of one channel.
        let rows = [0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 12.0, 13.0];
        assert_eq!(split_pairs(&rows, 4, 1), [0.0, 2.0, 1.0, 3.0, 10.0, 12.0, 11.0, 13.0]);
        let wide = split_pairs(&[0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5], 4, 2);
        assert_eq!(wide, [0.0, 0.5, 2.0, 2.5, 1.0, 1.5, 3.0, 3.5]);
    }
}
