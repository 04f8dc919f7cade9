//! Fields of a request body as a table: one row gives a field's name, type, range and
//! documentation. The same tables check bodies and make `/openapi.json`.

use serde_json::{Map, Value, json};

use crate::ApiError;
use crate::error::shorten;

/// One field of a JSON object.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Field {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    pub(crate) doc: &'static str,
}

/// Type and range of a field. `null` stands for an absent field everywhere.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    Bool,
    /// Whole number, both ends included. `16.0` counts as whole.
    Int {
        min: i64,
        max: i64,
    },
    /// Number, both ends included.
    Float {
        min: f64,
        max: f64,
    },
    /// Number above `min`, up to and including `max`.
    FloatAbove {
        min: f64,
        max: f64,
    },
    Text,
    TextOrTexts {
        most: usize,
    },
    /// List of token ids.
    Tokens,
    /// Object from token ids (as strings) to numbers in the range.
    TokenMap {
        min: f64,
        max: f64,
    },
    /// Text, list of texts, list of token ids, list of lists of token ids.
    Prompt,
    /// Non-empty list of objects.
    Objects,
    /// List of texts.
    Texts,
    /// Object of this table's fields.
    Object(&'static [Field]),
    /// Any object.
    AnyObject,
    /// Text out of these.
    OneOf(&'static [&'static str]),
    /// A feature this server lacks. Silently leaving it out would change the answer, so it is
    /// refused; values that ask for nothing (`null`, `false`, empty) pass.
    Unsupported,
    /// List of this table's objects (responses only).
    List(&'static [Field]),
    /// Any value (responses only).
    Any,
}

pub(crate) const fn field(name: &'static str, kind: Kind, doc: &'static str) -> Field {
    Field { name, kind, doc }
}

/// A body whose known fields have been checked against their tables. Getters find only fields
/// of the kind they are for; what is absent, `null` or unknown is `None`.
#[derive(Debug)]
pub(crate) struct Body<'a> {
    object: &'a Map<String, Value>,
    tables: &'a [&'static [Field]],
}

impl<'a> Body<'a> {
    /// Checks every field of `object` that a table knows. Unknown fields are ignored.
    pub(crate) fn check(
        object: &'a Map<String, Value>,
        tables: &'a [&'static [Field]],
    ) -> Result<Self, ApiError> {
        check_object(object, tables, "")?;
        Ok(Self { object, tables })
    }

    fn get(&self, name: &str) -> Option<&'a Value> {
        debug_assert!(
            self.tables.iter().any(|table| table.iter().any(|field| field.name == name)),
            "no table has the field '{name}'"
        );
        self.object.get(name).filter(|value| !value.is_null())
    }

    pub(crate) fn bool(&self, name: &str) -> Option<bool> {
        self.get(name)?.as_bool()
    }

    pub(crate) fn int(&self, name: &str) -> Option<i64> {
        as_int(self.get(name)?)
    }

    pub(crate) fn usize(&self, name: &str) -> Option<usize> {
        usize::try_from(self.int(name)?).ok()
    }

    pub(crate) fn f32(&self, name: &str) -> Option<f32> {
        Some(self.get(name)?.as_f64()? as f32)
    }

    pub(crate) fn text(&self, name: &str) -> Option<&'a str> {
        self.get(name)?.as_str()
    }

    pub(crate) fn texts(&self, name: &str) -> Option<Vec<String>> {
        match self.get(name)? {
            Value::String(text) => Some(vec![text.clone()]),
            list => Some(
                list.as_array()?.iter().filter_map(|t| t.as_str().map(str::to_owned)).collect(),
            ),
        }
    }

    pub(crate) fn tokens(&self, name: &str) -> Option<Vec<u32>> {
        Some(self.get(name)?.as_array()?.iter().filter_map(as_token).collect())
    }

    pub(crate) fn token_map(&self, name: &str) -> Option<Vec<(u32, f32)>> {
        let map = self.get(name)?.as_object()?;
        let pair = |(id, bias): (&String, &Value)| Some((id.parse().ok()?, bias.as_f64()? as f32));
        Some(map.iter().filter_map(pair).collect())
    }

    pub(crate) fn list(&self, name: &str) -> Option<&'a Vec<Value>> {
        self.get(name)?.as_array()
    }

    pub(crate) fn object(&self, name: &str) -> Option<&'a Map<String, Value>> {
        self.get(name)?.as_object()
    }

    /// The value as it came, for fields with rules of their own.
    pub(crate) fn value(&self, name: &str) -> Option<&'a Value> {
        self.get(name)
    }
}

