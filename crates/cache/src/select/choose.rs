//! What a policy chooses for every layer, from what was seen of the prompt and from its keys.

use std::ops::Range;

use rayon::prelude::*;

use super::Budget;
use super::observe::Selection;
use super::policy::{Choice, LayerView, Policy, PromptRows};
use crate::error::{CacheError, Result};
use crate::kv_cache::KvCache;
use crate::sequence::Sequence;

/// The prompt of a sequence in one layer.
pub(super) struct LayerRows<'a> {
    pub(super) cache: &'a KvCache,
    pub(super) sequence: &'a Sequence,
    pub(super) layer: usize,
}

impl PromptRows for LayerRows<'_> {
    fn dim(&self) -> usize {
        self.cache.geometry.layers()[self.layer].head_dim
    }

    fn plain_keys(&self, kv_head: usize, tokens: Range<usize>) -> (Vec<f32>, Vec<f32>) {
        let l = &self.cache.geometry.layers()[self.layer];
        let positions: Vec<u32> = tokens.map(|p| p as u32).collect();
        let [turned, values] =
            self.cache.gather_chosen(self.sequence, self.layer, kv_head, &positions);
        let mut keys = vec![0.0; turned.len()];
        let rows = turned.chunks_exact(l.head_dim).zip(keys.chunks_exact_mut(l.head_dim));
        for (position, (turned, key)) in positions.iter().zip(rows) {
            self.cache.frame.rotate_back(l.rope, *position as usize, turned, key);
        }
        let length = |value: &[f32]| value.iter().map(|x| x * x).sum::<f32>().sqrt();
        (keys, values.chunks_exact(l.head_dim).map(length).collect())
    }
}

impl KvCache {
    /// Notes how much of a prompt stays, over the layers that attend to everything.
    pub(super) fn count_kept(&mut self, choices: &[Choice], prompt: usize) {
        let layers = choices.iter().zip(self.geometry.layers());
        // A layer that reads another's has no choice.
        let layers = layers.filter(|(choice, l)| l.window.is_none() && !choice.heads.is_empty());
        let rows = layers.map(|(choice, _)| choice.heads.first().map_or(0, Vec::len));
        let (layers, kept) = rows.fold((0, 0), |(layers, kept), rows| (layers + 1, kept + rows));
        let tenths = (10 * kept).div_ceil((layers * prompt).max(1)).clamp(1, 10);
        self.kept_shares[tenths - 1] += 1;
    }

    /// What stays of a prompt whose tokens were as likely as `nll` says, if the policy leaves it to that.
    fn budget(&self, policy: &dyn Policy, prompt: usize, nll: (usize, f64)) -> Result<Budget> {
        let Some(quality) = policy.quality() else { return Ok(Budget::WHOLE) };
        let (tokens, sum) = nll;
        if tokens + 1 != prompt {
            let what =
                format!("the likelihood of {tokens} tokens of a prompt of {prompt} is known");
            return Err(CacheError::Integrity { what });
        }
        // Of a single token nothing is known, and there is nothing to give up.
        if tokens == 0 {
            return Ok(Budget::WHOLE);
        }
        Ok(Budget::at_least(self.tables.compactor()?.share(sum / tokens as f64, quality)))
    }

    /// What the policy chooses for every layer.
    pub(super) fn choices(
        &self,
        policy: &(dyn Policy + Sync),
        sequence: &Sequence,
        selection: &Selection,
    ) -> Result<Vec<Choice>> {
        let (columns, coded) = (&selection.columns, selection.formats.sealed[1]);
        let prompt = sequence.num_tokens;
        let budget = self.budget(policy, prompt, selection.nll)?;
        let layers = self.geometry.layers().iter().enumerate();
        // Numbers among the layers that attend to everything.
        let numbers: Vec<usize> = layers
            .scan(0, |next, (layer, l)| {
                let number = *next;
                *next += usize::from(l.window.is_none() && sequence.owns(layer));
                Some(number)
            })
            .collect();
        let choose = |layer: usize, before: &[Choice]| -> Result<Choice> {
            let l = &self.geometry.layers()[layer];
            if !sequence.owns(layer) {
                return Ok(Choice::default());
            }
            if let Some(window) = l.window {
                let positions = (prompt - window.min(prompt)..prompt).map(|p| p as u32);
                return Ok(Choice::alike(l.kv_heads, positions.collect()));
            }
            let first = self.geometry.group(layer, 0);
            let view = LayerView {
                number: numbers[layer],
                tokens: prompt,
                kv_heads: l.kv_heads,
                together: self.formats.get(coded).layers[layer].heads,
                group: l.query_heads / l.kv_heads,
                columns: columns.get(first..first + l.kv_heads).unwrap_or_default(),
                before,
                budget,
                rows: &LayerRows { cache: self, sequence, layer },
            };
            let choice = policy.choose(&view)?;
            let most = policy.most_kept(prompt);
            let rows = choice.heads.first().map_or(0, Vec::len);
            let alike = choice.heads.iter().all(|head| head.len() == rows);
            if choice.heads.len() != l.kv_heads || !alike || rows > most {
                let what = format!("layer {layer}: {policy} chose {rows} of {most} tokens at most");
                return Err(CacheError::Integrity { what });
            }
            Ok(choice)
        };
        if policy.alone() {
            return (0..numbers.len()).into_par_iter().map(|layer| choose(layer, &[])).collect();
        }
        let (mut choices, mut before) = (Vec::new(), Vec::new());
        for layer in 0..numbers.len() {
            let choice = choose(layer, &before)?;
            choices.push(choice.clone());
            if self.geometry.layers()[layer].window.is_none() && sequence.owns(layer) {
                before.push(choice);
            }
        }
        Ok(choices)
    }
}
