//! A matrix as a file has it: its type, and its rows piece by piece.

use std::ops::Range;
use std::sync::Arc;

use crate::error::{ModelError, Result};
use crate::file_bytes::{FileBytes, Piece};
use crate::gguf::GgmlType;

/// See the module's documentation. Of a tensor of one dimension the whole is a row.
#[derive(Debug, Clone)]
pub struct StoredTensor {
    name: String,
    ty: GgmlType,
    rows: usize,
    row_bytes: usize,
    file: Arc<FileBytes>,
    /// Where it begins in the file.
    start: usize,
}

impl StoredTensor {
    /// A tensor whose bytes begin at `start`; `None` if its rows are not whole blocks of the type.
    pub(crate) fn new(
        (name, ty): (&str, GgmlType),
        shape: &[usize],
        file: &Arc<FileBytes>,
        start: usize,
    ) -> Option<Self> {
        let (row, outer) = shape.split_last()?;
        let whole = row.is_multiple_of(ty.block_elements());
        let rows = outer.iter().try_fold(1usize, |rows, n| rows.checked_mul(*n))?;
        let row_bytes = (row / ty.block_elements()).checked_mul(ty.block_bytes())?;
        let name = name.to_owned();
        whole.then(|| Self { name, ty, rows, row_bytes, file: Arc::clone(file), start })
    }

    /// How its elements are stored.
    pub fn ty(&self) -> GgmlType {
        self.ty
    }

    /// Whether rows can be read later without memory of the process.
    pub(crate) fn stays_mapped(&self) -> bool {
        self.file.stays_mapped()
    }

    /// Makes some rows readable, until what is returned is dropped.
    ///
    /// # Errors
    /// [`ModelError::Io`]; [`ModelError::Damaged`] for rows that are not there.
    pub fn open(&self, rows: Range<usize>) -> Result<StoredRows> {
        let at = |row: usize| self.start + row * self.row_bytes;
        let bytes = self.file.piece(at(rows.start)..at(rows.end.min(self.rows)))?;
        Ok(StoredRows { ty: self.ty, first: rows.start, row_bytes: self.row_bytes, bytes })
    }

    /// One row of a file that stays mapped, where it lies; empty if there is none. Its pages stay resident.
    pub(crate) fn mapped_row(&self, row: usize) -> &[u8] {
        let start = self.start + row * self.row_bytes;
        let row = self.file.as_slice().get(start..start + self.row_bytes);
        row.unwrap_or_default()
    }

    /// All of it as f32.
    ///
    /// # Errors
    /// As [`Self::open`]; [`ModelError::TensorType`] for a type that this build cannot read.
    pub fn read_f32(&self) -> Result<Vec<f32>> {
        let rows = self.open(0..self.rows)?;
        crate::dequant::dequantize(&self.name, self.ty, &rows.bytes)
    }

    /// The error of a type that this build cannot read.
    pub(crate) fn bad_type(&self) -> ModelError {
        ModelError::TensorType { name: self.name.clone(), ty: self.ty.name().to_owned() }
    }
}

/// Rows of a [`StoredTensor`] that can be read.
#[derive(Debug)]
pub struct StoredRows {
    ty: GgmlType,
    first: usize,
    row_bytes: usize,
    bytes: Piece,
}

impl StoredRows {
    /// The blocks of a row from element `from` on, which begins a block; empty if there is no such row.
    pub fn blocks(&self, row: usize, from: usize) -> &[u8] {
        let before = from / self.ty.block_elements() * self.ty.block_bytes();
        let row = row.checked_sub(self.first).and_then(|row| {
            let start = row.checked_mul(self.row_bytes)?;
            self.bytes.get(start..start + self.row_bytes)
        });
        row.and_then(|row| row.get(before..)).unwrap_or_default()
    }
}