fn check_object(
    object: &Map<String, Value>,
    tables: &[&'static [Field]],
    path: &str,
) -> Result<(), ApiError> {
    for (name, value) in object.iter().filter(|(_, value)| !value.is_null()) {
        let row = tables.iter().flat_map(|table| table.iter()).find(|field| field.name == name);
        if let Some(row) = row {
            row.kind.check(value, &format!("{path}{name}"))?;
        }
    }
    Ok(())
}

impl Kind {
    fn check(self, value: &Value, path: &str) -> Result<(), ApiError> {
        let wrong = |expected: &str| {
            Err(ApiError::bad_field(path, format!("must be {expected}, got {}", describe(value))))
        };
        match self {
            Self::Any => Ok(()),
            Self::Bool if value.is_boolean() => Ok(()),
            Self::Bool => wrong("true or false"),
            Self::Int { min, max } => match as_int(value) {
                Some(number) if (min..=max).contains(&number) => Ok(()),
                _ => wrong(&int_range(min, max)),
            },
            Self::Float { min, max } => match value.as_f64() {
                Some(number) if (min..=max).contains(&number) => Ok(()),
                _ => wrong(&float_range(min, max)),
            },
            Self::FloatAbove { min, max } => match value.as_f64() {
                Some(number) if number > min && number <= max => Ok(()),
                _ if max < f64::from(f32::MAX) => {
                    wrong(&format!("a number above {min} and at most {max}"))
                }
                _ => wrong(&format!("a number above {min}")),
            },
            Self::Text if value.is_string() => Ok(()),
            Self::Text => wrong("a string"),
            Self::TextOrTexts { most } => match value {
                Value::String(_) => Ok(()),
                Value::Array(list) if list.len() > most => {
                    wrong(&format!("a string or a list of at most {most} strings"))
                }
                Value::Array(list) => check_texts(list, path),
                _ => wrong("a string or a list of strings"),
            },
            Self::Texts => match value {
                Value::Array(list) => check_texts(list, path),
                _ => wrong("a list of strings"),
            },
            Self::Tokens => match value {
                Value::Array(list) => check_tokens(list, path),
                _ => wrong("a list of token ids"),
            },
            Self::TokenMap { min, max } => match value {
                Value::Object(map) => map.iter().try_for_each(|(id, bias)| {
                    let path = format!("{path}.{}", shorten(id));
                    if id.parse::<u32>().is_err() {
                        return Err(ApiError::bad_field(path, "must be named by a token id"));
                    }
                    Self::Float { min, max }.check(bias, &path)
                }),
                _ => wrong("an object from token ids to numbers"),
            },
            Self::Prompt => check_prompt(value, path),
            Self::Objects => match value {
                Value::Array(list) if list.is_empty() => wrong("a list with at least one object"),
                Value::Array(list) => match list.iter().position(|item| !item.is_object()) {
                    None => Ok(()),
                    Some(at) => not(list, at, path, "an object"),
                },
                _ => wrong("a list of objects"),
            },
            Self::List(_) => wrong("a list"),
            Self::Object(table) => match value {
                Value::Object(object) => check_object(object, &[table], &format!("{path}.")),
                _ => wrong("an object"),
            },
            Self::AnyObject if value.is_object() => Ok(()),
            Self::AnyObject => wrong("an object"),
            Self::OneOf(names) => match value.as_str() {
                Some(text) if names.contains(&text) => Ok(()),
                _ => wrong(&format!("one of {}", names.join(", "))),
            },
            Self::Unsupported if asks_for_nothing(value) => Ok(()),
            Self::Unsupported => Err(ApiError::bad_field(path, "is not supported by this server")),
        }
    }

    /// The JSON schema of this kind.
    pub(crate) fn schema(self) -> Value {
        let tokens = json!({"type": "array", "items": {"type": "integer", "minimum": 0}});
        let texts = json!({"type": "array", "items": {"type": "string"}});
        match self {
            Self::Bool => json!({"type": "boolean"}),
            Self::Int { min, max } => {
                let mut schema = json!({"type": "integer"});
                if min != i64::MIN {
                    schema["minimum"] = min.into();
                }
                if max != i64::MAX {
                    schema["maximum"] = max.into();
                }
                schema
            }
            Self::Float { min, max } => number_schema("minimum", min, max),
            Self::FloatAbove { min, max } => number_schema("exclusiveMinimum", min, max),
            Self::Text => json!({"type": "string"}),
            Self::TextOrTexts { most } => json!({"oneOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "maxItems": most},
            ]}),
            Self::Texts => texts,
            Self::Tokens => tokens,
            Self::TokenMap { min, max } => json!({
                "type": "object", "additionalProperties": number_schema("minimum", min, max),
            }),
            Self::Prompt => json!({"oneOf": [
                {"type": "string"}, texts, tokens, {"type": "array", "items": tokens},
            ]}),
            Self::Objects => json!({"type": "array", "minItems": 1, "items": {"type": "object"}}),
            Self::Object(table) => object_schema(&[table]),
            Self::List(table) => json!({"type": "array", "items": object_schema(&[table])}),
            Self::AnyObject => json!({"type": "object"}),
            Self::OneOf(names) => json!({"type": "string", "enum": names}),
            Self::Unsupported | Self::Any => json!({}),
        }
    }
}

