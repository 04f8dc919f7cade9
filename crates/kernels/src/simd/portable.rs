//! Arrays: the definition of what every set does, and what processors without the others run. Compilers turn them into
//! the vectors that the target guarantees.

use half::bf16;

use super::{LANES, Simd, Steps};

/// Any processor.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

type F = [f32; LANES];
type I = [i32; LANES];

/// A lane after the other.
macro_rules! lanes {
    (|$i:ident| $of:ty = $one:expr) => {{
        let mut out = [<$of>::default(); LANES];
        for $i in 0..LANES {
            out[$i] = $one;
        }
        out
    }};
}

/// The halves of a lane, with sign.
#[inline(always)]
fn halves(x: i32) -> [i32; 2] {
    [i32::from(x as i16), x >> 16]
}

/// Of halves, which wrap.
#[inline(always)]
fn lane([low, high]: [i32; 2]) -> i32 {
    (low & 0xffff) | high << 16
}

/// Half precision as f32, without branches, so that compilers make vectors of it.
#[inline(always)]
fn widened(half: u16) -> f32 {
    let (sign, rest) = (u32::from(half & 0x8000) << 16, u32::from(half & 0x7fff) << 13);
    // The exponent by 112 larger, by 224 if it stands for what is not finite.
    let more = if rest >= 0x0f80_0000 { 224 << 23 } else { 112 << 23 };
    let normal = rest.wrapping_add(more);
    // Too small for a leading one: it is put there and taken away.
    let small = f32::from_bits(rest.wrapping_add(113 << 23)) - f32::from_bits(113 << 23);
    f32::from_bits(sign | if rest < 0x0080_0000 { small.to_bits() } else { normal })
}

/// The nearest of half precision, likewise.
#[inline(always)]
fn narrowed(x: f32) -> u16 {
    let sign = x.to_bits() & 0x8000_0000;
    let rest = x.to_bits() ^ sign;
    // Adding the number whose last place is that of the smallest half rounds to it.
    const PLACE: u32 = 126 << 23;
    let small = (f32::from_bits(rest) + f32::from_bits(PLACE)).to_bits().wrapping_sub(PLACE);
    let normal = rest.wrapping_sub(112 << 23).wrapping_add(0xfff + (rest >> 13 & 1)) >> 13;
    let huge = if rest > 0x7f80_0000 { 0x7e00 } else { 0x7c00 };
    let finite = if rest < 113 << 23 { small } else { normal };
    (if rest >= 143 << 23 { huge } else { finite } | sign >> 16) as u16
}

/// Halves, quarters, pairs.
#[inline(always)]
fn fold<T: Copy>(v: [T; LANES], op: impl Fn(T, T) -> T) -> T {
    let mut v = v;
    for width in [8, 4, 2, 1] {
        for l in 0..width {
            v[l] = op(v[l], v[l + width]);
        }
    }
    v[0]
}

impl Simd for Portable {
    const REGISTERS: usize = 4;
    type F = F;
    type I = I;
    type M = [bool; LANES];

