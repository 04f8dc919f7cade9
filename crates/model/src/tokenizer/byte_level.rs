//! The byte alphabet of GPT-2: every byte is written as one printable character, so that a
//! vocabulary of byte strings can be stored as text.

/// Bytes that stand for themselves: printable ASCII and Latin-1 without the soft hyphen.
const fn is_plain(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
}

/// The character of every byte. Bytes that are not [`is_plain`] take U+0100 upwards, in order.
pub(super) const CHARS: [char; 256] = {
    let mut chars = ['\0'; 256];
    let mut next = 0x100_u32;
    let mut byte = 0;
    while byte < 256 {
        let code = if is_plain(byte as u8) {
            byte as u32
        } else {
            next += 1;
            next - 1
        };
        chars[byte] = match char::from_u32(code) {
            Some(c) => c,
            None => '\u{FFFD}',
        };
        byte += 1;
    }
    chars
};

/// Number of bytes that are not [`is_plain`], hence the length of [`MOVED`].
const NUM_MOVED: usize = 68;

/// The bytes written as U+0100, U+0101, ...
const MOVED: [u8; NUM_MOVED] = {
    let mut bytes = [0; NUM_MOVED];
    let (mut byte, mut at) = (0, 0);
    while byte < 256 {
        if !is_plain(byte as u8) {
            bytes[at] = byte as u8;
            at += 1;
        }
        byte += 1;
    }
    bytes
};

/// Appends `text` to `out`, one character for each of its bytes.
pub(super) fn push_encoded(text: &str, out: &mut String) {
    out.extend(text.bytes().map(|byte| CHARS[usize::from(byte)]));
}

/// Appends the bytes that `text` stands for. A character outside the alphabet, which a sound
/// vocabulary does not have, stands for its own UTF-8 bytes.
pub(super) fn push_decoded(text: &str, out: &mut Vec<u8>) {
    for c in text.chars() {
        match byte_of(c) {
            Some(byte) => out.push(byte),
            None => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
}

fn byte_of(c: char) -> Option<u8> {
    match u8::try_from(u32::from(c)) {
        Ok(byte) => is_plain(byte).then_some(byte),
        Err(_) => {
            let at = usize::try_from(u32::from(c).checked_sub(0x100)?).ok()?;
            MOVED.get(at).copied()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_its_own_character_and_back() {
        for byte in 0..=255_u8 {
            assert_eq!(byte_of(CHARS[usize::from(byte)]), Some(byte));
        }
        assert_eq!(CHARS[usize::from(b' ')], 'Ġ');
        assert_eq!(CHARS[usize::from(b'\n')], 'Ċ');
        assert_eq!(CHARS[0xAD], 'Ń');
    }

    #[test]
    fn text_survives_both_ways() {
        let mut encoded = String::new();
        push_encoded("né ☕\n", &mut encoded);
        let mut decoded = Vec::new();
        push_decoded(&encoded, &mut decoded);
        assert_eq!(decoded, "né ☕\n".as_bytes());
    }

    #[test]
    fn a_character_outside_the_alphabet_stands_for_itself() {
        let mut decoded = Vec::new();
        push_decoded("▁a", &mut decoded);
        assert_eq!(decoded, "▁a".as_bytes());
    }
}
