//! LESS (arXiv 2402.09398): what a policy gives up is remembered as sums.
//!
//! For every KV head there are sums over the tokens that went, `H = Σ ψ(k) vᵀ` and `z = Σ ψ(k)`, of the size of a few tokens
//! however many went; a query adds `φ(q) H` and `φ(q) z` to the numerator and the denominator of its softmax
//! ([`super::state`]). φ and ψ are trained once for a model ([`crate::offline::LessTraining`]).
//!
//! Which tokens stay is said by another policy, with its usual parameters: [`H2o`] (the paper's), [`SnapKv`] or [`Streaming`]. Where
//! tokens go while others are generated they go one by one, so blocks cannot be coded.

use super::options::Options;
use super::policy::{Choice, LayerView, Observed, Policy, Recent};
use super::{Budget, H2o, SnapKv, Streaming};
use crate::error::Result;

/// See the module's documentation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Less {
    budget: Budget,
    over: Over,
}

/// Who says which tokens stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Over {
    H2o(H2o),
    SnapKv(SnapKv),
    Streaming(Streaming),
}

impl Over {
    /// The first is the usual one.
    const WORDS: [&str; 3] = [H2o::NAME, SnapKv::NAME, Streaming::NAME];

    fn new(word: usize, budget: Budget) -> Self {
        match word {
            0 => Self::H2o(H2o::of(budget)),
            1 => Self::SnapKv(SnapKv::of(budget)),
            _ => Self::Streaming(Streaming::of(budget)),
        }
    }

    fn word(&self) -> usize {
        match self {
            Self::H2o(_) => 0,
            Self::SnapKv(_) => 1,
            Self::Streaming(_) => 2,
        }
    }
}

impl Less {
    pub(crate) const NAME: &str = "less";
    pub(crate) const USAGE: &str = "less:SHARE[:over=h2o|snapkv|streaming]";
    /// Half of a prompt.
    pub const HALF: Self = Self { budget: Budget::HALF, over: Over::H2o(H2o::HALF) };

    pub(crate) fn parse(mut options: Options<'_>) -> Result<Self> {
        let budget = Budget::parse(&mut options)?;
        let over = Over::new(options.word("over", &Over::WORDS)?, budget);
        options.done(Self::USAGE)?;
        Ok(Self { budget, over })
    }

    fn policy(&self) -> &dyn Policy {
        match &self.over {
            Over::H2o(policy) => policy,
            Over::SnapKv(policy) => policy,
            Over::Streaming(policy) => policy,
        }
    }
}

impl std::fmt::Display for Less {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", Self::NAME, self.budget)?;
        match self.over.word() {
            0 => Ok(()),
            word => write!(f, ":over={}", Over::WORDS[word]),
        }
    }
}

impl Policy for Less {
    fn observed(&self) -> Observed {
        self.policy().observed()
    }

    fn least_prompt(&self) -> usize {
        self.policy().least_prompt()
    }

    fn most_kept(&self, prompt: usize) -> usize {
        self.policy().most_kept(prompt)
    }

    fn alone(&self) -> bool {
        self.policy().alone()
    }

    fn varies(&self) -> bool {
        self.policy().varies()
    }

    fn remembers(&self) -> bool {
        true
    }

    fn can_be_coded(&self) -> bool {
        self.policy().recent(usize::MAX / 2).is_none()
    }

    fn choose(&self, layer: &LayerView<'_>) -> Result<Choice> {
        self.policy().choose(layer)
    }

    fn recent(&self, prompt: usize) -> Option<Recent> {
        self.policy().recent(prompt)
    }
}
