//! Words that two texts do not have in common.

/// A word, with the space after it, and whether the other text has it in the same order.
pub(super) type Word<'a> = (&'a str, bool);

/// Texts with more words are compared up to here.
const MOST: usize = 2000;

/// Both texts' words. O(words of both, multiplied).
pub(super) fn words<'a>(a: &'a str, b: &'a str) -> [Vec<Word<'a>>; 2] {
    let split = |text: &'a str| -> Vec<&'a str> {
        text.split_inclusive(char::is_whitespace).take(MOST).collect()
    };
    let (a, b) = (split(a), split(b));
    let width = b.len() + 1;
    // Lengths of common subsequences of what follows.
    let mut lengths = vec![0u32; (a.len() + 1) * width];
    for i in (0..a.len()).rev() {
        for j in (0..b.len()).rev() {
            lengths[i * width + j] = match a[i].trim_end() == b[j].trim_end() {
                true => lengths[(i + 1) * width + j + 1] + 1,
                false => lengths[(i + 1) * width + j].max(lengths[i * width + j + 1]),
            };
        }
    }
    let (mut i, mut j) = (0, 0);
    let mut found = [Vec::with_capacity(a.len()), Vec::with_capacity(b.len())];
    while i < a.len() || j < b.len() {
        if i < a.len() && j < b.len() && a[i].trim_end() == b[j].trim_end() {
            found[0].push((a[i], true));
            found[1].push((b[j], true));
            (i, j) = (i + 1, j + 1);
        } else if j == b.len()
            || i < a.len() && lengths[(i + 1) * width + j] >= lengths[i * width + j + 1]
        {
            found[0].push((a[i], false));
            i += 1;
        } else {
            found[1].push((b[j], false));
            j += 1;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_common_is_kept_and_nothing_is_lost() {
        let [a, b] = words("the pass key is 481", "the key is 418 now");
        assert_eq!(
            a,
            [("the ", true), ("pass ", false), ("key ", true), ("is ", true), ("481", false)]
        );
        assert_eq!(
            b,
            [("the ", true), ("key ", true), ("is ", true), ("418 ", false), ("now", false)]
        );
        assert_eq!(words("", "x"), [vec![], vec![("x", false)]]);
        assert_eq!(words("", ""), [vec![], vec![]]);
    }
}
