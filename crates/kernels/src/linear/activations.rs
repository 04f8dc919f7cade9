//! Inputs of linear layers in the form in which products read them.

use std::cell::RefCell;

use half::bf16;

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
}

/// Rows of inputs, made once and read by all layers that share them.
#[derive(Debug, Default)]
pub struct Activations {
    pub(super) rows: usize,
    pub(super) width: usize,
    /// Groups of a row, the last filled up with zeros.
    pub(super) num_groups: usize,
    /// Whether `bits` and `sums` are filled, or `plain`.
    rounded: bool,
    pub(super) bits: Vec<u16>,  // [rows, num_groups · GROUP], bf16
    pub(super) sums: Vec<f32>,  // [rows, num_groups]
    pub(super) plain: Vec<f32>, // [rows, width]
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

    /// Makes room for `rows` rows of `width` inputs; what they hold is left to the caller.
    pub(super) fn resize(&mut self, kind: ActivationKind, rows: usize, width: usize) {
        (self.rows, self.width, self.num_groups) = (rows, width, width.div_ceil(GROUP));
        self.rounded = kind == ActivationKind::Bf16;
        match kind {
            ActivationKind::F32 => self.plain.resize(rows * width, 0.0),
            ActivationKind::Bf16 => {
                self.bits.resize(rows * self.num_groups * GROUP, 0);
                self.sums.resize(rows * self.num_groups, 0.0);
            }
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
        self.resize(kind, rows, width);
        let per_task = if x.len() < SMALL { rows.max(1) } else { ROWS_PER_TASK };
        let (bits, sums) = (Disjoint::new(&mut self.bits), Disjoint::new(&mut self.sums));
        let plain = Disjoint::new(&mut self.plain);
        let num_groups = self.num_groups;
        let path = Path::best();
        parallel_for(rows.div_ceil(per_task), |task, _| {
            for row in task * per_task..rows.min((task + 1) * per_task) {
                let x = &x[row * width..(row + 1) * width];
                if kind == ActivationKind::F32 {
                    // SAFETY: every row belongs to one task.
                    let out = unsafe { plain.slice(row * width, width) };
                    match norm {
                        Some((weight, eps)) => crate::rms_norm(x, weight, eps, out),
                        None => out.copy_from_slice(x),
                    }
                    continue;
                }
                // SAFETY: as above.
                let (bits, sums) = unsafe {
                    let bits = bits.slice(row * num_groups * GROUP, num_groups * GROUP);
                    (bits, sums.slice(row * num_groups, num_groups))
                };
                let Some((weight, eps)) = norm else {
                    round_row(path, x, bits, sums);
                    continue;
                };
                NORMED.with_borrow_mut(|normed| {
                    normed.resize(width, 0.0);
                    crate::rms_norm(x, weight, eps, normed);
                    round_row(path, normed, bits, sums);
                });
            }
        });
    }

    pub(super) fn is(&self, kind: ActivationKind) -> bool {
        self.rounded == (kind == ActivationKind::Bf16)
    }
}

thread_local! {
    /// A row between its norm and its rounding.
    static NORMED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Rounds a group to bf16; returns the sum of what it is then.
#[inline(always)]
pub(super) fn round_group(path: Path, x: &[f32; GROUP], bits: &mut [u16; GROUP]) -> f32 {
    match path {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the path says that the processor can.
        Path::Bf16 => unsafe { super::x86::round_group(x, bits) },
        Path::Portable(_) => round_group_portable(x, bits),
    }
}

fn round_group_portable(x: &[f32; GROUP], bits: &mut [u16; GROUP]) -> f32 {
    let mut lanes = [0.0f32; 16];
    for (x, bits) in x.as_chunks::<16>().0.iter().zip(bits.as_chunks_mut::<16>().0) {
        for l in 0..16 {
            let rounded = bf16::from_f32(x[l]);
            bits[l] = rounded.to_bits();
            lanes[l] += rounded.to_f32();
        }
    }
    crate::gemm::sum_lanes(&lanes)
}

/// Rounds a row, its last group filled up with zeros.
fn round_row(path: Path, x: &[f32], bits: &mut [u16], sums: &mut [f32]) {
    let (whole, rest) = x.as_chunks::<GROUP>();
    let (bits, _) = bits.as_chunks_mut::<GROUP>();
    match path {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the path says that the processor can.
        Path::Bf16 => unsafe { super::x86::round_groups(whole, bits, sums) },
        Path::Portable(_) => {
            for ((x, bits), sum) in whole.iter().zip(&mut *bits).zip(&mut *sums) {
                *sum = round_group_portable(x, bits);
            }
        }
    }
    if !rest.is_empty() {
        let mut last = [0.0; GROUP];
        last[..rest.len()].copy_from_slice(rest);
        let at = whole.len();
        sums[at] = round_group(path, &last, &mut bits[at]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_like_half_and_sums_what_it_rounded() {
        let x: Vec<f32> = (0..71).map(|i| (i as f32 * 0.7).sin() * 10f32.powi(i % 9 - 4)).collect();
        for path in Path::available() {
            let (mut bits, mut sums) = (vec![1; 96], vec![1.0; 3]);
            round_row(path, &x, &mut bits, &mut sums);
            for (i, bits) in bits.iter().enumerate() {
                let exact = bf16::from_f32(x.get(i).copied().unwrap_or(0.0));
                assert_eq!(*bits, exact.to_bits(), "{path:?} {i}");
            }
            for (group, sum) in sums.iter().enumerate() {
                let exact: f32 =
                    bits[group * 32..][..32].iter().map(|b| bf16::from_bits(*b).to_f32()).sum();
                assert!((sum - exact).abs() < 1e-3, "{path:?} {sum} {exact}");
            }
        }
        for path in Path::available() {
            let mut odd = [0.0; GROUP];
            (odd[0], odd[1], odd[2]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
            let mut bits = [0; GROUP];
            round_group(path, &odd, &mut bits);
            assert!(bf16::from_bits(bits[0]).is_nan());
            assert_eq!(bits[1..3], [bf16::INFINITY.to_bits(), bf16::NEG_INFINITY.to_bits()]);
        }
    }
}
