//! HOT PATH. The forward pass: one flat batch of tokens of many sequences through all layers.

use kvasir_cache::stats::Moments;
use kvasir_cache::{AttentionScratch, BatchSlice, KvCache};
use kvasir_kernels::{Threads, add_assign, gated, rms_norm_rows, scale_in_place, soft_cap};

use crate::arch::DecoderSpec;
use crate::error::{ModelError, Result};
use crate::weights::Weights;

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
    attention: AttentionScratch,
    hidden: Vec<f32>, // [rows, hidden]
    normed: Vec<f32>, // [rows, hidden]
    q: Vec<f32>,      // [rows, query_heads, head_dim]
    k: Vec<f32>,      // [rows, kv_heads, head_dim]
    v: Vec<f32>,      // [rows, kv_heads, head_dim]
    mixed: Vec<f32>,  // [rows, query_heads, head_dim]
    gate: Vec<f32>,   // [rows, ffn]
    up: Vec<f32>,     // [rows, ffn]
    rows: Vec<f32>,   // [logit rows, hidden]
}

impl Runner {
    /// Empty buffers around a thread pool.
    pub fn new(threads: Threads) -> Self {
        Self {
            threads,
            attention: AttentionScratch::default(),
            hidden: Vec::new(),
            normed: Vec::new(),
            q: Vec::new(),
            k: Vec::new(),
            v: Vec::new(),
            mixed: Vec::new(),
            gate: Vec::new(),
            up: Vec::new(),
            rows: Vec::new(),
        }
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
    /// and commits them). Leaves the normalised hidden states of every row in the runner. `moments` are
    /// shown the queries, keys and values of every layer.
    pub(crate) fn forward(
        &self,
        batch: ForwardBatch<'_>,
        cache: &mut KvCache,
        runner: &mut Runner,
        mut moments: Option<&mut Moments>,
    ) -> Result<()> {
        let Runner { threads, attention, hidden, normed, q, k, v, mixed, gate, up, .. } = runner;
        let s = &self.spec;
        let rows = batch.tokens.len();
        let width = s.hidden_size;
        let covered: usize = batch.slices.iter().map(|s| s.len).sum();
        if covered != rows {
            return Err(ModelError::Unsupported {
                what: format!("a batch of {rows} tokens whose slices cover {covered}"),
            });
        }
        hidden.resize(rows * width, 0.0);
        normed.resize(rows * width, 0.0);
        q.resize(rows * s.query_heads * s.head_dim, 0.0);
        k.resize(rows * s.kv_heads * s.head_dim, 0.0);
        v.resize(rows * s.kv_heads * s.head_dim, 0.0);
        mixed.resize(rows * s.query_heads * s.head_dim, 0.0);
        gate.resize(rows * s.ffn_size, 0.0);
        up.resize(rows * s.ffn_size, 0.0);

        for (row, token) in hidden.chunks_exact_mut(width).zip(batch.tokens) {
            let token = *token as usize;
            if token >= s.vocab_size {
                return Err(ModelError::Unsupported {
                    what: format!("token {token} of a vocabulary of {}", s.vocab_size),
                });
            }
            row.copy_from_slice(self.weights.embedding.row(token));
        }
        if s.embedding_scale != 1.0 {
            scale_in_place(hidden, s.embedding_scale);
        }

        threads.install(|| {
            for (layer, w) in self.weights.layers.iter().enumerate() {
                rms_norm_rows(hidden, &w.attention_norm, s.norm_eps, normed);
                w.q.forward(normed, q);
                w.k.forward(normed, k);
                w.v.forward(normed, v);
                // `mixed` is free until attention fills it: the norms need another buffer than their
                // input.
                if let Some(norm) = &w.q_norm {
                    rms_norm_rows(q, norm, s.norm_eps, mixed);
                    q.copy_from_slice(mixed);
                }
                if let Some(norm) = &w.k_norm {
                    let normed_keys = &mut mixed[..k.len()];
                    rms_norm_rows(k, norm, s.norm_eps, normed_keys);
                    k.copy_from_slice(normed_keys);
                }
                if let Some(moments) = &mut moments {
                    let (query, kv) = (s.query_heads * s.head_dim, s.kv_heads * s.head_dim);
                    for slice in batch.slices {
                        let rows =
                            |width: usize| slice.row * width..(slice.row + slice.len) * width;
                        let (q, k, v) = (&q[rows(query)], &k[rows(kv)], &v[rows(kv)]);
                        moments.observe(layer, slice.start, q, k, v);
                    }
                }
                cache.write(layer, batch.slices, k, v)?;
                cache.attend(layer, batch.slices, q, mixed, attention)?;
                w.o.forward(mixed, normed);
                add_normed(hidden, normed, w.post_attention_norm.as_deref(), s.norm_eps, gate);

                rms_norm_rows(hidden, &w.ffn_norm, s.norm_eps, normed);
                w.gate.forward(normed, gate);
                w.up.forward(normed, up);
                gated(s.activation, gate, up);
                w.down.forward(gate, normed);
                add_normed(hidden, normed, w.post_ffn_norm.as_deref(), s.norm_eps, up);
            }
            rms_norm_rows(hidden, &self.weights.output_norm, s.norm_eps, normed);
            Ok(())
        })
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
                for row in (0..linear.out_features()).step_by(16) {
                    update(bytemuck::cast_slice(linear.row(row)));
                }
            }
        }
        for rope in &s.ropes {
            update(format!("{rope:?}").as_bytes());
        }
    }

    /// Logits of some rows of the last forward pass. `out`: `[rows.len(), vocab]`, resized.
    ///
    /// # Panics
    /// If a row is not in the last batch.
    pub(crate) fn logits(&self, rows: &[usize], runner: &mut Runner, out: &mut Vec<f32>) {
        let width = self.spec.hidden_size;
        runner.rows.clear();
        for row in rows {
            runner.rows.extend_from_slice(&runner.normed[row * width..(row + 1) * width]);
        }
        out.resize(rows.len() * self.spec.vocab_size, 0.0);
        let head = self.weights.output.as_ref().unwrap_or(&self.weights.embedding);
        runner.threads.install(|| head.forward(&runner.rows, out));
        if let Some(cap) = self.spec.logit_cap {
            soft_cap(out, cap);
        }
    }
}

/// `hidden += norm(x)`, or `+= x` where the model has no such norm. `scratch` holds at least `x.len()`
/// elements in every model whose feed-forward layer is wider than its residual stream; it is enlarged
/// for others.
fn add_normed(
    hidden: &mut [f32],
    x: &[f32],
    norm: Option<&[f32]>,
    eps: f32,
    scratch: &mut Vec<f32>,
) {
    let Some(norm) = norm else { return add_assign(hidden, x) };
    let len = scratch.len();
    scratch.resize(len.max(x.len()), 0.0);
    rms_norm_rows(x, norm, eps, &mut scratch[..x.len()]);
    add_assign(hidden, &scratch[..x.len()]);
    scratch.truncate(len);
}
