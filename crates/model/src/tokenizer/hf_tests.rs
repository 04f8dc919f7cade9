use std::path::Path;

use serde_json::{Value, json};

use super::{TokenDecoder, Tokenizer};

fn write(dir: &Path, name: &str, value: &Value) {
    std::fs::write(dir.join(name), value.to_string()).unwrap();
}

fn added(id: u32, content: &str, special: bool) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
           "normalized": false, "special": special})
}

/// Byte-level, with a template that puts `<s>` first.
fn byte_level_json() -> Value {
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst",
                       "stride": 0},
        "padding": null,
        "added_tokens": [added(6, "<s>", true), added(7, "<e>", true), added(8, "<x>", false)],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                          "use_regex": true},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}},
                     {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [6], "tokens": ["<s>"]}}
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
                    "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
                  "continuing_subword_prefix": null, "end_of_word_suffix": null,
                  "fuse_unk": false, "byte_fallback": false,
                  "vocab": {"a": 0, "b": 1, "Ġ": 2, "ab": 3, "Ã": 4, "©": 5},
                  "merges": [["a", "b"]]}
    })
}

/// SentencePiece-like, as Llama 2 is converted; there is no token 7 or 8.
fn pieces_json() -> Value {
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [added(0, "<unk>", true), added(6, "<s>", true)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>",
                  "continuing_subword_prefix": null, "end_of_word_suffix": null,
                  "fuse_unk": true, "byte_fallback": true,
                  "vocab": {"<unk>": 0, "<0xC3>": 1, "<0xA9>": 2, "▁": 3, "a": 4, "▁a": 9},
                  "merges": ["▁ a"]}
    })
}

#[test]
fn byte_level_with_its_configuration() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "tokenizer.json", &byte_level_json());
    write(
        dir.path(),
        "tokenizer_config.json",
        &json!({"bos_token": {"content": "<s>"}, "eos_token": "<e>",
                "chat_template": [{"name": "tool_use", "template": "T"},
                                  {"name": "default", "template": "D"}]}),
    );
    write(dir.path(), "generation_config.json", &json!({"eos_token_id": [8, 7, 999]}));
    let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!(tokenizer.bos_id(), Some(6));
    assert_eq!(tokenizer.eos_ids(), [7, 8]);
    assert_eq!(tokenizer.chat_template(), Some("D"));
    assert_eq!(tokenizer.vocab_size(), 9);

    // The truncation to 2 tokens that the file carries is not for us.
    let ids = tokenizer.encode("abé ab<x>", false).unwrap();
    assert_eq!(ids, [3, 4, 5, 2, 3, 8]);
    assert_eq!(tokenizer.decode(&ids, true), "abé ab<x>");
    assert_eq!(tokenizer.token_bytes(5), Some([0xA9].as_slice()));
    assert_eq!(tokenizer.encode("ab", true).unwrap(), [6, 3]);
    assert_eq!(tokenizer.encode("<s>ab", true).unwrap(), [6, 3]);
    assert_eq!(tokenizer.encode("<s><s>", true).unwrap(), [6, 6]);
    assert!(tokenizer.is_special(6) && !tokenizer.is_special(8));

    std::fs::write(dir.path().join("chat_template.jinja"), "J").unwrap();
    write(
        dir.path(),
        "tokenizer_config.json",
        &json!({"bos_token": "<s>", "add_bos_token": false,
          "add_eos_token": true, "eos_token": "<e>", "chat_template": "C"}),
    );
    let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!(tokenizer.chat_template(), Some("J"));
    assert_eq!(tokenizer.encode("ab", true).unwrap(), [3, 7]);
    assert_eq!(tokenizer.encode("<s>ab", true).unwrap(), [6, 3, 7]);
}

#[test]
fn pieces_with_a_gap_in_the_ids() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "tokenizer.json", &pieces_json());
    write(dir.path(), "config.json", &json!({"bos_token_id": 6, "eos_token_id": null}));
    write(dir.path(), "tokenizer_config.json", &json!({"add_bos_token": true}));
    let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    let ids = tokenizer.encode("a aé", true).unwrap();
    assert_eq!(ids, [6, 9, 9, 1, 2]);
    assert_eq!(tokenizer.decode(&ids, true), "a aé");
    assert_eq!(tokenizer.token_bytes(1), Some([0xC3].as_slice()));
    assert_eq!(tokenizer.token_bytes(7), Some([].as_slice()));
    assert_eq!(tokenizer.vocab_size(), 10);
    assert!(tokenizer.eos_ids().is_empty());
    let mut decoder = TokenDecoder::new(&tokenizer, true);
    let pushed: Vec<String> = ids.iter().map(|id| decoder.push(&tokenizer, *id)).collect();
    assert_eq!(pushed, ["", "a", " a", "", "é"]);
}

#[test]
fn unusable_folders_are_refused_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |part: &str| {
        let error = Tokenizer::from_dir(dir.path()).unwrap_err().to_string();
        assert!(error.contains(part) && !error.contains('\n'), "{error}");
    };
    refused("tokenizer.json");
    std::fs::write(dir.path().join("tokenizer.json"), "{\"model\": 1").unwrap();
    refused("EOF while parsing");
    std::fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    refused("tokenizer.json");
    let mut other = byte_level_json();
    other["decoder"] = json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
    write(dir.path(), "tokenizer.json", &other);
    refused("neither byte-level nor SentencePiece-like");
    write(dir.path(), "tokenizer.json", &byte_level_json());
    write(dir.path(), "tokenizer_config.json", &json!({"bos_token": "<nope>"}));
    refused("'<nope>'");
    std::fs::write(dir.path().join("tokenizer_config.json"), "[").unwrap();
    refused("tokenizer_config.json");
}
