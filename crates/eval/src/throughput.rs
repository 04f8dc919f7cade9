//! Speed of many requests that are there at once, as vLLM's `bench throughput` measures it.

use std::time::Instant;

use kvasir_engine::{Engine, Request, RequestId, SamplingParams, TokenId};
use serde::{Deserialize, Serialize};

use crate::error::Result;

/// One request of a load; end tokens are ignored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// Token ids of the prompt.
    pub prompt: Vec<TokenId>,
    /// Tokens to generate.
    pub output_len: usize,
}

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Throughput {
    /// From the first step to the last.
    pub seconds: f64,
    /// Generated tokens by seconds.
    pub output_tokens_per_second: f64,
    /// Prompts' and generated tokens by seconds. What was computed again after a preemption does not
    /// count twice.
    pub total_tokens_per_second: f64,
    /// Most sequences in a step's batch.
    pub max_running: usize,
    /// Sequences that lost their place.
    pub preemptions: u64,
    /// Most bytes the block pool ever handed out.
    pub peak_kv_physical_bytes: usize,
}

/// A recipe's, with as much memory as the others beside it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AtMemory {
    /// The recipe.
    pub recipe: String,
    /// Bytes of the cache.
    pub budget: usize,
    /// What came of it.
    pub throughput: Throughput,
}

/// Runs the load on an engine that has nothing else to do, after a short request that wakes its threads.
/// `progress`: generated tokens, of how many.
///
/// # Errors
/// Lengths that the engine refuses.
pub fn measure(
    engine: &mut Engine,
    jobs: Vec<Job>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Throughput> {
    add(engine, "warm-up", Job { prompt: vec![0; 8], output_len: 2 })?;
    while engine.has_unfinished() {
        engine.step()?;
    }
    engine.reset_prefix_cache()?;
    let preemptions = engine.stats().preemptions;
    let asked: usize = jobs.iter().map(|job| job.output_len).sum();
    let prompt_tokens: usize = jobs.iter().map(|job| job.prompt.len()).sum();
    for (i, job) in jobs.into_iter().enumerate() {
        add(engine, &format!("throughput {i}"), job)?;
    }
    let (mut max_running, mut generated) = (0, 0);
    let start = Instant::now();
    while engine.has_unfinished() {
        let step = engine.step()?;
        let finished = step.outputs.iter().filter(|o| o.finish.is_some()).count();
        max_running = max_running.max(engine.num_running() + finished);
        generated += step.outputs.iter().map(|o| o.token_ids.len()).sum::<usize>();
        progress(generated, asked);
    }
    let seconds = start.elapsed().as_secs_f64();
    let stats = engine.stats();
    Ok(Throughput {
        seconds,
        output_tokens_per_second: generated as f64 / seconds,
        total_tokens_per_second: (generated + prompt_tokens) as f64 / seconds,
        max_running,
        preemptions: stats.preemptions - preemptions,
        peak_kv_physical_bytes: stats.kv_peak_physical_bytes,
    })
}

fn add(engine: &mut Engine, id: &str, job: Job) -> Result<()> {
    let params = SamplingParams { ignore_eos: true, ..SamplingParams::greedy(job.output_len) };
    let (id, params) = (RequestId::from(id), params.into());
    engine.add_request(Request {
        id,
        prompt: job.prompt,
        params,
        cache_salt: None,
        kv_cache: None,
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use kvasir_engine::EngineConfig;
    use kvasir_model::testkit::tiny_model;

    use super::*;
    use crate::random::random_tokens;

    #[test]
    fn a_load_is_done_whole_and_a_small_cache_shows() {
        let job = |i| Job { prompt: random_tokens(40, 256, i), output_len: 9 };
        let jobs: Vec<Job> = (0..6).map(job).collect();
        let run = |kv_cache_memory| {
            let config = EngineConfig {
                threads: 1,
                block_size: 16,
                kv_cache_memory,
                ..EngineConfig::default()
            };
            let mut engine = Engine::new(tiny_model(1), config).unwrap();
            let mut last = (0, 0);
            let found = measure(&mut engine, jobs.clone(), &mut |done, total| last = (done, total))
                .unwrap();
            assert_eq!(last, (54, 54));
            assert!(!engine.has_unfinished());
            let ratio = found.total_tokens_per_second / found.output_tokens_per_second;
            assert!((ratio - 49.0 / 9.0).abs() < 1e-9, "{found:?}");
            found
        };
        let ample = run(16 << 20);
        assert_eq!((ample.max_running, ample.preemptions), (6, 0));
        let bytes = ample.peak_kv_physical_bytes / 2;
        let small = run(bytes);
        assert!(small.max_running < 6, "{small:?}");
        assert!(small.peak_kv_physical_bytes <= bytes, "{small:?}");
    }
}
