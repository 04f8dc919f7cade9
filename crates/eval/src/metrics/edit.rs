//! Edit similarity of code, as LongBench's `code_sim_score`.

/// The first line that is code (none of `` ` ``, `#`, `//` in it), compared with the answer. What the answer is compared with is the
/// whole answer, as published.
pub(super) fn code_similarity(prediction: &str, answer: &str) -> f64 {
    let lines = prediction.trim_start_matches('\n').split('\n');
    let code = |line: &&str| !line.contains('`') && !line.contains('#') && !line.contains("//");
    let line = lines.into_iter().find(code).unwrap_or_default();
    similarity(line, answer)
}

/// Twice the length of the longest common subsequence of characters, by the lengths of both: `ratio` of rapidfuzz and of
/// Levenshtein, rounded to hundredths as fuzzywuzzy does. 0 if one is empty. O(a · b).
fn similarity(a: &str, b: &str) -> f64 {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    if a.is_empty() || b.is_empty() {
        return 0.0;
    }
    let common = super::order::common(&a, &b);
    (200.0 * common as f64 / (a.len() + b.len()) as f64).round() / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn similarities_by_hand() {
        assert_eq!(similarity("abcd", "abcd"), 1.0);
        // "ad": 2 · 2 / 7 = .571
        assert_eq!(similarity("abcd", "axd"), 0.57);
        assert_eq!(similarity("", "x"), 0.0);
        assert_eq!(similarity("ü", "ü"), 1.0);
    }

    #[test]
    fn the_first_line_of_code_counts() {
        assert_eq!(code_similarity("\n\n# a comment\n```\nreturn x\nmore", "return x"), 1.0);
        assert_eq!(code_similarity("// nothing but this", "x"), 0.0);
    }
}
