use proptest::prelude::*;

use super::*;
use crate::chat_template::{ChatTemplate, RenderOptions};
use crate::gguf::{Metadata, Strings, Value};

fn strings<S: AsRef<str>>(values: &[S]) -> Value {
    Value::StringArray(values.iter().collect())
}

const WORDS: &[&str] = &["he", "ll", "hell", "hello", "Ġw", "or", "Ġwor", "ĠĠ"];
const MERGES: &[&str] = &["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "Ġ Ġ"];
const CONTROL: &[&str] = &["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
const HELLO: u32 = 259;
const WOR: u32 = 262;
const END_OF_TEXT: u32 = 264;
const IM_START: u32 = 265;
const IM_END: u32 = 266;

/// Byte-level BPE: the 256 bytes are the tokens 0 to 255, then [`WORDS`], then [`CONTROL`].
fn byte_level_metadata() -> Metadata {
    let mut tokens: Vec<String> = byte_level::CHARS.iter().map(char::to_string).collect();
    tokens.extend(WORDS.iter().chain(CONTROL).map(|word| (*word).to_owned()));
    let mut types = vec![1; 256 + WORDS.len()];
    types.extend([3, 3, 3]);
    let mut metadata = Metadata::default();
    metadata.insert("tokenizer.ggml.model", Value::String("gpt2".to_owned()));
    metadata.insert("tokenizer.ggml.pre", Value::String("smollm".to_owned()));
    metadata.insert("tokenizer.ggml.tokens", strings(&tokens));
    metadata.insert("tokenizer.ggml.token_type", Value::IntArray(types));
    metadata.insert("tokenizer.ggml.merges", strings(MERGES));
    metadata.insert("tokenizer.ggml.bos_token_id", Value::Uint(IM_START.into()));
    metadata.insert("tokenizer.ggml.eos_token_id", Value::Uint(IM_END.into()));
    metadata
}

fn byte_level() -> Tokenizer {
    Tokenizer::from_gguf(&byte_level_metadata()).unwrap()
}

const BOS: u32 = 1;

/// SentencePiece BPE: `<unk>`, `<s>`, `</s>`, the 256 bytes as 3 to 258, then a few pieces.
fn pieces_metadata() -> Metadata {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).into();
    let mut types = vec![2, 3, 3];
    tokens.extend((0..=255_u8).map(|byte| format!("<0x{byte:02X}>")));
    types.extend([6; 256]);
    for piece in ["▁", "h", "i", "hi", "▁hi", "▁▁"] {
        tokens.push(piece.to_owned());
        types.push(1);
    }
    tokens.push("  ".to_owned());
    types.push(4);
    let scores = (0..tokens.len()).map(|id| if id < 259 { 0.0 } else { -(id as f64) }).collect();
    let mut metadata = Metadata::default();
    metadata.insert("tokenizer.ggml.model", Value::String("llama".to_owned()));
    metadata.insert("tokenizer.ggml.tokens", strings(&tokens));
    metadata.insert("tokenizer.ggml.token_type", Value::IntArray(types));
    metadata.insert("tokenizer.ggml.scores", Value::FloatArray(scores));
    metadata
}

fn pieces() -> Tokenizer {
    Tokenizer::from_gguf(&pieces_metadata()).unwrap()
}

fn texts(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
    ids.iter().map(|id| tokenizer.token_str(*id).unwrap().to_owned()).collect()
}

#[test]
fn byte_level_text_becomes_merged_tokens() {
    let tokenizer = byte_level();
    let ids = tokenizer.encode("hello wor   <|im_end|>é", true).unwrap();
    assert_eq!(ids[..2], [HELLO, WOR]);
    assert_eq!(texts(&tokenizer, &ids[2..]), ["ĠĠ", "Ġ", "<|im_end|>", "Ã", "©"]);
    assert_eq!(tokenizer.decode(&ids, false), "hello wor   <|im_end|>é");
    assert_eq!(tokenizer.decode(&ids, true), "hello wor   é");
    assert!(tokenizer.encode("", true).unwrap().is_empty());
}

#[test]
fn llama_bpe_takes_a_word_that_is_a_token_whole() {
    let mut metadata = byte_level_metadata();
    metadata.insert("tokenizer.ggml.merges", strings(&["h e"]));
    let split = Tokenizer::from_gguf(&metadata).unwrap().encode("hello", false).unwrap();
    assert_eq!(split.len(), 4);
    metadata.insert("tokenizer.ggml.pre", Value::String("llama-bpe".to_owned()));
    let tokenizer = Tokenizer::from_gguf(&metadata).unwrap();
    assert_eq!(tokenizer.encode("hello", false).unwrap(), [HELLO]);
    // It also starts texts with BOS by itself, unless the file says otherwise.
    assert_eq!(tokenizer.encode("hello", true).unwrap(), [IM_START, HELLO]);
    metadata.insert("tokenizer.ggml.add_bos_token", Value::Bool(false));
    let tokenizer = Tokenizer::from_gguf(&metadata).unwrap();
    assert_eq!(tokenizer.encode("hello", true).unwrap(), [HELLO]);
}

#[test]
fn bos_and_eos_are_added_once_and_only_when_asked_for() {
    let mut metadata = byte_level_metadata();
    metadata.insert("tokenizer.ggml.add_bos_token", Value::Bool(true));
    metadata.insert("tokenizer.ggml.add_eos_token", Value::Bool(true));
    let tokenizer = Tokenizer::from_gguf(&metadata).unwrap();
    assert_eq!(tokenizer.encode("hello", false).unwrap(), [HELLO]);
    assert_eq!(tokenizer.encode("hello", true).unwrap(), [IM_START, HELLO, IM_END]);
    let written = "<|im_start|>hello<|im_end|>";
    assert_eq!(tokenizer.encode(written, true).unwrap(), [IM_START, HELLO, IM_END]);
    let doubled = "<|im_start|><|im_start|>hello";
    assert_eq!(tokenizer.encode(doubled, true).unwrap(), [IM_START, IM_START, HELLO, IM_END]);
}

#[test]
fn end_of_generation_tokens_are_the_declared_and_the_known_ones() {
    assert_eq!(byte_level().eos_ids(), [IM_END, END_OF_TEXT]);
    assert_eq!(byte_level().bos_id(), Some(IM_START));
    let mut metadata = byte_level_metadata();
    metadata.insert("tokenizer.ggml.eot_token_id", Value::Uint(7));
    let mut types = vec![1; 256 + WORDS.len()];
    types.extend([1, 3, 3]);
    metadata.insert("tokenizer.ggml.token_type", Value::IntArray(types));
    let tokenizer = Tokenizer::from_gguf(&metadata).unwrap();
    assert_eq!(tokenizer.eos_ids(), [IM_END, 7], "<|endoftext|> is plain text in this file");
}

#[test]
fn pieces_take_a_space_prefix_and_fall_back_to_bytes() {
    let tokenizer = pieces();
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_ids()), (Some(BOS), [2].as_slice()));
    let ids = tokenizer.encode("hi hi</s>hié", true).unwrap();
    assert_eq!(texts(&tokenizer, &ids), ["<s>", "▁hi", "▁hi", "</s>", "▁hi", "<0xC3>", "<0xA9>"]);
    assert_eq!(tokenizer.decode(&ids, true), "hi hi hié");
    assert_eq!(tokenizer.decode(&ids, false), "<s> hi hi</s> hié");
    assert_eq!(tokenizer.encode("<s>hi", true).unwrap(), tokenizer.encode("hi", true).unwrap());
    assert_eq!(tokenizer.encode("", true).unwrap(), [BOS]);

    let mut metadata = pieces_metadata();
    metadata.insert("tokenizer.ggml.add_space_prefix", Value::Bool(false));
    metadata.insert("tokenizer.ggml.add_bos_token", Value::Bool(false));
    let bare = Tokenizer::from_gguf(&metadata).unwrap();
    let ids = bare.encode(" hi  hi", true).unwrap();
    assert_eq!(texts(&bare, &ids), ["▁hi", "  ", "hi"]);
    assert_eq!(bare.decode(&ids, true), " hi  hi");
}

