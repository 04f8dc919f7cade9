//! Quantities as people write them: byte sizes (`256MiB`) and token counts (`8k`).

/// Parses a byte size: digits, optionally with a fraction, and a unit. `KiB`, `MiB`, `GiB`, `TiB`
/// (or `K`, `M`, `G`, `T`) are powers of 1024; `KB`, `MB`, `GB`, `TB` are powers of 1000; `B` or
/// nothing is bytes. Case does not matter.
pub(crate) fn parse_bytes(text: &str) -> Result<usize, String> {
    const FORM: &str = "a size such as 256MiB, 1GiB, 64MB or 1048576";
    let (number, unit) = split_unit(text);
    let scale: u64 = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(format!("expected {FORM}, found '{text}'")),
    };
    let bytes = scaled(number, scale).ok_or_else(|| format!("expected {FORM}, found '{text}'"))?;
    match usize::try_from(bytes) {
        Ok(0) => Err("must be more than 0 bytes".to_owned()),
        Ok(bytes) => Ok(bytes),
        Err(_) => Err(format!("'{text}' is more than this machine can address")),
    }
}

/// Parses a number of tokens: `4096`, `8k` (8,000) or `8K` (8,192), as vLLM does.
pub(crate) fn parse_tokens(text: &str) -> Result<usize, String> {
    const FORM: &str = "a number of tokens such as 4096 or 8k";
    let (number, unit) = split_unit(text);
    let scale: u64 = match unit {
        "" => 1,
        "k" => 1_000,
        "K" => 1_024,
        "m" => 1_000_000,
        "M" => 1 << 20,
        _ => return Err(format!("expected {FORM}, found '{text}'")),
    };
    match scaled(number, scale).and_then(|tokens| usize::try_from(tokens).ok()) {
        None => Err(format!("expected {FORM}, found '{text}'")),
        Some(0) => Err("must be at least 1 token".to_owned()),
        Some(tokens) => Ok(tokens),
    }
}

/// Formats bytes with a binary unit and one decimal: `93.8 MiB`.
pub(crate) fn format_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = UNITS[0];
    for larger in &UNITS[1..] {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = larger;
    }
    if unit == UNITS[0] { format!("{bytes} bytes") } else { format!("{value:.1} {unit}") }
}

fn split_unit(text: &str) -> (&str, &str) {
    let text = text.trim();
    let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    (number, unit.trim_start())
}

/// `number * scale` in integers, so that large sizes stay exact; the product of a fraction is cut.
fn scaled(number: &str, scale: u64) -> Option<u64> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || fraction.len() > 9 || (number.contains('.') && fraction.is_empty()) {
        return None;
    }
    let mut total = whole.parse::<u64>().ok()?.checked_mul(scale)?;
    if !fraction.is_empty() {
        let numerator = u128::from(fraction.parse::<u64>().ok()?) * u128::from(scale);
        let part = numerator / 10_u128.pow(u32::try_from(fraction.len()).ok()?);
        total = total.checked_add(u64::try_from(part).ok()?)?;
    }
    Some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_sizes() {
        for (text, bytes) in [
            ("1", 1),
            ("1048576", 1 << 20),
            ("256MiB", 256 << 20),
            ("256 mib", 256 << 20),
            ("1GiB", 1 << 30),
            ("64MB", 64_000_000),
            ("2k", 2048),
            ("1.5GiB", 3 << 29),
            ("0.5KB", 500),
            (" 10B ", 10),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn byte_sizes_that_are_none() {
        for text in [
            "",
            "MiB",
            "12XB",
            "-1",
            "1e9",
            "1..5GiB",
            "1.GiB",
            ".5GiB",
            "0",
            "0MiB",
            "0.0001B",
            "99999999999999999999",
            "18446744073709551615KiB",
            "12 34",
            "1,5GiB",
        ] {
            assert!(parse_bytes(text).is_err(), "{text:?} was taken");
        }
        let message = parse_bytes("lots").unwrap_err();
        assert!(message.contains("256MiB") && message.contains("'lots'"), "{message}");
    }

    #[test]
    fn token_counts() {
        for (text, tokens) in [("1", 1), ("4096", 4096), ("8k", 8000), ("8K", 8192), ("1.5k", 1500)]
        {
            assert_eq!(parse_tokens(text), Ok(tokens), "{text}");
        }
        for text in ["", "k", "0", "8kb", "-4", "99999999999999999999k"] {
            assert!(parse_tokens(text).is_err(), "{text:?} was taken");
        }
    }

    #[test]
    fn bytes_are_shown_with_a_unit() {
        assert_eq!(format_bytes(0), "0 bytes");
        assert_eq!(format_bytes(1023), "1023 bytes");
        assert_eq!(format_bytes(1536), "1.5 KiB");
        assert_eq!(format_bytes(98_362_432), "93.8 MiB");
        assert_eq!(format_bytes(u64::MAX), "16777216.0 TiB");
    }
}
