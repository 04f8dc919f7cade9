//! What a request's keys and values took: `usage.kvasir` in answers.

use kvasir_engine::{Finish, Recipe};
use serde::{Serialize, Serializer};

/// Bytes of the sequences of a job that have ended, summed. All have one recipe, unless a guard decided.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct KvUsage {
    /// Of the sequence that ended last.
    #[serde(serialize_with = "name")]
    recipe: Recipe,
    /// The largest risk that a guard took for them.
    #[serde(skip_serializing_if = "Option::is_none")]
    risk: Option<f64>,
    /// What the tokens would take in f16.
    logical_bytes: usize,
    /// What they took; blocks shared with other sequences count whole in each.
    physical_bytes: usize,
    /// Logical by physical bytes; 0 if nothing was held.
    ratio: f64,
}

impl KvUsage {
    /// The bytes so far and those of a sequence that has ended.
    pub(crate) fn add(so_far: Option<Self>, finish: &Finish) -> Self {
        let (logical, physical) = so_far.map_or((0, 0), |u| (u.logical_bytes, u.physical_bytes));
        let logical_bytes = logical + finish.kv_logical_bytes;
        let physical_bytes = physical + finish.kv_physical_bytes;
        let ratio = match physical_bytes {
            0 => 0.0,
            _ => logical_bytes as f64 / physical_bytes as f64,
        };
        let risks = [so_far.and_then(|u| u.risk), finish.risk];
        let risk = risks.into_iter().flatten().reduce(f64::max);
        Self { recipe: finish.recipe, risk, logical_bytes, physical_bytes, ratio }
    }
}

fn name<S: Serializer>(recipe: &Recipe, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(recipe)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvasir_engine::FinishReason;

    fn finish(logical: usize, physical: usize) -> Finish {
        Finish {
            reason: FinishReason::Stop,
            stop: None,
            recipe: Recipe::INT8,
            risk: None,
            kv_logical_bytes: logical,
            kv_physical_bytes: physical,
            num_preemptions: 0,
        }
    }

    #[test]
    fn bytes_add_up_and_the_ratio_is_of_the_sums() {
        let one = KvUsage::add(None, &finish(100, 50));
        let two = KvUsage::add(Some(one), &finish(200, 70));
        assert_eq!(
            serde_json::to_string(&two).unwrap(),
            r#"{"recipe":"int8","logical_bytes":300,"physical_bytes":120,"ratio":2.5}"#
        );
    }

    #[test]
    fn the_largest_risk_is_told() {
        let guarded = |risk| Finish { risk, ..finish(100, 50) };
        let one = KvUsage::add(None, &guarded(Some(0.25)));
        let two = KvUsage::add(Some(one), &guarded(Some(0.125)));
        assert_eq!(KvUsage::add(Some(two), &guarded(None)).risk, Some(0.25));
    }

    #[test]
    fn nothing_held_has_no_ratio() {
        assert_eq!(KvUsage::add(None, &finish(0, 0)).ratio, 0.0);
    }
}
