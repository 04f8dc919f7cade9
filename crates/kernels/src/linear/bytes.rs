//! Inputs as bytes.
//!
//! The 16 inputs of half a group share a *step*: what 1 is worth, so that the largest is ±127. Steps are
//! integers, multiples of a *unit* that the whole row shares, a power of two: so sums over a half can be put
//! together as integers as well, and only the sum of a group becomes f32. Groups are rounded one by one (a
//! gate's products come tile by tile), with steps of 15 bits in a unit of their own; [`settle_row`] brings them to
//! the row's when all are there. What inputs lose by that is less than 2⁻¹⁵ of the row's largest.

use half::bf16;

use super::packed::GROUP;
use super::product::Path;

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
    /// Exponent (as f32 has it) of what the steps are multiples of, until the row is settled; 0 where all inputs
    /// are, [`NOT_FINITE`] where one is not a number.
    pub(super) exponent: i32,
}

/// See [`GroupHeader::exponent`].
pub(super) const NOT_FINITE: i32 = 255;

/// A byte's part of the largest.
pub(super) const BYTE: f32 = 1.0 / 127.0;

/// The larger step of a group lies from 2¹⁴ to [`MOST_STEP`].
pub(super) const STEP_BITS: i32 = 14;

/// A step that is one more by rounding makes the largest a byte of 127.004, which is 127.
pub(super) const MOST_STEP: f32 = 32767.0;

/// Where the largest input is not above it, the unit of a step could be no normal number: such inputs count as 0.
pub(super) const SMALLEST: f32 = 1e-30;

/// f32 of an exponent.
fn power(exponent: i32) -> f32 {
    f32::from_bits((exponent as u32) << 23)
}

/// Rounds groups to bytes.
#[inline(always)]
pub(super) fn round_groups_to_bytes(
    path: Path,
    x: &[[f32; GROUP]],
    bytes: &mut [[i8; GROUP]],
    headers: &mut [GroupHeader],
) {
    let (x, rest) = x.as_chunks::<2>();
    let (bytes, bytes_left) = bytes.split_at_mut(2 * x.len());
    let (headers, headers_left) = headers.split_at_mut(2 * x.len());
    let pairs = bytes.as_chunks_mut::<2>().0.iter_mut().zip(headers.as_chunks_mut::<2>().0);
    for (x, (bytes, headers)) in x.iter().zip(pairs) {
        round_two(path, x.each_ref(), bytes.each_mut(), headers.each_mut());
    }
    if let ([x], Some(bytes), Some(header)) =
        (rest, bytes_left.first_mut(), headers_left.first_mut())
    {
        let (mut unused, mut none) = ([0; GROUP], GroupHeader::default());
        round_two(path, [x, &[0.0; GROUP]], [bytes, &mut unused], [header, &mut none]);
    }
}

/// Rounds two groups to bytes.
#[inline(always)]
pub(super) fn round_two(
    path: Path,
    x: [&[f32; GROUP]; 2],
    bytes: [&mut [i8; GROUP]; 2],
    headers: [&mut GroupHeader; 2],
) {
    match path {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the path says that the processor can.
        Path::Vnni => unsafe { super::x86::rounding::round_two(x, bytes, headers) },
        _ => {
            for ((x, bytes), header) in x.into_iter().zip(bytes).zip(headers) {
                round_group(x, bytes, header);
            }
        }
    }
}

