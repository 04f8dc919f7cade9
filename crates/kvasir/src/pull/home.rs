//! The cache folder.

use std::env;
use std::path::PathBuf;

use anyhow::{Result, bail};

/// `KVASIR_HOME`, else `~/.cache/kvasir`.
pub(crate) fn cache_folder() -> Result<PathBuf> {
    choose(|name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from))
}

fn choose(var: impl Fn(&str) -> Option<PathBuf>) -> Result<PathBuf> {
    if let Some(home) = var("KVASIR_HOME") {
        return Ok(home);
    }
    match var("HOME") {
        Some(home) => Ok(home.join(".cache").join("kvasir")),
        None => bail!("no place for models: set KVASIR_HOME to a folder"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order() {
        let with = |set: &[(&str, &str)]| {
            choose(|name| {
                set.iter().find(|(key, _)| *key == name).map(|(_, value)| PathBuf::from(value))
            })
        };
        let all = [("HOME", "/h"), ("KVASIR_HOME", "/k")];
        assert_eq!(with(&all).unwrap(), PathBuf::from("/k"));
        assert_eq!(with(&all[..1]).unwrap(), PathBuf::from("/h/.cache/kvasir"));
        assert!(with(&[]).unwrap_err().to_string().contains("KVASIR_HOME"));
    }
}
