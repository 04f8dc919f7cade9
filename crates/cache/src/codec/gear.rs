//! HOT PATH (decode). GEAR (arXiv 2403.05527): what quantisation loses is put back by a few exact entries and by a matrix of
//! low rank.
//!
//! `X ≈ Q_B(X \ S) + A Bᵀ + S`, of one head's block: `S` are the entries that stray furthest from the mean of their vector
//! (keys: a channel, values: a token), half of them above it and half below, exact in f16; they count as that
//! mean while the rest is quantised as [KIVI](super::KiviKeys) does; `A`, `B` are the best factors of what is left, by power iteration.
//!
//! Differences from the released code: blocks of the cache are the paper's buffer of n_b tokens, in prompts too, so
//! factors belong to a block and not to a whole prompt; `S` is a share of the block's entries, with two bytes for
//! the place of each; every width has all its 2^B levels (the released outlier variant has B² of them).

use std::cell::RefCell;

use bytemuck::cast_slice;
use half::f16;
use kvasir_kernels::{ScaleAxis, expand_codes, f16_to_f32, f32_to_f16, gemm_nn_acc};

use super::{Codec, Part};
use crate::error::{CacheError, Result};

/// Elements of a group that share scale and zero.
const GROUP: usize = 32;

/// Power iterations.
const LOOPS: usize = 3;

/// Bits, rank and exact entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Gear {
    bits: u8,
    rank: u8,
    /// Exact entries, in thousandths of all.
    outliers: u16,
}

impl Gear {
    /// As recipes take it.
    pub const USAGE: &str = "gear[:BITS][:rank=2][:outliers=20]";
    /// Four bits with the authors' other settings.
    pub const FOUR: Self = Self { bits: 4, rank: 2, outliers: 20 };
    /// Two bits, as the authors use it most.
    pub const TWO: Self = Self { bits: 2, rank: 2, outliers: 20 };

    /// Reads a stage of a recipe after its name.
    ///
    /// # Errors
    /// [`CacheError::Option`].
    pub(crate) fn parse(mut options: crate::select::Options<'_>) -> Result<Self> {
        let whole = |bits: f32| (1.0..=8.0).contains(&bits) && bits.fract() == 0.0;
        let bits = match options.has_number() {
            true => options.number("bits from 1 to 8", whole)?,
            false => f32::from(Self::TWO.bits),
        };
        let rank = options.whole("rank", 2, 0..=64)? as u8;
        let outliers = options.whole("outliers", 20, 0..=1000)?;
        options.done(Self::USAGE)?;
        Ok(Self { bits: bits as u8, rank, outliers })
    }

    /// Whether heads of `dim` channels have room for the factors.
    pub(crate) fn check(self, layer: usize, dim: usize) -> Result<()> {
        if usize::from(self.rank) <= dim {
            return Ok(());
        }
        let what = format!("gear's rank {} is above the head's {dim} channels", self.rank);
        Err(CacheError::Geometry { layer, what })
    }

    fn levels(self) -> f32 {
        ((1u32 << self.bits) - 1) as f32
    }

    fn num_outliers(self, entries: usize) -> usize {
        (entries * usize::from(self.outliers)).div_ceil(1000)
    }

    fn code_bytes(self, entries: usize) -> usize {
        (entries * usize::from(self.bits)).div_ceil(8)
    }

    fn rank(self, tokens: usize, dim: usize) -> usize {
        usize::from(self.rank).min(tokens).min(dim)
    }
}

impl std::fmt::Display for Gear {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "gear:{}", self.bits)?;
        if self.rank != Self::TWO.rank {
            write!(f, ":rank={}", self.rank)?;
        }
        if self.outliers == Self::TWO.outliers {
            Ok(())
        } else {
            write!(f, ":outliers={}", self.outliers)
        }
    }
}

/// Keys or values by [`Gear`]. Slot: scales and zeros `[vectors · groups]` each, `A` `[tokens, rank]`, `B` `[dim, rank]`, exact
/// entries (all f16), their places (u16), codes.
#[derive(Debug)]
pub struct GearCodec {
    gear: Gear,
    part: Part,
}

/// Where the parts of a slot begin.
struct Layout {
    pairs: usize,
    rank: usize,
    outliers: usize,
    zeros: usize,
    a: usize,
    b: usize,
    exact: usize,
    places: usize,
    codes: usize,
    end: usize,
}

