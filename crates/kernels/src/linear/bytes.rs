//! Inputs as bytes.
//!
//! The 16 inputs of half a group share a *step*: what 1 is worth, so that the largest is ±127. Steps are
//! integers, multiples of a *unit* that the whole row shares, a power of two: so sums over a half can be put
//! together as integers as well, and only the sum of a group becomes f32. Groups are rounded one by one (a
//! gate's products come tile by tile), with steps of 15 bits in a unit of their own; [`settle_row`] brings them to
//! the row's when all are there. What inputs lose by that is less than 2⁻¹⁵ of the row's largest.


use super::packed::{GROUP, HALF};
use crate::isa::{Isa, dispatch_on};
use crate::simd::{Simd, compiled};

/// Inputs that share a step. Half a group: a step for all of it doubles what rounding costs (outliers
/// are few, and spoil fewer).
pub(super) const STEP_GROUP: usize = GROUP / 2;

/// Steps of a group of bytes.
pub(super) const STEPS: usize = GROUP / STEP_GROUP;

/// What belongs to a group of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C, align(16))]
pub(super) struct GroupHeader {
    /// What a byte of each half is worth.
    pub(super) steps: [i16; STEPS],
    /// Sums of the bytes with the sign changed: what products with codes counted from the lowest start from.
    pub(super) minus: [i32; STEPS],
    /// Until the row is settled the exponent (as f32 has it) of what the steps are multiples of: 0 where all inputs
    /// are, [`NOT_FINITE`] where one is not a number. Then Σ steps · minus.
    pub(super) last: i32,
}

/// See [`GroupHeader::last`].
pub(super) const NOT_FINITE: i32 = 255;

/// A byte's part of the largest.
const BYTE: f32 = 1.0 / 127.0;

/// The larger step of a group lies from 2¹⁴ to [`MOST_STEP`].
const STEP_BITS: i32 = 14;

/// A step that is one more by rounding makes the largest a byte of 127.004, which is 127.
const MOST_STEP: i32 = 32767;

/// Where the largest input is not above it, the unit of a step could be no normal number: such inputs count as 0.
const SMALLEST: f32 = 1e-30;

/// f32 of an exponent.
fn power(exponent: i32) -> f32 {
    f32::from_bits((exponent as u32) << 23)
}

/// Rounds groups to bytes.
#[inline(always)]
pub(super) fn round_groups_to_bytes(
    isa: Isa,
    x: &[[f32; GROUP]],
    bytes: &mut [[i8; GROUP]],
    headers: &mut [GroupHeader],
) {
    let (x, rest) = x.as_chunks::<2>();
    let (bytes, bytes_left) = bytes.split_at_mut(2 * x.len());
    let (headers, headers_left) = headers.split_at_mut(2 * x.len());
    let pairs = bytes.as_chunks_mut::<2>().0.iter_mut().zip(headers.as_chunks_mut::<2>().0);
    for (x, (bytes, headers)) in x.iter().zip(pairs) {
        round_two(isa, x.each_ref(), bytes.each_mut(), headers.each_mut());
    }
    if let ([x], Some(bytes), Some(header)) =
        (rest, bytes_left.first_mut(), headers_left.first_mut())
    {
        let (mut unused, mut none) = ([0; GROUP], GroupHeader::default());
        round_two(isa, [x, &[0.0; GROUP]], [bytes, &mut unused], [header, &mut none]);
    }
}

compiled! {
    /// Rounds two groups to bytes.
    pub(super) fn round_two(x: [&[f32; GROUP]; 2], bytes: [&mut [i8; GROUP]; 2], headers: [&mut GroupHeader; 2]) = round_body
        for [Avx512, Avx2, Sse2];
}

