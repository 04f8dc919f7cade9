//! Bytes that live in a file and are read as memory: what is not read need not be resident.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::Mmap;

use crate::aligned::AlignedBytes;

/// Bytes that are being written. If the file system takes no more, they are kept in memory.
#[derive(Debug)]
pub struct SpillWriter {
    file: Option<File>,
    memory: Vec<u8>,
    len: usize,
}

/// Bytes that were written. Aligned for any number.
#[derive(Debug)]
pub struct Spill {
    content: Content,
}

#[derive(Debug)]
enum Content {
    Mapped(Mmap),
    Owned(AlignedBytes, usize),
}

impl SpillWriter {
    /// A file in the folder for temporary files, which nobody else can open and which is gone when it is closed.
    pub fn new() -> Self {
        Self { file: nameless_file().ok(), memory: Vec::new(), len: 0 }
    }

    /// Adds bytes.
    pub fn write(&mut self, bytes: &[u8]) {
        self.len += bytes.len();
        if let Some(file) = &mut self.file {
            if file.write_all(bytes).is_ok() {
                return;
            }
            // What went into the file comes back; a write that was cut short is written again.
            self.memory = vec![0; self.len - bytes.len()];
            let read =
                file.seek(SeekFrom::Start(0)).and_then(|_| file.read_exact(&mut self.memory));
            debug_assert!(read.is_ok());
            self.file = None;
        }
        self.memory.extend_from_slice(bytes);
    }

    /// Bytes so far.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// No more bytes.
    pub fn finish(self) -> Spill {
        let Self { file, mut memory, len } = self;
        if let Some(mut file) = file {
            // SAFETY: the file has no name and no other handle, so nobody can change or shorten it while it is mapped.
            if let Ok(mapping) = unsafe { Mmap::map(&file) }
                && mapping.len() == len
            {
                return Spill { content: Content::Mapped(mapping) };
            }
            memory = vec![0; len];
            let read = file.seek(SeekFrom::Start(0)).and_then(|_| file.read_exact(&mut memory));
            debug_assert!(read.is_ok());
        }
        let mut owned = AlignedBytes::zeroed(len);
        owned.as_mut_slice()[..len].copy_from_slice(&memory);
        Spill { content: Content::Owned(owned, len) }
    }
}

impl Default for SpillWriter {
    fn default() -> Self {
        Self::new()
    }
}

impl Spill {
    /// All bytes.
    #[inline]
    pub fn as_slice(&self) -> &[u8] {
        match &self.content {
            Content::Mapped(mapping) => mapping,
            Content::Owned(bytes, len) => &bytes.as_slice()[..*len],
        }
    }

    /// Bytes that take memory for good, because no file took them.
    pub fn resident_bytes(&self) -> usize {
        match &self.content {
            Content::Mapped(_) => 0,
            Content::Owned(_, len) => *len,
        }
    }
}

/// A file that has lost its name already.
fn nameless_file() -> io::Result<File> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let name = format!("kvasir-{}-{number}.spill", std::process::id());
    let path = std::env::temp_dir().join(name);
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_from_a_file_or_from_memory() {
        let parts: Vec<Vec<u8>> = (0..20u8).map(|i| vec![i; 1000 + usize::from(i)]).collect();
        for in_memory in [false, true] {
            let mut writer = SpillWriter::new();
            if in_memory {
                writer.file = None;
            }
            parts.iter().for_each(|part| writer.write(part));
            let len = writer.len();
            let spill = writer.finish();
            assert_eq!(spill.as_slice(), parts.concat());
            assert_eq!(spill.resident_bytes(), if in_memory { len } else { 0 });
        }
        assert!(SpillWriter::new().finish().as_slice().is_empty());
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_file_that_takes_no_more_gives_back_what_it_took() {
        // Opened for reading only: every write fails.
        let mut writer = SpillWriter::new();
        writer.write(&[1; 100]);
        let path = std::env::temp_dir().join(format!("kvasir-test-{}", std::process::id()));
        std::fs::write(&path, [1; 100]).unwrap();
        writer.file = Some(File::open(&path).unwrap());
        std::fs::remove_file(&path).unwrap();
        writer.write(&[2; 50]);
        writer.write(&[3; 50]);
        let spill = writer.finish();
        assert_eq!(spill.as_slice(), [vec![1; 100], vec![2; 50], vec![3; 50]].concat());
        assert_eq!(spill.resident_bytes(), 200);
    }
}
