use kvasir_engine::Engine;
use kvasir_model::testkit::tiny_model;

use super::*;

fn profile(recipes: &[&str]) -> Profile {
    let shapes = vec![
        Shape { num_seqs: 1, context: 40, decode: 3 },
        Shape { num_seqs: 3, context: 20, decode: 3 },
        Shape { num_seqs: 2, context: 90, decode: 3 },
    ];
    let model = tiny_model(1);
    let mut config = EngineConfig {
        kv_cache_memory: 1 << 20,
        max_num_batched_tokens: 64,
        block_size: 16,
        threads: 1,
        ..EngineConfig::default()
    };
    make_room(&mut config, &shapes, model.spec());
    let mut engine = Engine::new(model, config.clone()).unwrap();
    let recipes: Vec<_> = recipes.iter().map(|recipe| recipe.parse().unwrap()).collect();
    let mut last = (0, 0);
    let found =
        measure(&mut engine, &recipes, &shapes, 1, &mut |done, of| last = (done, of)).unwrap();
    assert_eq!(last, (3 * recipes.len(), 3 * recipes.len()));
    assert!(!engine.has_unfinished());
    Profile::new("tiny".to_owned(), Environment::here("0", 1), &config, shapes, found)
}

#[test]
fn every_step_is_there_and_cells_have_its_bytes() {
    let profile = profile(&["f16", "int8"]);
    assert_eq!(profile.recipes(), ["f16", "int8"]);
    assert_eq!(profile.cells.len(), 6);
    for cell in &profile.cells {
        assert!(cell.prefill > 0.0 && cell.decode > 0.0, "{cell:?}");
        assert!(cell.tokens >= cell.num_seqs * (cell.context + 3), "{cell:?}");
    }
    // Two prompts of 90 tokens in steps of 64: 64, 26 + 38, and 52 with a token of decode.
    let rows: Vec<usize> = profile
        .steps
        .iter()
        .filter(|step| step.recipe == "f16" && step.shape == 2)
        .map(|step| step.counts[0])
        .collect();
    assert_eq!(rows, [64, 64, 53, 2, 2, 2]);
    let text = serde_json::to_string(&profile).unwrap();
    assert_eq!(Profile::parse(&text).unwrap(), profile);
    let [f16, int8] = ["f16", "int8"].map(|recipe| profile.bytes_model(recipe).unwrap());
    assert!(int8.per_token < 0.7 * f16.per_token, "{int8:?} {f16:?}");
    let measured = profile.cells.iter().find(|c| c.recipe == "f16" && c.context == 90).unwrap();
    let full = measured.tokens - measured.tail_tokens;
    let found = f16.bytes(2, full, measured.tail_tokens) / measured.physical_bytes as f64;
    assert!(int8.is_coded() && !f16.is_coded());
    assert!((found - 1.0).abs() < 0.25, "{found}");
    assert_eq!(profile.bytes_model("kivi4"), None);
    assert_eq!(profile.step_model("kivi4"), None);
}

#[test]
fn shapes_that_were_held_out_are_predicted() {
    let profile = profile(&["f16"]);
    let predicted = profile.held_out();
    assert!(predicted.iter().any(|p| p.decode) && predicted.iter().any(|p| !p.decode));
    assert!(predicted.iter().all(|p| p.num_seqs == 3 && p.predicted > 0.0));
    let errors = mean_errors(&predicted);
    assert_eq!(errors.len(), 1);
    let mean = predicted.iter().map(Predicted::error).sum::<f64>() / predicted.len() as f64;
    assert!((errors[0].1 - mean).abs() < 1e-12);
}

#[test]
fn other_files_are_refused() {
    for (text, expected) in [("{", "no profile: EOF"), ("{}", "no profile: missing field")] {
        let error = Profile::parse(text).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
    }
    let mut other = profile(&["f16"]);
    other.version = 7;
    let error = Profile::parse(&serde_json::to_string(&other).unwrap()).unwrap_err().to_string();
    assert!(error.starts_with("a profile of version 7"), "{error}");
    let good = profile(&["f16"]);
    let (mut blocks, mut steps) = (good.clone(), good);
    blocks.block_size = 0;
    steps.steps[0].shape = 99;
    for (damaged, expected) in [(blocks, "blocks of 0 tokens"), (steps, "a step is of shape 99")] {
        let error = Profile::parse(&serde_json::to_string(&damaged).unwrap()).unwrap_err();
        assert!(error.to_string().starts_with(expected), "{error}");
    }
}

#[test]
fn shapes_fit_the_model() {
    assert_eq!(Shape::profile(100_000, 100_000).len(), 18);
    let few = Shape::profile(300, 1000);
    assert!(
        !few.is_empty() && few.iter().all(|s| s.context < 300 && s.num_seqs * s.context <= 1000)
    );
    assert_eq!(Shape::grid(&[1, 8], &[64, 128], 4).len(), 4);
}
