//! DBudgetKV, now ReFreeKV (arXiv 2502.16886): each layer keeps as much as the last query's attention needs, whatever
//! the prompt.
//!
//! Positions are ranked: the first four, then the newest first. With `a_h` the last token's row of attention in query
//! head h, a layer keeps the shortest ranked beginning whose mean over heads of ‖a_h‖₂ is within the share
//! `threshold` of that of all positions. The first two layers keep everything. The sinks take most of ‖a‖ in many
//! models; `sinks=paper` counts them as the paper writes it, `sinks=apart` (the released code) always keeps them
//! and measures the norms of the rest.
//!
//! The released code repeats keys for every query head; here all KV heads of a layer keep one set of positions.

use super::options::Options;
use super::policy::{Choice, LayerView, Observed, Policy};
use crate::error::Result;

/// Leading positions that are ranked first.
const SINKS: usize = 4;

/// Leading layers that keep everything.
const WHOLE_LAYERS: usize = 2;

/// See the module's documentation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DBudget {
    /// In ten thousandths.
    threshold: u16,
    sinks_apart: bool,
}

impl DBudget {
    pub(crate) const NAME: &str = "dbudget";
    pub(crate) const USAGE: &str = "dbudget:THRESHOLD[:sinks=paper|apart]";
    /// The paper's threshold.
    pub const USUAL: Self = Self { threshold: 100, sinks_apart: false };

    pub(crate) fn parse(mut options: Options<'_>) -> Result<Self> {
        let threshold = match options.has_number() {
            true => options
                .number("a threshold from 0 to below 1", |t| (0.0..0.99995).contains(&t))
                .map(|t| (t * 10_000.0).round() as u16)?,
            false => Self::USUAL.threshold,
        };
        let sinks_apart = options.word("sinks", &["paper", "apart"])? == 1;
        options.done(Self::USAGE)?;
        Ok(Self { threshold, sinks_apart })
    }

    /// How many of the ranked positions stay. `rows`: attention by query head, `[tokens]`.
    pub(super) fn count(&self, rows: &[&[f32]], tokens: usize) -> usize {
        if self.threshold == 0 {
            return tokens;
        }
        let sinks = SINKS.min(tokens);
        let ranked = |rank: usize| if rank < sinks { rank } else { tokens - 1 - (rank - sinks) };
        let skipped = if self.sinks_apart { sinks } else { 0 };
        let norms = |end: usize, squares: &mut [f64]| {
            for (square, row) in squares.iter_mut().zip(rows) {
                *square += f64::from(row[ranked(end)]).powi(2);
            }
            squares.iter().map(|s| s.sqrt()).sum::<f64>()
        };
        let mut squares = vec![0.0; rows.len()];
        let whole = (skipped..tokens).map(|rank| norms(rank, &mut squares)).last().unwrap_or(0.0);
        let most = f64::from(self.threshold) / 10_000.0;
        squares.fill(0.0);
        for rank in skipped..tokens {
            if 1.0 - norms(rank, &mut squares) / whole <= most {
                return rank + 1;
            }
        }
        tokens
    }
}

impl std::fmt::Display for DBudget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", Self::NAME, f32::from(self.threshold) / 10_000.0)?;
        if self.sinks_apart { f.write_str(":sinks=apart") } else { Ok(()) }
    }
}

impl Policy for DBudget {
    fn observed(&self) -> Observed {
        Observed::LastByQueryHead
    }

    fn most_kept(&self, prompt: usize) -> usize {
        prompt
    }

    fn varies(&self) -> bool {
        self.threshold > 0
    }

    fn choose(&self, layer: &LayerView<'_>) -> Result<Choice> {
        let tokens = layer.tokens;
        let kept = match layer.number < WHOLE_LAYERS {
            true => tokens,
            false => {
                let rows = layer.columns.iter().flat_map(|rows| rows.chunks_exact(tokens));
                self.count(&rows.collect::<Vec<_>>(), tokens)
            }
        };
        let sinks = kept.min(SINKS);
        let positions = (0..sinks).chain(tokens - (kept - sinks)..tokens);
        Ok(Choice::alike(layer.kv_heads, positions.map(|p| p as u32).collect()))
    }
}
