//! One HTTP GET that ends in a body: redirects followed by hand, because the hub describes the
//! file in the headers of the redirect, and because the token must stay with the hub.

use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use ureq::http::header::{AUTHORIZATION, ETAG, IF_RANGE, LOCATION, RANGE, RETRY_AFTER};
use ureq::http::{HeaderMap, Response, StatusCode, Uri};
use ureq::{Agent, Body};

const MAX_REDIRECTS: usize = 10;

/// How to reach the hub.
#[derive(Clone)]
pub(crate) struct HubConfig {
    /// Scheme and host, without a slash at the end (`HF_ENDPOINT`).
    pub(crate) endpoint: String,
    /// Access token (`HF_TOKEN`). Sent to the endpoint and to nobody else.
    pub(crate) token: Option<String>,
}

impl std::fmt::Debug for HubConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HubConfig")
            .field("endpoint", &self.endpoint)
            .field("token", &self.token.as_ref().map(|_| "(hidden)"))
            .finish()
    }
}

/// Why a GET or its body failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Trying again may help, after the time that the server asked for, if it did.
    Transient(anyhow::Error, Option<Duration>),
    /// It will not.
    Permanent(anyhow::Error),
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Permanent(error)
    }
}

/// What the hub says about a file, on a redirect or with the body.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct FileHeaders {
    /// Identity of the content: `X-Linked-Etag`, else `ETag`, without quotes. Weak tags are left
    /// out.
    pub(crate) etag: Option<String>,
    /// `X-Linked-Size`.
    pub(crate) bytes: Option<u64>,
    /// SHA-256, where the tag is one, as it is for large files.
    pub(crate) sha256: Option<String>,
}

/// A body that is about to arrive.
#[derive(Debug)]
pub(crate) struct Found {
    /// 200, 206 or 416.
    pub(crate) response: Response<Body>,
    /// What the first answer said of the file.
    pub(crate) headers: FileHeaders,
    /// Quoted strong `ETag` of the server that sends the body, for `If-Range`.
    pub(crate) body_etag: Option<String>,
}

/// From where to continue.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ResumeFrom<'a> {
    /// First byte wanted.
    pub(crate) offset: u64,
    /// `If-Range`, as [`Found::body_etag`] gave it.
    pub(crate) body_etag: Option<&'a str>,
}

/// Makes requests.
#[derive(Debug)]
pub(crate) struct Client {
    agent: Agent,
    hub: HubConfig,
    endpoint: Uri,
}