impl GearCodec {
    /// For one part.
    pub(crate) fn new(gear: Gear, part: Part) -> Self {
        Self { gear, part }
    }

    fn layout(&self, tokens: usize, dim: usize) -> Layout {
        let pairs = match self.part {
            Part::Keys => dim * tokens.div_ceil(GROUP),
            Part::Values => tokens * dim.div_ceil(GROUP),
        };
        let rank = self.gear.rank(tokens, dim);
        let outliers = self.gear.num_outliers(tokens * dim);
        let zeros = 2 * pairs;
        let a = zeros + 2 * pairs;
        let b = a + 2 * tokens * rank;
        let exact = b + 2 * dim * rank;
        let places = exact + 2 * outliers;
        let codes = places + 2 * outliers;
        let end = codes + self.gear.code_bytes(tokens * dim);
        Layout { pairs, rank, outliers, zeros, a, b, exact, places, codes, end }
    }

    /// The group of an entry.
    #[inline]
    fn group(&self, token: usize, channel: usize, dim: usize) -> usize {
        match self.part {
            Part::Keys => token / GROUP * dim + channel,
            Part::Values => token * dim.div_ceil(GROUP) + channel / GROUP,
        }
    }

    /// The quantised part of the first rows, `[n, dim]`.
    fn expand(&self, slot: &[u8], l: &Layout, dim: usize, out: &mut [f16]) {
        let bits = usize::from(self.gear.bits);
        let (scales, zeros, codes) = (&slot[..l.zeros], &slot[l.zeros..l.a], &slot[l.codes..l.end]);
        let rows = GROUP * dim;
        let whole = (dim * bits).is_multiple_of(8);
        match (bits, self.part) {
            (2 | 4, Part::Keys) if whole => {
                let pairs = scales.chunks_exact(2 * dim).zip(zeros.chunks_exact(2 * dim));
                let codes = codes.chunks(rows * bits / 8);
                for ((out, codes), (scales, zeros)) in out.chunks_mut(rows).zip(codes).zip(pairs) {
                    match bits {
                        2 => expand_codes::<2>(codes, scales, zeros, ScaleAxis::Channel, dim, out),
                        _ => expand_codes::<4>(codes, scales, zeros, ScaleAxis::Channel, dim, out),
                    }
                }
            }
            (2, Part::Values) if whole => {
                expand_codes::<2>(codes, scales, zeros, ScaleAxis::Token, dim, out);
            }
            (4, Part::Values) if whole => {
                expand_codes::<4>(codes, scales, zeros, ScaleAxis::Token, dim, out);
            }
            _ => {
                let mask = (1u16 << bits) - 1;
                for (i, x) in out.iter_mut().enumerate() {
                    let next = codes.get(i * bits / 8 + 1).copied().unwrap_or(0);
                    let word = u16::from_le_bytes([codes[i * bits / 8], next]);
                    let group = self.group(i / dim, i % dim, dim);
                    let code = f32::from((word >> (i * bits % 8)) & mask);
                    *x = f16::from_f32(code * half(scales, group) + half(zeros, group));
                }
            }
        }
    }

    /// Means of the vectors that outliers are looked for in: channels of keys, tokens of values.
    fn means(&self, rows: &[f32], dim: usize) -> Vec<f32> {
        let finite = |x: &f32| if x.is_finite() { *x } else { 0.0 };
        match self.part {
            Part::Keys => (0..dim)
                .map(|c| {
                    let column = rows[c..].iter().step_by(dim);
                    column.map(finite).sum::<f32>() / (rows.len() / dim) as f32
                })
                .collect(),
            Part::Values => rows
                .chunks_exact(dim)
                .map(|r| r.iter().map(finite).sum::<f32>() / dim as f32)
                .collect(),
        }
    }

