//! HOT PATH. The forward pass: one flat batch of tokens of many sequences through all layers.

use kvasir_cache::offline::{LessTraining, Squares};
use kvasir_cache::stats::Moments;
use kvasir_cache::{AttentionScratch, BatchSlice, KvCache};
use kvasir_kernels::{
    Activations, Linear, Threads, add_assign, forward_all, forward_gated, gemm_nt, rms_norm_rows,
    scale_in_place, soft_cap,
};

use crate::arch::DecoderSpec;
use crate::error::{ModelError, Result};
use crate::weights::{LayerWeights, Weights};

/// Is shown the queries, keys and values of every layer, not rotated.
pub(crate) trait ForwardObserver {
    /// Rows of one sequence in one layer, the first of them at position `start`: `[rows, heads, head_dim]` each.
    fn observe(&mut self, layer: usize, start: usize, q: &[f32], k: &[f32], v: &[f32]);
}

impl ForwardObserver for Moments {
    fn observe(&mut self, layer: usize, start: usize, q: &[f32], k: &[f32], v: &[f32]) {
        Self::observe(self, layer, start, q, k, v);
    }
}

impl ForwardObserver for LessTraining {
    fn observe(&mut self, layer: usize, _start: usize, q: &[f32], k: &[f32], v: &[f32]) {
        Self::observe(self, layer, q, k, v);
    }
}

impl ForwardObserver for Squares {
    fn observe(&mut self, layer: usize, _start: usize, _q: &[f32], k: &[f32], v: &[f32]) {
        Self::observe(self, layer, k, v);
    }
}

/// One step's tokens.
#[derive(Debug, Clone, Copy)]
pub struct ForwardBatch<'a> {
    /// Token ids, `[rows]`.
    pub tokens: &'a [u32],
    /// Which rows belong to which sequence, and where in it; in order, covering every row once.
    pub slices: &'a [BatchSlice],
}

/// Threads and buffers of one engine's forward passes. Buffers grow to the largest step seen.
#[derive(Debug)]
pub struct Runner {
    threads: Threads,
    pass: Pass,
}

/// Buffers of a forward pass.
#[derive(Debug, Default)]
struct Pass {
    attention: AttentionScratch,
    hidden: Vec<f32>, // [rows, hidden]
    /// Hidden states of the rows that the last layer is finished for.
    few: Vec<f32>, // [rows, hidden]
    q: Vec<f32>,      // [rows, query_heads, head_dim]
    k: Vec<f32>,      // [rows, kv_heads, head_dim]
    v: Vec<f32>,      // [rows, kv_heads, head_dim]
    mixed: Vec<f32>,  // [rows, query_heads, head_dim]
    buffers: Buffers,
}

/// What linear layers and norms read and write between each other.
#[derive(Debug, Default)]
struct Buffers {
    inputs: Activations,
    ffn: Activations,
    /// What a norm reads or writes between two layers.
    between: Vec<f32>,
}

impl Buffers {
    /// Norms heads in place, if there is a norm.
    fn norm_heads(&mut self, norm: Option<&[f32]>, eps: f32, rows: &mut [f32]) {
        if let Some(norm) = norm {
            self.between.clear();
            self.between.extend_from_slice(rows);
            rms_norm_rows(&self.between, norm, eps, rows);
        }
    }
}

impl Runner {
    /// Empty buffers around a thread pool.
    pub fn new(threads: Threads) -> Self {
        Self { threads, pass: Pass::default() }
    }

    /// Hidden states of the last forward pass, before the last norm, of the rows that were wanted: `[rows, hidden]`.
    pub(crate) fn hidden(&self) -> &[f32] {
        &self.pass.hidden
    }

    /// The thread pool.
    pub fn threads(&self) -> &Threads {
        &self.threads
    }
}

/// The architecture and its weights.
#[derive(Debug)]
pub(crate) struct Decoder {
    pub(crate) spec: DecoderSpec,
    pub(crate) weights: Weights,
}

