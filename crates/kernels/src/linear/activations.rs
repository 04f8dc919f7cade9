//! Inputs of linear layers in the form in which products read them.

use std::cell::RefCell;

use half::bf16;

use super::bytes::{GroupHeader, round_groups_to_bytes, round_two, settle_row};
use super::packed::GROUP;
use super::product::Path;
use crate::threads::{Disjoint, parallel_for};

/// In which form a linear layer wants its inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ActivationKind {
    /// As they are.
    F32,
    /// Rounded to bf16, with the sum of each group.
    Bf16,
    /// Rounded to bytes with a step for each 16 (the largest is ±127), with the sum of each group.
    Bytes,
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
    pub(super) plain: Vec<f32>,           // F32: [rows, width]
    pub(super) bits: Vec<u16>,            // Bf16: [rows, num_groups · GROUP]
    pub(super) bytes: Vec<i8>,            // Bytes: [rows, num_groups · GROUP]
    pub(super) headers: Vec<GroupHeader>, // Bytes: [rows, num_groups]
    /// What steps are multiples of.
    pub(super) units: Vec<f32>, // Bytes: [rows]
    /// Sums of the groups as they are rounded.
    pub(super) sums: Vec<f32>, // Bf16: [rows, num_groups]
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
        let num_groups = width.div_ceil(GROUP);
        (self.rows, self.width, self.num_groups, self.kind) = (rows, width, num_groups, kind);
        let groups = rows * num_groups;
        match kind {
            ActivationKind::F32 => self.plain.resize(rows * width, 0.0),
            ActivationKind::Bf16 => {
                self.bits.resize(groups * GROUP, 0);
                self.sums.resize(groups, 0.0);
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
            path: Path::best(kind),
            width,
            num_groups,
            plain: Disjoint::new(&mut self.plain),
            bits: Disjoint::new(&mut self.bits),
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
        self.fill(kind, x, width, None);
    }

    /// Takes in the RMS norm of `x`: `[rows, weight.len()]`; see [`crate::rms_norm`].
    ///
    /// # Panics
    /// If `x` is not whole rows.
    pub fn set_normed(&mut self, kind: ActivationKind, x: &[f32], weight: &[f32], eps: f32) {
        self.fill(kind, x, weight.len(), Some((weight, eps)));
    }

    fn fill(&mut self, kind: ActivationKind, x: &[f32], width: usize, norm: Option<(&[f32], f32)>) {
        let rows = x.len() / width;
        assert_eq!(x.len(), rows * width, "input rows of {width}");
        let places = self.reset(kind, rows, width);
        let per_task = if x.len() < SMALL { rows.max(1) } else { ROWS_PER_TASK };
        parallel_for(rows.div_ceil(per_task), |task, _| {
            for row in task * per_task..rows.min((task + 1) * per_task) {
                let x = &x[row * width..(row + 1) * width];
                let Some((weight, eps)) = norm else {
                    // SAFETY: every row belongs to one task.
                    unsafe { places.put_row(row, x) };
                    continue;
                };
                NORMED.with_borrow_mut(|normed| {
                    normed.resize(width, 0.0);
                    crate::rms_norm(x, weight, eps, normed);
                    // SAFETY: as above.
                    unsafe { places.put_row(row, normed) };
                });
            }
        });
    }

    #[cfg(test)]
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
    path: Path,
    width: usize,
    num_groups: usize,
    plain: Disjoint<'a, f32>,
    bits: Disjoint<'a, u16>,
    bytes: Disjoint<'a, i8>,
    headers: Disjoint<'a, GroupHeader>,
    units: Disjoint<'a, f32>,
    sums: Disjoint<'a, f32>,
    byte_sums: Disjoint<'a, u16>,
}

