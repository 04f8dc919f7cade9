//! The packing of eight 6-bit scales and eight 6-bit minimums that Q4_K and Q5_K share.

/// Scale and minimum of group `group` (0–7) of the 12 bytes `packed`.
///
/// Groups 0–3: the low six bits of bytes 0–3 (scales) and 4–7 (minimums). Groups 4–7: low four
/// bits in the halves of bytes 8–11 (scale low, minimum high), high two bits in the top of the
/// bytes of group `group - 4`.
#[inline(always)]
pub(super) fn scale_and_min(packed: &[u8; 12], group: usize) -> (u8, u8) {
    let lane = group % 4;
    let (a, b, c) = (packed[lane], packed[4 + lane], packed[8 + lane]);
    if group < 4 { (a & 63, b & 63) } else { ((c & 15) | (a >> 6 << 4), (c >> 4) | (b >> 6 << 4)) }
}

/// The 12 bytes at `block[4..16]`.
#[inline(always)]
pub(super) fn packed_scales<const BYTES: usize>(block: &[u8; BYTES]) -> [u8; 12] {
    std::array::from_fn(|i| block[4 + i])
}
