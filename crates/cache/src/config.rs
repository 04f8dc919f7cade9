//! Recipes: how a cache is encoded. One name (`--kv-cache`) selects one.

use crate::codec::{CodecKind, Gear, Rate, RawF16, RawF32, TailCodec};
use crate::error::{CacheError, Result};
use crate::select::{Options, Select};

/// The frame keys are stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KeyFrame {
    /// Rotated by the offset inside the block: equal content has equal bytes at any position.
    BlockRelative,
    /// Rotated by the position, as published methods store them.
    Absolute,
}

/// How a sequence is encoded: which tokens stay, the codec of sealed blocks, that of its first block, and the frame its
/// keys are in. As text, stages are joined by `+`, tokens first: `snapkv:0.5+joint3`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Recipe {
    select: Option<Select>,
    codec: CodecKind,
    first: CodecKind,
    frame: KeyFrame,
    ladder: bool,
}

impl Recipe {
    /// Uncompressed half precision: exact for every practical purpose, and the control of every
    /// experiment.
    pub const F16: Self = Self::of(CodecKind::F16, KeyFrame::BlockRelative);
    /// Single precision: twice the bytes; separates rounding from every other effect in tests.
    pub const F32: Self = Self::of(CodecKind::F32, KeyFrame::BlockRelative);
    /// Sealed blocks in 8 bits.
    pub const INT8: Self = Self::of(CodecKind::Int8, KeyFrame::BlockRelative);
    /// Jointly coded at 4 bits a channel.
    pub const JOINT4: Self = Self::joint(Rate::whole(4));
    /// Jointly coded at 3 bits a channel.
    pub const JOINT3: Self = Self::joint(Rate::whole(3));
    /// Jointly coded at 2 bits a channel.
    pub const JOINT2: Self = Self::joint(Rate::whole(2));
    /// Begins as [`Self::JOINT4`]; under pressure the oldest blocks are coded again with fewer bits.
    pub const AUTO: Self = Self { ladder: true, ..Self::JOINT4 };
    /// KIVI at 4 bits: a control.
    pub const KIVI4: Self = Self::of(CodecKind::Kivi4, KeyFrame::Absolute);
    /// KIVI at 2 bits: a control.
    pub const KIVI2: Self = Self::of(CodecKind::Kivi2, KeyFrame::Absolute);
    /// GEAR at 4 bits.
    pub const GEAR4: Self = Self::of(CodecKind::Gear(Gear::FOUR), KeyFrame::Absolute);
    /// GEAR at 2 bits.
    pub const GEAR2: Self = Self::of(CodecKind::Gear(Gear::TWO), KeyFrame::Absolute);
    /// A rotation without statistics at 4 bits: a control.
    pub const ROTATION4: Self = Self::rotation(4);
    /// The same at 3 bits.
    pub const ROTATION3: Self = Self::rotation(3);
    /// The same at 2 bits.
    pub const ROTATION2: Self = Self::rotation(2);

    /// Every codec by name. `joint:R` with other rates exists besides.
    pub const CODECS: [Self; 14] = [
        Self::F16,
        Self::F32,
        Self::INT8,
        Self::JOINT4,
        Self::JOINT3,
        Self::JOINT2,
        Self::AUTO,
        Self::KIVI4,
        Self::KIVI2,
        Self::GEAR4,
        Self::GEAR2,
        Self::ROTATION4,
        Self::ROTATION3,
        Self::ROTATION2,
    ];

    /// Every codec, and every policy over uncompressed blocks, with usual parameters.
    pub fn all() -> Vec<Self> {
        let policies = Select::ALL.into_iter().map(|select| Self::F16.selecting(select));
        Self::CODECS.into_iter().chain(policies).collect()
    }

    /// The same with a policy that chooses which tokens stay.
    pub const fn selecting(self, select: Select) -> Self {
        Self { select: Some(select), ..self }
    }

    const fn of(codec: CodecKind, frame: KeyFrame) -> Self {
        Self { select: None, codec, first: codec, frame, ladder: false }
    }

    /// A sequence's first tokens are like no others (attention sinks) and every query meets them: coded
    /// at 3 bits they cost more than all other blocks together. Eight bits cost nothing measurable.
    const fn joint(rate: Rate) -> Self {
        Self { first: CodecKind::Int8, ..Self::of(CodecKind::Joint(rate), KeyFrame::BlockRelative) }
    }

