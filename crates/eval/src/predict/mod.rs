//! What can be said of a request's answer when its prompt is computed: how long it will be, and whether a recipe will spoil it.
//!
//! Features are of what is known then: the prompt, the distribution of the first token, what was allowed. Models are
//! linear (logistic for risks), trained on a run's answers, and judged on samples that they have not seen: all
//! recipes' answers to one sample are in one fold. Beside every model stands the constant: what is right for a recipe on average.

mod logistic;
mod risk;

pub use risk::{LengthAccuracy, Prediction, RiskAccuracy};
pub(crate) use risk::{lengths, risks};

use serde::{Deserialize, Serialize};

/// What is known of a request when its prompt is computed without compression.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PromptFeatures {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Different tokens by tokens.
    pub distinct_share: f64,
    /// Most tokens of the answer.
    pub max_tokens: usize,
    /// Log probability of the most likely first token less that of the next one.
    pub first_margin: f64,
    /// Entropy of the first token over its most likely alternatives, in nats.
    pub first_entropy: f64,
}

impl PromptFeatures {
    /// Alternatives of the first token that are looked at.
    pub const ALTERNATIVES: usize = 20;

    /// `top`: log probabilities of the most likely first tokens, best first.
    pub fn new(prompt: &[u32], max_tokens: usize, top: &[f32]) -> Self {
        let mut sorted = prompt.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        let at = |i: usize| top.get(i).map_or(f64::NEG_INFINITY, |x| f64::from(*x));
        let margin = at(0) - at(1);
        Self {
            prompt_tokens: prompt.len(),
            distinct_share: sorted.len() as f64 / prompt.len().max(1) as f64,
            max_tokens,
            first_margin: if margin.is_finite() { margin } else { 0.0 },
            first_entropy: -top.iter().map(|x| f64::from(*x)).map(|x| x * x.exp()).sum::<f64>(),
        }
    }

    /// As numbers of about one size.
    pub(crate) fn numbers(&self) -> Vec<f64> {
        vec![
            (self.prompt_tokens.max(1) as f64).ln(),
            self.distinct_share,
            (self.max_tokens.max(1) as f64).ln(),
            self.first_margin.min(10.0),
            // Near ties are a matter of their own.
            (-self.first_margin).exp(),
            self.first_entropy,
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_by_hand() {
        let half = 0.5f32.ln();
        let found = PromptFeatures::new(&[1, 2, 1, 3], 9, &[half, half]);
        assert_eq!((found.prompt_tokens, found.distinct_share, found.first_margin), (4, 0.75, 0.0));
        assert!((found.first_entropy - 2f64.ln()).abs() < 1e-6);
        let sure = PromptFeatures::new(&[1], 9, &[0.0, -8.0]);
        assert_eq!(sure.first_margin, 8.0);
        assert_eq!(PromptFeatures::new(&[], 9, &[]).first_margin, 0.0);
    }
}
