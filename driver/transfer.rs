// SPDX-License-Identifier: GPL-2.0

//! How a request's memory becomes bios.
//!
//! Pure code without kernel types, compiled again for the tests in user space.

/// Bytes of a page.
pub(crate) const PAGE_SIZE: usize = 4096;

/// How the memory of one request goes into bios.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Plan {
    /// All of it fits one bio of so many pieces of pages.
    Single(usize),
    /// It takes several bios, each of which ends between logical blocks.
    Split,
    /// The disk cannot access it, or it cannot be cut between logical blocks: it is copied.
    Bounce,
}

/// Plans how memory, given as pairs of address and length in bytes, goes into bios of at most
/// `max_pages` pieces of pages.
///
/// `dma_alignment` is the mask of bits that must be 0 in addresses and lengths;
/// `logical_block_size` is in bytes, a power of two.
///
/// Pieces that are no whole blocks are copied even if the disk could access them: the block layer
/// may have to cut a bio between any two of them, and cannot cut a block.
pub(crate) fn plan(
    segments: impl Iterator<Item = (usize, usize)>,
    dma_alignment: u32,
    logical_block_size: u32,
    max_pages: usize,
) -> Plan {
    // Bits that are set in any address, and in any length.
    let (mut addresses, mut lengths) = (0, 0);
    let mut pages = 0usize;
    for (address, len) in segments {
        addresses |= address;
        lengths |= len;
        pages = pages.saturating_add(pages_of(address, len));
    }
    let within_block = (logical_block_size as usize).max(512) - 1;

    if (addresses | lengths) & dma_alignment as usize != 0 || lengths & within_block != 0 {
        Plan::Bounce
    } else if pages <= max_pages {
        Plan::Single(pages)
    } else if addresses & within_block == 0 && within_block < PAGE_SIZE {
        Plan::Split
    } else {
        Plan::Bounce
    }
}

/// How many pages `len` bytes from `address` on touch.
fn pages_of(address: usize, len: usize) -> usize {
    let offset = address % PAGE_SIZE;
    // Dividing first, since the sum may overflow.
    len / PAGE_SIZE + (offset + len % PAGE_SIZE).div_ceil(PAGE_SIZE)
}