    const fn rotation(bits: u8) -> Self {
        let codec = CodecKind::Rotation(bits);
        Self { first: CodecKind::Int8, ..Self::of(codec, KeyFrame::BlockRelative) }
    }

    /// Which tokens of a prompt stay; `None` if all do.
    pub fn select(&self) -> Option<&Select> {
        self.select.as_ref()
    }

    /// How a prompt is stored until a policy has chosen; the recipe itself if none does.
    pub(crate) fn before_choice(self) -> Self {
        match self.select {
            Some(_) if self.codec == CodecKind::F32 => Self::F32,
            Some(_) => Self::F16,
            None => self,
        }
    }

    /// The frame keys are stored in.
    pub fn frame(self) -> KeyFrame {
        self.frame
    }

    /// The same with keys in another frame. Its name stays.
    pub(crate) fn in_frame(self, frame: KeyFrame) -> Self {
        Self { frame, ..self }
    }

    /// How sealed blocks are stored.
    pub fn codec(self) -> CodecKind {
        self.codec
    }

    /// How block `block` of a sequence is stored once it is sealed.
    pub fn codec_of(self, block: usize) -> CodecKind {
        if block == 0 { self.first } else { self.codec }
    }

    /// Codecs that pressure may step down to, in order.
    pub fn ladder(self) -> &'static [CodecKind] {
        const LADDER: [CodecKind; 3] = [
            CodecKind::Joint(Rate::whole(4)),
            CodecKind::Joint(Rate::whole(3)),
            CodecKind::Joint(Rate::whole(2)),
        ];
        if self.ladder { &LADDER } else { &[] }
    }

    /// What blocks are written as until they are sealed.
    pub fn tail(self) -> &'static dyn TailCodec {
        if self.codec == CodecKind::F32 { &RawF32 } else { &RawF16 }
    }

    /// Whether full blocks are coded, and not kept as they were written.
    pub fn is_coded(self) -> bool {
        self.codec != self.tail_kind()
    }

    /// The codec kind of [`Self::tail`].
    pub fn tail_kind(self) -> CodecKind {
        if self.codec == CodecKind::F32 { CodecKind::F32 } else { CodecKind::F16 }
    }

    /// Whether the newest values stay exact: as many of them as a block has tokens.
    pub(crate) fn keeps_residual(self) -> bool {
        matches!(self.codec, CodecKind::Kivi4 | CodecKind::Kivi2)
    }

    /// Whether it needs the model's statistics.
    pub fn needs_statistics(self) -> bool {
        self.codec.needs_statistics()
    }
}

impl Default for Recipe {
    fn default() -> Self {
        Self::F16
    }
}

impl std::str::FromStr for Recipe {
    type Err = CacheError;

    fn from_str(name: &str) -> Result<Self> {
        let mut recipe: Option<Self> = None;
        let mut select = None;
        for stage in name.split('+') {
            let combination =
                |what: String| CacheError::Combination { name: name.to_owned(), what };
            if let Some(policy) = Select::parse(stage)? {
                if let Some(first) = select.replace(policy) {
                    return Err(combination(format!("{first} and {policy} both choose tokens")));
                }
                if recipe.is_some() {
                    return Err(combination(format!(
                        "{policy} chooses tokens before they are coded"
                    )));
                }
                continue;
            }
            let codec = Self::codec_by_name(stage).map_err(|error| match error {
                CacheError::UnknownRecipe { .. } => Self::unknown(name),
                other => other,
            })?;
            if let Some(first) = recipe.replace(codec) {
                return Err(combination(format!("{first} and {codec} are both codecs")));
            }
        }
        let recipe = recipe.unwrap_or(Self::F16);
        if let Some(select) = select.filter(|s| recipe.is_coded() && !s.policy().can_be_coded()) {
            let what =
                format!("{select} replaces tokens one by one, which coded blocks do not allow");
            return Err(CacheError::Combination { name: name.to_owned(), what });
        }
        Ok(Self { select, ..recipe })
    }
}

impl Recipe {
    fn codec_by_name(name: &str) -> Result<Self> {
        if let Some(rate) = name.strip_prefix("joint:") {
            return Ok(Self::joint(rate.parse()?));
        }
        let options = Options::new(name);
        if options.name() == "gear" {
            let gear = CodecKind::Gear(Gear::parse(options)?);
            return Ok(Self::of(gear, KeyFrame::Absolute));
        }
        let known = Self::CODECS.into_iter().find(|r| r.to_string() == name);
        known.ok_or_else(|| Self::unknown(name))
    }

