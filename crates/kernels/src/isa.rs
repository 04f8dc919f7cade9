//! Run-time choice of the instruction set.

/// Instruction sets with their own code paths, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// AVX-512 F/BW/DQ/VL with FMA.
    Avx512,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// Whatever the compilation target guarantees.
    Baseline,
}

impl Isa {
    /// The best set this processor has. `std` caches the answer; the call costs a load.
    #[inline]
    pub fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if std::is_x86_feature_detected!("avx512f")
                && std::is_x86_feature_detected!("avx512bw")
                && std::is_x86_feature_detected!("avx512dq")
                && std::is_x86_feature_detected!("avx512vl")
                && std::is_x86_feature_detected!("fma")
            {
                return Self::Avx512;
            }
            if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
                return Self::Avx2;
            }
        }
        Self::Baseline
    }

    /// Every set this processor can run, best first: for tests that compare them.
    pub fn available() -> Vec<Self> {
        [Self::Avx512, Self::Avx2, Self::Baseline]
            .into_iter()
            .filter(|isa| *isa >= Self::best())
            .collect()
    }
}

impl std::fmt::Display for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2+fma",
            Self::Baseline => "baseline",
        })
    }
}

/// Compiles one loop body for every instruction set and picks one at run time.
///
/// The body is an `#[inline(always)]` function generic over `const FMA: bool` (whether
/// multiply-add is one instruction); the compiler vectorises each copy for its own registers.
macro_rules! dispatch {
    ($(#[$meta:meta])* $vis:vis fn $name:ident / $name_on:ident ( $($arg:ident : $ty:ty),* $(,)? ) $(-> $ret:ty)? = $body:ident;) => {
        $(#[$meta])*
        #[inline]
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            $name_on($crate::isa::Isa::best(), $($arg),*)
        }

        $crate::isa::dispatch_on! { fn $name_on($($arg: $ty),*) $(-> $ret)? = $body; }
    };
}
pub(crate) use dispatch;

/// As [`dispatch!`], with the instruction set as first argument.
macro_rules! dispatch_on {
    ($(#[$meta:meta])* $vis:vis fn $name_on:ident ( $($arg:ident : $ty:ty),* $(,)? ) $(-> $ret:ty)? = $body:ident;) => {
        $(#[$meta])*
        #[inline]
        $vis fn $name_on(isa: $crate::isa::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
                fn avx512($($arg: $ty),*) $(-> $ret)? { $body::<true>($($arg),*) }
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $ty),*) $(-> $ret)? { $body::<true>($($arg),*) }
                match isa {
                    // SAFETY: `Isa::best` and `Isa::available` name only sets the processor has.
                    $crate::isa::Isa::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    $crate::isa::Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::isa::Isa::Baseline => {}
                }
            }
            let _ = isa;
            $body::<false>($($arg),*)
        }
    };
}
pub(crate) use dispatch_on;

/// `a * b + c`, fused where the instruction set can (calling libm for it would be slow).
#[inline(always)]
pub(crate) fn mul_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}
