//! Speed of a step: prompts of given lengths, generation after an empty context, and generation of many
//! sequences together at a given context, as `llama-bench` and `llama-batched-bench` measure them.

use std::time::Instant;

use kvasir_engine::{Engine, EngineConfig, Request, RequestId, SamplingParams};
use kvasir_model::arch::DecoderSpec;
use serde::Serialize;

use crate::error::{EvalError, Result};
use crate::percentiles::median;
use crate::random::random_tokens;

/// One measurement, repeated.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Test {
    /// `pp512`: a prompt of 512 tokens; `tg128`: 128 tokens generated; `tg48@512x32`: 48 tokens of each of
    /// 32 sequences at 512 tokens of context.
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
    /// Time for `tokens` more tokens of each of `num_seqs` sequences, from when all have `context` tokens of
    /// context and their first output token. Speed is that of all together.
    Decode {
        /// Sequences.
        num_seqs: usize,
        /// Tokens of context at the start.
        context: usize,
        /// Tokens generated for each.
        tokens: usize,
    },
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Prompt(n) => write!(f, "pp{n}"),
            Self::Generation(n) => write!(f, "tg{n}"),
            Self::Decode { num_seqs, context, tokens } => {
                write!(f, "tg{tokens}@{context}x{num_seqs}")
            }
        }
    }
}

/// Raises limits of `config` to what decode tests among `kinds` need, and turns the prefix cache on for them;
/// what is enough stays.
pub fn make_room(config: &mut EngineConfig, kinds: &[Kind], spec: &DecoderSpec) {
    let bytes_per_token = spec.layers.len() * spec.kv_heads * spec.head_dim * 2 * size_of::<u16>();
    for kind in kinds {
        let Kind::Decode { num_seqs, context, tokens } = *kind else { continue };
        let block_size = config.block_size.max(1);
        let blocks = context.div_ceil(block_size) + tokens.div_ceil(block_size) + 1;
        // Twice for f32, and half as much again for tables, tails and slabs that are not full. A budget is
        // a bound: memory that is not needed is not taken.
        let bytes = [num_seqs, blocks, block_size, bytes_per_token, 3];
        let bytes = bytes.into_iter().fold(1, usize::saturating_mul);
        config.kv_cache_memory = config.kv_cache_memory.max(bytes);
        config.max_num_seqs = config.max_num_seqs.max(num_seqs);
        config.max_num_batched_tokens = config.max_num_batched_tokens.max(num_seqs);
        config.enable_prefix_caching = true;
    }
}

/// Runs every test once to warm up and `repetitions` times to count, interleaved (a, b, a, b), so that a
/// drifting machine slows all alike. The prefix cache is emptied between runs.
///
/// # Errors
/// Lengths the engine refuses; sequences that do not fit together (see [`make_room`]).
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
    let vocab_size = engine.model().spec().vocab_size;
    match kind {
        Kind::Prompt(n) => {
            let times = generate(engine, &[random_tokens(n, vocab_size, seed)], 1)?;
            Ok(n as f64 / (times.all_started - times.start).as_secs_f64())
        }
        Kind::Generation(n) => {
            let times = generate(engine, &[random_tokens(1, vocab_size, seed)], n + 1)?;
            Ok(n as f64 / (times.end - times.all_started).as_secs_f64())
        }
        Kind::Decode { num_seqs, context, tokens } => {
            // Whole blocks are found again below, so that what is left of each prompt is one token and all
            // sequences start in one step: none gets ahead while the prompts of others are computed.
            let block_size = engine.config().block_size;
            let len = context.next_multiple_of(block_size) + 1;
            let of = |i| random_tokens(len, vocab_size, seed.wrapping_mul(1 << 20).wrapping_add(i));
            let prompts: Vec<Vec<u32>> = (1..=num_seqs as u64).map(of).collect();
            for prompt in &prompts {
                generate(engine, std::slice::from_ref(prompt), 1)?;
            }
            // A policy must see the last queries of a prompt, or all of them: then sequences start one after another, and
            // the first go on while the last are computed.
            let chooses = engine.config().kv_cache.waits_for_prompt();
            let lead = match chooses {
                true => num_seqs * len / engine.config().max_num_batched_tokens + num_seqs + 2,
                false => 0,
            };
            let times = generate_steps(engine, &prompts, tokens + 1 + lead, tokens)?;
            if times.generated_before != num_seqs && !chooses {
                let what = format!(
                    "{kind}: the sequences did not start together: the cache, the batch or the \
                     tokens of a step do not hold {num_seqs} of them"
                );
                return Err(EvalError::Settings { what });
            }
            Ok((num_seqs * tokens) as f64 / (times.end - times.all_started).as_secs_f64())
        }
    }
}

