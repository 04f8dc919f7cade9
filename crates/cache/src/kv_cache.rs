//! The cache of one model: sequences append, seal, read and free through it.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use kvasir_kernels::{AlignedBytes, Products, RopeTable};

use crate::config::{KeyFrame, Recipe};
use crate::error::{CacheError, Result};
use crate::format::{FormatId, FormatKind, Formats, RecipeFormats, Shapes};
use crate::frame::Frame;
use crate::geometry::Geometry;
use crate::offline::Tables;
use crate::pool::{BlockPool, ClassId};
use crate::prefix::{BlockHash, PrefixCache};
use crate::project::{KvSharer, Owners};
use crate::seal::SharingCounts;
use crate::select::Selection;
use crate::sequence::{Sequence, SequenceId};
use crate::sharing::online::SharingIndex;
use crate::sharing::sketch::SketchIndex;
use crate::sharing::{Sharing, SharingMode};
use crate::stats::Statistics;

/// What a [`KvCache`] is made of.
#[derive(Debug)]
pub struct CacheConfig {
    /// Shapes of the model and the block size.
    pub geometry: Geometry,
    /// The model's RoPE tables, as [`crate::LayerGeometry::rope`] numbers them.
    pub ropes: Vec<RopeTable>,
    /// How sequences are stored that do not say otherwise.
    pub recipe: Recipe,
    /// What joint recipes code against. Their bytes are taken from the budget.
    pub statistics: Option<Arc<Statistics>>,
    /// What methods need that say so ([`Recipe::needs_tables`]).
    pub tables: Tables,
    /// Which blocks are shared beside equal prefixes.
    pub sharing: Sharing,
    /// What products of attention are of; [`Recipe::F32`] always has exact ones.
    pub products: Products,
    /// Budget of the block pool.
    pub budget_bytes: usize,
    /// Whether equal prefixes share blocks. Off with [`SharingMode::Tree`], which averages blocks: the
    /// prefix cache promises what a prompt would compute.
    pub prefix_caching: bool,
}

/// Recipes that a cache takes, each with two codecs at most: fewer than there are names for formats.
const MOST_RECIPES: usize = 100;

/// See the crate's documentation.
#[derive(Debug)]
pub struct KvCache {
    pub(crate) geometry: Geometry,
    pub(crate) frame: Frame,
    pub(crate) pool: BlockPool,
    pub(crate) recipe: Recipe,
    pub(crate) products: Products,
    pub(crate) prefix: PrefixCache,
    pub(crate) prefix_caching: bool,
    pub(crate) formats: Formats,
    /// Those that were prepared.
    pub(crate) recipes: Vec<Recipe>,
    pub(crate) tables: Tables,
    /// Until the first joint recipe takes what it needs of them.
    statistics: Option<Arc<Statistics>>,
    fingerprint: [u8; 32],
    pub(crate) budget_bytes: usize,
    /// Most tokens written between two commits.
    pub(crate) max_chunk: usize,
    pub(crate) sharing: Sharing,
    pub(crate) sharing_index: SharingIndex,
    pub(crate) sketch_index: SketchIndex,
    pub(crate) sharing_counts: SharingCounts,
    /// Classes of tails by format: `[groups][log2 of their tokens]`.
    tail_classes: Vec<(FormatId, Vec<[ClassId; 7]>)>,
    /// Slots of a block while it is sealed.
    pub(crate) sealed_bytes: AlignedBytes,
    /// One slot while its tail grows.
    pub(crate) slot_bytes: Vec<u8>,
    /// Rows that leave a window of exact values: `[block_size, head_dim]`.
    pub(crate) residual_rows: Vec<f32>,
    /// Blocks being written that hold clamped values: they are not coded.
    pub(crate) clamped_blocks: Vec<(SequenceId, usize)>,
    pub(crate) sequences: Vec<Option<Sequence>>,
    pub(crate) generations: Vec<u32>,
    /// One rotated key, or one value, while it is written.
    pub(crate) row: Vec<f32>,
    pub(crate) num_clamped: u64,
    pub(crate) num_lowered: u64,
    pub(crate) kept_shares: [u64; 10],
    pub(crate) seal_nanos: u64,
    pub(crate) recode_nanos: u64,
    pub(crate) attention_nanos: AtomicU64,
    pub(crate) decode_nanos: AtomicU64,
}

