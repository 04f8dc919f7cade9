//! Tiles of keys and values, in f32 or in pairs of bf16.

use half::f16;

use super::{BlockScratch, FEW_ROWS, KvBlock, LANES, Products, QueryRows, StoredRows};
use crate::convert::f16_to_f32;
use crate::isa::{Isa, Set};

/// Floats that begin on a cache line.
#[derive(Debug, Default)]
pub(super) struct Lines {
    lines: Vec<Line>,
}

#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; LANES]);

impl Lines {
    /// Makes room for `len` floats; keeps what was there.
    pub(super) fn resize(&mut self, len: usize) {
        let lines = len.div_ceil(LANES);
        if self.lines.len() < lines {
            self.lines.resize(lines, Line([0.0; LANES]));
        }
    }

    #[inline]
    pub(super) fn as_slice(&self) -> &[f32] {
        // SAFETY: `Line` is `LANES` floats without padding, so `lines` owns this many initialised ones.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.lines.len() * LANES) }
    }

    #[inline]
    pub(super) fn as_mut_slice(&mut self) -> &mut [f32] {
        let len = self.lines.len() * LANES;
        // SAFETY: as in `as_slice`, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), len) }
    }
}

/// The same as words: pairs of bf16.
#[cfg(target_arch = "x86_64")]
impl Lines {
    #[inline]
    pub(super) fn words(&self) -> &[u32] {
        let floats = self.as_slice();
        // SAFETY: words are as long and as aligned as floats, and any bits are good.
        unsafe { std::slice::from_raw_parts(floats.as_ptr().cast(), floats.len()) }
    }

    #[inline]
    pub(super) fn words_mut(&mut self) -> &mut [u32] {
        let floats = self.as_mut_slice();
        // SAFETY: as above, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(floats.as_mut_ptr().cast(), floats.len()) }
    }

    #[inline]
    pub(super) fn halves_mut(&mut self) -> &mut [u16] {
        let floats = self.as_mut_slice();
        // SAFETY: as above; twice as many halves fill the same bytes.
        unsafe { std::slice::from_raw_parts_mut(floats.as_mut_ptr().cast(), 2 * floats.len()) }
    }
}

/// How a block is read.
pub(super) struct Plan {
    /// Products are of pairs of bf16.
    pub(super) pairs: bool,
    /// Keys are transposed on the way into registers.
    pub(super) keys_in_registers: bool,
    /// Values are widened on the way into registers.
    pub(super) values_in_registers: bool,
}

impl Plan {
    pub(super) fn new(isa: Isa, queries: &QueryRows<'_>, block: &KvBlock<'_>) -> Self {
        let capacity = (block.keys.len() / queries.dim).min(block.values.len() / block.value_dim);
        let few = isa.has(Set::Avx512) && queries.num() <= FEW_ROWS;
        let halves = |rows| matches!(rows, StoredRows::F16(_));
        // Keys are read 32 at a time.
        let readable = block.filled.next_multiple_of(2 * LANES) <= capacity;
        Self {
            pairs: isa.has(Set::Avx512) && queries.products == Products::Bf16 && has_bf16(),
            keys_in_registers: few && halves(block.keys) && readable,
            values_in_registers: few && halves(block.values),
        }
    }

    /// The same where values are not read.
    pub(super) fn for_keys(isa: Isa, queries: &QueryRows<'_>, block: &KvBlock<'_>) -> Self {
        Self { values_in_registers: true, ..Self::new(isa, queries, block) }
    }
}

