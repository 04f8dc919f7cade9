//! What is known of a request when its prompt is computed without compression.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::request::TokenId;

/// See the module's documentation. Everything is known before a token is handed out.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct PromptFeatures {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Most tokens of the answer.
    pub max_tokens: usize,
    /// Different tokens by tokens.
    pub distinct_share: f64,
    /// Log probability of the most likely first token less that of the next one.
    pub first_margin: f64,
    /// Entropy of the first token, in nats.
    pub first_entropy: f64,
    /// Entropy of the last prompt token's attention, by the largest possible: mean over heads of layers that see everything.
    pub attention_entropy: f64,
    /// What each recipe would do to the prompt's own blocks: squared error by square.
    pub coding_errors: BTreeMap<String, f64>,
}

/// What the first token's logits say.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct FirstToken {
    margin: f64,
    entropy: f64,
}

impl FirstToken {
    /// Of raw logits. O(vocab).
    pub(crate) fn new(logits: &[f32]) -> Self {
        let (mut best, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
        for logit in logits {
            if *logit > best {
                (best, second) = (*logit, best);
            } else if *logit > second {
                second = *logit;
            }
        }
        let (mut sum, mut weighted) = (0.0, 0.0);
        for logit in logits {
            let below = f64::from(logit - best);
            // Infinitely far below counts for nothing.
            if below > -80.0 {
                sum += below.exp();
                weighted += below * below.exp();
            }
        }
        let finite = |x: f64| if x.is_finite() { x } else { 0.0 };
        Self {
            margin: finite(f64::from(best - second)),
            entropy: finite(sum.ln() - weighted / sum).max(0.0),
        }
    }
}

impl PromptFeatures {
    /// Of a prompt and its first token; the others are left at 0.
    pub(crate) fn new(prompt: &[TokenId], first: FirstToken) -> Self {
        let mut sorted = prompt.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        Self {
            prompt_tokens: prompt.len(),
            distinct_share: sorted.len() as f64 / prompt.len().max(1) as f64,
            first_margin: first.margin,
            first_entropy: first.entropy,
            ..Self::default()
        }
    }

    /// Names of [`Self::numbers`].
    pub const NAMES: [&'static str; 7] = [
        "log_prompt_tokens",
        "log_max_tokens",
        "distinct_share",
        "first_margin",
        "first_tie",
        "first_entropy",
        "attention_entropy",
    ];

    /// As numbers of about one size.
    pub fn numbers(&self) -> [f64; 7] {
        [
            (self.prompt_tokens.max(1) as f64).ln(),
            (self.max_tokens.max(1) as f64).ln(),
            self.distinct_share,
            self.first_margin.min(10.0),
            // Near ties are a matter of their own.
            (-self.first_margin).exp(),
            self.first_entropy,
            self.attention_entropy,
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_tokens_by_hand() {
        let two = FirstToken::new(&[3.0, -100.0, 3.0]);
        assert_eq!(two.margin, 0.0);
        assert!((two.entropy - 2f64.ln()).abs() < 1e-9);
        let sure = FirstToken::new(&[8.0, 0.0, f32::NEG_INFINITY]);
        assert_eq!(sure.margin, 8.0);
        // p = 1 / (1 + e⁻⁸)
        let p = 1.0 / (1.0 + (-8f64).exp());
        assert!((sure.entropy + p * p.ln() + (1.0 - p) * (1.0 - p).ln()).abs() < 1e-9);
        for odd in [&[][..], &[1.0], &[f32::NAN, f32::NAN]] {
            let found = FirstToken::new(odd);
            assert_eq!((found.margin, found.entropy), (0.0, 0.0), "{odd:?}");
        }
    }

    #[test]
    fn features_by_hand() {
        let first = FirstToken { margin: 0.5, entropy: 1.0 };
        let found = PromptFeatures::new(&[1, 0, 1, 2], first);
        assert_eq!((found.prompt_tokens, found.distinct_share), (4, 0.75));
        assert_eq!((found.first_margin, found.first_entropy), (0.5, 1.0));
        assert_eq!(found.numbers()[4], (-0.5f64).exp());
        assert!(PromptFeatures::default().numbers().iter().all(|x| x.is_finite()));
    }
}
