//! Byte buffers that begin on a cache line, or on a page if they are whole pages.

use crate::arena::Piece;

/// One cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// One page: what lies in whole pages costs fewer of the processor's address translations.
#[derive(Clone, Copy)]
#[repr(C, align(4096))]
struct Page([u8; PAGE]);

const PAGE: usize = 4096;

/// A zeroed buffer whose first byte is 64-byte aligned, 4,096-byte aligned if its length is a multiple of
/// that. Length is fixed.
pub struct AlignedBytes {
    memory: Memory,
    len: usize,
}

enum Memory {
    Lines(Box<[Line]>),
    Pages(Box<[Page]>),
    Piece(Piece),
}

impl Memory {
    #[inline(always)]
    fn start(&self) -> *const u8 {
        match self {
            Memory::Lines(lines) => lines.as_ptr().cast(),
            Memory::Pages(pages) => pages.as_ptr().cast(),
            Memory::Piece(piece) => piece.start(),
        }
    }
}

impl AlignedBytes {
    /// `len` zero bytes.
    pub fn zeroed(len: usize) -> Self {
        let memory = if len.is_multiple_of(PAGE) {
            Memory::Pages(vec![Page([0; PAGE]); len / PAGE].into_boxed_slice())
        } else {
            Memory::Lines(vec![Line([0; 64]); len.div_ceil(64)].into_boxed_slice())
        };
        Self { memory, len }
    }

    /// Of a piece of an arena that has room for `len` bytes.
    pub(crate) fn of_piece(piece: Piece, len: usize) -> Self {
        Self { memory: Memory::Piece(piece), len }
    }

    /// Keeps a piece of an arena in memory, with the rest of its mapping; does nothing for other bytes.
    ///
    /// # Errors
    /// What the operating system says.
    pub(crate) fn lock(&self) -> std::io::Result<()> {
        match &self.memory {
            Memory::Piece(piece) => piece.lock(),
            Memory::Lines(_) | Memory::Pages(_) => Ok(()),
        }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes.
    #[inline]
    pub fn as_slice(&self) -> &[u8] {
        let start = self.memory.start();
        // SAFETY: `memory` owns at least `len` initialised bytes, and `u8` has no alignment or
        // validity requirement.
        unsafe { std::slice::from_raw_parts(start, self.len) }
    }

    /// The bytes.
    #[inline]
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        let start = match &mut self.memory {
            Memory::Lines(lines) => lines.as_mut_ptr().cast(),
            Memory::Pages(pages) => pages.as_mut_ptr().cast(),
            Memory::Piece(piece) => piece.start(),
        };
        // SAFETY: as in `as_slice`, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(start, self.len) }
    }
}

impl Drop for AlignedBytes {
    fn drop(&mut self) {
        if let Memory::Piece(piece) = &self.memory {
            piece.release(self.len);
        }
    }
}

impl std::fmt::Debug for AlignedBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AlignedBytes({})", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn begins_on_a_cache_line_or_page_and_is_zero() {
        for len in [0, 1, 63, 64, 65, 4096, 8192] {
            let mut bytes = AlignedBytes::zeroed(len);
            assert_eq!(bytes.len(), len);
            let aligned = if len % 4096 == 0 { 4096 } else { 64 };
            assert_eq!(bytes.as_slice().as_ptr() as usize % aligned, 0);
            assert!(bytes.as_slice().iter().all(|b| *b == 0));
            bytes.as_mut_slice().fill(7);
            assert!(bytes.as_slice().iter().all(|b| *b == 7));
        }
    }
}