    /// Places of the exact entries, ascending.
    fn outliers(&self, rows: &[f32], dim: usize, means: &[f32], count: usize) -> Vec<u16> {
        let stray = |i: usize| {
            let mean = match self.part {
                Part::Keys => means[i % dim],
                Part::Values => means[i / dim],
            };
            let stray = rows[i] - mean;
            if stray.is_nan() { f32::INFINITY } else { stray }
        };
        let strays: Vec<f32> = (0..rows.len()).map(stray).collect();
        let mut order: Vec<u16> = (0..rows.len()).map(|i| i as u16).collect();
        let by = |a: &u16, b: &u16| strays[usize::from(*a)].total_cmp(&strays[usize::from(*b)]);
        let (low, high) = (count / 2, count - count / 2);
        if count < order.len() && count > 0 {
            if low > 0 {
                order.select_nth_unstable_by(low - 1, by);
            }
            order[low..].select_nth_unstable_by(high - 1, |a, b| by(b, a));
            order.truncate(count);
        }
        order.truncate(count);
        order.sort_unstable();
        order
    }
}

/// One thread's buffers.
#[derive(Debug, Default)]
struct Scratch {
    halves: Vec<f16>,
    rows: Vec<f32>,
    a: Vec<f32>,
    b: Vec<f32>,
    transposed: Vec<f32>,
    exact: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// The first `n` numbers in f16 of some bytes, as f32. Slots are aligned, and everything in them has whole halves
/// before it.
fn widen(bytes: &[u8], n: usize, out: &mut Vec<f32>) {
    out.resize(n, 0.0);
    f16_to_f32(cast_slice(&bytes[..2 * n]), out);
}

fn half(bytes: &[u8], i: usize) -> f32 {
    f16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]).to_f32()
}

