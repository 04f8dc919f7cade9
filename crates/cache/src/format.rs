//! Formats: what the bytes of a slot mean. One per codec that a cache has met; the codecs of all its
//! layers and head groups, and the slot classes they need.

use std::sync::Arc;

use kvasir_kernels::trellis::SEGMENT;

use crate::attention::GROUP_TOKENS;
use crate::codec::{Basis, Codec, CodecKind, GearCodec, JointCodec, LowRankCodec, Part, Turns};
use crate::error::{CacheError, Result};
use crate::frame::Frame;
use crate::geometry::{Geometry, LayerGeometry};
use crate::offline::Tables;
use crate::pool::{BlockPool, ClassId};
use crate::project::{LowRank, Owners, Project, Think};
use crate::stats::{PartStatistics, Statistics, group_heads};

/// Names a format in a [`crate::KvCache`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct FormatId(u8);

/// One part of one head group.
#[derive(Debug)]
pub(crate) struct GroupPart {
    codec: AnyCodec,
    pub(crate) class: ClassId,
    /// Channels of a row as its codec sees it.
    pub(crate) width: usize,
}

/// What a format is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FormatKind {
    pub(crate) codec: CodecKind,
    /// What is made of rows before.
    pub(crate) project: Option<Project>,
}

impl From<CodecKind> for FormatKind {
    fn from(codec: CodecKind) -> Self {
        Self { codec, project: None }
    }
}

/// What a recipe stores blocks in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RecipeFormats {
    /// Blocks that are being written.
    pub(crate) tail: FormatId,
    /// A sequence's first full block, and the others.
    pub(crate) sealed: [FormatId; 2],
    /// Full blocks of a prompt whose keys have fewer channels.
    pub(crate) narrow: Option<FormatId>,
}

#[derive(Debug)]
enum AnyCodec {
    Stateless(&'static dyn Codec),
    Gear(GearCodec),
    Joint(JointCodec),
    LowRank(LowRankCodec),
}

impl FormatKind {
    fn think(&self) -> Option<Think> {
        match self.project {
            Some(Project::Think(think)) => Some(think),
            _ => None,
        }
    }

    /// Channels of a key of one head.
    fn key_channels(&self, l: &LayerGeometry) -> usize {
        self.think().map_or(l.head_dim, |think| think.kept(l.head_dim))
    }
}

impl GroupPart {
    pub(crate) fn codec(&self) -> &dyn Codec {
        match &self.codec {
            AnyCodec::Stateless(codec) => *codec,
            AnyCodec::Gear(codec) => codec,
            AnyCodec::Joint(codec) => codec,
            AnyCodec::LowRank(codec) => codec,
        }
    }

    /// Whether keys are turned by their row in the block, always.
    pub(crate) fn is_relative(&self) -> bool {
        matches!(self.codec, AnyCodec::Joint(_) | AnyCodec::LowRank(_))
    }

    #[inline]
    pub(crate) fn joint(&self) -> Option<&JointCodec> {
        match &self.codec {
            AnyCodec::Joint(codec) => Some(codec),
            _ => None,
        }
    }

    #[inline]
    pub(crate) fn low_rank(&self) -> Option<&LowRankCodec> {
        match &self.codec {
            AnyCodec::LowRank(codec) => Some(codec),
            _ => None,
        }
    }
}

/// How one layer is stored.
#[derive(Debug)]
pub(crate) struct LayerFormat {
    /// KV heads in a block; their table entries name the same slot.
    pub(crate) heads: usize,
    /// Keys and values of every head group.
    pub(crate) groups: Vec<[GroupPart; 2]>,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Format {
    pub(crate) kind: FormatKind,
    /// Whether pressure may change blocks of it, which is for recipes to allow.
    on_ladder: bool,
    /// What pressure turns it into.
    pub(crate) lower: Option<FormatId>,
    pub(crate) layers: Vec<LayerFormat>,
    /// Slots of one block of tokens over all layers, by class.
    pub(crate) slots: Vec<(ClassId, usize)>,
}

impl Format {
    /// Slots of one block of tokens, of the layers that store their own.
    pub(crate) fn slots_of(&self, owners: Option<&Owners>) -> Vec<(ClassId, usize)> {
        let Some(owners) = owners else { return self.slots.clone() };
        let mut slots = Vec::new();
        let own = self.layers.iter().enumerate().filter(|(layer, _)| owners[*layer] == *layer);
        for part in own.flat_map(|(_, l)| l.groups.iter().flatten()) {
            add_class(&mut slots, part.class, 1);
        }
        slots
    }

