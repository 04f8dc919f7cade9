//! HOT PATH. The choice of a row's scale and boost: of some candidates the one with the
//! least estimated error.

// Lanes are indexed; iterators would hide that.
#![allow(clippy::needless_range_loop)]

use crate::simd::{Simd, compiled};
use crate::trellis::tables::{GRAIN, REACH, SPREAD};
use crate::trellis::{BOOSTS, MAX_SEGMENTS, ROW_SCALES, SEGMENT};

/// Row scales tried, as steps of the scale code from the root mean square.
const STEPS: [f32; 5] = [-2.575_4, 0.0, 3.028_1, 6.124_2, 9.1];

/// As [`STEPS`], where one segment has its own factor.
const BOOSTED_STEPS: [f32; 2] = [0.0, 3.028_1];

/// Scale codes tried, with and without boosts.
const CANDIDATES: usize = STEPS.len() + BOOSTED_STEPS.len();

/// Magnitudes beyond this count as this, so that squares stay finite.
const LIMIT: f32 = 1e9;

/// What the estimate knows of a segment (see [`GRAIN`]). Scales are relative to the layout's largest, so
/// that squares stay in range.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Terms {
    index: usize,
    /// 1 / scale².
    inverse_square: f32,
    /// Of the segment: 16 · scale² · grain.
    grain: f32,
    /// spread / scale².
    spread: f32,
    /// scale · reach.
    reach: f32,
}

impl Terms {
    /// Reach and spread at a factor, of which the second is one over its square.
    #[inline(always)]
    fn at(&self, factor: f32, inverse_square: f32) -> (f32, f32) {
        (self.reach * factor, self.spread * inverse_square)
    }
}

/// What the choice needs of a layout.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::trellis) struct Search {
    /// Segments that codes say something of.
    segments: Vec<Terms>,
    /// One over the layout's largest scale.
    unit: f32,
    /// Sum of the segments' grains.
    grain: f32,
}

impl Search {
    pub(in crate::trellis) fn new(bits: &[u8], scales: &[f32]) -> Self {
        let largest = scales.iter().copied().fold(0.0, f32::max);
        let unit = if largest > f32::MIN_POSITIVE { 1.0 / largest } else { 0.0 };
        let segments: Vec<Terms> = bits
            .iter()
            .zip(scales)
            .enumerate()
            // Squares of scales must be normal numbers; what is smaller adds nothing.
            .filter(|(_, (bits, scale))| **bits > 0 && **scale * unit > 1e-15)
            .map(|(index, (bits, scale))| {
                let (bits, scale) = (usize::from(*bits), scale * unit);
                let square = scale * scale;
                Terms {
                    index,
                    inverse_square: 1.0 / square,
                    grain: SEGMENT as f32 * square * GRAIN[bits],
                    spread: SPREAD[bits] / square,
                    reach: scale * REACH[bits],
                }
            })
            .collect();
        let grain = segments.iter().map(|s| s.grain).sum();
        Self { segments, unit, grain }
    }
}

/// The first two bytes of a row.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header {
    scale_code: u8,
    segment: usize,
    boost: u8,
}

impl Header {
    const ZERO: Self = Self { scale_code: 0, segment: 0, boost: 0 };

    pub(super) fn bytes(self) -> [u8; 2] {
        [self.scale_code, self.segment as u8 | self.boost << 4]
    }
}

/// Magnitudes of coefficients as multiples of the layout's largest scale, by the segments in use.
type Magnitudes = [[f32; SEGMENT]; MAX_SEGMENTS];

/// The scale code nearest to code 128 + `steps`.
fn scale_code(steps: f32) -> u8 {
    (128.0 + steps).round().clamp(1.0, 255.0) as u8
}

compiled! {
    /// The header for a row. NaN and infinities count as 0.
    pub(super) fn choose(search: &Search, z: &[f32]) -> Header = choose_body for [Avx512, Avx2];
}

