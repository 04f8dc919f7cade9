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
    assert_eq!(error.message(), "'int' must be a whole number from 1 to 8, got the string 'many'");
}

#[test]
fn schemas_carry_the_ranges() {
    let schema = object_schema(&[TABLE]);
    assert_eq!(schema["properties"]["int"]["maximum"], 8);
    assert_eq!(schema["properties"]["above"]["exclusiveMinimum"], 0.0);
    assert_eq!(schema["properties"]["object"]["properties"]["flag"]["type"], "boolean");
}