    /// Key and value parts in the order of their slots: by layer, then head group.
    pub(crate) fn parts(&self) -> impl Iterator<Item = &GroupPart> {
        self.layers.iter().flat_map(|l| &l.groups).flatten()
    }
}

/// Most formats with matrices of their own. Clients bring recipes.
const MOST_PROJECTIONS: usize = 16;

/// By layer, head group and part.
type Bases = Vec<Vec<[Arc<Basis>; 2]>>;

/// All formats of a cache.
#[derive(Debug, Default)]
pub(crate) struct Formats {
    formats: Vec<Format>,
    /// Bases by layer, head group and part; made once, for all rates.
    bases: Bases,
    /// The same for some channels of keys only.
    narrow_bases: Vec<(Think, Bases)>,
}

/// What formats are made for.
#[derive(Clone, Copy)]
pub(crate) struct Shapes<'a> {
    pub(crate) geometry: &'a Geometry,
    pub(crate) frame: &'a Frame,
    pub(crate) statistics: Option<&'a Statistics>,
    pub(crate) tables: &'a Tables,
}

impl Formats {
    #[inline]
    pub(crate) fn get(&self, id: FormatId) -> &Format {
        &self.formats[usize::from(id.0)]
    }

    /// The format of a codec; of those that pressure may change, or of the others.
    pub(crate) fn find(&self, kind: impl Into<FormatKind>, on_ladder: bool) -> Option<FormatId> {
        let kind = kind.into();
        let found = self.formats.iter().position(|f| f.kind == kind && f.on_ladder == on_ladder);
        found.map(|i| FormatId(i as u8))
    }

    /// Whether pressure may change any.
    pub(crate) fn has_ladder(&self) -> bool {
        self.formats.iter().any(|f| f.lower.is_some())
    }

    /// Classes of blocks that pressure may change, with the class of the same part at the floor.
    pub(crate) fn ladder_classes(&self) -> impl Iterator<Item = (ClassId, ClassId)> {
        let floor = self.formats.iter().find(|f| f.on_ladder && f.lower.is_none());
        let mut classes: Vec<(ClassId, ClassId)> = Vec::new();
        for format in self.formats.iter().filter(|f| f.lower.is_some()) {
            for (part, floor) in format.parts().zip(floor.into_iter().flat_map(Format::parts)) {
                if !classes.iter().any(|(class, _)| *class == part.class) {
                    classes.push((part.class, floor.class));
                }
            }
        }
        classes.into_iter()
    }

    /// Makes the formats of a ladder, best first, each naming the next.
    ///
    /// # Errors
    /// As [`Self::prepare`].
    pub(crate) fn prepare_ladder(
        &mut self,
        kinds: &[CodecKind],
        shapes: Shapes<'_>,
        pool: &mut BlockPool,
    ) -> Result<()> {
        let mut lower = None;
        for kind in kinds.iter().rev() {
            let id = self.prepare(*kind, true, shapes, pool)?;
            self.formats[usize::from(id.0)].lower = lower;
            lower = Some(id);
        }
        Ok(())
    }

    /// Whether the statistics were taken in.
    pub(crate) fn has_bases(&self) -> bool {
        !self.bases.is_empty()
    }

