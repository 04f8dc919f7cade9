//! Instruction sets: which ones this processor has, and which ones kernels may use.
//!
//! Sets are no ladder: a processor has a list of them (Cooper Lake has products of bf16 and no VBMI, Ice Lake the
//! opposite, many a laptop AVX-VNNI and no AVX-512). Every operation takes the first set of its own list that is there.
//! [`Isa::detected`] is the only place that asks the processor.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU16, Ordering};

/// A set of instructions that kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Set {
    /// Whatever the compilation target guarantees.
    Baseline = 1,
    /// AVX2 with FMA and F16C.
    Avx2 = 1 << 1,
    /// AVX2 and AVX-VNNI: products of bytes.
    AvxVnni = 1 << 2,
    /// AVX-512 F, BW, DQ, VL.
    Avx512 = 1 << 3,
    /// AVX-512 and its VNNI: products of bytes.
    Avx512Vnni = 1 << 4,
    /// The same with VBMI and VBMI2: permutations of bytes (since Ice Lake).
    Avx512Icl = 1 << 5,
    /// AVX-512 with VNNI and BF16: products of bf16.
    Avx512Bf16 = 1 << 6,
    /// The same with VBMI, VBMI2 and AMX: products of tiles of bf16.
    Amx = 1 << 7,
}

impl Set {
    /// All of them, wider ones first.
    pub const ALL: [Self; 8] = [
        Self::Amx,
        Self::Avx512Bf16,
        Self::Avx512Icl,
        Self::Avx512Vnni,
        Self::Avx512,
        Self::AvxVnni,
        Self::Avx2,
        Self::Baseline,
    ];

    /// Its name in `KVASIR_ISA`, tables and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Baseline => "baseline",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avx-vnni",
            Self::Avx512 => "avx512",
            Self::Avx512Vnni => "avx512-vnni",
            Self::Avx512Icl => "avx512-icl",
            Self::Avx512Bf16 => "avx512-bf16",
            Self::Amx => "amx",
        }
    }

    fn features(self) -> u16 {
        match self {
            Self::Baseline => 0,
            Self::Avx2 => feature::AVX2,
            Self::AvxVnni => feature::AVX2 | feature::AVX_VNNI,
            Self::Avx512 => feature::AVX2 | feature::AVX512,
            Self::Avx512Vnni => Self::Avx512.features() | feature::VNNI,
            Self::Avx512Icl => Self::Avx512Vnni.features() | feature::VBMI,
            Self::Avx512Bf16 => Self::Avx512Vnni.features() | feature::BF16,
            Self::Amx => Self::Avx512Bf16.features() | Self::Avx512Icl.features() | feature::AMX,
        }
    }
}

/// What the processor is asked for, in the groups that sets need together.
mod feature {
    /// AVX2, FMA and F16C.
    pub(super) const AVX2: u16 = 1;
    pub(super) const AVX_VNNI: u16 = 1 << 1;
    /// F, BW, DQ, VL.
    pub(super) const AVX512: u16 = 1 << 2;
    pub(super) const VNNI: u16 = 1 << 3;
    /// VBMI and VBMI2.
    pub(super) const VBMI: u16 = 1 << 4;
    pub(super) const BF16: u16 = 1 << 5;
    /// Tiles and their products of bf16, and the system's leave to use them.
    pub(super) const AMX: u16 = 1 << 6;

    #[cfg(target_arch = "x86_64")]
    pub(super) fn detect() -> u16 {
        use std::is_x86_feature_detected as has;
        let avx2 = has!("avx2") && has!("fma") && has!("f16c");
        let avx512 =
            has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl") && avx2;
        let all = [
            (AVX2, avx2),
            (AVX_VNNI, has!("avxvnni")),
            (AVX512, avx512),
            (VNNI, has!("avx512vnni")),
            (VBMI, has!("avx512vbmi") && has!("avx512vbmi2")),
            (BF16, has!("avx512bf16")),
            (AMX, has!("avx512bf16") && crate::simd::amx::is_granted()),
        ];
        all.into_iter().filter(|(_, has)| *has).fold(0, |all, (feature, _)| all | feature)
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub(super) fn detect() -> u16 {
        0
    }
}

/// The instruction sets that kernels may use: some that this processor has, and all that those imply.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Isa(u16);

/// [`Isa::best`], 0 before anybody asked.
static BEST: AtomicU16 = AtomicU16::new(0);

/// The name of the environment variable that says which sets kernels may use.
pub const ISA_VARIABLE: &str = "KVASIR_ISA";

/// Sets that were asked for and cannot be had.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{ISA_VARIABLE}={asked}: {what}; this processor has {}", names(&Isa::detected().sets()))]
pub struct IsaError {
    asked: String,
    what: String,
}

fn names(sets: &[Set]) -> String {
    sets.iter().map(|set| set.name()).collect::<Vec<_>>().join(", ")
}

impl Isa {
    /// What the target guarantees and nothing else.
    pub const BASELINE: Self = Self(Set::Baseline as u16);

    /// Everything that this processor has.
    pub fn detected() -> Self {
        static DETECTED: OnceLock<u16> = OnceLock::new();
        Self(*DETECTED.get_or_init(|| Self::with_features(feature::detect()).0))
    }

    /// What kernels use unless they are told otherwise: what `KVASIR_ISA` names, or all there is. Costs a load.
    #[inline]
    pub fn best() -> Self {
        match BEST.load(Ordering::Relaxed) {
            0 => Self::first_best(),
            sets => Self(sets),
        }
    }

    #[cold]
    fn first_best() -> Self {
        // A wrong name is the program's to report, by `from_environment`, before it computes anything.
        let best = Self::from_environment().unwrap_or_else(|_| Self::detected());
        BEST.store(best.0, Ordering::Relaxed);
        best
    }

