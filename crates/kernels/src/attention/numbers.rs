//! What products are of here, and functions that are compiled for each of them.

use super::Products;
use crate::isa::{Isa, Set};
use crate::simd::tile::has_bf16;

/// What products are of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Numbers {
    Single,
    Pairs,
    Integers,
}

impl Numbers {
    /// What `products` are of here, for rows of whole vectors or not.
    #[inline]
    pub(super) fn of(isa: Isa, products: Products, whole: bool) -> Self {
        match products {
            Products::Bf16 if whole && has_bf16(isa) => Self::Pairs,
            Products::Integers => {
                assert!(whole && has_integers(isa), "no products of integers");
                Self::Integers
            }
            _ => Self::Single,
        }
    }
}

/// Whether products of integers of 16 bits are instructions.
#[inline]
pub(super) fn has_integers(isa: Isa) -> bool {
    isa.has(Set::Avx2)
}

/// Compiles a function for all kinds of products: `name(isa, numbers, args…)`. Its body is
/// `fn body<S: Lanes>(set: S, kind: impl Kind<S>, args…)`.
macro_rules! by_numbers {
    ($(#[$meta:meta])* $vis:vis fn $name:ident ($($arg:ident : $ty:ty),* $(,)?) = $body:ident;) => {
        $(#[$meta])*
        #[inline]
        #[allow(clippy::too_many_arguments)]
        $vis fn $name(isa: $crate::isa::Isa, numbers: $crate::attention::numbers::Numbers, $($arg: $ty),*) {
            use $crate::attention::numbers::Numbers;
            $crate::simd::tile::by_kind! {
                fn of_floats($($arg: $ty),*) = $body;
            }
            $crate::simd::compiled! {
                #[allow(clippy::too_many_arguments)]
                fn of_integers(kind: $crate::simd::tile::Integers, $($arg: $ty),*) = $body
                    for [Avx512Vnni, Avx512, AvxVnni, Avx2];
            }
            match numbers {
                Numbers::Integers => of_integers(isa, $crate::simd::tile::Integers, $($arg),*),
                _ => of_floats(isa, numbers == Numbers::Pairs, $($arg),*),
            }
        }
    };
}
pub(super) use by_numbers;
