//! Inputs of linear layers in the form in which products read them.

use std::cell::RefCell;

use super::bytes::{GroupHeader, round_groups, settle_row};
use super::packed::{GROUP, HALF, PAIRS};
use super::product::reads_words;
use super::tiles::{self, BLOCK};
use crate::isa::{Isa, Set};
use crate::lines::Lines;
use crate::simd::{Simd, compiled};
use crate::threads::{Disjoint, parallel_for};

/// In which form a linear layer wants its inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ActivationKind {
    /// As they are.
    F32,
    /// Rounded to bf16, with the sum of each group. On processors without products of bf16 the same numbers as f32.
    Bf16,
    /// Rounded to bytes with a step for each 16 (the largest is ±127), with the sum of each group.
    Bytes,
    /// Rounded to bf16, in blocks of rows as tiles of AMX take them; weights are rounded to bf16 with them. Slow without AMX.
    Tiles,
}

impl ActivationKind {
    /// What this processor multiplies fastest, with codes or with other weights.
    pub fn fastest(codes: bool) -> Self {
        let isa = Isa::best();
        if isa.has(Set::Amx) {
            return Self::Tiles;
        }
        // Where compilers must find them, products of bytes are slower than others.
        if codes && cfg!(target_arch = "x86_64") {
            Self::Bytes
        } else if crate::peak::bf16_is_fast(isa) {
            Self::Bf16
        } else {
            Self::F32
        }
    }
}

impl std::fmt::Display for ActivationKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Bytes => "bytes",
            Self::Tiles => "bf16 tiles",
        })
    }
}

/// Rows of inputs, made once and read by all layers that share them.
#[derive(Debug)]
pub struct Activations {
    pub(super) rows: usize,
    pub(super) width: usize,
    /// Groups of a row, the last filled up with zeros.
    pub(super) num_groups: usize,
    /// Which of the others are filled.
    kind: ActivationKind,
    pub(super) plain: Vec<f32>, // F32, and Bf16 unless words are read: [rows, num_groups · GROUP]
    pub(super) bits: Vec<u16>,  // Bf16 that are read as words: [rows, num_groups · GROUP]
    /// Pairs of bf16, a float each.
    pub(super) tiles: Lines, // Tiles: [⌈rows / 16⌉, num_groups, 16 pairs, 16 rows], or all if fewer
    pub(super) bytes: Vec<i8>,  // Bytes: [rows, num_groups · GROUP]
    pub(super) headers: Vec<GroupHeader>, // Bytes: [rows, num_groups]
    /// What steps are multiples of.
    pub(super) units: Vec<f32>, // Bytes: [rows]
    /// Sums of the groups as they are rounded.
    pub(super) sums: Vec<f32>, // F32, Bf16: [rows, num_groups]
    /// The same in units of the row, as bf16; a last one of a pair that is no group is 0.
    pub(super) byte_sums: Vec<u16>, // Bytes: [rows, num_groups, rounded up to pairs]
}

impl Default for Activations {
    fn default() -> Self {
        Self {
            rows: 0,
            width: 0,
            num_groups: 0,
            kind: ActivationKind::F32,
            plain: Vec::new(),
            bits: Vec::new(),
            tiles: Lines::default(),
            bytes: Vec::new(),
            headers: Vec::new(),
            units: Vec::new(),
            sums: Vec::new(),
            byte_sums: Vec::new(),
        }
    }
}

/// Rows that one task turns.
const ROWS_PER_TASK: usize = 16;

/// Elements below which a loop on several threads costs more than it saves.
const SMALL: usize = 1 << 13;