impl Client {
    /// A client for `hub`; refuses an endpoint that is no http(s) address.
    pub(crate) fn new(hub: HubConfig) -> Result<Self> {
        let endpoint: Uri = hub
            .endpoint
            .parse()
            .with_context(|| format!("HF_ENDPOINT '{}' is not a URL", hub.endpoint))?;
        if origin(&endpoint).is_none() {
            bail!("HF_ENDPOINT '{}' is not an http or https URL", hub.endpoint);
        }
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .user_agent(concat!("kvasir/", env!("CARGO_PKG_VERSION")))
            // Byte ranges and checksums are those of the plain file.
            .accept_encoding("identity")
            .timeout_connect(Some(Duration::from_secs(20)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            .timeout_per_read(Some(Duration::from_secs(60)))
            .build();
        Ok(Self { agent: config.into(), hub, endpoint })
    }

    /// Scheme and host of the hub.
    pub(crate) fn endpoint(&self) -> &str {
        &self.hub.endpoint
    }

    /// Gets `url`, which is on the hub. `accept` sees what each answer on the way says of the
    /// file and may refuse it before the body is asked for.
    pub(crate) fn get(
        &self,
        url: &str,
        resume: Option<ResumeFrom<'_>>,
        mut accept: impl FnMut(&FileHeaders) -> Result<(), Failure>,
    ) -> Result<Found, Failure> {
        let mut uri: Uri = url.parse().with_context(|| format!("'{url}' is not a URL"))?;
        let mut described: Option<FileHeaders> = None;
        for _ in 0..=MAX_REDIRECTS {
            let at_hub = origin(&uri) == origin(&self.endpoint);
            let mut request = self.agent.get(&uri);
            if let Some(token) = self.hub.token.as_ref().filter(|_| at_hub) {
                request = request.header(AUTHORIZATION, format!("Bearer {token}"));
            }
            if let Some(resume) = resume {
                request = request.header(RANGE, format!("bytes={}-", resume.offset));
                if let Some(etag) = resume.body_etag {
                    request = request.header(IF_RANGE, etag);
                }
            }
            let response = request.call().map_err(|error| refused(&uri, error))?;
            let status = response.status();
            if status.is_success() || status.is_redirection() {
                let headers = FileHeaders::read(response.headers(), status.is_redirection());
                if described.is_none() && headers != FileHeaders::default() {
                    accept(&headers)?;
                    described = Some(headers);
                }
            }
            if status.is_redirection() {
                let location = response
                    .headers()
                    .get(LOCATION)
                    .and_then(|value| value.to_str().ok())
                    .ok_or_else(|| anyhow!("{} redirects to nowhere", shown(&uri)))?;
                uri = join(&uri, location)?;
                continue;
            }
            return match status {
                StatusCode::OK
                | StatusCode::PARTIAL_CONTENT
                | StatusCode::RANGE_NOT_SATISFIABLE => {
                    let body_etag = strong_etag(response.headers());
                    Ok(Found { response, headers: described.unwrap_or_default(), body_etag })
                }
                _ => Err(self.status_failure(&uri, at_hub, &response)),
            };
        }
        Err(anyhow!("{url} redirects more than {MAX_REDIRECTS} times").into())
    }

    fn status_failure(&self, uri: &Uri, at_hub: bool, response: &Response<Body>) -> Failure {
        let status = response.status();
        let place = shown(uri);
        let hint = match (status, at_hub, self.hub.token.is_some()) {
            (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, true, false) => {
                ": the file does not exist or needs permission; for a private or gated \
                 repository set HF_TOKEN to a token that may read it"
            }
            (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, true, true) => {
                ": HF_TOKEN is not valid or may not read this repository (have its terms been \
                 accepted on the hub?)"
            }
            (StatusCode::NOT_FOUND, ..) => {
                ": no such file; check owner, repository, file and revision"
            }
            _ => "",
        };
        let error = anyhow!("{place} answered {status}{hint}");
        let transient = status.is_server_error()
            || status == StatusCode::TOO_MANY_REQUESTS
            || status == StatusCode::REQUEST_TIMEOUT;
        if transient {
            let after = response
                .headers()
                .get(RETRY_AFTER)
                .and_then(|value| value.to_str().ok()?.trim().parse().ok())
                .map(Duration::from_secs);
            Failure::Transient(error, after)
        } else {
            Failure::Permanent(error)
        }
    }
}

impl FileHeaders {
    fn read(headers: &HeaderMap, redirect: bool) -> Self {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        // The ETag of a plain redirect is the redirect's own.
        let tag = text("x-linked-etag").or_else(|| if redirect { None } else { text("etag") });
        let etag = tag
            .map(str::trim)
            .filter(|tag| !tag.starts_with("W/"))
            .map(|tag| tag.trim_matches('"').to_owned())
            .filter(|tag| !tag.is_empty());
        let is_sha256 =
            |tag: &&String| tag.len() == 64 && tag.bytes().all(|b| b.is_ascii_hexdigit());
        Self {
            sha256: etag.as_ref().filter(is_sha256).map(|tag| tag.to_ascii_lowercase()),
            etag,
            bytes: text("x-linked-size").and_then(|size| size.trim().parse().ok()),
        }
    }
}

fn strong_etag(headers: &HeaderMap) -> Option<String> {
    let tag = headers.get(ETAG)?.to_str().ok()?.trim();
    (tag.len() > 2 && tag.starts_with('"') && tag.ends_with('"')).then(|| tag.to_owned())
}

/// Errors of a connection. Those of the request itself (a bad header, a bad address) do not go
/// away; the network's may.
fn refused(uri: &Uri, error: ureq::Error) -> Failure {
    let transient = matches!(
        error,
        ureq::Error::Io(_)
            | ureq::Error::Timeout(_)
            | ureq::Error::Protocol(_)
            | ureq::Error::HostNotFound
            | ureq::Error::ConnectionFailed
    );
    let error = anyhow::Error::new(error).context(format!("cannot reach {}", shown(uri)));
    if transient { Failure::Transient(error, None) } else { Failure::Permanent(error) }
}

/// An address as messages show it: without the query, which holds a signature on download hosts.
pub(crate) fn shown(uri: &Uri) -> String {
    let text = uri.to_string();
    text.split('?').next().unwrap_or(&text).to_owned()
}

/// Scheme, host and port; `None` for anything that is not http or https.
fn origin(uri: &Uri) -> Option<(String, String, u16)> {
    let scheme = uri.scheme_str()?.to_ascii_lowercase();
    let default_port = match scheme.as_str() {
        "http" => 80,
        "https" => 443,
        _ => return None,
    };
    let host = uri.host().filter(|host| !host.is_empty())?.to_ascii_lowercase();
    Some((scheme, host, uri.port_u16().unwrap_or(default_port)))
}

/// Resolves a `Location` against the address that sent it.
fn join(base: &Uri, location: &str) -> Result<Uri> {
    let scheme = base.scheme_str().unwrap_or("https");
    let authority = base.authority().map_or("", |authority| authority.as_str());
    let text = if location.contains("://") && !location.starts_with(['/', '?']) {
        location.to_owned()
    } else if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else {
        let folder = base.path().rsplit_once('/').map_or("", |(folder, _)| folder);
        format!("{scheme}://{authority}{folder}/{location}")
    };
    // A fragment is the client's business and never sent.
    let text = text.split('#').next().unwrap_or_default();
    let uri: Uri =
        text.parse().with_context(|| format!("{} redirects to '{location}'", shown(base)))?;
    match origin(&uri) {
        None => bail!("{} redirects to '{location}', which is not http", shown(base)),
        Some((to, ..)) if to == "http" && scheme == "https" => {
            bail!("{} redirects from https to http", shown(base))
        }
        Some(_) => Ok(uri),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uri(text: &str) -> Uri {
        text.parse().unwrap()
    }

    #[test]
    fn locations_are_resolved() {
        let base = uri("https://hub.example/o/r/resolve/main/f.gguf?download=true");
        for (location, joined) in [
            ("https://cdn.example/x?sig=1", "https://cdn.example/x?sig=1"),
            ("/api/f#top", "https://hub.example/api/f"),
            ("//cdn.example/y", "https://cdn.example/y"),
            ("g.gguf", "https://hub.example/o/r/resolve/main/g.gguf"),
            ("/x?next=http://a/b", "https://hub.example/x?next=http://a/b"),
        ] {
            assert_eq!(join(&base, location).unwrap(), uri(joined), "{location}");
        }
        for location in ["http://hub.example/f", "ftp://hub.example/f", "file:///etc/passwd"] {
            assert!(join(&base, location).is_err(), "{location} was followed");
        }
        assert!(join(&uri("http://a/f"), "https://b/f").is_ok());
    }

    #[test]
    fn origins() {
        assert_eq!(
            origin(&uri("https://Hub.example/a")),
            origin(&uri("https://hub.example:443/b"))
        );
        assert_ne!(origin(&uri("https://hub.example")), origin(&uri("http://hub.example")));
        assert_ne!(origin(&uri("http://hub.example:81")), origin(&uri("http://hub.example")));
        assert_ne!(origin(&uri("https://hub.example")), origin(&uri("https://hub.example.evil")));
        assert_eq!(origin(&uri("ftp://hub.example")), None);
    }

    #[test]
    fn headers_of_a_file() {
        let mut headers = HeaderMap::new();
        headers.insert("etag", "W/\"abc\"".parse().unwrap());
        assert_eq!(FileHeaders::read(&headers, false), FileHeaders::default());
        headers.insert("etag", "\"abc\"".parse().unwrap());
        assert_eq!(FileHeaders::read(&headers, false).etag.as_deref(), Some("abc"));
        assert_eq!(FileHeaders::read(&headers, true).etag, None);
        let sha256 = "AB".repeat(32);
        headers.insert("x-linked-etag", format!("\"{sha256}\"").parse().unwrap());
        headers.insert("x-linked-size", "12".parse().unwrap());
        let read = FileHeaders::read(&headers, true);
        assert_eq!(read.sha256, Some(sha256.to_ascii_lowercase()));
        assert_eq!(read.bytes, Some(12));
    }

    #[test]
    fn endpoints_that_are_none() {
        for endpoint in ["", "huggingface.co", "ftp://x", "http://", "not a url"] {
            let hub = HubConfig { endpoint: endpoint.into(), token: None };
            let error = format!("{:#}", Client::new(hub).unwrap_err());
            assert!(error.contains("HF_ENDPOINT"), "{error}");
        }
    }

    #[test]
    fn the_token_is_not_printed() {
        let hub = HubConfig { endpoint: "http://x".into(), token: Some("hf_secret".into()) };
        assert!(!format!("{hub:?}").contains("hf_secret"));
    }
}
