//! The official `openai` Python client against a real server (`tests/python/openai_client.py`).

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::client::Served;

/// A Python that can import `openai`: `KVASIR_TEST_PYTHON`, or a throw-away virtual environment beside
/// the build. `None` where there is no Python at all.
fn python() -> Option<PathBuf> {
    if let Some(python) = std::env::var_os("KVASIR_TEST_PYTHON") {
        return Some(python.into());
    }
    Command::new("python3").arg("--version").output().ok()?;
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("openai-client");
    let python = folder.join("bin/python");
    let works = |python: &Path| {
        let import = Command::new(python).args(["-c", "import openai"]).output();
        import.is_ok_and(|o| o.status.success())
    };
    if !works(&python) {
        let run = |command: &mut Command| {
            let output = command.output().unwrap();
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{command:?}: {errors}");
        };
        run(Command::new("python3").args(["-m", "venv"]).arg(&folder));
        run(Command::new(&python).args(["-m", "pip", "install", "--quiet", "openai>=2.25,<3"]));
    }
    Some(python)
}

#[test]
fn passes_its_script_with_and_without_a_key() {
    let Some(python) = python() else {
        eprintln!("left out: there is no python3");
        return;
    };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/python/openai_client.py");
    for key in [None, Some("secret")] {
        let args: Vec<&str> = key.map_or(vec![], |key| vec!["--api-key", key]);
        let served = Served::start(&args);
        let output = Command::new(&python)
            .arg(&script)
            .arg(format!("{}/v1", served.base))
            .arg("smollm2")
            .args(&args)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{text}{errors}");
        eprintln!("{}", text.lines().last().unwrap_or_default());
    }
}
