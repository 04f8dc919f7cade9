//! What is known when a prompt is computed, and what follows from it.

use kvasir_cache::{Recipe, SequenceId, SharingMode};

use super::{Engine, LogitRow};
use crate::config::EngineConfig;
use crate::error::{EngineError, Result};
use crate::guard::{FirstToken, Guard, PromptFeatures, Watch, Watched};

impl EngineConfig {
    /// How sequences are stored, until something is decided, that ask for nothing.
    pub(super) fn stored(&self) -> Recipe {
        match self.guard {
            Some(_) if self.kv_cache == Recipe::AUTO => Recipe::F16,
            _ => self.kv_cache,
        }
    }

    pub(super) fn watch(&self) -> Option<Watch> {
        let (observed, guard) = (&self.observe_prompts, &self.guard);
        if observed.is_none() && guard.is_none() {
            return None;
        }
        let rated = guard.iter().flat_map(|guard| guard.model.parsed_recipes()).flatten();
        let mut recipes: Vec<Recipe> = Vec::new();
        for recipe in observed.iter().flatten().copied().chain(rated) {
            if !recipes.contains(&recipe) {
                recipes.push(recipe);
            }
        }
        Some(Watch { recipes, guard: guard.clone() })
    }
}

impl Engine {
    /// Guards requests to come in another way, or not at all.
    ///
    /// # Errors
    /// A limit that is no chance; a recipe that this engine cannot store anything by; `--kv-sharing tree`. The guard that was
    /// there is gone then.
    pub fn set_guard(&mut self, guard: Option<Guard>) -> Result<()> {
        self.config.guard = guard;
        let prepared = self.prepare_guard();
        if prepared.is_err() {
            self.config.guard = None;
        }
        self.watch = self.config.watch();
        prepared
    }

    /// Makes ready what the guard may choose.
    pub(super) fn prepare_guard(&mut self) -> Result<()> {
        let tree = self.config.kv_sharing.mode == SharingMode::Tree;
        for recipe in self.config.observe_prompts.iter().flatten().copied() {
            if tree || !recipe.follows_f16() {
                return Err(EngineError::BadConfig {
                    option: "observed prompts",
                    expected: "of recipes that blocks of f16 can be stored anew by, without --kv-sharing tree".to_owned(),
                    found: recipe.to_string(),
                });
            }
            let prepared = self.cache.prepare(recipe);
            prepared.map_err(|source| EngineError::Recipe { recipe, source })?;
        }
        let Some(Guard { model, most_risk }) = &self.config.guard else { return Ok(()) };
        if !(0.0..=1.0).contains(most_risk) {
            return Err(EngineError::BadConfig {
                option: "--kv-risk",
                expected: "a chance, 0 to 1".to_owned(),
                found: most_risk.to_string(),
            });
        }
        if tree {
            return Err(EngineError::BadConfig {
                option: "--kv-risk",
                expected: "without --kv-sharing tree".to_owned(),
                found: "both".to_owned(),
            });
        }
        for recipe in model.parsed_recipes()? {
            if recipe.needs_statistics() && !self.has_statistics {
                return Err(EngineError::NoStatistics { recipe });
            }
            let prepared = self.cache.prepare(recipe);
            prepared.map_err(|source| EngineError::Recipe { recipe, source })?;
        }
        Ok(())
    }

    /// How a new sequence is stored at first, and why it is looked at later.
    pub(super) fn stored_at_first(&self, asked: Recipe) -> (Recipe, Option<Watched>) {
        match &self.watch {
            Some(Watch { guard: Some(_), .. }) if asked == Recipe::AUTO => {
                (Recipe::F16, Some(Watched::Guarded))
            }
            Some(_) if asked == Recipe::F16 && self.config.observe_prompts.is_some() => {
                (asked, Some(Watched::Observed))
            }
            _ => (asked, None),
        }
    }

    /// Looks at a watched prompt whose first token is about to be handed out; decides how it is stored if it is guarded.
    pub(super) fn look_at(
        &mut self,
        row: LogitRow,
        first: FirstToken,
    ) -> Result<Option<Box<PromptFeatures>>> {
        let Some(sequence) = self.scheduler.sequences.get_mut(&row.key) else { return Ok(None) };
        let (Some(id), Some(why)) = (sequence.cache, sequence.watched.take()) else {
            return Ok(None);
        };
        let features = self.features(row, id, first)?;
        let guarded = self.watch.as_ref().is_some_and(|watch| watch.guard.is_some());
        match why {
            // The guard may have left meanwhile.
            Watched::Guarded if !guarded => self.cache.stop_watching(id)?,
            Watched::Observed => self.cache.stop_watching(id)?,
            Watched::Guarded => self.decide(row, id, &features)?,
        }
        Ok(self.config.observe_prompts.is_some().then(|| Box::new(features)))
    }

    fn features(
        &mut self,
        row: LogitRow,
        id: SequenceId,
        first: FirstToken,
    ) -> Result<PromptFeatures> {
        let (Some(sequence), Some(watch)) = (self.scheduler.sequences.get(&row.key), &self.watch)
        else {
            return Ok(PromptFeatures::default());
        };
        let prompt = &sequence.tokens[..sequence.prompt_len];
        let mut features = PromptFeatures::new(prompt, first);
        features.max_tokens = sequence.max_len - sequence.prompt_len;
        features.attention_entropy = self.cache.attention_entropy(id)?.unwrap_or(0.0);
        let (cache, threads) = (&mut self.cache, self.runner.threads());
        for recipe in &watch.recipes {
            if let Some(error) = threads.install(|| cache.coding_error(id, *recipe))? {
                features.coding_errors.insert(recipe.to_string(), error);
            }
        }
        Ok(features)
    }

    fn decide(&mut self, row: LogitRow, id: SequenceId, features: &PromptFeatures) -> Result<()> {
        let guard = self.watch.as_ref().and_then(|watch| watch.guard.as_ref());
        let (Some(sequence), Some(guard)) = (self.scheduler.sequences.get_mut(&row.key), guard)
        else {
            return Ok(());
        };
        let (mut recipe, mut risk) = match guard.model.choose(features, guard.most_risk) {
            // Read when the guard was made ready.
            Some((rated, risk)) => (rated.recipe.parse::<Recipe>()?, risk),
            None => (Recipe::F16, 0.0),
        };
        // It was accepted as f16. By a codec its prompt may need more than that while it is computed, tails and coded blocks side by side:
        // after a preemption it would not fit again.
        let budget = self.config.kv_cache_memory;
        if recipe != Recipe::F16 && self.cache.bytes_alone(recipe, sequence.max_len) > budget {
            (recipe, risk) = (Recipe::F16, 0.0);
        }
        sequence.recipe = recipe;
        sequence.risk = Some(risk);
        if recipe == Recipe::F16 {
            self.cache.stop_watching(id)?;
        } else {
            let (cache, salt) = (&mut self.cache, sequence.cache_salt.as_deref());
            let tokens = &sequence.tokens[..sequence.prompt_len];
            let threads = self.runner.threads();
            let all = threads.install(|| cache.recode(id, recipe, salt, tokens))?;
            self.stats.guard_no_room += u64::from(!all);
        }
        self.stats.guard_risks += risk;
        self.stats.count_guarded(recipe);
        self.stats.count_sequence(recipe);
        Ok(())
    }
}
