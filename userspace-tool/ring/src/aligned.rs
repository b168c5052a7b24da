// SPDX-License-Identifier: GPL-2.0

//! Memory of this process for direct I/O on the host's own files.

/// What direct I/O needs at most: alignment of memory, bytes.
pub const ALIGN: usize = 4096;

/// Bytes at a multiple of [`ALIGN`], zero at first.
#[derive(Debug)]
pub struct Aligned {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    /// `len` bytes.
    pub fn new(len: usize) -> Self {
        let memory = vec![0; len + ALIGN];
        let start = memory.as_ptr().align_offset(ALIGN);
        Aligned { memory, start, len }
    }

    /// They.
    pub fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligned_memory_is_aligned() {
        for len in [1, 512, 4096, 100_000] {
            let mut aligned = Aligned::new(len);
            let bytes = aligned.bytes();
            assert_eq!(bytes.len(), len);
            assert_eq!(bytes.as_ptr().addr() % ALIGN, 0);
        }
    }
}
