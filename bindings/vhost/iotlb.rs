// SPDX-License-Identifier: GPL-2.0

//! The device IOTLB: what a virtqueue does when the translation of an address is missing.
//!
//! With `VIRTIO_F_ACCESS_PLATFORM` all addresses of the guest's are I/O virtual ones. User space gives
//! translations, and takes them away, by messages that it writes to the character device. The core asks for
//! one that is missing by a message for user space to read, and lets the worker look at the ring again when
//! it comes. A virtqueue's translations change only while its mutex is held.
//!
//! Source: `drivers/vhost/vhost.c`, `include/uapi/linux/vhost_types.h`.

use super::virtqueue::{
    Operations,
    VirtqueueGuard, //
};
use crate::bindings::{
    raw,
    uapi::feature, //
};
use core::mem::size_of;

/// Misses of one virtqueue, of a ring and of a chain's memory, that user space is told of before it
/// answered any. The core of 7.2 has no limit of its own.
const MAX_MISSES: usize = 2;

/// Translations that an IOTLB has room for: `max_iotlb_entries` of the module `vhost`, unless it is set.
pub(super) const ENTRIES: usize = 2048;

impl<T: Operations> VirtqueueGuard<'_, T> {
    /// Whether the virtqueue's addresses are those of a device IOTLB.
    #[inline]
    pub(super) fn has_iotlb(&self) -> bool {
        // SAFETY: The mutex is held, under which the core changes it.
        unsafe { !(*self.as_raw()).iotlb.is_null() }
    }

    /// Whether the rings can be accessed as long as the mutex is held. If not, a translation is missing,
    /// for which user space was asked, or one forbids it.
    #[inline]
    pub(super) fn rings_accessible(&mut self) -> bool {
        !self.has_iotlb() || self.rings_translated()
    }

    /// As [`VirtqueueGuard::rings_accessible`], with a device IOTLB.
    #[cold]
    fn rings_translated(&mut self) -> bool {
        if let Some(translated) = self.translated() {
            return translated;
        }
        let asked = self.missed().rings && self.misses() >= MAX_MISSES;
        // SAFETY: The mutex is held.
        let translated = !asked && unsafe { raw::vq_meta_prefetch(self.as_raw()) } != 0;
        self.missed().rings = !translated;
        self.set_translated(translated);
        if translated && !self.ensure_initialised() {
            self.set_translated(false);
            return false;
        }
        translated
    }

    /// Sees to it that the worker comes back once the rings can be accessed, which they cannot be now.
    /// Rings that the device may not access at all are broken.
    #[cold]
    pub(super) fn wait_for_rings(&mut self) {
        if self.rings_forbidden() {
            self.set_broken();
        } else {
            self.wait_for_translation();
        }
    }

    /// Sees to it that the worker comes back for a translation that is missing.
    #[cold]
    pub(super) fn wait_for_translation(&self) {
        // Not asked for, for want of memory, or just being read: one attempt more does no harm.
        if self.misses() == 0 {
            self.poll();
        }
    }

    /// Whether user space was asked for the memory of the next chain, and need not be asked again before
    /// it answers.
    #[inline]
    pub(super) fn waits_for_chain(&mut self) -> bool {
        self.missed().chain && self.misses() >= MAX_MISSES
    }

    /// Notes that a translation of the next chain's memory is missing. Returns whether it may come: a chain
    /// that needs more of them than the IOTLB has room for would be looked at for ever.
    #[cold]
    pub(super) fn chain_missed(&mut self) -> bool {
        // SAFETY: The mutex is held, under which the core changes the IOTLB, and there is one.
        let (nmaps, limit) = unsafe {
            let iotlb = (*self.as_raw()).iotlb;
            ((*iotlb).nmaps, (*iotlb).limit)
        };
        let missed = self.missed();
        missed.chain = true;
        // While it stays full, a chain that fits misses each at most once, and again what is taken away.
        missed.full = if limit != 0 && nmaps >= limit {
            missed.full.saturating_add(1)
        } else {
            0
        };
        missed.full < limit.saturating_mul(2).max(1)
    }

    /// How many misses of the virtqueue user space has not answered.
    fn misses(&self) -> usize {
        let vq = self.as_raw();
        // SAFETY: The virtqueue is initialised, and part of a device that is. The lists hold
        // `struct vhost_msg_node`s, and change with the lock held. The core takes it with interrupts on,
        // and never in one.
        unsafe {
            let dev = (*vq).dev;
            let flags = raw::rust_helper_spin_lock_irqsave(&raw mut (*dev).iotlb_lock);
            let count =
                count(&raw const (*dev).read_list, vq) + count(&raw const (*dev).pending_list, vq);
            raw::rust_helper_spin_unlock_irqrestore(&raw mut (*dev).iotlb_lock, flags);
            count
        }
    }

    /// Whether there is a translation for a part of the rings that does not allow what has to be done
    /// there. The core asks for no other then.
    fn rings_forbidden(&self) -> bool {
        let event = if self.features() & (1 << feature::EVENT_IDX) != 0 {
            size_of::<u16>()
        } else {
            0
        };
        let index = 2 * size_of::<u16>();
        let vq = self.as_raw();
        // SAFETY: The mutex is held, under which the core changes these fields and the IOTLB.
        unsafe {
            let num = (*vq).num as usize;
            let desc = num * size_of::<raw::vring_desc>();
            let avail = index + num * size_of::<u16>() + event;
            let used = index + num * size_of::<raw::vring_used_elem>() + event;
            [
                ((*vq).desc.addr(), desc, raw::VHOST_ACCESS_RO),
                ((*vq).avail.addr(), avail, raw::VHOST_ACCESS_RO),
                ((*vq).used.addr(), used, raw::VHOST_ACCESS_WO),
            ]
            .into_iter()
            .any(|(addr, len, access)| forbids((*vq).iotlb, addr as u64, len as u64, access))
        }
    }
}

/// How many messages in `list` are misses of `vq`.
///
/// # Safety
///
/// `list` must be one of `struct vhost_msg_node`s, and the lock be held under which it changes.
unsafe fn count(list: *const raw::list_head, vq: *mut raw::vhost_virtqueue) -> usize {
    let mut count = 0;
    // SAFETY: The caller promises what is said of the list, whose end leads back to its head.
    unsafe {
        let mut node = (*list).next;
        while !core::ptr::eq(node, list) {
            let message = kernel::container_of!(node, raw::vhost_msg_node, node);
            count += usize::from((*message).vq == vq);
            node = (*node).next;
        }
    }
    count
}

/// Whether there is a translation for a part of `len` bytes, at least one, from `addr` on that does not
/// allow `access`; parts behind one that has none do not count.
///
/// # Safety
///
/// `iotlb` must be a valid IOTLB, and the mutex of a virtqueue held that has it.
unsafe fn forbids(iotlb: *mut raw::vhost_iotlb, mut addr: u64, len: u64, access: u32) -> bool {
    let last = addr.wrapping_add(len - 1);
    loop {
        // SAFETY: The caller promises what is said of `iotlb`; its maps change only with the mutex held.
        unsafe {
            let map = raw::vhost_iotlb_itree_first(iotlb, addr, last);
            if map.is_null() || (*map).start > addr {
                return false;
            }
            if (*map).perm & access == 0 {
                return true;
            }
            if (*map).last >= last {
                return false;
            }
            addr = (*map).last + 1;
        }
    }
}
