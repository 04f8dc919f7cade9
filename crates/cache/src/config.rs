//! Recipes: how a cache is encoded. One name (`--kv-cache`) selects one.

use crate::codec::{CodecKind, Gear, Rate, RawF16, RawF32, TailCodec};
use crate::format::FormatKind;
use crate::offline::Method;
use crate::project::{KvSharer, LowRank, Project, RECENT, Think};
use crate::select::{Policy, Select, Whole};

/// The frame keys are stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KeyFrame {
    /// Rotated by the offset inside the block: equal content has equal bytes at any position.
    BlockRelative,
    /// Rotated by the position, as published methods store them.
    Absolute,
}

/// How a sequence is encoded: which tokens stay, which layers store, the codec of sealed blocks, that of its first block, and the frame its
/// keys are in. As text, stages are joined by `+`, tokens first, then channels: `snapkv:0.5+think:0.6+kivi4`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Recipe {
    pub(crate) select: Option<Select>,
    pub(crate) layers: Option<KvSharer>,
    pub(crate) project: Option<Project>,
    pub(crate) codec: CodecKind,
    pub(crate) first: CodecKind,
    pub(crate) frame: KeyFrame,
    pub(crate) ladder: bool,
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

    /// Every codec, and every policy and projection over uncompressed blocks, with usual parameters.
    pub fn all() -> Vec<Self> {
        let policies = Select::ALL.into_iter().map(|select| Self::F16.selecting(select));
        let projections = Project::ALL.into_iter().map(|project| Self::F16.projecting(project));
        let fewer_layers = Self::F16.sharing_layers(KvSharer::USUAL);
        Self::CODECS.into_iter().chain(policies).chain(projections).chain([fewer_layers]).collect()
    }

    /// The same with a policy that chooses which tokens stay.
    pub const fn selecting(self, select: Select) -> Self {
        Self { select: Some(select), ..self }
    }

    /// The same where some layers read another's keys and values.
    pub const fn sharing_layers(self, layers: KvSharer) -> Self {
        Self { layers: Some(layers), ..self }
    }

    /// The same with a projection of what is stored of every row.
    pub const fn projecting(self, project: Project) -> Self {
        Self { project: Some(project), ..self }
    }

    pub(crate) const fn of(codec: CodecKind, frame: KeyFrame) -> Self {
        Self {
            select: None,
            layers: None,
            project: None,
            codec,
            first: codec,
            frame,
            ladder: false,
        }
    }

    /// A sequence's first tokens are like no others (attention sinks) and every query meets them: coded
    /// at 3 bits they cost more than all other blocks together. Eight bits cost nothing measurable.
    pub(crate) const fn joint(rate: Rate) -> Self {
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

    /// What becomes of a complete prompt: whose choice is waited for. `None` if nothing does.
    pub(crate) fn policy(&self) -> Option<&(dyn Policy + Sync)> {
        match (&self.select, self.think()) {
            (Some(select), _) => Some(select.policy()),
            (None, Some(_)) => Some(&Whole),
            (None, None) => None,
        }
    }

    /// Whether what is given up of a prompt is remembered as sums.
    pub(crate) fn remembers(&self) -> bool {
        self.select.is_some_and(|select| select.policy().remembers())
    }

    /// Whether how a prompt is stored depends on its likelihood, which must be noted while it is computed
    /// ([`crate::KvCache::note_prompt_nll`]).
    pub fn needs_prompt_nll(&self) -> bool {
        self.policy().is_some_and(|policy| policy.quality().is_some())
    }

    /// Whether a prompt is computed whole, uncompressed, before it is stored as the recipe says.
    pub fn waits_for_prompt(&self) -> bool {
        self.policy().is_some()
    }

    /// Last queries of a prompt that must be seen before it is stored.
    pub(crate) fn observed_queries(&self, prompt: usize) -> usize {
        let by_policy = self.policy().map_or(0, |policy| policy.observed().count(prompt));
        by_policy.max(self.think().map_or(0, |_| RECENT.min(prompt)))
    }

    /// Which channels of a prompt's keys stay; `None` if all do, or if the codec leaves some out of every block.
    pub(crate) fn think(&self) -> Option<Think> {
        match self.project {
            Some(Project::Think(think)) if !self.codec.is_joint() => Some(think),
            _ => None,
        }
    }

    /// What is stored of every full block instead of its rows; `None` if they are.
    pub(crate) fn low_rank(&self) -> Option<LowRank> {
        match self.project {
            Some(Project::LowRank(low_rank)) => Some(low_rank),
            _ => None,
        }
    }

    /// Which layers read another's; `None` if none does.
    pub(crate) fn kv_sharer(&self) -> Option<KvSharer> {
        self.layers
    }

    /// The methods whose tables of the model it needs.
    pub fn needs_tables(&self) -> impl Iterator<Item = Method> {
        let layers = self.layers.map(|_| Method::KvSharer);
        let remembers = self.remembers().then_some(Method::Less);
        let by_nll = self.needs_prompt_nll().then_some(Method::Compactor);
        let stages = self.low_rank().map(LowRank::method).into_iter().chain(layers);
        stages.chain(remembers).chain(by_nll)
    }

    /// What full blocks are made of.
    pub(crate) fn sealed_kind(&self, block: usize) -> FormatKind {
        let codec = self.codec_of(block);
        match self.project {
            Some(Project::Think(_)) if !codec.is_joint() => codec.into(),
            project => FormatKind { codec, project },
        }
    }

    /// What those blocks of a prompt are made of whose keys have fewer channels.
    pub(crate) fn narrow_kind(&self) -> Option<FormatKind> {
        self.think().map(|_| FormatKind { codec: self.codec, project: self.project })
    }

    /// How a prompt is stored until it is complete; the recipe itself if that makes no difference.
    pub(crate) fn before_choice(self) -> Self {
        match self.waits_for_prompt() {
            true if self.codec == CodecKind::F32 => Self { layers: self.layers, ..Self::F32 },
            true => Self { layers: self.layers, ..Self::F16 },
            false => self,
        }
    }

    /// The frame keys are stored in.
    pub fn frame(self) -> KeyFrame {
        // Latents are of keys before RoPE: blocks are turned back by their rows, which are the same everywhere.
        if self.low_rank().is_some() { KeyFrame::BlockRelative } else { self.frame }
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
        self.codec != self.tail_kind() || self.low_rank().is_some()
    }

    /// The codec kind of [`Self::tail`].
    pub fn tail_kind(self) -> CodecKind {
        if self.codec == CodecKind::F32 { CodecKind::F32 } else { CodecKind::F16 }
    }

    /// Whether the newest values stay exact: as many of them as a block has tokens.
    pub(crate) fn keeps_residual(self) -> bool {
        matches!(self.codec, CodecKind::Kivi4 | CodecKind::Kivi2) && self.low_rank().is_none()
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