#[test]
fn token_bytes_are_raw() {
    let bpe = byte_level();
    assert_eq!(bpe.token_bytes(0xC3), Some([0xC3].as_slice()));
    assert_eq!(bpe.token_bytes(WOR), Some(b" wor".as_slice()));
    assert_eq!(bpe.token_bytes(IM_END), Some(b"<|im_end|>".as_slice()));
    assert_eq!(bpe.token_bytes(267), None);
    assert_eq!((bpe.token_to_id("Ġwor"), bpe.token_to_id(" wor")), (Some(WOR), None));
    assert!(bpe.is_special(IM_END) && !bpe.is_special(WOR) && !bpe.is_special(9999));
    let spm = pieces();
    assert_eq!(spm.token_bytes(3 + 0xFF), Some([0xFF].as_slice()));
    assert_eq!(spm.token_bytes(spm.token_to_id("▁hi").unwrap()), Some(b" hi".as_slice()));
}

#[test]
fn a_character_split_over_tokens_comes_out_when_it_is_whole() {
    let tokenizer = byte_level();
    let mut decoder = TokenDecoder::new(&tokenizer, true);
    let mut pushed = Vec::new();
    for byte in "a😀b".bytes() {
        pushed.push(decoder.push(&tokenizer, byte.into()));
    }
    assert_eq!(pushed, ["a", "", "", "", "😀", "b"]);
    // 0xF0 0x9F is the start of a character until something else follows.
    assert_eq!(decoder.push(&tokenizer, 0xF0), "");
    assert_eq!(decoder.push(&tokenizer, 0x9F), "");
    assert_eq!(decoder.push(&tokenizer, u32::from(b'x')), "\u{FFFD}x");
    assert_eq!(decoder.push(&tokenizer, 0xFF), "\u{FFFD}");
    assert_eq!(decoder.push(&tokenizer, 0xE2), "");
    assert_eq!(decoder.push(&tokenizer, IM_END), "");
    assert_eq!(decoder.push(&tokenizer, 9999), "");
    assert_eq!(decoder.flush(), "\u{FFFD}");
    assert_eq!(decoder.flush(), "");
}

