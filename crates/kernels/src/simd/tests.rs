//! Every set against arrays.

use super::*;
use crate::isa::Isa;

/// Numbers of all kinds: small and large, halves, infinite.
fn numbers(seed: u32) -> [f32; LANES] {
    std::array::from_fn(|i| {
        let x = (i as u32 + 1).wrapping_mul(seed.wrapping_mul(2_654_435_761) | 1);
        let small = (x >> 9) as f32 / 65536.0 - 64.0;
        match x % 7 {
            0 => small.round() + 0.5,
            1 => small * 1e-6,
            2 => small * 1e5,
            _ => small,
        }
    })
}

fn words(seed: u32) -> [i32; LANES] {
    std::array::from_fn(|i| {
        (i as u32 + 3).wrapping_mul(seed.wrapping_mul(2_246_822_519) | 1).rotate_left(i as u32)
            as i32
    })
}

/// What all operations make of some operands.
#[inline(always)]
fn all<S: Simd>(s: S, seed: u32, floats: &mut Vec<[u32; LANES]>, ints: &mut Vec<[i32; LANES]>) {
    let (a, b, c) = (numbers(seed), numbers(seed + 1), numbers(seed + 2));
    let (x, y) = (words(seed), words(seed + 1));
    // SAFETY: all pointers are to whole vectors.
    unsafe {
        let [fa, fb, fc] = [s.load(a.as_ptr()), s.load(b.as_ptr()), s.load(c.as_ptr())];
        let [ix, iy] = [s.iload(x.as_ptr().cast()), s.iload(y.as_ptr().cast())];
        let mut put = |v: S::F| {
            let mut out = [0.0f32; LANES];
            s.store(out.as_mut_ptr(), v);
            floats.push(out.map(f32::to_bits));
        };
        put(s.add(fa, fb));
        put(s.sub(fa, fb));
        put(s.mul(fa, fb));
        put(s.div(fa, s.add(s.mul(fb, fb), s.splat(1.0))));
        put(s.max(fa, fb));
        put(s.min(fa, fb));
        put(s.round(fa));
        put(s.from_int(ix));
        put(s.from_bits(s.bits(fc)));
        put(s.select(s.lt(fa, fb), fa, fc));
        put(s.select(s.mask(0xa5c3), fa, fc));
        put(s.splat(s.sum(fa)));
        put(s.splat(s.largest(fb)));
        put(s.load_first(a.as_ptr(), seed as usize % 17));
        let whole = s.round(s.mul(fa, s.splat(0.5)));
        put(s.scale(fb, s.max(s.splat(-100.0), s.min(s.splat(100.0), whole))));
        let mut halves = [0u16; LANES];
        for (i, half) in halves.iter_mut().enumerate() {
            *half = (seed as usize * 337 + i * 4099) as u16;
        }
        // All kinds, the smallest and infinite ones too; those that are no numbers stay so.
        let wide = s.load_f16(halves.as_ptr());
        put(s.select(s.lt(wide, s.splat(f32::INFINITY)), wide, s.splat(7.0)));
        s.store_f16(halves.as_mut_ptr(), fa);
        put(s.load_f16(halves.as_ptr()));
        let mut first = a;
        s.store_first(first.as_mut_ptr(), fb, seed as usize % 17);
        put(s.load(first.as_ptr()));
        // One rounding or two: to be compared where products are exact.
        let small = s.round(s.max(s.splat(-999.0), s.min(s.splat(999.0), fa)));
        put(s.fma(small, small, small));
        put(s.fms(small, small, small));
        let pairs = |v: S::F| s.pairs(s.or(s.round_bf16(v), s.shl(s.round_bf16(v), 16)));
        put(s.dot_pairs(s.zero(), pairs(s.splat(3.0)), pairs(small)));
        let mut put = |v: S::I| {
            let mut out = [0; LANES];
            s.istore(out.as_mut_ptr().cast(), v);
            ints.push(out);
        };
        put(s.to_int(fa));
        put(s.to_int(s.mul(fa, s.splat(1e9))));
        put(s.and(ix, iy));
        put(s.or(ix, iy));
        put(s.xor(ix, iy));
        put(s.iadd(ix, iy));
        put(s.isub(ix, iy));
        put(s.imax_u(ix, iy));
        put(s.shl(ix, 5));
        put(s.shr(ix, 5));
        put(s.sar(ix, 5));
        put(s.shl16(ix, 3));
        put(s.shr16(ix, 3));
        put(s.add16(ix, iy));
        put(s.isplat(seed as i32));
        let four = [ix, iy, s.xor(ix, iy), s.iadd(ix, iy)];
        for lane in s.fold4_max_u(four) {
            put(s.isplat(lane as i32));
        }
        for lane in s.fold4_add(four) {
            put(s.isplat(lane));
        }
        put(s.dot_quads(ix, s.quads_u(ix), s.quads_i(iy)));
        // Bytes from -127 on, with some of -128, which the others may be.
        let b = s.iload(
            x.map(|x| i32::from_le_bytes(x.to_le_bytes().map(|b| if b == 128 { 1 } else { b })))
                .as_ptr()
                .cast(),
        );
        for stored in [iy, s.izero(), s.isplat(-1)] {
            let minus = s.isub(
                s.izero(),
                s.dot_quads(
                    s.izero(),
                    s.quads_u(s.isplat(i32::from_le_bytes([128; 4]))),
                    s.quads_i(b),
                ),
            );
            let begin = if S::SUMS_AS_STORED { s.iadd(ix, minus) } else { ix };
            put(s.dot_bytes(begin, s.bytes(stored), b));
        }
        put(s.round_bf16(fa));
        put(s.round_bf16(s.splat(f32::INFINITY)));
        let nan = s.round_bf16(s.splat(f32::NAN));
        put(s.and(nan, s.isplat(0x7fc0)));
        // The largest that half a group may have.
        let codes = s.and(ix, s.isplat(0x0f0f_0f0f));
        for (codes, byte) in
            [(codes, 127), (s.isplat(0x0f0f_0f0f), 127), (s.isplat(0x0f0f_0f0f), -127)]
        {
            let bytes = s.isplat(i32::from_le_bytes([byte as u8; 4]));
            let mut sums = s.izero();
            for _ in 0..4 {
                sums = s.dot_codes(sums, codes, bytes);
            }
            put(s.join_codes(sums, sums, &Steps::new([32767, 16384]), s.isplat(seed as i32)));
        }
        // And with codes of five and of six bits.
        for (code, quads) in [(31, 4), (63, 2)] {
            for byte in [127, -127i8] {
                let mut sums = s.izero();
                for _ in 0..quads {
                    sums = s.dot_codes(
                        sums,
                        s.isplat(code * 0x0101_0101),
                        s.isplat(i32::from_le_bytes([byte as u8; 4])),
                    );
                }
                put(s.add_codes(iy, sums));
            }
        }
        let mut bytes = [0u8; LANES];
        s.store_low_bytes(bytes.as_mut_ptr(), ix);
        ints.push(bytes.map(i32::from));
        s.store_low_halves(halves.as_mut_ptr(), iy);
        ints.push(halves.map(i32::from));
        let mut out = [0; LANES];
        s.istore(out.as_mut_ptr().cast(), s.load_halves(halves.as_ptr()));
        ints.push(out);
        s.istore(out.as_mut_ptr().cast(), s.load_signed(bytes.as_ptr()));
        ints.push(out);
        let at = s.and(ix, s.isplat(0x0f0f_0f0f));
        s.istore(out.as_mut_ptr().cast(), s.shuffle(iy, at));
        ints.push(out);
    }
}

