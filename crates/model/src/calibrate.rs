//! Statistics of a model's keys and values: what joint recipes code against.

use kvasir_cache::stats::{Moments, STATISTICS_VERSION, Statistics};
use kvasir_cache::{BatchSlice, Recipe};

use crate::decoder::{ForwardBatch, ForwardObserver, Runner};
use crate::error::Result;
use crate::model::{CacheOptions, Model};

/// What to calibrate with.
#[derive(Debug, Clone, Copy)]
pub struct Calibration<'a> {
    /// Texts.
    pub texts: &'a [&'a str],
    /// Tokens taken of each, from its beginning.
    pub tokens_per_text: usize,
    /// Tokens per block of the caches that will use the statistics.
    pub block_size: usize,
}

impl Calibration<'_> {
    /// Enough of each embedded text: with 256 tokens of each the divergence at 2 bits was 10 % larger,
    /// and more than 512 cost time only.
    pub const TOKENS_PER_TEXT: usize = 384;

    /// The same for LESS: trained on 1,024 tokens, its networks made answers over 2,048 worse.
    pub const LESS_TOKENS_PER_TEXT: usize = 2176;
}

/// What statistics were measured on: told with them, and part of their fingerprint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CorpusInfo {
    /// As a user names it; informative.
    pub name: String,
    /// Of all texts, whole and in order.
    pub hash: [u8; 32],
    /// Most tokens taken of each text.
    pub tokens_per_text: usize,
}

impl CorpusInfo {
    /// Of a corpus under a name.
    pub fn of(name: &str, calibration: &Calibration<'_>) -> Self {
        let mut hasher = blake3::Hasher::new();
        for text in calibration.texts {
            hasher.update(blake3::hash(text.as_bytes()).as_bytes());
        }
        let hash = *hasher.finalize().as_bytes();
        Self { name: name.to_owned(), hash, tokens_per_text: calibration.tokens_per_text }
    }

    /// Identifies the statistics of a model, given by [`Model::fingerprint`], on this corpus.
    pub(crate) fn fingerprint(&self, model: &[u8; 32]) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"kvasir statistics\0");
        hasher.update(model);
        hasher.update(&self.hash);
        hasher.update(&(self.tokens_per_text as u64).to_le_bytes());
        *hasher.finalize().as_bytes()
    }
}

impl Model {
    /// Identifies what statistics must be measured on to be this model's: weights (a sample of every
    /// layer), shapes, block size and what the numbers mean. O(weights sampled).
    pub fn fingerprint(&self, block_size: usize) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"kvasir model\0");
        hasher.update(&STATISTICS_VERSION.to_le_bytes());
        hasher.update(&(block_size as u64).to_le_bytes());
        self.decoder().hash_sample(&mut |bytes| {
            hasher.update(bytes);
        });
        *hasher.finalize().as_bytes()
    }

    /// Identifies this model's statistics from a corpus: they differ where one of them differs.
    pub fn statistics_fingerprint(&self, calibration: &Calibration<'_>) -> [u8; 32] {
        CorpusInfo::of("", calibration).fingerprint(&self.fingerprint(calibration.block_size))
    }

    /// Runs the texts through the model and measures its keys, values and queries. Takes as long as
    /// prefilling them. `progress` is told (texts done, texts).
    ///
    /// # Errors
    /// Heads that joint recipes cannot hold; fewer tokens than a basis has axes; keys or values that
    /// are not finite.
    pub fn calibrate(
        &self,
        calibration: &Calibration<'_>,
        runner: &mut Runner,
        progress: &mut (dyn FnMut(usize, usize) + Send),
    ) -> Result<Statistics> {
        let (geometry, ropes) = self.cache_shapes(calibration.block_size)?;
        let mut moments = Moments::new(geometry.clone(), ropes)?;
        self.observe(calibration, runner, &mut moments, progress)?;
        let statistics = moments.finish(self.statistics_fingerprint(calibration))?;
        statistics.check(&geometry)?;
        Ok(statistics)
    }

    /// Runs the texts through the model and shows an observer the queries, keys and values of every layer.
    pub(crate) fn observe(
        &self,
        calibration: &Calibration<'_>,
        runner: &mut Runner,
        observer: &mut (dyn ForwardObserver + Send),
        progress: &mut (dyn FnMut(usize, usize) + Send),
    ) -> Result<()> {
        let block_size = calibration.block_size;
        let (geometry, _) = self.cache_shapes(block_size)?;
        let budget_bytes = 4
            * geometry.logical_bytes_per_token()
            * calibration.tokens_per_text.next_multiple_of(block_size)
            + (64 << 20);
        let options = CacheOptions { block_size, budget_bytes, ..CacheOptions::of(Recipe::F16) };
        let mut cache = self.new_cache(options)?;
        for (done, text) in calibration.texts.iter().enumerate() {
            progress(done, calibration.texts.len());
            let mut tokens = self.tokenizer().encode(text, true)?;
            tokens.truncate(calibration.tokens_per_text);
            if tokens.is_empty() {
                continue;
            }
            let sequence = cache.add_sequence(None)?;
            cache.reserve(sequence, tokens.len())?;
            let slices = [BatchSlice { sequence, row: 0, start: 0, len: tokens.len() }];
            let batch = ForwardBatch { tokens: &tokens, slices: &slices };
            self.decoder().forward(batch, None, &mut cache, runner, Some(&mut *observer))?;
            cache.commit(sequence, &tokens)?;
            cache.remove_sequence(sequence)?;
        }
        progress(calibration.texts.len(), calibration.texts.len());
        Ok(())
    }
}