fn put(bytes: &mut [u8], i: usize, value: f32) {
    let most = f16::MAX.to_f32();
    let value = if value.is_nan() { 0.0 } else { value.clamp(-most, most) };
    bytes[2 * i..2 * i + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
}

/// `rank` columns `a: [tokens, rank]`, `b: [dim, rank]` with `a bᵀ` near the best of that rank for `e: [tokens, dim]`.
fn factors(e: &[f32], dim: usize, rank: usize, loops: usize) -> (Vec<f32>, Vec<f32>) {
    let tokens = e.len() / dim;
    let mut b: Vec<f32> = (0..dim * rank)
        .map(|i| ((i.wrapping_mul(0x9E37_79B1) >> 7) % 1024) as f32 / 512.0 - 1.0)
        .collect();
    let mut a = vec![0.0; tokens * rank];
    for _ in 0..loops {
        for (row, a) in e.chunks_exact(dim).zip(a.chunks_exact_mut(rank.max(1))) {
            for (r, a) in a.iter_mut().enumerate() {
                *a = row.iter().zip(b[r..].iter().step_by(rank)).map(|(e, b)| e * b).sum();
            }
        }
        orthonormalise(&mut a, rank);
        b.fill(0.0);
        for (row, a) in e.chunks_exact(dim).zip(a.chunks_exact(rank.max(1))) {
            for (e, b) in row.iter().zip(b.chunks_exact_mut(rank.max(1))) {
                b.iter_mut().zip(a).for_each(|(b, a)| *b += e * a);
            }
        }
    }
    (a, b)
}

/// Gram-Schmidt over columns of `x: [n, rank]`, twice for what rounding leaves; a column that vanishes becomes zero.
fn orthonormalise(x: &mut [f32], rank: usize) {
    for r in 0..rank {
        for _ in 0..2 {
            for before in 0..r {
                let dot: f32 = x.chunks_exact(rank).map(|row| row[r] * row[before]).sum();
                x.chunks_exact_mut(rank).for_each(|row| row[r] -= dot * row[before]);
            }
        }
        let length = x.chunks_exact(rank).map(|row| row[r] * row[r]).sum::<f32>().sqrt();
        let scale = if length > 1e-12 { 1.0 / length } else { 0.0 };
        x.chunks_exact_mut(rank).for_each(|row| row[r] *= scale);
    }
}

impl Codec for GearCodec {
    fn name(&self) -> &'static str {
        if self.part == Part::Keys { "gear keys" } else { "gear values" }
    }

    fn slot_bytes(&self, tokens: usize, dim: usize) -> usize {
        self.layout(tokens, dim).end
    }

    fn encode(&self, rows: &[f32], dim: usize, slot: &mut [u8]) {
        let tokens = rows.len() / dim;
        let l = self.layout(tokens, dim);
        slot[..l.end].fill(0);
        let means = self.means(rows, dim);
        let outliers = self.outliers(rows, dim, &means, l.outliers);
        let mut plain: Vec<f32> = rows.to_vec();
        for (n, place) in outliers.iter().enumerate() {
            let i = usize::from(*place);
            put(&mut slot[l.exact..], n, rows[i]);
            slot[l.places + 2 * n..][..2].copy_from_slice(&place.to_le_bytes());
            plain[i] = means[if self.part == Part::Keys { i % dim } else { i / dim }];
        }
        // Numbers that are none do not count, and become a group's least.
        let mut ranges = vec![(f32::MAX, f32::MIN); l.pairs];
        for (i, x) in plain.iter().enumerate().filter(|(_, x)| x.is_finite()) {
            let range = &mut ranges[self.group(i / dim, i % dim, dim)];
            *range = (range.0.min(*x), range.1.max(*x));
        }
        for (group, (low, high)) in ranges.into_iter().enumerate() {
            let (low, high) = if low <= high { (low, high) } else { (0.0, 0.0) };
            put(&mut slot[..l.zeros], group, (high - low) / self.gear.levels());
            put(&mut slot[l.zeros..], group, low);
        }
        let bits = usize::from(self.gear.bits);
        let mut left = vec![0.0; rows.len()];
        for (i, x) in plain.iter().enumerate() {
            let group = self.group(i / dim, i % dim, dim);
            let (s, z) = (half(slot, group), half(&slot[l.zeros..], group));
            let code =
                if s > 0.0 { ((x - z) / s).round().clamp(0.0, self.gear.levels()) } else { 0.0 };
            // `as` turns NaN into 0.
            let word = u16::from(code as u8) << (i * bits % 8);
            let at = l.codes + i * bits / 8;
            slot[at] |= word as u8;
            if word > 0xFF {
                slot[at + 1] |= (word >> 8) as u8;
            }
            let e = x - (f32::from(code as u8) * s + z);
            left[i] = if e.is_finite() { e } else { 0.0 };
        }
        let (a, b) = factors(&left, dim, l.rank, LOOPS);
        a.iter().enumerate().for_each(|(i, x)| put(&mut slot[l.a..], i, *x));
        b.iter().enumerate().for_each(|(i, x)| put(&mut slot[l.b..], i, *x));
    }

    fn decode(&self, slot: &[u8], tokens: usize, dim: usize, out: &mut [f32]) {
        let l = self.layout(tokens, dim);
        SCRATCH.with_borrow_mut(|scratch| {
            let Scratch { halves, a, b, transposed, exact, .. } = scratch;
            halves.resize(out.len(), f16::ZERO);
            self.expand(slot, &l, dim, halves);
            f16_to_f32(halves, out);
            let rows = out.len() / dim;
            widen(&slot[l.a..], rows * l.rank, a);
            widen(&slot[l.b..], dim * l.rank, b);
            widen(&slot[l.exact..], l.outliers, exact);
            transposed.resize(dim * l.rank, 0.0);
            for (c, row) in b.chunks_exact(l.rank.max(1)).enumerate() {
                row.iter().enumerate().for_each(|(r, x)| transposed[r * dim + c] = *x);
            }
            if l.rank > 0 {
                gemm_nn_acc((rows, dim, l.rank), a, l.rank, transposed, dim, out, dim);
            }
            let places = slot[l.places..l.codes].chunks_exact(2);
            for (place, exact) in places.zip(exact) {
                // Rows that are not asked for have places beyond the end.
                if let Some(x) = out.get_mut(usize::from(u16::from_le_bytes([place[0], place[1]])))
                {
                    *x = *exact;
                }
            }
        });
    }

    fn decode_halves(&self, slot: &[u8], tokens: usize, dim: usize, out: &mut [f16]) -> bool {
        let mut rows = SCRATCH.with_borrow_mut(|scratch| std::mem::take(&mut scratch.rows));
        rows.resize(out.len(), 0.0);
        self.decode(slot, tokens, dim, &mut rows);
        f32_to_f16(&rows, out);
        SCRATCH.with_borrow_mut(|scratch| scratch.rows = rows);
        true
    }

    /// Of Gaussian groups of 32, whose range is 4.14 σ wide on average, less what outliers and factors take.
    fn expected_error(&self) -> f32 {
        let step = 4.14 / self.gear.levels();
        step * step / 12.0 * 1.05 + 1e-6
    }
}

#[cfg(test)]
mod tests {
    use super::super::conformance::{self, gaussian};
    use super::*;

