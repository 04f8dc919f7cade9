//! Inputs as bytes.
//!
//! The 16 inputs of half a group share a *step*: what 1 is worth, so that the largest is ±127. Steps are
//! integers, multiples of a *unit* that the whole row shares, a power of two: so sums over a half can be put
//! together as integers as well, and only the sum of a group becomes f32. Groups are rounded one by one (a
//! gate's products come tile by tile), with steps of 15 bits in a unit of their own; [`settle_row`] brings them to
//! the row's when all are there. What inputs lose by that is less than 2⁻¹⁵ of the row's largest.

use super::packed::{GROUP, HALF};
use crate::isa::{Isa, dispatch_on};
use crate::simd::{LANES, Simd, Steps, compiled};
use crate::threads::Disjoint;

/// Inputs that share a step. Half a group: a step for all of it doubles what rounding costs (outliers
/// are few, and spoil fewer).
pub(super) const STEP_GROUP: usize = GROUP / 2;

/// Steps of a group of bytes.
pub(super) const STEPS: usize = GROUP / STEP_GROUP;

/// What belongs to a group of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub(super) struct GroupHeader {
    /// What a byte of each half is worth.
    pub(super) steps: Steps,
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
const MOST_STEP: f32 = 32767.0;

/// Where the largest input is not above it, the unit of a step could be no normal number: such inputs count as 0.
const SMALLEST: f32 = 1e-30;

/// f32 of an exponent.
fn power(exponent: i32) -> f32 {
    f32::from_bits((exponent as u32) << 23)
}

compiled! {
    /// Rounds groups to bytes. `bytes` and `headers` are where the first one's go; those of the next are `stride` groups on.
    pub(super) fn round_groups(x: &[[f32; GROUP]], to: (&Disjoint<'_, i8>, &Disjoint<'_, GroupHeader>), at: (usize, usize)) = round_body
        for [Avx512, Avx2, Sse2];
}

