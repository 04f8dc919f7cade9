//! Recipes as text: `select+project+codec`.

use crate::codec::{CodecKind, Gear};
use crate::config::{KeyFrame, Recipe};
use crate::error::{CacheError, Result};
use crate::project::{KvSharer, Project};
use crate::select::{Options, Select};

impl std::str::FromStr for Recipe {
    type Err = CacheError;

    fn from_str(name: &str) -> Result<Self> {
        let mut recipe: Option<Self> = None;
        let mut select = None;
        let mut project: Option<Project> = None;
        let mut layers: Option<KvSharer> = None;
        for stage in name.split('+') {
            let combination =
                |what: String| CacheError::Combination { name: name.to_owned(), what };
            if let Some(policy) = Select::parse(stage)? {
                if let Some(first) = select.replace(policy) {
                    return Err(combination(format!("{first} and {policy} both choose tokens")));
                }
                if recipe.is_some() || project.is_some() || layers.is_some() {
                    return Err(combination(format!(
                        "{policy} chooses tokens before anything else is done to them"
                    )));
                }
                continue;
            }
            let options = Options::new(stage);
            if options.name() == KvSharer::NAME {
                let sharer = KvSharer::parse(options)?;
                if let Some(first) = layers.replace(sharer) {
                    return Err(combination(format!("{first} and {sharer} both share layers")));
                }
                if recipe.is_some() || project.is_some() {
                    return Err(combination(format!(
                        "{sharer} comes before what is done to the layers that store"
                    )));
                }
                continue;
            }
            if let Some(projection) = Project::parse(stage)? {
                if let Some(first) = project.replace(projection) {
                    return Err(combination(format!(
                        "{first} and {projection} are both projections"
                    )));
                }
                if recipe.is_some() {
                    return Err(combination(format!("{projection} comes before a codec")));
                }
                continue;
            }
            let codec = Self::codec_by_name(stage).map_err(|error| match error {
                CacheError::UnknownRecipe { .. } => Self::unknown(name),
                other => other,
            })?;
            if let Some(first) = recipe.replace(codec) {
                return Err(combination(format!("{first} and {codec} are both codecs")));
            }
        }
        let recipe = Self { select, layers, project, ..recipe.unwrap_or(Self::F16) };
        recipe.check().map_err(|what| CacheError::Combination { name: name.to_owned(), what })?;
        Ok(recipe)
    }
}

impl Recipe {
    /// What keeps its stages from working together.
    fn check(&self) -> Result<(), String> {
        let one_by_one = self.select.filter(|select| !select.policy().can_be_coded());
        if let Some(layers) = self.layers {
            if let Some(select) = self.select.filter(|_| self.remembers()) {
                return Err(format!(
                    "{select} was trained on every layer's own keys, and by {layers} some read others'"
                ));
            }
            if let Some(select) = one_by_one {
                return Err(format!(
                    "{select} replaces tokens of every layer apart, and by {layers} some have none"
                ));
            }
            if self.ladder {
                return Err(format!(
                    "auto recodes blocks of every layer, and by {layers} some have none"
                ));
            }
        }
        match (one_by_one, self.project) {
            (Some(select), Some(project)) => Err(format!(
                "{select} replaces tokens one by one, and {project} chooses channels for all of them at once"
            )),
            (Some(select), None) if self.is_coded() => {
                Err(format!("{select} gives up tokens one by one, which coded blocks do not allow"))
            }
            (_, Some(Project::LowRank(project))) if self.codec.is_joint() => {
                Err(format!("{} has a basis of its own, and {project} another", self.codec))
            }
            (_, Some(project)) if self.ladder => {
                Err(format!("auto's rates are for all channels, and {project} leaves some out"))
            }
            (_, Some(project)) if matches!(self.codec, CodecKind::Rotation(_)) => {
                Err(format!("{project} leaves out channels that {} mixes", self.codec))
            }
            _ => Ok(()),
        }
    }