impl Decoder {
    /// Runs all layers over the batch, writing keys and values into the cache (the caller reserved them
    /// and commits them). Leaves the hidden states of the `wanted` rows (in order, each once), or of all, in the runner: of
    /// other rows the last layer computes keys and values only. `observer` is shown the queries, keys and values of every layer.
    pub(crate) fn forward(
        &self,
        batch: ForwardBatch<'_>,
        wanted: Option<&[usize]>,
        cache: &mut KvCache,
        runner: &mut Runner,
        mut observer: Option<&mut (dyn ForwardObserver + Send)>,
    ) -> Result<()> {
        let Runner { threads, pass } = runner;
        let s = &self.spec;
        let rows = batch.tokens.len();
        let width = s.hidden_size;
        let covered: usize = batch.slices.iter().map(|s| s.len).sum();
        if covered != rows {
            return Err(ModelError::Unsupported {
                what: format!("a batch of {rows} tokens whose slices cover {covered}"),
            });
        }
        let Pass { hidden, q, k, v, mixed, .. } = pass;
        hidden.resize(rows * width, 0.0);
        q.resize(rows * s.query_heads * s.head_dim, 0.0);
        k.resize(rows * s.kv_heads * s.head_dim, 0.0);
        v.resize(rows * s.kv_heads * s.head_dim, 0.0);
        mixed.resize(rows * s.query_heads * s.head_dim, 0.0);

        for (row, token) in hidden.chunks_exact_mut(width).zip(batch.tokens) {
            let token = *token as usize;
            if token >= s.vocab_size {
                return Err(ModelError::Unsupported {
                    what: format!("token {token} of a vocabulary of {}", s.vocab_size),
                });
            }
            self.weights.embed(token, row);
        }
        if s.embedding_scale != 1.0 {
            scale_in_place(hidden, s.embedding_scale);
        }

        threads.run(|| {
            for (layer, w) in self.weights.layers.iter().enumerate() {
                let Pass { attention, hidden, q, k, v, mixed, buffers, .. } = &mut *pass;
                let inputs = &mut buffers.inputs;
                inputs.set_normed(w.q.activation_kind(), hidden, &w.attention_norm, s.norm_eps);
                // Layers that read another's keys and values need queries only.
                let alone = cache.reads_others(layer, batch.slices)?;
                let last = layer + 1 == self.weights.layers.len() && observer.is_none();
                let wanted = wanted.filter(|wanted| last && wanted.len() < rows);
                if let Some(wanted) = wanted
                    && !cache.observes(layer, batch.slices)?
                {
                    if !alone {
                        forward_all([&w.k, &w.v], inputs, [k, v]);
                        buffers.norm_heads(w.k_norm.as_deref(), s.norm_eps, k);
                    }
                    cache.write(layer, batch.slices, k, v)?;
                    return self.finish(batch.slices, wanted, cache, pass);
                }
                match alone {
                    true => w.q.forward(inputs, q),
                    false => forward_all([&w.q, &w.k, &w.v], inputs, [q, k, v]),
                }
                buffers.norm_heads(w.q_norm.as_deref(), s.norm_eps, q);
                buffers.norm_heads(w.k_norm.as_deref().filter(|_| !alone), s.norm_eps, k);
                if let Some(observer) = &mut observer {
                    let (query, kv) = (s.query_heads * s.head_dim, s.kv_heads * s.head_dim);
                    for slice in batch.slices {
                        let rows =
                            |width: usize| slice.row * width..(slice.row + slice.len) * width;
                        let (q, k, v) = (&q[rows(query)], &k[rows(kv)], &v[rows(kv)]);
                        observer.observe(layer, slice.start, q, k, v);
                    }
                }
                cache.write(layer, batch.slices, k, v)?;
                cache.attend(layer, batch.slices, q, mixed, attention)?;
                cache.observe(layer, batch.slices, q, attention)?;
                self.after_attention(w, mixed, hidden, buffers);
            }
            Ok(())
        })
    }

    /// The rest of the last layer, keys and values of which are written, for the rows that are wanted.
    fn finish(
        &self,
        slices: &[BatchSlice],
        wanted: &[usize],
        cache: &mut KvCache,
        pass: &mut Pass,
    ) -> Result<()> {
        if wanted.is_empty() {
            return Ok(());
        }
        let Pass { attention, hidden, few, q, mixed, buffers, .. } = pass;
        let (s, layer) = (&self.spec, self.weights.layers.len() - 1);
        let (w, width) = (&self.weights.layers[layer], s.hidden_size);
        // Slices cover rows in order.
        let mut left = slices.iter().peekable();
        let mut own = Vec::with_capacity(wanted.len());
        for (row, wanted) in wanted.iter().enumerate() {
            while left.next_if(|slice| slice.row + slice.len <= *wanted).is_some() {}
            let place = |slice: &&BatchSlice| BatchSlice {
                row,
                start: slice.start + wanted - slice.row,
                len: 1,
                ..**slice
            };
            own.extend(left.peek().map(place));
        }
        few.clear();
        wanted.iter().for_each(|row| few.extend_from_slice(&hidden[row * width..][..width]));
        let heads = wanted.len() * s.query_heads * s.head_dim;
        let (q, mixed) = (&mut q[..heads], &mut mixed[..heads]);
        let inputs = &mut buffers.inputs;
        inputs.set_normed(w.q.activation_kind(), few, &w.attention_norm, s.norm_eps);
        w.q.forward(inputs, q);
        buffers.norm_heads(w.q_norm.as_deref(), s.norm_eps, q);
        cache.attend(layer, &own, q, mixed, attention)?;
        self.after_attention(w, mixed, few, buffers);
        for (row, few) in wanted.iter().zip(few.chunks_exact(width)) {
            hidden[row * width..][..width].copy_from_slice(few);
        }
        Ok(())
    }

