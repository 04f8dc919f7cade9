//! K types, Q5_0, Q5_1 and types of levels as the codes, scales and minimums that they are, for layers that keep them.

use half::f16;
use kvasir_kernels::{KFormat, KGroup};

use super::codes::halves;
use super::iq4::iq4_xs_scale;
use super::k_scales::{packed_scales, scale_and_min};
use super::mxfp4::half_of_power;
use crate::gguf::GgmlType;

/// Turns blocks into groups of 32, as many as there are of both.
pub(crate) type DecodeK = fn(&[u8], &mut [KGroup]);

/// What codes of a type are like, and how its blocks are read; `None` for another type.
pub(crate) fn k_decoder(ty: GgmlType) -> Option<(KFormat, DecodeK)> {
    Some(match ty {
        GgmlType::Q2_K => (KFormat::Q2, |bytes, out| blocks(bytes, out, q2_k)),
        GgmlType::Q3_K => (KFormat::Q3, |bytes, out| blocks(bytes, out, q3_k)),
        GgmlType::Q4_K => (KFormat::Q4, |bytes, out| blocks(bytes, out, q4_k)),
        GgmlType::Q5_K => (KFormat::Q5, |bytes, out| blocks(bytes, out, q5_k)),
        GgmlType::Q6_K => (KFormat::Q6, |bytes, out| blocks(bytes, out, q6_k)),
        GgmlType::Q5_0 => (KFormat::Q5_0, |bytes, out| blocks(bytes, out, q5_0)),
        GgmlType::Q5_1 => (KFormat::Q5_1, |bytes, out| blocks(bytes, out, q5_1)),
        GgmlType::IQ4_XS => (KFormat::Iq4Xs, |bytes, out| blocks(bytes, out, iq4_xs)),
        GgmlType::IQ4_NL => (KFormat::Iq4Nl, |bytes, out| blocks(bytes, out, iq4_nl)),
        GgmlType::MXFP4 => (KFormat::Mxfp4, |bytes, out| blocks(bytes, out, mxfp4)),
        _ => return None,
    })
}

fn blocks<const BYTES: usize, const GROUPS: usize>(
    bytes: &[u8],
    out: &mut [KGroup],
    decode: impl Fn(&[u8; BYTES], &mut [KGroup; GROUPS]),
) {
    let (blocks, _) = bytes.as_chunks::<BYTES>();
    for (block, out) in blocks.iter().zip(out.as_chunks_mut::<GROUPS>().0) {
        decode(block, out);
    }
}

fn f16_at(block: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([block[at], block[at + 1]])
}

/// See `q2_k.rs`.
fn q2_k(block: &[u8; 84], out: &mut [KGroup; 8]) {
    for (g, group) in out.iter_mut().enumerate() {
        (group.d, group.min) = (f16_at(block, 80), -f16_at(block, 82));
        let scales = [block[2 * g], block[2 * g + 1]];
        group.scales = scales.map(|scale| (scale & 15) as i8);
        group.mins = scales.map(|scale| (scale >> 4) as i8);
        let (quants, shift) = (&block[16 + g / 4 * 32..][..32], g % 4 * 2);
        group.codes = std::array::from_fn(|j| ((quants[j] >> shift) & 3) as i8);
    }
}

/// See `q3_k.rs`.
fn q3_k(block: &[u8; 110], out: &mut [KGroup; 8]) {
    for (g, group) in out.iter_mut().enumerate() {
        group.d = f16_at(block, 108);
        group.scales = [2 * g, 2 * g + 1].map(|at| {
            let low = block[96 + at % 8] >> (at / 8 * 4) & 15;
            let high = block[104 + at % 4] >> (at / 4 * 2) & 3;
            (low | high << 4) as i8 - 32
        });
        let (quants, shift) = (&block[32 + g / 4 * 32..][..32], g % 4 * 2);
        group.codes = std::array::from_fn(|j| {
            let third = (block[j] >> g) & 1;
            ((quants[j] >> shift) & 3 | third << 2) as i8 - 4
        });
    }
}

/// What Q4_K and Q5_K share.
fn scaled<const BYTES: usize>(block: &[u8; BYTES], out: &mut [KGroup; 8]) {
    let packed = packed_scales(block);
    for (g, group) in out.iter_mut().enumerate() {
        (group.d, group.min) = (f16_at(block, 0), -f16_at(block, 2));
        let (scale, min) = scale_and_min(&packed, g);
        (group.scales, group.mins) = ([scale as i8, 0], [min as i8, 0]);
    }
}

/// See `q4_k.rs`.
fn q4_k(block: &[u8; 144], out: &mut [KGroup; 8]) {
    scaled(block, out);
    for (g, group) in out.iter_mut().enumerate() {
        let quants = &block[16 + g / 2 * 32..][..32];
        group.codes = std::array::from_fn(|j| ((quants[j] >> (g % 2 * 4)) & 15) as i8);
    }
}

/// See `q5_k.rs`.
fn q5_k(block: &[u8; 176], out: &mut [KGroup; 8]) {
    scaled(block, out);
    for (g, group) in out.iter_mut().enumerate() {
        let quants = &block[48 + g / 2 * 32..][..32];
        group.codes = std::array::from_fn(|j| {
            let fifth = (block[16 + j] >> g) & 1;
            (((quants[j] >> (g % 2 * 4)) & 15) | fifth << 4) as i8
        });
    }
}