impl KvCache {
    /// An empty cache.
    ///
    /// # Errors
    /// A layer that names a RoPE table that is not there; then as [`Self::prepare`].
    pub fn new(config: CacheConfig) -> Result<Self> {
        let CacheConfig {
            geometry,
            ropes,
            recipe,
            statistics,
            tables,
            sharing,
            products,
            budget_bytes,
            prefix_caching,
        } = config;
        let mut frame = Frame::new(ropes);
        frame.grow(geometry.block_size());
        for (layer, l) in geometry.layers().iter().enumerate() {
            if let Some(rope) = l.rope.filter(|r| *r >= frame.num_tables()) {
                let what = format!("RoPE table {rope} of {} does not exist", frame.num_tables());
                return Err(CacheError::Geometry { layer, what });
            }
        }
        let rows = |l: &crate::geometry::LayerGeometry| geometry.block_size() * l.head_dim;
        let head_rows = geometry.layers().iter().map(rows).max().unwrap_or(0);
        let layer_rows = geometry.layers().iter().map(|l| rows(l) * l.kv_heads).max().unwrap_or(0);
        let widest = geometry.block_size() * crate::stats::MAX_WIDTH;
        // A sequence may ask for f32 whatever the default is.
        let mut slot_bytes = head_rows * 4;
        if statistics.is_some() {
            slot_bytes = slot_bytes.max(widest.min(layer_rows));
        }
        if !tables.is_empty() {
            // Latents of all heads in one slot, in f32 at most.
            slot_bytes = slot_bytes.max(layer_rows * 4);
        }
        let row = vec![0.0; geometry.layers().iter().map(|l| l.head_dim).max().unwrap_or(0)];
        let statistics_bytes = statistics.as_ref().map_or(0, |s| s.num_bytes());
        let mut cache = Self {
            pool: BlockPool::new(budget_bytes.saturating_sub(statistics_bytes), slot_bytes),
            sharing,
            sharing_index: SharingIndex::default(),
            sketch_index: SketchIndex::default(),
            sharing_counts: SharingCounts::default(),
            tail_classes: Vec::new(),
            sealed_bytes: AlignedBytes::zeroed(0),
            slot_bytes: Vec::new(),
            residual_rows: Vec::new(),
            clamped_blocks: Vec::new(),
            geometry,
            frame,
            recipe,
            products,
            prefix: PrefixCache::default(),
            prefix_caching: prefix_caching && sharing.mode != SharingMode::Tree,
            formats: Formats::default(),
            recipes: Vec::new(),
            fingerprint: statistics.as_ref().map(|s| s.fingerprint).unwrap_or_default(),
            statistics,
            tables,
            budget_bytes,
            max_chunk: usize::MAX,
            sequences: Vec::new(),
            generations: Vec::new(),
            row,
            num_clamped: 0,
            num_lowered: 0,
            kept_shares: [0; 10],
            seal_nanos: 0,
            recode_nanos: 0,
            attention_nanos: AtomicU64::new(0),
            decode_nanos: AtomicU64::new(0),
        };
        cache.prepare(recipe)?;
        Ok(cache)
    }

    /// Makes the formats of a recipe: those of its tail, its first block and the others.
    ///
    /// # Errors
    /// [`CacheError::Statistics`] if the recipe needs some that are missing, [`CacheError::Geometry`] for
    /// heads that it cannot hold, [`CacheError::TooManyRecipes`], [`CacheError::TreeRecipe`] for a coded one that the tree would fuse.
    pub fn prepare(&mut self, recipe: Recipe) -> Result<()> {
        self.prepare_formats(recipe).map(drop)
    }

