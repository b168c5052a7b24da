// SPDX-License-Identifier: GPL-2.0

//! The dirty log: the pages of the guest's memory that were written.
//!
//! The core logs what it writes itself, which is the used ring. Here is what a request writes: its chain's
//! writable memory is kept from the fetch on, and what was written of it is logged when the request
//! completes.
//!
//! Source: `vhost_get_vq_desc_n()` and `vhost_log_write()` in `drivers/vhost/vhost.c`.

use crate::bindings::{
    iov::IoVec,
    raw, //
};
use core::{
    cell::Cell,
    mem::{
        align_of,
        size_of, //
    },
};
use kernel::{
    alloc::flags::__GFP_NOWARN,
    error::to_result,
    prelude::*, //
};

/// A stretch of memory; `struct vhost_log`.
#[repr(transparent)]
struct Stretch(raw::vhost_log);

impl Clone for Stretch {
    fn clone(&self) -> Self {
        Self::new(self.0.addr, self.0.len)
    }
}

// With a device IOTLB the core takes them as the owner's memory.
const _: () = assert!(
    size_of::<raw::vhost_log>() == size_of::<raw::iovec>()
        && align_of::<raw::vhost_log>() == align_of::<raw::iovec>(),
    "struct vhost_log is not laid out like struct iovec"
);

impl Stretch {
    const fn new(addr: u64, len: u64) -> Self {
        Self(raw::vhost_log { addr, len })
    }
}

impl From<&IoVec> for Stretch {
    fn from(iovec: &IoVec) -> Self {
        Self::new(iovec.address() as u64, iovec.len() as u64)
    }
}

/// Room for the writable memory of the chain that is being fetched, by the guest's addresses; none while it
/// is not logged what requests write.
pub(super) struct LogArray(VVec<Stretch>);

impl LogArray {
    /// None.
    pub(super) const OFF: Self = Self(VVec::new());

    /// Room for chains of up to `max_iovecs` stretches if it is logged, or none.
    ///
    /// # Errors
    ///
    /// `ENOMEM`. Context: may sleep.
    pub(super) fn new(on: bool, max_iovecs: usize) -> Result<Self> {
        if !on {
            return Ok(Self::OFF);
        }
        // The core makes an entry for each descriptor, which takes one of the chain's iovecs at least.
        let stretches = VVec::from_elem(Stretch::new(0, 0), max_iovecs, GFP_KERNEL_ACCOUNT)?;
        Ok(Self(stretches))
    }

    /// Whether there is room.
    #[inline]
    pub(super) fn is_on(&self) -> bool {
        !self.0.is_empty()
    }

    /// The first entries.
    fn first(&self, len: usize) -> &[Stretch] {
        self.0.get(..len).unwrap_or_default()
    }

    /// The C form: room for as many as a chain may have, or null.
    #[inline]
    pub(super) fn as_raw_mut(&mut self) -> *mut raw::vhost_log {
        if self.is_on() {
            self.0.as_mut_ptr().cast()
        } else {
            core::ptr::null_mut()
        }
    }
}

/// Whose addresses stretches have.
#[derive(Copy, Clone, PartialEq, Eq)]
enum AddressSpace {
    /// The guest's physical ones.
    Guest,
    /// The owner's: what the guest gave went through a device IOTLB.
    Owner,
}

impl AddressSpace {
    /// What the core wants to log for a virtqueue.
    ///
    /// # Safety
    ///
    /// `vq` must be initialised, and the caller hold its mutex.
    unsafe fn of(vq: *mut raw::vhost_virtqueue) -> Self {
        // SAFETY: The caller promises that the virtqueue is initialised and its mutex held.
        if unsafe { (*vq).iotlb.is_null() } {
            Self::Guest
        } else {
            Self::Owner
        }
    }
}

/// The memory that a request may write, to be logged when it completes.
pub(super) struct Log {
    /// All the writable memory of its chain. The last byte is the status.
    memory: KVVec<Stretch>,
    space: AddressSpace,
    /// How many bytes from the start on may have been written, the status apart.
    written: Cell<usize>,
}

