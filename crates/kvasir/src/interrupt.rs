//! Ctrl-C: the first asks to stop, the second ends the process.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result};

/// Exit code of a process that Ctrl-C ended: 128 + SIGINT.
const INTERRUPTED: i32 = 130;

/// Ends the process at once.
pub(crate) fn exit_interrupted() -> ! {
    std::process::exit(INTERRUPTED)
}

/// Whether Ctrl-C was pressed. Clones see the same.
#[derive(Debug, Clone, Default)]
pub(crate) struct Interrupt {
    pressed: Arc<AtomicBool>,
}

impl Interrupt {
    /// From now on Ctrl-C is noted here; a second one before [`Self::take`] ends the process.
    pub(crate) fn listen() -> Result<Self> {
        let interrupt = Self::default();
        let pressed = Arc::clone(&interrupt.pressed);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .context("cannot listen for Ctrl-C")?;
        let mut signals = {
            let _runtime = runtime.enter();
            Signals::listen()?
        };
        thread::Builder::new()
            .name("interrupt".to_owned())
            .spawn(move || {
                runtime.block_on(async {
                    while signals.next().await {
                        if pressed.swap(true, Ordering::SeqCst) {
                            exit_interrupted();
                        }
                    }
                });
            })
            .context("cannot listen for Ctrl-C")?;
        Ok(interrupt)
    }

    /// Whether Ctrl-C was pressed.
    pub(crate) fn is_pressed(&self) -> bool {
        self.pressed.load(Ordering::SeqCst)
    }

    /// Whether Ctrl-C was pressed; forgets it.
    pub(crate) fn take(&self) -> bool {
        self.pressed.swap(false, Ordering::SeqCst)
    }

    /// As Ctrl-C does.
    #[cfg(test)]
    pub(crate) fn press(&self) {
        self.pressed.store(true, Ordering::SeqCst);
    }
}

#[cfg(unix)]
struct Signals(tokio::signal::unix::Signal);

#[cfg(unix)]
impl Signals {
    /// The handler is in place when this returns.
    fn listen() -> Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self(signal(SignalKind::interrupt()).context("cannot listen for Ctrl-C")?))
    }

    async fn next(&mut self) -> bool {
        self.0.recv().await.is_some()
    }
}

#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    fn listen() -> Result<Self> {
        Ok(Self)
    }

    async fn next(&mut self) -> bool {
        tokio::signal::ctrl_c().await.is_ok()
    }
}
