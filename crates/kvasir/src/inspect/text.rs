//! The report for people.

use std::fmt::Write;

use serde_json::Value as Json;

use super::memory::Memory;
use super::report::Report;
use crate::units::format_bytes;

/// Characters of a metadata string that are shown; `--json` has it whole.
const MAX_SHOWN: usize = 100;

/// Renders the report, a line ending at its end.
pub(crate) fn render(report: &Report) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write_report(&mut out, report);
    out
}

fn write_report(out: &mut String, report: &Report) -> std::fmt::Result {
    writeln!(out, "file          {} ({})", report.path, format_bytes(report.file_bytes))?;
    writeln!(out, "format        GGUF version {}", report.gguf_version)?;
    writeln!(out, "architecture  {}", shown_or_unknown(report.architecture.as_deref()))?;
    writeln!(out, "name          {}", shown_or_unknown(report.name.as_deref()))?;
    writeln!(out, "parameters    {}", millions(report.parameters))?;
    match &report.kv_cache {
        Some(kv) => writeln!(
            out,
            "KV cache      {} bytes per token in f16 ({} layers, {} KV heads in all, keys of {}, \
             values of {})",
            kv.bytes_per_token_f16, kv.layers, kv.kv_heads, kv.key_length, kv.value_length
        )?,
        None => writeln!(out, "KV cache      unknown: the metadata does not describe attention")?,
    }
    write_memory(out, &report.memory)?;
    writeln!(
        out,
        "\ntensors       {} ({})",
        report.tensor_count,
        format_bytes(report.tensor_bytes)
    )?;
    for (ty, total) in &report.tensor_types {
        writeln!(
            out,
            "  {ty:<8} {:>5} {:>12} {:>14}",
            total.count,
            millions(total.parameters),
            format_bytes(total.bytes)
        )?;
    }
    writeln!(out, "\nmetadata      {} keys", report.metadata.len())?;
    let width = report.metadata.keys().map(String::len).max().unwrap_or(0).min(48);
    for (key, value) in &report.metadata {
        writeln!(out, "  {:<width$}  {}", printable(key), shown(value))?;
    }
    if let Some(tensors) = &report.tensors {
        writeln!(
            out,
            "\n  {:<10} {:>14} {:>14} {:<12} {:<20} tensor",
            "type", "bytes", "in memory", "as", "shape"
        )?;
        for tensor in tensors {
            let shape = format!("{:?}", tensor.shape);
            let (resident, held) = match &tensor.resident {
                Some(resident) => (resident.resident_bytes.to_string(), resident.held),
                None => ("?".to_owned(), "?"),
            };
            writeln!(
                out,
                "  {:<10} {:>14} {resident:>14} {held:<12} {shape:<20} {}",
                tensor.ty,
                tensor.bytes,
                printable(&tensor.name)
            )?;
        }
    }
    Ok(())
}

fn write_memory(out: &mut String, memory: &Memory) -> std::fmt::Result {
    if let Some(why) = &memory.unknown {
        return writeln!(out, "memory        unknown: {}", printable(why));
    }
    let of = |bytes: usize| format_bytes(bytes as u64);
    let machine = memory.machine_bytes.map(|bytes| match bytes < memory.total_bytes {
        true => format!("; this machine has only {}", of(bytes)),
        false => format!("; this machine has {}", of(bytes)),
    });
    writeln!(
        out,
        "memory        {} to serve it: weights {}, tokenizer {}, KV cache {}, program about {}{}",
        of(memory.total_bytes),
        of(memory.weight_bytes),
        of(memory.tokenizer_bytes),
        of(memory.kv_cache_bytes),
        of(memory.program_bytes),
        machine.unwrap_or_default()
    )
}

fn shown_or_unknown(text: Option<&str>) -> String {
    text.map_or_else(|| "unknown".to_owned(), printable)
}

fn shown(value: &Json) -> String {
    match value {
        Json::String(text) => {
            let cut: String = text.chars().take(MAX_SHOWN).collect();
            let more = text.chars().count() - cut.chars().count();
            let tail =
                if more > 0 { format!(" … {more} more characters") } else { String::new() };
            format!("\"{}\"{tail}", printable(&cut))
        }
        Json::Object(array) => match (array.get("array"), array.get("length")) {
            (Some(Json::String(ty)), Some(length)) => format!("[{length} × {ty}]"),
            _ => value.to_string(),
        },
        other => other.to_string(),
    }
}

/// A file's text must not steer the terminal.
fn printable(text: &str) -> String {
    text.chars()
        .flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] })
        .collect()
}

fn millions(n: u64) -> String {
    if n < 100_000 { n.to_string() } else { format!("{:.1} million", n as f64 / 1e6) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn strings_are_cut_and_cannot_steer_the_terminal() {
        assert_eq!(shown(&json!("a\u{1b}[2Jb\n")), "\"a\\u{1b}[2Jb\\n\"");
        let long = shown(&json!("é".repeat(150)));
        assert!(long.contains("50 more characters"), "{long}");
    }

    #[test]
    fn arrays_and_numbers() {
        assert_eq!(shown(&json!({ "array": "string", "length": 49152 })), "[49152 × string]");
        assert_eq!(shown(&json!(0.00001)), "0.00001");
        assert_eq!(millions(99_999), "99999");
        assert_eq!(millions(134_515_008), "134.5 million");
    }
}
