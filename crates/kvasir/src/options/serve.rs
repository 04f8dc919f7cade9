//! The HTTP side.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::units::parse_bytes;

/// How the server listens and whom it serves.
#[derive(Clone, Args)]
#[command(next_help_heading = "Server")]
pub(crate) struct ServeArgs {
    /// Address to listen on; 0.0.0.0 is all interfaces
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    pub(crate) host: String,
    /// Port to listen on; 0 takes a free one
    #[arg(long, value_name = "PORT", default_value = "8000")]
    pub(crate) port: u16,
    /// Key that clients must present; may be given several times [default: open to everybody]
    #[arg(long, value_name = "KEY", env = "KVASIR_API_KEY", hide_env_values = true)]
    #[arg(value_delimiter = ',', value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub(crate) api_key: Vec<String>,
    /// Name of the model for clients; further ones are aliases [default: the name it was asked by]
    #[arg(long, value_name = "NAME", num_args = 1..)]
    pub(crate) served_model_name: Vec<String>,
    /// Most requests waiting; further ones are answered with 429 [default: no limit]
    #[arg(long, value_name = "N")]
    pub(crate) max_num_queued_reqs: Option<usize>,
    /// How many seconds running requests may take to finish after SIGTERM or Ctrl-C
    #[arg(long, value_name = "SECONDS", default_value = "30")]
    pub(crate) shutdown_timeout: u64,
    /// Origin that a browser may call from, or *; may be given several times
    #[arg(long, value_name = "ORIGIN", value_delimiter = ',')]
    pub(crate) allowed_origins: Vec<String>,
    /// Chat template (Jinja) in place of the model's own
    #[arg(long, value_name = "FILE")]
    pub(crate) chat_template: Option<PathBuf>,
    /// Largest request body
    #[arg(long, value_name = "BYTES", default_value = "16MiB", value_parser = parse_bytes)]
    pub(crate) max_body_bytes: usize,
    /// How much to log
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub(crate) log_level: LogLevel,
    /// Log JSON, an object per line
    #[arg(long)]
    pub(crate) log_json: bool,
}

/// Keys are secrets: they stay out of whatever prints options.
impl std::fmt::Debug for ServeArgs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServeArgs")
            .field("host", &self.host)
            .field("port", &self.port)
            .field("api_keys", &self.api_key.len())
            .finish_non_exhaustive()
    }
}

/// Levels of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl From<LogLevel> for tracing::Level {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Error => Self::ERROR,
            LogLevel::Warn => Self::WARN,
            LogLevel::Info => Self::INFO,
            LogLevel::Debug => Self::DEBUG,
            LogLevel::Trace => Self::TRACE,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        serve: ServeArgs,
    }

    #[test]
    fn lists() {
        let args = ["x", "--api-key", "a,b", "--api-key", "c", "--allowed-origins", "*"];
        let line = Line::try_parse_from(args).unwrap();
        assert_eq!(line.serve.api_key, ["a", "b", "c"]);
        assert_eq!(line.serve.allowed_origins, ["*"]);
        assert!(!format!("{line:?}").contains("\"a\""));
    }

    #[test]
    fn an_empty_key_is_no_key() {
        assert!(Line::try_parse_from(["x", "--api-key", ""]).is_err());
    }
}
