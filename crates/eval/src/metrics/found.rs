//! Whether answers are there.

/// Whether an answer stands in a prediction, whatever the case, and not as a part of a longer word or number.
pub(super) fn found(prediction: &str, answer: &str) -> bool {
    let (prediction, answer) = (prediction.to_lowercase(), answer.to_lowercase());
    if answer.is_empty() {
        return false;
    }
    prediction.match_indices(&answer).any(|(at, found)| {
        let before = prediction[..at].chars().next_back();
        let after = prediction[at + found.len()..].chars().next();
        ![before, after].into_iter().flatten().any(char::is_alphanumeric)
    })
}

/// Share of the answers that are found.
pub(super) fn share(prediction: &str, answers: &[String]) -> f64 {
    let there = answers.iter().filter(|answer| found(prediction, answer)).count();
    there as f64 / answers.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_words_are_not_found() {
        assert!(found("The key is 4711.", "4711"));
        assert!(!found("The key is 47110.", "4711"));
        assert!(found("47110 or 4711", "4711"));
        assert!(found("It is BLUE-7!", "blue-7"));
        assert!(!found("anything", ""));
    }

    #[test]
    fn shares() {
        let answers = ["VAX", "QIL"].map(str::to_owned);
        assert_eq!(share("VAX, VAX and VAX", &answers), 0.5);
        assert_eq!(share("qil vax", &answers), 1.0);
        assert_eq!(share("", &answers), 0.0);
        assert_eq!(share("x", &[]), 0.0);
    }
}