    /// Makes these what [`Self::best`] says from now on, in all threads: for benchmarks that compare sets. What was rounded for
    /// other sets must not be read any more.
    pub fn make_best(self) {
        BEST.store(self.0, Ordering::Relaxed);
    }

    /// What the environment variable `KVASIR_ISA` names; everything that the processor has if it is not set or empty.
    ///
    /// # Errors
    /// As [`Self::from_names`].
    pub fn from_environment() -> Result<Self, IsaError> {
        match std::env::var(ISA_VARIABLE) {
            Ok(names) if !names.is_empty() => Self::from_names(&names),
            _ => Ok(Self::detected()),
        }
    }

    /// Sets by their names, separated by commas, and all that they imply.
    ///
    /// # Errors
    /// If there is no such set, or this processor does not have it.
    pub fn from_names(names: &str) -> Result<Self, IsaError> {
        let error = |what| IsaError { asked: names.to_owned(), what };
        let mut features = 0;
        for name in names.split(',').map(str::trim) {
            let set = Set::ALL.into_iter().find(|set| set.name() == name);
            let set = set.ok_or_else(|| error(format!("there is no instruction set '{name}'")))?;
            if !Self::detected().has(set) {
                return Err(error(format!("this processor does not have '{name}'")));
            }
            features |= set.features();
        }
        Ok(Self::with_features(features))
    }

    fn with_features(features: u16) -> Self {
        let there = |set: &Set| set.features() & !features == 0;
        Self(Set::ALL.into_iter().filter(there).fold(0, |all, set| all | set as u16))
    }

    /// Whether a set may be used.
    #[inline]
    pub fn has(self, set: Set) -> bool {
        self.0 & set as u16 != 0
    }

    /// The sets, wider ones first.
    pub fn sets(self) -> Vec<Set> {
        Set::ALL.into_iter().filter(|set| self.has(*set)).collect()
    }

    /// Every set that may be used by itself, with what it implies, and all of them together first: for tests and
    /// benchmarks that compare them.
    pub fn available() -> Vec<Self> {
        let best = Self::best();
        let mut all = vec![best];
        all.extend(best.sets().into_iter().map(|set| Self::with_features(set.features())));
        all.dedup();
        all
    }
}

/// The widest sets, those that others imply left out: `avx512-bf16+avx512-icl`.
impl std::fmt::Display for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sets = self.sets();
        let implied = |set: &Set| {
            let features = |other: &&Set| other.features() & set.features() == set.features();
            sets.iter().filter(|other| *other != set).any(|other| features(&other))
        };
        let widest: Vec<_> =
            sets.iter().filter(|set| !implied(set)).map(|set| set.name()).collect();
        f.write_str(&widest.join("+"))
    }
}

impl std::fmt::Debug for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

/// Compiles one loop body for the instruction sets that compilers vectorise for, and picks one at run time.
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

/// As [`dispatch!`], with the instruction sets as first argument.
macro_rules! dispatch_on {
    ($(#[$meta:meta])* $vis:vis fn $name_on:ident ( $($arg:ident : $ty:ty),* $(,)? ) $(-> $ret:ty)? = $body:ident;) => {
        $(#[$meta])*
        #[inline]
        $vis fn $name_on(isa: $crate::isa::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                use $crate::isa::Set;
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
                fn avx512($($arg: $ty),*) $(-> $ret)? { $body::<true>($($arg),*) }
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $ty),*) $(-> $ret)? { $body::<true>($($arg),*) }
                if isa.has(Set::Avx512) {
                    // SAFETY: an `Isa` names only sets that the processor has.
                    return unsafe { avx512($($arg),*) };
                }
                if isa.has(Set::Avx2) {
                    // SAFETY: as above.
                    return unsafe { avx2($($arg),*) };
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_imply_others_and_are_no_ladder() {
        let of = |set: Set| Isa::with_features(set.features());
        assert_eq!(of(Set::Avx512Bf16).to_string(), "avx512-bf16");
        assert!(
            !of(Set::Avx512Bf16).has(Set::Avx512Icl) && !of(Set::Avx512Icl).has(Set::Avx512Bf16)
        );
        assert!(of(Set::Avx512Icl).has(Set::Avx2) && !of(Set::Avx512Icl).has(Set::AvxVnni));
        assert_eq!(of(Set::Baseline).sets(), [Set::Baseline]);
        let features = Set::Avx512Icl.features() | Set::Avx512Bf16.features();
        assert_eq!(Isa::with_features(features).to_string(), "avx512-bf16+avx512-icl");
    }

    #[test]
    fn names_that_are_not_there_are_errors_that_list_what_is() {
        assert_eq!(Isa::from_names("baseline"), Ok(Isa::BASELINE));
        let all = names(&Isa::detected().sets());
        assert_eq!(Isa::from_names(&all.replace(", ", ",")), Ok(Isa::detected()));
        for wrong in ["avx1024", "", "baseline,,avx2", "avx2+fma"] {
            let error = Isa::from_names(wrong).unwrap_err().to_string();
            assert!(
                error.contains("there is no instruction set") && error.contains(&all),
                "{error}"
            );
        }
        for set in Set::ALL.into_iter().filter(|set| !Isa::detected().has(*set)) {
            let error = Isa::from_names(set.name()).unwrap_err().to_string();
            assert!(error.contains("does not have") && error.ends_with("baseline"), "{error}");
        }
    }

    #[test]
    fn whatever_is_available_was_detected() {
        for isa in Isa::available() {
            assert!(isa.has(Set::Baseline) && isa.0 & !Isa::detected().0 == 0, "{isa}");
        }
    }
}
