//! HOT PATH. Codes of 2 or 4 bits in bytes, the first code in the low bits.

/// Codes in a byte.
pub(crate) const fn per_byte(bits: usize) -> usize {
    8 / bits
}

/// Bytes of `n` codes.
pub(crate) const fn packed_bytes(n: usize, bits: usize) -> usize {
    n.div_ceil(per_byte(bits))
}

/// Packs codes below 2^BITS. `out`: `packed_bytes(codes.len(), BITS)` bytes.
pub(crate) fn pack<const BITS: usize>(codes: impl Iterator<Item = u8>, out: &mut [u8]) {
    out.fill(0);
    for (i, code) in codes.enumerate() {
        out[i / per_byte(BITS)] |= code << (BITS * (i % per_byte(BITS)));
    }
}

/// The `i`-th code.
#[inline(always)]
pub(crate) fn code<const BITS: usize>(packed: &[u8], i: usize) -> u8 {
    (packed[i / per_byte(BITS)] >> (BITS * (i % per_byte(BITS)))) & ((1 << BITS) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_come_back() {
        let codes: Vec<u8> = (0..37).map(|i| (i * 7) % 16).collect();
        let mut four = vec![0xFF; packed_bytes(37, 4)];
        pack::<4>(codes.iter().copied(), &mut four);
        assert!((0..37).all(|i| code::<4>(&four, i) == codes[i]));
        let mut two = vec![0xFF; packed_bytes(37, 2)];
        pack::<2>(codes.iter().map(|c| c % 4), &mut two);
        assert!((0..37).all(|i| code::<2>(&two, i) == codes[i] % 4));
        assert_eq!((four.len(), two.len()), (19, 10));
    }
}
