//! Speed of one sequence: prompts of given lengths, and generation after an empty context, as
//! `llama-bench` measures them.

use std::time::Instant;

use kvasir_engine::{Engine, Request, RequestId, SamplingParams};
use serde::Serialize;

use crate::error::Result;

/// One measurement, repeated.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Test {
    /// `pp512`: a prompt of 512 tokens; `tg128`: 128 tokens generated.
    pub name: String,
    /// Median over the runs.
    pub tokens_per_second: f64,
    /// Every run, in order.
    pub runs: Vec<f64>,
}

/// What to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Time from adding a prompt of this many tokens to its first output token.
    Prompt(usize),
    /// Time between the first output token and the last of this many more.
    Generation(usize),
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Prompt(n) => write!(f, "pp{n}"),
            Self::Generation(n) => write!(f, "tg{n}"),
        }
    }
}

/// Runs every test once to warm up and `repetitions` times to count, interleaved (a, b, a, b), so that a
/// drifting machine slows all alike. The prefix cache is emptied between runs.
///
/// # Errors
/// Lengths the engine refuses.
pub fn measure(
    engine: &mut Engine,
    kinds: &[Kind],
    repetitions: usize,
    seed: u64,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<Test>> {
    let mut tests: Vec<Test> = kinds
        .iter()
        .map(|k| Test { name: k.to_string(), tokens_per_second: 0.0, runs: Vec::new() })
        .collect();
    let total = kinds.len() * (repetitions + 1);
    for repetition in 0..=repetitions {
        for (i, kind) in kinds.iter().enumerate() {
            let speed =
                run(engine, *kind, seed.wrapping_add((repetition * kinds.len() + i) as u64))?;
            if repetition > 0 {
                tests[i].runs.push(speed);
            }
            progress(repetition * kinds.len() + i + 1, total);
        }
    }
    for test in &mut tests {
        test.tokens_per_second = median(&test.runs);
    }
    Ok(tests)
}

fn run(engine: &mut Engine, kind: Kind, seed: u64) -> Result<f64> {
    engine.reset_prefix_cache()?;
    let (prompt_len, max_tokens) = match kind {
        Kind::Prompt(n) => (n, 1),
        Kind::Generation(n) => (1, n + 1),
    };
    let params = SamplingParams { ignore_eos: true, ..SamplingParams::greedy(max_tokens) };
    let prompt = random_tokens(prompt_len, engine.model().spec().vocab_size, seed);
    let id = RequestId::from("latency");
    let start = Instant::now();
    engine.add_request(Request {
        id,
        prompt,
        params: params.into(),
        cache_salt: None,
        kv_cache: None,
    })?;
    let mut first = None;
    while engine.has_unfinished() {
        let step = engine.step()?;
        if first.is_none() && !step.outputs.is_empty() {
            first = Some(Instant::now());
        }
    }
    let end = Instant::now();
    let first = first.unwrap_or(end);
    Ok(match kind {
        Kind::Prompt(n) => n as f64 / (first - start).as_secs_f64(),
        Kind::Generation(n) => n as f64 / (end - first).as_secs_f64(),
    })
}

/// The same tokens for the same seed on every machine.
pub(crate) fn random_tokens(n: usize, vocab_size: usize, seed: u64) -> Vec<u32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % vocab_size as u64) as u32
    };
    std::iter::repeat_with(next).take(n).collect()
}

/// The middle value, or the mean of the middle two; 0 of nothing.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use kvasir_engine::EngineConfig;
    use kvasir_model::testkit::tiny_model;

    use super::*;

    #[test]
    fn names_runs_and_medians() {
        let config = EngineConfig { threads: 1, block_size: 16, ..EngineConfig::default() };
        let mut engine = Engine::new(tiny_model(1), config).unwrap();
        let mut ticks = 0;
        let kinds = [Kind::Prompt(40), Kind::Generation(5)];
        let tests = measure(&mut engine, &kinds, 3, 0, &mut |_, _| ticks += 1).unwrap();
        assert_eq!(tests.iter().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["pp40", "tg5"]);
        assert!(tests.iter().all(|t| t.runs.len() == 3 && t.runs.iter().all(|r| *r > 0.0)));
        assert_eq!(tests[0].tokens_per_second, median(&tests[0].runs));
        assert_eq!(ticks, 8);
        // A prompt the model cannot take is the engine's error.
        assert!(measure(&mut engine, &[Kind::Prompt(5000)], 1, 0, &mut |_, _| {}).is_err());
    }

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[]), 0.0);
    }

    #[test]
    fn a_seed_gives_the_same_tokens() {
        assert_eq!(random_tokens(50, 100, 7), random_tokens(50, 100, 7));
        assert_ne!(random_tokens(50, 100, 7), random_tokens(50, 100, 8));
        assert!(random_tokens(500, 100, 7).iter().all(|t| *t < 100));
    }
}
