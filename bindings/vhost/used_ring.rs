// SPDX-License-Identifier: GPL-2.0

//! A used ring that is written in any context.
//!
//! The core's own functions write the ring as user memory, and only in process context. While this
//! has the ring mapped, every used entry of the virtqueue goes through here.
//!
//! Source: virtio 1.3, 2.7.8 and 2.7.10; `drivers/vhost/vhost.c`.

use crate::bindings::{
    compat::{
        smp_mb,
        smp_wmb, //
    },
    pages::Mapping,
    raw,
};
use core::{
    cell::UnsafeCell,
    mem::size_of,
    ptr::NonNull, //
};
use kernel::{
    error::from_err_ptr,
    prelude::*,
    sync::atomic::{
        ordering,
        Atomic, //
    },
    types::Opaque, //
};

/// `VRING_AVAIL_F_NO_INTERRUPT` of `linux/virtio_ring.h`.
const NO_INTERRUPT: u16 = raw::VRING_AVAIL_F_NO_INTERRUPT as u16;

/// Where an entry stands in the ring, in bytes: behind `flags` and `idx`.
const ENTRIES: usize = 2 * size_of::<u16>();

/// A reference to the guest's call eventfd.
///
/// # Invariants
///
/// It is a reference that belongs to this object.
pub(crate) struct EventFd(NonNull<raw::eventfd_ctx>);

// SAFETY: A `struct eventfd_ctx` may be used by any thread, and does its own locking.
unsafe impl Send for EventFd {}

impl EventFd {
    /// The eventfd behind a descriptor of the calling task.
    ///
    /// # Errors
    ///
    /// `EBADF`, `EINVAL` if it is no eventfd.
    pub(crate) fn from_fd(fd: i32) -> Result<Self> {
        // SAFETY: Any number may be asked for.
        let context = from_err_ptr(unsafe { raw::eventfd_ctx_fdget(fd) })?;
        // INVARIANT: The function returns a reference.
        Ok(Self(NonNull::new(context).ok_or(EBADF)?))
    }

    /// Signals it. Context: any.
    #[inline]
    fn signal(&self) {
        // SAFETY: By the type invariant there is a reference.
        unsafe { raw::eventfd_signal_mask(self.0.as_ptr(), 0) };
    }
}

impl Drop for EventFd {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the reference is ours.
        unsafe { raw::eventfd_ctx_put(self.0.as_ptr()) };
    }
}

/// What a mapped ring is like.
pub(super) struct Layout {
    /// The owner's addresses of the used and of the available ring.
    pub(super) used: usize,
    pub(super) avail: usize,
    /// Entries of each, a power of two.
    pub(super) num: u16,
    pub(super) event_idx: bool,
    pub(super) little_endian: bool,
}

/// The rings, mapped.
pub(super) struct Rings {
    used: Mapping,
    avail: Mapping,
    layout: Layout,
    /// The index that the next entry gets.
    next: u16,
    /// The index that the guest was last notified of, unless that was too long ago.
    signalled: Option<u16>,
}

impl Rings {
    /// Maps the rings.
    ///
    /// Context: process context in the owner's address space; may sleep.
    ///
    /// # Errors
    ///
    /// `EFAULT`, `ENOMEM`.
    pub(super) fn new(layout: Layout) -> Result<Self> {
        let num = usize::from(layout.num);
        // The events' indices, where the core looks for them only with the feature.
        let tail = if layout.event_idx {
            size_of::<u16>()
        } else {
            0
        };
        Ok(Self {
            used: Mapping::new(
                layout.used,
                ENTRIES + num * size_of::<raw::vring_used_elem>() + tail,
            )?,
            avail: Mapping::new(layout.avail, ENTRIES + num * size_of::<u16>() + tail)?,
            layout,
            next: 0,
            signalled: None,
        })
    }

    #[inline]
    fn u16(&self, value: u16) -> u16 {
        if self.layout.little_endian {
            value.to_le()
        } else {
            value.to_be()
        }
    }

    /// Makes a used entry, in the guest's byte order, which it sees after [`Rings::publish`].
    #[inline]
    pub(super) fn push(&mut self, entry: &raw::vring_used_elem) {
        let slot = usize::from(self.next & (self.layout.num - 1));
        let at = ENTRIES + slot * size_of::<raw::vring_used_elem>();
        self.used.write(at, [entry.id, entry.len]);
        self.next = self.next.wrapping_add(1);
        if self.signalled == Some(self.next) {
            // Once around, without a word to the guest: what it was told last says nothing any more.
            self.signalled = None;
        }
    }

