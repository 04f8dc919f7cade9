use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use serde_json::{Value as Json, json};

use super::*;

/// The time at which `scripts/chat_template_fixtures.py` renders.
const NOW_SECONDS: u64 = 1_720_000_000;

fn options(case: &Json) -> RenderOptions {
    let flag = |name: &str| case[name].as_bool().unwrap_or(false);
    let extra = case["extra"].as_object().into_iter().flatten();
    RenderOptions {
        add_generation_prompt: flag("add_generation_prompt"),
        continue_final_message: flag("continue_final_message"),
        tools: case.get("tools").map(to_value),
        documents: case.get("documents").map(to_value),
        extra: extra.map(|(name, value)| (name.clone(), to_value(value))).collect(),
        now: Some(UNIX_EPOCH + Duration::from_secs(NOW_SECONDS)),
    }
}

fn render(source: &str, messages: &Json) -> Result<String> {
    ChatTemplate::new(source, None, None)?.render(messages, &RenderOptions::default())
}

fn error_of(source: &str, messages: &Json) -> String {
    render(source, messages).unwrap_err().to_string()
}

#[test]
fn renders_what_jinja2_renders() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/chat_templates");
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap();
    let cases: Vec<Json> = serde_json::from_str(&read("cases.json")).unwrap();
    assert!(cases.len() >= 23);
    for case in &cases {
        let name = case["name"].as_str().unwrap();
        let source = read(case["template"].as_str().unwrap());
        let token = |key: &str| case.get(key).map(|token| token.as_str().unwrap());
        let template = ChatTemplate::new(&source, token("bos_token"), token("eos_token")).unwrap();
        let rendered = template.render(&case["messages"], &options(case));
        match case["error"].as_str() {
            Some(error) => {
                let found = rendered.unwrap_err().to_string();
                assert_eq!(found, format!("chat template: {error}"), "{name}");
            }
            None => similar(name, &rendered.unwrap(), case["rendered"].as_str().unwrap()),
        }
    }
}

/// Equality that shows the first line that differs.
fn similar(name: &str, found: &str, expected: &str) {
    for (line, (found, expected)) in found.lines().zip(expected.lines()).enumerate() {
        assert_eq!(found, expected, "{name}, line {}", line + 1);
    }
    assert_eq!(found, expected, "{name}");
}

#[test]
fn mistakes_are_named_with_their_line() {
    let error = error_of("a\n{% if %}", &json!([]));
    assert!(error.starts_with("chat template: line 2: "), "{error}");
    let error = error_of("a\n\n{{ messages[0].x.y }}", &json!([{}]));
    assert!(error.starts_with("chat template: line 3: "), "{error}");
    let error = error_of("{{ 1 + 'a' }}", &json!([]));
    assert!(error.contains("line 1") && !error.contains('\n'), "{error}");
    let error = error_of("\n{{ undefined | tojson }}", &json!([]));
    assert!(error.contains("line 2") && error.contains("not JSON serializable"), "{error}");
}

#[test]
fn what_a_template_raises_is_shown_in_its_words() {
    let source = "{% macro check() %}{{ raise_exception('Roles must ' + 'alternate') }}\
                  {% endmacro %}\n{{ check() }}";
    assert_eq!(error_of(source, &json!([])), "chat template: Roles must alternate");
}

#[test]
fn a_final_message_that_cannot_be_continued_is_refused() {
    let template = ChatTemplate::chatml().unwrap();
    let refused = |template: &ChatTemplate, messages: &Json, prompt: bool| {
        let options = RenderOptions {
            continue_final_message: true,
            add_generation_prompt: prompt,
            ..RenderOptions::default()
        };
        template.render(messages, &options).unwrap_err().to_string()
    };
    let fine = json!([{"role": "user", "content": "x"}]);
    assert!(refused(&template, &fine, true).contains("exclude each other"));
    for bad in [json!([]), json!([{"role": "user"}]), json!([{"role": "u", "content": []}])] {
        assert!(refused(&template, &bad, false).contains("no text"), "{bad}");
    }
    let silent = ChatTemplate::new("{{ messages[0].role }}", None, None).unwrap();
    assert!(refused(&silent, &fine, false).contains("leaves the final message out"));
}

#[test]
fn a_continued_message_keeps_its_spaces_where_the_template_does() {
    let options = RenderOptions { continue_final_message: true, ..RenderOptions::default() };
    let messages = json!([
        {"role": "user", "content": "go go "},
        {"role": "assistant", "content": "go "},
    ]);
    let kept = ChatTemplate::chatml().unwrap().render(&messages, &options).unwrap();
    assert!(kept.ends_with("<|im_start|>assistant\ngo "), "{kept}");
    let trimming = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}";
    let trimming = ChatTemplate::new(trimming, None, None).unwrap();
    assert_eq!(trimming.render(&messages, &options).unwrap(), "[go go][go");
}

#[test]
fn extra_variables_replace_special_tokens_but_not_the_messages() {
    let template = ChatTemplate::new("{{ bos_token }}{{ messages }}", Some("<s>"), None).unwrap();
    let mut options = RenderOptions::default();
    assert_eq!(template.render(&json!([]), &options).unwrap(), "<s>[]");
    options.extra.insert("bos_token".to_owned(), Value::from("<b>"));
    options.extra.insert("messages".to_owned(), Value::from("mine"));
    assert_eq!(template.render(&json!([]), &options).unwrap(), "<b>[]");
}

#[test]
fn generation_tags_are_replaced_line_by_line() {
    let source = "{%- generation -%}\n{% endgeneration %}{% set x = 'generation' %}{% raw";
    assert_eq!(
        without_generation_tags(source),
        "{%- if true -%}\n{% endif %}{% set x = 'generation' %}{% raw"
    );
}

#[test]
fn constants_parse_and_render() {
    let messages = json!([{"role": "user", "content": "hi"}]);
    let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
    let chatml = ChatTemplate::chatml().unwrap().render(&messages, &options).unwrap();
    assert_eq!(chatml, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n");
    let plain = ChatTemplate::new(PLAIN, None, None).unwrap();
    assert_eq!(plain.render(&messages, &options).unwrap(), "user: hi\nassistant:");
}

#[test]
fn templates_can_be_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<ChatTemplate>();
}
