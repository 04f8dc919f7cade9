//! What tests of `pull` need in place of the network: a hub on the loopback interface and wheels.
// Compiled into several test binaries, none of which uses all of it.
#![allow(dead_code, unreachable_pub, unused_imports)]
// Helpers outside of #[test] functions; a failure here is a failed test.
#![allow(clippy::unwrap_used)]

mod server;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use zip::ZipWriter;
use zip::write::SimpleFileOptions;

pub use server::{Reply, Seen, Server, serve_file};

/// Writes a zip file with deflated members.
pub fn write_wheel(path: &Path, members: &[(&str, &[u8])]) {
    let mut zip = ZipWriter::new(File::create(path).unwrap());
    let options = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Deflated);
    for (name, content) in members {
        zip.start_file(*name, options).unwrap();
        zip.write_all(content).unwrap();
    }
    zip.finish().unwrap();
}

/// Writes an executable script that stands in for `python3`; `$dest` in `body` is the folder of
/// `--dest` and `$requirement` the last argument. Every call adds a line to `calls` beside it.
pub fn fake_python(folder: &Path, body: &str) -> PathBuf {
    let path = folder.join("fake-python");
    let script = format!(
        "#!/bin/sh\necho \"$*\" >> '{calls}'\n\
         for argument in \"$@\"; do\n\
         [ \"$previous\" = --dest ] && dest=\"$argument\"\n\
         previous=\"$argument\"\ndone\nrequirement=\"$previous\"\n{body}\n",
        calls = folder.join("calls").display()
    );
    // Written by a child: a file that this process, or a child it forks meanwhile, holds open for
    // writing cannot be executed.
    let status = Command::new("sh")
        .args(["-c", "printf %s \"$1\" > \"$2\" && chmod 755 \"$2\"", "sh", &script])
        .arg(&path)
        .status()
        .unwrap();
    assert!(status.success());
    path
}

/// Names of all files below `folder`, sorted, without lock files.
pub fn files_below(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_none_or(|extension| extension != "lock") {
                found.push(path.strip_prefix(folder).unwrap().display().to_string());
            }
        }
    }
    found.sort();
    found
}
