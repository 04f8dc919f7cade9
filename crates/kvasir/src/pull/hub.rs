//! Names of files on the Hugging Face hub.

use std::fmt;
use std::path::PathBuf;

use anyhow::{Result, bail};

/// A file on the hub: `hf:OWNER/REPO/FILE[@REVISION]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HubFile {
    pub(crate) owner: String,
    pub(crate) repo: String,
    /// May contain folders.
    pub(crate) file: String,
    /// Branch, tag, commit or `refs/pr/N`.
    pub(crate) revision: String,
}

/// What the hub serves when no revision is named.
const DEFAULT_REVISION: &str = "main";

impl HubFile {
    /// Parses `hf:OWNER/REPO/FILE[@REVISION]`.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let Some(rest) = text.strip_prefix("hf:") else {
            bail!("'{text}' does not begin with 'hf:'");
        };
        let (path, revision) = match rest.rsplit_once('@') {
            Some((path, revision)) => (path, revision),
            None => (rest, DEFAULT_REVISION),
        };
        let mut parts = path.splitn(3, '/');
        let (Some(owner), Some(repo), Some(file)) = (parts.next(), parts.next(), parts.next())
        else {
            bail!("'{text}' must have the form hf:OWNER/REPO/FILE or hf:OWNER/REPO/FILE@REVISION");
        };
        // The parts become folders of the cache, so none may lead out of it.
        for segment in [owner, repo].into_iter().chain(file.split('/')).chain(revision.split('/')) {
            if segment.is_empty() || segment == "." || segment == ".." {
                bail!("'{text}' has an empty or relative part, '{segment}'");
            }
            if let Some(bad) = segment.chars().find(|c| c.is_control() || "\\?#:@\"".contains(*c)) {
                bail!("'{text}' has a character that cannot be part of a name, {bad:?}");
            }
        }
        Ok(Self {
            owner: owner.to_owned(),
            repo: repo.to_owned(),
            file: file.to_owned(),
            revision: revision.to_owned(),
        })
    }

    /// Where `endpoint` (without a slash at its end) serves the file.
    pub(crate) fn url(&self, endpoint: &str) -> String {
        format!(
            "{endpoint}/{}/{}/resolve/{}/{}",
            percent_encode(&self.owner, false),
            percent_encode(&self.repo, false),
            percent_encode(&self.revision, false),
            percent_encode(&self.file, true),
        )
    }

    /// Where the file lies below the cache folder.
    pub(crate) fn cache_path(&self) -> PathBuf {
        let mut path = PathBuf::from("hub");
        path.push(&self.owner);
        path.push(&self.repo);
        path.push(percent_encode(&self.revision, false));
        path.extend(self.file.split('/'));
        path
    }
}

impl fmt::Display for HubFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "hf:{}/{}/{}", self.owner, self.repo, self.file)?;
        if self.revision != DEFAULT_REVISION {
            write!(f, "@{}", self.revision)?;
        }
        Ok(())
    }
}

fn percent_encode(text: &str, keep_slash: bool) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        let keep =
            byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || (keep_slash && byte == b'/');
        if keep {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms() {
        let file = HubFile::parse("hf:Qwen/Qwen3-0.6B-GGUF/Q8/a b.gguf").unwrap();
        assert_eq!(file.owner, "Qwen");
        assert_eq!(file.repo, "Qwen3-0.6B-GGUF");
        assert_eq!(file.file, "Q8/a b.gguf");
        assert_eq!(file.revision, "main");
        assert_eq!(
            file.url("https://hub"),
            "https://hub/Qwen/Qwen3-0.6B-GGUF/resolve/main/Q8/a%20b.gguf"
        );
        assert_eq!(file.to_string(), "hf:Qwen/Qwen3-0.6B-GGUF/Q8/a b.gguf");

        let file = HubFile::parse("hf:o/r/f.gguf@refs/pr/1").unwrap();
        assert_eq!(file.revision, "refs/pr/1");
        assert_eq!(file.url("http://h:1"), "http://h:1/o/r/resolve/refs%2Fpr%2F1/f.gguf");
        assert_eq!(file.cache_path(), PathBuf::from("hub/o/r/refs%2Fpr%2F1/f.gguf"));
        assert_eq!(HubFile::parse(&file.to_string()).unwrap(), file);
    }

    #[test]
    fn what_is_no_file_on_the_hub() {
        for text in [
            "o/r/f",
            "hf:",
            "hf:o",
            "hf:o/r",
            "hf:o/r/",
            "hf:/r/f",
            "hf:o//f",
            "hf:../r/f",
            "hf:o/r/../f",
            "hf:o/r/a/./f",
            "hf:o/r/f@",
            "hf:o/r/f@..",
            "hf:o/r/f@a/../b",
            "hf:o/r/f?download=true",
            "hf:o/r\\..\\x/f",
            "hf:o/r/f\n",
            "hf:C:/r/f",
        ] {
            assert!(HubFile::parse(text).is_err(), "{text:?} was taken");
        }
    }
}