    /// Bytes of the bases in use.
    pub(crate) fn num_bytes(&self) -> usize {
        let narrow = self.narrow_bases.iter().flat_map(|(_, bases)| bases.iter().flatten());
        let keys = narrow.map(|[keys, _]| keys.num_bytes()).sum::<usize>();
        let latents = self.formats.iter().flat_map(Format::parts).filter_map(GroupPart::low_rank);
        let latents = latents.map(LowRankCodec::num_bytes).sum::<usize>();
        latents + keys + self.bases.iter().flatten().flatten().map(|b| b.num_bytes()).sum::<usize>()
    }

    /// The format of a codec, made if it is new.
    ///
    /// # Errors
    /// Statistics that are needed and missing, or heads that the codec cannot hold.
    pub(crate) fn prepare(
        &mut self,
        kind: impl Into<FormatKind>,
        on_ladder: bool,
        shapes: Shapes<'_>,
        pool: &mut BlockPool,
    ) -> Result<FormatId> {
        let kind: FormatKind = kind.into();
        if let Some(found) = self.find(kind, on_ladder) {
            return Ok(found);
        }
        self.check_room(kind)?;
        if self.formats.len() > usize::from(u8::MAX) {
            let what = "256 different codecs in one cache are too many".to_owned();
            return Err(CacheError::Statistics { what });
        }
        let low_rank = match kind.project {
            Some(Project::LowRank(low_rank)) => {
                let table = shapes.tables.low_rank(low_rank.method())?;
                table.check(low_rank.method().name(), shapes.geometry)?;
                Some((table, low_rank.ranks(table, shapes.geometry)?))
            }
            _ => None,
        };
        let layers = shapes.geometry.layers().iter().enumerate();
        let layers: Vec<LayerFormat> = layers
            .map(|(layer, l)| {
                if let Some((table, ranks)) = &low_rank {
                    let turns = shapes.frame.span(l.rope, 0, shapes.geometry.block_size());
                    let turns = turns.map(|(c, s)| Turns { cos: c.to_vec(), sin: s.to_vec() });
                    let codecs =
                        LowRank::codecs(table, layer, &ranks[layer], l.head_dim, turns, kind.codec);
                    return low_rank_layer(layer, l, codecs, kind.codec, shapes, pool);
                }
                match kind.codec {
                    CodecKind::Joint(rate) => {
                        let bases = &self.bases(shapes, kind.think())?[layer];
                        let share = kind.key_channels(l) as f32 / l.head_dim as f32;
                        let codec = |basis: &Arc<Basis>, part: Part| {
                            let share = if part == Part::Keys { share } else { 1.0 };
                            JointCodec::new(Arc::clone(basis), rate.bits(), share, part)
                        };
                        let codecs: Result<Vec<_>> = bases
                            .iter()
                            .map(|[keys, values]| {
                                Ok([codec(keys, Part::Keys)?, codec(values, Part::Values)?])
                            })
                            .collect();
                        joint_layer(l.kv_heads / bases.len(), codecs?, shapes, pool)
                    }
                    CodecKind::Rotation(bits) => {
                        let basis = Arc::new(rotation(layer, l, shapes)?);
                        let codec = || {
                            let bits = vec![bits; basis.width() / SEGMENT];
                            JointCodec::with_bits(Arc::clone(&basis), bits)
                        };
                        let codecs: Result<Vec<_>> =
                            (0..l.kv_heads).map(|_| Ok([codec()?, codec()?])).collect();
                        joint_layer(1, codecs?, shapes, pool)
                    }
                    CodecKind::Gear(gear) => {
                        gear.check(layer, kind.key_channels(l))?;
                        gear.check(layer, l.head_dim)?;
                        let codec = |part| AnyCodec::Gear(GearCodec::new(gear, part));
                        Ok(plain_layer(codec, l, kind, shapes, pool))
                    }
                    _ => {
                        let codec = |part| AnyCodec::Stateless(kind.codec.stateless(part));
                        Ok(plain_layer(codec, l, kind, shapes, pool))
                    }
                }
            })
            .collect::<Result<_>>()?;
        let mut slots = Vec::new();
        for part in layers.iter().flat_map(|l| &l.groups).flatten() {
            add_class(&mut slots, part.class, 1);
        }
        self.formats.push(Format { kind, on_ladder, lower: None, layers, slots });
        Ok(FormatId(self.formats.len() as u8 - 1))
    }