/// When what happened to requests that were added together.
struct Times {
    start: Instant,
    /// All have their first output token.
    all_started: Instant,
    /// Output tokens of all at that time.
    generated_before: usize,
    end: Instant,
}

/// Runs `prompts` to `max_tokens` output tokens each.
fn generate(engine: &mut Engine, prompts: &[Vec<u32>], max_tokens: usize) -> Result<Times> {
    generate_steps(engine, prompts, max_tokens, usize::MAX)
}

/// The same, but for no more than `steps` steps after all have their first output token.
fn generate_steps(
    engine: &mut Engine,
    prompts: &[Vec<u32>],
    max_tokens: usize,
    steps: usize,
) -> Result<Times> {
    let params = SamplingParams { ignore_eos: true, ..SamplingParams::greedy(max_tokens) };
    let requests = prompts.iter().enumerate().map(|(i, prompt)| Request {
        id: RequestId::from(format!("latency {i}").as_str()),
        prompt: prompt.clone(),
        params: params.clone().into(),
        cache_salt: None,
        kv_cache: None,
    });
    let requests: Vec<Request> = requests.collect();
    let ids: Vec<RequestId> = requests.iter().map(|r| r.id.clone()).collect();
    let start = Instant::now();
    for request in requests {
        engine.add_request(request)?;
    }
    let (mut all_started, mut generated_before, mut started, mut steps_left) = (None, 0, 0, steps);
    while engine.has_unfinished() && steps_left > 0 {
        steps_left -= usize::from(all_started.is_some());
        let step = engine.step()?;
        if all_started.is_none() {
            generated_before += step.outputs.len();
            started += step.outputs.iter().filter(|o| o.num_output_tokens == 1).count();
            if started == prompts.len() {
                all_started = Some(Instant::now());
            }
        }
    }
    let end = Instant::now();
    for id in &ids {
        engine.abort(id)?;
    }
    Ok(Times { start, all_started: all_started.unwrap_or(end), generated_before, end })
}

#[cfg(test)]
mod tests {
    use kvasir_model::testkit::tiny_model;

    use super::*;

    fn config() -> EngineConfig {
        EngineConfig { threads: 1, block_size: 16, ..EngineConfig::default() }
    }

    #[test]
    fn names_runs_and_medians() {
        let mut engine = Engine::new(tiny_model(1), config()).unwrap();
        let mut ticks = 0;
        let decode = Kind::Decode { num_seqs: 3, context: 40, tokens: 4 };
        let kinds = [Kind::Prompt(40), Kind::Generation(5), decode];
        let tests = measure(&mut engine, &kinds, 3, 0, &mut |_, _| ticks += 1).unwrap();
        let names: Vec<_> = tests.iter().map(|t| t.name.as_str()).collect();
        assert_eq!(names, ["pp40", "tg5", "tg4@40x3"]);
        assert!(tests.iter().all(|t| t.runs.len() == 3 && t.runs.iter().all(|r| *r > 0.0)));
        assert_eq!(tests[0].tokens_per_second, median(&tests[0].runs));
        assert_eq!(ticks, 12);
        // A prompt the model cannot take is the engine's error.
        assert!(measure(&mut engine, &[Kind::Prompt(5000)], 1, 0, &mut |_, _| {}).is_err());
    }

    #[test]
    fn sequences_that_cannot_run_together_are_an_error_until_there_is_room() {
        let kinds = [Kind::Decode { num_seqs: 6, context: 64, tokens: 3 }];
        for short in [
            EngineConfig { max_num_seqs: 5, ..config() },
            EngineConfig { max_num_batched_tokens: 5, ..config() },
            EngineConfig { kv_cache_memory: 100 << 10, max_model_len: Some(80), ..config() },
            EngineConfig { enable_prefix_caching: false, max_num_batched_tokens: 128, ..config() },
        ] {
            let mut engine = Engine::new(tiny_model(1), short.clone()).unwrap();
            let error = measure(&mut engine, &kinds, 1, 0, &mut |_, _| {}).unwrap_err();
            assert!(error.to_string().starts_with("tg3@64x6: the sequences"), "{error}");
            let mut enough = short;
            make_room(&mut enough, &kinds, engine.model().spec());
            let mut engine = Engine::new(tiny_model(1), enough).unwrap();
            measure(&mut engine, &kinds, 1, 0, &mut |_, _| {}).unwrap();
        }
        let mut unchanged = config();
        make_room(&mut unchanged, &[Kind::Prompt(10)], tiny_model(1).spec());
        assert_eq!(unchanged, config());
    }
}
