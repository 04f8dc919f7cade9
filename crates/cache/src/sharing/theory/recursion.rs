//! The fusion tree in expectation: representatives and cosines, from subtree to subtree.

use rustc_hash::FxHashMap;

use super::Model;
use super::cosines::{Change, Cosines, Outcome};
use super::distortion::{chained_cosine, mutual_cosine, star_cosines};
use super::sample::{ClassSample, MeanCosines};
use crate::sharing::tree::Representation;

/// What a subtree is expected to end with.
#[derive(Debug, Clone)]
pub(super) struct Expected {
    /// Representatives of contents that one request has.
    unique: f64,
    /// Representatives of each repeated content (not of all contents of that kind).
    repeated: Vec<f64>,
    /// Of the blocks that went in, to their representatives.
    pub(super) cosines: Cosines,
}

impl Expected {
    pub(super) fn representatives(&self, model: &Model) -> f64 {
        let kinds = model.workload.repeated().iter().zip(&self.repeated);
        self.unique + kinds.map(|(kind, each)| kind.contents * each).sum::<f64>()
    }
}

/// Either of the two cosines.
type Part = fn(&MeanCosines) -> f64;
const KEY: Part = |c| c.key;
const VALUE: Part = |c| c.value;

/// Matches of one class at one merge node.
struct Matches {
    /// Right representatives that a left one gets.
    per_left: f64,
    /// Part of the right representatives that match.
    per_right: f64,
    /// Mean cosines of the pairs that match.
    pair: MeanCosines,
    /// Mean cosines of all pairs of the class.
    unrelated: MeanCosines,
}

impl Matches {
    /// Cosines of the left and of each right one to their mean, by the number of right ones.
    fn star(&self, rights: f64, of: Part) -> (f64, f64) {
        let pair = of(&self.pair);
        star_cosines(rights, pair, mutual_cosine(pair, of(&self.unrelated).min(pair)))
    }
}

pub(super) struct Recursion<'a> {
    model: &'a Model,
    threshold: f64,
    /// Match probability of two blocks with the same content, and with different ones.
    same: f64,
    other: f64,
    memo: FxHashMap<usize, Expected>,
}

impl<'a> Recursion<'a> {
    pub(super) fn new(model: &'a Model, threshold: f64) -> Self {
        let (sample, tail) = (&model.sample, model.tail);
        Self {
            model,
            threshold,
            same: sample.same().exceedance(threshold, tail),
            other: sample.other().exceedance(threshold, tail),
            memo: FxHashMap::default(),
        }
    }

    /// Over so many requests, halved as the tree halves them.
    pub(super) fn subtree(&mut self, requests: usize) -> Expected {
        if let Some(known) = self.memo.get(&requests) {
            return known.clone();
        }
        let workload = &self.model.workload;
        let expected = if requests <= 1 {
            let n = requests as f64;
            Expected {
                unique: n * workload.unique_blocks(),
                repeated: workload.repeated().iter().map(|r| n * r.appearance).collect(),
                cosines: Cosines::own(n * workload.blocks_per_request()),
            }
        } else {
            let left = self.subtree(requests / 2);
            let right = self.subtree(requests - requests / 2);
            self.merge(&left, &right)
        };
        self.memo.insert(requests, expected.clone());
        expected
    }

    /// A right representative stays if it matches none of the left ones.
    fn merge(&self, left: &Expected, right: &Expected) -> Expected {
        let workload = &self.model.workload;
        let (l, r) = (left.representatives(self.model), right.representatives(self.model));
        if l <= 0.0 || r <= 0.0 {
            return if l > 0.0 { left.clone() } else { right.clone() };
        }
        let unrelated = |others: f64| (1.0 - self.other).powf(others.max(0.0));
        let unique = left.unique + right.unique * unrelated(l);
        let (mut repeated, mut same_matches) = (Vec::new(), 0.0);
        let mut copies = 1.0f64;
        for ((kind, here), there) in
            workload.repeated().iter().zip(&left.repeated).zip(&right.repeated)
        {
            let stays = self.no_copy_matches(*here);
            same_matches += kind.contents * there * (1.0 - stays);
            copies = copies.max(*here);
            repeated.push(here + there * stays * unrelated(l - here));
        }
        let cosines = Cosines::own(0.0);
        let mut merged = Expected { unique, repeated, cosines };
        let absorbed = (l + r - merged.representatives(self.model)).max(0.0);
        let (sample, tail) = (&self.model.sample, self.model.tail);
        let other_matches = (absorbed - same_matches).max(0.0);
        let of_class = |matches: f64, class: &ClassSample, candidates: f64| Matches {
            per_left: matches / l,
            per_right: matches / r,
            pair: class.best_match(self.threshold, candidates, tail),
            unrelated: class.mean(),
        };
        let classes = [
            of_class(same_matches, sample.same(), copies),
            of_class(other_matches, sample.other(), l),
        ];
        let outcomes: Vec<Outcome> = match self.model.representation {
            Representation::Mean => classes.iter().map(|c| self.left(c, absorbed / l)).collect(),
            Representation::Redirect => Vec::new(),
        };
        merged.cosines.add_merged(&left.cosines, &outcomes);
        let outcomes: Vec<Outcome> = classes.iter().map(|c| self.right(c)).collect();
        merged.cosines.add_merged(&right.cosines, &outcomes);
        merged
    }

