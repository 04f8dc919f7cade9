//! Real models, pulled on first use.

use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, OnceLock};

use kvasir_model::{LoadOptions, Model};

/// A command of the binary under test.
pub fn kvasir(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvasir"));
    command.args(args).env_remove("RUST_LOG");
    command
}

/// The file of a known model.
pub fn path(name: &str) -> PathBuf {
    let output = kvasir(&["pull", name, "--json"]).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "pulling {name} failed: {errors}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    PathBuf::from(report["path"].as_str().unwrap())
}

/// SmolLM2, loaded once for all tests.
pub fn smollm2() -> Arc<Model> {
    static MODEL: OnceLock<Arc<Model>> = OnceLock::new();
    let load = || Model::load(&path("smollm2"), &LoadOptions::default()).map(Arc::new);
    Arc::clone(MODEL.get_or_init(|| load().unwrap()))
}
