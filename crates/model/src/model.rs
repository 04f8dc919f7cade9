//! A model ready to run: decoder, tokenizer, chat template, from a GGUF file or a safetensors folder.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kvasir_cache::offline::Tables;
use kvasir_cache::stats::Statistics;
use kvasir_cache::{CacheConfig, Geometry, KvCache, LayerGeometry, Recipe, Sharing};
use kvasir_kernels::{Products, RopeTable, Threads, log_sum_exp, parallel_zip};

use crate::arch::{self, Config, DecoderSpec};
use crate::chat_template::ChatTemplate;
use crate::decoder::{Decoder, ForwardBatch, Runner};
use crate::dequant::Quantize;
use crate::error::{ModelError, Result};
use crate::file_bytes::Access;
use crate::gguf::GgufFile;
use crate::safetensors_dir::SafetensorsDir;
use crate::source::TensorSource;
use crate::tokenizer::Tokenizer;
use crate::weight_form::Dtype;
use crate::weights::{ReadOptions, Weights};

/// How to load a model.
#[derive(Clone, Copy, Default)]
pub struct LoadOptions<'a> {
    /// Threads that dequantise; 0 is one per processor.
    pub threads: usize,
    /// In what form weights are held.
    pub dtype: Dtype,
    /// What weights become that are floats in the file.
    pub quantize: Option<Quantize>,
    /// How tensors come into memory.
    pub access: Access,
    /// Whether all weights are to be in memory, none looked up in a mapped file: see [`Model::lock_weights`].
    pub resident: bool,
    /// Told (layers read, layers) from any thread.
    pub progress: Option<&'a (dyn Fn(usize, usize) + Sync)>,
}

impl std::fmt::Debug for LoadOptions<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LoadOptions")
            .field("threads", &self.threads)
            .field("dtype", &self.dtype)
            .field("quantize", &self.quantize)
            .field("access", &self.access)
            .field("resident", &self.resident)
            .finish_non_exhaustive()
    }
}

/// What [`Model::new_cache`] makes.
#[derive(Debug, Clone)]
pub struct CacheOptions {
    /// How sequences are stored that do not say otherwise.
    pub recipe: Recipe,
    /// Tokens in a block.
    pub block_size: usize,
    /// Most bytes.
    pub budget_bytes: usize,
    /// Whether equal prefixes share blocks.
    pub prefix_caching: bool,
    /// What joint recipes need.
    pub statistics: Option<Arc<Statistics>>,
    /// What methods need that say so.
    pub tables: Tables,
    /// Which blocks are shared beside equal prefixes.
    pub sharing: Sharing,
}

impl CacheOptions {
    /// Blocks of 32 tokens, 256 MiB, no prefix caching, no statistics.
    pub fn of(recipe: Recipe) -> Self {
        Self {
            recipe,
            block_size: 32,
            budget_bytes: 256 << 20,
            prefix_caching: false,
            statistics: None,
            tables: Tables::default(),
            sharing: Sharing::OFF,
        }
    }
}

/// See the module's documentation. Immutable; share it in an [`Arc`].
#[derive(Debug)]
pub struct Model {
    decoder: Decoder,
    tokenizer: Arc<Tokenizer>,
    chat_template: Arc<ChatTemplate>,
    /// What attention's products are of.
    products: Products,
}

impl Model {
    /// Loads a GGUF file or a safetensors folder (config.json, tokenizer.json, `*.safetensors`).
    ///
    /// # Errors
    /// Any [`ModelError`], naming what in the file is wrong.
    pub fn load(path: &Path, options: &LoadOptions<'_>) -> Result<Self> {
        if path.is_dir() {
            let dir = SafetensorsDir::open_as(path, options.access)?;
            let tokenizer = Tokenizer::from_dir(path)?;
            let config = Config::Hf { json: dir.config(), tensors: &dir };
            let model = Self::build(&config, &dir, tokenizer, options)?;
            dir.release_pages();
            Ok(model)
        } else {
            let mut file = GgufFile::open_as(path, options.access)?;
            let tokenizer = gguf_tokenizer(&file)?;
            file.forget_vocabulary();
            let config = Config::Gguf { metadata: file.metadata(), tensors: &file };
            let model = Self::build(&config, &file, tokenizer, options)?;
            file.release_pages();
            Ok(model)
        }
    }

