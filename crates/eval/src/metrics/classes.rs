//! Which class was named, as LongBench's `classification_score`.

/// 1 over the classes that are in the prediction, if the right one is among them. Those that are only there as a part of
/// the right one's name are not counted.
///
/// (LongBench takes them out of a list that it is walking, and so leaves every second one of such in a row; here all go.)
pub(super) fn score(prediction: &str, answer: &str, classes: &[String]) -> f64 {
    let named = classes.iter().filter(|class| prediction.contains(&***class));
    let counted: Vec<_> = named.filter(|c| *c == answer || !answer.contains(&***c)).collect();
    match counted.iter().any(|class| *class == answer) {
        true => 1.0 / counted.len() as f64,
        false => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_that_are_named_cost() {
        let classes = ["Date", "Other number", "number", "Person"].map(str::to_owned);
        assert_eq!(score("It is a Date", "Date", &classes), 1.0);
        assert_eq!(score("Date or Person", "Date", &classes), 0.5);
        assert_eq!(score("Person", "Date", &classes), 0.0);
        assert_eq!(score("date", "Date", &classes), 0.0);
        // A part of the right name is no other class.
        assert_eq!(score("Other number", "Other number", &classes), 1.0);
        assert_eq!(score("Other number", "number", &classes), 0.5);
    }
}
