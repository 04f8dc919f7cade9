//! `kvasir chat`: a conversation in the terminal.

mod command;
mod conversation;
mod input;
mod stats;

use std::io::IsTerminal;
use std::sync::Arc;

use anyhow::Result;
use clap::Args;
use kvasir_engine::{Engine, FinishReason, Request};
use kvasir_model::Model;

use crate::failure;
use crate::generate::{Generation, generate};
use crate::interrupt::Interrupt;
use crate::options::{CacheArgs, ModelArgs, SamplingArgs};
use crate::output::{print_line, print_text};
use crate::pull::Progress;
use crate::run::fresh_seed;
use crate::session::load_engine;
use command::ChatLine;
use conversation::Conversation;
use input::Input;

/// Talk to a model in the terminal
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvasir chat
  kvasir chat --system \"Answer in one sentence.\" --temperature 0
  kvasir chat --model hf:Qwen/Qwen3-0.6B-GGUF/Qwen3-0.6B-Q8_0.gguf --max-model-len 4k
  printf 'Hello!\\n/stats\\n' | kvasir chat

In the conversation:
  /help          list these
  /stats         show the KV cache and the speed
  /system TEXT   set the system message and begin again; without TEXT, remove it
  /reset         begin again
  /exit          leave (or Ctrl-D); Ctrl-C stops an answer")]
pub(crate) struct ChatCommand {
    /// System message
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    cache: CacheArgs,
}

/// Runs the command.
pub(crate) fn execute(command: ChatCommand) -> Result<()> {
    let progress = Progress::stderr();
    let (model, engine) = load_engine(&command.model, &command.cache, progress)?;
    let input = Input::open(std::io::stdin().is_terminal() && std::io::stdout().is_terminal())?;
    if input.is_interactive() {
        progress.note(&format!("{}: type a message, or /help", command.model.model));
    }
    Chat {
        model,
        engine,
        conversation: Conversation::new(command.system),
        sampling: command.sampling,
        interrupt: Interrupt::listen()?,
        turns: 0,
        last: None,
        interactive: input.is_interactive(),
        progress,
    }
    .converse(input)
}

struct Chat {
    model: Arc<Model>,
    engine: Engine,
    conversation: Conversation,
    sampling: SamplingArgs,
    interrupt: Interrupt,
    turns: usize,
    last: Option<Generation>,
    interactive: bool,
    progress: Progress,
}

impl Chat {
    fn converse(mut self, mut input: Input) -> Result<()> {
        while let Some(line) = input.next_line()? {
            match ChatLine::parse(&line) {
                ChatLine::Empty => {}
                ChatLine::Message(text) => self.turn(text)?,
                ChatLine::Help => print_line(command::HELP)?,
                ChatLine::Stats => {
                    print_text(&stats::render(&self.engine.stats(), self.last.as_ref()))?;
                }
                ChatLine::Reset => {
                    self.conversation.reset();
                    self.progress.note("(a new conversation)");
                }
                ChatLine::System(text) => {
                    self.conversation.set_system(text);
                    self.progress.note("(a new conversation)");
                }
                ChatLine::Exit => break,
                ChatLine::Unknown(name) => {
                    self.progress.note(&format!("unknown command {name}; /help lists them"));
                }
            }
        }
        Ok(())
    }

    /// One question and its answer. What goes wrong with it is told and the conversation goes on
    /// as if the question had not been asked. It ends the conversation where nobody is there to
    /// read it: stdin is not a terminal, or stdout is gone.
    fn turn(&mut self, text: &str) -> Result<()> {
        self.interrupt.take();
        match self.answer(text) {
            Ok(generation) => {
                print_line("")?;
                match generation.finish_reason {
                    FinishReason::Abort => self.progress.note("(stopped)"),
                    FinishReason::Length => self
                        .progress
                        .note("(cut at the length limit; see --max-tokens and --max-model-len)"),
                    FinishReason::Stop => {}
                }
                self.conversation.add_turn(text, &generation.text);
                self.last = Some(generation);
                Ok(())
            }
            Err(error) if !self.interactive || failure::is_broken_pipe(&error) => Err(error),
            Err(error) => {
                self.progress.note(&format!("error: {}", failure::one_line(&error)));
                Ok(())
            }
        }
    }

    fn answer(&mut self, text: &str) -> Result<Generation> {
        let prompt = self.conversation.prompt(self.model.chat_template(), text)?;
        self.turns += 1;
        let request = Request {
            id: format!("chat-{}", self.turns).as_str().into(),
            // The template writes the special tokens itself.
            prompt: self.engine.tokenizer().encode(&prompt, false)?,
            params: self.sampling.sampling_params(fresh_seed()).into(),
            cache_salt: None,
            kv_cache: None,
        };
        generate(&mut self.engine, request, &self.interrupt, print_text)
    }
}
