//! Sums over tokens that are gone: what [LESS](super::Less) remembers of them.

use std::sync::Arc;

use super::policy::Choice;
use crate::error::Result;
use crate::kv_cache::KvCache;
use crate::offline::{FEATURES, Features, LessTable};
use crate::sequence::Sequence;

/// Rows whose features are made at a time.
const ROWS: usize = 128;

/// Of one KV head: for every feature the sum of values, weighted by it, and of its weights. Empty for one that forgets nothing.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct State {
    sums: Vec<f32>, // [FEATURES, head_dim + 1]
}

impl State {
    /// Bytes of one.
    pub(super) const fn num_bytes(dim: usize) -> usize {
        4 * FEATURES * (dim + 1)
    }

    /// Remembers rows: `keys`, turned by their positions, and `values`, `[n, head_dim]` each. O(n · hidden · head_dim).
    fn add(
        &mut self,
        of_keys: &Features,
        keys: &[f32],
        values: &[f32],
        scratch: &mut FeatureScratch,
    ) {
        let dim = of_keys.dim;
        self.sums.resize(FEATURES * (dim + 1), 0.0);
        let FeatureScratch { hidden, features } = scratch;
        let rows = ROWS.min(keys.len() / dim);
        hidden.resize(rows * of_keys.hidden, 0.0);
        features.resize(rows * FEATURES, 0.0);
        for (keys, values) in keys.chunks(ROWS * dim).zip(values.chunks(ROWS * dim)) {
            of_keys.of(keys, hidden, features);
            for (value, features) in values.chunks_exact(dim).zip(features.chunks_exact(FEATURES)) {
                for (feature, sums) in features.iter().zip(self.sums.chunks_exact_mut(dim + 1)) {
                    sums.iter_mut().zip(value).for_each(|(sum, v)| *sum += feature * v);
                    sums[dim] += feature;
                }
            }
        }
    }

    /// What a query sees of it: writes the mean of the values, `[head_dim]`, and returns the weight of all of them, 0 if there
    /// are none. `features`: of the query.
    #[inline]
    pub(crate) fn read(&self, features: &[f32], out: &mut [f32]) -> f32 {
        let mut weight = 0.0;
        out.fill(0.0);
        for (feature, sums) in features.iter().zip(self.sums.chunks_exact(out.len() + 1)) {
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out += feature * sum);
            weight += feature * sums[out.len()];
        }
        if weight > 0.0 {
            let by = 1.0 / weight;
            out.iter_mut().for_each(|x| *x *= by);
        }
        weight
    }
}

/// What features are made in.
#[derive(Debug, Default)]
struct FeatureScratch {
    hidden: Vec<f32>,   // [n, hidden]
    features: Vec<f32>, // [n, FEATURES]
}

/// Those of a sequence.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) table: Arc<LessTable>,
    /// By group.
    states: Vec<State>,
    /// First position that is not in them, where tokens go by their position.
    next: usize,
    scratch: FeatureScratch,
    /// A key and a value on their way.
    pub(super) rows: [Vec<f32>; 2],
}

impl Memory {
    /// Of a prompt's `states`; the oldest token that still is to go is at position `next`.
    pub(super) fn new(table: Arc<LessTable>, states: Vec<State>, next: usize) -> Self {
        Self { table, states, next, scratch: FeatureScratch::default(), rows: Default::default() }
    }

    /// Of one KV head, if it has any.
    #[inline]
    pub(crate) fn state(&self, group: usize) -> Option<&State> {
        self.states.get(group).filter(|state| !state.sums.is_empty())
    }

    /// Bytes of the sums.
    pub(super) fn num_bytes(&self) -> usize {
        self.states.iter().map(|state| 4 * state.sums.len()).sum()
    }
}

impl KvCache {
    /// What is remembered of a layer's prompt, by KV head, if the policy does: the tokens that it did not choose.
    pub(super) fn states_of(
        &self,
        sequence: &Sequence,
        layer: usize,
        choice: &Choice,
    ) -> Result<Vec<State>> {
        if !sequence.recipe.remembers() || self.geometry.layers()[layer].window.is_some() {
            return Ok(Vec::new());
        }
        let table = self.tables.less()?;
        let Some(networks) = &table.layers[layer] else { return Ok(Vec::new()) };
        let heads = choice.heads.iter().zip(&networks.keys).enumerate();
        let state = |(head, (kept, of_keys)): (usize, (&Vec<u32>, &Features))| {
            let mut gone = vec![true; sequence.num_tokens];
            kept.iter().for_each(|position| gone[*position as usize] = false);
            let gone: Vec<u32> =
                (0..sequence.num_tokens as u32).filter(|p| gone[*p as usize]).collect();
            let [keys, values] = self.gather_chosen(sequence, layer, head, &gone);
            // The sums exist even if nothing went yet, so that their bytes are counted once.
            let mut state = State::default();
            state.add(of_keys, &keys, &values, &mut FeatureScratch::default());
            state
        };
        Ok(heads.map(state).collect())
    }

    /// Remembers the tokens that left the window of a policy that does not score them.
    pub(super) fn remember_leaving(&mut self, sequence: &mut Sequence) -> Result<()> {
        let Some(recent) = sequence.kept.recent.filter(|recent| !recent.scored) else {
            return Ok(());
        };
        let Some(mut memory) = sequence.kept.memory.take() else { return Ok(()) };
        let oldest = (sequence.num_tokens + 1).saturating_sub(recent.window);
        for position in memory.next..oldest {
            for group in 0..memory.states.len() {
                if memory.state(group).is_some() {
                    self.remember(sequence, &mut memory, group, position)?;
                }
            }
        }
        memory.next = memory.next.max(oldest);
        sequence.kept.memory = Some(memory);
        Ok(())
    }

    /// Remembers the token at `position`, which a group's window holds as it was written.
    pub(super) fn remember(
        &self,
        sequence: &Sequence,
        memory: &mut Memory,
        group: usize,
        position: usize,
    ) -> Result<()> {
        let (layer, _) = self.geometry.layer_of(group);
        let dim = self.geometry.layers()[layer].head_dim;
        for (part, row) in memory.rows.iter_mut().enumerate() {
            row.resize(dim, 0.0);
            self.read_row(sequence, group, part, position, row)?;
        }
        self.remember_rows(memory, group);
        Ok(())
    }

    /// Remembers what is in `memory.rows`: a key, turned by its position, and its value.
    pub(super) fn remember_rows(&self, memory: &mut Memory, group: usize) {
        let (layer, head) = self.geometry.layer_of(group);
        let Memory { table, states, scratch, rows: [key, value], .. } = memory;
        if let (Some(networks), Some(state)) = (&table.layers[layer], states.get_mut(group)) {
            state.add(&networks.keys[head], key, value, scratch);
        }
    }
}