/// Whether the processor has products of bf16.
#[inline]
pub(super) fn has_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    return Isa::best().has(Set::Avx512Bf16);
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Fills the tiles that the plan needs.
pub(super) fn prepare(
    isa: Isa,
    plan: &Plan,
    block: &KvBlock<'_>,
    dim: usize,
    scratch: &mut BlockScratch,
) {
    #[cfg(target_arch = "x86_64")]
    if plan.pairs {
        prepare_pairs(plan, block, dim, scratch);
        return;
    }
    let BlockScratch { keys, values, rows, .. } = scratch;
    if let (false, StoredRows::F16(stored)) = (plan.values_in_registers, block.values) {
        let filled = block.filled * block.value_dim;
        values.resize(filled);
        widen(isa, &stored[..filled], values.as_mut_slice());
    }
    let filled = block.filled * dim;
    if plan.keys_in_registers {
        return;
    }
    let tokens = block.filled.next_multiple_of(LANES);
    keys.resize(dim * tokens);
    let keys = keys.as_mut_slice();
    #[cfg(target_arch = "x86_64")]
    if let (true, StoredRows::F16(stored)) = (isa.has(Set::Avx512), block.keys)
        && stored.len() >= tokens * dim
    {
        super::avx512::transpose_stored(stored, dim, tokens, keys);
        return;
    }
    let rows: &[f32] = match block.keys {
        StoredRows::F32(rows) => rows,
        StoredRows::F16(stored) => {
            rows.resize(filled);
            widen(isa, &stored[..filled], rows.as_mut_slice())
        }
    };
    transpose(isa, rows, (block.filled, dim), tokens, keys);
}

/// The same with products of bf16.
#[cfg(target_arch = "x86_64")]
fn prepare_pairs(plan: &Plan, block: &KvBlock<'_>, dim: usize, scratch: &mut BlockScratch) {
    use super::avx512::{pair_keys, pair_values, round};
    let BlockScratch { keys, values, rows, .. } = scratch;
    let (shape, tokens) = ((block.filled, dim), block.filled.next_multiple_of(LANES));
    if !plan.values_in_registers {
        let shape = (block.filled, block.value_dim);
        values.resize(block.filled.div_ceil(2) * block.value_dim);
        match block.values {
            StoredRows::F16(stored) => pair_values(stored, shape, values.words_mut()),
            StoredRows::F32(stored) => pair_values(stored, shape, values.words_mut()),
        }
    }
    if plan.keys_in_registers {
        return;
    }
    keys.resize(dim / 2 * tokens);
    match block.keys {
        StoredRows::F16(stored) => {
            let bits: &[u16] = half::slice::HalfFloatSliceExt::reinterpret_cast(stored);
            pair_keys::<true>(bits, shape, tokens, keys.words_mut());
        }
        StoredRows::F32(stored) => {
            rows.resize(block.filled * dim / 2);
            let rounded = &mut rows.halves_mut()[..block.filled * dim];
            round(&stored[..block.filled * dim], rounded);
            pair_keys::<false>(rounded, shape, tokens, keys.words_mut());
        }
    }
}

/// The first rows as f32.
fn widen<'a>(isa: Isa, stored: &[f16], rows: &'a mut [f32]) -> &'a [f32] {
    let rows = &mut rows[..stored.len()];
    #[cfg(target_arch = "x86_64")]
    if isa.has(Set::Avx512) && stored.len().is_multiple_of(LANES) {
        super::avx512::widen(stored, rows);
        return rows;
    }
    let _ = isa;
    f16_to_f32(stored, rows);
    rows
}

/// `out[c, t] = rows[t, c]` for `t < filled`; `out`: `[dim, tokens]`, other columns become anything.
fn transpose(
    isa: Isa,
    rows: &[f32],
    (filled, dim): (usize, usize),
    tokens: usize,
    out: &mut [f32],
) {
    #[cfg(target_arch = "x86_64")]
    if isa.has(Set::Avx512) && dim.is_multiple_of(4) {
        super::avx512::transpose(rows, (filled, dim), tokens, out);
        return;
    }
    let _ = isa;
    for (c, out) in out.chunks_exact_mut(tokens).take(dim).enumerate() {
        for (t, out) in out.iter_mut().take(filled).enumerate() {
            *out = rows[t * dim + c];
        }
    }
}
