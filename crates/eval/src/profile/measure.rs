//! Steps of many kinds, each with what it computed and how long it took.

use std::time::Instant;

use kvasir_engine::{Engine, Recipe, Request, RequestId, SamplingParams};

use super::{Cell, Shape, StepSample};
use crate::error::{EvalError, Result};
use crate::random::random_tokens;

/// Measures every recipe at every shape: recipes in turn within a shape, so that a machine that drifts slows all alike. The engine
/// must have room for the largest shape and no prefix cache. `progress` is told (done, of).
///
/// # Errors
/// Lengths that the engine refuses; [`EvalError::Settings`] for sequences that do not run together.
pub fn measure(
    engine: &mut Engine,
    recipes: &[Recipe],
    shapes: &[Shape],
    seed: u64,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<(Vec<StepSample>, Vec<Cell>)> {
    let (mut steps, mut cells) = (Vec::new(), Vec::new());
    // Wakes the threads, and whatever a recipe builds at its first use.
    for recipe in recipes {
        one(
            engine,
            *recipe,
            Shape { num_seqs: 2, context: 48, decode: 2 },
            0,
            seed,
            &mut Vec::new(),
        )?;
    }
    for (number, shape) in shapes.iter().enumerate() {
        for (i, recipe) in recipes.iter().enumerate() {
            let seed = seed.wrapping_add(number as u64);
            cells.push(one(engine, *recipe, *shape, number, seed, &mut steps)?);
            progress(number * recipes.len() + i + 1, shapes.len() * recipes.len());
        }
    }
    Ok((steps, cells))
}

fn one(
    engine: &mut Engine,
    recipe: Recipe,
    shape: Shape,
    number: usize,
    seed: u64,
    steps: &mut Vec<StepSample>,
) -> Result<Cell> {
    let Shape { num_seqs, context, decode } = shape;
    let vocab_size = engine.model().spec().vocab_size;
    let block_size = engine.config().block_size;
    // Steps that those who began first are ahead of those who began last.
    let lead = num_seqs * context / engine.config().max_num_batched_tokens + num_seqs + 2;
    let params = SamplingParams { ignore_eos: true, ..SamplingParams::greedy(decode + lead + 1) };
    let ids: Vec<RequestId> =
        (0..num_seqs).map(|i| RequestId::from(format!("profile {i}").as_str())).collect();
    for (i, id) in ids.iter().enumerate() {
        engine.add_request(Request {
            id: id.clone(),
            prompt: random_tokens(
                context,
                vocab_size,
                seed.wrapping_mul(1 << 20).wrapping_add(i as u64 + 1),
            ),
            params: params.clone().into(),
            cache_salt: None,
            kv_cache: Some(recipe),
        })?;
    }
    let name = recipe.to_string();
    // Tokens of each sequence's answer.
    let mut lengths = vec![0; num_seqs];
    let mut sample = |engine: &mut Engine| -> Result<(usize, usize, f64)> {
        let start = Instant::now();
        let step = engine.step()?;
        let seconds = start.elapsed().as_secs_f64();
        let counts = step.work.counts();
        steps.push(StepSample { recipe: name.clone(), shape: number, counts, seconds });
        for output in &step.outputs {
            if let Some(i) = ids.iter().position(|id| *id == output.request_id) {
                lengths[i] = output.num_output_tokens;
            }
        }
        let started = step.outputs.iter().filter(|o| o.num_output_tokens == 1).count();
        Ok((started, step.num_prefill_tokens, seconds))
    };
    let (mut started, mut computed, mut seconds) = (0, 0, 0.0);
    while started < num_seqs {
        let (first, tokens, took) = sample(engine)?;
        (started, computed, seconds) = (started + first, computed + tokens, seconds + took);
    }
    let prefill = computed as f64 / seconds;
    let preempted = engine.stats().preemptions;
    let mut seconds = 0.0;
    for _ in 0..decode {
        seconds += sample(engine)?.2;
    }
    let stats = engine.stats();
    if stats.num_running != num_seqs || stats.preemptions != preempted {
        let what = format!(
            "{num_seqs} sequences of {context} tokens do not run together: {} do",
            stats.num_running
        );
        return Err(EvalError::Settings { what });
    }
    for id in &ids {
        engine.abort(id)?;
    }
    Ok(Cell {
        recipe: name,
        num_seqs,
        context,
        prefill,
        decode: (num_seqs * decode) as f64 / seconds,
        tokens: lengths.iter().map(|length| context + length - 1).sum(),
        tail_tokens: lengths.iter().map(|length| (context + length - 1) % block_size).sum(),
        logical_bytes: stats.kv_logical_bytes,
        physical_bytes: stats.kv_physical_bytes,
        reserved_bytes: stats.kv_reserved_bytes,
    })
}
