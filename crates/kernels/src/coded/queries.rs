//! HOT PATH. Queries turned and rounded.

use crate::Isa;
use crate::simd::{LANES, Simd, compiled};

/// The largest magnitude that a rotation can give a channel: that of the longest pair `(i, i + dim /
/// 2)`.
pub fn largest_pair(query: &[f32]) -> f32 {
    let (first, second) = query.split_at(query.len() / 2);
    let squares = first.iter().zip(second).map(|(a, b)| a * a + b * b);
    squares.fold(0.0, f32::max).sqrt()
}

/// Rotates rows of queries (`[rows, dim]`) by `cos` and `sin` (`[dim / 2]` each; `None`: not at all)
/// and rounds them to integers, and to 256ths of them as bytes, plus 128. No pair may be longer than
/// [`super::LONGEST`].
///
/// # Panics
/// If a slice is shorter than its shape says, or queries are not whole rows.
pub fn rotate_to_bytes(
    queries: &[f32],
    dim: usize,
    turn: Option<(&[f32], &[f32])>,
    bytes: &mut [u8],
    fine: &mut [i16],
) {
    rotate_to_bytes_on(Isa::best(), queries, dim, turn, bytes, fine);
}

pub(super) fn rotate_to_bytes_on(
    isa: Isa,
    queries: &[f32],
    dim: usize,
    turn: Option<(&[f32], &[f32])>,
    bytes: &mut [u8],
    fine: &mut [i16],
) {
    const ONES: [f32; 128] = [1.0; 128];
    const ZEROS: [f32; 128] = [0.0; 128];
    let (cos, sin) = turn.unwrap_or((&ONES, &ZEROS));
    let n = queries.len();
    assert!(n.is_multiple_of(dim) && bytes.len() >= n && fine.len() >= n, "{n} of queries");
    assert!(cos.len() >= dim / 2 && sin.len() >= dim / 2, "{} angles", cos.len());
    rotate(isa, queries, dim, (cos, sin), bytes, fine);
}

compiled! {
    fn rotate(
        queries: &[f32],
        dim: usize,
        turn: (&[f32], &[f32]),
        bytes: &mut [u8],
        fine: &mut [i16],
    ) = body for [Avx512, Avx2];
}

#[inline(always)]
fn body<S: Simd>(
    set: S,
    queries: &[f32],
    dim: usize,
    (cos, sin): (&[f32], &[f32]),
    bytes: &mut [u8],
    fine: &mut [i16],
) {
    let pairs = dim / 2;
    for i in (0..pairs).step_by(LANES) {
        let n = LANES.min(pairs - i);
        // SAFETY: both halves of a row have `pairs` channels, of which `n` from `i` on are taken.
        unsafe {
            let (cos, sin) = (load(set, cos.as_ptr().add(i), n), load(set, sin.as_ptr().add(i), n));
            for row in (0..queries.len()).step_by(dim) {
                let a = load(set, queries.as_ptr().add(row + i), n);
                let b = load(set, queries.as_ptr().add(row + i + pairs), n);
                // Products are rounded before they are added.
                let x = set.sub(set.mul(a, cos), set.mul(b, sin));
                let y = set.add(set.mul(b, cos), set.mul(a, sin));
                for (value, at) in [(x, row + i), (y, row + i + pairs)] {
                    let words = set.to_int(value);
                    let coarse = set.sar(set.iadd(words, set.isplat(128)), 8);
                    let coarse = set.xor(coarse, set.isplat(128));
                    if n == LANES {
                        set.store_low_halves(fine.as_mut_ptr().add(at).cast(), words);
                        set.store_low_bytes(bytes.as_mut_ptr().add(at), coarse);
                        continue;
                    }
                    let (mut some, mut few) = ([0u16; LANES], [0u8; LANES]);
                    set.store_low_halves(some.as_mut_ptr(), words);
                    set.store_low_bytes(few.as_mut_ptr(), coarse);
                    std::ptr::copy(some.as_ptr().cast(), fine.as_mut_ptr().add(at), n);
                    std::ptr::copy(few.as_ptr(), bytes.as_mut_ptr().add(at), n);
                }
            }
        }
    }
}

/// # Safety
/// `n` numbers are readable.
#[inline(always)]
unsafe fn load<S: Simd>(set: S, from: *const f32, n: usize) -> S::F {
    // SAFETY: by contract.
    unsafe { if n == LANES { set.load(from) } else { set.load_first(from, n) } }
}
