//! The compute threads of one engine.

mod team;

use std::cell::Cell;
use std::marker::PhantomData;
use std::ptr;

use team::Team;

/// The operating system gave no threads.
#[derive(Debug, thiserror::Error)]
#[error("cannot start {threads} compute threads: {what}")]
pub struct ThreadsError {
    /// How many were asked for.
    pub threads: usize,
    /// What went wrong.
    pub what: String,
}

/// `--threads` compute threads, in two forms that are never at work at once: a team for the short loops of
/// a model's step ([`parallel_for`] inside [`Threads::run`]), and a rayon pool, never the global one, for
/// work that is long or uneven ([`Threads::install`]).
#[derive(Debug)]
pub struct Threads {
    team: Team,
    pool: rayon::ThreadPool,
}

thread_local! {
    /// The team of the [`Threads::run`] that this thread is in.
    static TEAM: Cell<*const Team> = const { Cell::new(ptr::null()) };
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
        let failed = |what: String| ThreadsError { threads, what };
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("kvasir-compute-{i}"))
            .build()
            .map_err(|error| failed(error.to_string()))?;
        Ok(Self { team: Team::new(threads).map_err(|error| failed(error.to_string()))?, pool })
    }

    /// How many.
    pub fn count(&self) -> usize {
        self.team.count()
    }

    /// Runs `work` on the rayon pool.
    pub fn install<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.pool.install(work)
    }

    /// Runs `work` here; [`parallel_for`] and the kernels called inside share the team's threads.
    pub fn run<R>(&self, work: impl FnOnce() -> R) -> R {
        /// Brings back what was there, on a panic as well.
        struct Restore(*const Team);
        impl Drop for Restore {
            fn drop(&mut self) {
                TEAM.set(self.0);
            }
        }
        let _restore = Restore(TEAM.replace(&raw const self.team));
        work()
    }
}

/// The team that [`parallel_for`] would use.
fn current_team<R>(use_it: impl FnOnce(Option<&Team>) -> R) -> R {
    let team = TEAM.get();
    // SAFETY: set by `Threads::run` of this thread, which borrows the team until it takes the pointer away.
    use_it(unsafe { team.as_ref() })
}

/// Threads that [`parallel_for`] uses here: 1 outside of [`Threads::run`].
pub fn num_threads() -> usize {
    current_team(|team| team.map_or(1, Team::count))
}

/// Runs `body(task, thread)` for every task below `num_tasks`, each once, in any order, on the threads of
/// the [`Threads::run`] this is called in, or all on this one. `thread` is below [`num_threads`], and no two
/// tasks run on one thread at a time: scratch may be kept by it.
#[inline]
pub fn parallel_for(num_tasks: usize, body: impl Fn(usize, usize) + Sync) {
    current_team(|team| match team {
        Some(team) => team.for_each(num_tasks, &body),
        None => (0..num_tasks).for_each(|task| body(task, 0)),
    });
}

/// [`parallel_for`] over the parts of two slices: `body(part, thread, a, b)` has part `part` of each.
///
/// # Panics
/// If the slices are not equally many whole parts of `len_a` and `len_b` elements.
pub fn parallel_zip<A: Send, B: Send>(
    (a, len_a): (&mut [A], usize),
    (b, len_b): (&mut [B], usize),
    body: impl Fn(usize, usize, &mut [A], &mut [B]) + Sync,
) {
    let parts = a.len() / len_a;
    assert!(a.len() == parts * len_a && b.len() == parts * len_b, "{} and {}", a.len(), b.len());
    let (a, b) = (Disjoint::new(a), Disjoint::new(b));
    parallel_for(parts, |part, thread| {
        // SAFETY: parts do not overlap, and each is one task's.
        let (a, b) = unsafe { (a.slice(part * len_a, len_a), b.slice(part * len_b, len_b)) };
        body(part, thread, a, b);
    });
}

/// A slice whose parts are written by several tasks at once, each its own.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    of: PhantomData<&'a mut [T]>,
}

// SAFETY: whoever takes a part promises that nobody else has it (`slice`); the borrow is exclusive.
unsafe impl<T: Send> Send for Disjoint<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), of: PhantomData }
    }

    /// Where `rows` rows of `len` elements start, the first at `at`, `stride` apart.
    ///
    /// # Panics
    /// If they are not inside.
    pub(crate) fn rows(&self, (at, stride): (usize, usize), (rows, len): (usize, usize)) -> *mut T {
        let end = at + rows.saturating_sub(1) * stride + len;
        assert!(end <= self.len, "{rows} rows from {at} to {end} of {}", self.len);
        self.start.wrapping_add(at)
    }

    /// Elements `at .. at + len`.
    ///
    /// # Panics
    /// If they are not inside.
    ///
    /// # Safety
    /// No other part that is in use may overlap this one.
    #[allow(clippy::mut_from_ref)]
    #[inline]
    pub(crate) unsafe fn slice(&self, at: usize, len: usize) -> &'a mut [T] {
        assert!(at <= self.len && len <= self.len - at, "{at} + {len} of {}", self.len);
        // SAFETY: inside the slice (asserted), and nobody else's by contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), len) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn parts_of_two_slices_meet() {
        let threads = Threads::new(3).unwrap();
        let (mut a, mut b) = (vec![0; 60], vec![0; 20]);
        threads.run(|| {
            parallel_zip((&mut a, 3), (&mut b, 1), |part, _, a, b| {
                a.fill(part);
                b[0] = a.len() + part;
            });
        });
        assert!(a.iter().enumerate().all(|(i, a)| *a == i / 3));
        assert!(b.iter().enumerate().all(|(i, b)| *b == 3 + i));
    }

    #[test]
    fn loops_use_the_team_they_are_in() {
        assert_eq!(num_threads(), 1);
        let (two, three) = (Threads::new(2).unwrap(), Threads::new(3).unwrap());
        two.run(|| {
            assert_eq!(num_threads(), 2);
            three.run(|| assert_eq!(num_threads(), 3));
            assert_eq!(num_threads(), 2);
            let sum = AtomicUsize::new(0);
            parallel_for(100, |task, thread| {
                assert!(thread < 2);
                sum.fetch_add(task, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 4950);
        });
        assert_eq!(num_threads(), 1);
        let sum = AtomicUsize::new(0);
        parallel_for(10, |task, thread| {
            assert_eq!(thread, 0);
            sum.fetch_add(task, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 45);
    }
}
