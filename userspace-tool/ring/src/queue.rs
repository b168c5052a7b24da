// SPDX-License-Identifier: GPL-2.0

//! A ring with requests in flight on it.

use std::collections::HashMap;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::memory::Memory;
use crate::request::{Completion, Prepared, Request, Shape};
use crate::ring::{Ring, Segment, Used};

/// A [`Ring`], and the requests that are in flight on it.
#[derive(Debug)]
pub struct Queue {
    /// The ring, for whatever goes beyond requests.
    pub ring: Ring,
    in_flight: HashMap<u16, Prepared>,
}

impl Queue {
    /// Makes a queue with a ring of `size` descriptors, as [`Ring::new`].
    ///
    /// # Errors
    ///
    /// Those of [`Ring::new`].
    pub fn new(memory: &Memory, size: u16, event_idx: bool) -> Result<Self> {
        Ring::new(memory, size, event_idx).map(Self::with_ring)
    }

    /// Makes a queue with this ring, which is empty.
    pub fn with_ring(ring: Ring) -> Self {
        Queue {
            ring,
            in_flight: HashMap::new(),
        }
    }

    /// Adds a request, and returns the head of its chain. The device does not
    /// see it before [`kick`](Self::kick).
    ///
    /// # Errors
    ///
    /// Those of [`Prepared::new`] and [`Ring::add`].
    pub fn submit(&mut self, request: Request, shape: &Shape) -> Result<u16> {
        let prepared = Prepared::new(self.ring.memory(), request, shape)?;
        let head = self.ring.add(&prepared.segments()?, shape.table)?;
        self.in_flight.insert(head, prepared);
        Ok(head)
    }

    /// The memory of the request at `head`, which is in flight.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`], if none is.
    pub fn segments(&self, head: u16) -> Result<Vec<Segment>> {
        let prepared = self.in_flight.get(&head);
        prepared
            .ok_or_else(|| Error::Invalid(format!("no request at {head}")))?
            .segments()
    }

    /// Publishes what was added, and kicks if the device wants that.
    ///
    /// # Errors
    ///
    /// Those of [`Ring::publish_and_kick`].
    pub fn kick(&mut self) -> Result<()> {
        self.ring.publish_and_kick()
    }

    /// Requests in flight, unpublished ones included.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Takes a request that is complete, if there is one.
    ///
    /// # Errors
    ///
    /// Those of [`Ring::pop_used`].
    pub fn poll(&mut self) -> Result<Option<Completion>> {
        match self.ring.pop_used()? {
            Some(used) => self.complete(used).map(Some),
            None => Ok(None),
        }
    }

    /// Waits for a request to complete, and takes it.
    ///
    /// # Errors
    ///
    /// Those of [`Ring::wait_used`].
    pub fn wait(&mut self, timeout: Duration) -> Result<Completion> {
        let used = self.ring.wait_used(timeout)?;
        self.complete(used)
    }

    /// Waits for all requests to complete, each for at most `timeout`.
    ///
    /// # Errors
    ///
    /// Those of [`Ring::wait_used`].
    pub fn wait_all(&mut self, timeout: Duration) -> Result<Vec<Completion>> {
        let mut all = Vec::with_capacity(self.in_flight());
        while self.in_flight() > 0 {
            all.push(self.wait(timeout)?);
        }
        Ok(all)
    }

    /// Adds one request, kicks, and waits for it.
    ///
    /// # Errors
    ///
    /// Those of the three; [`Error::Invalid`], if another is in flight.
    pub fn run(
        &mut self,
        request: Request,
        shape: &Shape,
        timeout: Duration,
    ) -> Result<Completion> {
        if self.in_flight() > 0 {
            return Err(Error::Invalid("another request is in flight".into()));
        }
        self.submit(request, shape)?;
        self.kick()?;
        self.wait(timeout)
    }

    /// Forgets what is in flight, as [`Ring::abandon`]. The device has to be
    /// stopped.
    pub fn abandon(&mut self) {
        self.ring.abandon();
        self.in_flight.clear();
    }

    /// Makes the ring empty, with both indices at `base`, as [`Ring::reset`].
    /// The device has to be stopped.
    ///
    /// # Errors
    ///
    /// Those of [`Ring::reset`].
    pub fn reset(&mut self, base: u16) -> Result<()> {
        self.in_flight.clear();
        self.ring.reset(base)
    }

    fn complete(&mut self, used: Used) -> Result<Completion> {
        self.in_flight
            .remove(&used.head)
            .ok_or(Error::UnexpectedUsed {
                id: u32::from(used.head),
            })?
            .complete(used)
    }
}
