//! What serving a model takes.

use kvasir_model::gguf::GgufFile;
use kvasir_model::{Footprint, LoadOptions};
use serde::Serialize;

/// Code, threads, and the buffers of a step of short prompts: what the smallest models take beside what is counted.
const PROGRAM: usize = 24 << 20;

/// Bytes of everything that is resident.
#[derive(Debug, Serialize)]
pub(crate) struct Memory {
    /// Why nothing is known; then all numbers but the cache's are 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) unknown: Option<String>,
    pub(crate) weight_bytes: usize,
    pub(crate) tokenizer_bytes: usize,
    pub(crate) kv_cache_bytes: usize,
    pub(crate) program_bytes: usize,
    /// Of all of these.
    pub(crate) total_bytes: usize,
    /// What this machine has; absent where the system does not tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) machine_bytes: Option<usize>,
    #[serde(skip)]
    footprint: Option<Footprint>,
}

/// What a tensor takes.
#[derive(Debug, Serialize)]
pub(crate) struct Resident {
    pub(crate) resident_bytes: usize,
    pub(crate) held: &'static str,
}

impl Memory {
    pub(crate) fn of(file: &GgufFile, options: &LoadOptions<'_>, kv_cache_bytes: usize) -> Self {
        let (footprint, unknown) = match Footprint::of(file, options) {
            Ok(footprint) => (Some(footprint), None),
            Err(error) => (None, Some(error.to_string())),
        };
        let weight_bytes = footprint.as_ref().map_or(0, Footprint::weights);
        let tokenizer_bytes = footprint.as_ref().map_or(0, |f| f.tokenizer);
        let program_bytes = if footprint.is_some() { PROGRAM } else { 0 };
        let sizes = [weight_bytes, tokenizer_bytes, kv_cache_bytes, program_bytes];
        Self {
            unknown,
            weight_bytes,
            tokenizer_bytes,
            kv_cache_bytes,
            program_bytes,
            total_bytes: sizes.iter().fold(0, |sum, bytes| sum.saturating_add(*bytes)),
            machine_bytes: machine_bytes(),
            footprint,
        }
    }

    /// Of the file's tensor at some place.
    pub(crate) fn tensor(&self, at: usize) -> Option<Resident> {
        let tensor = self.footprint.as_ref()?.tensors.get(at)?;
        Some(Resident { resident_bytes: tensor.bytes, held: tensor.held.name() })
    }
}

/// Memory of the machine, where `/proc` tells.
fn machine_bytes() -> Option<usize> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()?.checked_mul(1024)
}
