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
}
