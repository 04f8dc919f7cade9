//! A file from the hub into the cache: resume, retries, checks.

use std::fs;
use std::io::Read;
use std::thread;
use std::time::Duration;

use anyhow::{Result, anyhow};
use serde::{Deserialize, Serialize};
use ureq::http::header::{CONTENT_LENGTH, CONTENT_RANGE};
use ureq::http::{HeaderMap, StatusCode};

use super::entry::{CacheEntry, Record, write_json};
use super::http::{Client, Failure, Found, ResumeFrom};
use super::hub::HubFile;
use super::progress::Progress;
use super::staged::{CHUNK_BYTES, Expected, StagedFile};

/// How often and how patiently to try again.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RetryPolicy {
    /// Attempts in a row that may end without a new byte.
    pub(crate) attempts: u32,
    /// Attempts altogether.
    pub(crate) total_attempts: u32,
    /// Pause before the second try of a row; doubled for each further one. The first try after
    /// progress follows at once.
    pub(crate) pause: Duration,
    /// Longest pause, whatever a server asks for.
    pub(crate) max_pause: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            attempts: 5,
            total_attempts: 100,
            pause: Duration::from_secs(1),
            max_pause: Duration::from_secs(30),
        }
    }
}

impl RetryPolicy {
    fn pause_before(&self, failures_in_a_row: u32, asked: Option<Duration>) -> Duration {
        let own = match failures_in_a_row {
            0 | 1 => Duration::ZERO,
            n => self.pause.saturating_mul(1 << (n - 2).min(16)),
        };
        asked.unwrap_or(own).min(self.max_pause)
    }
}

/// How to continue a `.part` file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct ResumeState {
    url: String,
    /// Identity of the content as the hub names it.
    etag: Option<String>,
    /// `ETag` of the server that sent the body, quoted.
    body_etag: Option<String>,
}

impl ResumeState {
    /// Without an identity, nothing says that the rest belongs to what is there.
    fn can_resume(&self) -> bool {
        self.etag.is_some() || self.body_etag.is_some()
    }
}

/// Fetches `file` into `entry`, whose lock the caller holds, and writes its record. `known` is
/// what the file must be, whatever the hub says.
pub(crate) fn download(
    client: &Client,
    file: &HubFile,
    entry: &CacheEntry,
    known: &Expected,
    retry: &RetryPolicy,
    progress: Progress,
) -> Result<Record> {
    let url = file.url(client.endpoint());
    let mut download = Download::open(client, url.clone(), entry, known, progress)?;
    let mut failures = 0;
    let mut furthest = download.staged.len();
    let mut attempt = 0;
    let expected = loop {
        attempt += 1;
        let (error, asked) = match download.attempt() {
            Ok(expected) => break expected,
            Err(Failure::Permanent(error)) => {
                // What has arrived is of use only where the same file may still come.
                if download.staged.len() == 0 || download.state == ResumeState::default() {
                    entry.discard_part();
                }
                return Err(error);
            }
            Err(Failure::Transient(error, asked)) => (error, asked),
        };
        failures = if download.staged.len() > furthest { 1 } else { failures + 1 };
        furthest = furthest.max(download.staged.len());
        if failures >= retry.attempts || attempt >= retry.total_attempts {
            if download.staged.len() == 0 {
                entry.discard_part();
            }
            return Err(error.context(format!("gave up after {attempt} attempts")));
        }
        let pause = retry.pause_before(failures, asked);
        progress.note(&format!("{error:#}; trying again"));
        thread::sleep(pause);
    };
    let Download { staged, .. } = download;
    let mut record = None;
    let finished = staged.finish(&expected, entry.path(), |digest| {
        let new = Record { source: url, bytes: digest.bytes, sha256: digest.sha256.clone() };
        entry.write_record(&new)?;
        record = Some(new);
        Ok(())
    });
    // Done, or not the file that was asked for: neither can be continued.
    entry.discard_part();
    finished?;
    record.ok_or_else(|| anyhow!("no record of {}", entry.path().display()))
}