// Lanes are indexed; iterators would hide that.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
fn round_body<S: Simd>(
    s: S,
    x: [&[f32; GROUP]; 2],
    bytes: [&mut [i8; GROUP]; 2],
    headers: [&mut GroupHeader; 2],
) {
    /// Halves of both groups: what is folded over lanes is for all four at once.
    const HALVES: usize = 2 * STEPS;
    let mut halves = [s.zero(); HALVES];
    let mut magnitudes = [s.izero(); HALVES];
    for i in 0..HALVES {
        // SAFETY: a group is two vectors.
        halves[i] = unsafe { s.load(x[i / STEPS].as_ptr().add(HALF * (i % STEPS))) };
        magnitudes[i] = s.and(s.bits(halves[i]), s.isplat(0x7fff_ffff));
    }
    // As integers, so that a NaN is larger than anything.
    let largest = s.fold4_max_u(magnitudes);
    let mut wanted = [0.0f32; HALVES];
    for i in 0..HALVES {
        let largest = f32::from_bits(largest[i]);
        let counts = largest <= f32::MAX && largest > SMALLEST;
        wanted[i] = if counts { largest * BYTE } else { 0.0 };
    }
    let (mut steps, mut inverses, mut exponents) = ([0i32; HALVES], [0.0f32; HALVES], [0i32; HALVES]);
    for i in 0..HALVES {
        // Of the larger half of the group.
        let other = wanted[i ^ 1];
        let most = if wanted[i] > other { wanted[i] } else { other };
        let exponent = (most.to_bits() >> 23) as i32 - STEP_BITS;
        let exact = wanted[i] * power(254 - exponent);
        // Up, unless it is whole.
        let down = exact as i32;
        let up = down + i32::from(exact > down as f32);
        let step = if up > MOST_STEP { MOST_STEP } else { up };
        let counts = wanted[i] > 0.0;
        steps[i] = if counts { step } else { 0 };
        inverses[i] = if counts { 1.0 / (step as f32 * power(exponent)) } else { 0.0 };
        exponents[i] = if exponent > 0 { exponent } else { 0 };
    }
    let mut rounded = [s.izero(); HALVES];
    let [first, last] = bytes;
    let places = [first.as_mut_ptr(), last.as_mut_ptr()];
    for i in 0..HALVES {
        // What is no number becomes a byte of 0.
        rounded[i] = s.to_int(s.mul(halves[i], s.splat(inverses[i])));
        // SAFETY: half of a group's bytes.
        unsafe { s.store_low_bytes(places[i / STEPS].add(HALF * (i % STEPS)).cast(), rounded[i]) };
    }
    let sums = s.fold4_add(rounded);
    for (g, header) in headers.into_iter().enumerate() {
        let at = g * STEPS;
        let minus = |i: usize| if steps[at + i] > 0 { -sums[at + i] } else { 0 };
        let finite = |i: usize| f32::from_bits(largest[at + i]) <= f32::MAX;
        *header = GroupHeader {
            steps: [steps[at] as i16, steps[at + 1] as i16],
            minus: [minus(0), minus(1)],
            last: if finite(0) && finite(1) { exponents[at] } else { NOT_FINITE },
        };
    }
}

/// Brings the steps of a row to one unit, which it returns (NaN if an input was not finite), and fills in the sums of
/// groups in that unit, as bf16; `sums` beyond the last group become 0.
pub(super) fn settle_row(isa: Isa, headers: &mut [GroupHeader], sums: &mut [u16]) -> f32 {
    let (own, rest) = sums.split_at_mut(headers.len());
    rest.fill(0);
    let exponent = settle_on(isa, headers, own);
    if exponent < NOT_FINITE { power(exponent) } else { f32::NAN }
}

dispatch_on! {
    /// [`settle_row`], with the exponent of the unit.
    fn settle_on(headers: &mut [GroupHeader], sums: &mut [u16]) -> i32 = settle;
}

