//! Perplexity of a corpus under an engine's recipe, teacher-forced in windows.

use kvasir_engine::{Engine, Request, RequestId, SamplingParams};
use serde::Serialize;

use crate::error::{EvalError, Result};

/// What was measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Perplexity {
    /// Recipe of the cache.
    pub recipe: String,
    /// Windows measured.
    pub windows: usize,
    /// Tokens predicted.
    pub tokens: usize,
    /// Mean negative log likelihood of a token, in nats.
    pub nll_mean: f64,
    /// e to that.
    pub perplexity: f64,
}

/// Cuts `texts` into windows of `window` tokens, takes up to `max_windows` of them from as many texts as
/// possible (the first window of each text, then the second, ...), and scores every token but a window's
/// first. `progress` is told (done, of).
///
/// # Errors
/// [`EvalError::TooShort`] if no text fills a window.
pub fn measure(
    engine: &mut Engine,
    texts: &[String],
    window: usize,
    max_windows: usize,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Perplexity> {
    if window < 2 || window >= engine.max_model_len() {
        return Err(EvalError::TooShort {
            what: format!(
                "a window must have 2 to {} tokens, not {window}",
                engine.max_model_len() - 1
            ),
        });
    }
    let tokenizer = std::sync::Arc::clone(engine.tokenizer());
    let texts: Vec<Vec<u32>> =
        texts.iter().map(|t| tokenizer.encode(t, true)).collect::<std::result::Result<_, _>>()?;
    let longest = texts.iter().map(|t| t.len() / window).max().unwrap_or(0);
    let windows: Vec<&[u32]> = (0..longest)
        .flat_map(|i| texts.iter().filter_map(move |t| t.get(i * window..(i + 1) * window)))
        .take(max_windows)
        .collect();
    if windows.is_empty() {
        return Err(EvalError::TooShort {
            what: format!("no text of the corpus has {window} tokens"),
        });
    }
    let (mut sum, mut tokens) = (0.0, 0);
    for (i, window) in windows.iter().enumerate() {
        let id = format!("perplexity-{i}");
        let params = SamplingParams { prompt_logprobs: Some(0), ..SamplingParams::greedy(1) };
        engine.add_request(Request {
            id: RequestId::from(id.as_str()),
            prompt: window.to_vec(),
            params: params.into(),
            cache_salt: None,
            kv_cache: None,
        })?;
        let mut found = None;
        while engine.has_unfinished() {
            for output in engine.step()?.outputs {
                found = output.prompt_logprobs.or(found);
            }
        }
        let found = found.ok_or(EvalError::NoResult { request: id })?;
        for token in found.iter().flatten() {
            sum -= f64::from(token.logprob);
            tokens += 1;
        }
        progress(i + 1, windows.len());
    }
    let nll_mean = sum / tokens.max(1) as f64;
    Ok(Perplexity {
        recipe: engine.config().kv_cache.to_string(),
        windows: windows.len(),
        tokens,
        nll_mean,
        perplexity: nll_mean.exp(),
    })
}

#[cfg(test)]
mod tests {
    use kvasir_engine::EngineConfig;
    use kvasir_model::testkit::tiny_model;

    use super::*;

    fn engine() -> Engine {
        let config = EngineConfig { threads: 1, block_size: 16, ..EngineConfig::default() };
        Engine::new(tiny_model(1), config).unwrap()
    }

    #[test]
    fn counts_windows_and_predicted_tokens() {
        let texts = ["a".repeat(70), "bc".repeat(20), "d".repeat(10)].map(String::from);
        let mut seen = Vec::new();
        let got = measure(&mut engine(), &texts, 30, 10, &mut |i, n| seen.push((i, n))).unwrap();
        assert_eq!((got.windows, got.tokens), (3, 3 * 29));
        assert_eq!(seen, [(1, 3), (2, 3), (3, 3)]);
        assert!((got.perplexity.ln() - got.nll_mean).abs() < 1e-9);
        // A random model of 258 tokens is no better than chance, and not absurdly worse.
        assert!(got.nll_mean > 2.0 && got.nll_mean < 20.0, "{}", got.nll_mean);
        // First windows of all texts before second windows of any.
        let two = measure(&mut engine(), &texts, 30, 2, &mut |_, _| {}).unwrap();
        assert_eq!(two.windows, 2);
    }

    #[test]
    fn too_little_text_is_an_error() {
        let error = measure(&mut engine(), &["ab".to_owned()], 30, 1, &mut |_, _| {}).unwrap_err();
        assert_eq!(error.to_string(), "no text of the corpus has 30 tokens");
        assert!(measure(&mut engine(), &[], 1, 1, &mut |_, _| {}).is_err());
    }
}
