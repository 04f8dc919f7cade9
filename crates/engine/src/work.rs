//! What a step has to compute, in counts that its time depends on.

/// One step's work. Times of steps are predicted from it (`kvasir profile`), so every count is known before the step is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StepWork {
    /// Tokens that go through the model.
    pub rows: usize,
    /// Rows whose logits are computed.
    pub logit_rows: usize,
    /// Sequences with tokens in the step.
    pub sequences: usize,
    /// Pairs of a query and a key of sequences with several tokens in the step.
    pub prefill_pairs: usize,
    /// Tokens of context that those sequences read, each once.
    pub prefill_context: usize,
    /// Tokens of context that sequences with one token in the step read.
    pub decode_context: usize,
    /// Blocks that become full, the same for all layers.
    pub sealed_blocks: usize,
    /// Tokens of the prompts that the step completes.
    pub completed_tokens: usize,
}

impl StepWork {
    /// Names of [`Self::counts`].
    pub const NAMES: [&'static str; 8] = [
        "rows",
        "logit_rows",
        "sequences",
        "prefill_pairs",
        "prefill_context",
        "decode_context",
        "sealed_blocks",
        "completed_tokens",
    ];

    /// All counts, in the order of [`Self::NAMES`].
    pub fn counts(&self) -> [usize; 8] {
        [
            self.rows,
            self.logit_rows,
            self.sequences,
            self.prefill_pairs,
            self.prefill_context,
            self.decode_context,
            self.sealed_blocks,
            self.completed_tokens,
        ]
    }

    /// The inverse of [`Self::counts`].
    pub fn from_counts(counts: [usize; 8]) -> Self {
        let [
            rows,
            logit_rows,
            sequences,
            prefill_pairs,
            prefill_context,
            decode_context,
            sealed_blocks,
            completed_tokens,
        ] = counts;
        Self {
            rows,
            logit_rows,
            sequences,
            prefill_pairs,
            prefill_context,
            decode_context,
            sealed_blocks,
            completed_tokens,
        }
    }

    /// Adds `len` tokens of a sequence, from position `start`.
    pub fn add(&mut self, start: usize, len: usize, prompt_len: usize, block_size: usize) {
        let end = start + len;
        self.rows += len;
        self.sequences += 1;
        if len == 1 {
            self.decode_context += end;
        } else {
            self.prefill_pairs += len * start + len * (len + 1) / 2;
            self.prefill_context += end;
        }
        self.sealed_blocks += end / block_size.max(1) - start / block_size.max(1);
        if start < prompt_len && prompt_len <= end {
            self.completed_tokens += prompt_len;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_by_hand() {
        let mut work = StepWork::default();
        // Positions 30 to 33 of a prompt of 34: the last four queries see 31, 32, 33 and 34 keys.
        work.add(30, 4, 34, 32);
        work.add(63, 1, 20, 32);
        let expected = StepWork {
            rows: 5,
            logit_rows: 0,
            sequences: 2,
            prefill_pairs: 130,
            prefill_context: 34,
            decode_context: 64,
            sealed_blocks: 2,
            completed_tokens: 34,
        };
        assert_eq!(work, expected);
        assert_eq!(StepWork::from_counts(work.counts()), work);
    }
}