impl Activations {
    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Makes room for `rows` rows of `width` inputs, which the caller fills.
    pub(super) fn reset(&mut self, kind: ActivationKind, rows: usize, width: usize) -> Places<'_> {
        self.reset_on(Isa::best(), kind, rows, width)
    }

    fn reset_on(
        &mut self,
        isa: Isa,
        kind: ActivationKind,
        rows: usize,
        width: usize,
    ) -> Places<'_> {
        let num_groups = width.div_ceil(GROUP);
        (self.rows, self.width, self.num_groups, self.kind) = (rows, width, num_groups, kind);
        let groups = rows * num_groups;
        match kind {
            ActivationKind::F32 | ActivationKind::Bf16 => {
                if kind == ActivationKind::Bf16 && reads_words(isa) {
                    self.bits.resize(groups * GROUP, 0);
                } else {
                    self.plain.resize(groups * GROUP, 0.0);
                }
                self.sums.resize(groups, 0.0);
            }
            ActivationKind::Tiles => {
                let block = num_groups * PAIRS * tiles::columns(rows);
                self.tiles.resize(rows.div_ceil(BLOCK) * block);
            }
            ActivationKind::Bytes => {
                self.bytes.resize(groups * GROUP, 0);
                self.headers.resize(groups, GroupHeader::default());
                self.units.resize(rows, 0.0);
                self.byte_sums.resize(rows * num_groups.next_multiple_of(2), 0);
            }
        }
        Places {
            kind,
            isa,
            width,
            num_groups,
            columns: tiles::columns(rows),
            plain: Disjoint::new(&mut self.plain),
            bits: Disjoint::new(&mut self.bits),
            tiles: Disjoint::new(self.tiles.as_mut_slice()),
            bytes: Disjoint::new(&mut self.bytes),
            headers: Disjoint::new(&mut self.headers),
            units: Disjoint::new(&mut self.units),
            sums: Disjoint::new(&mut self.sums),
            byte_sums: Disjoint::new(&mut self.byte_sums),
        }
    }

    /// Takes in `x`: `[rows, width]`.
    ///
    /// # Panics
    /// If `x` is not whole rows.
    pub fn set(&mut self, kind: ActivationKind, x: &[f32], width: usize) {
        self.fill(Isa::best(), kind, x, width, None);
    }

    /// Takes in the RMS norm of `x`: `[rows, weight.len()]`; see [`crate::rms_norm`].
    ///
    /// # Panics
    /// If `x` is not whole rows.
    pub fn set_normed(&mut self, kind: ActivationKind, x: &[f32], weight: &[f32], eps: f32) {
        self.fill(Isa::best(), kind, x, weight.len(), Some((weight, eps)));
    }

    pub(super) fn fill(
        &mut self,
        isa: Isa,
        kind: ActivationKind,
        x: &[f32],
        width: usize,
        norm: Option<(&[f32], f32)>,
    ) {
        let rows = x.len() / width;
        assert_eq!(x.len(), rows * width, "input rows of {width}");
        let places = self.reset_on(isa, kind, rows, width);
        let per_task = if x.len() < SMALL { rows.max(1) } else { ROWS_PER_TASK };
        // Rows that are put together: those of a block, or some whose groups fill vectors, few enough that they stay in L1 between their
        // norm and their rounding.
        let at_once = match kind {
            ActivationKind::Tiles => BLOCK,
            ActivationKind::Bytes if width.is_multiple_of(GROUP) => 8,
            _ => 1,
        };
        parallel_for(rows.div_ceil(per_task), |task, _| {
            let end = rows.min((task + 1) * per_task);
            for first in (task * per_task..end).step_by(at_once) {
                let x = &x[first * width..end.min(first + at_once) * width];
                let Some((weight, eps)) = norm else {
                    // SAFETY: every row belongs to one task, and so does every block.
                    unsafe { places.put_rows(first, x) };
                    continue;
                };
                NORMED.with_borrow_mut(|normed| {
                    normed.resize(x.len(), 0.0);
                    for (x, normed) in x.chunks_exact(width).zip(normed.chunks_exact_mut(width)) {
                        crate::rms_norm(x, weight, eps, normed);
                    }
                    // SAFETY: as above.
                    unsafe { places.put_rows(first, normed) };
                });
            }
        });
    }

    pub(super) fn kind(&self) -> ActivationKind {
        self.kind
    }

    pub(super) fn is(&self, kind: ActivationKind) -> bool {
        self.kind == kind
    }
}

/// Where the rows of [`Activations`] go: tasks fill them at the same time.
pub(super) struct Places<'a> {
    kind: ActivationKind,
    isa: Isa,
    width: usize,
    num_groups: usize,
    /// Of a block for tiles.
    columns: usize,
    plain: Disjoint<'a, f32>,
    bits: Disjoint<'a, u16>,
    tiles: Disjoint<'a, f32>,
    bytes: Disjoint<'a, i8>,
    headers: Disjoint<'a, GroupHeader>,
    units: Disjoint<'a, f32>,
    sums: Disjoint<'a, f32>,
    byte_sums: Disjoint<'a, u16>,
}