#[inline(always)]
fn settle<const FMA: bool>(headers: &mut [GroupHeader], sums: &mut [u16]) -> i32 {
    let exponent = headers.iter().fold(0, |most, header| most.max(header.last));
    for (header, sum) in headers.iter_mut().zip(sums) {
        let shift = (exponent - header.last).min(16);
        let half = (1 << shift) >> 1;
        let [first, last] = header.steps.map(|step| (i32::from(step) + half) >> shift);
        header.steps = [first as i16, last as i16];
        header.last = first * header.minus[0] + last * header.minus[1];
        // To bf16, ties to even; a sum is never NaN.
        let bits = (-header.last as f32).to_bits();
        *sum = ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16;
    }
    exponent
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
    fn bytes_are_within_half_a_step_and_the_largest_is_whole() {
        let mut x = numbers();
        x[2].fill(1e-38);
        let mut all = Vec::new();
        for path in Isa::available() {
            let (mut bytes, mut headers) = ([[1; GROUP]; 3], [GroupHeader::default(); 3]);
            round_groups_to_bytes(path, &x, &mut bytes, &mut headers);
            let mut sums = [1; 4];
            let unit = settle_row(path, &mut headers, &mut sums);
            let largest = x.as_flattened().iter().fold(0.0f32, |most, x| most.max(x.abs()));
            for (g, (x, bytes)) in x.iter().zip(&bytes).enumerate() {
                let mut sum = 0.0;
                for (i, (x, byte)) in x.iter().zip(bytes).enumerate() {
                    let step = unit * f32::from(headers[g].steps[i / STEP_GROUP]);
                    let bound = 0.5001 * step + largest * 2f32.powi(-15);
                    assert!((x - step * f32::from(*byte)).abs() <= bound, "{path:?} {x}");
                    sum += step * f32::from(*byte);
                }
                let rounded = bf16::from_bits(sums[g]).to_f32() * unit;
                assert!((rounded - sum).abs() <= sum.abs() / 256.0, "{path:?}");
                for (part, minus) in bytes.as_chunks::<STEP_GROUP>().0.iter().zip(headers[g].minus)
                {
                    assert_eq!(part.iter().map(|b| i32::from(*b)).sum::<i32>(), -minus);
                }
            }
            for part in bytes[0].as_chunks::<STEP_GROUP>().0 {
                let most = part.iter().map(|b| b.unsigned_abs()).max();
                assert!(most == Some(127) || most == Some(126), "{path:?} {most:?}");
            }
            assert_eq!((bytes[2], sums[2..].to_vec()), ([0; GROUP], vec![0, 0]));
            all.push((bytes, headers, sums, unit));
        }
        all.windows(2).for_each(|pair| assert_eq!(pair[0], pair[1]));
    }

    #[test]
    fn halves_keep_their_precision_beside_much_larger_ones() {
        for path in Isa::available() {
            let mut x = [[0.0; GROUP]; 2];
            for (i, x) in x.as_flattened_mut().iter_mut().enumerate() {
                *x = (i as f32 * 0.9).cos() * [300.0, 1.0, 40.0, 0.6][i / STEP_GROUP];
            }
            let (mut bytes, mut headers) = ([[1; GROUP]; 2], [GroupHeader::default(); 2]);
            round_groups_to_bytes(path, &x, &mut bytes, &mut headers);
            let unit = settle_row(path, &mut headers, &mut [0; 2]);
            for (i, (x, byte)) in x.as_flattened().iter().zip(bytes.as_flattened()).enumerate() {
                let step = unit * f32::from(headers[i / GROUP].steps[i % GROUP / STEP_GROUP]);
                let largest = [300.0, 1.0, 40.0, 0.6][i / STEP_GROUP];
                let bound = largest / 254.0 + 300.0 * 2f32.powi(-15);
                assert!((x - step * f32::from(*byte)).abs() <= bound, "{path:?} {x}");
            }
        }
    }

    #[test]
    fn a_row_that_is_not_finite_stays_so() {
        for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for path in Isa::available() {
                let mut x = [[1.0; GROUP]];
                x[0][9] = odd;
                let (mut bytes, mut headers) = ([[1; GROUP]], [GroupHeader::default()]);
                round_groups_to_bytes(path, &x, &mut bytes, &mut headers);
                assert_eq!(headers[0].last, NOT_FINITE, "{path:?} {odd}");
                assert_eq!((headers[0].minus[0], bytes[0][..16].to_vec()), (0, vec![0; 16]));
                assert!(settle_row(path, &mut headers, &mut [0; 2]).is_nan(), "{path:?} {odd}");
            }
        }
    }

    #[test]
    fn a_row_of_zeros_has_a_unit_of_zero() {
        for path in Isa::available() {
            let (mut bytes, mut headers) = ([[1; GROUP]], [GroupHeader::default()]);
            round_groups_to_bytes(path, &[[0.0; GROUP]], &mut bytes, &mut headers);
            assert_eq!((bytes, headers), ([[0; GROUP]], [GroupHeader::default()]), "{path}");
            assert_eq!(settle_row(path, &mut headers, &mut [0; 2]), 0.0);
        }
    }
}