compiled! {
    fn all_on(seed: u32, floats: &mut Vec<[u32; LANES]>, ints: &mut Vec<[i32; LANES]>) = all
        for [Avx512Bf16, Avx512Icl, Avx512Vnni, Avx512, AvxVnni, Avx2, Sse2];
}

#[test]
fn every_set_does_what_arrays_do() {
    for seed in 1..200 {
        let (mut floats, mut ints) = (Vec::new(), Vec::new());
        all(Portable, seed, &mut floats, &mut ints);
        for isa in Isa::available() {
            let (mut own_floats, mut own_ints) = (Vec::new(), Vec::new());
            all_on(isa, seed, &mut own_floats, &mut own_ints);
            for (i, (own, expected)) in own_floats.iter().zip(&floats).enumerate() {
                assert_eq!(
                    own.map(f32::from_bits),
                    expected.map(f32::from_bits),
                    "{isa}, {seed}, operation {i}"
                );
            }
            for (i, (own, expected)) in own_ints.iter().zip(&ints).enumerate() {
                assert_eq!(own, expected, "{isa}, {seed}, operation {i} of integers");
            }
        }
    }
}

/// Sums of products of all bytes with all others.
#[inline(always)]
fn byte_products<S: Simd>(s: S, out: &mut Vec<i32>) {
    for stored in 0..=255u8 {
        for x in -127..=127i8 {
            let x = s.isplat(i32::from_le_bytes([x as u8; 4]));
            let sum = s.dot_bytes(s.izero(), s.bytes(s.isplat(i32::from_le_bytes([stored; 4]))), x);
            let begin = if S::SUMS_AS_STORED { 128 } else { 0 };
            let mut lanes = [0i32; LANES];
            // SAFETY: a whole vector.
            unsafe { s.istore(lanes.as_mut_ptr().cast(), sum) };
            out.push(lanes[3] - 4 * begin * i32::from(0i8));
        }
    }
}

compiled! {
    fn byte_products_on(out: &mut Vec<i32>) = byte_products for [Avx512Vnni, Avx512, AvxVnni, Avx2, Sse2];
}

#[test]
fn bytes_of_all_sizes_are_multiplied_exactly() {
    for isa in Isa::available() {
        let mut sums = Vec::new();
        byte_products_on(isa, &mut sums);
        let mut at = 0;
        for stored in 0..=255i32 {
            for x in -127..=127i32 {
                let as_stored =
                    isa.has(crate::isa::Set::Avx512Vnni) || isa.has(crate::isa::Set::AvxVnni);
                let a = if as_stored { stored } else { stored - 128 };
                assert_eq!(sums[at], 4 * a * x, "{isa} {stored} {x}");
                at += 1;
            }
        }
    }
}