/// The JSON schema of an object with the fields of these tables.
pub(crate) fn object_schema(tables: &[&'static [Field]]) -> Value {
    let mut properties = Map::new();
    for field in tables.iter().flat_map(|table| table.iter()) {
        let mut schema = field.kind.schema();
        schema["description"] = field.doc.into();
        properties.insert(field.name.to_owned(), schema);
    }
    json!({"type": "object", "properties": properties})
}

fn number_schema(lower: &str, min: f64, max: f64) -> Value {
    let mut schema = json!({"type": "number"});
    schema[lower] = json!(min);
    if max < f64::from(f32::MAX) {
        schema["maximum"] = json!(max);
    }
    schema
}

fn int_range(min: i64, max: i64) -> String {
    match (min, max) {
        (i64::MIN, _) => "a whole number".into(),
        (min, i64::MAX) => format!("a whole number of at least {min}"),
        (min, max) => format!("a whole number from {min} to {max}"),
    }
}

fn float_range(min: f64, max: f64) -> String {
    if max < f64::from(f32::MAX) {
        format!("a number from {min} to {max}")
    } else {
        format!("a number of at least {min}")
    }
}

fn check_texts(list: &[Value], path: &str) -> Result<(), ApiError> {
    match list.iter().position(|item| !item.is_string()) {
        None => Ok(()),
        Some(at) => not(list, at, path, "a string"),
    }
}

fn check_tokens(list: &[Value], path: &str) -> Result<(), ApiError> {
    match list.iter().position(|item| as_token(item).is_none()) {
        None => Ok(()),
        Some(at) => not(list, at, path, "a token id"),
    }
}

/// Most prompts in one request; each becomes a request of the engine.
const MAX_PROMPTS: usize = 1024;

fn check_prompt(value: &Value, path: &str) -> Result<(), ApiError> {
    let list = match value {
        Value::String(_) => return Ok(()),
        Value::Array(list) => list,
        _ => {
            let expected = "must be a string, a list of strings, a list of token ids or a list \
                            of lists of token ids";
            return Err(ApiError::bad_field(path, format!("{expected}, got {}", describe(value))));
        }
    };
    match list.first() {
        None => Err(ApiError::bad_field(path, "must not be an empty list")),
        Some(Value::Number(_)) => check_tokens(list, path),
        Some(_) if list.len() > MAX_PROMPTS => {
            let what = format!("must hold at most {MAX_PROMPTS} prompts, got {}", list.len());
            Err(ApiError::bad_field(path, what))
        }
        Some(Value::Array(_)) => {
            list.iter().enumerate().try_for_each(|(at, item)| match item.as_array() {
                Some(tokens) => check_tokens(tokens, &format!("{path}[{at}]")),
                None => not(list, at, path, "a list of token ids"),
            })
        }
        Some(_) => check_texts(list, path),
    }
}

fn not(list: &[Value], at: usize, path: &str, expected: &str) -> Result<(), ApiError> {
    let found = list.get(at).map_or_else(|| "nothing".to_owned(), describe);
    Err(ApiError::bad_field(format!("{path}[{at}]"), format!("must be {expected}, got {found}")))
}

fn as_int(value: &Value) -> Option<i64> {
    if let Some(number) = value.as_i64() {
        return Some(number);
    }
    // 2^53: beyond it a float no longer says which whole number was meant.
    let number =
        value.as_f64().filter(|n| n.fract() == 0.0 && n.abs() <= 9_007_199_254_740_992.0)?;
    value.is_f64().then_some(number as i64)
}

fn as_token(value: &Value) -> Option<u32> {
    u32::try_from(as_int(value)?).ok()
}

fn asks_for_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::String(text) => text.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}