    /// Projections hold matrices of all layers, which are not part of the budget: there is an end to them.
    fn check_room(&self, kind: FormatKind) -> Result<()> {
        let holds = |kind: &FormatKind| match kind.project {
            Some(Project::LowRank(_)) => true,
            Some(Project::Think(_)) => kind.codec.is_joint(),
            None => false,
        };
        let held = self.formats.iter().filter(|f| holds(&f.kind));
        let full = held.count() >= MOST_PROJECTIONS;
        match holds(&kind) && full {
            true => Err(CacheError::TooManyProjections { most: MOST_PROJECTIONS }),
            false => Ok(()),
        }
    }

    /// Those of all channels, or of those of keys that `think` leaves.
    fn bases(&mut self, shapes: Shapes<'_>, think: Option<Think>) -> Result<&Bases> {
        self.all_bases(shapes)?;
        let Some(think) = think else { return Ok(&self.bases) };
        let at = match self.narrow_bases.iter().position(|(t, _)| *t == think) {
            Some(at) => at,
            None => {
                let layers = self.bases.iter().zip(shapes.geometry.layers());
                let bases = layers.map(|(groups, l)| {
                    let narrow = |[keys, values]: &[Arc<Basis>; 2]| {
                        let part = think.statistics(&keys.statistics(), l.head_dim);
                        [Arc::new(key_basis(&part, l, shapes)), Arc::clone(values)]
                    };
                    groups.iter().map(narrow).collect()
                });
                self.narrow_bases.push((think, bases.collect()));
                self.narrow_bases.len() - 1
            }
        };
        Ok(&self.narrow_bases[at].1)
    }

