//! Attention over blocks whose levels are bytes ([`crate::trellis`]): folding a basis into queries,
//! scores, softmax and weighted sums, all as sums of byte products.
//!
//! Levels are small integers times factors per row and per segment. Factors per segment go into the
//! folded query and into the finished sums; factors per row go onto scores and weights. What is left
//! between them is integers: queries folded and rounded to bytes (an error of about a hundredth, where
//! codes of 3 bits have one of a sixth), weights rounded to bytes per query row. Sums of integers do
//! not depend on their order, so every instruction set, and any company, gives the same bits.

mod basis;
mod fold;
mod queries;
mod rows;
mod scores;
mod softmax;
mod tile;
mod values;

#[cfg(test)]
mod tests;

pub use basis::{ByteBasis, FINE, LONGEST};
pub use fold::{ByteQueries, FoldScratch};
pub use queries::{largest_pair, rotate_to_bytes};
pub use rows::{ByteRows, LevelBlock};
pub use scores::{Scores, add_scores};
pub use softmax::{Rows, soft_weights};
pub use values::{ValueBlock, Weights, add_values};

/// Asks for bytes to be brought near, one cache line for each of `bytes`' first `lines`; returns what is
/// left.
#[inline]
pub fn prefetch(bytes: &[u8], lines: usize) -> &[u8] {
    let (now, later) = bytes.split_at(bytes.len().min(64 * lines));
    #[cfg(target_arch = "x86_64")]
    for line in now.chunks(64) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a prefetch has no effect but on time, and the address is within a slice.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast()) };
    }
    let _ = now;
    later
}