#[test]
fn a_continued_text_keeps_its_leading_space() {
    let tokenizer = pieces();
    let hi = tokenizer.token_to_id("▁hi").unwrap();
    assert_eq!(TokenDecoder::new(&tokenizer, true).push(&tokenizer, hi), "hi");
    assert_eq!(TokenDecoder::continuing(true).push(&tokenizer, hi), " hi");
}

proptest! {
    #[test]
    fn pushes_and_flush_are_decode(
        ids in proptest::collection::vec(prop_oneof![0_u32..300, 0xC0_u32..0xF8], 0..60),
        skip_special in any::<bool>(),
    ) {
        for tokenizer in [byte_level(), pieces()] {
            let mut decoder = TokenDecoder::new(&tokenizer, skip_special);
            let mut text = String::new();
            for id in &ids {
                text.push_str(&decoder.push(&tokenizer, *id));
            }
            text.push_str(&decoder.flush());
            prop_assert_eq!(text, tokenizer.decode(&ids, skip_special));
        }
    }

    #[test]
    fn decode_undoes_encode(text in "(hello|wor|<[|]im_end[|]>|<s>| |\\n|\\PC){0,30}") {
        let bpe = byte_level();
        let ids = bpe.encode(&text, true).unwrap();
        prop_assert_eq!(&bpe.decode(&ids, false), &text);
        let mut metadata = pieces_metadata();
        metadata.insert("tokenizer.ggml.add_space_prefix", Value::Bool(false));
        metadata.insert("tokenizer.ggml.add_bos_token", Value::Bool(false));
        let spm = Tokenizer::from_gguf(&metadata).unwrap();
        let ids = spm.encode(&text, true).unwrap();
        // "▁" in a text cannot be told from a space, in this kind of vocabulary.
        prop_assert_eq!(spm.decode(&ids, false), text.replace('▁', " "));
    }
}

/// A megabyte of what each part of the encoder is worst at. It takes a second; were any part
/// quadratic, it would take hours.
#[test]
fn a_megabyte_is_encoded_in_linear_time() {
    let mut llama3 = byte_level_metadata();
    llama3.insert("tokenizer.ggml.pre", Value::String("llama-bpe".to_owned()));
    let mut spm = pieces_metadata();
    spm.insert("tokenizer.ggml.add_space_prefix", Value::Bool(false));
    for metadata in [byte_level_metadata(), llama3, spm] {
        let tokenizer = Tokenizer::from_gguf(&metadata).unwrap();
        for unit in ["h", " ", "\n", " \u{3000}", "hell", "!", "<|im_end|>", "<|im_", "\n  "] {
            let text = unit.repeat(1_000_000 / unit.len());
            let ids = tokenizer.encode(&text, false).unwrap();
            assert!(tokenizer.decode(&ids, false) == text, "{unit:?}");
        }
    }
}