impl Places<'_> {
    /// Rounds a row, its last group filled up with zeros.
    ///
    /// # Safety
    /// Nobody else writes this row meanwhile.
    unsafe fn put_row(&self, row: usize, x: &[f32]) {
        let first = row * self.num_groups;
        let n = self.num_groups;
        let (whole, rest) = x.as_chunks::<GROUP>();
        let mut last = [[0.0; GROUP]];
        last[0][..rest.len()].copy_from_slice(rest);
        let parts = [(0, whole), (whole.len(), &last[..n - whole.len()])];
        match self.kind {
            // SAFETY: the row's own place, which is the caller's.
            ActivationKind::F32 => unsafe {
                self.plain.slice(row * self.width, self.width).copy_from_slice(x);
            },
            ActivationKind::Bf16 => {
                // SAFETY: as above.
                let (bits, sums) = unsafe {
                    (self.bits.slice(first * GROUP, n * GROUP), self.sums.slice(first, n))
                };
                let (bits, _) = bits.as_chunks_mut::<GROUP>();
                for (at, groups) in parts {
                    round_groups(self.path, groups, &mut bits[at..], &mut sums[at..]);
                }
            }
            ActivationKind::Bytes => {
                // SAFETY: as above.
                let (bytes, headers) = unsafe {
                    (self.bytes.slice(first * GROUP, n * GROUP), self.headers.slice(first, n))
                };
                let (bytes, _) = bytes.as_chunks_mut::<GROUP>();
                for (at, groups) in parts {
                    round_groups_to_bytes(self.path, groups, &mut bytes[at..], &mut headers[at..]);
                }
                // SAFETY: as above.
                unsafe { self.settle(row) };
            }
        }
    }

    /// Rounds one group of some rows, from `first` on; [`Self::settle_rows`] finishes them. What is beyond the
    /// rows' width must be 0.
    ///
    /// # Safety
    /// Nobody else writes this group of these rows meanwhile.
    pub(super) unsafe fn put_group(&self, first: usize, group: usize, x: &[[f32; GROUP]]) {
        let at = |row: usize| (first + row) * self.num_groups + group;
        // SAFETY (all blocks): a group's own places, which are the caller's.
        match self.kind {
            ActivationKind::F32 => {
                let n = GROUP.min(self.width - group * GROUP);
                for (row, x) in (first..).zip(x) {
                    // SAFETY: see above.
                    let out = unsafe { self.plain.slice(row * self.width + group * GROUP, n) };
                    out.copy_from_slice(&x[..n]);
                }
            }
            ActivationKind::Bf16 => {
                for (row, x) in x.iter().enumerate() {
                    // SAFETY: see above.
                    let (bits, sum) = unsafe {
                        (self.bits.slice(at(row) * GROUP, GROUP), self.sums.slice(at(row), 1))
                    };
                    round_groups(self.path, std::slice::from_ref(x), bits.as_chunks_mut().0, sum);
                }
            }
            ActivationKind::Bytes => {
                // SAFETY: see above.
                let header = |row| unsafe { &mut self.headers.slice(at(row), 1)[0] };
                // SAFETY: see above.
                let bytes = |row| unsafe {
                    &mut self.bytes.slice(at(row) * GROUP, GROUP).as_chunks_mut::<GROUP>().0[0]
                };
                let (pairs, last) = x.as_chunks::<2>();
                for (i, x) in pairs.iter().enumerate() {
                    let rows = [2 * i, 2 * i + 1];
                    round_two(self.path, x.each_ref(), rows.map(bytes), rows.map(header));
                }
                for x in last {
                    let (row, x) = (2 * pairs.len(), std::slice::from_ref(x));
                    let (bytes, header) = (bytes(row), header(row));
                    let (bytes, header) =
                        (std::slice::from_mut(bytes), std::slice::from_mut(header));
                    round_groups_to_bytes(self.path, x, bytes, header);
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
        unit[0] = settle_row(self.path, headers, sums);
    }
}

thread_local! {
    /// A row between its norm and its rounding.
    static NORMED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Rounds groups to bf16; their sums are of what they are then.
#[inline(always)]
fn round_groups(path: Path, x: &[[f32; GROUP]], bits: &mut [[u16; GROUP]], sums: &mut [f32]) {
    match path {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the path says that the processor can.
        Path::Bf16 => unsafe { super::x86::pairs::round_groups(x, bits, sums) },
        _ => {
            for ((x, bits), sum) in x.iter().zip(bits).zip(sums) {
                let mut lanes = [0.0f32; 16];
                for (x, bits) in x.as_chunks::<16>().0.iter().zip(bits.as_chunks_mut::<16>().0) {
                    for l in 0..16 {
                        let rounded = bf16::from_f32(x[l]);
                        bits[l] = rounded.to_bits();
                        lanes[l] += rounded.to_f32();
                    }
                }
                *sum = crate::gemm::sum_lanes(&lanes);
            }
        }
    }
}

#[cfg(test)]
mod tests {
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
        let x = numbers();
        for path in Path::available(ActivationKind::Bf16) {
            let (mut bits, mut sums) = ([[1; GROUP]; 3], [1.0; 3]);
            round_groups(path, &x, &mut bits, &mut sums);
            for (bits, x) in bits.as_flattened().iter().zip(x.as_flattened()) {
                assert_eq!(*bits, bf16::from_f32(*x).to_bits(), "{path:?}");
            }
            for (bits, sum) in bits.iter().zip(sums) {
                let exact: f32 = bits.iter().map(|b| bf16::from_bits(*b).to_f32()).sum();
                assert!((sum - exact).abs() < 1e-3, "{path:?} {sum} {exact}");
            }
        }
        for path in Path::available(ActivationKind::Bf16) {
            let mut odd = [[0.0; GROUP]];
            (odd[0][0], odd[0][1], odd[0][2]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
            let mut bits = [[0; GROUP]];
            round_groups(path, &odd, &mut bits, &mut [0.0]);
            assert!(bf16::from_bits(bits[0][0]).is_nan());
            assert_eq!(bits[0][1..3], [bf16::INFINITY.to_bits(), bf16::NEG_INFINITY.to_bits()]);
        }
    }
}