    /// Loads from an open GGUF file.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn from_gguf(file: &GgufFile, options: &LoadOptions<'_>) -> Result<Self> {
        let config = Config::Gguf { metadata: file.metadata(), tensors: file };
        Self::build(&config, file, gguf_tokenizer(file)?, options)
    }

    fn build(
        config: &Config<'_>,
        source: &dyn TensorSource,
        tokenizer: Tokenizer,
        options: &LoadOptions<'_>,
    ) -> Result<Self> {
        let spec = arch::spec(config)?;
        if tokenizer.vocab_size() > spec.vocab_size {
            return Err(ModelError::Tokenizer {
                what: format!(
                    "{} tokens, but the embedding table has {} rows",
                    tokenizer.vocab_size(),
                    spec.vocab_size
                ),
            });
        }
        let chat_template = ChatTemplate::for_tokenizer(&tokenizer)?;
        let threads = Threads::new(options.threads)
            .map_err(|error| ModelError::Unsupported { what: error.to_string() })?;
        let (done, layers) = (AtomicUsize::new(0), spec.layers.len());
        let progress = || {
            let done = done.fetch_add(1, Ordering::Relaxed) + 1;
            if let Some(progress) = options.progress {
                progress(done, layers);
            }
        };
        let read = ReadOptions::of(options);
        let weights =
            threads.install(|| Weights::read(&spec, source, config.is_gguf(), read, &progress))?;
        Ok(Self {
            decoder: Decoder { spec, weights },
            tokenizer: Arc::new(tokenizer),
            chat_template: Arc::new(chat_template),
            products: match options.dtype {
                Dtype::Float32 => Products::F32,
                Dtype::Auto | Dtype::Bfloat16 => Products::Bf16,
            },
        })
    }

    /// Sizes and architecture.
    pub fn spec(&self) -> &DecoderSpec {
        &self.decoder.spec
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// The chat template.
    pub fn chat_template(&self) -> &Arc<ChatTemplate> {
        &self.chat_template
    }

    /// What weights are multiplied as: `codes × bytes`.
    pub fn weight_form(&self) -> String {
        self.decoder.weights.form()
    }

    /// Bytes of the weights as held in memory.
    pub fn weight_bytes(&self) -> usize {
        self.decoder.weights.num_bytes()
    }

    /// Keeps the weights in memory, whatever else wants it. Of what is looked up in a mapped file nothing is kept ([`LoadOptions::resident`]).
    ///
    /// # Errors
    /// What the operating system says: on Linux mostly that `ulimit -l` is too low.
    pub fn lock_weights(&self) -> std::io::Result<()> {
        self.decoder.weights.lock()
    }

    pub(crate) fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// Shapes of a cache, and the RoPE tables it names.
    pub(crate) fn cache_shapes(&self, block_size: usize) -> Result<(Geometry, Vec<RopeTable>)> {
        let s = self.spec();
        let layer = |l: &arch::LayerSpec| LayerGeometry {
            query_heads: s.query_heads,
            kv_heads: s.kv_heads,
            head_dim: s.head_dim,
            // A window of the whole context is none.
            window: l.window.filter(|w| *w < s.context_length),
            rope: l.rope,
            score_scale: s.score_scale,
            score_cap: s.score_cap,
        };
        let geometry = Geometry::new(s.layers.iter().map(layer).collect(), block_size)?;
        let ropes = s.ropes.iter().map(|r| RopeTable::new(s.head_dim, r.base, &r.scaling, 1));
        Ok((geometry, ropes.collect()))
    }

    /// An empty cache of this model's shapes.
    ///
    /// # Errors
    /// Shapes or a block size that the cache cannot hold; a recipe that needs statistics without them.
    pub fn new_cache(&self, options: CacheOptions) -> Result<KvCache> {
        let (geometry, ropes) = self.cache_shapes(options.block_size)?;
        let CacheOptions {
            recipe, budget_bytes, prefix_caching, statistics, tables, sharing, ..
        } = options;
        Ok(KvCache::new(CacheConfig {
            geometry,
            ropes,
            recipe,
            statistics,
            tables,
            sharing,
            products: self.products,
            budget_bytes,
            prefix_caching,
        })?)
    }

    /// Runs one flat batch through all layers; see [`ForwardBatch`]. The caller has reserved the tokens
    /// in the cache, and commits them afterwards. Hidden states stay in the runner for
    /// [`Self::logits`].
    ///
    /// # Errors
    /// Tokens outside the vocabulary; tokens the cache has no room reserved for.
    pub fn forward(
        &self,
        batch: ForwardBatch<'_>,
        cache: &mut KvCache,
        runner: &mut Runner,
    ) -> Result<()> {
        self.decoder.forward(batch, None, cache, runner, None)
    }

    /// [`Self::forward`], of which only the `wanted` rows (in order, each once) have hidden states and [`Self::logits`] afterwards: the
    /// same bits, and less work in the last layer.
    ///
    /// # Errors
    /// As [`Self::forward`].
    ///
    /// # Panics
    /// If a row is not in the batch.
    pub fn forward_for(
        &self,
        wanted: &[usize],
        batch: ForwardBatch<'_>,
        cache: &mut KvCache,
        runner: &mut Runner,
    ) -> Result<()> {
        self.decoder.forward(batch, Some(wanted), cache, runner, None)
    }

    /// Sum of the negative log likelihoods, in nats, of tokens after rows of the runner's last batch: `(row, token)`.
    /// O(rows · vocab · hidden).
    ///
    /// # Panics
    /// If a row is not in the last batch, or a token not in the vocabulary.
    pub fn nll(&self, next: &[(usize, u32)], runner: &mut Runner) -> f64 {
        // Logits of so many at a time.
        const ROWS: usize = 64;
        let vocab_size = self.spec().vocab_size;
        let (mut sum, mut logits) = (0.0, Vec::new());
        for next in next.chunks(ROWS) {
            let rows: Vec<usize> = next.iter().map(|(row, _)| *row).collect();
            self.logits(&rows, runner, &mut logits);
            let mut nll = vec![0.0; next.len()];
            let of = |at: usize, _: usize, logits: &mut [f32], nll: &mut [f64]| {
                nll[0] = log_sum_exp(logits) - f64::from(logits[next[at].1 as usize]);
            };
            runner
                .threads()
                .run(|| parallel_zip((&mut logits[..], vocab_size), (&mut nll[..], 1), of));
            sum += nll.iter().sum::<f64>();
        }
        sum
    }

    /// Logits of some rows of the runner's last batch. `out`: `[rows.len(), vocab_size]`, resized.
    ///
    /// # Panics
    /// If a row is not in the last batch.
    pub fn logits(&self, rows: &[usize], runner: &mut Runner, out: &mut Vec<f32>) {
        self.decoder.logits(rows, runner, out);
    }
}

/// The tokenizer of a file whose architecture is known: an unknown one says more than what its tokenizer lacks.
fn gguf_tokenizer(file: &GgufFile) -> Result<Tokenizer> {
    arch::spec(&Config::Gguf { metadata: file.metadata(), tensors: file })?;
    Tokenizer::from_gguf(file.metadata())
}