    /// Shows the guest the entries that were made. Returns whether it wants to be notified.
    #[inline]
    fn publish(&mut self) -> bool {
        // The guest reads the index first.
        smp_wmb();
        self.used.write(size_of::<u16>(), self.u16(self.next));
        // It writes what it wants, then reads the index again.
        smp_mb();

        if !self.layout.event_idx {
            let flags = self.avail.read(0).map_or(0, |flags| self.u16(flags));
            return flags & NO_INTERRUPT == 0;
        }
        let Some(old) = self.signalled.replace(self.next) else {
            return true;
        };
        let at = ENTRIES + usize::from(self.layout.num) * size_of::<u16>();
        let event = self.avail.read(at).map_or(old, |event| self.u16(event));
        // `vring_need_event()`: whether the index went past the event.
        self.next.wrapping_sub(event).wrapping_sub(1) < self.next.wrapping_sub(old)
    }
}

/// What the lock of a [`UsedRing`] protects.
struct Inner {
    rings: Option<Rings>,
    call: Option<EventFd>,
}

/// The used ring of a virtqueue, if it is mapped, and whom to tell of new entries.
///
/// # Invariants
///
/// `inner` is accessed with `lock` held, which is taken with interrupts off.
#[pin_data]
pub(super) struct UsedRing {
    #[pin]
    lock: Opaque<raw::spinlock_t>,
    inner: UnsafeCell<Inner>,
    mapped: Atomic<bool>,
    /// The index of the next entry, or a moment ago, if it is mapped.
    next: Atomic<u32>,
}

// SAFETY: `inner` is `Send`, and accessed with the lock held.
unsafe impl Sync for UsedRing {}

impl UsedRing {
    /// One that is not mapped.
    pub(super) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            // SAFETY: It is memory for a spinlock.
            lock <- Opaque::ffi_init(|lock| unsafe { raw::rust_helper_spin_lock_init(lock) }),
            inner: UnsafeCell::new(Inner {
                rings: None,
                call: None,
            }),
            mapped: Atomic::new(false),
            next: Atomic::new(0),
        })
    }

    #[inline]
    fn with_inner<R>(&self, f: impl FnOnce(&mut Inner) -> R) -> R {
        // SAFETY: By the type invariant all accesses are here, with the lock held. It is initialised
        // when the object is.
        unsafe {
            let flags = raw::rust_helper_spin_lock_irqsave(self.lock.get());
            let result = f(&mut *self.inner.get());
            raw::rust_helper_spin_unlock_irqrestore(self.lock.get(), flags);
            result
        }
    }

    /// Has `f` make used entries, shows them to the guest, and notifies it if it wants that. Returns
    /// `None` if the ring is not mapped: then `f` was not called, and the core writes it.
    ///
    /// Context: any.
    #[inline]
    pub(super) fn complete<R>(&self, f: impl FnOnce(&mut Rings) -> R) -> Option<R> {
        // It changes with the virtqueue's mutex held: whoever holds that reads the truth, and who does
        // not leaves the request to one who does.
        if !self.is_mapped() {
            return None;
        }
        self.with_inner(|inner| {
            let rings = inner.rings.as_mut()?;
            let result = f(rings);
            self.next.store(u32::from(rings.next), ordering::Relaxed);
            if rings.publish() {
                if let Some(call) = &inner.call {
                    call.signal();
                }
            }
            Some(result)
        })
    }

    /// Whether the ring is mapped, as far as can be said without the lock.
    #[inline]
    pub(super) fn is_mapped(&self) -> bool {
        self.mapped.load(ordering::Relaxed)
    }

    /// The index of the next entry, as far as can be said without the lock, if the ring is mapped.
    #[inline]
    pub(super) fn next_if_mapped(&self) -> Option<u16> {
        // CAST: It is one of 16 bits.
        self.is_mapped()
            .then(|| self.next.load(ordering::Relaxed) as u16)
    }

    /// Sets whom to tell of new entries. Context: process.
    pub(super) fn set_call(&self, call: Option<EventFd>) {
        drop(self.with_inner(|inner| {
            if let Some(rings) = &mut inner.rings {
                // It may have missed some.
                rings.signalled = None;
            }
            core::mem::replace(&mut inner.call, call)
        }));
    }

    /// Maps, maps anew, or gives up the rings: then the core writes them. `next` is the index of
    /// the next entry if they were not mapped. Returns the index of the next entry now.
    ///
    /// Context: process context; may sleep.
    pub(super) fn set_rings(&self, mut rings: Option<Rings>, next: u16) -> u16 {
        self.mapped.store(rings.is_some(), ordering::Relaxed);
        let (old, next) = self.with_inner(|inner| {
            let next = inner.rings.as_ref().map_or(next, |old| old.next);
            if let Some(rings) = &mut rings {
                rings.next = next;
            }
            self.next.store(u32::from(next), ordering::Relaxed);
            (core::mem::replace(&mut inner.rings, rings), next)
        });
        drop(old);
        next
    }
}
