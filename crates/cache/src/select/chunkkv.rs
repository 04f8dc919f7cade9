//! ChunkKV (arXiv 2502.00299): whole chunks of neighbouring tokens stay, so that meaning is not cut to pieces.
//!
//! Token scores are [SnapKV's](super::SnapKv), and in the window 1 more than the highest; a chunk's is the mean of its tokens' over all KV heads of the layer, which
//! keep the same chunks. Some consecutive layers share one choice, that of the first of them (`reuse`; 1 chooses in
//! every layer). Differences: the paper does not say how many chunks stay when the share is no whole
//! number of them; here tokens are counted, and the last chunk is cut at its front, so that bytes are what was asked for
//! (kvpress keeps whole chunks, at least one). Every sequence has its own chunks.

use super::options::Options;
use super::policy::{Choice, LayerView, Observed, Policy};
use super::snapkv::window_scores;
use super::{Budget, rank};
use crate::error::Result;

/// See the module's documentation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ChunkKv {
    budget: Budget,
    chunk: u16,
    reuse: u16,
    window: u16,
    kernel: u16,
}

impl ChunkKv {
    pub(crate) const NAME: &str = "chunkkv";
    pub(crate) const USAGE: &str = "chunkkv:SHARE[:chunk=10][:reuse=2][:window=64][:kernel=5]";
    /// Half of a prompt, in the paper's chunks.
    pub const HALF: Self =
        Self { budget: Budget::HALF, chunk: 10, reuse: 2, window: 64, kernel: 5 };

    pub(crate) fn parse(mut options: Options<'_>) -> Result<Self> {
        let budget = Budget::parse(&mut options)?;
        let chunk = options.whole("chunk", Self::HALF.chunk, 1..=1024)?;
        let reuse = options.whole("reuse", Self::HALF.reuse, 1..=1024)?;
        let window = options.whole("window", Self::HALF.window, 1..=4096)?;
        let kernel = options.whole("kernel", Self::HALF.kernel, 1..=255)? | 1;
        options.done(Self::USAGE)?;
        Ok(Self { budget, chunk, reuse, window, kernel })
    }
}

impl std::fmt::Display for ChunkKv {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", Self::NAME, self.budget)?;
        let usual = Self::HALF;
        for (name, value, usual) in [
            ("chunk", self.chunk, usual.chunk),
            ("reuse", self.reuse, usual.reuse),
            ("window", self.window, usual.window),
            ("kernel", self.kernel, usual.kernel),
        ] {
            if value != usual {
                write!(f, ":{name}={value}")?;
            }
        }
        Ok(())
    }
}

impl Policy for ChunkKv {
    fn observed(&self) -> Observed {
        Observed::Last(usize::from(self.window))
    }

    fn most_kept(&self, prompt: usize) -> usize {
        self.budget.of(prompt)
    }

    fn alone(&self) -> bool {
        self.reuse <= 1
    }

    fn choose(&self, layer: &LayerView<'_>) -> Result<Choice> {
        let leader = layer.number - layer.number % usize::from(self.reuse);
        if let Some(choice) = layer.before.get(leader) {
            return Ok(choice.clone());
        }
        let mut scores = window_scores(layer, usize::from(self.window), usize::from(self.kernel));
        let finite = scores.iter().flatten().copied().filter(|score| score.is_finite());
        let window = finite.fold(0.0, f32::max) + 1.0;
        let mut sums = vec![0.0f32; layer.tokens];
        for scores in &mut scores {
            scores.iter_mut().filter(|score| score.is_infinite()).for_each(|score| *score = window);
            sums.iter_mut().zip(&*scores).for_each(|(sum, score)| *sum += score);
        }
        let size = usize::from(self.chunk);
        let means: Vec<f32> =
            sums.chunks(size).map(|c| c.iter().sum::<f32>() / c.len() as f32).collect();
        let mut order = rank::top(&means, means.len());
        order.sort_by(|a, b| means[*b as usize].total_cmp(&means[*a as usize]).then(b.cmp(a)));
        let mut left = self.most_kept(layer.tokens);
        let mut positions = Vec::with_capacity(left);
        for chunk in order {
            let begin = chunk as usize * size;
            let end = (begin + size).min(layer.tokens);
            let begin = end - left.min(end - begin);
            positions.extend((begin..end).map(|p| p as u32));
            left -= end - begin;
            if left == 0 {
                break;
            }
        }
        positions.sort_unstable();
        Ok(Choice::alike(layer.kv_heads, positions))
    }
}