#[test]
fn malformed_metadata_is_an_error_that_names_the_key() {
    type Change = fn(&mut Metadata);
    let cases: &[(bool, &str, Change)] = &[
        (true, "tokenizer.ggml.model", |m| *m = Metadata::default()),
        (true, "unknown model 'bert'", |m| set(m, "model", Value::String("bert".into()))),
        (true, "tokenizer.ggml.model", |m| set(m, "model", Value::Uint(1))),
        (true, "unknown pre-tokenizer 'x'", |m| set(m, "pre", Value::String("x".into()))),
        (true, "tokenizer.ggml.tokens", |m| {
            set(m, "tokens", Value::StringArray(Strings::default()))
        }),
        (true, "tokenizer.ggml.tokens", |m| set(m, "tokens", Value::Uint(0))),
        (true, "tokenizer.ggml.token_type", |m| set(m, "token_type", Value::IntArray(vec![1]))),
        (true, "tokenizer.ggml.token_type", |m| set(m, "token_type", strings(&["1"]))),
        (true, "tokenizer.ggml.merges", |m| set(m, "merges", strings(&["h zz"]))),
        (true, "'hx' is not a token", |m| set(m, "merges", strings(&["h e", "h x"]))),
        (true, "at index 1: no space", |m| set(m, "merges", strings(&["h e", "hell"]))),
        (true, "tokenizer.ggml.merges", |m| set(m, "merges", Value::Bool(true))),
        (true, "tokenizer.ggml.bos_token_id", |m| set(m, "bos_token_id", Value::Uint(267))),
        (true, "tokenizer.ggml.eos_token_id", |m| set(m, "eos_token_id", Value::Int(-1))),
        (true, "tokenizer.ggml.eot_token_id", |m| set(m, "eot_token_id", Value::Uint(1 << 40))),
        (true, "tokenizer.ggml.add_bos_token", |m| set(m, "add_bos_token", Value::Uint(1))),
        (true, "tokenizer.chat_template", |m| {
            m.insert("tokenizer.chat_template", Value::Uint(1));
        }),
        (false, "tokenizer.ggml.scores", |m| set(m, "scores", Value::FloatArray(vec![0.0]))),
        (false, "NaN at index 3", |m| {
            let mut scores = vec![0.0; 266];
            scores[3] = f64::NAN;
            set(m, "scores", Value::FloatArray(scores));
        }),
        (false, "tokenizer.ggml.scores", |m| set(m, "scores", Value::Uint(1))),
        (false, "'<unk>' at index 0", |m| {
            set(m, "token_type", Value::IntArray(vec![6; 266]));
        }),
    ];
    fn set(metadata: &mut Metadata, key: &str, value: Value) {
        metadata.insert(format!("tokenizer.ggml.{key}"), value);
    }
    for (is_byte_level, expected, change) in cases {
        let mut metadata = if *is_byte_level { byte_level_metadata() } else { pieces_metadata() };
        change(&mut metadata);
        let error = Tokenizer::from_gguf(&metadata).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
        assert!(!error.contains('\n') && error.len() < 300, "{error}");
    }
}

#[test]
fn keys_that_are_needed_are_missed_by_name() {
    for (key, metadata) in [
        ("tokenizer.ggml.tokens", byte_level_metadata()),
        ("tokenizer.ggml.merges", byte_level_metadata()),
        ("tokenizer.ggml.scores", pieces_metadata()),
    ] {
        let mut without = Metadata::default();
        for (name, value) in metadata.iter().filter(|(name, _)| *name != key) {
            without.insert(name, value.clone());
        }
        let error = Tokenizer::from_gguf(&without).unwrap_err().to_string();
        assert_eq!(error, format!("model metadata lacks '{key}'"));
    }
    let mut metadata = byte_level_metadata();
    metadata.insert("tokenizer.ggml.add_bos_token", Value::Bool(true));
    let mut without = Metadata::default();
    for (name, value) in metadata.iter().filter(|(name, _)| !name.ends_with("bos_token_id")) {
        without.insert(name, value.clone());
    }
    let error = Tokenizer::from_gguf(&without).unwrap_err().to_string();
    assert!(error.contains("bos_token_id") && error.contains("add_bos_token"), "{error}");
}

#[test]
fn a_model_without_a_template_gets_one_that_fits_its_tokens() {
    let messages = serde_json::json!([{"role": "user", "content": "hi"}]);
    let render = |metadata: &Metadata| {
        let tokenizer = Tokenizer::from_gguf(metadata).unwrap();
        let template = ChatTemplate::for_tokenizer(&tokenizer).unwrap();
        template.render(&messages, &RenderOptions::default()).unwrap()
    };
    let mut metadata = byte_level_metadata();
    assert_eq!(render(&metadata), "<|im_start|>user\nhi<|im_end|>\n");
    assert_eq!(render(&pieces_metadata()), "user: hi\n");
    let own = "{{ bos_token }}{{ eos_token }}".to_owned();
    metadata.insert("tokenizer.chat_template", Value::String(own));
    assert_eq!(render(&metadata), "<|im_start|><|im_end|>");
}

#[test]
fn shared_between_threads_and_short_to_print() {
    fn shared<T: Send + Sync>() {}
    shared::<Tokenizer>();
    let printed = format!("{:?}", byte_level());
    assert!(printed.contains("267") && printed.len() < 200, "{printed}");
}
