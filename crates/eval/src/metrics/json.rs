//! JSON objects.

use serde_json::{Map, Value};

/// Share of the answer's fields that the first object in the prediction has with the same value; fields that are not
/// the answer's cost as much as missing ones. 0 if there is no whole object.
pub(super) fn score(prediction: &str, answer: &str) -> f64 {
    let object = |text: &str| -> Option<Map<String, Value>> {
        let begin = text.find('{')?;
        let mut values = serde_json::Deserializer::from_str(&text[begin..]).into_iter::<Value>();
        match values.next()?.ok()? {
            Value::Object(object) => Some(object),
            _ => None,
        }
    };
    let (Some(found), Some(right)) = (object(prediction), object(answer)) else { return 0.0 };
    let same = right.iter().filter(|(key, value)| found.get(*key) == Some(value)).count();
    same as f64 / right.len().max(found.len()).max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_count_and_order_does_not() {
        let answer = r#"{"a": 1, "b": "x", "c": [1, 2]}"#;
        assert_eq!(score(r#"Here: {"c":[1,2],"b":"x","a":1} and more {"#, answer), 1.0);
        assert_eq!(score(r#"{"a": 1, "b": "y", "c": [2, 1]}"#, answer), 1.0 / 3.0);
        assert_eq!(score(r#"{"a": 1, "b": "x", "c": [1, 2], "d": 0}"#, answer), 0.75);
        assert_eq!(score(r#"{"a": 1, "b": "x""#, answer), 0.0);
        assert_eq!(score("none", answer), 0.0);
    }
}
