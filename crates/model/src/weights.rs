//! A decoder's weights, read from any [`TensorSource`] under either naming scheme.

use std::ops::Range;

use kvasir_kernels::{GROUP, GroupCodes, Linear};

use crate::arch::DecoderSpec;
use crate::dequant::{Quantize, block_decoder};
use crate::embedding::Embedding;
use crate::error::{ModelError, Result};
use crate::file_bytes::Access;
use crate::model::LoadOptions;
use crate::source::TensorSource;
use crate::stored_tensor::StoredTensor;
use crate::tensor_names::{Names, names};
use crate::weight_form::{Dtype, Form, Held};

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
    /// `[vocab, hidden]`; `None` where it is the output head too.
    pub(crate) embedding: Option<Embedding>,
    /// `[vocab, hidden]`
    pub(crate) output: Linear,
    pub(crate) output_norm: Vec<f32>,
    pub(crate) layers: Vec<LayerWeights>,
}

/// How weights are read and held.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct ReadOptions {
    pub(crate) dtype: Dtype,
    pub(crate) quantize: Option<Quantize>,
    /// Whether a table that is only looked up stays in a mapped file.
    pub(crate) keep_mapped: bool,
}

impl ReadOptions {
    pub(crate) fn of(options: &LoadOptions<'_>) -> Self {
        let LoadOptions { dtype, quantize, .. } = *options;
        Self { dtype, quantize, keep_mapped: !options.resident }
    }

    /// Whether a table that is only looked up stays in a file that is accessed in some way.
    pub(crate) fn keeps_mapped(self, access: Access) -> bool {
        self.keep_mapped && access == Access::Mapped
    }
}

impl Weights {
    /// Reads everything, a matrix at a time, with the threads of the current rayon pool. `progress` is told after each layer.
    pub(crate) fn read(
        spec: &DecoderSpec,
        source: &dyn TensorSource,
        gguf: bool,
        options: ReadOptions,
        progress: &(dyn Fn() + Sync),
    ) -> Result<Self> {
        let names = names(gguf, source);
        let form = form(spec, source, names, options);
        let reader = Reader { spec, source, names, form };
        let shape = [spec.vocab_size, spec.hidden_size];
        let table = |name| reader.linear(name, None, shape, Rows::AsStored, form.head());
        let tied = source.shape(names.output).is_none();
        let output = table(if tied { names.embedding } else { names.output })?;
        let embedding = match tied {
            true => None,
            false => Some(match reader.mapped_embedding(options)? {
                Some(embedding) => embedding,
                None => Embedding::Held(table(names.embedding)?),
            }),
        };
        let output_norm = reader.norm(names.output_norm, spec.hidden_size)?;
        let layers = (0..spec.layers.len()).map(|i| {
            let layer = reader.layer(i);
            progress();
            layer
        });
        Ok(Self { embedding, output, output_norm, layers: layers.collect::<Result<_>>()? })
    }

    /// The row of a token. `out`: `[hidden]`.
    pub(crate) fn embed(&self, token: usize, out: &mut [f32]) {
        match &self.embedding {
            Some(embedding) => embedding.row_into(token, out),
            None => self.output.row_into(token, out),
        }
    }

    /// All matrices of layers, and those beside them that are in memory.
    fn linears(&self) -> impl Iterator<Item = &Linear> {
        let layers =
            self.layers.iter().flat_map(|l| [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down]);
        let embedding = self.embedding.as_ref().and_then(|embedding| match embedding {
            Embedding::Held(table) => Some(table),
            Embedding::Mapped(..) => None,
        });
        layers.chain([&self.output]).chain(embedding)
    }

    /// What is multiplied with what: every form once.
    pub(crate) fn form(&self) -> String {
        let mut forms: Vec<String> = Vec::new();
        for linear in self.linears() {
            let form = linear.form();
            if !forms.contains(&form) {
                forms.push(form);
            }
        }
        forms.join(", ")
    }

    /// Bytes held in memory.
    pub(crate) fn num_bytes(&self) -> usize {
        self.linears().map(Linear::num_bytes).sum()
    }

    /// Keeps them in memory, whatever else wants it.
    ///
    /// # Errors
    /// What the operating system says, of the first that it refuses.
    pub(crate) fn lock(&self) -> std::io::Result<()> {
        self.linears().try_for_each(Linear::lock)
    }
}

