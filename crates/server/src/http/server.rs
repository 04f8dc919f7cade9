//! The life of a server: bind, answer probes while the model loads, serve, drain, end.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use axum::serve::ListenerExt;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use super::app::router;
use super::state::{App, Loaded};
use crate::step_engine::StepEngine;
use crate::text_model::TextModel;
use crate::{ModelInfo, ServerConfig, ServerError, driver};

/// How long connections and the engine's thread may take to end once nothing runs any more.
const CLOSING: Duration = Duration::from_secs(5);

/// A server that listens. Connections are answered once [`Server::run`] is polled.
pub struct Server {
    listener: TcpListener,
    local_addr: SocketAddr,
    handle: ServerHandle,
}

/// Gives a running [`Server`] its model. Cheap to clone.
#[derive(Clone)]
pub struct ServerHandle {
    app: Arc<App>,
    thread: Arc<Mutex<Option<JoinHandle<()>>>>,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("local_addr", &self.local_addr).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for ServerHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerHandle").finish_non_exhaustive()
    }
}

impl Server {
    /// Checks `config` and listens on its address.
    pub async fn bind(config: ServerConfig) -> Result<Self, ServerError> {
        config.validate()?;
        // An IPv6 address needs brackets before a port.
        let addr = match config.host.as_str() {
            host if host.contains(':') && !host.starts_with('[') => {
                format!("[{host}]:{}", config.port)
            }
            host => format!("{host}:{}", config.port),
        };
        let bind = |source| ServerError::Bind { addr: addr.clone(), source };
        let listener = TcpListener::bind(&addr).await.map_err(bind)?;
        let local_addr = listener.local_addr().map_err(bind)?;
        let handle = ServerHandle { app: Arc::new(App::new(config)), thread: Arc::default() };
        Ok(Self { listener, local_addr, handle })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// For [`ServerHandle::set_ready`].
    pub fn handle(&self) -> ServerHandle {
        self.handle.clone()
    }

    /// Answers requests until `shutdown` completes, then drains: new generations get a 503,
    /// running ones go on for `shutdown_timeout`, what is left is ended with finish reason
    /// `abort`. Until [`ServerHandle::set_ready`] is called, `/health` and the model's routes
    /// answer 503.
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send) -> Result<(), ServerError> {
        let ServerHandle { app, thread } = self.handle;
        let (close, closed) = oneshot::channel::<()>();
        // Tokens are small packets: waiting to fill larger ones would delay them.
        let listener = self.listener.tap_io(|stream| {
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!("cannot set TCP_NODELAY: {error}");
            }
        });
        let serve = axum::serve(listener, router(app.clone())).with_graceful_shutdown(async {
            let _ = closed.await;
        });
        let drain = async {
            shutdown.await;
            drain(&app).await;
            let _ = close.send(());
            tokio::time::sleep(CLOSING).await;
        };
        let result = tokio::select! {
            result = serve.into_future() => result,
            () = drain => Ok(()),
        };
        if let Some(loaded) = app.loaded.get() {
            loaded.driver.stop();
        }
        let thread = thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // A step in progress is waited for, but not for ever.
            let joined = tokio::task::spawn_blocking(move || thread.join().is_ok());
            if tokio::time::timeout(CLOSING, joined).await.is_err() {
                tracing::warn!("the engine's thread did not end in time");
            }
        }
        result.map_err(|source| ServerError::Io { what: "cannot serve", source })
    }
}

async fn drain(app: &App) {
    app.start_draining();
    let timeout = app.config.shutdown_timeout;
    let running = app.num_active();
    tracing::info!(running, timeout_seconds = timeout.as_secs_f64(), "shutting down");
    if tokio::time::timeout(timeout, app.idle()).await.is_ok() {
        return;
    }
    if let Some(loaded) = app.loaded.get() {
        let aborted = loaded.driver.abort(None).await;
        tracing::warn!(aborted, "shutdown timeout: ended what was still running");
    }
    // Clients that read get their last chunk; the others are not waited for.
    let _ = tokio::time::timeout(CLOSING, app.idle()).await;
}

impl ServerHandle {
    /// Starts the engine's thread and takes requests from now on.
    pub fn set_ready<E: StepEngine>(
        &self,
        engine: E,
        text: Arc<dyn TextModel>,
        info: ModelInfo,
    ) -> Result<(), ServerError> {
        let app = &self.app;
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if app.loaded.get().is_some() {
            return Err(ServerError::AlreadyReady);
        }
        let check = app.config.check_integrity;
        let (driver, joiner) = driver::start(engine, app.metrics.clone(), check)?;
        app.metrics.set_info(&info.cache_config, &info.machine);
        let loaded = Loaded { driver, text, info };
        app.loaded.set(loaded).map_err(|_| ServerError::AlreadyReady)?;
        *thread = Some(joiner);
        Ok(())
    }
}

/// Completes on SIGTERM or SIGINT (Ctrl-C).
pub fn shutdown_signal() -> Result<impl Future<Output = ()> + Send, ServerError> {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let listen = |kind| {
            signal(kind).map_err(|source| ServerError::Io { what: "cannot watch signals", source })
        };
        let mut terminate = listen(SignalKind::terminate())?;
        let mut interrupt = listen(SignalKind::interrupt())?;
        Ok(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        })
    }
    #[cfg(not(unix))]
    Ok(async {
        let _ = tokio::signal::ctrl_c().await;
    })
}
