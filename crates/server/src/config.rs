//! What an operator sets, and what is known about the model once it is loaded.

use std::time::Duration;

use crate::{ApiKeys, ServerError};

/// Settings of the HTTP side.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// Address to listen on (`--host`).
    pub host: String,
    /// Port (`--port`); 0 takes a free one.
    pub port: u16,
    /// Names clients may use for the model (`--served-model-name`); the first is the one shown.
    pub served_model_names: Vec<String>,
    /// Keys clients must present (`--api-key`); none opens the server to everybody.
    pub api_keys: ApiKeys,
    /// Origins a browser may call from (`--allowed-origins`); `*` allows all.
    pub allowed_origins: Vec<String>,
    /// Largest request body in bytes; larger ones get a 413.
    pub max_body_bytes: usize,
    /// How long running requests may go on after a signal to stop (`--shutdown-timeout`).
    pub shutdown_timeout: Duration,
    /// Check the engine's bookkeeping whenever it becomes idle; a mismatch stops the service.
    pub check_integrity: bool,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            host: "127.0.0.1".into(),
            port: 8000,
            served_model_names: vec!["default".into()],
            api_keys: ApiKeys::default(),
            allowed_origins: Vec::new(),
            max_body_bytes: 16 << 20,
            shutdown_timeout: Duration::from_secs(30),
            check_integrity: cfg!(debug_assertions),
        }
    }
}

impl ServerConfig {
    /// Refuses what cannot work.
    pub fn validate(&self) -> Result<(), ServerError> {
        let bad = |option, expected, found: String| {
            Err(ServerError::BadConfig { option, expected, found })
        };
        if self.served_model_names.is_empty() {
            return bad("--served-model-name", "at least one name", "none".into());
        }
        if let Some(name) = self.served_model_names.iter().find(|name| name.trim().is_empty()) {
            return bad("--served-model-name", "a non-empty name", format!("'{name}'"));
        }
        if self.max_body_bytes == 0 {
            return bad("--max-body-size", "at least 1 byte", "0".into());
        }
        for origin in &self.allowed_origins {
            if origin.is_empty() || !origin.bytes().all(|byte| byte.is_ascii_graphic()) {
                return bad("--allowed-origins", "an origin such as https://a.example", {
                    format!("'{origin}'")
                });
            }
        }
        Ok(())
    }

    pub(crate) fn model_name(&self) -> &str {
        self.served_model_names.first().map_or("default", String::as_str)
    }
}

/// What the server tells about the model, known only after loading it.
#[derive(Debug, Clone, Default)]
pub struct ModelInfo {
    /// Where it was loaded from (`root` in `/v1/models`).
    pub root: String,
    /// Labels of `vllm:cache_config_info`, such as `block_size` and `cache_dtype`.
    pub cache_config: Vec<(String, String)>,
    /// Labels of `kvasir_machine_info`: processor, instruction sets, form of weights, threads.
    pub machine: Vec<(String, String)>,
    /// Resolved settings, shown under `config` in `/server_info`. Must hold no secrets.
    pub settings: serde_json::Map<String, serde_json::Value>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_and_each_bad_value_is_named() {
        ServerConfig::default().validate().unwrap();
        let cases: [(&str, ServerConfig); 4] = [
            ("--served-model-name", ServerConfig { served_model_names: vec![], ..default() }),
            (
                "--served-model-name",
                ServerConfig { served_model_names: vec!["".into()], ..default() },
            ),
            ("--max-body-size", ServerConfig { max_body_bytes: 0, ..default() }),
            (
                "--allowed-origins",
                ServerConfig { allowed_origins: vec!["a\nb".into()], ..default() },
            ),
        ];
        for (option, config) in cases {
            assert!(config.validate().unwrap_err().to_string().contains(option));
        }
    }

    fn default() -> ServerConfig {
        ServerConfig::default()
    }
}
