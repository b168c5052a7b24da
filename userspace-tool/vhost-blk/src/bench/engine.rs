// SPDX-License-Identifier: GPL-2.0

//! How requests get to where they are served, and back.

use anyhow::{Result, bail};
use vhost_blk_ring::request::SECTOR_SIZE;
use vhost_blk_ring::{Driver, Op, Status, Uring};

/// One queue, as the load sees it.
pub(crate) trait Engine {
    /// Adds the request of a slot, at byte `offset` of the disk.
    fn add(&mut self, slot: u16, op: Op, offset: u64) -> Result<()>;

    /// Hands over what was added.
    fn publish(&mut self) -> Result<()>;

    /// Waits, and takes what is complete then: those slots go to the end of
    /// `done`. There may be none.
    fn wait(&mut self, done: &mut Vec<u16>) -> Result<()>;

    /// What it did so far.
    fn counts(&self) -> Counts;
}

/// What an engine did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Writes to the kick eventfd, or calls of `io_uring_enter`.
    pub(crate) kicks: u64,
    /// Reads of the call eventfd.
    pub(crate) calls: u64,
}

impl Counts {
    /// What it did since it had done `earlier`.
    pub(crate) fn since(self, earlier: Counts) -> Counts {
        Counts {
            kicks: self.kicks - earlier.kicks,
            calls: self.calls - earlier.calls,
        }
    }
}

/// A virtqueue.
pub(crate) struct RingEngine<'m> {
    driver: Driver<'m>,
    poll: bool,
    /// With no device behind the ring: how many requests are complete at once.
    batch: Option<u16>,
    counts: Counts,
}

impl<'m> RingEngine<'m> {
    pub(crate) fn new(driver: Driver<'m>, poll: bool, batch: Option<u16>) -> Result<Self> {
        if poll {
            driver.disable_notifications()?;
        } else {
            driver.enable_notifications()?;
        }
        Ok(RingEngine {
            driver,
            poll,
            batch,
            counts: Counts::default(),
        })
    }

    /// Takes what is complete, until nothing more is and the next one will be
    /// told of: what a driver does in its interrupt handler.
    #[inline]
    fn take_all(&mut self, done: &mut Vec<u16>) -> Result<()> {
        if !self.driver.event_idx() {
            self.driver.disable_notifications()?;
        }
        loop {
            self.driver.take(done)?;
            if !self.driver.enable_notifications()? {
                return Ok(());
            }
        }
    }
}

impl Engine for RingEngine<'_> {
    #[inline]
    fn add(&mut self, slot: u16, op: Op, offset: u64) -> Result<()> {
        Ok(self.driver.add(slot, op, offset / SECTOR_SIZE as u64)?)
    }

    #[inline]
    fn publish(&mut self) -> Result<()> {
        if self.driver.publish()? {
            self.driver.kick()?;
            self.counts.kicks += 1;
        }
        Ok(())
    }

    #[inline]
    fn wait(&mut self, done: &mut Vec<u16>) -> Result<()> {
        if let Some(batch) = self.batch {
            self.driver.answer(batch)?;
        }
        let first = done.len();
        if self.poll {
            loop {
                self.driver.take(done)?;
                if done.len() > first {
                    break;
                }
                std::hint::spin_loop();
            }
        } else {
            self.driver.wait_call()?;
            self.counts.calls += 1;
            self.take_all(done)?;
        }
        for &slot in &done[first..] {
            let status = self.driver.status(slot)?;
            if status != Status::Ok {
                bail!("a request failed: its status is {status:?}");
            }
        }
        Ok(())
    }

    fn counts(&self) -> Counts {
        self.counts
    }
}

/// The host's own io_uring.
pub(crate) struct UringEngine<'m> {
    ring: Uring<'m>,
    poll: bool,
    counts: Counts,
}

impl<'m> UringEngine<'m> {
    pub(crate) fn new(ring: Uring<'m>, poll: bool) -> Self {
        UringEngine {
            ring,
            poll,
            counts: Counts::default(),
        }
    }
}

impl Engine for UringEngine<'_> {
    #[inline]
    fn add(&mut self, slot: u16, op: Op, offset: u64) -> Result<()> {
        // A flush is of the whole file.
        Ok(self.ring.add(slot, op, offset)?)
    }

    #[inline]
    fn publish(&mut self) -> Result<()> {
        // Otherwise the system call that waits submits too.
        if self.poll && self.ring.added() > 0 {
            self.ring.submit_and_wait(0)?;
            self.counts.kicks += 1;
        }
        Ok(())
    }

    #[inline]
    fn wait(&mut self, done: &mut Vec<u16>) -> Result<()> {
        if !self.poll {
            self.ring.submit_and_wait(1)?;
            self.counts.kicks += 1;
            return Ok(self.ring.take(done)?);
        }
        let first = done.len();
        loop {
            self.ring.take(done)?;
            if done.len() > first {
                return Ok(());
            }
            std::hint::spin_loop();
        }
    }

    fn counts(&self) -> Counts {
        self.counts
    }
}