    memory! {
        load(from: *const f32) -> F = from.cast::<F>().read_unaligned();
        store(to: *mut f32, v: F) = to.cast::<F>().write_unaligned(v);
        load_first(from: *const f32, n: usize) -> F =
            lanes!(|l| f32 = if l < n { from.add(l).read_unaligned() } else { 0.0 });
        store_first(to: *mut f32, v: F, n: usize) = {
            for (l, x) in v.iter().enumerate().take(n) {
                to.add(l).write_unaligned(*x);
            }
        };
        load_f16(from: *const u16) -> F = {
            let v = from.cast::<[u16; LANES]>().read_unaligned();
            lanes!(|l| f32 = widened(v[l]))
        };
        store_f16(to: *mut u16, v: F) = {
            to.cast::<[u16; LANES]>().write_unaligned(lanes!(|l| u16 = narrowed(v[l])))
        };
        iload(from: *const u8) -> I = {
            let v = from.cast::<I>().read_unaligned();
            lanes!(|l| i32 = i32::from_le(v[l]))
        };
        istore(to: *mut u8, v: I) = to.cast::<I>().write_unaligned(lanes!(|l| i32 = v[l].to_le()));
        store_low_bytes(to: *mut u8, v: I) =
            to.cast::<[u8; LANES]>().write_unaligned(lanes!(|l| u8 = v[l] as u8));
        store_low_halves(to: *mut u16, v: I) =
            to.cast::<[u16; LANES]>().write_unaligned(lanes!(|l| u16 = v[l] as u16));
        load_halves(from: *const u16) -> I = {
            let v = from.cast::<[u16; LANES]>().read_unaligned();
            lanes!(|l| i32 = i32::from(v[l]))
        };
        load_signed(from: *const u8) -> I = {
            let v = from.cast::<[i8; LANES]>().read_unaligned();
            lanes!(|l| i32 = i32::from(v[l]))
        };
    }
    methods! {
        shuffle(v: I, at: I) -> I = lanes!(|l| i32 = {
            let quarter = &v[l / 4 * 4..][..4];
            i32::from_le_bytes(at[l].to_le_bytes().map(|at| {
                quarter[usize::from(at % 16 / 4)].to_le_bytes()[usize::from(at % 4)]
            }))
        });
        zero() -> F = [0.0; LANES];
        splat(x: f32) -> F = [x; LANES];
        add(a: F, b: F) -> F = lanes!(|l| f32 = a[l] + b[l]);
        sub(a: F, b: F) -> F = lanes!(|l| f32 = a[l] - b[l]);
        mul(a: F, b: F) -> F = lanes!(|l| f32 = a[l] * b[l]);
        div(a: F, b: F) -> F = lanes!(|l| f32 = a[l] / b[l]);
        fma(a: F, b: F, c: F) -> F = lanes!(|l| f32 = a[l] * b[l] + c[l]);
        fms(a: F, b: F, c: F) -> F = lanes!(|l| f32 = a[l] * b[l] - c[l]);
        max(a: F, b: F) -> F = lanes!(|l| f32 = if a[l] > b[l] { a[l] } else { b[l] });
        min(a: F, b: F) -> F = lanes!(|l| f32 = if a[l] < b[l] { a[l] } else { b[l] });
        // Adding and taking away 2^23 rounds a magnitude to an integer, and everything that is larger is one.
        round(a: F) -> F = lanes!(|l| f32 = {
            const MOST: f32 = 8_388_608.0;
            if a[l].abs() < MOST { ((a[l].abs() + MOST) - MOST).copysign(a[l]) } else { a[l] }
        });
        scale(p: F, n: F) -> F =
            lanes!(|l| f32 = p[l] * f32::from_bits(((n[l] as i32).wrapping_add(127) as u32) << 23));
        lt(a: F, b: F) -> [bool; LANES] = lanes!(|l| bool = a[l] < b[l]);
        mask(bits: u16) -> [bool; LANES] = lanes!(|l| bool = bits >> l & 1 == 1);
        select(mask: [bool; LANES], yes: F, no: F) -> F =
            lanes!(|l| f32 = if mask[l] { yes[l] } else { no[l] });
        sum(v: F) -> f32 = fold(v, |a, b| a + b);
        largest(v: F) -> f32 = fold(v, |a, b| if a > b { a } else { b });
        to_int(v: F) -> I = lanes!(|l| i32 = {
            let rounded = v[l].round_ties_even();
            if rounded.abs() < 2_147_483_648.0 { rounded as i32 } else { i32::MIN }
        });
        from_int(v: I) -> F = lanes!(|l| f32 = v[l] as f32);
        bits(v: F) -> I = lanes!(|l| i32 = v[l].to_bits() as i32);
        from_bits(v: I) -> F = lanes!(|l| f32 = f32::from_bits(v[l] as u32));
        izero() -> I = [0; LANES];
        isplat(x: i32) -> I = [x; LANES];
        and(a: I, b: I) -> I = lanes!(|l| i32 = a[l] & b[l]);
        or(a: I, b: I) -> I = lanes!(|l| i32 = a[l] | b[l]);
        xor(a: I, b: I) -> I = lanes!(|l| i32 = a[l] ^ b[l]);
        iadd(a: I, b: I) -> I = lanes!(|l| i32 = a[l].wrapping_add(b[l]));
        isub(a: I, b: I) -> I = lanes!(|l| i32 = a[l].wrapping_sub(b[l]));
        imax_u(a: I, b: I) -> I = lanes!(|l| i32 = (a[l] as u32).max(b[l] as u32) as i32);
        shl(a: I, n: u32) -> I = lanes!(|l| i32 = a[l] << n);
        shr(a: I, n: u32) -> I = lanes!(|l| i32 = (a[l] as u32 >> n) as i32);
        sar(a: I, n: u32) -> I = lanes!(|l| i32 = a[l] >> n);
        shl16(a: I, n: u32) -> I = lanes!(|l| i32 = lane(halves(a[l]).map(|x| x << n)));
        shr16(a: I, n: u32) -> I = lanes!(|l| i32 = lane(halves(a[l]).map(|x| (x & 0xffff) >> n)));
        add16(a: I, b: I) -> I = lanes!(|l| i32 = {
            let ([a, b], [c, d]) = (halves(a[l]), halves(b[l]));
            lane([a + c, b + d])
        });
        fold4_max_u(v: [I; 4]) -> [u32; 4] = v.map(|v| fold(v.map(|x| x as u32), |a, b| a.max(b)));
        fold4_add(v: [I; 4]) -> [i32; 4] = v.map(|v| fold(v, |a, b| a.wrapping_add(b)));
    }

