//! What all handlers share.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use kvasir_engine::EngineStats;
use tokio::sync::watch;

use crate::auth::Tenant;
use crate::driver::DriverHandle;
use crate::metrics::Metrics;
use crate::text_model::TextModel;
use crate::{ApiError, ModelInfo, ServerConfig};

/// The model and the engine, once there.
pub(super) struct Loaded {
    pub(super) driver: DriverHandle,
    pub(super) text: Arc<dyn TextModel>,
    pub(super) info: ModelInfo,
}

/// State of one server.
pub(super) struct App {
    pub(super) config: ServerConfig,
    pub(super) metrics: Arc<Metrics>,
    pub(super) loaded: OnceLock<Loaded>,
    draining: AtomicBool,
    active: watch::Sender<usize>,
    /// Unix time of the start, for `/v1/models`.
    pub(super) created: u64,
}

/// What the outermost layer notes about a request.
#[derive(Debug, Clone)]
pub(super) struct Meta {
    pub(super) request_id: Arc<str>,
    pub(super) received: Instant,
    pub(super) tenant: Tenant,
}

/// Counts a generation as in progress while it lives.
pub(super) struct Active(Arc<App>);

impl App {
    pub(super) fn new(config: ServerConfig) -> Self {
        Self {
            metrics: Arc::new(Metrics::new(config.model_name())),
            config,
            loaded: OnceLock::new(),
            draining: AtomicBool::new(false),
            active: watch::Sender::new(0),
            created: unix_seconds(),
        }
    }

    /// The model, whether or not new work is taken.
    pub(super) fn loaded(&self) -> Result<&Loaded, ApiError> {
        self.loaded.get().ok_or_else(ApiError::loading)
    }

    /// Ready for work: loaded, not draining, engine alive.
    pub(super) fn ready(&self) -> Result<&Loaded, ApiError> {
        if self.draining.load(Ordering::SeqCst) {
            return Err(ApiError::draining());
        }
        let loaded = self.loaded()?;
        match loaded.driver.failure() {
            Some(cause) => Err(ApiError::engine_down(&cause)),
            None => Ok(loaded),
        }
    }

    /// Registers a generation, then makes sure the server takes it: in this order, so that a
    /// drain that starts in between either refuses it or waits for it.
    pub(super) fn begin(self: &Arc<Self>) -> Result<(Active, &Loaded), ApiError> {
        self.active.send_modify(|active| *active += 1);
        let active = Active(self.clone());
        Ok((active, self.ready()?))
    }

    pub(super) fn start_draining(&self) {
        self.draining.store(true, Ordering::SeqCst);
    }

    /// Generations in progress.
    pub(super) fn num_active(&self) -> usize {
        *self.active.borrow()
    }

    /// Returns when no generation is in progress.
    pub(super) async fn idle(&self) {
        // The sender lives in self: waiting cannot fail.
        let _ = self.active.subscribe().wait_for(|active| *active == 0).await;
    }

    pub(super) fn stats(&self) -> EngineStats {
        self.loaded.get().map(|loaded| loaded.driver.stats()).unwrap_or_default()
    }

    /// The name to show for the model a request asks for.
    pub(super) fn model_name(&self, wanted: Option<&str>) -> Result<String, ApiError> {
        match wanted {
            None => Ok(self.config.model_name().to_owned()),
            Some(name) if self.config.served_model_names.iter().any(|known| known == name) => {
                Ok(name.to_owned())
            }
            Some(name) => Err(ApiError::model_not_found(name)),
        }
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.0.active.send_modify(|active| *active -= 1);
    }
}

pub(super) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