    pub(crate) fn prepare_formats(&mut self, recipe: Recipe) -> Result<RecipeFormats> {
        let known = self.recipes.contains(&recipe);
        if !known && self.recipes.len() >= MOST_RECIPES {
            return Err(CacheError::TooManyRecipes { most: MOST_RECIPES });
        }
        // A mean of coded blocks would have to be coded again.
        let plain =
            !recipe.is_coded() && !recipe.waits_for_prompt() && recipe.kv_sharer().is_none();
        if self.sharing.mode == SharingMode::Tree && !plain {
            return Err(CacheError::TreeRecipe { recipe: recipe.to_string() });
        }
        self.owners_of(recipe)?;
        if recipe.remembers() {
            self.tables.less()?;
        }
        if recipe.needs_prompt_nll() {
            self.tables.compactor()?;
        }
        let shapes = Shapes {
            geometry: &self.geometry,
            frame: &self.frame,
            statistics: self.statistics.as_deref(),
            tables: &self.tables,
        };
        self.formats.prepare_ladder(recipe.ladder(), shapes, &mut self.pool)?;
        let ladder = !recipe.ladder().is_empty();
        let mut prepare = |kind, on| self.formats.prepare(kind, on, shapes, &mut self.pool);
        let tail = prepare(recipe.tail_kind().into(), false)?;
        let sealed =
            [prepare(recipe.sealed_kind(0), false)?, prepare(recipe.sealed_kind(1), ladder)?];
        let narrow = recipe.narrow_kind().map(|kind| prepare(kind, false)).transpose()?;
        if !self.tail_classes.iter().any(|(format, _)| *format == tail) {
            let codec = recipe.tail();
            let groups = self.geometry.groups().map(|(_, l)| {
                let most = self.geometry.block_size();
                let bytes = |log: usize| codec.slot_bytes(most.min(1 << log), l.head_dim);
                std::array::from_fn(|log| self.pool.class(bytes(log)))
            });
            let classes = groups.collect();
            self.tail_classes.push((tail, classes));
        }
        if self.formats.has_bases() {
            self.statistics = None;
        }
        if !known {
            self.recipes.push(recipe);
        }
        Ok(RecipeFormats { tail, sealed, narrow })
    }

    /// Whose keys and values every layer of a recipe's sequences reads, if not its own.
    pub(crate) fn owners_of(&self, recipe: Recipe) -> Result<Option<Owners>> {
        let owners = |sharer: KvSharer| sharer.owners(self.tables.kv_sharer()?, &self.geometry);
        recipe.kv_sharer().map(owners).transpose()
    }

    /// Classes of tails, `[groups][log2 of their tokens]`.
    pub(crate) fn tail_classes(&self, format: FormatId) -> &[[ClassId; 7]] {
        let found = self.tail_classes.iter().find(|(f, _)| *f == format);
        found.map_or(&[], |(_, classes)| classes)
    }

    /// The formats of a recipe that was prepared.
    pub(crate) fn formats_of(&self, recipe: Recipe) -> Result<RecipeFormats> {
        let ladder = !recipe.ladder().is_empty();
        let find = |kind: FormatKind, on| {
            self.formats.find(kind, on).ok_or_else(|| CacheError::Integrity {
                what: format!("recipe {recipe} was not prepared"),
            })
        };
        let sealed = [find(recipe.sealed_kind(0), false)?, find(recipe.sealed_kind(1), ladder)?];
        let narrow = recipe.narrow_kind().map(|kind| find(kind, false)).transpose()?;
        Ok(RecipeFormats { tail: find(recipe.tail_kind().into(), false)?, sealed, narrow })
    }

    /// Shapes.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// How sequences are stored that do not say otherwise.
    pub fn recipe(&self) -> Recipe {
        self.recipe
    }

