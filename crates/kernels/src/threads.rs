//! The thread pool of one engine.

/// The operating system gave no threads.
#[derive(Debug, thiserror::Error)]
#[error("cannot start {threads} compute threads: {what}")]
pub struct ThreadsError {
    /// How many were asked for.
    pub threads: usize,
    /// What went wrong.
    pub what: String,
}

/// A pool of `--threads` compute threads, never rayon's global one.
#[derive(Debug)]
pub struct Threads {
    pool: rayon::ThreadPool,
}

impl Threads {
    /// Starts `threads` threads; 0 is one per processor.
    ///
    /// # Errors
    /// If the operating system refuses.
    pub fn new(threads: usize) -> Result<Self, ThreadsError> {
        let threads = if threads == 0 {
            std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
        } else {
            threads
        };
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("kvasir-compute-{i}"))
            .build()
            .map(|pool| Self { pool })
            .map_err(|error| ThreadsError { threads, what: error.to_string() })
    }

    /// How many.
    pub fn count(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Runs `work` on the pool; kernels called inside share its threads.
    pub fn install<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.pool.install(work)
    }
}
