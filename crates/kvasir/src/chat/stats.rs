//! What `/stats` shows.

use std::fmt::Write;

use kvasir_engine::EngineStats;

use crate::generate::Generation;
use crate::units::format_bytes;

/// Renders the last answer's and the engine's numbers, a line ending at the end.
pub(crate) fn render(stats: &EngineStats, last: Option<&Generation>) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write_stats(&mut out, stats, last);
    out
}

fn write_stats(
    out: &mut String,
    stats: &EngineStats,
    last: Option<&Generation>,
) -> std::fmt::Result {
    let bytes = |n: usize| format_bytes(n as u64);
    match last {
        None => writeln!(out, "last answer   none yet")?,
        Some(last) => {
            let tokens = last.num_prompt_tokens + last.token_ids.len();
            writeln!(
                out,
                "last answer   {} prompt tokens ({} from the prefix cache) + {} generated",
                last.num_prompt_tokens,
                last.num_cached_tokens,
                last.token_ids.len()
            )?;
            let ratio = match last.kv.ratio() {
                Some(ratio) => format!(", compression {ratio:.2}"),
                None => String::new(),
            };
            writeln!(
                out,
                "its KV cache  {tokens} tokens: {} logical, {} physical{ratio}",
                bytes(last.kv.logical_bytes),
                bytes(last.kv.physical_bytes)
            )?;
            writeln!(
                out,
                "its speed     prompt {:.1} tokens/s, generation {:.1} tokens/s, first token \
                 after {:.3} s",
                last.prompt_tokens_per_second(),
                last.generation_tokens_per_second(),
                last.first_token_s
            )?;
        }
    }
    writeln!(
        out,
        "block pool    {} of {} in use ({} of it cached prefixes, peak {})",
        bytes(stats.kv_physical_bytes),
        bytes(stats.kv_budget_bytes),
        bytes(stats.kv_evictable_bytes),
        bytes(stats.kv_peak_physical_bytes)
    )?;
    let share = if stats.prefix_queries > 0 {
        format!(" ({:.0} %)", 100.0 * stats.prefix_hits as f64 / stats.prefix_queries as f64)
    } else {
        String::new()
    };
    writeln!(
        out,
        "prefix cache  {} of {} prompt tokens found{share}",
        stats.prefix_hits, stats.prefix_queries
    )?;
    writeln!(
        out,
        "in all        {} prompt tokens, {} generated, {} preemptions",
        stats.prompt_tokens, stats.generation_tokens, stats.preemptions
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::KvBytes;
    use kvasir_engine::FinishReason;

    #[test]
    fn numbers() {
        let stats = EngineStats {
            kv_physical_bytes: 3 << 20,
            kv_evictable_bytes: 2 << 20,
            kv_budget_bytes: 256 << 20,
            kv_peak_physical_bytes: 4 << 20,
            prefix_queries: 200,
            prefix_hits: 50,
            prompt_tokens: 210,
            generation_tokens: 30,
            ..EngineStats::default()
        };
        let last = Generation {
            text: String::new(),
            token_ids: vec![1; 11],
            finish_reason: FinishReason::Stop,
            num_prompt_tokens: 100,
            num_cached_tokens: 60,
            kv: KvBytes { logical_bytes: 2048, physical_bytes: 1024 },
            first_token_s: 0.5,
            rest_s: 1.0,
        };
        assert_eq!(
            render(&stats, Some(&last)),
            "last answer   100 prompt tokens (60 from the prefix cache) + 11 generated\n\
             its KV cache  111 tokens: 2.0 KiB logical, 1.0 KiB physical, compression 2.00\n\
             its speed     prompt 80.0 tokens/s, generation 10.0 tokens/s, first token after \
             0.500 s\n\
             block pool    3.0 MiB of 256.0 MiB in use (2.0 MiB of it cached prefixes, peak 4.0 \
             MiB)\n\
             prefix cache  50 of 200 prompt tokens found (25 %)\n\
             in all        210 prompt tokens, 30 generated, 0 preemptions\n"
        );
        assert!(render(&EngineStats::default(), None).starts_with("last answer   none yet\n"));
    }
}