/// See `q6_k.rs`.
fn q6_k(block: &[u8; 210], out: &mut [KGroup; 8]) {
    for (g, group) in out.iter_mut().enumerate() {
        group.d = f16_at(block, 208);
        let (half, run) = (g / 4, g % 4);
        group.scales = [block[192 + 2 * g] as i8, block[193 + 2 * g] as i8];
        let low = &block[half * 64 + run % 2 * 32..][..32];
        let high = &block[128 + half * 32..][..32];
        group.codes = std::array::from_fn(|j| {
            let low = (low[j] >> (run / 2 * 4)) & 15;
            let high = (high[j] >> (run * 2)) & 3;
            (low | high << 4) as i8 - 32
        });
    }
}

/// 16 where a bit of four bytes is set, element after element: eight at a time, each bit in a byte of its own.
fn fifth_bits(high: &[u8]) -> [u8; 32] {
    let mut bits = [0; 32];
    for (bits, byte) in bits.as_chunks_mut::<8>().0.iter_mut().zip(high) {
        // Bit i of the byte stays in byte i, and becomes its highest bit if it is there.
        let apart = (u64::from(*byte) * 0x0101_0101_0101_0101) & 0x8040_2010_0804_0201;
        let set = (apart + 0x7f7f_7f7f_7f7f_7f7f) & 0x8080_8080_8080_8080;
        *bits = (set >> 3).to_le_bytes();
    }
    bits
}

/// See `q5.rs`.
fn q5_0(block: &[u8; 22], [out]: &mut [KGroup; 1]) {
    out.d = f16_at(block, 0);
    let fifth = fifth_bits(&block[2..6]);
    out.codes = halves(&block[6..], |j, quant| (quant | fifth[j]) as i8 - 16);
}

/// See `q5.rs`.
fn q5_1(block: &[u8; 24], [out]: &mut [KGroup; 1]) {
    (out.d, out.min) = (f16_at(block, 0), f16_at(block, 2));
    let fifth = fifth_bits(&block[4..8]);
    out.codes = halves(&block[8..], |j, quant| (quant | fifth[j]) as i8);
}

/// See `iq4.rs`.
fn iq4_xs(block: &[u8; 136], out: &mut [KGroup; 8]) {
    for (g, group) in out.iter_mut().enumerate() {
        group.d = f16_at(block, 0);
        group.scales = [iq4_xs_scale(block, g), 0];
        group.codes = halves(&block[8 + 16 * g..][..16], |_, quant| quant as i8);
    }
}

/// See `iq4.rs`.
fn iq4_nl(block: &[u8; 18], [out]: &mut [KGroup; 1]) {
    out.d = f16_at(block, 0);
    out.codes = halves(&block[2..], |_, quant| quant as i8);
}

/// See `mxfp4.rs`. A scale that f16 has not is no number, which layouts refuse.
fn mxfp4(block: &[u8; 17], [out]: &mut [KGroup; 1]) {
    let scale = half_of_power(block[0]);
    let rounded = f16::from_f32(scale);
    out.d = if rounded.to_f32() == scale { rounded } else { f16::NAN };
    out.codes = halves(&block[1..], |_, quant| quant as i8);
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use kvasir_kernels::{ActivationKind, Linear};

    use super::*;
    use crate::dequant::dequantize;

    /// Any bytes are codes and scales; only the numbers must be some.
    #[test]
    fn packed_rows_are_what_dequantisation_reads() {
        let types = [
            (GgmlType::Q2_K, 80),
            (GgmlType::Q3_K, 108),
            (GgmlType::Q4_K, 0),
            (GgmlType::Q5_K, 0),
            (GgmlType::Q6_K, 208),
            (GgmlType::Q5_0, 0),
            (GgmlType::Q5_1, 0),
            (GgmlType::IQ4_XS, 0),
            (GgmlType::IQ4_NL, 0),
            (GgmlType::MXFP4, 0),
        ];
        for (ty, numbers) in types {
            // Wider than what is packed at a time.
            let (rows, width) = (37, 1280);
            let mut bytes = vec![0u8; rows * width / ty.block_elements() * ty.block_bytes()];
            let mut state = 7u32;
            for byte in &mut bytes {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                *byte = (state >> 24) as u8;
            }
            for block in bytes.chunks_exact_mut(ty.block_bytes()) {
                block[numbers + 1] = 0x2c;
                if ty == GgmlType::MXFP4 {
                    block[0] = 110 + block[0] % 16;
                }
                if let Some(min) = block
                    .get_mut(numbers + 3)
                    .filter(|_| !matches!(ty, GgmlType::Q3_K | GgmlType::Q5_0))
                {
                    *min = 0x28;
                }
            }
            let exact = dequantize("t", ty, &bytes).unwrap();
            let (format, decode) = k_decoder(ty).unwrap();
            let read = |row: usize, first: usize, out: &mut [KGroup]| {
                let blocks = (row * width + first * 32) / ty.block_elements();
                decode(&bytes[blocks * ty.block_bytes()..], out);
            };
            let open = |_: Range<usize>| Ok::<_, ()>(read);
            let packed = Linear::from_k((format, ActivationKind::Bytes), None, width, rows, open);
            let (packed, mut found) = (packed.unwrap().unwrap(), vec![0.0; width]);
            for (row, exact) in exact.chunks_exact(width).enumerate() {
                packed.row_into(row, &mut found);
                assert_eq!(found, exact, "row {row} of {ty}");
            }
            let in_file = bytes.len() * rows.next_multiple_of(32) / rows;
            // MXFP4's scale is a byte in the file.
            let bound = in_file as f64 * if ty == GgmlType::MXFP4 { 1.06 } else { 1.05 };
            assert!(packed.num_bytes() as f64 <= bound, "{ty}: {} {bound}", packed.num_bytes());
        }
        assert!(k_decoder(GgmlType::Q8_0).is_none());
    }
}
