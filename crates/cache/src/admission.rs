//! What fits: estimates for admission, and what a sequence takes alone.

use crate::append::tail_capacity;
use crate::config::Recipe;
use crate::format::{FormatId, RecipeFormats, add_class};
use crate::kv_cache::KvCache;
use crate::pool::ClassId;
use crate::prefix::PrefixCache;

impl KvCache {
    /// Bytes of the budget that one sequence of `tokens` tokens, stored by a prepared recipe, takes when it
    /// is alone. What is larger than the budget can never run.
    pub fn bytes_alone(&self, recipe: Recipe, tokens: usize) -> usize {
        let blocks = self.geometry.blocks_for(tokens);
        let (slots, chosen) = self.slots_for(recipe, 0, blocks);
        let metadata = blocks * self.metadata_per_block() + chosen;
        self.budget_bytes - self.pool.budget_bytes() + self.pool.bytes_alone(&slots, metadata)
    }

    /// Says that no step writes more than `tokens` tokens of one sequence, so that a long sequence never
    /// holds more unsealed blocks than that. Unlimited until it is said.
    pub fn set_max_chunk(&mut self, tokens: usize) {
        self.max_chunk = tokens;
    }

    /// Slots of blocks `first .. blocks` of a sequence while the last of them are being written, and the metadata of
    /// a policy's choice.
    fn slots_for(
        &self,
        recipe: Recipe,
        first: usize,
        blocks: usize,
    ) -> (Vec<(ClassId, usize)>, usize) {
        // Formats of the default recipe exist always, others once somebody asked for them.
        let formats = self.formats_of(recipe).or_else(|_| self.formats_of(self.recipe));
        let Ok(formats) = formats else { return (Vec::new(), 0) };
        let RecipeFormats { tail, sealed, narrow } = formats;
        let owners = self.owners_of(recipe).ok().flatten();
        let owns = |group: usize| match &owners {
            Some(owners) => {
                let layer = self.geometry.layer_of(group).0;
                owners[layer] == layer
            }
            None => true,
        };
        let new = blocks.saturating_sub(first);
        // A chunk may begin and end inside a block.
        let open = new.min(self.geometry.blocks_for(self.max_chunk).saturating_add(1));
        let mut slots = Vec::new();
        let head = usize::from(first == 0 && new > 0);
        // Beside whole blocks: a tail of every smaller size, for one that moves from one to the next while
        // another begins, and the values that a residual window keeps.
        let log = |tokens: usize| tokens.trailing_zeros() as usize;
        let whole = log(self.geometry.block_size());
        let smallest = log(tail_capacity(1, self.geometry.block_size()));
        // A prompt that a policy will choose from is stored as it is written, all of it the worst case.
        let chooses = recipe.policy();
        let mut metadata = 0;
        if let Some(policy) = chooses {
            let prompt = blocks * self.geometry.block_size();
            metadata = self.column_bytes(recipe, prompt);
            let room = self.room_for_choice(policy, prompt, formats, owners.as_ref());
            metadata += room.metadata;
            for class in room.classes {
                add_class(&mut slots, class, 1);
            }
        }
        let coded = sealed;
        let sealed = if chooses.is_some() { [tail; 2] } else { sealed };
        let kept = coded != [tail; 2] && recipe.keeps_residual();
        let tails = self.tail_classes(tail).iter().enumerate();
        for (_, classes) in tails.filter(|(group, _)| new > 0 && owns(*group)) {
            for class in &classes[smallest..whole] {
                add_class(&mut slots, *class, 2);
            }
            if kept || chooses.is_some() {
                add_class(&mut slots, classes[whole], 2);
            }
        }
        let mut add = |format: FormatId, blocks: usize| {
            for (class, n) in self.formats.get(format).slots_of(owners.as_ref()) {
                add_class(&mut slots, class, n * blocks);
            }
        };
        if sealed == [tail; 2] {
            add(tail, new);
            // What is left over of a choice may be of any size, and what follows it begins a block.
            if chooses.is_some() && new > 0 {
                narrow.into_iter().for_each(|narrow| add(narrow, 1));
                add(coded[0], 1);
                add(coded[1], 1);
            }
        } else {
            add(tail, open);
            add(sealed[0], head);
            add(sealed[1], new - head);
        }
        (slots, metadata)
    }

    /// Table entries, and the prefix cache's copy of them.
    fn metadata_per_block(&self) -> usize {
        let node = PrefixCache::node_bytes(2 * self.geometry.num_groups());
        self.geometry.table_bytes_per_block() + if self.prefix_caching { node } else { 0 }
    }

    /// Tokens of the longest known prefix, and what evicting its unused blocks would free.
    fn lookup_prefix(&self, recipe: Recipe, salt: Option<&str>, tokens: &[u32]) -> (usize, usize) {
        let block_size = self.geometry.block_size();
        let seen = recipe.observed_queries(tokens.len()).max(1);
        let usable = tokens.len().saturating_sub(seen) / block_size;
        let mut chain = self.root(recipe.before_choice(), salt);
        let (mut found, mut evictable) = (0, 0);
        for block in tokens.chunks_exact(block_size).take(usable) {
            chain = chain.child(block);
            let Some(node) = self.prefix.find(&chain) else { break };
            found += block_size;
            evictable += self.prefix.evictable_bytes_of(node, &self.pool);
        }
        (found, evictable)
    }

    /// Whether a new sequence of `tokens`, and `headroom` tokens more, would fit: with `reuse` it takes
    /// known prefixes from the cache; other unused prefixes count as room. An estimate for admission
    /// that changes nothing: [`Self::reserve`] decides. O(tokens).
    pub fn fits_new(
        &self,
        recipe: Recipe,
        salt: Option<&str>,
        tokens: &[u32],
        reuse: bool,
        headroom: usize,
    ) -> bool {
        let (found, kept) = match reuse && self.prefix_caching {
            true => self.lookup_prefix(recipe, salt, tokens),
            false => (0, 0),
        };
        let all = self.geometry.blocks_for(tokens.len() + headroom);
        let first = found / self.geometry.block_size();
        let blocks = all - first;
        let (slots, chosen) = self.slots_for(recipe, first, all);
        let metadata = blocks * self.metadata_per_block()
            + first * self.geometry.table_bytes_per_block()
            + chosen;
        if self.pool.can_allocate(&slots, metadata) {
            return true;
        }
        let room = self.prefix.evictable_bytes(&self.pool).saturating_sub(kept);
        let room = room + self.sharing_index_bytes() + self.lowerable_bytes();
        let pinned = self.pool.reserved_bytes().saturating_sub(room);
        pinned + self.pool.bytes_alone(&slots, metadata) <= self.pool.budget_bytes()
    }
}
