//! Lists whose order counts.

/// Length of the longest common subsequence. O(a · b).
pub(super) fn common<T: PartialEq>(a: &[T], b: &[T]) -> usize {
    let mut lengths = vec![0; b.len() + 1];
    for x in a {
        let mut diagonal = 0;
        for (i, y) in b.iter().enumerate() {
            let above = lengths[i + 1];
            lengths[i + 1] = if x == y { diagonal + 1 } else { above.max(lengths[i]) };
            diagonal = above;
        }
    }
    lengths[b.len()]
}

/// Share of the answers that are there as lines, or between commas, in their order, whatever case, numbering or bullets they have. Items
/// beyond as many as there are answers are not read.
pub(super) fn score(prediction: &str, answers: &[String]) -> f64 {
    let plain = |line: &str| {
        let start = |c: char| !c.is_alphabetic();
        line.trim_start_matches(start)
            .trim_end_matches(|c: char| !c.is_alphanumeric())
            .to_lowercase()
    };
    let lines = prediction.split(['\n', ',']).map(plain).filter(|line| !line.is_empty());
    let lines: Vec<String> = lines.take(answers.len()).collect();
    let answers: Vec<String> = answers.iter().map(|answer| plain(answer)).collect();
    common(&lines, &answers) as f64 / answers.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn longest_common_subsequences() {
        assert_eq!(common(b"nematode", b"empty"), 3);
        assert_eq!(common(b"", b"x"), 0);
        assert_eq!(common(b"abc", b"abc"), 3);
    }

    #[test]
    fn lists_lose_what_is_out_of_order() {
        let answers = ["Pear", "Fig", "Plum"].map(str::to_owned);
        assert_eq!(score("1. pear\n2. fig.\n\n- Plum", &answers), 1.0);
        assert_eq!(score("Fig\nPear\nPlum", &answers), 2.0 / 3.0);
        assert_eq!(score("Fig\nFig\nFig\nPear\nFig\nPlum", &answers), 1.0 / 3.0);
        assert_eq!(score("", &answers), 0.0);
    }
}
