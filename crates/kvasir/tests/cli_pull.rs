//! `kvasir pull` against a hub on the loopback interface.
// unwrap: in the helpers, where a failure is a failed test.
#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};

use support::{Reply, Seen, Server, fake_python, files_below, serve_file};

/// 300,000 bytes and the checksum that goes with them.
fn content() -> Vec<u8> {
    (0..300_000_u32).map(|i| (i % 251) as u8).collect()
}

const SHA256: &str = "3c65ea93424a9c362fec0e3a69ea36031e8a358441479dd665cc6110eabe7b08";
const NAME: &str = "hf:owner/repo/folder/model.gguf";
const PATH: &str = "/owner/repo/resolve/main/folder/model.gguf";
const CACHED: &str = "hub/owner/repo/main/folder/model.gguf";

fn kvasir(home: &Path, endpoint: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvasir"));
    command
        .env("KVASIR_HOME", home)
        .env("HF_ENDPOINT", endpoint)
        .env_remove("HF_TOKEN")
        .env("KVASIR_PYTHON", "no-such-python");
    for proxy in
        ["http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"]
    {
        command.env_remove(proxy);
    }
    command
}

fn pull(home: &Path, endpoint: &str) -> Output {
    kvasir(home, endpoint).args(["pull", NAME, "--json"]).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn json(output: &Output) -> serde_json::Value {
    assert!(output.status.success(), "{}", stderr(output));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// As the hub answers for a large file: a redirect that carries size and checksum.
fn redirect(to: &str, sha256: &str, bytes: usize) -> Reply {
    Reply::status(302)
        .header("Location", to)
        .header("X-Linked-Size", bytes)
        .header("X-Linked-Etag", format!("\"{sha256}\""))
        .header("ETag", "\"of-the-redirect\"")
}

fn part(home: &Path, suffix: &str) -> PathBuf {
    home.join(format!("{CACHED}{suffix}"))
}

#[test]
fn fresh_then_cached_without_network() {
    let home = tempfile::tempdir().unwrap();
    let hub = Server::start(|seen, _| serve_file(seen, &content(), "tag"));
    let value = json(&pull(home.path(), &hub.url()));
    assert_eq!(value["name"], NAME);
    assert_eq!(value["path"], home.path().join(CACHED).to_str().unwrap());
    assert_eq!(value["bytes"], 300_000);
    assert_eq!(value["sha256"], SHA256);
    assert_eq!(value["source"], format!("{}{PATH}", hub.url()));
    assert_eq!(value["cached"], false);
    assert_eq!(fs::read(home.path().join(CACHED)).unwrap(), content());
    assert_eq!(files_below(home.path()), [CACHED.to_owned(), format!("{CACHED}.record")]);
    assert_eq!(hub.seen().len(), 1);
    assert_eq!(hub.seen()[0].path, PATH);

    drop(hub);
    let value = json(&pull(home.path(), "http://127.0.0.1:9"));
    assert_eq!(value["cached"], true);
    assert_eq!(value["sha256"], SHA256);
    let plain = kvasir(home.path(), "http://127.0.0.1:9").args(["pull", NAME]).output().unwrap();
    assert_eq!(
        String::from_utf8(plain.stdout).unwrap(),
        format!("{}\n", home.path().join(CACHED).display())
    );
}

#[test]
fn a_broken_connection_is_continued() {
    let home = tempfile::tempdir().unwrap();
    let hub = Server::start(|seen, before| {
        let reply = serve_file(seen, &content(), "tag");
        if before < 2 { reply.cut_after(70_000) } else { reply }
    });
    json(&pull(home.path(), &hub.url()));
    assert_eq!(fs::read(home.path().join(CACHED)).unwrap(), content());
    let ranges: Vec<Option<String>> = hub.seen().into_iter().map(|seen| seen.range).collect();
    assert_eq!(ranges, [None, Some("bytes=70000-".to_owned()), Some("bytes=140000-".to_owned())]);
    assert_eq!(hub.seen()[1].if_range.as_deref(), Some("\"tag\""));
}

/// Runs a pull that gets `PART_BYTES` of the file and then only failures that end it.
fn interrupted(home: &Path, etag: &'static str) {
    let hub = Server::start(move |seen, before| match before {
        0 => serve_file(seen, &content(), etag).cut_after(PART_BYTES),
        _ => Reply::status(401),
    });
    // The address is part of what must agree for a file to be continued.
    let output = pull(home, &hub.url());
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert_eq!(fs::metadata(part(home, ".part")).unwrap().len(), PART_BYTES as u64);
}

const PART_BYTES: usize = 100_000;

/// Lets a part file of one test server belong to another: their ports differ.
fn move_part_to(home: &Path, endpoint: &str) {
    let path = part(home, ".resume");
    let mut state: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    state["url"] = format!("{endpoint}{PATH}").into();
    fs::write(path, state.to_string()).unwrap();
}

#[test]
fn a_later_run_continues() {
    let home = tempfile::tempdir().unwrap();
    interrupted(home.path(), "tag");
    let hub = Server::start(|seen, _| serve_file(seen, &content(), "tag"));
    move_part_to(home.path(), &hub.url());
    let value = json(&pull(home.path(), &hub.url()));
    assert_eq!(value["sha256"], SHA256);
    assert_eq!(hub.seen().len(), 1);
    assert_eq!(hub.seen()[0].range.as_deref(), Some("bytes=100000-"));
    assert_eq!(files_below(home.path()), [CACHED.to_owned(), format!("{CACHED}.record")]);
}

#[test]
fn a_file_that_changed_meanwhile_is_begun_again() {
    let home = tempfile::tempdir().unwrap();
    interrupted(home.path(), "old");
    let hub = Server::start(|seen, _| serve_file(seen, &content(), "new"));
    move_part_to(home.path(), &hub.url());
    let value = json(&pull(home.path(), &hub.url()));
    assert_eq!(value["sha256"], SHA256);
    let last = hub.seen().pop().unwrap();
    assert_eq!(last.range, None);
}

#[test]
fn a_part_that_is_whole_already() {
    let home = tempfile::tempdir().unwrap();
    interrupted(home.path(), "tag");
    fs::write(part(home.path(), ".part"), content()).unwrap();
    let hub = Server::start(|seen, _| serve_file(seen, &content(), "tag"));
    move_part_to(home.path(), &hub.url());
    assert_eq!(json(&pull(home.path(), &hub.url()))["sha256"], SHA256);
    assert_eq!(hub.seen().len(), 1);
}

#[test]
fn a_wrong_checksum_leaves_nothing_behind() {
    let home = tempfile::tempdir().unwrap();
    let hub = Server::start(|seen, _| match seen.path.as_str() {
        PATH => redirect("/blob", &"0".repeat(64), 300_000),
        _ => serve_file(seen, &content(), "tag"),
    });
    let output = pull(home.path(), &hub.url());
    assert_eq!(output.status.code(), Some(1));
    let error = stderr(&output);
    assert!(error.contains("wrong checksum") && error.contains(SHA256), "{error}");
    assert!(output.stdout.is_empty());
    assert_eq!(files_below(home.path()), [""; 0]);
}

#[test]
fn a_wrong_length_leaves_nothing_behind() {
    let home = tempfile::tempdir().unwrap();
    let hub = Server::start(|seen, _| match seen.path.as_str() {
        PATH => redirect("/blob", SHA256, 299_999),
        _ => serve_file(seen, &content(), "tag"),
    });
    let output = pull(home.path(), &hub.url());
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("299999 bytes"), "{}", stderr(&output));
    assert_eq!(files_below(home.path()), [""; 0]);
}

#[test]
fn the_token_stays_with_the_hub() {
    let home = tempfile::tempdir().unwrap();
    let storage = Arc::new(Server::start(|seen, before| {
        let reply = serve_file(seen, &content(), "blob");
        if before == 0 { reply.cut_after(50_000) } else { reply }
    }));
    let elsewhere = storage.url();
    let hub = Server::start(move |seen, _| match seen.path.as_str() {
        PATH => Reply::status(307).header("Location", "/moved"),
        _ => redirect(&format!("{elsewhere}/blob?signature=x"), SHA256, 300_000),
    });
    let output = kvasir(home.path(), &hub.url())
        .args(["pull", NAME, "--json"])
        .env("HF_TOKEN", "hf_secret")
        .output()
        .unwrap();
    assert_eq!(json(&output)["sha256"], SHA256);
    assert!(!stderr(&output).contains("hf_secret") && !stderr(&output).contains("signature"));
    let with_token = |seen: &Seen| seen.authorization.as_deref() == Some("Bearer hf_secret");
    assert!(hub.seen().iter().all(with_token) && hub.seen().len() == 4, "{:?}", hub.seen());
    let storage = storage.seen();
    assert_eq!(storage.len(), 2);
    assert!(storage.iter().all(|seen| seen.authorization.is_none()), "{storage:?}");
    assert_eq!(storage[1].range.as_deref(), Some("bytes=50000-"));
    assert_eq!(storage[1].if_range.as_deref(), Some("\"blob\""));
}

#[test]
fn refusals_are_explained() {
    for (status, token, expected) in [
        (401, None, "set HF_TOKEN"),
        (403, None, "set HF_TOKEN"),
        (403, Some("hf_x"), "HF_TOKEN is not valid or may not read"),
        (404, None, "no such file"),
        (410, None, "410"),
    ] {
        let home = tempfile::tempdir().unwrap();
        let hub = Server::start(move |_, _| Reply::status(status));
        let mut command = kvasir(home.path(), &hub.url());
        let output = command.args(["pull", NAME]).envs(token.map(|t| ("HF_TOKEN", t))).output();
        let output = output.unwrap();
        assert_eq!(output.status.code(), Some(1));
        let error = stderr(&output);
        let last = error.lines().last().unwrap();
        assert!(last.starts_with("error: cannot fetch hf:owner/repo"), "{error}");
        assert!(last.contains(expected), "{error}");
        assert_eq!(hub.seen().len(), 1, "{status} was tried again");
        assert_eq!(files_below(home.path()), [""; 0]);
    }
}

#[test]
fn servers_that_are_busy_are_asked_again_within_bounds() {
    let home = tempfile::tempdir().unwrap();
    let busy = |status| Reply::status(status).header("Retry-After", 0);
    let hub = Server::start(move |seen, before| match before {
        0 => busy(503),
        1 => busy(429),
        _ => serve_file(seen, &content(), "tag"),
    });
    assert_eq!(json(&pull(home.path(), &hub.url()))["sha256"], SHA256);

    let home = tempfile::tempdir().unwrap();
    let hub = Server::start(move |_, _| busy(500));
    let output = pull(home.path(), &hub.url());
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("gave up after 5 attempts"), "{}", stderr(&output));
    assert_eq!(hub.seen().len(), 5);
}

