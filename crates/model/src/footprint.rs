//! What a model takes in memory, told from its file's header.

use crate::arch::{self, Config};
use crate::error::Result;
use crate::gguf::{GgufFile, TensorInfo};
use crate::model::LoadOptions;
use crate::tensor_names::names;
use crate::tokenizer::Tokenizer;
use crate::weights::{ReadOptions, form};

/// See the module's documentation.
#[derive(Debug, Clone)]
pub struct Footprint {
    /// In the order of the file.
    pub tensors: Vec<TensorFootprint>,
    /// Bytes of the tokenizer.
    pub tokenizer: usize,
}

/// What a tensor takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorFootprint {
    /// Its name.
    pub name: String,
    /// What it is held as.
    pub held: HeldAs,
    /// Bytes in memory.
    pub bytes: usize,
}

/// What a tensor is held as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeldAs {
    /// Codes, as the file has them or quantised.
    Codes,
    /// f16.
    F16,
    /// bf16.
    Bf16,
    /// f32.
    F32,
    /// Nothing: rows are looked up in the mapped file.
    InTheFile,
    /// Nothing: this build does not read it.
    Unused,
}

impl HeldAs {
    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Codes => "codes",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
            Self::InTheFile => "in the file",
            Self::Unused => "unused",
        }
    }
}

impl Footprint {
    /// Of a GGUF file that is loaded with some options. O(tensors + vocabulary).
    ///
    /// # Errors
    /// What loading would say of the architecture, of types that this build cannot read and of the tokenizer.
    pub fn of(file: &GgufFile, options: &LoadOptions<'_>) -> Result<Self> {
        let spec = arch::spec(&Config::Gguf { metadata: file.metadata(), tensors: file })?;
        let names = names(true, file);
        let read = ReadOptions::of(options);
        let form = form(&spec, file, names, read);
        let mut matrices: Vec<String> = (0..spec.layers.len())
            .flat_map(|layer| names.matrices().map(|matrix| names.weight(layer, matrix)))
            .collect();
        matrices.sort_unstable();
        let tied = file.tensor(names.output).is_none();
        let of = |tensor: &TensorInfo| -> Result<(HeldAs, usize)> {
            let embedding = tensor.name == names.embedding;
            if embedding && !tied && read.keeps_mapped(options.access) {
                return Ok((HeldAs::InTheFile, 0));
            }
            let head = embedding || tensor.name == names.output;
            match tensor.shape[..] {
                [len] => Ok((HeldAs::F32, 4 * len)),
                [outputs, inputs] if head || matrices.binary_search(&tensor.name).is_ok() => {
                    let form = if head { form.head() } else { form };
                    let held = form.held(tensor.ty, inputs).ok_or_else(|| tensor.bad_type())?;
                    Ok((held.held_as(), held.num_bytes([outputs, inputs])))
                }
                _ => Ok((HeldAs::Unused, 0)),
            }
        };
        let tensors = file.tensors().iter().map(|tensor| {
            let (held, bytes) = of(tensor)?;
            Ok(TensorFootprint { name: tensor.name.clone(), held, bytes })
        });
        let tokenizer = Tokenizer::from_gguf(file.metadata())?.num_bytes().unwrap_or(0);
        Ok(Self { tensors: tensors.collect::<Result<_>>()?, tokenizer })
    }

    /// Bytes of all tensors.
    pub fn weights(&self) -> usize {
        self.tensors.iter().map(|tensor| tensor.bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::model::Model;
    use crate::testkit::tiny_gguf;
    use crate::weight_form::Dtype;

    #[test]
    fn it_is_what_loading_takes() {
        let file = GgufFile::from_bytes(tiny_gguf(3).build(), Path::new("tiny.gguf")).unwrap();
        for dtype in [Dtype::Auto, Dtype::Float32] {
            for quantize in [None, Some(crate::Quantize::Q4_1)] {
                let options = LoadOptions { threads: 1, dtype, quantize, ..LoadOptions::default() };
                let footprint = Footprint::of(&file, &options).unwrap();
                let matrices = footprint.tensors.iter().filter(|t| !t.name.contains("norm"));
                let model = Model::from_gguf(&file, &options).unwrap();
                assert_eq!(matrices.map(|t| t.bytes).sum::<usize>(), model.weight_bytes());
                assert!(footprint.weights() > model.weight_bytes() && footprint.tokenizer > 1000);
            }
        }
    }
}
