use std::time::Duration;

use super::*;
use crate::arrivals::poisson;

const ROOMY: ServerConfig = ServerConfig {
    max_num_seqs: 64,
    max_num_batched_tokens: 512,
    block_size: 32,
    kv_cache_memory: usize::MAX,
    enable_prefix_caching: false,
    max_concurrency: usize::MAX,
};

const BYTES: BytesModel =
    BytesModel { per_sequence: 0.0, per_token: 100.0, per_tail_token: 100.0, slack: 0.0 };

fn request(arrival: f64, prompt_tokens: usize, output_tokens: usize) -> TraceRequest {
    TraceRequest { arrival, prompt_tokens, output_tokens, blocks: Vec::new(), block_tokens: 32 }
}

#[test]
fn one_server_with_constant_service_is_m_d_1() {
    // Pollaczek and Khinchine: the mean wait is ρ S ÷ 2 (1 − ρ).
    const SERVICE: f64 = 0.5;
    let config = ServerConfig { max_num_seqs: 1, ..ROOMY };
    for load in [0.3, 0.6, 0.8] {
        let due = poisson(60_000, load / SERVICE, 11);
        let requests: Vec<_> = due.iter().map(|at| request(at.as_secs_f64(), 10, 1)).collect();
        let found = simulate(&config, BYTES, &|_| SERVICE, &requests).unwrap();
        let expected = load * SERVICE / (2.0 * (1.0 - load)) + SERVICE;
        let error = found.ttft_mean / expected - 1.0;
        assert!(error.abs() < 0.04, "{load}: {} for {expected}", found.ttft_mean);
        assert_eq!((found.max_running, found.steps), (1, 60_000));
    }
}

#[test]
fn steps_by_hand() {
    // 600 tokens in steps of 512 and 88; the other prompt shares the second step, and both then decode.
    let requests = [request(0.0, 600, 3), request(0.0, 20, 2)];
    let seconds = |work: &StepWork| work.rows as f64;
    let found = simulate(&ROOMY, BYTES, &seconds, &requests).unwrap();
    // Rows: 512, 108, 2, 1.
    assert_eq!((found.steps, found.seconds), (4, 623.0));
    assert_eq!(found.ttft.unwrap().p50, 620.0);
    assert_eq!(found.ttft_mean, 620.0);
    // (1 + 2) ÷ 2 and 2.
    assert_eq!(found.tpot.unwrap().p50, 1.75);
    assert_eq!(found.e2e.unwrap().p50, 622.5);
    assert_eq!((found.max_running, found.preemptions), (2, 0));
    assert_eq!(found.output_tokens_per_second, 5.0 / 623.0);
    // 602 and 21 tokens, tails rounded up to eights: 26 in the last block of the first.
    assert_eq!(found.peak_kv_physical_bytes, (18 * 32 + 32 + 24) * 100);
}

#[test]
fn who_has_to_wait_is_sent_later() {
    let config = ServerConfig { max_concurrency: 1, ..ROOMY };
    let requests = [request(0.0, 10, 1), request(0.0, 10, 1), request(9.0, 10, 1)];
    let found = simulate(&config, BYTES, &|_| 2.0, &requests).unwrap();
    assert_eq!((found.seconds, found.ttft_mean, found.max_running), (11.0, 2.0, 1));
}

#[test]
fn equal_prefixes_are_computed_once() {
    let prompt = |last: u32| [(0..96).collect::<Vec<u32>>(), vec![last; 10]].concat();
    let due = [Duration::ZERO, Duration::from_secs(1_000_000)];
    let requests = of_requests(&[(prompt(1), 1), (prompt(2), 1)], &due, 32);
    let caching = ServerConfig { enable_prefix_caching: true, ..ROOMY };
    let rows = |work: &StepWork| work.rows as f64;
    let found = simulate(&caching, BYTES, &rows, &requests).unwrap();
    assert_eq!(found.cached_share, 96.0 / 212.0);
    assert_eq!(found.ttft_mean, (106.0 + 10.0) / 2.0);
    assert_eq!(simulate(&ROOMY, BYTES, &rows, &requests).unwrap().cached_share, 0.0);
}

#[test]
fn little_memory_preempts_the_youngest_and_all_are_answered() {
    // Ten blocks; two sequences of four grow to eight each.
    let config = ServerConfig { kv_cache_memory: 10 * 32 * 100, ..ROOMY };
    let requests = [request(0.0, 120, 130), request(0.0, 120, 130)];
    let found = simulate(&config, BYTES, &|_| 1.0, &requests).unwrap();
    assert!(found.preemptions >= 1, "{found:?}");
    assert!(found.peak_kv_physical_bytes <= config.kv_cache_memory);
    // The older one is never held up: one step of its prompt, 129 of decode.
    assert!(found.e2e.unwrap().p50 > 130.0 && found.seconds < 260.0, "{found:?}");
    let error = simulate(&config, BYTES, &|_| 1.0, &[request(0.0, 400, 1)]).unwrap_err();
    assert!(error.to_string().starts_with("a request of 400 tokens"), "{error}");
}

#[test]
fn a_chunk_stands_beside_its_code_until_the_step_is_over() {
    let bytes =
        BytesModel { per_sequence: 5.0, per_token: 10.0, per_tail_token: 100.0, slack: 0.0 };
    let found = simulate(&ROOMY, bytes, &|_| 1.0, &[request(0.0, 64, 3)]).unwrap();
    assert_eq!(found.peak_kv_physical_bytes, 5 + 64 * 10 + 64 * 100);
    // What nobody can use is missing.
    let config = ServerConfig { kv_cache_memory: 5 + 64 * 110, ..ROOMY };
    simulate(&config, bytes, &|_| 1.0, &[request(0.0, 64, 3)]).unwrap();
    let bytes = BytesModel { slack: 1.0, ..bytes };
    assert!(simulate(&config, bytes, &|_| 1.0, &[request(0.0, 64, 3)]).is_err());
}