#[inline(always)]
fn choose_body<S: Simd>(set: S, search: &Search, z: &[f32]) -> Header {
    let mut x = [[0.0; SEGMENT]; MAX_SEGMENTS];
    let squares = magnitudes(set, search, z, &mut x);
    // Energies relative to what is expected.
    let (mut nothing, mut total) = (0.0, 0.0);
    let (mut most, mut most_energy) = (0, 0.0);
    for (i, (terms, square)) in search.segments.iter().zip(squares).enumerate() {
        let energy = square * terms.inverse_square;
        nothing += square;
        total += energy;
        if energy > most_energy {
            (most, most_energy) = (i, energy);
        }
    }
    if total <= 0.0 {
        return Header::ZERO;
    }

    let used = search.segments.len();
    let level = |energy: f32, segments: usize| 4.0 * (energy / (segments * SEGMENT) as f32).log2();
    let all = level(total, used);
    let own = level(most_energy, 1);
    // The boosted segment must stay in reach of the row scale.
    let rest = match used {
        1 => all,
        _ => level((total - most_energy).max(0.0), used - 1).max(own - 60.0),
    };
    let (mut codes, mut factors) = ([0; CANDIDATES], [0.0; CANDIDATES]);
    for c in 0..CANDIDATES {
        codes[c] = match c.checked_sub(STEPS.len()) {
            None => scale_code(all + STEPS[c]),
            Some(boosted) => scale_code(rest + BOOSTED_STEPS[boosted]),
        };
        factors[c] = ROW_SCALES[usize::from(codes[c])];
    }
    let errors = errors(set, &search.segments, &x, &factors, most);

    let mut best = (Header::ZERO, nothing);
    let mut consider = |header: Header, error: f32| {
        if error < best.1 {
            best = (header, error);
        }
    };
    for c in 0..STEPS.len() {
        let grain = factors[c] * factors[c] * search.grain;
        consider(Header { scale_code: codes[c], segment: 0, boost: 0 }, errors[c] + grain);
    }
    if used == 1 {
        return best.0;
    }
    let terms = &search.segments[most];
    for c in STEPS.len()..CANDIDATES {
        let half_octaves = (own - (f32::from(codes[c]) - 128.0)) / 4.0;
        for boost in [half_octaves.floor(), half_octaves.ceil()] {
            if !(1.0..=15.0).contains(&boost) {
                continue;
            }
            let factor = factors[c] * BOOSTS[boost as usize];
            let grain = factors[c] * factors[c] * (search.grain - terms.grain)
                + factor * factor * terms.grain;
            let own = set.sum(lane_errors(set, terms, &x[most], factor));
            let header = Header { scale_code: codes[c], segment: terms.index, boost: boost as u8 };
            consider(header, errors[c] + own + grain);
        }
    }
    best.0
}

/// Fills `x`; returns the sums of its squares.
#[inline(always)]
fn magnitudes<S: Simd>(
    set: S,
    search: &Search,
    z: &[f32],
    x: &mut Magnitudes,
) -> [f32; MAX_SEGMENTS] {
    let z = z.as_chunks::<SEGMENT>().0;
    let (unit, limit) = (set.splat(search.unit), set.splat(LIMIT));
    let mut squares = [0.0; MAX_SEGMENTS];
    for ((terms, x), square) in search.segments.iter().zip(x).zip(&mut squares) {
        let z = set.bits(load(set, &z[terms.index]));
        let magnitude = set.from_bits(set.and(z, set.isplat(i32::MAX)));
        // Neither NaN nor infinite.
        let finite = set.lt(magnitude, set.splat(f32::INFINITY));
        let magnitude = set.select(finite, magnitude, set.zero());
        let scaled = set.min(set.mul(magnitude, unit), limit);
        // SAFETY: 16 numbers.
        unsafe { set.store(x.as_mut_ptr(), scaled) };
        *square = set.sum(set.mul(scaled, scaled));
    }
    squares
}

/// Squared errors to expect with each factor, but for what no magnitude changes. Those of
/// [`BOOSTED_STEPS`] are without segment `most`.
#[inline(always)]
fn errors<S: Simd>(
    set: S,
    segments: &[Terms],
    x: &Magnitudes,
    factors: &[f32; CANDIDATES],
    most: usize,
) -> [f32; CANDIDATES] {
    let mut lanes = [set.zero(); CANDIDATES];
    for (i, (terms, x)) in segments.iter().zip(x).enumerate() {
        for c in 0..STEPS.len() {
            lanes[c] = set.add(lanes[c], lane_errors(set, terms, x, factors[c]));
        }
        if i != most {
            for c in STEPS.len()..CANDIDATES {
                lanes[c] = set.add(lanes[c], lane_errors(set, terms, x, factors[c]));
            }
        }
    }
    let mut errors = [0.0; CANDIDATES];
    for (error, lanes) in errors.iter_mut().zip(lanes) {
        *error = set.sum(lanes);
    }
    errors
}

/// The same of one segment, by coefficient. Not fused.
#[inline(always)]
fn lane_errors<S: Simd>(set: S, terms: &Terms, x: &[f32; SEGMENT], factor: f32) -> S::F {
    let (reach, spread) = terms.at(factor, 1.0 / (factor * factor));
    let x = load(set, x);
    let within = set.min(x, set.splat(reach));
    let beyond = set.sub(x, within);
    let square = set.mul(within, within);
    let fourth = set.mul(set.mul(square, set.splat(spread)), square);
    set.add(fourth, set.mul(beyond, beyond))
}

#[inline(always)]
fn load<S: Simd>(set: S, x: &[f32; SEGMENT]) -> S::F {
    // SAFETY: 16 numbers.
    unsafe { set.load(x.as_ptr()) }
}