    /// Probability that a block matches none of so many representatives of its own content. Below one,
    /// the number is the probability that there is one.
    fn no_copy_matches(&self, representatives: f64) -> f64 {
        if representatives <= 1.0 {
            1.0 - representatives * self.same
        } else {
            (1.0 - self.same).powf(representatives)
        }
    }

    /// What becomes of the blocks of a left representative that gets right ones of one class: their
    /// number is Poisson, of all classes together with mean `total`.
    fn left(&self, matches: &Matches, total: f64) -> Outcome {
        let given_any = -(-matches.per_left).exp_m1();
        let factor = |of: Part| {
            let star = |k: f64| if k > 0.0 { matches.star(k, of).0 } else { 0.0 };
            if given_any > 0.0 { poisson_mean(matches.per_left, star) / given_any } else { 1.0 }
        };
        let any = -(-total).exp_m1();
        let probability = if total > 0.0 { any * matches.per_left / total } else { 0.0 };
        Outcome { probability, change: turned(matches, factor) }
    }

    /// What becomes of the blocks of a right representative that matches.
    fn right(&self, matches: &Matches) -> Outcome {
        let change = match self.model.representation {
            Representation::Redirect => self.redirected(matches),
            // Beside a given one, others come in the same Poisson number.
            Representation::Mean => turned(matches, |of| {
                poisson_mean(matches.per_left, |k| matches.star(k + 1.0, of).1)
            }),
        };
        Outcome { probability: matches.per_right, change }
    }

    /// From a leader to the leader that it joins.
    fn redirected(&self, matches: &Matches) -> Change {
        let (pair, class) = (matches.pair, matches.unrelated);
        let all = self.model.sample.other().mean();
        let chained = move |c: MeanCosines, of: Part| {
            // Blocks of a class have its mean in common, but those that are farther off stay there.
            let unrelated = of(&class).min(of(&c)).max(of(&all));
            chained_cosine(of(&c), of(&pair), unrelated)
        };
        Box::new(move |c| MeanCosines { key: chained(c, KEY), value: chained(c, VALUE) })
    }
}

/// To a mean that is turned by so much from the old representative. Turns are at right angles, so
/// cosines multiply; but a mean of many is the direction that all of the class have in common, and to
/// that blocks have cosine √(mean cosine) however many merges it took.
fn turned(matches: &Matches, factor: impl Fn(Part) -> f64) -> Change {
    let (key, value) = (factor(KEY), factor(VALUE));
    let floor = |of: Part| of(&matches.unrelated).max(0.0).sqrt();
    let (key_floor, value_floor) = (floor(KEY), floor(VALUE));
    Box::new(move |c| MeanCosines {
        key: (c.key * key).max(c.key.min(key_floor)),
        value: (c.value * value).max(c.value.min(value_floor)),
    })
}

/// Mean of `f(k)` over a Poisson variable k.
fn poisson_mean(mean: f64, f: impl Fn(f64) -> f64) -> f64 {
    // So narrow, relative to its mean, that f is flat over it.
    if mean > 100.0 {
        return f(mean);
    }
    let last = (mean + 10.0 * mean.sqrt() + 20.0) as usize;
    let mut weight = (-mean).exp();
    let mut sum = 0.0;
    for k in 0..=last {
        sum += weight * f(k as f64);
        weight *= mean / (k + 1) as f64;
    }
    sum
}
