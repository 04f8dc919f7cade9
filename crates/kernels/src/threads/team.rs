//! Fork and join in about a microsecond: a model's step has a few hundred parallel loops of ten to a
//! thousand microseconds each, too short for a pool whose threads sleep in between.
//!
//! One caller and some workers take the numbers of a loop's tasks from a counter. Between loops workers
//! spin for a while, then sleep. The caller never waits for a worker that has not come: it closes the
//! loop when no task is left, and waits only for those that are inside.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// A loop's body: called with the number of a task and that of the thread that runs it.
type Body<'a> = dyn Fn(usize, usize) + Sync + 'a;

/// How often a worker looks for the next loop before it sleeps: some 100 µs.
const SPINS: usize = 4000;

/// Looks of a caller that waits for workers before it lets others have the processor.
const SPINS_TO_YIELD: usize = 20_000;

/// In [`Shared::state`]: workers may enter.
const OPEN: u64 = 1 << 31;
/// Below it: workers inside. Above: the number of the loop.
const INSIDE: u64 = OPEN - 1;
const LOOP: u64 = 1 << 32;

#[derive(Clone, Copy)]
struct Job {
    body: *const Body<'static>,
    num_tasks: usize,
}

/// A cache line of its own for what all threads write.
#[repr(align(128))]
struct Line<T>(T);

struct Shared {
    state: Line<AtomicU64>,
    next: Line<AtomicUsize>,
    /// Written by the caller while the loop is closed and nobody is inside; read by workers inside.
    job: UnsafeCell<Option<Job>>,
    sleeping: AtomicUsize,
    stop: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is the only field that is not Sync. The protocol of `state` (see `Team::for_each`) orders
// its one writer before all readers, and keeps the body it points to alive while anybody is inside.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer is to a `Sync` closure.
unsafe impl Send for Shared {}

/// See the module's documentation.
pub(super) struct Team {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held by the caller whose loop is running.
    busy: AtomicBool,
}

impl std::fmt::Debug for Team {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Team").field("workers", &self.workers.len()).finish_non_exhaustive()
    }
}

impl Team {
    /// Starts `threads - 1` workers: the caller is the last.
    pub(super) fn new(threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Line(AtomicU64::new(0)),
            next: Line(AtomicUsize::new(0)),
            job: UnsafeCell::new(None),
            sleeping: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        // Workers that started before one failed to are ended by the drop.
        let mut team = Self { shared, workers: Vec::new(), busy: AtomicBool::new(false) };
        for index in 1..threads {
            let shared = Arc::clone(&team.shared);
            let builder = std::thread::Builder::new().name(format!("kvasir-team-{index}"));
            team.workers.push(builder.spawn(move || shared.work(index))?);
        }
        Ok(team)
    }