impl Log {
    /// Keeps the writable memory of a chain, of which nothing was written yet: `iovecs`, for which the core
    /// made so many `entries` in `array`.
    ///
    /// # Errors
    ///
    /// `ENOMEM`. Context: may sleep.
    ///
    /// # Safety
    ///
    /// `vq` must be initialised, and the caller hold its mutex.
    #[cold]
    pub(super) unsafe fn new(
        vq: *mut raw::vhost_virtqueue,
        array: &LogArray,
        entries: usize,
        iovecs: &[IoVec],
    ) -> Result<KBox<Self>> {
        // SAFETY: The caller promises what is said of `vq`.
        match unsafe { AddressSpace::of(vq) } {
            AddressSpace::Guest => {
                Self::keep(array.first(entries).iter().cloned(), AddressSpace::Guest)
            }
            AddressSpace::Owner => {
                Self::keep(iovecs.iter().map(Stretch::from), AddressSpace::Owner)
            }
        }
    }

    fn keep(
        memory: impl ExactSizeIterator<Item = Stretch>,
        space: AddressSpace,
    ) -> Result<KBox<Self>> {
        let flags = GFP_KERNEL_ACCOUNT | __GFP_NOWARN;
        let mut stretches = KVVec::with_capacity(memory.len(), flags)?;
        for stretch in memory {
            stretches.push(stretch, flags)?;
        }
        let log = Self {
            memory: stretches,
            space,
            written: Cell::new(0),
        };
        Ok(KBox::new(log, flags)?)
    }

    /// Says that the first `len` bytes may be written from now on.
    pub(super) fn will_write(&self, len: usize) {
        self.written.set(self.written.get().max(len));
    }

    /// Logs what was written, which is the status and what [`Log::will_write`] was told.
    ///
    /// Context: process context in the owner's address space; may sleep.
    ///
    /// # Errors
    ///
    /// Those of `vhost_log_write()`: the log cannot be written, or is too short. `EINVAL` if the
    /// addresses are of another kind than the virtqueue logs by now.
    ///
    /// # Safety
    ///
    /// `vq` must be initialised and have an owner, and the caller hold its mutex.
    pub(super) unsafe fn write(mut self: KBox<Self>, vq: *mut raw::vhost_virtqueue) -> Result {
        // SAFETY: The caller promises what is said of `vq`.
        if self.space != unsafe { AddressSpace::of(vq) } {
            return Err(EINVAL);
        }
        let last = self.memory.iter().rev().find(|last| last.0.len > 0);
        let status = last.map(|last| Stretch::new(last.0.addr + (last.0.len - 1), 1));

        let mut left = self.written.get() as u64;
        for stretch in self.memory.iter_mut() {
            stretch.0.len = stretch.0.len.min(left);
            left -= stretch.0.len;
        }
        // SAFETY: The caller promises what is said of `vq`.
        unsafe {
            write(vq, &self.memory)?;
            write(vq, status.as_slice())
        }
    }
}

/// Logs memory, whose addresses are in the virtqueue's [`AddressSpace`].
///
/// Context: process context in the owner's address space; may sleep.
///
/// # Errors
///
/// Those of `vhost_log_write()`.
///
/// # Safety
///
/// `vq` must be initialised and have an owner, and the caller hold its mutex.
unsafe fn write(vq: *mut raw::vhost_virtqueue, memory: &[Stretch]) -> Result {
    let stretches = memory.as_ptr().cast_mut();
    // SAFETY: The caller promises what is said of `vq`. The core reads as many stretches as the array has,
    // as one type or the other, which have the same layout and take any value.
    to_result(unsafe {
        raw::vhost_log_write(
            vq,
            stretches.cast(),
            memory.len() as u32,
            u64::MAX,
            stretches.cast(),
            memory.len() as i32,
        )
    })
}

/// Whether the log takes the used ring of a virtqueue, if that is logged: the core, which logs what it
/// writes there, does not say.
///
/// Context: process context in the owner's address space; may sleep.
///
/// # Errors
///
/// Those of `vhost_log_write()`.
///
/// # Safety
///
/// `vq` must be initialised and have an owner, and the caller hold its mutex.
pub(super) unsafe fn check_used(vq: *mut raw::vhost_virtqueue) -> Result {
    // SAFETY: The caller promises what is said of `vq`.
    unsafe {
        // By the device IOTLB it may be anywhere.
        if !(*vq).log_used || AddressSpace::of(vq) != AddressSpace::Guest {
            return Ok(());
        }
        let entries = (*vq).num as usize * size_of::<raw::vring_used_elem>();
        let len = size_of::<raw::vring_used>() + entries + size_of::<u16>();
        write(vq, &[Stretch::new((*vq).log_addr, len as u64)])
    }
}