/// Rounds groups to bytes. Group `i` goes to place `first + i · stride`; places are counted in groups.
///
/// # Panics
/// If a place is not there.
// Lanes are indexed; iterators would hide that.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
fn round_body<S: Simd>(
    s: S,
    x: &[[f32; GROUP]],
    (bytes, headers): (&Disjoint<'_, i8>, &Disjoint<'_, GroupHeader>),
    (first, stride): (usize, usize),
) {
    if x.is_empty() {
        return;
    }
    let last = (x.len() - 1) * stride;
    let bytes = bytes.rows((first * GROUP, GROUP), (last + 1, GROUP));
    let headers = headers.rows((first, 1), (last + 1, 1));
    // What a group needs beside its vectors is found for so many at once, a lane each; vectors are folded four at a time, which are
    // the same half of as many groups.
    for (chunk, x) in x.chunks(LANES).enumerate() {
        let at = |i: usize| (chunk * LANES + i) * stride;
        // SAFETY: a group is two vectors; of groups beyond the last that one is read.
        let half = |i: usize, h: usize| unsafe {
            x.as_ptr().add(i.min(x.len() - 1)).cast::<f32>().add(HALF * h)
        };
        let mut largest = [[0u32; LANES]; STEPS];
        for (i, h) in (0..x.len()).step_by(4).flat_map(|i| (0..STEPS).map(move |h| (i, h))) {
            let mut four = [s.izero(); 4];
            for k in 0..4 {
                // SAFETY: see above.
                let x = unsafe { s.load(half(i + k, h)) };
                // As bits, so that a NaN is larger than anything.
                four[k] = s.and(s.bits(x), s.isplat(0x7fff_ffff));
            }
            largest[h][i..i + 4].copy_from_slice(&s.fold4_max_u(four));
        }
        let (mut wanted, mut most) = ([s.zero(); STEPS], [s.izero(); STEPS]);
        for h in 0..STEPS {
            // SAFETY: as many numbers as lanes.
            most[h] = unsafe { s.iload(largest[h].as_ptr().cast()) };
            let most = s.from_bits(most[h]);
            let finite = s.lt(most, s.splat(f32::INFINITY));
            let step = s.select(finite, s.mul(most, s.splat(BYTE)), s.zero());
            wanted[h] = s.select(s.lt(s.splat(SMALLEST), most), step, s.zero());
        }
        // Of the larger half of the group.
        let exponent = s.shr(s.bits(s.max(wanted[0], wanted[1])), 23);
        let exponent = s.isub(exponent, s.isplat(STEP_BITS));
        let unit = s.from_bits(s.shl(exponent, 23));
        let inverse_unit = s.from_bits(s.shl(s.isub(s.isplat(254), exponent), 23));
        let mut inverses = [[0.0f32; LANES]; STEPS];
        let mut steps = [s.izero(); STEPS];
        for h in 0..STEPS {
            let exact = s.mul(wanted[h], inverse_unit);
            let near = s.round(exact);
            // Up, unless it is whole.
            let up = s.select(s.lt(near, exact), s.add(near, s.splat(1.0)), near);
            let step = s.min(up, s.splat(MOST_STEP));
            let counts = s.lt(s.zero(), wanted[h]);
            let inverse = s.div(s.splat(1.0), s.mul(step, unit));
            steps[h] = s.to_int(s.select(counts, step, s.zero()));
            // SAFETY: as many numbers as lanes.
            unsafe { s.store(inverses[h].as_mut_ptr(), s.select(counts, inverse, s.zero())) };
        }
        let mut sums = [[0i32; LANES]; STEPS];
        for (i, h) in (0..x.len()).step_by(4).flat_map(|i| (0..STEPS).map(move |h| (i, h))) {
            let mut four = [s.izero(); 4];
            for k in 0..4 {
                let inverse = s.splat(inverses[h][i + k]);
                // SAFETY: see above, and the bytes of a group that is there.
                unsafe {
                    // What is no number becomes a byte of 0.
                    four[k] = s.to_int(s.mul(s.load(half(i + k, h)), inverse));
                    if i + k < x.len() {
                        s.store_low_bytes(bytes.add(at(i + k) * GROUP + HALF * h).cast(), four[k]);
                    }
                }
            }
            sums[h][i..i + 4].copy_from_slice(&s.fold4_add(four));
        }
        let below = s.and(exponent, s.sar(exponent, 31));
        let finite = s.lt(s.from_bits(s.imax_u(most[0], most[1])), s.splat(f32::INFINITY));
        let exponent = s.from_bits(s.isub(exponent, below));
        let last = s.select(finite, exponent, s.from_bits(s.isplat(NOT_FINITE)));
        let mut words = [[0i32; LANES]; 2 * STEPS + 1];
        // SAFETY: as many numbers as lanes.
        unsafe {
            for h in 0..STEPS {
                s.istore(words[h].as_mut_ptr().cast(), steps[h]);
                let minus = s.isub(s.izero(), s.iload(sums[h].as_ptr().cast()));
                let minus = s.select(s.lt(s.zero(), wanted[h]), s.from_bits(minus), s.zero());
                s.store(words[STEPS + h].as_mut_ptr().cast(), minus);
            }
            s.store(words[4].as_mut_ptr().cast(), last);
        }
        for i in 0..x.len() {
            let header = GroupHeader {
                steps: Steps::new([words[0][i], words[1][i]]),
                minus: [words[2][i], words[3][i]],
                last: words[4][i],
            };
            // SAFETY: the group's place.
            unsafe { headers.add(at(i)).write(header) };
        }
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
        let [first, last] = header.steps.each().map(|step| (step + half) >> shift);
        header.steps = Steps::new([first, last]);
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

    fn round_groups_to_bytes(
        isa: Isa,
        x: &[[f32; GROUP]],
        bytes: &mut [[i8; GROUP]],
        headers: &mut [GroupHeader],
    ) {
        let bytes = Disjoint::new(bytes.as_flattened_mut());
        round_groups(isa, x, (&bytes, &Disjoint::new(headers)), (0, 1));
    }

    #[test]
    fn groups_go_where_they_belong_however_many_there_are() {
        let x: Vec<[f32; GROUP]> = (0..37)
            .map(|g| std::array::from_fn(|i| ((g * 41 + i * 7) % 83) as f32 * 0.37 - 11.0))
            .collect();
        for isa in Isa::available() {
            for n in [1, 2, 15, 16, 17, 33, 37] {
                let (mut bytes, mut headers) =
                    (vec![99; 3 * n * GROUP], vec![GroupHeader::default(); 3 * n]);
                let places = (&Disjoint::new(&mut bytes), &Disjoint::new(&mut headers));
                round_groups(isa, &x[..n], places, (1, 3));
                for (i, x) in x[..n].iter().enumerate() {
                    let (mut own, mut header) = ([[0; GROUP]], [GroupHeader::default()]);
                    round_groups_to_bytes(isa, &[*x], &mut own, &mut header);
                    let at = 1 + 3 * i;
                    assert_eq!(bytes[at * GROUP..(at + 1) * GROUP], own[0], "{isa} {i} of {n}");
                    assert_eq!(headers[at], header[0], "{isa} {i} of {n}");
                    assert!(bytes[(at + 1) * GROUP..(at + 2) * GROUP].iter().all(|b| *b == 99));
                }
            }
        }
    }

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
                    let step = unit * headers[g].steps.each()[i / STEP_GROUP] as f32;
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
                let step = unit * headers[i / GROUP].steps.each()[i % GROUP / STEP_GROUP] as f32;
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
