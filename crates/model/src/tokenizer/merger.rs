//! Merging neighbours, the best pair first: what byte-level BPE and SentencePiece-style BPE share.
//!
//! A priority queue over a linked list of symbols, `O(n log n)`, as llama.cpp and the `tokenizers` crate have it.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// A piece of a text that is not merged further yet, in a doubly linked list.
#[derive(Debug, Clone, Copy)]
pub(super) struct Symbol {
    /// First byte in the text.
    pub(super) start: u32,
    /// Bytes; 0 once it was merged into its left neighbour.
    pub(super) len: u32,
    /// Its token, or [`NONE`].
    pub(super) id: u32,
    prev: u32,
    next: u32,
}

/// No symbol, or no token.
pub(super) const NONE: u32 = u32::MAX;

/// Two neighbours that join. The least is merged first: the least `order`, of those the leftmost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Pair {
    order: u32,
    left: u32,
    right: u32,
    /// Bytes of both.
    len: u32,
    id: u32,
}

/// Which neighbours join.
pub(super) trait Joins {
    /// When two neighbours are merged (the least first), and the token that they become; `None` if they do not join.
    fn join(&self, left: &Symbol, right: &Symbol) -> Option<(u32, u32)>;
}

/// Buffers, which may be used for one text after the other.
#[derive(Debug, Default)]
pub(super) struct Merger {
    symbols: Vec<Symbol>,
    queue: BinaryHeap<Reverse<Pair>>,
}

impl Merger {
    /// Starts anew.
    pub(super) fn clear(&mut self) {
        self.symbols.clear();
        self.queue.clear();
    }

    /// Adds a symbol at the end. A text has fewer than [`NONE`] bytes.
    pub(super) fn push(&mut self, start: u32, len: u32, id: u32) {
        let index = self.symbols.len() as u32;
        if let Some(before) = self.symbols.last_mut() {
            before.next = index;
        }
        let prev = index.checked_sub(1).unwrap_or(NONE);
        self.symbols.push(Symbol { start, len, id, prev, next: NONE });
    }

    /// Merges all that join.
    pub(super) fn run(&mut self, joins: &impl Joins) {
        for right in 1..self.symbols.len() as u32 {
            self.push_pair(joins, right - 1, right);
        }
        while let Some(Reverse(pair)) = self.queue.pop() {
            let (Some(left), Some(right)) = (self.symbol(pair.left), self.symbol(pair.right))
            else {
                continue;
            };
            // One of the two was merged with another neighbour since: lengths only grow.
            if left.len == 0 || right.len == 0 || left.len + right.len != pair.len {
                continue;
            }
            if let Some(merged) = self.symbol_mut(pair.left) {
                (merged.len, merged.id, merged.next) = (pair.len, pair.id, right.next);
            }
            if let Some(gone) = self.symbol_mut(pair.right) {
                gone.len = 0;
            }
            if let Some(after) = self.symbol_mut(right.next) {
                after.prev = pair.left;
            }
            self.push_pair(joins, left.prev, pair.left);
            self.push_pair(joins, pair.left, right.next);
        }
    }

    /// What is left, in order.
    pub(super) fn symbols(&self) -> impl Iterator<Item = &Symbol> {
        self.symbols.iter().filter(|symbol| symbol.len > 0)
    }

    fn symbol(&self, index: u32) -> Option<Symbol> {
        self.symbols.get(index as usize).copied()
    }

    fn symbol_mut(&mut self, index: u32) -> Option<&mut Symbol> {
        self.symbols.get_mut(index as usize)
    }

    /// Queues two neighbours if they join; does nothing at the ends of the text.
    fn push_pair(&mut self, joins: &impl Joins, left: u32, right: u32) {
        let (Some(l), Some(r)) = (self.symbol(left), self.symbol(right)) else { return };
        if let Some((order, id)) = joins.join(&l, &r) {
            self.queue.push(Reverse(Pair { order, left, right, len: l.len + r.len, id }));
        }
    }
}
