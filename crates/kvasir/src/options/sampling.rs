//! How tokens are chosen.

use clap::Args;
use kvasir_engine::SamplingParams;

use crate::units::parse_tokens;

/// Sampling parameters; ranges are checked by the engine.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct SamplingArgs {
    /// Randomness; 0 always takes the most likely token
    #[arg(long, value_name = "T", default_value = "0.7", allow_negative_numbers = true)]
    temperature: f32,
    /// Keep the K most likely tokens; 0 keeps all
    #[arg(long, value_name = "K", default_value = "0")]
    top_k: u32,
    /// Keep the smallest set of tokens whose probability reaches P
    #[arg(long, value_name = "P", default_value = "1", allow_negative_numbers = true)]
    top_p: f32,
    /// Drop tokens less likely than this share of the most likely one
    #[arg(long, value_name = "P", default_value = "0", allow_negative_numbers = true)]
    min_p: f32,
    /// Seed of the random stream [default: another one in every run]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Most tokens to generate
    #[arg(long, value_name = "TOKENS", default_value = "256", value_parser = parse_tokens)]
    max_tokens: usize,
    /// End at this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Go on after the model's end-of-sequence token
    #[arg(long)]
    ignore_eos: bool,
    /// Lower the score of every token that has been generated
    #[arg(long, value_name = "X", default_value = "0", allow_negative_numbers = true)]
    presence_penalty: f32,
    /// Lower the score of every token by X for each time it was generated
    #[arg(long, value_name = "X", default_value = "0", allow_negative_numbers = true)]
    frequency_penalty: f32,
    /// Divide the score of every token of prompt and output
    #[arg(long, value_name = "X", default_value = "1", allow_negative_numbers = true)]
    repetition_penalty: f32,
}

impl SamplingArgs {
    /// The engine's parameters. `fresh_seed` is used where none was given.
    pub(crate) fn sampling_params(&self, fresh_seed: u64) -> SamplingParams {
        SamplingParams {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            seed: Some(self.seed.unwrap_or(fresh_seed)),
            max_tokens: Some(self.max_tokens),
            stop: self.stop.clone(),
            ignore_eos: self.ignore_eos,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            repetition_penalty: self.repetition_penalty,
            ..SamplingParams::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        sampling: SamplingArgs,
    }

    fn parse(args: &str) -> SamplingParams {
        let args = std::iter::once("x").chain(args.split_whitespace());
        Line::try_parse_from(args).unwrap().sampling.sampling_params(99)
    }

    #[test]
    fn every_option_arrives() {
        let params = parse(
            "--temperature 0 --top-k 5 --top-p 0.9 --min-p 0.1 --seed 7 --max-tokens 1k --stop a \
             --stop b --ignore-eos --presence-penalty -1.5 --frequency-penalty 0.5 \
             --repetition-penalty 1.2",
        );
        let expected = SamplingParams {
            temperature: 0.0,
            top_k: 5,
            top_p: 0.9,
            min_p: 0.1,
            seed: Some(7),
            max_tokens: Some(1000),
            stop: vec!["a".into(), "b".into()],
            ignore_eos: true,
            presence_penalty: -1.5,
            frequency_penalty: 0.5,
            repetition_penalty: 1.2,
            ..SamplingParams::default()
        };
        assert_eq!(params, expected);
    }

    #[test]
    fn defaults() {
        let expected = SamplingParams {
            temperature: 0.7,
            seed: Some(99),
            max_tokens: Some(256),
            ..SamplingParams::default()
        };
        assert_eq!(parse(""), expected);
    }
}
