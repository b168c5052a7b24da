// SPDX-License-Identifier: GPL-2.0

//! Whether a request goes on where one before it ended.
//!
//! Pure code without kernel types, compiled again for the tests in user space.

/// Requests that are remembered. Of what is plugged the block layer compares a bio with the last one only; with up to
/// eight only where requests have to wait for the disk.
const COUNT: usize = 2;

/// Where the last requests ended, in sectors.
pub(crate) struct Streams {
    ends: [u64; COUNT],
    /// That of the oldest one.
    oldest: usize,
}

impl Default for Streams {
    fn default() -> Self {
        Self {
            // No request begins there: it would end beyond it.
            ends: [u64::MAX; COUNT],
            oldest: 0,
        }
    }
}

impl Streams {
    /// Learns of a request for `sectors` sectors from `sector` on. Returns whether it goes on where one of the last
    /// ones ended.
    #[inline]
    pub(crate) fn goes_on(&mut self, sector: u64, sectors: u64) -> bool {
        let goes_on = self.ends.contains(&sector);
        if let Some(end) = self.ends.get_mut(self.oldest) {
            *end = sector.wrapping_add(sectors);
        }
        self.oldest = (self.oldest + 1) % COUNT;
        goes_on
    }
}