    fn codec_by_name(name: &str) -> Result<Self> {
        if let Some(rate) = name.strip_prefix("joint:") {
            return Ok(Self::joint(rate.parse()?));
        }
        let options = Options::new(name);
        if options.name() == "gear" {
            let gear = CodecKind::Gear(Gear::parse(options)?);
            return Ok(Self::of(gear, KeyFrame::Absolute));
        }
        let known = Self::CODECS.into_iter().find(|r| r.to_string() == name);
        known.ok_or_else(|| Self::unknown(name))
    }

    fn unknown(name: &str) -> CacheError {
        let codecs = Self::CODECS.map(|r| r.to_string()).join(", ");
        let policies = Select::KNOWN.join(", ");
        let projections = Project::KNOWN.join(", ");
        let known = format!(
            "{codecs}, joint:BITS, {}; before them, with a +: {projections}; before those: {}; before all: {policies}",
            Gear::USAGE,
            KvSharer::USAGE
        );
        CacheError::UnknownRecipe { name: name.to_owned(), known }
    }
}

impl std::fmt::Display for Recipe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let codec = if self.ladder { "auto".to_owned() } else { self.codec.to_string() };
        let stages = [
            self.select.map(|s| s.to_string()),
            self.layers.map(|l| l.to_string()),
            self.project.map(|p| p.to_string()),
        ];
        let mut stages: Vec<String> = stages.into_iter().flatten().collect();
        if stages.is_empty() || self.codec != CodecKind::F16 {
            stages.push(codec);
        }
        f.write_str(&stages.join("+"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back() {
        for recipe in Recipe::all() {
            assert_eq!(recipe.to_string().parse::<Recipe>().unwrap(), recipe);
        }
        let fraction: Recipe = "joint:2.75".parse().unwrap();
        assert_eq!(fraction.to_string(), "joint:2.75");
        assert_eq!("joint:3".parse::<Recipe>().unwrap(), Recipe::JOINT3);
        assert_eq!("gear".parse::<Recipe>().unwrap(), Recipe::GEAR2);
        for name in [
            "snapkv:0.5+joint3",
            "snapkv:0.25:window=32:kernel=7",
            "chunkkv:0.3:chunk=20+kivi4",
            "streaming:tokens=512:sinks=2+auto",
            "dbudget:0.05:sinks=apart+int8",
            "clusterkv:0.25:size=40+joint3",
            "compactor:0.5:blend=30+f32",
            "compactor:quality=95:chunk=64+int8",
            "gear:3:rank=4:outliers=0",
            "think:0.6+kivi4",
            "snapkv:0.5+think:0.6+int8",
            "think:0.5+joint3",
            "lorc:0.5",
            "less:0.25:over=snapkv+think:0.5+joint3",
            "snapkv:0.5+kvsharer:0.75+think:0.6+kivi4",
            "snapkv:0.5+recalkv:rank=96+kivi4",
        ] {
            assert_eq!(name.parse::<Recipe>().unwrap().to_string(), name);
        }
    }

    #[test]
    fn stages_that_cannot_be_are_refused_with_the_reason() {
        for (name, reason) in [
            ("snapkv:0", "'0' is not a share above 0 and at most 1"),
            ("snapkv:1.5", "'1.5' is not a share above 0 and at most 1"),
            ("snapkv", "'' is not a share above 0 and at most 1"),
            ("snapkv:0.5:windows=3", "'windows' is not snapkv:SHARE[:window=64][:kernel=5]"),
            ("snapkv:0.5:window=0", "'0' is not window from 1 to 4096"),
            ("dbudget:1", "'1' is not a threshold from 0 to below 1"),
            ("dbudget:0.1:sinks=none", "'none' is not sinks=paper or apart"),
            ("streaming:tokens=4", "'4' is not tokens from 5 to 65535"),
            ("compactor", "'' is not a share above 0 and at most 1"),
            ("compactor:quality=0", "'0' is not quality from 1 to 100"),
            ("compactor:0.5:quality=90", "[:first=8][:last=4] or compactor:quality=PERCENT"),
            ("gear:9", "'9' is not bits from 1 to 8"),
            (
                "h2o:0.5+joint3",
                "h2o:0.5 gives up tokens one by one, which coded blocks do not allow",
            ),
            ("snapkv:0.5+h2o:0.5", "snapkv:0.5 and h2o:0.5 both choose tokens"),
            ("joint3+snapkv:0.5", "snapkv:0.5 chooses tokens before anything else is done to them"),
            (
                "think:0.6+snapkv:0.5",
                "snapkv:0.5 chooses tokens before anything else is done to them",
            ),
            ("think:0", "'0' is not a share above 0 and at most 1"),
            ("think:0.5+think:0.6", "think:0.5 and think:0.6 are both projections"),
            ("kivi4+think:0.6", "think:0.6 comes before a codec"),
            (
                "h2o:0.5+think:0.6",
                "h2o:0.5 replaces tokens one by one, and think:0.6 chooses channels for all of them at once",
            ),
            ("lorc:0.5+joint3", "joint3 has a basis of its own, and lorc:0.5 another"),
            (
                "h2o:0.5+kvsharer:0.5",
                "h2o:0.5 replaces tokens of every layer apart, and by kvsharer:0.5 some have none",
            ),
            (
                "kvsharer:0.5+auto",
                "auto recodes blocks of every layer, and by kvsharer:0.5 some have none",
            ),
            (
                "joint3+kvsharer:0.5",
                "kvsharer:0.5 comes before what is done to the layers that store",
            ),
            (
                "less:0.5+kvsharer:0.5",
                "less:0.5 was trained on every layer's own keys, and by kvsharer:0.5 some read others'",
            ),
            (
                "less:0.5:over=streaming+joint3",
                "less:0.5:over=streaming gives up tokens one by one, which coded blocks do not allow",
            ),
            ("less:0.5:over=chunkkv", "'chunkkv' is not over=h2o or snapkv or streaming"),
            ("lorc:2", "'2' is not a share above 0 and at most 1"),
            ("lorc:rank=0", "'0' is not rank from 1 to 65535"),
            ("think:0.6+auto", "auto's rates are for all channels, and think:0.6 leaves some out"),
            ("think:0.6+rotation3", "think:0.6 leaves out channels that rotation3 mixes"),
            ("int8+kivi4", "int8 and kivi4 are both codecs"),
        ] {
            let error = name.parse::<Recipe>().unwrap_err().to_string();
            assert!(error.ends_with(reason), "{name}: {error}");
        }
    }

    #[test]
    fn unknown_names_list_what_exists() {
        let message = "f15".parse::<Recipe>().unwrap_err().to_string();
        assert_eq!(
            message,
            "unknown KV cache recipe 'f15' (known: f16, f32, int8, joint4, joint3, joint2, auto, kivi4, \
             kivi2, gear:4, gear:2, rotation4, rotation3, rotation2, joint:BITS, \
             gear[:BITS][:rank=2][:outliers=20]; before them, with a +: think:SHARE, \
             lorc:SHARE or lorc:rank=N, recalkv:SHARE or recalkv:rank=N; before those: kvsharer:SHARE; before all: \
             streaming:SHARE[:sinks=4] or streaming:tokens=N[:sinks=4], \
             h2o:SHARE, snapkv:SHARE[:window=64][:kernel=5], \
             chunkkv:SHARE[:chunk=10][:reuse=2][:window=64][:kernel=5], \
             compactor:SHARE[:chunk=256][:blend=PERCENT][:sketch=48][:first=8][:last=4] or \
             compactor:quality=PERCENT, \
             dbudget:THRESHOLD[:sinks=paper|apart], \
             clusterkv:SHARE[:size=80][:sinks=16][:whole=2], \
             less:SHARE[:over=h2o|snapkv|streaming])"
        );
    }

    #[test]
    fn rates_out_of_range_say_the_range() {
        for rate in ["0.5", "9", "x", "NaN", "-1"] {
            let error = format!("joint:{rate}").parse::<Recipe>().unwrap_err().to_string();
            assert!(error.contains(rate) && error.ends_with("take 1 to 6"), "{error}");
        }
    }
}