fn round_group(x: &[f32; GROUP], bytes: &mut [i8; GROUP], header: &mut GroupHeader) {
    let (parts, _) = x.as_chunks::<STEP_GROUP>();
    let largest: [f32; STEPS] = std::array::from_fn(|s| {
        // As bits, so that a NaN is larger than anything.
        let bits = parts[s].iter().map(|x| x.to_bits() & 0x7fff_ffff);
        f32::from_bits(bits.max().unwrap_or(0))
    });
    let counts = |largest: f32| largest.is_finite() && largest > SMALLEST;
    let wanted = largest.map(|largest| if counts(largest) { largest * BYTE } else { 0.0 });
    let exponent = (wanted[0].max(wanted[1]).to_bits() >> 23) as i32 - STEP_BITS;
    let finite = largest.iter().all(|largest| largest.is_finite());
    *header = GroupHeader {
        exponent: if finite { exponent.max(0) } else { NOT_FINITE },
        ..GroupHeader::default()
    };
    let parts = parts.iter().zip(bytes.as_chunks_mut::<STEP_GROUP>().0).zip(wanted);
    for (s, ((x, bytes), wanted)) in parts.enumerate() {
        let step =
            if wanted > 0.0 { (wanted * power(254 - exponent)).ceil().min(MOST_STEP) } else { 0.0 };
        let inverse = if wanted > 0.0 { 1.0 / (step * power(exponent)) } else { 0.0 };
        header.steps[s] = step as i16;
        for (x, byte) in x.iter().zip(bytes) {
            *byte = (x * inverse).round_ties_even() as i8;
            header.minus[s] -= i32::from(*byte);
        }
    }
}

/// Brings the steps of a row to one unit, which it returns (NaN if an input was not finite), and fills in the sums of
/// groups in that unit, as bf16; `sums` beyond the last group become 0.
pub(super) fn settle_row(path: Path, headers: &mut [GroupHeader], sums: &mut [u16]) -> f32 {
    let (own, rest) = sums.split_at_mut(headers.len());
    rest.fill(0);
    let exponent = match path {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the path says that the processor can.
        Path::Vnni => unsafe { super::x86::rounding::settle(headers, own) },
        _ => settle(headers, own),
    };
    if exponent < NOT_FINITE { power(exponent) } else { f32::NAN }
}

/// [`settle_row`], with the exponent of the unit.
fn settle(headers: &mut [GroupHeader], sums: &mut [u16]) -> i32 {
    let exponent = headers.iter().map(|header| header.exponent).max().unwrap_or(0);
    for (header, sum) in headers.iter_mut().zip(sums) {
        let shift = (exponent - header.exponent).min(16);
        let mut total = 0;
        for (step, minus) in header.steps.iter_mut().zip(header.minus) {
            *step = ((i32::from(*step) + ((1 << shift) >> 1)) >> shift) as i16;
            total -= i32::from(*step) * minus;
        }
        *sum = bf16::from_f32(total as f32).to_bits();
    }
    exponent
}

#[cfg(test)]
mod tests {
    use super::super::activations::ActivationKind;
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
        for path in Path::available(ActivationKind::Bytes) {
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
        for path in Path::available(ActivationKind::Bytes) {
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
            for path in Path::available(ActivationKind::Bytes) {
                let mut x = [[1.0; GROUP]];
                x[0][9] = odd;
                let (mut bytes, mut headers) = ([[1; GROUP]], [GroupHeader::default()]);
                round_groups_to_bytes(path, &x, &mut bytes, &mut headers);
                assert_eq!(headers[0].exponent, NOT_FINITE, "{path:?} {odd}");
                assert_eq!((headers[0].minus[0], bytes[0][..16].to_vec()), (0, vec![0; 16]));
                assert!(settle_row(path, &mut headers, &mut [0; 2]).is_nan(), "{path:?} {odd}");
            }
        }
    }

    #[test]
    fn a_row_of_zeros_has_a_unit_of_zero() {
        for path in Path::available(ActivationKind::Bytes) {
            let (mut bytes, mut headers) = ([[1; GROUP]], [GroupHeader::default()]);
            round_groups_to_bytes(path, &[[0.0; GROUP]], &mut bytes, &mut headers);
            assert_eq!((bytes, headers), ([[0; GROUP]], [GroupHeader::default()]), "{path:?}");
            assert_eq!(settle_row(path, &mut headers, &mut [0; 2]), 0.0);
        }
    }
}