struct Download<'a> {
    client: &'a Client,
    url: String,
    entry: &'a CacheEntry,
    known: &'a Expected,
    progress: Progress,
    staged: StagedFile,
    state: ResumeState,
}

impl<'a> Download<'a> {
    fn open(
        client: &'a Client,
        url: String,
        entry: &'a CacheEntry,
        known: &'a Expected,
        progress: Progress,
    ) -> Result<Self> {
        let saved: Option<ResumeState> = fs::read(entry.resume_path())
            .ok()
            .and_then(|text| serde_json::from_slice(&text).ok())
            .filter(|state: &ResumeState| state.url == url && state.can_resume());
        let (staged, state) = match saved {
            Some(state) => (StagedFile::resume(&entry.part_path())?, state),
            None => (StagedFile::create(&entry.part_path())?, ResumeState::default()),
        };
        Ok(Self { client, url, entry, known, progress, staged, state })
    }

    /// One GET and its body. Returns what the whole file must be.
    fn attempt(&mut self) -> Result<Expected, Failure> {
        let resumable = self.staged.len() > 0 && self.state.can_resume();
        if !resumable {
            self.staged.restart()?;
        }
        let body_etag = self.state.body_etag.clone();
        let resume = resumable
            .then(|| ResumeFrom { offset: self.staged.len(), body_etag: body_etag.as_deref() });
        let (known, state) = (self.known, &self.state);
        let mut stale = false;
        let found = self.client.get(&self.url, resume, |headers| {
            let hub_says = Expected { bytes: headers.bytes, sha256: headers.sha256.clone() };
            same_file(known, &hub_says)?;
            stale = resumable && state.etag.is_some() && headers.etag != state.etag;
            if stale {
                return Err(Failure::Transient(anyhow!("the file on the hub has changed"), None));
            }
            Ok(())
        });
        if stale {
            self.forget()?;
        }
        let mut found = found?;
        let total = self.prepare(&found)?;
        let expected = Expected {
            bytes: known.bytes.or(found.headers.bytes).or(total),
            sha256: known.sha256.clone().or_else(|| found.headers.sha256.clone()),
        };
        if found.response.status() != StatusCode::RANGE_NOT_SATISFIABLE {
            self.receive(&mut found, &expected)?;
        }
        match expected.bytes {
            Some(bytes) if self.staged.len() < bytes => Err(Failure::Transient(
                anyhow!("the connection ended after {} of {bytes} bytes", self.staged.len()),
                None,
            )),
            _ => Ok(expected),
        }
    }

    /// Brings the staged file to where the body begins. Returns the length of the whole file.
    fn prepare(&mut self, found: &Found) -> Result<Option<u64>, Failure> {
        let headers = found.response.headers();
        let range = content_range(headers);
        match found.response.status() {
            StatusCode::PARTIAL_CONTENT => match range {
                Some((Some(start), total)) if start == self.staged.len() => Ok(total),
                _ => {
                    self.forget()?;
                    let error = anyhow!("{} sent another range than was asked for", self.url);
                    Err(Failure::Transient(error, None))
                }
            },
            StatusCode::RANGE_NOT_SATISFIABLE => {
                let total = range.and_then(|(_, total)| total);
                if total == Some(self.staged.len()) && self.staged.len() > 0 {
                    return Ok(total);
                }
                self.forget()?;
                Err(Failure::Transient(anyhow!("{} refused the range", self.url), None))
            }
            _ => {
                self.staged.restart()?;
                self.state = ResumeState {
                    url: self.url.clone(),
                    etag: found.headers.etag.clone(),
                    body_etag: found.body_etag.clone(),
                };
                write_json(&self.entry.resume_path(), &self.state)?;
                let total = headers
                    .get(CONTENT_LENGTH)
                    .and_then(|value| value.to_str().ok()?.trim().parse().ok());
                if let (Some(total), Some(known)) = (total, self.known.bytes)
                    && total != known
                {
                    return Err(Failure::Permanent(anyhow!(
                        "{} has {total} bytes, not {known}: it is another file",
                        self.url
                    )));
                }
                Ok(total)
            }
        }
    }