/// In which form a model's matrices are held.
pub(crate) fn form(
    spec: &DecoderSpec,
    source: &dyn TensorSource,
    names: &Names,
    options: ReadOptions,
) -> Form {
    let types = (0..spec.layers.len())
        .flat_map(|layer| names.matrices().map(|matrix| names.weight(layer, matrix)));
    let types = types.filter_map(|name| Some(source.stored(&name)?.ty()));
    Form::of(options.dtype, options.quantize, types)
}

struct Reader<'a> {
    spec: &'a DecoderSpec,
    source: &'a dyn TensorSource,
    names: &'a Names,
    form: Form,
}

/// In which order a matrix's rows are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rows {
    AsStored,
    /// Pairs of RoPE channels are split: (i, i + dim / 2) instead of (2 i, 2 i + 1), head by head.
    SplitPairs,
}

/// [`Rows`] of a matrix with heads of `dim` rows.
#[derive(Debug, Clone, Copy)]
struct Order {
    rows: Rows,
    dim: usize,
}

impl Order {
    /// Opens what some rows of a layer are in a file. What is returned reads elements of `per` inputs, decoded from their blocks.
    fn open<T>(
        self,
        tensor: &StoredTensor,
        rows: Range<usize>,
        per: usize,
        decode: impl Fn(&[u8], &mut [T]),
    ) -> Result<impl Fn(usize, usize, &mut [T])> {
        let split = self.rows == Rows::SplitPairs;
        // Rows change places within their head.
        let stored = match split {
            true => rows.start / self.dim * self.dim..rows.end.next_multiple_of(self.dim),
            false => rows,
        };
        let stored = tensor.open(stored)?;
        Ok(move |row: usize, first: usize, out: &mut [T]| {
            let row = if split { paired_row(row, self.dim) } else { row };
            decode(stored.blocks(row, first * per), out);
        })
    }
}

impl Reader<'_> {
    fn layer(&self, index: usize) -> Result<LayerWeights> {
        let (s, n) = (self.spec, self.names);
        let weight = |name: &str| n.weight(index, name);
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
        let Some(tensor) = self.source.stored(name) else {
            // What is there and cannot be opened says why when it is read.
            self.source.read_f32(name)?;
            return Err(ModelError::MissingTensor { name: name.to_owned() });
        };
        let order = Order { rows, dim: self.spec.head_dim };
        let held = form.held(tensor.ty(), inputs).ok_or_else(|| tensor.bad_type())?;
        let read = |held: Held, bias: Option<Vec<f32>>| match held {
            Held::K(format, kind, decode) => {
                let open = |rows| order.open(&tensor, rows, GROUP, decode);
                Linear::from_k((format, kind), bias, inputs, outputs, open)
            }
            Held::Codes(format, kind, decode) => {
                let open = |rows| order.open(&tensor, rows, GROUP, decode);
                Linear::from_codes((format, kind), bias, inputs, outputs, open)
            }
            Held::Quantized(quantize, kind, decode) => {
                let ty = tensor.ty();
                let groups = move |blocks: &[u8], out: &mut [GroupCodes]| {
                    let bytes = blocks.chunks_exact(GROUP * ty.block_bytes());
                    for (bytes, out) in bytes.zip(out) {
                        let mut weights = [0.0; GROUP];
                        decode(bytes, &mut weights);
                        *out = quantize.group(&weights);
                    }
                };
                let open = |rows| order.open(&tensor, rows, GROUP, groups);
                Linear::from_codes((quantize.format(), kind), bias, inputs, outputs, open)
            }
            Held::Floats(format, kind, decode) => {
                let open = |rows| order.open(&tensor, rows, 1, decode);
                Linear::from_floats((format, kind), bias, inputs, outputs, open).map(Some)
            }
        };
        if let Some(linear) = read(held, bias.clone())? {
            return Ok(linear);
        }
        // Scales that f16 has not.
        let decode = block_decoder(tensor.ty()).ok_or_else(|| tensor.bad_type())?;
        let linear = read(form.floats(tensor.ty(), decode), bias)?;
        linear.ok_or_else(|| tensor.bad_type())
    }

    /// The embedding table where it lies, if that is wanted and the file stays mapped.
    fn mapped_embedding(&self, options: ReadOptions) -> Result<Option<Embedding>> {
        let name = self.names.embedding;
        self.source.check_shape(name, &[self.spec.vocab_size, self.spec.hidden_size])?;
        let tensor = self.source.stored(name).filter(|t| options.keep_mapped && t.stays_mapped());
        let Some(tensor) = tensor else { return Ok(None) };
        let decode = block_decoder(tensor.ty()).ok_or_else(|| tensor.bad_type())?;
        Ok(Some(Embedding::Mapped(tensor, decode)))
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
