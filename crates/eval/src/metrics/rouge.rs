//! ROUGE-L of summaries, as LongBench's `rouge_score`: the F of the Python package `rouge` 1.0.1, at the level of summaries.
//!
//! Texts are cut into sentences at full stops. For every sentence of the answer the words of longest common subsequences with each sentence of the
//! prediction are put together; what these sets have together is divided by the distinct words of each text (the package
//! counts every word once: not what the paper, Lin 2004, defines, but what published scores are made of).

use std::collections::HashSet;

/// Sentences of words. Sentences of nothing but spaces are without words.
fn sentences(text: &str) -> Vec<Vec<&str>> {
    let sentences = text.split('.').filter(|sentence| !sentence.is_empty());
    sentences.map(|sentence| sentence.split_whitespace().collect()).collect()
}

/// The words of a longest common subsequence. Where several are as long, that which goes back in `b` first.
fn common<'a>(a: &[&'a str], b: &[&str]) -> Vec<&'a str> {
    let width = b.len() + 1;
    let mut lengths = vec![0u32; (a.len() + 1) * width];
    for i in 1..=a.len() {
        for j in 1..=b.len() {
            lengths[i * width + j] = match a[i - 1] == b[j - 1] {
                true => lengths[(i - 1) * width + j - 1] + 1,
                false => lengths[(i - 1) * width + j].max(lengths[i * width + j - 1]),
            };
        }
    }
    let (mut i, mut j, mut words) = (a.len(), b.len(), Vec::new());
    while i > 0 && j > 0 {
        if a[i - 1] == b[j - 1] {
            words.push(a[i - 1]);
            (i, j) = (i - 1, j - 1);
        } else if lengths[(i - 1) * width + j] > lengths[i * width + j - 1] {
            i -= 1;
        } else {
            j -= 1;
        }
    }
    words
}

/// F of the shares of words in common. O(words of both, multiplied).
pub(super) fn rouge_l(prediction: &str, answer: &str) -> f64 {
    let (prediction, answer) = (sentences(prediction), sentences(answer));
    let distinct = |text: &[Vec<&str>]| text.iter().flatten().collect::<HashSet<_>>().len();
    let (of_prediction, of_answer) = (distinct(&prediction), distinct(&answer));
    if of_prediction == 0 || of_answer == 0 {
        return 0.0;
    }
    let mut union: HashSet<&str> = HashSet::new();
    for right in &answer {
        for found in &prediction {
            union.extend(common(right, found));
        }
    }
    let precision = union.len() as f64 / of_prediction as f64;
    let recall = union.len() as f64 / of_answer as f64;
    // The constant is the package's.
    2.0 * precision * recall / (precision + recall + 1e-8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_the_package_computes() {
        for (prediction, answer, expected) in include!("../../tests/fixtures/rouge.in") {
            let found = rouge_l(prediction, answer);
            assert!(
                (found - expected).abs() < 1e-9,
                "{prediction:?}, {answer:?}: {found}, {expected}"
            );
        }
    }

    #[test]
    fn by_hand() {
        // Common "the cat mat": 3 of 4 and 3 of 5.
        assert!((rouge_l("the cat big mat", "the cat on a mat") - 2.0 / 3.0).abs() < 1e-7);
        assert_eq!(rouge_l("", "x"), 0.0);
        assert_eq!(rouge_l(". .", "x"), 0.0);
    }
}