    /// Adds an empty sequence, stored by the default recipe. `salt` separates tenants: blocks are shared
    /// within equal salts only.
    ///
    /// # Errors
    /// As [`Self::add_sequence_with`]; none if the default recipe is what it was.
    pub fn add_sequence(&mut self, salt: Option<&str>) -> Result<SequenceId> {
        self.add_sequence_with(self.recipe, salt)
    }

    /// Adds an empty sequence that is stored by `recipe`.
    ///
    /// # Errors
    /// As [`Self::prepare`].
    pub fn add_sequence_with(&mut self, recipe: Recipe, salt: Option<&str>) -> Result<SequenceId> {
        let formats = self.prepare_formats(recipe)?;
        let RecipeFormats { tail, sealed, .. } = formats;
        let tenant = self.root(recipe, salt);
        // The tree joins blocks of any two positions, as the paper does: their keys must be in one frame.
        let recipe = match self.sharing.mode {
            SharingMode::Tree => recipe.in_frame(KeyFrame::Absolute),
            _ => recipe,
        };
        let owners = self.owners_of(recipe)?;
        let groups = self.geometry.num_groups();
        let mut sequence = Sequence::new(groups, recipe, tail, sealed, tenant, self.prefix_caching);
        sequence.owners = owners;
        if recipe.waits_for_prompt() {
            // Until the policy has chosen, the prompt is stored as f16 does, and shares its prefixes.
            sequence.sealed_formats = [tail; 2];
            sequence.selection = Some(Box::new(Selection::new(formats)));
            let root = self.root(recipe.before_choice(), salt);
            sequence.chain = sequence.chain.map(|_| root);
        }
        let index = match self.sequences.iter().position(Option::is_none) {
            Some(index) => {
                self.sequences[index] = Some(sequence);
                index
            }
            None => {
                self.sequences.push(Some(sequence));
                self.generations.push(0);
                self.sequences.len() - 1
            }
        };
        Ok(SequenceId { index: index as u32, generation: self.generations[index] })
    }

    /// The empty prefix of a tenant: blocks under it have the same recipe and the same statistics.
    pub(crate) fn root(&self, recipe: Recipe, salt: Option<&str>) -> BlockHash {
        let fingerprint = if recipe.needs_statistics() { self.fingerprint } else { [0; 32] };
        BlockHash::root(salt, &recipe.to_string(), self.geometry.block_size(), &fingerprint)
    }

    pub(crate) fn sequence(&self, id: SequenceId) -> Result<&Sequence> {
        find(&self.sequences, &self.generations, id)
    }

    /// Takes a sequence out while it is worked on; callers put it back.
    fn take(&mut self, id: SequenceId) -> Result<Sequence> {
        self.sequence(id)?;
        self.sequences[id.index as usize]
            .take()
            .ok_or_else(|| CacheError::UnknownSequence { id: id.to_string() })
    }

    pub(crate) fn with_sequence<T>(
        &mut self,
        id: SequenceId,
        work: impl FnOnce(&mut Self, &mut Sequence) -> Result<T>,
    ) -> Result<T> {
        let mut sequence = self.take(id)?;
        let result = work(self, &mut sequence);
        self.sequences[id.index as usize] = Some(sequence);
        result
    }

    /// Committed tokens of a sequence.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`].
    pub fn num_tokens(&self, id: SequenceId) -> Result<usize> {
        Ok(self.sequence(id)?.num_tokens)
    }