    fn receive(&mut self, found: &mut Found, expected: &Expected) -> Result<(), Failure> {
        let bar = self.progress.bytes(expected.bytes);
        bar.set_position(self.staged.len());
        bar.reset_eta();
        let mut body = found.response.body_mut().as_reader();
        let mut chunk = vec![0; CHUNK_BYTES];
        let outcome = loop {
            let read = match body.read(&mut chunk) {
                Ok(n) => chunk.get(..n).unwrap_or_default(),
                Err(error) => {
                    let error = anyhow::Error::new(error)
                        .context(format!("the connection broke after {} bytes", self.staged.len()));
                    break Err(Failure::Transient(error, None));
                }
            };
            if read.is_empty() {
                break Ok(());
            }
            if expected.bytes.is_some_and(|bytes| self.staged.len() + read.len() as u64 > bytes) {
                self.state = ResumeState::default();
                break Err(Failure::Permanent(anyhow!(
                    "{} sent more than the {} bytes it promised",
                    self.url,
                    expected.bytes.unwrap_or_default()
                )));
            }
            self.staged.write(read)?;
            bar.set_position(self.staged.len());
        };
        bar.finish_and_clear();
        outcome
    }

    fn forget(&mut self) -> Result<(), Failure> {
        self.state = ResumeState::default();
        Ok(self.staged.restart()?)
    }
}

/// An error where two descriptions of a file contradict each other.
fn same_file(known: &Expected, hub_says: &Expected) -> Result<()> {
    match (known.bytes, hub_says.bytes) {
        (Some(known), Some(found)) if known != found => {
            return Err(anyhow!(
                "the hub's file has {found} bytes, not {known}: it is another file"
            ));
        }
        _ => {}
    }
    match (&known.sha256, &hub_says.sha256) {
        (Some(known), Some(found)) if known != found => {
            Err(anyhow!("the hub's file has SHA-256 {found}, not {known}: it is another file"))
        }
        _ => Ok(()),
    }
}

/// First byte and total length of `Content-Range: bytes 5-9/10` (or `bytes */10`).
fn content_range(headers: &HeaderMap) -> Option<(Option<u64>, Option<u64>)> {
    let text = headers.get(CONTENT_RANGE)?.to_str().ok()?.trim();
    let (range, total) = text.strip_prefix("bytes ")?.trim().split_once('/')?;
    let start = range.split_once('-').and_then(|(start, _)| start.trim().parse().ok());
    Some((start, total.trim().parse().ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_and_are_bounded() {
        let retry = RetryPolicy::default();
        let seconds =
            |n, asked: Option<u64>| retry.pause_before(n, asked.map(Duration::from_secs)).as_secs();
        assert_eq!([1, 2, 3, 4].map(|n| seconds(n, None)), [0, 1, 2, 4]);
        assert_eq!(seconds(40, None), 30);
        assert_eq!(seconds(1, Some(7)), 7);
        assert_eq!(seconds(1, Some(86_400)), 30);
    }

    #[test]
    fn content_ranges() {
        let parse = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_RANGE, text.parse().unwrap());
            content_range(&headers)
        };
        assert_eq!(parse("bytes 5-9/10"), Some((Some(5), Some(10))));
        assert_eq!(parse("bytes 5-9/*"), Some((Some(5), None)));
        assert_eq!(parse("bytes */10"), Some((None, Some(10))));
        assert_eq!(parse("lines 5-9/10"), None);
        assert_eq!(parse("bytes"), None);
    }
}