    fn unknown(name: &str) -> CacheError {
        let codecs = Self::CODECS.map(|r| r.to_string()).join(", ");
        let policies = Select::KNOWN.join(", ");
        let known =
            format!("{codecs}, joint:BITS, {}; before them, with a +: {policies}", Gear::USAGE);
        CacheError::UnknownRecipe { name: name.to_owned(), known }
    }
}

impl std::fmt::Display for Recipe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let codec = if self.ladder { "auto".to_owned() } else { self.codec.to_string() };
        match self.select {
            None => f.write_str(&codec),
            Some(select) if self.codec == CodecKind::F16 => select.fmt(f),
            Some(select) => write!(f, "{select}+{codec}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back() {
        for recipe in Recipe::all() {
            assert_eq!(recipe.to_string().parse::<Recipe>().unwrap(), recipe);
        }
        let fraction: Recipe = "joint:2.75".parse().unwrap();
        assert_eq!(fraction.to_string(), "joint:2.75");
        assert_eq!("joint:3".parse::<Recipe>().unwrap(), Recipe::JOINT3);
        assert_eq!("gear".parse::<Recipe>().unwrap(), Recipe::GEAR2);
        for name in [
            "snapkv:0.5+joint3",
            "snapkv:0.25:window=32:kernel=7",
            "chunkkv:0.3:chunk=20+kivi4",
            "streaming:tokens=512:sinks=2+auto",
            "dbudget:0.05:sinks=apart+int8",
            "compactor:0.5:blend=30+f32",
            "gear:3:rank=4:outliers=0",
        ] {
            assert_eq!(name.parse::<Recipe>().unwrap().to_string(), name);
        }
    }

    #[test]
    fn stages_that_cannot_be_are_refused_with_the_reason() {
        for (name, reason) in [
            ("snapkv:0", "'0' is not a share of the prompt above 0 and at most 1"),
            ("snapkv:1.5", "'1.5' is not a share of the prompt above 0 and at most 1"),
            ("snapkv", "'' is not a share of the prompt above 0 and at most 1"),
            ("snapkv:0.5:windows=3", "'windows' is not snapkv:SHARE[:window=64][:kernel=5]"),
            ("snapkv:0.5:window=0", "'0' is not window from 1 to 4096"),
            ("dbudget:1", "'1' is not a threshold from 0 to below 1"),
            ("dbudget:0.1:sinks=none", "'none' is not sinks=paper or apart"),
            ("streaming:tokens=4", "'4' is not tokens from 5 to 65535"),
            ("gear:9", "'9' is not bits from 1 to 8"),
            (
                "h2o:0.5+joint3",
                "h2o:0.5 replaces tokens one by one, which coded blocks do not allow",
            ),
            ("snapkv:0.5+h2o:0.5", "snapkv:0.5 and h2o:0.5 both choose tokens"),
            ("joint3+snapkv:0.5", "snapkv:0.5 chooses tokens before they are coded"),
            ("int8+kivi4", "int8 and kivi4 are both codecs"),
        ] {
            let error = name.parse::<Recipe>().unwrap_err().to_string();
            assert!(error.ends_with(reason), "{name}: {error}");
        }
    }

    #[test]
    fn unknown_names_list_what_exists() {
        let message = "f15".parse::<Recipe>().unwrap_err().to_string();
        assert_eq!(
            message,
            "unknown KV cache recipe 'f15' (known: f16, f32, int8, joint4, joint3, joint2, auto, kivi4, \
             kivi2, gear:4, gear:2, rotation4, rotation3, rotation2, joint:BITS, \
             gear[:BITS][:rank=2][:outliers=20]; before them, with a +: \
             streaming:SHARE[:sinks=4] or streaming:tokens=N[:sinks=4], \
             h2o:SHARE, snapkv:SHARE[:window=64][:kernel=5], \
             chunkkv:SHARE[:chunk=10][:reuse=2][:window=64][:kernel=5], \
             compactor:SHARE[:chunk=256][:blend=PERCENT][:sketch=48][:first=8][:last=4], \
             dbudget:THRESHOLD[:sinks=paper|apart])"
        );
    }

    #[test]
    fn rates_out_of_range_say_the_range() {
        for rate in ["0.5", "9", "x", "NaN", "-1"] {
            let error = format!("joint:{rate}").parse::<Recipe>().unwrap_err().to_string();
            assert!(error.contains(rate) && error.ends_with("take 1 to 6"), "{error}");
        }
    }
}
