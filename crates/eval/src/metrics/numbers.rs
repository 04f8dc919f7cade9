//! Numbers in answers, as LongBench's `retrieval_score` and `count_score`, and the first one.

/// Runs of digits.
fn numbers(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty())
}

fn share(prediction: &str, right: &str) -> f64 {
    let (all, same) = numbers(prediction)
        .fold((0, 0), |(all, same), n| (all + 1, same + usize::from(n == right)));
    if all == 0 { 0.0 } else { same as f64 / all as f64 }
}

/// Share of the numbers that are the paragraph's of `Paragraph N`.
pub(super) fn paragraph(prediction: &str, answer: &str) -> f64 {
    let number = answer.split("Paragraph ").nth(1).and_then(|rest| numbers(rest).next());
    number.map_or(0.0, |number| share(prediction, number))
}

/// Share of the numbers that are the answer.
pub(super) fn count(prediction: &str, answer: &str) -> f64 {
    share(prediction, answer.trim())
}

/// Whether the first whole number, with its sign, is the answer.
pub(super) fn first(prediction: &str, answer: &str) -> f64 {
    let Some(at) = prediction.find(|c: char| c.is_ascii_digit()) else { return 0.0 };
    let digits = numbers(&prediction[at..]).next().unwrap_or_default();
    let negative = prediction[..at].ends_with(['-', '−']);
    let found: Option<i64> = digits.parse().ok().map(|n: i64| if negative { -n } else { n });
    f64::from(u8::from(found.is_some() && found == answer.trim().parse().ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_of_numbers() {
        assert_eq!(paragraph("Paragraph 12", "Paragraph 12"), 1.0);
        assert_eq!(paragraph("12, or 13 or 1.2", "Paragraph 12"), 0.25);
        assert_eq!(paragraph("none", "Paragraph 12"), 0.0);
        assert_eq!(paragraph("12", "12"), 0.0);
        assert_eq!(count("There are 7 of 9", "7"), 0.5);
        assert_eq!(count("seven", "7"), 0.0);
    }

    #[test]
    fn the_first_number_has_a_sign() {
        assert_eq!(first(" = 17, since 3 + 14 = 17", "17"), 1.0);
        assert_eq!(first("-4", "-4"), 1.0);
        assert_eq!(first("4", "-4"), 0.0);
        assert_eq!(first("3 + 14 = 17", "17"), 0.0);
        assert_eq!(first("no", "17"), 0.0);
        assert_eq!(first(&"9".repeat(40), "17"), 0.0);
    }
}
