//! The embedding table, where it is not the output head too.

use kvasir_kernels::Linear;

use crate::dequant::BlockDecoder;
use crate::stored_tensor::StoredTensor;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) enum Embedding {
    /// In a file that stays mapped: rows are decoded when they are looked up, and only those take memory.
    Mapped(StoredTensor, BlockDecoder),
    /// In memory.
    Held(Linear),
}

impl Embedding {
    /// The row of a token. `out`: `[hidden]`.
    pub(crate) fn row_into(&self, token: usize, out: &mut [f32]) {
        match self {
            Self::Mapped(tensor, decode) => decode(tensor.mapped_row(token), out),
            Self::Held(table) => table.row_into(token, out),
        }
    }
}
