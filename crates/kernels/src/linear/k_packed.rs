//! Codes of 2 to 6 bits as they are: ggml's K types, integers with a byte that scales each 16 or 32 of them and a number for 256, Q5_0
//! and Q5_1, with a number for 32, and types whose codes name levels (IQ4_XS, IQ4_NL, MXFP4).
//!
//! Nothing is rounded: a weight is `(d · scale) · code + (min · min_scale)`, as the file has it. A tile of [`TILE`] features lies superblock after
//! superblock of 256 inputs (or group after group, of types without), whatever its inputs are:
//!
//! | | bytes |
//! |---|---|
//! | `d`, then `min` if there is one, f16 | 64 each |
//! | 8 groups of 32 inputs, of each: | |
//! | 4 bits of codes of 4, 5 and 6 bits: 4 registers × 2 halves; nibble s of register z is quad `2 z + s` | 512 |
//! | the 2 upper bits of 6, or all or the lower 2 of 2 and 3: 2 registers × 2 halves; bits `2 s` of register z are quad `4 z + s` | 256 |
//! | the upper bit of 3 and 5: 1 register × 2 halves; bit s is quad s | 128 |
//! | scales of the group, or of its first 16 inputs, then of its last 16 | 32 each |
//! | the same of minimums, if there are any (of Q2, where both have four bits, they are the high half of the scale's byte) | 32 each |
//!
//! Q5_0, Q5_1, IQ4_NL and MXFP4 have `d` and `min` in place of a group's scales and minimums. A register is a quad of inputs of 16 features, as in `packed.rs`.

use half::f16;

use super::pack::{put_plane, read_plane};
use super::packed::{GROUP, HALF, TILE};

/// Levels of IQ4_XS and IQ4_NL.
pub const IQ4_LEVELS: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Levels of MXFP4, floats with one bit of mantissa, times two.
pub const MXFP4_LEVELS: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Inputs of a superblock.
pub const SUPERBLOCK: usize = 256;
/// Groups of a superblock.
pub(super) const GROUPS: usize = SUPERBLOCK / GROUP;

/// What the codes of a matrix of a K type are like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KFormat {
    /// Codes 0 to 3, scales and minimums for 16.
    Q2,
    /// Codes −4 to 3, scales for 16.
    Q3,
    /// Codes 0 to 15, scales and minimums for 32.
    Q4,
    /// Codes 0 to 31, scales and minimums for 32.
    Q5,
    /// Codes −32 to 31, scales for 16.
    Q6,
    /// Codes −16 to 15, a number for 32.
    Q5_0,
    /// Codes 0 to 31, a number and a minimum for 32.
    Q5_1,
    /// Codes of 4 bits that name one of 16 levels, scales for 32.
    Iq4Xs,
    /// The same, a number for 32.
    Iq4Nl,
    /// The same with other levels.
    Mxfp4,
}

