//! Speed of many requests that are there at once, as vLLM's `bench throughput` measures it.

use std::time::Instant;

use kvasir_engine::{Engine, Request, RequestId, SamplingParams};
use serde::Serialize;

use crate::error::Result;
use crate::latency::random_tokens;

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Load {
    /// Requests.
    pub num_prompts: usize,
    /// Tokens of each prompt.
    pub input_len: usize,
    /// Tokens generated for each; end tokens are ignored.
    pub output_len: usize,
    /// Seed of the prompts' tokens.
    pub seed: u64,
}

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
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

/// Runs the load on an engine that has nothing else to do, after a short request that wakes its threads.
/// `progress`: generated tokens, of how many.
///
/// # Errors
/// Lengths that the engine refuses.
pub fn measure(
    engine: &mut Engine,
    load: Load,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Throughput> {
    let Load { num_prompts, input_len, output_len, seed } = load;
    add(engine, "warm-up", 8, 2, seed)?;
    while engine.has_unfinished() {
        engine.step()?;
    }
    engine.reset_prefix_cache()?;
    let preemptions = engine.stats().preemptions;
    for i in 0..num_prompts {
        // Seeds far apart: neighbours of one load are not those of the next.
        let seed = seed.wrapping_mul(1 << 20).wrapping_add(i as u64 + 1);
        add(engine, &format!("throughput {i}"), input_len, output_len, seed)?;
    }
    let (mut max_running, mut generated) = (0, 0);
    let start = Instant::now();
    while engine.has_unfinished() {
        let step = engine.step()?;
        let finished = step.outputs.iter().filter(|o| o.finish.is_some()).count();
        max_running = max_running.max(engine.num_running() + finished);
        generated += step.outputs.iter().map(|o| o.token_ids.len()).sum::<usize>();
        progress(generated, num_prompts * output_len);
    }
    let seconds = start.elapsed().as_secs_f64();
    let stats = engine.stats();
    Ok(Throughput {
        seconds,
        output_tokens_per_second: generated as f64 / seconds,
        total_tokens_per_second: (generated + num_prompts * input_len) as f64 / seconds,
        max_running,
        preemptions: stats.preemptions - preemptions,
        peak_kv_physical_bytes: stats.kv_peak_physical_bytes,
    })
}

fn add(engine: &mut Engine, id: &str, input: usize, output: usize, seed: u64) -> Result<()> {
    let params = SamplingParams { ignore_eos: true, ..SamplingParams::greedy(output) };
    let prompt = random_tokens(input, engine.model().spec().vocab_size, seed);
    let params = params.into();
    let id = RequestId::from(id);
    engine.add_request(Request { id, prompt, params, cache_salt: None, kv_cache: None })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use kvasir_engine::EngineConfig;
    use kvasir_model::testkit::tiny_model;

    use super::*;

    #[test]
    fn a_load_is_done_whole_and_a_small_cache_shows() {
        let load = Load { num_prompts: 6, input_len: 40, output_len: 9, seed: 3 };
        let run = |kv_cache_memory| {
            let config = EngineConfig {
                threads: 1,
                block_size: 16,
                kv_cache_memory,
                ..EngineConfig::default()
            };
            let mut engine = Engine::new(tiny_model(1), config).unwrap();
            let mut last = (0, 0);
            let found =
                measure(&mut engine, load, &mut |done, total| last = (done, total)).unwrap();
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
