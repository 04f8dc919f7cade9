//! The search of KVSharer (arXiv 2410.18517): which layers may read another's keys and values.
//!
//! Pairs of layers are tried in order of falling distance between their mean keys and values. One is accepted if the
//! model's last hidden states still point where they did, by a mean cosine above one half, with all pairs accepted so
//! far in force. Differences from the released code: pieces of text all have one length (there, others are skipped in silence
//! and counted), and the search goes on to half of the layers, so that one table serves every share from there on.

use kvasir_cache::offline::{KvSharerTable, Method, Table, Tables};
use kvasir_cache::{BatchSlice, CacheError, Recipe};

use crate::calibrate::Calibration;
use crate::decoder::{ForwardBatch, ForwardObserver, Runner};
use crate::error::Result;
use crate::model::{CacheOptions, Model};

/// Pieces of text, and tokens of each.
const PIECES: usize = 30;
const PIECE_TOKENS: usize = 64;

/// Least mean cosine of hidden states.
const LEAST_COSINE: f64 = 0.5;

/// Sums of keys and values by layer and position.
struct Sums {
    layers: Vec<[Vec<f32>; 2]>,
}

impl ForwardObserver for Sums {
    fn observe(&mut self, layer: usize, _start: usize, _q: &[f32], k: &[f32], v: &[f32]) {
        for (sums, x) in self.layers[layer].iter_mut().zip([k, v]) {
            sums.resize(x.len(), 0.0);
            sums.iter_mut().zip(x).for_each(|(sum, x)| *sum += x);
        }
    }
}

impl Model {
    /// Searches; `progress` is told (pairs accepted, pairs wanted).
    ///
    /// # Errors
    /// [`CacheError::Table`] for a corpus without a single piece.
    pub(crate) fn search_shared_layers(
        &self,
        calibration: &Calibration<'_>,
        runner: &mut Runner,
        progress: &mut (dyn FnMut(usize, usize) + Send),
    ) -> Result<Table> {
        let (geometry, _) = self.cache_shapes(calibration.block_size)?;
        let layers = geometry.layers().len();
        let pieces = self.pieces(calibration)?;
        let mut sums = Sums { layers: vec![[Vec::new(), Vec::new()]; layers] };
        let mut table = KvSharerTable { layers, pairs: Vec::new() };
        let whole = self.hidden_states(&pieces, &table, calibration, runner, Some(&mut sums))?;
        // Pieces are equally many for all, so sums are in the order of means.
        let by = 1.0 / (pieces.len() / PIECE_TOKENS) as f32;
        sums.layers.iter_mut().flatten().flatten().for_each(|x| *x *= by);
        let most = layers / 2;
        progress(0, most);
        for (layer, other) in KvSharerTable::candidates(&sums.layers, &geometry) {
            if table.pairs.len() == most {
                break;
            }
            if table.pairs.iter().any(|(replaced, _)| *replaced == layer) {
                continue;
            }
            table.pairs.push((layer, other));
            let hidden = self.hidden_states(&pieces, &table, calibration, runner, None)?;
            if mean_cosine(&whole, &hidden, self.spec().hidden_size) <= LEAST_COSINE {
                table.pairs.pop();
            }
            progress(table.pairs.len(), most);
        }
        Ok(Table::KvSharer(table.into()))
    }

    /// Tokens of all pieces, one after another: the first of every text, then the second of every text, …
    fn pieces(&self, calibration: &Calibration<'_>) -> Result<Vec<u32>> {
        let mut texts = Vec::new();
        for text in calibration.texts {
            let mut tokens = self.tokenizer().encode(text, true)?;
            tokens.truncate(calibration.tokens_per_text);
            texts.push(tokens);
        }
        let longest = texts.iter().map(Vec::len).max().unwrap_or(0);
        let nth = |n: usize| {
            texts.iter().filter_map(move |t| t.get(n * PIECE_TOKENS..(n + 1) * PIECE_TOKENS))
        };
        let pieces: Vec<u32> =
            (0..longest / PIECE_TOKENS).flat_map(nth).take(PIECES).flatten().copied().collect();
        if pieces.is_empty() {
            let what = format!("no text of the corpus has {PIECE_TOKENS} tokens");
            return Err(CacheError::Table { method: Method::KvSharer.name(), what }.into());
        }
        Ok(pieces)
    }

    /// Last hidden states of every token with a table's pairs in force, `[tokens, hidden]`.
    fn hidden_states(
        &self,
        pieces: &[u32],
        table: &KvSharerTable,
        calibration: &Calibration<'_>,
        runner: &mut Runner,
        observer: Option<&mut (dyn ForwardObserver + Send)>,
    ) -> Result<Vec<f32>> {
        // The largest share that replaces so many.
        let gone = (1000 * table.pairs.len()).div_ceil(table.layers.max(1));
        let mut tables = Tables::default();
        tables.add(Table::KvSharer(table.clone().into()));
        let recipe: Recipe = match table.pairs.is_empty() {
            true => Recipe::F16,
            false => format!("kvsharer:{}", (1000 - gone) as f32 / 1000.0).parse()?,
        };
        let options = CacheOptions {
            block_size: calibration.block_size,
            tables,
            budget_bytes: 1 << 40,
            ..CacheOptions::of(recipe)
        };
        let mut cache = self.new_cache(options)?;
        let mut slices = Vec::new();
        for (i, piece) in pieces.chunks_exact(PIECE_TOKENS).enumerate() {
            let sequence = cache.add_sequence(None)?;
            cache.reserve(sequence, piece.len())?;
            let row = i * PIECE_TOKENS;
            slices.push(BatchSlice { sequence, row, start: 0, len: piece.len() });
        }
        let batch = ForwardBatch { tokens: pieces, slices: &slices };
        self.decoder().forward(batch, None, &mut cache, runner, observer)?;
        Ok(runner.hidden().to_vec())
    }
}

fn mean_cosine(a: &[f32], b: &[f32], width: usize) -> f64 {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
    };
    let rows = a.chunks_exact(width).zip(b.chunks_exact(width));
    let cosines = rows.map(|(a, b)| dot(a, b) / (dot(a, a) * dot(b, b)).sqrt().max(1e-30));
    cosines.sum::<f64>() * width as f64 / a.len().max(1) as f64
}