#[test]
fn redirects_end() {
    let home = tempfile::tempdir().unwrap();
    let hub = Server::start(|_, _| Reply::status(302).header("Location", "/again"));
    let output = pull(home.path(), &hub.url());
    assert!(stderr(&output).contains("redirects more than 10 times"), "{}", stderr(&output));
    assert_eq!(hub.seen().len(), 11);
}

#[test]
fn the_second_of_two_pulls_waits_for_the_first() {
    let home = tempfile::tempdir().unwrap();
    let (asked, was_asked) = mpsc::channel();
    let (release, released) = mpsc::channel::<()>();
    let released = Mutex::new(released);
    let hub = Server::start(move |seen, _| {
        asked.send(()).unwrap();
        released.lock().unwrap().recv().unwrap();
        serve_file(seen, &content(), "tag")
    });
    let start = || {
        kvasir(home.path(), &hub.url())
            .args(["pull", NAME, "--json"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let first = start();
    was_asked.recv().unwrap();
    let mut second = start();
    let mut notes = BufReader::new(second.stderr.take().unwrap());
    let mut note = String::new();
    while !note.contains("waiting for another kvasir") {
        note.clear();
        assert!(notes.read_line(&mut note).unwrap() > 0, "the second pull did not wait");
    }
    release.send(()).unwrap();
    let first = first.wait_with_output().unwrap();
    notes.read_to_string(&mut note).unwrap();
    let second = second.wait_with_output().unwrap();
    assert_eq!(json(&first)["cached"], false);
    assert!(second.status.success(), "{note}");
    let second: serde_json::Value = serde_json::from_slice(&second.stdout).unwrap();
    assert_eq!(second["cached"], true);
    assert_eq!(fs::read(home.path().join(CACHED)).unwrap(), content());
    assert_eq!(hub.seen().len(), 1);
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_one_clear_line() {
    let home = tempfile::tempdir().unwrap();
    fs::create_dir_all(home.path().join(CACHED).parent().unwrap()).unwrap();
    std::os::unix::fs::symlink("/dev/full", part(home.path(), ".part")).unwrap();
    let hub = Server::start(|seen, _| serve_file(seen, &content(), "tag"));
    let output = pull(home.path(), &hub.url());
    assert_eq!(output.status.code(), Some(1));
    let error = stderr(&output);
    assert!(error.contains("cannot write") && error.contains("model.gguf.part"), "{error}");
    assert!(!home.path().join(CACHED).exists());
}

#[test]
fn a_known_name_tells_why_neither_way_works() {
    let home = tempfile::tempdir().unwrap();
    let tools = tempfile::tempdir().unwrap();
    let hub = Server::start(|_, _| Reply::status(404));
    let python = fake_python(tools.path(), "echo 'python3: No module named pip' >&2; exit 1");
    for (python, reason) in [
        (python, "No module named pip"),
        (PathBuf::from("no-such-python"), "'no-such-python' was not found"),
    ] {
        let output = kvasir(home.path(), &hub.url())
            .args(["pull", "smollm2"])
            .env("KVASIR_PYTHON", python)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1));
        let error = stderr(&output);
        let last = error.lines().last().unwrap();
        assert!(last.starts_with("error: cannot fetch smollm2: "), "{error}");
        assert!(last.contains(reason) && last.contains("404"), "{error}");
    }
}

#[test]
fn gemma_shows_its_terms_before_anything_is_fetched() {
    let home = tempfile::tempdir().unwrap();
    let hub = Server::start(|_, _| Reply::status(404));
    let output = kvasir(home.path(), &hub.url()).args(["pull", "gemma3-270m"]).output().unwrap();
    let error = stderr(&output);
    let terms = error.find("ai.google.dev/gemma/terms").unwrap();
    assert!(terms < error.find("no-such-python").unwrap(), "{error}");
}