impl KFormat {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Q2,
        Self::Q3,
        Self::Q4,
        Self::Q5,
        Self::Q6,
        Self::Q5_0,
        Self::Q5_1,
        Self::Iq4Xs,
        Self::Iq4Nl,
        Self::Mxfp4,
    ];

    /// Bits of a code.
    #[inline(always)]
    pub fn bits(self) -> usize {
        match self {
            Self::Q2 => 2,
            Self::Q3 => 3,
            Self::Q4 | Self::Iq4Xs | Self::Iq4Nl | Self::Mxfp4 => 4,
            Self::Q5 | Self::Q5_0 | Self::Q5_1 => 5,
            Self::Q6 => 6,
        }
    }

    /// The smallest code.
    #[inline(always)]
    pub fn lowest(self) -> i8 {
        match self {
            Self::Q3 => -4,
            Self::Q6 => -32,
            Self::Q5_0 => -16,
            _ => 0,
        }
    }

    /// What codes are worth that are not worth themselves.
    #[inline(always)]
    pub const fn levels(self) -> Option<&'static [i8; 16]> {
        match self {
            Self::Iq4Xs | Self::Iq4Nl => Some(&IQ4_LEVELS),
            Self::Mxfp4 => Some(&MXFP4_LEVELS),
            _ => None,
        }
    }

    /// Whether there are minimums.
    #[inline(always)]
    pub fn has_min(self) -> bool {
        matches!(self, Self::Q2 | Self::Q4 | Self::Q5 | Self::Q5_1)
    }

    /// Scales of a group of 32.
    #[inline(always)]
    pub fn scales(self) -> usize {
        if matches!(self, Self::Q2 | Self::Q3 | Self::Q6) { 2 } else { 1 }
    }

    /// Whether groups have numbers of their own, and no superblock.
    #[inline(always)]
    pub(super) fn is_plain(self) -> bool {
        matches!(self, Self::Q5_0 | Self::Q5_1 | Self::Iq4Nl | Self::Mxfp4)
    }

    /// Whether a scale and a minimum share a byte.
    #[inline(always)]
    pub(super) fn has_nibbles(self) -> bool {
        self == Self::Q2
    }

    /// Inputs of what a row is a whole number of.
    pub fn block_inputs(self) -> usize {
        if self.is_plain() { GROUP } else { SUPERBLOCK }
    }

    /// Bytes of numbers.
    #[inline(always)]
    fn number_bytes(self) -> usize {
        2 * TILE * (1 + usize::from(self.has_min()))
    }

    /// Bytes before the groups of a superblock.
    #[inline(always)]
    pub(super) fn header_bytes(self) -> usize {
        if self.is_plain() { 0 } else { self.number_bytes() }
    }

    /// Bytes of the codes of a group of a tile.
    #[inline(always)]
    pub(super) fn code_bytes(self) -> usize {
        TILE * GROUP * self.bits() / 8
    }

    /// Bytes of a group of a tile.
    #[inline(always)]
    pub(super) fn group_bytes(self) -> usize {
        let of_mins = self.has_min() && !self.has_nibbles();
        let scales = TILE * self.scales() * (1 + usize::from(of_mins));
        self.code_bytes() + if self.is_plain() { self.number_bytes() } else { scales }
    }

    /// Bytes of the superblocks before a group of a tile.
    #[inline(always)]
    pub(super) fn superblock_at(self, group: usize) -> usize {
        group / GROUPS * (self.header_bytes() + GROUPS * self.group_bytes())
    }

    /// Bytes of a tile.
    pub(super) fn tile_bytes(self, groups: usize) -> usize {
        groups.div_ceil(GROUPS) * self.header_bytes() + groups * self.group_bytes()
    }

    /// Where a group begins in a tile.
    #[inline(always)]
    pub(super) fn group_at(self, group: usize) -> usize {
        self.superblock_at(group) + self.header_bytes() + group % GROUPS * self.group_bytes()
    }

    /// Bits of the first plane of codes; what is left is in the second.
    #[inline(always)]
    fn low_bits(self) -> usize {
        if self.bits() < 4 { 2 } else { 4 }
    }

    /// The planes of codes: bytes before each, its bits, and bits below them.
    #[inline(always)]
    fn planes(self) -> [(usize, usize, usize); 2] {
        let low = self.low_bits();
        [(0, low, 0), (TILE * GROUP * low / 8, self.bits() - low, low)]
    }

    #[inline(always)]
    fn put_codes(self, bytes: &mut [u8], f: usize, codes: &[i8; GROUP]) {
        let codes = codes.map(|code| code.wrapping_sub(self.lowest()) as u8);
        for (start, bits, below) in self.planes() {
            match bits {
                1 => put_plane::<1>(&mut bytes[start..], f, &codes, below),
                2 => put_plane::<2>(&mut bytes[start..], f, &codes, below),
                4 => put_plane::<4>(&mut bytes[start..], f, &codes, below),
                _ => {}
            }
        }
    }

    fn codes(self, bytes: &[u8], f: usize) -> [i8; GROUP] {
        let mut codes = [0; GROUP];
        for (start, bits, below) in self.planes() {
            match bits {
                1 => read_plane::<1>(&bytes[start..], f, &mut codes, below),
                2 => read_plane::<2>(&bytes[start..], f, &mut codes, below),
                4 => read_plane::<4>(&bytes[start..], f, &mut codes, below),
                _ => {}
            }
        }
        match self.levels() {
            Some(levels) => codes.map(|code| levels[usize::from(code % 16)]),
            None => codes.map(|code| (code as i8).wrapping_add(self.lowest())),
        }
    }

    /// Puts group `g` of feature `f` into a tile, which has been zeros.
    #[inline(always)]
    pub(super) fn put(self, tile: &mut [u8], (f, g): (usize, usize), group: &KGroup) {
        let at = self.group_at(g);
        let numbers = self.numbers_at(g);
        for (what, number) in [group.d, group.min].iter().enumerate() {
            if what == 0 || self.has_min() {
                let at = numbers + 2 * (what * TILE + f);
                tile[at..at + 2].copy_from_slice(&number.to_le_bytes());
            }
        }
        let bytes = &mut tile[at..at + self.group_bytes()];
        self.put_codes(bytes, f, &group.codes);
        if self.is_plain() {
            return;
        }
        let (scales, n) = (&mut bytes[self.code_bytes()..], self.scales());
        for which in 0..n {
            scales[which * TILE + f] = group.scales[which] as u8;
            if self.has_nibbles() {
                scales[which * TILE + f] |= (group.mins[which] as u8) << 4;
            } else if self.has_min() {
                scales[(n + which) * TILE + f] = group.mins[which] as u8;
            }
        }
    }

    /// Where the numbers of a group begin in a tile.
    #[inline(always)]
    fn numbers_at(self, group: usize) -> usize {
        match self.is_plain() {
            true => self.group_at(group) + self.code_bytes(),
            false => self.superblock_at(group),
        }
    }

    /// Row `f` of a tile as f32.
    pub(super) fn row_into(self, tile: &[u8], f: usize, out: &mut [f32]) {
        for (g, out) in out.chunks_mut(GROUP).enumerate() {
            let (group, numbers) = (&tile[self.group_at(g)..], &tile[self.numbers_at(g)..]);
            let number = |what: usize| {
                let at = 2 * (what * TILE + f);
                f16::from_le_bytes([numbers[at], numbers[at + 1]]).to_f32()
            };
            // Scale or minimum, times its number.
            let scaled = |what: usize, which: usize| {
                let byte = |at: usize| group[self.code_bytes() + at * TILE + f];
                let by = if self.is_plain() {
                    1.0
                } else if self.has_nibbles() {
                    f32::from((byte(which) >> (4 * what)) & 15)
                } else {
                    f32::from(byte(what * self.scales() + which) as i8)
                };
                number(what) * by
            };
            let codes = self.codes(group, f);
            let halves = out.chunks_mut(HALF).zip(codes.chunks(HALF));
            for (which, (out, codes)) in halves.enumerate() {
                let which = if self.scales() == 1 { 0 } else { which };
                let (scale, min) = (scaled(0, which), self.has_min().then(|| scaled(1, which)));
                for (out, code) in out.iter_mut().zip(codes) {
                    *out = scale * f32::from(*code) + min.unwrap_or(0.0);
                }
            }
        }
    }
}

/// 32 weights of a row: weight i is `(d · scales[..]) · codes[i] + min · mins[..]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KGroup {
    /// Factor of the scales, the same in all groups of a superblock.
    pub d: f16,
    /// Factor of the minimums, the same; formats without have none.
    pub min: f16,
    /// Integers within the format's range; where there are levels, what names them (and the level takes the place of the code above).
    pub codes: [i8; GROUP],
    /// Of the group, or of its first and its last 16 weights; formats with a number for 32 have none.
    pub scales: [i8; 2],
    /// The same of minimums.
    pub mins: [i8; 2],
}

impl Default for KGroup {
    fn default() -> Self {
        Self { d: f16::ZERO, min: f16::ZERO, codes: [0; GROUP], scales: [1; 2], mins: [1; 2] }
    }
}