    fn all_bases(&mut self, shapes: Shapes<'_>) -> Result<()> {
        if self.bases.is_empty() {
            let statistics = shapes.statistics.ok_or_else(|| CacheError::Statistics {
                what: "joint recipes need those of the model, and none are loaded".to_owned(),
            })?;
            statistics.check_shapes(shapes.geometry)?;
            let layers = statistics.layers.iter().zip(shapes.geometry.layers());
            self.bases = layers
                .map(|(groups, l)| {
                    let bases = |[keys, values]: &[PartStatistics; 2]| {
                        [
                            Arc::new(key_basis(keys, l, shapes)),
                            Arc::new(Basis::new(values, &values.mean)),
                        ]
                    };
                    groups.iter().map(bases).collect()
                })
                .collect();
        }
        Ok(())
    }
}

fn key_basis(keys: &PartStatistics, l: &LayerGeometry, shapes: Shapes<'_>) -> Basis {
    let means = rotated_means(keys, l, shapes);
    let shape = (l.head_dim, shapes.geometry.block_size());
    Basis::for_keys(keys, &means, shape, fast_pairs(l, shapes))
}

/// The key mean as tokens at every offset see it: `[block_size, width]`.
fn rotated_means(keys: &PartStatistics, l: &LayerGeometry, shapes: Shapes<'_>) -> Vec<f32> {
    let mut means = vec![0.0; shapes.geometry.block_size() * keys.mean.len()];
    for (offset, row) in means.chunks_exact_mut(keys.mean.len()).enumerate() {
        let heads = keys.mean.chunks_exact(l.head_dim).zip(row.chunks_exact_mut(l.head_dim));
        for (mean, row) in heads {
            shapes.frame.rotate(l.rope, offset, mean, row);
        }
    }
    means
}

/// RoPE pairs whose angle differs too much between blocks that are read together for one of them to stand for
/// all.
fn fast_pairs(l: &LayerGeometry, shapes: Shapes<'_>) -> usize {
    /// Most radians by which a query's pair may be off: a few hundredths, and for most pairs far less.
    const MOST_OFF: f32 = 0.04;
    let farthest = (GROUP_TOKENS - shapes.geometry.block_size()) / 2;
    shapes.frame.slow_pairs(l.rope, MOST_OFF / farthest as f32)
}

/// A signed Hadamard turn of one head without any statistics: the control that shows what they are
/// worth. Heads whose size is no power of two are turned in pieces.
fn rotation(layer: usize, l: &LayerGeometry, shapes: Shapes<'_>) -> Result<Basis> {
    group_heads(layer, l)?;
    let dim = l.head_dim;
    let piece = 1 << dim.trailing_zeros();
    let sign = |i: usize| if (i.wrapping_mul(0x9E37_79B9) >> 16) & 1 == 1 { -1.0 } else { 1.0 };
    let entry = |i: usize| {
        let (r, c) = (i / dim, i % dim);
        let odd = ((r % piece) & (c % piece)).count_ones() % 2 == 1;
        let same = if r / piece == c / piece { 1.0 } else { 0.0 };
        same * sign(c) * if odd { -1.0 } else { 1.0 } / (piece as f32).sqrt()
    };
    let part = PartStatistics {
        mean: vec![0.0; dim],
        weights: vec![1.0; dim],
        basis: (0..dim * dim).map(|i| half::f16::from_f32(entry(i))).collect(),
        scales: vec![1.0; dim / SEGMENT],
    };
    let shape = (dim, shapes.geometry.block_size());
    Ok(Basis::for_keys(&part, &part.mean, shape, fast_pairs(l, shapes)))
}

fn joint_layer(
    heads: usize,
    codecs: Vec<[JointCodec; 2]>,
    shapes: Shapes<'_>,
    pool: &mut BlockPool,
) -> Result<LayerFormat> {
    let tokens = shapes.geometry.block_size();
    let groups = codecs.into_iter().map(|pair| {
        pair.map(|codec| {
            let class = pool.class(codec.slot_bytes(tokens, 0));
            let width = codec.basis().width();
            GroupPart { codec: AnyCodec::Joint(codec), class, width }
        })
    });
    Ok(LayerFormat { heads, groups: groups.collect() })
}

/// A layer whose KV heads are projected together.
fn low_rank_layer(
    layer: usize,
    l: &LayerGeometry,
    codecs: [LowRankCodec; 2],
    kind: CodecKind,
    shapes: Shapes<'_>,
    pool: &mut BlockPool,
) -> Result<LayerFormat> {
    if let CodecKind::Gear(gear) = kind {
        for codec in &codecs {
            gear.check(layer, codec.rank())?;
        }
    }
    let (tokens, width) = (shapes.geometry.block_size(), l.kv_heads * l.head_dim);
    let group = codecs.map(|codec| {
        let class = pool.class(codec.slot_bytes(tokens, width));
        GroupPart { codec: AnyCodec::LowRank(codec), class, width }
    });
    Ok(LayerFormat { heads: l.kv_heads, groups: vec![group] })
}

/// A layer of codecs that need nothing but rows of one head.
fn plain_layer(
    codec: impl Fn(Part) -> AnyCodec,
    l: &LayerGeometry,
    kind: FormatKind,
    shapes: Shapes<'_>,
    pool: &mut BlockPool,
) -> LayerFormat {
    let mut part = |part: Part| {
        let width = if part == Part::Keys { kind.key_channels(l) } else { l.head_dim };
        let mut part = GroupPart { codec: codec(part), class: ClassId::default(), width };
        let bytes = part.codec().slot_bytes(shapes.geometry.block_size(), width);
        part.class = pool.class(bytes);
        part
    };
    let groups = (0..l.kv_heads).map(|_| [part(Part::Keys), part(Part::Values)]).collect();
    LayerFormat { heads: 1, groups }
}

/// Adds to the count of a class.
pub(crate) fn add_class(counts: &mut Vec<(ClassId, usize)>, class: ClassId, n: usize) {
    match counts.iter_mut().find(|(c, _)| *c == class) {
        Some((_, count)) => *count += n,
        None => counts.push((class, n)),
    }
}
