//! The embedded corpus: texts to estimate statistics of keys and values from.
//!
//! A codec that is calibrated needs sample keys and values of the model at hand, and a user who has
//! just fetched a model has no corpus. These texts are the default for that calibration of the KV
//! cache, and `eval --corpus embedded` measures on them. They were written for this purpose and are
//! under the project's license.
//!
//! The kinds are those that KV caches meet: reports, dialogues, code, tables, instructions, and
//! articles in four languages besides English. Each text has at least 1150 tokens with the tokenizers
//! of SmolLM2 and of Gemma 3, so that a window of 1024 tokens can be cut from any of them. Figures that
//! were measured on the corpus hold for these bytes only: a change to a text asks for measuring again.

/// One text of the embedded corpus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CorpusText {
    /// `NN_kind_topic`: the name of its file in `crates/model/corpus`. Distinct, in ascending order.
    pub name: &'static str,
    /// The whole text, with `\n` at the end of lines.
    pub text: &'static str,
}

macro_rules! corpus {
    ($($name:literal),+ $(,)?) => {
        &[$(CorpusText {
            name: $name,
            text: include_str!(concat!("../corpus/", $name, ".txt")),
        }),+]
    };
}

static TEXTS: &[CorpusText] = corpus![
    "01_news_harbour_ferry",
    "02_news_battery_recycling",
    "03_news_chess_final",
    "04_news_peat_archaeology",
    "05_dialogue_chat_assistant",
    "06_dialogue_radio_interview",
    "07_dialogue_repair_workshop",
    "08_code_python_tide_station",
    "09_code_rust_segment_log",
    "10_code_html_js_bus_board",
    "11_table_weather_stations",
    "12_table_school_library",
    "13_howto_recipes",
    "14_howto_sensor_gateway",
    "15_german_nachtzug",
    "16_french_marais_salants",
    "17_spanish_observatorio",
    "18_chinese_city_heat",
];

/// The texts of the embedded corpus, always in the same order.
///
/// Neighbours are alike in kind: who takes only some of the texts should take every n-th, not the
/// first n.
pub fn embedded() -> &'static [CorpusText] {
    TEXTS
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn texts_are_many_and_named_apart() {
        let names: HashSet<_> = embedded().iter().map(|t| t.name).collect();
        assert!(names.len() >= 16, "{} texts", names.len());
        assert_eq!(names.len(), embedded().len());
        assert!(embedded().is_sorted_by_key(|t| t.name));
    }

    #[test]
    fn texts_are_long_and_the_same_bytes_on_every_platform() {
        for CorpusText { name, text } in embedded() {
            assert!(text.len() >= 3500, "{name}: {} bytes", text.len());
            assert!(!text.contains('\r'), "{name} has a carriage return");
        }
    }

    /// Repeated passages would count twice in the statistics, and would be hits of the prefix cache.
    #[test]
    fn no_passage_of_200_characters_occurs_twice() {
        const PASSAGE: usize = 200;
        let mut seen = HashSet::new();
        for CorpusText { name, text } in embedded() {
            let bounds: Vec<usize> =
                text.char_indices().map(|(i, _)| i).chain([text.len()]).collect();
            for ends in bounds.windows(PASSAGE + 1) {
                let passage = &text[ends[0]..ends[PASSAGE]];
                assert!(seen.insert(passage), "{name} repeats: {passage}");
            }
        }
    }
}