/// A value in a few words, for an error message.
pub(crate) fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(truth) => truth.to_string(),
        Value::Number(number) => shorten(&number.to_string()),
        Value::String(text) => format!("the string '{}'", shorten(text)),
        Value::Array(list) => format!("a list of {}", list.len()),
        Value::Object(_) => "an object".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INNER: &[Field] = &[field("flag", Kind::Bool, "")];
    const TABLE: &[Field] = &[
        field("bool", Kind::Bool, ""),
        field("int", Kind::Int { min: 1, max: 8 }, ""),
        field("seed", Kind::Int { min: i64::MIN, max: i64::MAX }, ""),
        field("float", Kind::Float { min: 0.0, max: 2.0 }, ""),
        field("above", Kind::FloatAbove { min: 0.0, max: 1.0 }, ""),
        field("text", Kind::Text, ""),
        field("stop", Kind::TextOrTexts { most: 2 }, ""),
        field("texts", Kind::Texts, ""),
        field("tokens", Kind::Tokens, ""),
        field("bias", Kind::TokenMap { min: -1.0, max: 1.0 }, ""),
        field("prompt", Kind::Prompt, ""),
        field("objects", Kind::Objects, ""),
        field("object", Kind::Object(INNER), ""),
        field("any", Kind::AnyObject, ""),
        field("choice", Kind::OneOf(&["a", "b"]), ""),
        field("missing", Kind::Unsupported, ""),
    ];

    fn check(name: &str, value: Value) -> Result<(), ApiError> {
        let mut object = Map::new();
        object.insert(name.into(), value);
        Body::check(&object, &[TABLE]).map(|_| ())
    }

    #[test]
    fn takes_what_fits() {
        let cases = json!({
            "bool": [true], "int": [1, 8, 2.0], "seed": [-5, 9007199254740993i64],
            "float": [0, 2, 0.5], "above": [1, 0.001], "text": ["", "x"],
            "stop": ["x", [], ["a", "b"]], "texts": [["a"]], "tokens": [[], [1, 2]],
            "bias": [{}, {"7": -1}], "prompt": ["x", ["a", "b"], [1, 2], [[1], [2, 3]]],
            "objects": [[{}]], "object": [{}, {"flag": true, "other": 1}], "any": [{"x": 1}],
            "choice": ["b"], "missing": [false, "", [], {}],
        });
        for (name, values) in cases.as_object().unwrap() {
            for value in values.as_array().unwrap() {
                check(name, value.clone()).unwrap_or_else(|e| panic!("{name}={value}: {e:?}"));
            }
            check(name, Value::Null).unwrap();
        }
        check("unknown", json!({"any": ["thing"]})).unwrap();
    }

    #[test]
    fn names_what_does_not_fit() {
        let cases = [
            ("bool", json!(1), "bool"),
            ("int", json!(0), "int"),
            ("int", json!(1.5), "int"),
            ("int", json!(1e300), "int"),
            ("int", json!("3"), "int"),
            ("int", json!(true), "int"),
            ("float", json!(2.1), "float"),
            ("float", json!("1"), "float"),
            ("above", json!(0), "above"),
            ("text", json!(1), "text"),
            ("stop", json!(["a", "b", "c"]), "stop"),
            ("stop", json!(["a", 1]), "stop[1]"),
            ("texts", json!("a"), "texts"),
            ("tokens", json!([1, -1]), "tokens[1]"),
            ("tokens", json!([4294967296u64]), "tokens[0]"),
            ("bias", json!({"x": 1}), "bias.x"),
            ("bias", json!({"1": 5}), "bias.1"),
            ("bias", json!([1]), "bias"),
            ("prompt", json!([]), "prompt"),
            ("prompt", json!(5), "prompt"),
            ("prompt", json!(["a", 1]), "prompt[1]"),
            ("prompt", json!([1, "a"]), "prompt[1]"),
            ("prompt", json!([[1], ["a"]]), "prompt[1][0]"),
            ("prompt", json!([[1], 2]), "prompt[1]"),
            ("prompt", json!(vec!["a"; 2049]), "prompt"),
            ("objects", json!([]), "objects"),
            ("objects", json!([{}, 1]), "objects[1]"),
            ("object", json!({"flag": 1}), "object.flag"),
            ("object", json!(1), "object"),
            ("any", json!([]), "any"),
            ("choice", json!("c"), "choice"),
            ("missing", json!({"a": 1}), "missing"),
            ("missing", json!(0), "missing"),
        ];
        for (name, value, param) in cases {
            let error = check(name, value.clone()).expect_err(&format!("{name}={value}"));
            assert_eq!(error.field(), Some(param), "{name}={value}");
            assert!(error.message().contains(param), "{}", error.message());
        }
    }

    #[test]
    fn getters_read_what_was_checked() {
        let object =
            json!({"int": 3.0, "stop": "x", "bias": {"7": 0.5}, "tokens": [1, 2], "text": null});
        let object = object.as_object().unwrap();
        let body = Body::check(object, &[TABLE]).unwrap();
        assert_eq!(body.usize("int"), Some(3));
        assert_eq!(body.texts("stop"), Some(vec!["x".into()]));
        assert_eq!(body.token_map("bias"), Some(vec![(7, 0.5)]));
        assert_eq!(body.tokens("tokens"), Some(vec![1, 2]));
        assert_eq!(body.text("text"), None);
        assert_eq!(body.bool("bool"), None);
    }

    #[test]
    fn messages_state_range_and_value() {
        let error = check("float", json!(3.5)).unwrap_err();
        assert_eq!(error.message(), "'float' must be a number from 0 to 2, got 3.5");
        let error = check("int", json!("many")).unwrap_err();
        assert_eq!(
            error.message(),
            "'int' must be a whole number from 1 to 8, got the string 'many'"
        );
    }

    #[test]
    fn schemas_carry_the_ranges() {
        let schema = object_schema(&[TABLE]);
        assert_eq!(schema["properties"]["int"]["maximum"], 8);
        assert_eq!(schema["properties"]["above"]["exclusiveMinimum"], 0.0);
        assert_eq!(schema["properties"]["object"]["properties"]["flag"]["type"], "boolean");
    }
}