impl Places<'_> {
    /// Rounds one row, or several where that is as good: for tiles up to a whole block of them from its first one on, as bytes rows of
    /// whole groups. Else the last group is filled up with zeros.
    ///
    /// # Safety
    /// Nobody else writes these rows meanwhile, or their block.
    unsafe fn put_rows(&self, row: usize, x: &[f32]) {
        let first = row * self.num_groups;
        let n = self.num_groups;
        if self.kind == ActivationKind::Tiles {
            for group in 0..n {
                // SAFETY: the block's own place, by contract.
                unsafe { self.put_block(row, group, &x[group * GROUP..], self.width) };
            }
            return;
        }
        let (whole, rest) = x.as_chunks::<GROUP>();
        let mut last = [[0.0; GROUP]];
        last[0][..rest.len()].copy_from_slice(rest);
        let parts = [(0, whole), (whole.len(), &last[..n.saturating_sub(whole.len())])];
        match self.kind {
            ActivationKind::F32 | ActivationKind::Bf16 => {
                for (at, groups) in parts {
                    // SAFETY: the row's own place, which is the caller's.
                    unsafe { self.put_numbers(first + at, groups) };
                }
            }
            ActivationKind::Bytes => {
                for (at, groups) in parts {
                    round_groups(self.isa, groups, (&self.bytes, &self.headers), (first + at, 1));
                }
                for row in row..row + x.len().div_ceil(self.width) {
                    // SAFETY: as above.
                    unsafe { self.settle(row) };
                }
            }
            // See above.
            ActivationKind::Tiles => {}
        }
    }

    /// One group of up to 16 rows from `first` on, where a block begins; they lie `stride` apart in `x`, of which the last may be
    /// narrower than a group.
    ///
    /// # Safety
    /// Nobody else writes that group of the block meanwhile.
    unsafe fn put_block(&self, first: usize, group: usize, x: &[f32], stride: usize) {
        let there = GROUP.min(self.width - group * GROUP);
        let rows = (x.len() - there) / stride + 1;
        let (columns, size) = (self.columns, PAIRS * self.columns);
        let at = (first / BLOCK * self.num_groups + group) * size;
        // SAFETY: by contract.
        let out = unsafe { self.tiles.slice(at, size) };
        if there == GROUP {
            tiles::round_group(self.isa, x, stride, rows, columns, out);
            return;
        }
        let mut filled = [[0.0; GROUP]; BLOCK];
        for (x, filled) in x.chunks(stride).zip(&mut filled) {
            filled[..there].copy_from_slice(&x[..there]);
        }
        tiles::round_group(self.isa, filled.as_flattened(), GROUP, rows, columns, out);
    }

    /// Groups from `at` on, counted over all rows, as f32 or bf16.
    ///
    /// # Safety
    /// Nobody else writes them meanwhile.
    unsafe fn put_numbers(&self, at: usize, x: &[[f32; GROUP]]) {
        let n = x.len();
        let round = self.kind == ActivationKind::Bf16;
        // SAFETY: their own places, by contract.
        unsafe {
            let sums = self.sums.slice(at, n);
            if round && reads_words(self.isa) {
                let bits = self.bits.slice(at * GROUP, n * GROUP);
                round_to_words(self.isa, x, bits.as_chunks_mut().0, sums);
            } else {
                let out = self.plain.slice(at * GROUP, n * GROUP);
                put_floats(self.isa, round, x, out.as_chunks_mut().0, sums);
            }
        }
    }

    /// Rounds one group of some rows, from `first` on, where a block begins; [`Self::settle_rows`] finishes them. What is beyond the
    /// rows' width must be 0.
    ///
    /// # Safety
    /// Nobody else writes this group of these rows meanwhile.
    pub(super) unsafe fn put_group(&self, first: usize, group: usize, x: &[[f32; GROUP]]) {
        let at = |row: usize| (first + row) * self.num_groups + group;
        // SAFETY (all blocks): a group's own places, which are the caller's.
        match self.kind {
            ActivationKind::F32 | ActivationKind::Bf16 => {
                for (row, x) in x.iter().enumerate() {
                    // SAFETY: see above.
                    unsafe { self.put_numbers(at(row), std::slice::from_ref(x)) };
                }
            }
            ActivationKind::Bytes => {
                let place = (at(0), self.num_groups);
                round_groups(self.isa, x, (&self.bytes, &self.headers), place);
            }
            ActivationKind::Tiles => {
                for (i, x) in x.chunks(BLOCK).enumerate() {
                    // SAFETY: see above.
                    unsafe { self.put_block(first + i * BLOCK, group, x.as_flattened(), GROUP) };
                }
            }
        }
    }

    /// Finishes rows whose groups were put one by one.
    ///
    /// # Safety
    /// Nobody else has them meanwhile.
    pub(super) unsafe fn settle_rows(&self, rows: usize) {
        if self.kind != ActivationKind::Bytes {
            return;
        }
        let small = rows * self.width < SMALL;
        let per_task = if small { rows.max(1) } else { ROWS_PER_TASK };
        parallel_for(rows.div_ceil(per_task), |task, _| {
            for row in task * per_task..rows.min((task + 1) * per_task) {
                // SAFETY: every row belongs to one task.
                unsafe { self.settle(row) };
            }
        });
    }

    /// # Safety
    /// Nobody else has this row meanwhile.
    unsafe fn settle(&self, row: usize) {
        let (n, pairs) = (self.num_groups, self.num_groups.next_multiple_of(2));
        // SAFETY: the row's own places, which are the caller's.
        let (headers, sums, unit) = unsafe {
            let sums = self.byte_sums.slice(row * pairs, pairs);
            (self.headers.slice(row * n, n), sums, self.units.slice(row, 1))
        };
        unit[0] = settle_row(self.isa, headers, sums);
    }
}

