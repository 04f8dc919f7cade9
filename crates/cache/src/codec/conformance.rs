//! What every codec must do. A new codec calls [`check`] in its tests, and [`check_tail`] if tails can
//! use it.

use kvasir_kernels::AlignedBytes;

use super::{Codec, TailCodec};

const SHAPES: [(usize, usize); 5] = [(16, 64), (32, 64), (64, 64), (32, 128), (32, 256)];

/// Roughly normal values (sum of uniforms) from a fixed seed.
pub(crate) fn gaussian(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut uniform = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32
    };
    (0..n).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect()
}

/// Round trip within the declared error, declared bytes, partial reads, constant and empty blocks,
/// containment of NaN and infinity.
pub(crate) fn check(codec: &dyn Codec) {
    check_shapes(codec, &SHAPES);
}

/// The same for a codec that holds blocks of some shapes only.
pub(crate) fn check_shapes(codec: &dyn Codec, shapes: &[(usize, usize)]) {
    for (tokens, dim) in shapes.iter().copied() {
        let what = format!("{} [{tokens}, {dim}]", codec.name());
        let rows = gaussian(tokens * dim, 7);
        let mut slot = AlignedBytes::zeroed(codec.slot_bytes(tokens, dim));
        let mut out = vec![f32::NAN; tokens * dim];

        codec.encode(&rows, dim, slot.as_mut_slice());
        codec.decode(slot.as_slice(), tokens, dim, &mut out);
        let error: f32 = rows.iter().zip(&out).map(|(a, b)| (a - b).powi(2)).sum::<f32>()
            / rows.iter().map(|a| a * a).sum::<f32>();
        assert!(error <= codec.expected_error() * 1.05 + 1e-6, "{what}: relative error {error}");

        // In f16, if it can do that: the same, rounded.
        let mut halves = vec![half::f16::NAN; tokens * dim];
        if codec.decode_halves(slot.as_slice(), tokens, dim, &mut halves) {
            for (half, x) in halves.iter().zip(&out) {
                assert!((half.to_f32() - x).abs() <= x.abs() * 0.0006 + 1e-6, "{what}: {half} {x}");
            }
            let mut first = vec![half::f16::NAN; dim];
            codec.decode_halves(slot.as_slice(), tokens, dim, &mut first);
            assert_eq!(first, halves[..dim], "{what}: the first row in f16");
        }

        // The first rows alone are the first rows of the whole.
        for n in [1, tokens / 2, tokens - 1] {
            let mut part = vec![f32::NAN; n * dim];
            codec.decode(slot.as_slice(), tokens, dim, &mut part);
            assert_eq!(part, out[..n * dim], "{what}: first {n} rows");
        }

        // Encoding is a function of the rows: stale bytes of a reused slot do not matter.
        let mut dirty = AlignedBytes::zeroed(codec.slot_bytes(tokens, dim));
        dirty.as_mut_slice().fill(0xA5);
        codec.encode(&rows, dim, dirty.as_mut_slice());
        assert_eq!(dirty.as_slice(), slot.as_slice(), "{what}: stale bytes");

        for constant in [0.0f32, 1.0, -3.5] {
            let rows = vec![constant; tokens * dim];
            codec.encode(&rows, dim, slot.as_mut_slice());
            codec.decode(slot.as_slice(), tokens, dim, &mut out);
            let worst = out.iter().map(|x| (x - constant).abs()).fold(0.0, f32::max);
            assert!(worst <= constant.abs() * 0.5 + 1e-6, "{what}: constant {constant}");
        }

        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut rows = gaussian(tokens * dim, 8);
            rows[dim + 3] = bad;
            codec.encode(&rows, dim, slot.as_mut_slice());
            codec.decode(slot.as_slice(), tokens, dim, &mut out);
            assert!(out[..dim].iter().all(|x| x.is_finite()), "{what}: {bad} spoiled row 0");
            assert!(out[2 * dim..].iter().all(|x| x.is_finite()), "{what}: {bad} spoiled row 2");
        }
    }
}

/// Rows written one by one are the rows of a whole block.
pub(crate) fn check_tail(codec: &dyn TailCodec) {
    for (tokens, dim) in SHAPES {
        let rows = gaussian(tokens * dim, 9);
        let mut whole = AlignedBytes::zeroed(codec.slot_bytes(tokens, dim));
        let mut by_row = AlignedBytes::zeroed(codec.slot_bytes(tokens, dim));
        codec.encode(&rows, dim, whole.as_mut_slice());
        for (row, x) in rows.chunks_exact(dim).enumerate().rev() {
            codec.write_row(row, x, by_row.as_mut_slice());
        }
        assert_eq!(whole.as_slice(), by_row.as_slice(), "{} [{tokens}, {dim}]", codec.name());
    }
}
