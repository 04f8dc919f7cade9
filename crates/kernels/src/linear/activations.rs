//! Inputs of linear layers in the form in which products read them.

use half::bf16;

use super::packed::GROUP;
use crate::isa::dispatch;
use crate::threads::{Disjoint, parallel_for};

/// In which form a linear layer wants its inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ActivationKind {
    /// As they are.
    F32,
    /// Rounded to bf16, with the sum of each group.
    Bf16,
}

/// Makes an input row from a row of numbers.
type Turn<'a> = dyn Fn(&[f32], &mut [f32]) + Sync + 'a;

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
        self.fill(kind, x, width, &|x, out| out.copy_from_slice(x));
    }

    /// Takes in the RMS norm of `x`: `[rows, weight.len()]`; see [`crate::rms_norm`].
    ///
    /// # Panics
    /// If `x` is not whole rows.
    pub fn set_normed(&mut self, kind: ActivationKind, x: &[f32], weight: &[f32], eps: f32) {
        self.fill(kind, x, weight.len(), &|x, out| crate::rms_norm(x, weight, eps, out));
    }

    fn fill(&mut self, kind: ActivationKind, x: &[f32], width: usize, turn: &Turn<'_>) {
        let rows = x.len() / width;
        assert_eq!(x.len(), rows * width, "input rows of {width}");
        self.resize(kind, rows, width);
        let per_task = if x.len() < SMALL { rows.max(1) } else { ROWS_PER_TASK };
        let (bits, sums) = (Disjoint::new(&mut self.bits), Disjoint::new(&mut self.sums));
        let plain = Disjoint::new(&mut self.plain);
        let num_groups = self.num_groups;
        parallel_for(rows.div_ceil(per_task), |task, _| {
            for row in task * per_task..rows.min((task + 1) * per_task) {
                let x = &x[row * width..(row + 1) * width];
                if kind == ActivationKind::F32 {
                    // SAFETY: every row belongs to one task.
                    turn(x, unsafe { plain.slice(row * width, width) });
                    continue;
                }
                // SAFETY: as above.
                let (bits, sums) = unsafe {
                    let bits = bits.slice(row * num_groups * GROUP, num_groups * GROUP);
                    (bits, sums.slice(row * num_groups, num_groups))
                };
                let mut part = [0.0f32; MAX_STACK];
                if width <= MAX_STACK {
                    let part = &mut part[..width];
                    turn(x, part);
                    round_row(part, bits, sums);
                } else {
                    let mut part = vec![0.0; width];
                    turn(x, &mut part);
                    round_row(&part, bits, sums);
                }
            }
        });
    }

    pub(super) fn is(&self, kind: ActivationKind) -> bool {
        self.rounded == (kind == ActivationKind::Bf16)
    }
}

/// Widest row that is turned on the stack.
const MAX_STACK: usize = 4096;

/// To nearest, ties to even; NaN stays NaN.
#[inline(always)]
fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
    if x.is_nan() { bf16::NAN.to_bits() } else { rounded }
}

dispatch! {
    /// Rounds a group; returns its sum.
    pub(super) fn round_group / round_group_on(x: &[f32; GROUP], bits: &mut [u16]) -> f32 = round_group_body;
}

#[inline(always)]
fn round_group_body<const FMA: bool>(x: &[f32; GROUP], bits: &mut [u16]) -> f32 {
    let mut lanes = [0.0f32; 16];
    for (x, bits) in x.as_chunks::<16>().0.iter().zip(bits.as_chunks_mut::<16>().0) {
        for l in 0..16 {
            bits[l] = to_bf16(x[l]);
            lanes[l] += f32::from_bits(u32::from(bits[l]) << 16);
        }
    }
    crate::gemm::sum_lanes(&lanes)
}

dispatch! {
    fn round_row / round_row_on(x: &[f32], bits: &mut [u16], sums: &mut [f32]) = round_row_body;
}

#[inline(always)]
fn round_row_body<const FMA: bool>(x: &[f32], bits: &mut [u16], sums: &mut [f32]) {
    let (whole, rest) = x.as_chunks::<GROUP>();
    for ((x, bits), sum) in whole.iter().zip(bits.chunks_exact_mut(GROUP)).zip(&mut *sums) {
        *sum = round_group_body::<FMA>(x, bits);
    }
    if !rest.is_empty() {
        let mut last = [0.0; GROUP];
        last[..rest.len()].copy_from_slice(rest);
        let at = whole.len();
        sums[at] = round_group_body::<FMA>(&last, &mut bits[at * GROUP..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    #[test]
    fn rounds_like_half_and_sums_what_it_rounded() {
        let x: Vec<f32> = (0..71).map(|i| (i as f32 * 0.7).sin() * 10f32.powi(i % 9 - 4)).collect();
        for isa in Isa::available() {
            let (mut bits, mut sums) = (vec![1; 96], vec![1.0; 3]);
            round_row_on(isa, &x, &mut bits, &mut sums);
            for (i, bits) in bits.iter().enumerate() {
                let exact = bf16::from_f32(x.get(i).copied().unwrap_or(0.0));
                assert_eq!(*bits, exact.to_bits(), "{isa} {i}");
            }
            for (group, sum) in sums.iter().enumerate() {
                let exact: f32 =
                    bits[group * 32..][..32].iter().map(|b| bf16::from_bits(*b).to_f32()).sum();
                assert!((sum - exact).abs() < 1e-3, "{isa} {sum} {exact}");
            }
        }
        assert!(bf16::from_bits(to_bf16(f32::NAN)).is_nan());
        assert!(bf16::from_bits(to_bf16(-f32::NAN)).is_nan());
        assert_eq!(to_bf16(f32::INFINITY), bf16::INFINITY.to_bits());
    }
}