    fn error(gear: Gear, part: Part, rows: &[f32], dim: usize) -> f32 {
        let codec = GearCodec::new(gear, part);
        let tokens = rows.len() / dim;
        let mut slot = vec![0xA5; codec.slot_bytes(tokens, dim)];
        codec.encode(rows, dim, &mut slot);
        let mut out = vec![f32::NAN; rows.len()];
        codec.decode(&slot, tokens, dim, &mut out);
        rows.iter().zip(&out).map(|(a, b)| (a - b).powi(2)).sum::<f32>()
            / rows.iter().map(|a| a * a).sum::<f32>()
    }

    #[test]
    fn all_conform_at_every_width() {
        for bits in 1..=8 {
            for part in [Part::Keys, Part::Values] {
                conformance::check(&GearCodec::new(Gear { bits, ..Gear::TWO }, part));
            }
        }
    }

    #[test]
    fn whole_rank_or_all_exact_lose_nothing() {
        let rows = gaussian(32 * 64, 3);
        for part in [Part::Keys, Part::Values] {
            assert!(error(Gear { bits: 2, rank: 32, outliers: 0 }, part, &rows, 64) < 1e-6);
            assert!(error(Gear { bits: 1, rank: 0, outliers: 1000 }, part, &rows, 64) < 1e-6);
        }
    }

    #[test]
    fn without_either_it_is_kivi() {
        let rows = gaussian(32 * 64, 4);
        let kivi: [&dyn Codec; 2] = [&super::super::KiviKeys::<4>, &super::super::KiviValues::<4>];
        for (part, kivi) in [Part::Keys, Part::Values].into_iter().zip(kivi) {
            let gear = GearCodec::new(Gear { bits: 4, rank: 0, outliers: 0 }, part);
            let decoded = |codec: &dyn Codec| {
                let mut slot = vec![0; codec.slot_bytes(32, 64)];
                codec.encode(&rows, 64, &mut slot);
                let mut out = vec![0.0; rows.len()];
                codec.decode(&slot, 32, 64, &mut out);
                out
            };
            // Codes between two levels may fall to either side.
            let far = decoded(&gear)
                .iter()
                .zip(decoded(kivi))
                .filter(|(a, b)| (*a - b).abs() > 1e-3)
                .count();
            assert!(far < 4, "{part:?}: {far} differ");
            assert_eq!(gear.slot_bytes(32, 64), kivi.slot_bytes(32, 64));
        }
    }

    #[test]
    fn error_falls_with_rank_towards_the_best_of_that_rank() {
        let rows = gaussian(32 * 64, 5);
        for part in [Part::Keys, Part::Values] {
            let errors: Vec<f32> = [0, 1, 2, 4, 8, 16]
                .map(|rank| error(Gear { bits: 2, rank, outliers: 0 }, part, &rows, 64))
                .into();
            assert!(errors.windows(2).all(|w| w[1] < w[0]), "{part:?} {errors:?}");
        }
        // Against singular values of what is to be approximated.
        let matrix = nalgebra::DMatrix::from_row_slice(32, 64, &rows);
        let values = matrix.svd(false, false).singular_values;
        // A matrix of noise has no gap between them, which is the hardest case.
        for (rank, loops, most) in [(1, 3, 1.1), (4, 3, 1.1), (1, 100, 1.001), (4, 100, 1.001)] {
            let (a, b) = factors(&rows, 64, rank, loops);
            let product = |t: usize, c: usize| -> f32 {
                (0..rank).map(|r| a[t * rank + r] * b[c * rank + r]).sum()
            };
            let left: f32 =
                rows.iter().enumerate().map(|(i, x)| (x - product(i / 64, i % 64)).powi(2)).sum();
            let best: f32 = values.iter().skip(rank).map(|s| s * s).sum();
            assert!(left >= best * 0.999 && left < best * most, "{rank}, {loops}: {left} {best}");
        }
    }

    #[test]
    fn outliers_are_exact() {
        let mut rows = gaussian(32 * 64, 6);
        (rows[100], rows[700]) = (50.0, -70.0);
        let gear = Gear { bits: 2, rank: 0, outliers: 20 };
        let plain = error(Gear { outliers: 0, ..gear }, Part::Keys, &rows, 64);
        assert!(error(gear, Part::Keys, &rows, 64) < plain / 2.0);
    }
}