    type Quads = I;
    type Bytes = I;
    const SUMS_AS_STORED: bool = true;
    methods! {
        bytes(stored: I) -> I = stored;
        dot_bytes(sums: I, a: I, b: I) -> I = Portable.dot_quads(sums, a, b);
        quads_u(v: I) -> I = v;
        quads_i(v: I) -> I = v;
        dot_quads(sums: I, u: I, i: I) -> I = lanes!(|l| i32 = {
            let (u, i) = (u[l].to_le_bytes(), i[l].to_le_bytes());
            let product = |e: usize| i32::from(u[e]) * i32::from(i[e] as i8);
            sums[l].wrapping_add(product(0) + product(1) + product(2) + product(3))
        });
        dot_codes(sums: I, codes: I, bytes: I) -> I = Portable.dot_quads(sums, codes, bytes);
        add_codes(sums: I, codes: I) -> I = Portable.iadd(sums, codes);
        join_codes(first: I, last: I, steps: &Steps, begin: I) -> I = lanes!(|l| i32 = {
            let [a, b] = steps.each;
            begin[l].wrapping_add(first[l].wrapping_mul(a)).wrapping_add(last[l].wrapping_mul(b))
        });
    }

    /// High halves, low halves, as numbers.
    type Pairs = [F; 2];
    methods! {
        pairs(v: I) -> [F; 2] = [
            lanes!(|l| f32 = f32::from_bits(v[l] as u32 & 0xffff_0000)),
            lanes!(|l| f32 = f32::from_bits((v[l] as u32) << 16)),
        ];
        dot_pairs(sums: F, a: [F; 2], b: [F; 2]) -> F =
            Portable.fma(a[1], b[1], Portable.fma(a[0], b[0], sums));
        round_bf16(v: F) -> I = lanes!(|l| i32 = i32::from(bf16::from_f32(v[l]).to_bits()));
    }
}

impl super::WordTables for Portable {
    methods! {
        lookup16(table: I, indices: I) -> I = {
            let word = |i: i32| table[i as usize % 32 / 2] >> (16 * (i % 2)) & 0xffff;
            lanes!(|l| i32 = word(indices[l] & 31) | word(indices[l] >> 16 & 31) << 16)
        };
    }
}
