//! What kernels run on, in words: for start lines, tables and metrics.

use kvasir_kernels::{ActivationKind, Isa};
use serde::Serialize;

/// The processor, the instruction sets in use, and what they make of `--dtype auto`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Machine {
    /// Its name, as the system tells it.
    pub processor: String,
    /// The widest instruction sets in use: `avx512-bf16+avx512-icl`.
    pub isa: String,
    /// With what weights are multiplied: `codes × bytes, others × bf16`.
    pub form: String,
}

impl Machine {
    /// The one we are on.
    pub fn this() -> Self {
        let [codes, others] = [true, false].map(ActivationKind::fastest);
        Self {
            processor: processor(),
            isa: Isa::best().to_string(),
            form: format!("codes × {codes}, others × {others}"),
        }
    }
}

impl std::fmt::Display for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({}; {})", self.processor, self.isa, self.form)
    }
}

/// The first processor's name in `/proc/cpuinfo`; where there is none, the architecture.
fn processor() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == "model name").then(|| value.trim().to_owned())
    });
    name.filter(|name| !name.is_empty()).unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_named() {
        let machine = Machine::this();
        assert!(!machine.processor.is_empty());
        let text = machine.to_string();
        assert!(text.contains(&machine.isa) && text.contains("codes × "), "{text}");
    }
}
