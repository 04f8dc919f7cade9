//! An open GGUF file.

use std::path::Path;
use std::sync::Arc;

use super::header::{Header, parse};
use super::metadata::Metadata;
use super::tensor_info::TensorInfo;
use crate::error::{ModelError, Result};
use crate::file_bytes::{Access, FileBytes};
use crate::source::TensorSource;
use crate::stored_tensor::StoredTensor;

/// A GGUF file, memory-mapped, with a checked header. Tensor data is read on request.
///
/// The file must not be changed in place while it is open; a file shortened in place ends the
/// process with SIGBUS. Replacing it by rename is harmless.
///
/// ```no_run
/// use kvasir_model::{TensorSource, gguf::GgufFile};
///
/// let file = GgufFile::open("model.gguf".as_ref())?;
/// for tensor in file.tensors() {
///     println!("{} {:?} {} {} bytes", tensor.name, tensor.shape, tensor.ty, tensor.num_bytes);
/// }
/// let embeddings: Vec<f32> = file.read_f32("token_embd.weight")?;
/// # Ok::<(), kvasir_model::ModelError>(())
/// ```
#[derive(Debug)]
pub struct GgufFile {
    bytes: Arc<FileBytes>,
    header: Header,
}

impl GgufFile {
    /// Maps a file and parses its header; see [`parse`] for the errors, plus [`ModelError::Io`].
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_as(path, Access::Mapped)
    }

    /// [`Self::open`] with tensors that come into memory in some way.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_as(path: &Path, access: Access) -> Result<Self> {
        Self::new(FileBytes::open(path, access)?)
    }

    /// A file that is already in memory. `path` is only shown in messages.
    pub fn from_bytes(bytes: Vec<u8>, path: &Path) -> Result<Self> {
        Self::new(FileBytes::owned(bytes, path))
    }

    fn new(bytes: FileBytes) -> Result<Self> {
        let header = parse(bytes.as_slice(), bytes.path())?;
        Ok(Self { bytes: Arc::new(bytes), header })
    }

    /// Where the file was opened.
    pub fn path(&self) -> &Path {
        self.bytes.path()
    }

    /// Size of the file.
    pub fn file_bytes(&self) -> u64 {
        self.bytes.as_slice().len() as u64
    }

    /// Version of the format, 2 or 3.
    pub fn version(&self) -> u32 {
        self.header.version()
    }

    /// The key-value pairs.
    pub fn metadata(&self) -> &Metadata {
        self.header.metadata()
    }

    /// Drops what only the tokenizer is made of: up to some ten MiB that nobody else reads.
    pub fn forget_vocabulary(&mut self) {
        self.header.forget("tokenizer.");
        self.bytes.release_pages();
    }

    /// All tensors in file order.
    pub fn tensors(&self) -> &[TensorInfo] {
        self.header.tensors()
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.header.tensor(name)
    }

    /// A tensor's bytes as stored, `num_bytes` of them.
    ///
    /// # Errors
    /// [`ModelError::MissingTensor`].
    pub fn tensor_bytes(&self, name: &str) -> Result<&[u8]> {
        self.tensor(name)
            .and_then(|tensor| {
                let start = usize::try_from(tensor.offset).ok()?;
                let end = start.checked_add(usize::try_from(tensor.num_bytes).ok()?)?;
                self.bytes.as_slice().get(start..end)
            })
            .ok_or_else(|| ModelError::MissingTensor { name: name.to_owned() })
    }

    /// Takes the mapping's pages out of the resident set, to be called when the weights have been
    /// read. The file stays usable: pages come back when they are read again.
    pub fn release_pages(&self) {
        self.bytes.release_pages();
    }
}

impl TensorSource for GgufFile {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensor(name).map(|tensor| tensor.shape.clone())
    }

    fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        let stored = self.stored(name);
        stored.ok_or_else(|| ModelError::MissingTensor { name: name.to_owned() })?.read_f32()
    }

    fn stored(&self, name: &str) -> Option<StoredTensor> {
        let tensor = self.tensor(name)?;
        let start = usize::try_from(tensor.offset).ok()?;
        StoredTensor::new((name, tensor.ty), &tensor.shape, &self.bytes, start)
    }
}
