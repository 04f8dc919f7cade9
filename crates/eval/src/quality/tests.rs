use kvasir_model::Threads;
use kvasir_model::testkit::{tiny_model, tiny_model_in_f32};

use super::*;

const CONTINUATION: Settings = Settings {
    workload: Workload::Continuation { contexts: 3, context_len: 100 },
    continuation: 20,
    block_size: 16,
    chunk: 64,
};
const RETRIEVAL: Settings = Settings {
    workload: Workload::Retrieval {
        contexts: 5,
        passages: 3,
        passages_total: 4,
        passage_len: 32,
        seed: 0,
    },
    ..CONTINUATION
};

fn texts() -> Vec<String> {
    let text = |seed: usize| -> String {
        (0..130).map(|i| char::from(b'a' + ((i * seed + i * i) % 26) as u8)).collect()
    };
    vec![text(3), "short".to_owned(), text(5), text(7), text(11)]
}

fn try_measure(recipes: &[Recipe], settings: &Settings) -> Result<Vec<RecipeQuality>> {
    measure_sharing(recipes, Sharing::OFF, settings)
}

fn measure_sharing(
    recipes: &[Recipe],
    sharing: Sharing,
    settings: &Settings,
) -> Result<Vec<RecipeQuality>> {
    let mut runner = Runner::new(Threads::new(1).unwrap());
    let caches = Caches { recipes, sharing, ..Caches::default() };
    let model = tiny_model_in_f32(1);
    super::measure(&model, &mut runner, &texts(), &caches, settings, &mut |_, _| {})
}

fn measure(recipes: &[Recipe], settings: &Settings) -> Vec<RecipeQuality> {
    try_measure(recipes, settings).unwrap()
}

#[test]
fn the_control_against_itself_is_zero() {
    for (settings, name, contexts) in
        [(CONTINUATION, "continuation", 3), (RETRIEVAL, "retrieval", 5)]
    {
        let rows = measure(&[Recipe::F16], &settings);
        let row = &rows[0];
        assert_eq!((row.kl_mean, row.kl_p95, row.top1, row.nll_delta), (0.0, 0.0, 1.0, 0.0));
        assert_eq!((row.worst.kl_mean, row.workload), (0.0, name));
        assert_eq!((row.contexts, row.recipe.as_str()), (contexts, "f16"));
        assert!(row.ratio_sealed < 1.0 && row.ratio_sealed > 0.9, "{}", row.ratio_sealed);
        assert!(row.ratio_total < row.ratio_sealed);
    }
}

#[test]
fn fewer_bits_lose_more_and_hold_more() {
    for settings in [CONTINUATION, RETRIEVAL] {
        let rows = measure(&[Recipe::F32, Recipe::INT8, Recipe::KIVI4, Recipe::KIVI2], &settings);
        for pair in rows.windows(2) {
            assert!(pair[0].kl_mean < pair[1].kl_mean, "{pair:?}");
            assert!(pair[0].ratio_sealed < pair[1].ratio_sealed, "{pair:?}");
        }
        for row in &rows {
            assert!(row.kl_p95 >= row.kl_mean * 0.5 && row.worst.kl_mean >= row.kl_mean);
            assert!((0.0..=1.0).contains(&row.top1));
        }
    }
}

#[test]
fn the_same_settings_give_the_same_rows() {
    let rows = measure(&[Recipe::KIVI4], &RETRIEVAL);
    assert_eq!(rows, measure(&[Recipe::KIVI4], &RETRIEVAL));
}

#[test]
fn progress_ends_at_its_total() {
    let mut runner = Runner::new(Threads::new(1).unwrap());
    let mut seen = Vec::new();
    let recipes = [Recipe::INT8, Recipe::KIVI4];
    let caches = Caches { recipes: &recipes, ..Caches::default() };
    let mut progress = |done, total| seen.push((done, total));
    super::measure(&tiny_model(1), &mut runner, &texts(), &caches, &RETRIEVAL, &mut progress)
        .unwrap();
    // Three lanes of five contexts, twenty steps.
    let expected: Vec<(usize, usize)> = (1..=35).map(|done| (done, 35)).collect();
    assert_eq!(seen, expected);
}

#[test]
fn settings_and_short_corpora_are_errors() {
    let message = |settings: &Settings| try_measure(&[Recipe::INT8], settings).unwrap_err();
    let none = message(&Settings { continuation: 0, ..RETRIEVAL });
    assert_eq!(none.to_string(), "a continuation needs at least one token");
    let unaligned = message(&Settings { block_size: 64, ..RETRIEVAL });
    assert!(matches!(unaligned, EvalError::Settings { .. }), "{unaligned}");
    let short = message(&Settings { continuation: 31, ..CONTINUATION });
    assert_eq!(short.to_string(), "no text of the corpus has 131 tokens");
}

#[test]
fn the_tree_says_its_ratios_and_refuses_coded_recipes() {
    let tree: Sharing = "tree:0.9".parse().unwrap();
    let rows = measure_sharing(&[Recipe::F16, Recipe::F32], tree, &RETRIEVAL).unwrap();
    for row in &rows {
        // The first two layers and the last two take no part: those are all.
        let tree = row.tree.unwrap();
        assert_eq!(
            (tree.ratio_counted, tree.ratio_realised, tree.ratio_predicted),
            (1.0, 1.0, 1.0)
        );
        assert_eq!(row.sharing, "tree:0.9");
        assert!(row.kl_mean < 1e-4, "only the frame differs: {row:?}");
    }
    assert!(measure(&[Recipe::F16], &RETRIEVAL)[0].tree.is_none());
    let refused = measure_sharing(&[Recipe::INT8], tree, &RETRIEVAL).unwrap_err().to_string();
    assert!(refused.contains("f16 and f32 recipes only"), "{refused}");
}