    /// Gives an empty sequence the cached blocks of the longest known prefix of `tokens`, but never all
    /// of them: at least one token is left to compute. Returns the tokens found.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`].
    pub fn match_prefix(&mut self, id: SequenceId, tokens: &[u32]) -> Result<usize> {
        let block_size = self.geometry.block_size();
        self.with_sequence(id, |cache, sequence| {
            let Some(mut chain) = sequence.chain.filter(|_| sequence.num_blocks() == 0) else {
                return Ok(0);
            };
            let usable = cache.matchable(sequence, tokens.len()) / block_size;
            for block in tokens.chunks_exact(block_size).take(usable) {
                let hash = chain.child(block);
                let Some(node) = cache.prefix.find(&hash) else { break };
                // Pinned first, so that making room for the table cannot evict what was found.
                cache.prefix.acquire(node, &mut cache.pool)?;
                let table_bytes = cache.geometry.table_bytes_per_block();
                if !cache.prefix.charge(table_bytes, &mut cache.pool)? {
                    cache.prefix.release(node, &mut cache.pool)?;
                    break;
                }
                let entries = cache.prefix.entries(node)?;
                let own: Vec<usize> = own_groups(&cache.geometry, sequence).collect();
                for (group, pair) in own.into_iter().zip(entries.chunks_exact(2)) {
                    let table = &mut sequence.tables[group];
                    table.keys.push(pair[0]);
                    table.values.push(pair[1]);
                }
                sequence.nodes.push(node);
                sequence.num_sealed += 1;
                chain = hash;
            }
            sequence.chain = Some(chain);
            sequence.num_tokens = sequence.num_sealed * block_size;
            sequence.num_reserved = sequence.num_tokens;
            cache.frame.grow(sequence.num_tokens + 1);
            Ok(sequence.num_tokens)
        })
    }

    /// Lets blocks with values that were no numbers be coded like all others. Kept as they are, they take more
    /// than [`Self::bytes_alone`] says: for sequences that found no room once.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`].
    pub fn code_odd_blocks(&mut self, id: SequenceId) -> Result<()> {
        self.with_sequence(id, |_, sequence| {
            sequence.codes_odd_blocks = true;
            Ok(())
        })
    }

    /// Whether equal prefixes share blocks.
    pub fn prefix_caching(&self) -> bool {
        self.prefix_caching
    }

    /// Frees a sequence. Its sealed blocks stay in the prefix cache until room is needed.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`].
    pub fn remove_sequence(&mut self, id: SequenceId) -> Result<()> {
        let sequence = self.take(id)?;
        self.generations[id.index as usize] += 1;
        self.pool.discharge_metadata(sequence.num_held() * self.geometry.table_bytes_per_block());
        self.pool.discharge_metadata(sequence.metadata_bytes());
        let entries = sequence.entries().map(|e| e.slot);
        for slot in entries.chain(sequence.slots_to_come()) {
            self.pool.release(slot)?;
        }
        // The deepest block leaves first, so that it is evicted first.
        for node in sequence.nodes.iter().rev() {
            self.prefix.leave(*node, &mut self.pool)?;
        }
        self.clamped_blocks.retain(|(owner, _)| *owner != id);
        Ok(())
    }

    /// Evicts every unused prefix; returns the bytes freed.
    ///
    /// # Errors
    /// [`CacheError::Integrity`] if the books are wrong.
    pub fn reset_prefix_cache(&mut self) -> Result<usize> {
        let before = self.pool.physical_bytes();
        while self.prefix.evict_one(&mut self.pool)? {}
        self.sharing_index.sweep(&mut self.pool);
        self.sketch_index.sweep(&mut self.pool);
        Ok(before - self.pool.physical_bytes())
    }
}

/// Groups whose tables a sequence fills, in order.
pub(crate) fn own_groups<'a>(
    geometry: &'a Geometry,
    sequence: &'a Sequence,
) -> impl Iterator<Item = usize> + 'a {
    (0..sequence.tables.len()).filter(|group| sequence.owns_group(geometry, *group))
}

/// The sequence of an id; a function of fields, so that others stay free to borrow.
pub(crate) fn find<'a>(
    sequences: &'a [Option<Sequence>],
    generations: &[u32],
    id: SequenceId,
) -> Result<&'a Sequence> {
    let index = id.index as usize;
    let found = sequences.get(index).and_then(Option::as_ref);
    found
        .filter(|_| generations.get(index) == Some(&id.generation))
        .ok_or_else(|| CacheError::UnknownSequence { id: id.to_string() })
}
