//! Words in common, as SQuAD's scorer and LongBench's `qa_f1_score`.

use std::collections::HashMap;

/// Lower case, without ASCII punctuation and articles, as words.
pub(super) fn words(text: &str) -> Vec<String> {
    let kept: String = text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
    let words = kept.split_whitespace().filter(|word| !matches!(*word, "a" | "an" | "the"));
    words.map(str::to_owned).collect()
}

/// Harmonic mean of the shares of words that are in the other, each as often as in both.
pub(super) fn f1(prediction: &str, answer: &str) -> f64 {
    let (prediction, answer) = (words(prediction), words(answer));
    let mut left: HashMap<&str, usize> = HashMap::new();
    for word in &answer {
        *left.entry(word).or_default() += 1;
    }
    let mut same = 0;
    for word in &prediction {
        if let Some(n) = left.get_mut(&**word).filter(|n| **n > 0) {
            *n -= 1;
            same += 1;
        }
    }
    if same == 0 {
        return 0.0;
    }
    let precision = f64::from(same) / prediction.len() as f64;
    let recall = f64::from(same) / answer.len() as f64;
    2.0 * precision * recall / (precision + recall)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn punctuation_articles_and_case_do_not_count() {
        assert_eq!(words("The Quick, (brown) a-fox  AN the."), ["quick", "brown", "afox"]);
        assert_eq!(f1("The Beatles.", "beatles"), 1.0);
    }

    #[test]
    fn words_count_as_often_as_in_both() {
        // By hand: "b b c" and "b c d": common b, c; 2/3 and 2/3.
        assert!((f1("b b c", "b c d") - 2.0 / 3.0).abs() < 1e-12);
        // One of five, one of one.
        assert!((f1("one two three four five", "three") - 1.0 / 3.0).abs() < 1e-12);
        assert_eq!(f1("x", "y"), 0.0);
        assert_eq!(f1("", "y"), 0.0);
        assert_eq!(f1("the", "an"), 0.0);
    }
}