    /// What follows a layer's attention: its output projection and the feed-forward layer. `mixed`: `[rows, query_heads, head_dim]`;
    /// `hidden`: `[rows, hidden]`, changed in place.
    fn after_attention(
        &self,
        w: &LayerWeights,
        mixed: &[f32],
        hidden: &mut [f32],
        buffers: &mut Buffers,
    ) {
        let s = &self.spec;
        let Buffers { inputs, ffn, between } = buffers;
        inputs.set(w.o.activation_kind(), mixed, w.o.in_features());
        let norm = w.post_attention_norm.as_deref();
        add_output(&w.o, inputs, norm, s.norm_eps, hidden, between);

        inputs.set_normed(w.gate.activation_kind(), hidden, &w.ffn_norm, s.norm_eps);
        let kind = w.down.activation_kind();
        forward_gated(&w.gate, &w.up, s.activation, inputs, kind, ffn);
        let norm = w.post_ffn_norm.as_deref();
        add_output(&w.down, ffn, norm, s.norm_eps, hidden, between);
    }

    /// `W·Wᵀ` of a layer's keys and of its values, `[width, width]` each. Weights are read as they are held.
    pub(crate) fn weight_squares(&self, layer: usize) -> [Vec<f64>; 2] {
        let weights = &self.weights.layers[layer];
        [&weights.k, &weights.v].map(|linear| {
            let (width, inputs) = (linear.out_features(), linear.in_features());
            let mut rows = vec![0.0; width * inputs];
            for (r, row) in rows.chunks_exact_mut(inputs).enumerate() {
                linear.row_into(r, row);
            }
            let mut squares = vec![0.0; width * width];
            gemm_nt((width, width, inputs), &rows, inputs, &rows, inputs, &mut squares, width);
            squares.into_iter().map(f64::from).collect()
        })
    }

    /// `WᵀW` of a layer's output projection, `[query_heads · head_dim]` squared.
    pub(crate) fn output_squares(&self, layer: usize) -> Vec<f32> {
        let linear = &self.weights.layers[layer].o;
        let (outputs, width) = (linear.out_features(), linear.in_features());
        let (mut columns, mut row) = (vec![0.0; width * outputs], vec![0.0; width]);
        for r in 0..outputs {
            linear.row_into(r, &mut row);
            row.iter().enumerate().for_each(|(c, x)| columns[c * outputs + r] = *x);
        }
        let mut squares = vec![0.0; width * width];
        gemm_nt((width, width, outputs), &columns, outputs, &columns, outputs, &mut squares, width);
        squares
    }

    /// Shows some bytes of every layer's weights, which tell models apart.
    pub(crate) fn hash_sample(&self, update: &mut dyn FnMut(&[u8])) {
        let s = &self.spec;
        let sizes =
            [s.vocab_size, s.hidden_size, s.query_heads, s.kv_heads, s.head_dim, s.ffn_size];
        for size in sizes {
            update(&(size as u64).to_le_bytes());
        }
        for layer in &self.weights.layers {
            for linear in [&layer.q, &layer.k, &layer.v] {
                let mut weights = vec![0.0; linear.in_features()];
                for row in (0..linear.out_features()).step_by(16) {
                    linear.row_into(row, &mut weights);
                    update(bytemuck::cast_slice(&weights));
                }
            }
        }
        for rope in &s.ropes {
            update(format!("{rope:?}").as_bytes());
        }
    }

    /// Logits of some rows of the last forward pass, of those that it was for. `out`: `[rows.len(), vocab]`, resized.
    ///
    /// # Panics
    /// If a row is not in the last batch.
    pub(crate) fn logits(&self, rows: &[usize], runner: &mut Runner, out: &mut Vec<f32>) {
        let s = &self.spec;
        let width = s.hidden_size;
        let Runner { threads, pass } = runner;
        let Pass { hidden, buffers: Buffers { inputs, between, .. }, .. } = pass;
        between.clear();
        for row in rows {
            between.extend_from_slice(&hidden[row * width..(row + 1) * width]);
        }
        out.resize(rows.len() * s.vocab_size, 0.0);
        let head = &self.weights.output;
        let norm = &self.weights.output_norm;
        threads.run(|| {
            inputs.set_normed(head.activation_kind(), between, norm, s.norm_eps);
            head.forward(inputs, out);
        });
        if let Some(cap) = s.logit_cap {
            soft_cap(out, cap);
        }
    }
}

/// `hidden += x Wᵀ`, normed first where the model has a norm after the layer.
fn add_output(
    linear: &Linear,
    x: &Activations,
    norm: Option<&[f32]>,
    eps: f32,
    hidden: &mut [f32],
    between: &mut Vec<f32>,
) {
    let Some(norm) = norm else { return linear.forward_add(x, hidden) };
    between.resize(2 * hidden.len(), 0.0);
    let (out, normed) = between.split_at_mut(hidden.len());
    linear.forward(x, out);
    rms_norm_rows(out, norm, eps, normed);
    add_assign(hidden, normed);
}
