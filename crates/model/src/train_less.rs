//! Training of LESS's networks (arXiv 2402.09398) on what a model computes for a corpus.

use std::sync::{Mutex, PoisonError};

use kvasir_cache::offline::{LessOptions, LessTraining, Table};

use crate::calibrate::Calibration;
use crate::decoder::Runner;
use crate::error::Result;
use crate::model::Model;

/// Most bytes of queries, keys and values at a time; the corpus is computed once for as many layers as that holds.
const SAMPLE_BYTES: usize = 1 << 30;

/// Positions that texts are shifted to, at most.
const POSITIONS: usize = 8192;

impl Model {
    /// Trains; `progress` is told (epochs of layers done, all of them).
    ///
    /// # Errors
    /// [`kvasir_cache::CacheError::Table`]: no text is long enough; rows that are not finite.
    pub(crate) fn train_less(
        &self,
        calibration: &Calibration<'_>,
        runner: &mut Runner,
        progress: &mut (dyn FnMut(usize, usize) + Send),
    ) -> Result<Table> {
        let (geometry, ropes) = self.cache_shapes(calibration.block_size)?;
        let positions = self.spec().context_length.min(POSITIONS);
        let mut training = LessTraining::new(geometry, ropes, positions, LessOptions::default());
        let texts = self.joined(calibration)?;
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let joined = Calibration { texts: &texts, ..*calibration };
        let tokens = calibration.tokens_per_text * texts.len();
        let steps = training.steps();
        progress(0, steps);
        while training.next_layers(tokens, SAMPLE_BYTES).is_some() {
            self.observe(&joined, runner, &mut training, &mut |_, _| ())?;
            let told = Mutex::new((0, &mut *progress));
            runner.threads().install(|| {
                training.train(
                    |layer| self.decoder().output_squares(layer),
                    |done| {
                        let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
                        let (last, progress) = &mut *told;
                        // Threads may come in another order than they counted.
                        *last = done.max(*last);
                        progress(*last, steps);
                    },
                )
            })?;
        }
        Ok(Table::Less(training.finish().into()))
    }

    /// Texts, each continued with others until it has as many tokens as are taken of it: what is given up of a long prompt
    /// must be learnt from long ones.
    fn joined(&self, calibration: &Calibration<'_>) -> Result<Vec<String>> {
        let texts = calibration.texts;
        let mut lengths = Vec::with_capacity(texts.len());
        for text in texts {
            lengths.push(self.tokenizer().encode(text, true)?.len());
        }
        // Neighbours are alike in kind.
        let step = texts.len() / 3 + 1;
        let join = |first: usize| {
            let (mut joined, mut tokens) = (String::new(), 0);
            for i in (0..texts.len()).map(|n| (first + n * step) % texts.len()) {
                joined.push_str(texts[i]);
                joined.push('\n');
                tokens += lengths[i];
                if tokens >= calibration.tokens_per_text {
                    break;
                }
            }
            joined
        };
        Ok((0..texts.len()).map(join).collect())
    }
}