thread_local! {
    /// A row between its norm and its rounding.
    static NORMED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

compiled! {
    /// Rounds groups to bf16; their sums are of what they are then.
    fn round_to_words(x: &[[f32; GROUP]], bits: &mut [[u16; GROUP]], sums: &mut [f32]) = words_body
        for [Avx512Bf16, Avx512, Avx2, Sse2];
}
compiled! {
    /// Groups as f32, rounded to bf16 or not, and their sums.
    fn put_floats(round: bool, x: &[[f32; GROUP]], out: &mut [[f32; GROUP]], sums: &mut [f32]) = floats_body
        for [Avx512, Avx2, Sse2];
}

#[inline(always)]
fn words_body<S: Simd>(s: S, x: &[[f32; GROUP]], bits: &mut [[u16; GROUP]], sums: &mut [f32]) {
    for ((x, bits), sum) in x.iter().zip(bits).zip(sums) {
        // SAFETY: a group is two vectors.
        unsafe {
            let first = s.round_bf16(s.load(x.as_ptr()));
            let last = s.round_bf16(s.load(x.as_ptr().add(HALF)));
            s.store_low_halves(bits.as_mut_ptr(), first);
            s.store_low_halves(bits.as_mut_ptr().add(HALF), last);
            *sum = s.sum(s.add(s.from_bits(s.shl(first, 16)), s.from_bits(s.shl(last, 16))));
        }
    }
}

#[inline(always)]
fn floats_body<S: Simd>(
    s: S,
    round: bool,
    x: &[[f32; GROUP]],
    out: &mut [[f32; GROUP]],
    sums: &mut [f32],
) {
    for ((x, out), sum) in x.iter().zip(out).zip(sums) {
        // SAFETY: a group is two vectors.
        unsafe {
            let mut both = [s.load(x.as_ptr()), s.load(x.as_ptr().add(HALF))];
            for (h, v) in both.iter_mut().enumerate() {
                if round {
                    *v = s.from_bits(s.shl(s.round_bf16(*v), 16));
                }
                s.store(out.as_mut_ptr().add(HALF * h), *v);
            }
            *sum = s.sum(s.add(both[0], both[1]));
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    fn numbers() -> [[f32; GROUP]; 3] {
        std::array::from_fn(|g| {
            std::array::from_fn(|i| {
                let i = (g * GROUP + i) as i32;
                if i < 71 { (i as f32 * 0.7).sin() * 10f32.powi(i % 9 - 4) } else { 0.0 }
            })
        })
    }

    #[test]
    fn rounds_like_half_and_sums_what_it_rounded() {
        let mut x = numbers();
        (x[2][0], x[2][1], x[2][2]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
        for isa in Isa::available() {
            let (mut bits, mut sums) = ([[1; GROUP]; 3], [1.0; 3]);
            round_to_words(isa, &x, &mut bits, &mut sums);
            let (mut floats, mut same) = ([[1.0; GROUP]; 3], [1.0; 3]);
            put_floats(isa, true, &x, &mut floats, &mut same);
            for (i, x) in x.as_flattened().iter().enumerate() {
                let (word, float) = (bits.as_flattened()[i], floats.as_flattened()[i]);
                let expected = bf16::from_f32(*x);
                assert_eq!(bf16::from_bits(word).is_nan(), x.is_nan(), "{isa} {x}");
                assert!(x.is_nan() || word == expected.to_bits(), "{isa} {x}");
                assert_eq!(bf16::from_bits(word).to_f32().to_bits(), float.to_bits(), "{isa} {x}");
            }
            for (bits, (sum, same)) in bits.iter().zip(sums.into_iter().zip(same)).take(2) {
                let exact: f32 = bits.iter().map(|b| bf16::from_bits(*b).to_f32()).sum();
                assert!((sum - exact).abs() < 1e-3, "{isa} {sum} {exact}");
                assert_eq!(sum.to_bits(), same.to_bits());
            }
            put_floats(isa, false, &x, &mut floats, &mut same);
            assert_eq!(floats.map(|x| x.map(f32::to_bits)), x.map(|x| x.map(f32::to_bits)));
        }
    }
}
