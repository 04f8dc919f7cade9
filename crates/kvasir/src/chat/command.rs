//! Lines that the user types.

/// What `/help` prints.
pub(crate) const HELP: &str = "\
/stats         show the KV cache and the speed
/system TEXT   set the system message and begin again; without TEXT, remove it
/reset         begin again
/exit          leave (or Ctrl-D); Ctrl-C stops an answer";

/// A line, understood.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ChatLine<'a> {
    Empty,
    Message(&'a str),
    Help,
    Stats,
    Reset,
    System(Option<String>),
    Exit,
    /// A slash and a word that is no command.
    Unknown(&'a str),
}

impl<'a> ChatLine<'a> {
    /// Only a word directly behind the slash makes a command, so that a path such as `/etc/passwd`
    /// and a lone `/` are messages.
    pub(crate) fn parse(line: &'a str) -> Self {
        let line = line.trim();
        if line.is_empty() {
            return Self::Empty;
        }
        let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let rest = rest.trim();
        match word {
            "/help" | "/?" => Self::Help,
            "/stats" => Self::Stats,
            "/reset" => Self::Reset,
            "/system" => Self::System((!rest.is_empty()).then(|| rest.to_owned())),
            "/exit" | "/quit" | "/bye" => Self::Exit,
            _ => match word.strip_prefix('/') {
                Some(name) if !name.is_empty() && name.chars().all(char::is_alphabetic) => {
                    Self::Unknown(word)
                }
                _ => Self::Message(line),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines() {
        for (line, expected) in [
            ("", ChatLine::Empty),
            ("  \t", ChatLine::Empty),
            (" hello there ", ChatLine::Message("hello there")),
            ("/help", ChatLine::Help),
            ("/stats  ", ChatLine::Stats),
            ("/reset", ChatLine::Reset),
            ("/exit", ChatLine::Exit),
            ("/system", ChatLine::System(None)),
            ("/system  be  brief ", ChatLine::System(Some("be  brief".into()))),
            ("/stast", ChatLine::Unknown("/stast")),
            ("/etc/passwd is a file", ChatLine::Message("/etc/passwd is a file")),
            ("/ 2", ChatLine::Message("/ 2")),
        ] {
            assert_eq!(ChatLine::parse(line), expected, "{line:?}");
        }
    }
}
