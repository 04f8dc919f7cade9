//! Every set against arrays.

use super::*;
use crate::isa::Isa;
use crate::simd::{LANES, Portable, compiled};

fn words(seed: u32) -> [i32; LANES] {
    std::array::from_fn(|i| {
        let x =
            (i as u32 + 3).wrapping_mul(seed.wrapping_mul(2_246_822_519) | 1).rotate_left(i as u32);
        // Extremes among them.
        match x % 5 {
            0 => 0x7fff_8000,
            1 => (x | 0x8000_7fff) as i32,
            _ => x as i32,
        }
    })
}

/// What all operations make of some operands.
#[inline(always)]
fn all<S: Bytes>(s: S, seed: u32, out: &mut Vec<[i32; LANES]>) {
    let (x, y, z) = (words(seed), words(seed + 1), words(seed + 2));
    // SAFETY: all pointers are to whole vectors, or to as much as is read or written.
    unsafe {
        let [a, b, c] = [&x, &y, &z].map(|v| s.iload(v.as_ptr().cast()));
        let mut put = |v: S::I| {
            let mut lanes = [0; LANES];
            s.istore(lanes.as_mut_ptr().cast(), v);
            out.push(lanes);
        };
        put(s.splat16(seed as i16 - 100));
        put(s.dot_halves(a, b, c));
        put(s.sub16(a, b));
        put(s.adds16(a, b));
        put(s.subs16(a, b));
        put(s.adds16_u(a, b));
        put(s.min16_u(a, b));
        put(s.max16_u(a, b));
        put(s.abs16(a));
        put(s.mul16(a, b));
        // -32768 squared is the one product that does not fit.
        put(s.mulhrs16(s.shr16(a, 1), b));
        put(s.select16(s.gt16(a, b), a, c));
        put(s.select16(s.has16(a, 4), b, c));
        put(s.merge(a, b, c));
        put(s.pack32(s.sar(a, 14), s.sar(b, 18)));
        put(s.pack16(s.shr16(a, 7), s.shr16(b, 9)));
        put(s.halves_of(s.sar(a, 16), s.sar(b, 16)));
        put(s.load_signed16(x.as_ptr().cast()));
        put(s.zip8::<false>(a, b));
        put(s.zip8::<true>(a, b));
        put(s.zip16::<false>(a, b));
        put(s.zip16::<true>(a, b));
        put(s.zip32::<false>(a, b));
        put(s.zip32::<true>(a, b));
        put(s.zip64::<false>(a, b));
        put(s.zip64::<true>(a, b));
        put(s.swap32(a));
        put(s.swap64(a));
        let low = s.and(b, s.isplat(0x3f3f_3f3f));
        put(s.shuffle(a, low));
        put(s.permute(a, b));
        put(s.permute2(a, c, b));
        put(s.multishift(a, b));
        let levels = Table(std::array::from_fn(|i| (i as i8).wrapping_mul(37) - seed as i8));
        let table = s.table(&levels);
        put(s.look_up::<64>(table, low));
        put(s.look_up::<32>(table, s.and(low, s.isplat(0x1f1f_1f1f))));
        put(s.look_up::<16>(table, s.and(low, s.isplat(0x0f0f_0f0f))));
        let words =
            Words::new(std::array::from_fn(|i| (i as i16).wrapping_mul(1237) - seed as i16));
        let low = s.and(b, s.isplat(0x003f_003f));
        put(s.look_up16::<64>(&words, low));
        put(s.look_up16::<32>(&words, s.and(low, s.isplat(0x001f_001f))));
        put(s.look_up16::<16>(&words, s.and(low, s.isplat(0x000f_000f))));
        let equal = s.equal8(s.and(a, s.isplat(0x0101_0303)), s.and(b, s.isplat(0x0101_0303)));
        put(s.isplat(equal as i32));
        put(s.isplat((equal >> 32) as i32));
        let many: Vec<u8> = (0..300).map(|i| (i as u8).wrapping_mul(seed as u8 | 1)).collect();
        put(s.load_half(many.as_ptr().add(5)));
        put(s.load_quarters(many.as_ptr().add(3), 90));
        let mut to = [0u8; 256];
        s.store_quarters(to.as_mut_ptr(), 56, a);
        put(s.load_signed(many.as_ptr().add(7)));
        for from in to.chunks_exact(64) {
            put(s.iload(from.as_ptr()));
        }
        // Products of a row's quads with a vector's, of either sign.
        let (mut prepared, mut row) = (vec![0u8; S::PREPARED], vec![0u8; 4 * S::QUAD]);
        s.store_quads(prepared.as_mut_ptr(), s.quad_i(a));
        for e in 0..4 {
            put(s.load_byte(prepared.as_ptr(), e));
        }
        s.widen::<false>(row.as_mut_ptr(), many.as_ptr());
        for quad in 0..4 {
            let u = s.spread(row.as_ptr().add(quad * S::QUAD));
            put(s.dot(c, u, s.load_quads(prepared.as_ptr())));
        }
        s.store_quads(prepared.as_mut_ptr(), s.quad_u(a));
        s.widen::<true>(row.as_mut_ptr(), many.as_ptr());
        for quad in 0..4 {
            let i = s.spread(row.as_ptr().add(quad * S::QUAD));
            put(s.dot(c, s.load_quads(prepared.as_ptr()), i));
        }
        // Sums whose products cancel but for a rounding.
        let (f, g) = (s.from_int(s.sar(a, 7)), s.from_int(s.sar(b, 7)));
        let h = s.sub(s.zero(), s.mul(f, g));
        put(s.bits(s.fused(f, g, h)));
        put(s.bits(s.fused(f, g, s.from_int(c))));
    }
}

compiled! {
    fn all_on(seed: u32, out: &mut Vec<[i32; LANES]>) = all
        for [Avx512Bf16, Avx512Icl, Avx512Vnni, Avx512, AvxVnni, Avx2];
}

#[test]
fn every_set_does_what_arrays_do() {
    for seed in 1..200 {
        let mut expected = Vec::new();
        all(Portable, seed, &mut expected);
        for isa in Isa::available() {
            let mut own = Vec::new();
            all_on(isa, seed, &mut own);
            for (i, (own, expected)) in own.iter().zip(&expected).enumerate() {
                assert_eq!(own, expected, "{isa}, {seed}, operation {i}");
            }
        }
    }
}
