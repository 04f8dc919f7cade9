//! Memory in large pages. What a step reads is hundreds of megabytes in pieces of some kilobytes; with pages of 4 KiB
//! nearly each piece costs an address translation that the processor does not have at hand, which on a virtual
//! machine is a walk through two tables. Where the system can (Linux), it is asked for pages of 2 MiB.

use std::sync::{Arc, Mutex, PoisonError};

use memmap2::{MmapOptions, MmapRaw};

use crate::AlignedBytes;

/// A large page.
const HUGE_PAGE: usize = 2 << 20;

/// Bytes that are mapped at a time. They take no memory before they are used.
const CHUNK: usize = 32 << 20;

/// No system's ordinary pages are larger: what is given back is cut to whole multiples of it.
const LARGEST_PAGE: usize = 64 << 10;

/// Alignment of a piece: a small page's if it is whole small pages, a cache line's if not.
fn alignment(len: usize) -> usize {
    if len.is_multiple_of(4096) { 4096 } else { 64 }
}

/// Cuts large mappings into pieces, which never move. A piece's memory goes back to the system when it is dropped,
/// its addresses when all pieces of its mapping are.
#[derive(Debug, Default)]
pub struct Arena(Mutex<Option<Chunk>>);

/// A mapping, and how much of it is cut off.
#[derive(Debug)]
struct Chunk {
    mapping: Arc<Mapping>,
    used: usize,
}

/// A mapping from a border of large pages on.
#[derive(Debug)]
struct Mapping {
    map: MmapRaw,
    /// Where the border is.
    start: usize,
    /// Bytes from there on.
    len: usize,
}

/// Part of a mapping, and of nobody else.
#[derive(Debug)]
pub(crate) struct Piece {
    mapping: Arc<Mapping>,
    from: usize,
}

impl Arena {
    /// One that has mapped nothing yet.
    pub const fn new() -> Self {
        Self(Mutex::new(None))
    }

    /// `len` zero bytes, aligned as [`AlignedBytes`] are; from the allocator if no memory can be mapped.
    pub fn zeroed(&self, len: usize) -> AlignedBytes {
        match self.piece(len) {
            Some(piece) => AlignedBytes::of_piece(piece, len),
            None => AlignedBytes::zeroed(len),
        }
    }

    fn piece(&self, len: usize) -> Option<Piece> {
        if len == 0 {
            return None;
        }
        // A large piece leaves the rest of the current chunk to smaller ones.
        if len >= CHUNK {
            return Some(Piece { mapping: Arc::new(Mapping::new(len)?), from: 0 });
        }
        let mut chunk = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let from = |chunk: &Chunk| {
            let from = chunk.used.next_multiple_of(alignment(len));
            Some(from).filter(|from| from + len <= chunk.mapping.len)
        };
        if chunk.as_ref().and_then(from).is_none() {
            *chunk = Some(Chunk { mapping: Arc::new(Mapping::new(CHUNK)?), used: 0 });
        }
        let chunk = chunk.as_mut()?;
        let from = from(chunk)?;
        chunk.used = from + len;
        Some(Piece { mapping: chunk.mapping.clone(), from })
    }
}

impl Mapping {
    /// `None` if the system has no such addresses left.
    fn new(len: usize) -> Option<Self> {
        let len = len.checked_next_multiple_of(HUGE_PAGE)?;
        let all = len.checked_add(HUGE_PAGE)?;
        let map = MmapOptions::new().len(all).no_reserve_swap().map_anon().ok()?;
        // Advice: a system without large pages does as well.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        let start = map.as_ptr().align_offset(HUGE_PAGE).min(HUGE_PAGE);
        Some(Self { map: map.into(), start, len })
    }
}

impl Piece {
    /// Where it begins: what follows is initialised, up to the length it was asked for with, as long as it lives.
    #[inline(always)]
    pub(crate) fn start(&self) -> *mut u8 {
        // SAFETY: pieces are within `len` bytes from `start` on, which are within the mapping.
        unsafe { self.mapping.map.as_mut_ptr().add(self.mapping.start + self.from) }
    }

    /// Keeps its mapping in memory.
    ///
    /// # Errors
    /// What the operating system says.
    pub(crate) fn lock(&self) -> std::io::Result<()> {
        #[cfg(unix)]
        self.mapping.map.lock()?;
        Ok(())
    }

    /// Gives the memory of its `len` bytes back to the system; it is as good as dropped.
    pub(crate) fn release(&self, len: usize) {
        let map = self.mapping.map.as_ptr() as usize;
        let first = self.start() as usize;
        let from = first.next_multiple_of(LARGEST_PAGE);
        let to = (first + len) / LARGEST_PAGE * LARGEST_PAGE;
        #[cfg(unix)]
        if from < to {
            let advice = memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: whole pages of the piece, which nobody will read again, and which would read as zeros.
            let _ =
                unsafe { self.mapping.map.unchecked_advise_range(advice, from - map, to - from) };
        }
        #[cfg(not(unix))]
        let _ = (map, from, to);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_zero_aligned_and_do_not_overlap() {
        let arena = Arena::default();
        let lens = [1, 4096, 100_000, 256 << 10, CHUNK - 4096, 3 << 20, CHUNK, CHUNK + 1, 64];
        let mut pieces: Vec<AlignedBytes> = lens.iter().map(|len| arena.zeroed(*len)).collect();
        for (i, piece) in pieces.iter_mut().enumerate() {
            assert_eq!(piece.len(), lens[i]);
            assert_eq!(piece.as_slice().as_ptr() as usize % alignment(lens[i]), 0);
            assert!(piece.as_slice().iter().all(|b| *b == 0));
            piece.as_mut_slice().fill(i as u8 + 1);
        }
        // Every other one goes; the others keep what they have.
        let mut number = 0;
        pieces.retain(|_| {
            number += 1;
            number % 2 == 0
        });
        for (i, piece) in pieces.iter().enumerate() {
            assert!(piece.as_slice().iter().all(|b| *b == 2 * i as u8 + 2));
        }
        assert!(arena.zeroed(0).is_empty());
        assert!(arena.zeroed(1 << 20).as_slice().iter().all(|b| *b == 0));
    }
}