    /// Threads, the caller among them.
    pub(super) fn count(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `body(task, thread)` for every task below `num_tasks`, each once, in any order, on the caller
    /// (thread 0) and the workers. Returns when all have ended. If another loop is running (a loop inside
    /// a loop), all tasks run here.
    pub(super) fn for_each(&self, num_tasks: usize, body: &Body<'_>) {
        let alone = num_tasks < 2 || self.workers.is_empty();
        if alone || self.busy.swap(true, Ordering::Acquire) {
            (0..num_tasks).for_each(|task| body(task, 0));
            return;
        }
        // SAFETY: the lifetime is forgotten, not prolonged: nobody is inside when this call returns.
        let body: *const Body<'static> =
            unsafe { std::mem::transmute(std::ptr::from_ref::<Body<'_>>(body)) };
        let shared = &*self.shared;
        // SAFETY: the last loop is closed with nobody inside, and `busy` keeps other callers out.
        unsafe { *shared.job.get() = Some(Job { body, num_tasks }) };
        shared.next.0.store(0, Ordering::Relaxed);
        let number = shared.state.0.load(Ordering::Relaxed) & !(LOOP - 1);
        shared.state.0.store(number.wrapping_add(LOOP) | OPEN, Ordering::Release);
        // Either a worker about to sleep sees the new state, or this sees that it sleeps.
        fence(Ordering::SeqCst);
        if shared.sleeping.load(Ordering::Relaxed) > 0 {
            self.workers.iter().for_each(|worker| worker.thread().unpark());
        }
        shared.take_tasks(0);
        shared.state.0.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0;
        while shared.state.0.load(Ordering::Acquire) & INSIDE != 0 {
            std::hint::spin_loop();
            spins += 1;
            if spins > SPINS_TO_YIELD {
                std::thread::yield_now();
            }
        }
        self.busy.store(false, Ordering::Release);
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches its bodies' panics; it has nothing else to say.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// A worker's life.
    fn work(&self, index: usize) {
        let mut done = 0;
        while let Some(number) = self.enter(done) {
            self.take_tasks(index);
            self.state.0.fetch_sub(1, Ordering::Release);
            done = number;
        }
    }

    /// Waits for a loop other than `done` that is open, and enters it.
    fn enter(&self, done: u64) -> Option<u64> {
        let mut spins = 0;
        loop {
            let state = self.state.0.load(Ordering::Acquire);
            let number = state & !(LOOP - 1);
            if state & OPEN != 0 && number != done {
                let entered = self.state.0.compare_exchange_weak(
                    state,
                    state + 1,
                    Ordering::AcqRel,
                    Ordering::Relaxed,
                );
                if entered.is_ok() {
                    return Some(number);
                }
                continue;
            }
            if self.stop.load(Ordering::Relaxed) {
                return None;
            }
            spins += 1;
            if spins < SPINS {
                std::hint::spin_loop();
                continue;
            }
            self.sleeping.fetch_add(1, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            // An unpark that came since makes this return at once.
            if self.state.0.load(Ordering::Relaxed) == state && !self.stop.load(Ordering::Relaxed) {
                std::thread::park();
            }
            self.sleeping.fetch_sub(1, Ordering::Relaxed);
            spins = 0;
        }
    }

    /// Runs tasks until none is left.
    fn take_tasks(&self, thread: usize) {
        // SAFETY: called by the caller, who wrote it, and by workers inside, for whom entering the open loop
        // ordered the write before.
        let Some(job) = (unsafe { *self.job.get() }) else { return };
        // SAFETY: the caller's borrow of the body lasts until nobody is inside.
        let body = unsafe { &*job.body };
        let run = || {
            loop {
                let task = self.next.0.fetch_add(1, Ordering::Relaxed);
                if task >= job.num_tasks {
                    return;
                }
                body(task, thread);
            }
        };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(run)) {
            self.next.0.store(job.num_tasks, Ordering::Relaxed);
            *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    #[test]
    fn every_task_runs_once_in_loop_after_loop() {
        for threads in [1, 2, 3, 5] {
            let team = Team::new(threads).unwrap();
            assert_eq!(team.count(), threads);
            for round in 0..2000 {
                let n = round % 37;
                let runs: Vec<AtomicU32> = (0..n).map(|_| AtomicU32::new(0)).collect();
                team.for_each(n, &|task, thread| {
                    assert!(thread < threads);
                    runs[task].fetch_add(1, Ordering::Relaxed);
                });
                assert!(runs.iter().all(|r| r.load(Ordering::Relaxed) == 1), "round {round}");
            }
        }
    }

    #[test]
    fn sleeping_workers_come_back() {
        let team = Team::new(3).unwrap();
        for _ in 0..20 {
            // Wait until both sleep, then see that a loop in which all must take part ends.
            while team.shared.sleeping.load(Ordering::SeqCst) < 2 {
                std::thread::yield_now();
            }
            let inside = AtomicUsize::new(0);
            team.for_each(3, &|_, _| {
                inside.fetch_add(1, Ordering::SeqCst);
                while inside.load(Ordering::SeqCst) < 3 {
                    std::thread::yield_now();
                }
            });
        }
    }

    #[test]
    fn a_loop_inside_a_loop_runs_where_it_is() {
        let team = Team::new(2).unwrap();
        let count = AtomicUsize::new(0);
        team.for_each(4, &|_, _| {
            team.for_each(5, &|_, thread| {
                assert_eq!(thread, 0);
                count.fetch_add(1, Ordering::Relaxed);
            });
        });
        assert_eq!(count.into_inner(), 20);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_goes_on() {
        let team = Team::new(2).unwrap();
        for _ in 0..10 {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                team.for_each(100, &|task, _| assert_ne!(task, 50));
            }));
            assert!(caught.is_err());
            let count = AtomicUsize::new(0);
            team.for_each(10, &|_, _| {
                count.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(count.into_inner(), 10);
        }
    }
}
