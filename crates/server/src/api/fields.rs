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
mod tests;
