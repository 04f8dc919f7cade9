use std::sync::Arc;

use kvasir_kernels::Threads;

use super::*;
use crate::calibrate::Calibration;
use crate::decoder::Runner;
use crate::gguf::GgufFile;
use crate::model::LoadOptions;
use crate::testkit::{tiny_gguf, tiny_model};

const BLOCK_SIZE: usize = 16;

struct Calibrated {
    model: Arc<Model>,
    statistics: Statistics,
    corpus: CorpusInfo,
    folder: tempfile::TempDir,
}

impl Calibrated {
    fn new() -> Self {
        let model = tiny_model(1);
        let calibration =
            calibration(&["The quick brown fox jumps over the lazy dog, as it does."]);
        let mut runner = Runner::new(Threads::new(1).unwrap());
        let statistics = model.calibrate(&calibration, &mut runner, &mut |_, _| {}).unwrap();
        let corpus = CorpusInfo::of("fox", &calibration);
        Self { model, statistics, corpus, folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("tiny.kvstats")
    }

    fn save(&self) -> usize {
        self.model.save_statistics(&self.path(), &self.statistics, &self.corpus).unwrap()
    }

    fn load(&self) -> Result<(Statistics, CorpusInfo)> {
        self.model.load_statistics(&self.path(), BLOCK_SIZE)
    }

    /// What is said of other statistics, saved as if they were right.
    fn refused(&self, statistics: &Statistics) -> String {
        let model = self.model.fingerprint(BLOCK_SIZE);
        let bytes = to_bytes(statistics, &self.corpus, &model).unwrap();
        fs::write(self.path(), bytes).unwrap();
        self.load().unwrap_err().to_string()
    }

    /// What is said of the file after a change to its metadata, with a checksum that is right.
    fn refused_with(&self, key: &str, value: &str) -> String {
        self.save();
        let bytes = fs::read(self.path()).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap().tensors();
        let mut metadata = header.metadata().clone().unwrap();
        metadata.insert(key.to_owned(), value.to_owned());
        let sum = checksum(&metadata, tensors.clone());
        metadata.insert("checksum".to_owned(), sum);
        fs::write(self.path(), serialize(tensors, Some(metadata)).unwrap()).unwrap();
        self.load().unwrap_err().to_string()
    }
}

fn calibration<'a>(texts: &'a [&'a str]) -> Calibration<'a> {
    Calibration { texts, tokens_per_text: 56, block_size: BLOCK_SIZE }
}

#[test]
fn what_is_saved_is_loaded() {
    let calibrated = Calibrated::new();
    let bytes = calibrated.save();
    assert_eq!(fs::metadata(calibrated.path()).unwrap().len(), bytes as u64);
    let expected = (calibrated.statistics.clone(), calibrated.corpus.clone());
    assert_eq!(calibrated.load().unwrap(), expected);
    // Over an older file, and with nothing left beside it.
    calibrated.save();
    assert_eq!(calibrated.load().unwrap(), expected);
    assert_eq!(fs::read_dir(calibrated.folder.path()).unwrap().count(), 1);
}

#[test]
fn any_damage_is_noticed() {
    let calibrated = Calibrated::new();
    calibrated.save();
    let bytes = fs::read(calibrated.path()).unwrap();
    let (header, _) = SafeTensors::read_metadata(&bytes).unwrap();
    let steps = (0..header).step_by(7).chain((header..bytes.len()).step_by(61));
    for at in steps.chain([bytes.len() - 1]) {
        for bit in [0, 6] {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << bit;
            fs::write(calibrated.path(), damaged).unwrap();
            match calibrated.load() {
                Err(error @ ModelError::Statistics { .. }) => {
                    assert!(error.to_string().contains("tiny.kvstats refused: "), "{error}");
                }
                Err(error) => panic!("byte {at}, bit {bit}: {error}"),
                // A byte of padding or of white space may be any.
                Ok(loaded) => assert_eq!(loaded.0, calibrated.statistics, "byte {at}, bit {bit}"),
            }
        }
    }
    for len in [0, 1, 7, 8, 100, header, bytes.len() - 1] {
        fs::write(calibrated.path(), &bytes[..len]).unwrap();
        let error = calibrated.load().unwrap_err().to_string();
        assert!(error.contains("damaged"), "{len} bytes: {error}");
    }
    fs::write(calibrated.path(), vec![0; 1 << 20]).unwrap();
    let error = calibrated.load().unwrap_err().to_string();
    assert!(error.contains("1048576 bytes, where those of this model have at most"), "{error}");
}

#[test]
fn statistics_of_something_else_are_refused() {
    let calibrated = Calibrated::new();
    for (key, value, message) in [
        ("format", "kvasir-something", "not a file of statistics"),
        ("version", "999", "of version 999; this program has version 1"),
        ("block_size", "32", "for blocks of 32 tokens, not 16"),
        ("model", &"0".repeat(64), "of another model"),
        ("tokens", "many", "'tokens' of its header is 'many', not a number"),
        ("corpus_hash", "0", "'corpus_hash' of its header is no hash"),
    ] {
        let error = calibrated.refused_with(key, value);
        assert!(error.ends_with(message), "{error}");
    }
    calibrated.save();
    let error = tiny_model(2).load_statistics(&calibrated.path(), BLOCK_SIZE).unwrap_err();
    assert!(error.to_string().ends_with("of another model"), "{error}");
    let error = calibrated.model.load_statistics(&calibrated.path(), 64).unwrap_err();
    assert!(error.to_string().ends_with("for blocks of 16 tokens, not 64"), "{error}");
    let none = calibrated.model.load_statistics(Path::new("/no/such/file"), BLOCK_SIZE);
    assert!(matches!(none, Err(ModelError::Io { .. })));
}

#[test]
fn wrong_shapes_are_refused() {
    let calibrated = Calibrated::new();
    let mut statistics = calibrated.statistics.clone();
    statistics.layers.pop();
    assert!(calibrated.refused(&statistics).ends_with("8 tensors, not 16"));
    let mut statistics = calibrated.statistics.clone();
    statistics.layers[1][0][1].scales.pop();
    let error = calibrated.refused(&statistics);
    let expected = "'layers.1.groups.0.values.scales' is F32 of shape [1], expected F32 of [2]";
    assert!(error.ends_with(expected), "{error}");
    let mut statistics = calibrated.statistics.clone();
    let moved = statistics.layers[1].remove(0);
    statistics.layers[0].push(moved);
    assert!(calibrated.refused(&statistics).contains("lacks tensor 'layers.1."));
}

#[test]
fn impossible_values_are_refused() {
    let calibrated = Calibrated::new();
    type Change = fn(&mut PartStatistics);
    let changes: [(Change, &str); 8] = [
        (|p| p.mean[3] = f32::NAN, "a mean that is not finite, at 3"),
        (|p| p.mean[0] = f32::INFINITY, "a mean that is not finite, at 0"),
        (|p| p.weights[31] = 0.0, "a weight that is not positive, at 31"),
        (|p| p.weights[1] = f32::NAN, "a weight that is not positive, at 1"),
        (|p| p.basis[1023] = f16::NAN, "a basis that is not finite, at 1023"),
        (|p| p.scales[1] = -1.0, "a scale that is not positive, at 1"),
        (|p| p.scales[0] = 0.0, "a scale that is not positive, at 0"),
        (|p| p.scales[0] = f32::INFINITY, "a scale that is not positive, at 0"),
    ];
    for (change, message) in changes {
        let mut statistics = calibrated.statistics.clone();
        change(&mut statistics.layers[1][0][0]);
        let error = calibrated.refused(&statistics);
        let expected = format!("layer 1, group 0, keys: {message}");
        assert!(error.ends_with(&expected), "{error}");
    }
}

#[test]
fn saving_fails_with_the_path_and_leaves_nothing() {
    let calibrated = Calibrated::new();
    let save = |path: &Path, corpus: &CorpusInfo| {
        calibrated.model.save_statistics(path, &calibrated.statistics, corpus).unwrap_err()
    };
    let error = save(&calibrated.folder.path().join("none/a.kvstats"), &calibrated.corpus);
    assert!(error.to_string().starts_with("cannot write ") && error.to_string().contains("none/a"));
    let taken = calibrated.folder.path().join("taken");
    fs::create_dir(&taken).unwrap();
    assert!(matches!(save(&taken, &calibrated.corpus), ModelError::Write { .. }));
    let other = CorpusInfo { tokens_per_text: 1, ..calibrated.corpus.clone() };
    assert!(matches!(save(&calibrated.path(), &other), ModelError::Statistics { .. }));
    assert_eq!(fs::read_dir(calibrated.folder.path()).unwrap().count(), 1);
}

/// The search for a basis of numbers that are none would not end.
#[test]
fn a_model_that_is_broken_is_not_calibrated() {
    let mut file = tiny_gguf(1).build();
    // The last two tensors are the norms of layer 1, of 32 channels each.
    let attention_norm = file.len() - 256..file.len() - 128;
    for weight in file[attention_norm].chunks_exact_mut(4) {
        weight.copy_from_slice(&f32::NAN.to_le_bytes());
    }
    let file = GgufFile::from_bytes(file, Path::new("nan.gguf")).unwrap();
    let model =
        Model::from_gguf(&file, &LoadOptions { threads: 1, ..LoadOptions::default() }).unwrap();
    let text = "a".repeat(60);
    let mut runner = Runner::new(Threads::new(1).unwrap());
    let error = model.calibrate(&calibration(&[&text]), &mut runner, &mut |_, _| {}).unwrap_err();
    assert!(error.to_string().ends_with("of layer 1 are not finite"), "{error}");
}

/// Readers find whole files while two threads write.
#[test]
fn writers_do_not_disturb_readers() {
    let calibrated = Calibrated::new();
    calibrated.save();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| (0..20).for_each(|_| assert!(calibrated.save() > 0)));
        }
        for _ in 0..40 {
            assert_eq!(calibrated.load().unwrap().0, calibrated.statistics);
        }
    });
    assert_eq!(fs::read_dir(calibrated.folder.path()).unwrap().count(), 1);
}

#[test]
fn fingerprints_tell_models_and_corpora_apart() {
    let (model, other) = (tiny_model(1), tiny_model(2));
    assert_ne!(model.fingerprint(16), other.fingerprint(16));
    assert_ne!(model.fingerprint(16), model.fingerprint(32));
    let texts = [["a", "b"], ["a", "c"], ["b", "a"]];
    let mut seen: Vec<_> =
        texts.iter().map(|t| model.statistics_fingerprint(&calibration(t))).collect();
    seen.push(other.statistics_fingerprint(&calibration(&texts[0])));
    seen.push(
        model.statistics_fingerprint(&Calibration { tokens_per_text: 9, ..calibration(&texts[0]) }),
    );
    let distinct: std::collections::HashSet<_> = seen.iter().collect();
    assert_eq!(distinct.len(), seen.len());
}
