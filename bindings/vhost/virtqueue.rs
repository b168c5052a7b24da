// SPDX-License-Identifier: GPL-2.0

//! A virtqueue, the guard that its mutex is behind, and the state in which chains are fetched.
//!
//! C header: `drivers/vhost/vhost.h`.

use super::{
    busy_poll::{
        self,
        Turn,
        Wanted, //
    },
    chain::Completion,
    completion::CompletionList,
    descriptors::{
        self,
        Counts,
        Memory,
        Region,
        Words, //
    },
    direct_kick::DirectKick,
    fetch::{
        FetchError,
        Fetched,
        NotifyDisabled, //
    },
    iotlb,
    log::{
        self,
        Log,
        LogArray, //
    },
    reminder::{
        Armed,
        Reminded,
        Reminder, //
    },
    request::{
        Direct,
        FinishedRequest,
        Owner,
        Request,
        Slot, //
    },
    slow::SlowWork,
    used_ring::{
        EventFd,
        Layout,
        Rings, //
    },
};
use crate::bindings::{
    block::{
        Backend,
        Bio,
        BioRoom,
        BioSet,
        Building,
        Op,
        PendingBios, //
    },
    compat::{
        smp_mb,
        smp_wmb, //
    },
    iov::{
        self,
        IoVec, //
    },
    pages::PinnedMemory,
    raw,
    uapi, //
};
use core::{
    cell::UnsafeCell,
    mem::size_of,
    pin::Pin, //
};
use kernel::{
    error::to_result,
    ffi::{
        c_int,
        c_uint,
        c_void, //
    },
    prelude::*,
    sync::{
        lock::{
            mutex::MutexBackend,
            Guard,
            Lock, //
        },
        Arc, //
    },
    time::{
        Delta,
        Instant,
        Monotonic, //
    },
    types::Opaque, //
};

/// Descriptors of the largest ring.
pub(crate) const MAX_QUEUE_SIZE: u32 = 1024;

/// Stretches of memory that a chain may have. A chain of a ring's full length fits, with room for
/// descriptors that cross from one region of the guest's memory to the next.
const MAX_IOVECS: usize = MAX_QUEUE_SIZE as usize + 256;

/// The same with a device IOTLB, whose translations may be of a page each.
const MAX_IOTLB_IOVECS: usize = MAX_QUEUE_SIZE as usize + iotlb::ENTRIES;

/// Elements of the core's array for used entries: what a device passes as `iov_limit`.
pub(super) const MAX_USED: usize = 256;

/// What a driver does with its virtqueues.
pub(crate) trait Operations: Sized + Send + 'static {
    /// What the driver keeps of each request in its slot.
    type Request: Send + 'static;

    /// How long after a stop [`Operations::handle_slow`] is still called. Requests that want it later fail, and
    /// all do if nobody is left who wants them.
    const GRACE: Delta;

    /// Called in the virtqueue's worker when the guest added buffers.
    ///
    /// Context: process context in the owner's address space; may sleep.
    fn handle_kick(vq: &Virtqueue<Self>, turn: &Turn);

    /// Called in the task that kicked, instead of [`Operations::handle_kick`] in the worker, if no request was in
    /// flight then. Bios that are made with this guard do not let who submits them wait for the disk; what else
    /// would is left to the worker: [`VirtqueueGuard::must_not_wait`].
    ///
    /// Context: a task of the owner's, on its way to user space or into its guest; may sleep.
    fn handle_direct_kick(guard: &mut VirtqueueGuard<'_, Self>);

    /// Completes the requests that are done. Called by whoever stops the device.
    ///
    /// Context: process context in the owner's address space; may sleep.
    fn handle_completions(guard: &mut VirtqueueGuard<'_, Self>);

    /// Called in the virtqueue's worker when requests are done: completes them, and does what waited
    /// for that.
    ///
    /// Context: process context in the owner's address space; may sleep.
    fn handle_completion_work(vq: &Virtqueue<Self>, turn: &Turn);

    /// Does what takes long for a request that [`Request::submit_slow`] was called for. It is not
    /// accessible to anybody else meanwhile.
    ///
    /// Context: a kernel thread, not in the owner's address space; may sleep, without any lock.
    fn handle_slow(request: &mut Self::Request);
}

/// What the mutex of a virtqueue protects.
struct Inner<T: Operations> {
    data: T,
    /// The backend, from the start until the last request of it is complete.
    backend: Option<Arc<Backend>>,
    /// The guest's memory, if it stays pinned meanwhile.
    memory: Option<Arc<PinnedMemory>>,
    /// One slot for each descriptor.
    slots: VVec<Slot<T::Request>>,
    /// Memory of the chain that is being looked at.
    iovecs: VVec<IoVec>,
    /// The same by the guest's addresses, while it is logged what requests write.
    log: LogArray,
    /// Nothing is fetched until requests are complete that are not logged.
    paused: bool,
    /// Entries of the core's `heads` that wait for [`VirtqueueGuard::signal_used`].
    used: usize,
    /// The guest broke the ring: nothing is fetched until the next start.
    broken: bool,
    /// The core has read the used ring's index. With a device IOTLB, the worker lets it.
    initialised: bool,
    /// What is missing in the device IOTLB.
    missed: Missed,
    /// Requests that came from the completion list and were not handed out yet.
    completed: *mut raw::llist_node,
    /// Requests that were put aside, the oldest first.
    deferred: *mut raw::llist_node,
    /// The last of them, if there is one.
    last_deferred: *mut raw::llist_node,
    /// When it was stopped or paused.
    stopped: Option<Instant<Monotonic>>,
    /// A request's bios were done since [`VirtqueueGuard::take_progress`] was called last.
    progress: bool,
    /// Nobody is left to tell of completions: only [`VirtqueueGuard::abandon`] takes requests.
    abandoned: bool,
    /// The rings are to be mapped, so that requests can be completed without the worker.
    direct: bool,
    /// What has the worker look at the ring if the guest is not asked to kick for each request.
    reminder: Option<Arc<Reminder>>,
    /// That it does, until this is dropped.
    armed: Option<Armed>,
}

/// What a virtqueue last missed in the device IOTLB.
#[derive(Default)]
pub(super) struct Missed {
    /// A part of the rings.
    pub(super) rings: bool,
    /// The memory of the next chain.
    pub(super) chain: bool,
    /// How many times in a row that, with no room for another translation.
    pub(super) full: u32,
}

/// A virtqueue, with `T` as the driver's data; `struct vhost_virtqueue`.
///
/// # Invariants
///
/// - `raw` is part of a `struct vhost_dev` from that one's initialisation on.
/// - `inner` is accessed with `raw.mutex` held, or exclusively.
/// - All slots' requests belong to this virtqueue; while one is in flight, or a slot has a bio, none of
///   `inner.slots`, `inner.backend` and `inner.memory` changes.
#[pin_data]
#[repr(C)]
pub(crate) struct Virtqueue<T: Operations> {
    #[pin]
    raw: Opaque<raw::vhost_virtqueue>,
    #[pin]
    completions: CompletionList,
    #[pin]
    bios: BioSet,
    #[pin]
    slow: SlowWork,
    wanted: Wanted,
    /// What handles kicks where they are made, if anything does.
    direct_kick: Option<Arc<DirectKick<T>>>,
    inner: UnsafeCell<Inner<T>>,
}

// SAFETY: Everything in it may be used by any thread: the core does its own locking, `T` and
// `T::Request` are `Send`, and the nodes lead to slots of the virtqueue itself.
unsafe impl<T: Operations> Send for Virtqueue<T> {}
// SAFETY: As above; `inner` is behind the mutex.
unsafe impl<T: Operations> Sync for Virtqueue<T> {}

impl<T: Operations> Virtqueue<T> {
    /// Bytes of memory of an open virtqueue, with what the core allocates for its owner and what
    /// its first start allocates: all but the slots.
    pub(crate) const BYTES: usize = size_of::<Self>().next_multiple_of(4096)
        + size_of::<raw::iovec>() * raw::UIO_MAXIOV as usize
        + MAX_USED
            * (size_of::<raw::vhost_log>() + size_of::<raw::vring_used_elem>() + size_of::<u16>())
        + size_of::<IoVec>() * MAX_IOVECS
        + BioSet::RESERVE_BYTES
        + size_of::<DirectKick<T>>().next_power_of_two()
        + size_of::<Reminder>().next_power_of_two();

    /// Bytes of memory of each slot.
    pub(crate) const SLOT_BYTES: usize = size_of::<Slot<T::Request>>();

    /// A virtqueue that is not part of a device yet. With `direct_kick`, [`Virtqueue::listen`] is to be called when
    /// it is.
    pub(super) fn new(
        data: T,
        direct_kick: Option<Arc<DirectKick<T>>>,
    ) -> impl PinInit<Self, Error> {
        try_pin_init!(&this in Self {
            raw <- Opaque::ffi_init(|raw: *mut raw::vhost_virtqueue| {
                // SAFETY: `raw` is memory for a `struct vhost_virtqueue`, of which `vhost_dev_init()`
                // reads only `handle_kick`.
                unsafe {
                    raw.write_bytes(0, 1);
                    (*raw).handle_kick = Some(Self::kick_callback);
                }
            }),
            // SAFETY: `raw` is at the start of the object that contains the list.
            completions <- unsafe {
                CompletionList::new(this.as_ptr().cast(), Self::completion_callback)
            },
            bios <- BioSet::new(),
            slow <- SlowWork::new(Self::slow_callback),
            wanted: Wanted::new(),
            direct_kick,
            inner: UnsafeCell::new(Inner {
                data,
                backend: None,
                memory: None,
                slots: VVec::new(),
                iovecs: VVec::new(),
                log: LogArray::OFF,
                paused: false,
                used: 0,
                broken: false,
                initialised: false,
                missed: Missed::default(),
                completed: core::ptr::null_mut(),
                deferred: core::ptr::null_mut(),
                last_deferred: core::ptr::null_mut(),
                stopped: None,
                progress: false,
                abandoned: false,
                direct: false,
                reminder: None,
                armed: None,
            }),
        }? Error)
    }

    /// The C virtqueue.
    #[inline]
    pub(super) fn as_raw(&self) -> *mut raw::vhost_virtqueue {
        self.raw.get()
    }

    /// The virtqueue that a C virtqueue is part of.
    ///
    /// # Safety
    ///
    /// `raw` must be that of a `Virtqueue<T>` that lives for `'a`.
    pub(super) unsafe fn from_raw<'a>(raw: *mut raw::vhost_virtqueue) -> &'a Self {
        // SAFETY: It is the first field of a `repr(C)` type; the caller promises the rest.
        unsafe { &*raw.cast::<Self>() }
    }

    /// Called by the core in the worker when the kick eventfd is signalled.
    ///
    /// # Safety
    ///
    /// Only for the core's worker, with the work that it takes: that of the poll structure of a
    /// `Virtqueue<T>`.
    unsafe extern "C" fn kick_callback(work: *mut raw::vhost_work) {
        let poll = kernel::container_of!(work, raw::vhost_poll, work);
        // SAFETY: The work is part of a `struct vhost_poll`, whose `vq` `vhost_dev_init()` set. A
        // device is not freed before its workers are. It is the work that the worker calls back for.
        let (vq, turn) = unsafe { (Self::from_raw((*poll).vq), Turn::new(work)) };
        T::handle_kick(vq, &turn);
    }

    /// Takes kicks before the core does, if they are to be handled where they are made.
    ///
    /// # Safety
    ///
    /// The virtqueue was just made part of a device.
    pub(super) unsafe fn listen(&self) {
        if self.direct_kick.is_some() {
            // SAFETY: The caller promises that it is initialised, and nobody else knows of it yet.
            unsafe { (*self.raw.get()).poll.wait.func = Some(Self::wake_callback) };
        }
    }

    /// Called where the kick eventfd is signalled: has the kick handled by the current task, or by the worker.
    /// Context: any, with the lock of the eventfd held.
    ///
    /// Source: `vhost_poll_wakeup()` in `drivers/vhost/vhost.c`.
    ///
    /// # Safety
    ///
    /// Only for the wait queue of a file, with the entry of the poll structure of a `Virtqueue<T>`.
    unsafe extern "C" fn wake_callback(
        wait: *mut raw::wait_queue_entry_t,
        _mode: c_uint,
        _flags: c_int,
        key: *mut c_void,
    ) -> c_int {
        let poll = kernel::container_of!(wait, raw::vhost_poll, wait);
        // SAFETY: The entry is part of a `struct vhost_poll`, whose fields `vhost_dev_init()` set. It is taken off
        // the wait queue before the device goes.
        unsafe {
            // CAST: As `key_to_poll()` has it.
            if key.addr() as u32 & (*poll).mask != 0
                && !Self::from_raw((*poll).vq).queue_direct_kick()
            {
                raw::vhost_poll_queue(poll);
            }
        }
        0
    }

    /// Has a kick handled by the current task, if nothing is in flight: then that is sooner than to wake the
    /// worker. Else the worker takes it, and the task goes on meanwhile. Returns whether the task will.
    ///
    /// Context: any.
    #[inline]
    fn queue_direct_kick(&self) -> bool {
        let Some(direct_kick) = &self.direct_kick else {
            return false;
        };
        let raw = self.as_raw();
        // SAFETY: The virtqueue is initialised. The reads are volatile since others may write: whatever they
        // find, who handles the kick looks again, with the mutex held.
        let (avail, used, polls, mm) = unsafe {
            (
                (&raw const (*raw).last_avail_idx).read_volatile(),
                (&raw const (*raw).last_used_idx).read_volatile(),
                (&raw const (*raw).busyloop_timeout).read_volatile() != 0,
                (&raw const (*(*raw).dev).mm).read_volatile(),
            )
        };
        avail == self.next_used(used) && !polls && direct_kick.queue(mm)
    }

    /// The used index that follows the requests that are complete, where the core knows of `last`.
    #[inline]
    fn next_used(&self, last: u16) -> u16 {
        let used_ring = self.completions.used_ring();
        used_ring.next_if_mapped().unwrap_or(last)
    }

    /// Handles a kick in the current task, or leaves it to the worker.
    ///
    /// Context: a task on its way to user space or into its guest; may sleep.
    pub(super) fn direct_kick(&self) {
        // Whoever has the mutex may be about to wait.
        let Some(mut guard) = self.try_lock() else {
            return self.queue_kick();
        };
        guard.must_not_wait = true;
        if guard.is_in_task_of_owner() && !guard.has_iotlb() {
            T::handle_direct_kick(&mut guard);
        } else {
            guard.poll();
        }
    }

    /// Has the worker handle a kick.
    fn queue_kick(&self) {
        // SAFETY: The virtqueue is initialised. Without a worker this does nothing.
        unsafe { raw::vhost_poll_queue(&raw mut (*self.as_raw()).poll) };
    }

    /// Called by the core in the worker when the completion list filled.
    ///
    /// # Safety
    ///
    /// Only for the core's worker, with the work that it takes: that of the completion list of a
    /// `Virtqueue<T>`.
    unsafe extern "C" fn completion_callback(work: *mut raw::vhost_work) {
        // SAFETY: The caller promises that the work is part of a completion list, whose virtqueue is
        // not freed before its device's workers are. It is the work that the worker calls back for.
        let (vq, turn) = unsafe {
            let vq = CompletionList::virtqueue_of(work);
            (Self::from_raw(vq), Turn::new(work))
        };
        vq.completions.set_wanted(false);
        T::handle_completion_work(vq, &turn);
    }

    /// Called in a kernel thread when requests have something to do that takes long.
    ///
    /// # Safety
    ///
    /// Only for the workqueue, with the work of the `slow` of a `Virtqueue<T>`.
    unsafe extern "C" fn slow_callback(work: *mut raw::work_struct) {
        // SAFETY: The caller promises what the work is part of; whoever frees that flushes the work before.
        let vq = unsafe {
            let slow = SlowWork::from_work(work);
            &*kernel::container_of!(slow, Self, slow)
        };
        let mut node = vq.slow.take_all();
        while !node.is_null() {
            // SAFETY: The list holds nodes of slots of this virtqueue that `submit_slow()` gave up, which are nobody
            // else's. Each is read before its slot is handed over.
            unsafe {
                let slot = Slot::<T::Request>::from_node(node);
                node = (*node).next;
                slot.run_slow::<T>(vq.slow.has_ended());
            }
        }
    }

    /// Takes the virtqueue's mutex. Context: may sleep.
    ///
    /// Requests that complete meanwhile are looked for when the guard is dropped.
    #[inline]
    pub(crate) fn lock(&self) -> VirtqueueGuard<'_, T> {
        self.lock_as(false)
    }

    /// Takes the mutex as one who waits for requests to complete, or as one who does not.
    #[inline]
    pub(super) fn lock_as(&self, waits: bool) -> VirtqueueGuard<'_, T> {
        self.guard(self.mutex().lock(), waits)
    }

    /// Takes the mutex if nobody has it.
    fn try_lock(&self) -> Option<VirtqueueGuard<'_, T>> {
        Some(self.guard(self.mutex().try_lock()?, false))
    }

    #[inline]
    fn mutex(&self) -> &Lock<(), MutexBackend> {
        // SAFETY: By the type invariant the virtqueue, and so its mutex, is initialised.
        unsafe { Lock::from_raw(&raw mut (*self.raw.get()).mutex) }
    }

    /// What comes with the mutex, of which `guard` is one.
    #[inline]
    fn guard<'a>(
        &'a self,
        guard: Guard<'a, (), MutexBackend>,
        waits: bool,
    ) -> VirtqueueGuard<'a, T> {
        // SAFETY: The mutex is held.
        unsafe { self.completions.enter() };
        VirtqueueGuard {
            vq: self,
            waits,
            must_not_wait: false,
            translated: None,
            region: Region::EMPTY,
            _guard: guard,
        }
    }

    /// The list of completed requests.
    pub(super) fn completions(&self) -> &CompletionList {
        &self.completions
    }

    /// What requests have to do that takes long.
    pub(super) fn slow(&self) -> &SlowWork {
        &self.slow
    }

    /// What handles kicks where they are made, if anything does.
    #[inline]
    pub(super) fn handler_of_direct_kicks(&self) -> Option<&DirectKick<T>> {
        self.direct_kick.as_deref()
    }

    /// Who wants the mutex, so that nobody polls meanwhile.
    pub(super) fn wanted(&self) -> &Wanted {
        &self.wanted
    }

    fn bios(&self) -> Pin<&BioSet> {
        // SAFETY: A virtqueue is pinned from its initialisation on, and `bios` with it.
        unsafe { Pin::new_unchecked(&self.bios) }
    }
}

/// What [`VirtqueueGuard::fetch_usual`] found.
enum Usual {
    /// A chain, of this head.
    Chain(u16, Counts),
    /// Nothing.
    Empty,
    /// Something for the core.
    No,
}

/// Where the entries of an available ring begin, in units of 16 bits: behind `flags` and `idx`.
const AVAIL_RING: usize = 2;

/// Where the index and the entries of a used ring are, in bytes.
const USED_IDX: usize = 2;
const USED_RING: usize = 4;

/// The guest's memory, as a virtqueue sees it, and the array for a chain's.
///
/// # Invariants
///
/// `umem` is the virtqueue's table of regions, or null. Its mutex is held.
struct UserMemory<'a> {
    umem: *mut raw::vhost_iotlb,
    region: &'a mut Region,
    iovecs: core::slice::IterMut<'a, IoVec>,
}

impl Memory for UserMemory<'_> {
    #[inline]
    fn translate(&mut self, address: u64, len: u32) -> Option<u64> {
        if let Some(translated) = self.region.translate(address, len) {
            return Some(translated);
        }
        let last = address.checked_add(u64::from(len.checked_sub(1)?))?;
        if self.umem.is_null() {
            return None;
        }
        // SAFETY: By the type invariant the table is the virtqueue's, whose mutex is held: the core
        // replaces and frees it only afterwards.
        unsafe {
            let map = raw::vhost_iotlb_itree_first(self.umem, address, last);
            if map.is_null() || (*map).perm & raw::VHOST_MAP_RW != raw::VHOST_MAP_RW {
                return None;
            }
            *self.region = Region {
                first: (*map).start,
                last: (*map).last,
                address: (*map).addr,
            };
        }
        self.region.translate(address, len)
    }

    #[inline]
    fn read(&mut self, address: u64, out: &mut [Words]) -> Option<()> {
        iov::read_pairs(address as usize, out)
    }

    #[inline]
    fn push(&mut self, address: u64, len: u32) -> Option<()> {
        *self.iovecs.next()? = IoVec::new(address as usize, len as usize);
        Some(())
    }
}

/// A virtqueue whose mutex is held.
pub(crate) struct VirtqueueGuard<'a, T: Operations> {
    vq: &'a Virtqueue<T>,
    waits: bool,
    must_not_wait: bool,
    /// Whether the rings are in the device IOTLB, once that was looked for.
    translated: Option<bool>,
    /// The region of the guest's memory that was last used. The table of regions does not change while the
    /// mutex is held.
    region: Region,
    _guard: Guard<'a, (), MutexBackend>,
}

impl<'a, T: Operations> VirtqueueGuard<'a, T> {
    #[inline]
    fn inner(&self) -> &Inner<T> {
        // SAFETY: The mutex is held, and `self` borrowed.
        unsafe { &*self.vq.inner.get() }
    }

    #[inline]
    fn inner_mut(&mut self) -> &mut Inner<T> {
        // SAFETY: The mutex is held, and `self` borrowed exclusively.
        unsafe { &mut *self.vq.inner.get() }
    }

    /// Whether it guards `vq`.
    #[inline]
    pub(super) fn is_of(&self, vq: &Virtqueue<T>) -> bool {
        core::ptr::eq(self.vq, vq)
    }

    /// The driver's data.
    #[inline]
    pub(crate) fn data(&self) -> &T {
        &self.inner().data
    }

    /// The driver's data, to change it.
    #[inline]
    pub(crate) fn data_mut(&mut self) -> &mut T {
        &mut self.inner_mut().data
    }

    /// Sets the features that the guest acknowledged.
    pub(crate) fn set_features(&mut self, features: u64) {
        // SAFETY: The mutex is held.
        unsafe {
            *(*self.vq.as_raw()).__bindgen_anon_1.acked_features.as_mut() = features;
        }
    }

    /// The first 64 features that the guest acknowledged.
    #[inline]
    pub(crate) fn features(&self) -> u64 {
        // SAFETY: The mutex is held. All members of the union are integers.
        unsafe { *(*self.vq.as_raw()).__bindgen_anon_1.acked_features.as_ref() }
    }

    /// Whether the guest's structures are little-endian.
    #[inline]
    pub(crate) fn is_little_endian(&self) -> bool {
        // SAFETY: The virtqueue is initialised, and the mutex is held. The field says only that they are.
        unsafe {
            let raw = self.vq.as_raw();
            (*raw).is_le || raw::rust_helper_vhost_is_little_endian(raw)
        }
    }

    /// Whether a backend runs.
    #[inline]
    pub(crate) fn is_running(&self) -> bool {
        // SAFETY: The mutex is held.
        unsafe { !(*self.vq.as_raw()).private_data.is_null() }
    }

    /// Whether the owner gave it rings, in memory that it can access.
    pub(crate) fn is_set_up(&self) -> bool {
        let raw = self.vq.as_raw();
        // SAFETY: The mutex is held, under which the core replaces the memory table before it frees
        // the old one.
        unsafe {
            if self.has_iotlb() {
                // 0 is an address like others, unless all three are.
                let none = (*raw).desc.is_null() && (*raw).avail.is_null() && (*raw).used.is_null();
                !none && raw::vhost_vq_access_ok(raw)
            } else {
                raw::vhost_vq_is_setup(raw)
            }
        }
    }

    /// Starts on `backend`: allocates the slots and lets the worker look at the ring. With `direct`,
    /// requests may be completed without the worker. What of the guest's memory is in `memory` is not pinned
    /// for each request.
    ///
    /// # Errors
    ///
    /// `EBUSY` if a backend runs or requests are in flight, `EFAULT` if the rings are not
    /// accessible (with a device IOTLB the worker finds that), `EINVAL` if the ring is larger than
    /// [`MAX_QUEUE_SIZE`], `ENOMEM`.
    pub(crate) fn start(
        &mut self,
        backend: Arc<Backend>,
        direct: bool,
        memory: Option<Arc<PinnedMemory>>,
    ) -> Result {
        if self.is_running() || !self.is_idle() {
            return Err(EBUSY);
        }
        if !self.is_set_up() {
            return Err(EFAULT);
        }
        // SAFETY: The mutex is held.
        let num = unsafe { (*self.vq.as_raw()).num };
        if num > MAX_QUEUE_SIZE {
            return Err(EINVAL);
        }

        self.vq.bios().prepare()?;
        // Whole pages, not powers of two.
        let mut slots = VVec::with_capacity(num as usize, GFP_KERNEL_ACCOUNT)?;
        for _ in 0..num {
            // SAFETY: The list lives as long as the virtqueue that the slot is part of.
            let bios = unsafe { PendingBios::new(&self.vq.completions) };
            slots.push(Slot::new(bios), GFP_KERNEL_ACCOUNT)?;
        }
        let max_iovecs = self.max_iovecs();
        let iovecs = VVec::from_elem(IoVec::EMPTY, max_iovecs, GFP_KERNEL_ACCOUNT)?;
        let log = self.features() & (1 << uapi::feature::LOG_ALL) != 0;
        let log = LogArray::new(log, max_iovecs)?;

        let reminder = Reminder::new(self.vq.as_raw())?;

        let raw = self.vq.as_raw();
        // SAFETY: The mutex is held. The core takes any pointer but null for 'a backend runs'.
        unsafe { (*raw).private_data = raw.cast() };
        self.inner_mut().initialised = false;
        if !self.has_iotlb() {
            self.initialise().inspect_err(|_| self.stop())?;
        }

        let inner = self.inner_mut();
        // INVARIANT: No slot is in flight.
        inner.slots = slots;
        inner.iovecs = iovecs;
        inner.log = log;
        inner.paused = false;
        inner.backend = Some(backend);
        inner.memory = memory;
        inner.used = 0;
        inner.broken = false;
        inner.missed = Missed::default();
        inner.abandoned = false;
        inner.stopped = None;
        inner.direct = direct;
        inner.reminder = Some(reminder);
        self.vq.slow.resume();
        self.map_rings();
        self.attach_direct_kick();

        // The guest may have added buffers before there was a backend to look.
        self.poll();
        Ok(())
    }

    /// Lets kicks be handled where they are made, if the disk does not let those wait who do not want to, and nothing
    /// else has to be asked for: there are no zones, and no device IOTLB.
    fn attach_direct_kick(&self) {
        let fits = |backend: &Backend| backend.takes_nowait() && !backend.is_zoned();
        let Some(direct_kick) = self.vq.handler_of_direct_kicks() else {
            return;
        };
        if !self.has_iotlb() && self.backend().is_some_and(fits) {
            // SAFETY: A virtqueue that was started is stopped before it goes, and then detached.
            unsafe { direct_kick.attach(self.vq) };
        }
    }

    /// How many stretches of memory a chain may have.
    pub(super) fn max_iovecs(&self) -> usize {
        if self.has_iotlb() {
            MAX_IOTLB_IOVECS
        } else {
            MAX_IOVECS
        }
    }

    /// Has the core read the used ring's index, and write its flags, for a backend that was just started.
    fn initialise(&mut self) -> Result {
        // SAFETY: The mutex is held.
        to_result(unsafe { raw::vhost_vq_init_access(self.vq.as_raw()) })?;
        self.inner_mut().initialised = true;
        Ok(())
    }

    /// Does what [`VirtqueueGuard::start`] left to the worker, now that the rings can be accessed.
    /// Returns whether it was done. If it cannot be, the ring is broken.
    pub(super) fn ensure_initialised(&mut self) -> bool {
        if !self.inner().initialised && self.is_running() && self.initialise().is_err() {
            self.set_broken();
        }
        self.inner().initialised
    }

    /// Stops: nothing is fetched any more. Requests in flight go on.
    pub(super) fn stop(&mut self) {
        // SAFETY: The mutex is held.
        unsafe { (*self.vq.as_raw()).private_data = core::ptr::null_mut() };
        // Before the worker is waited for: it is not called any more.
        self.inner_mut().armed = None;
        self.inner_mut().stopped.get_or_insert_with(Instant::now);
    }

    /// For how long it has been stopped, if it is.
    pub(crate) fn stopped_for(&self) -> Option<Delta> {
        (!self.is_running()).then(|| self.idle_for()).flatten()
    }

    /// For how long it has been paused, if it is.
    pub(super) fn paused_for(&self) -> Option<Delta> {
        self.inner().paused.then(|| self.idle_for()).flatten()
    }

    /// For how long nothing has been fetched, if it is stopped or paused.
    fn idle_for(&self) -> Option<Delta> {
        Some(self.inner().stopped?.elapsed())
    }

    /// Whether no slot has an owner.
    pub(crate) fn is_idle(&self) -> bool {
        self.inner().slots.iter().all(|slot| slot.is_idle())
    }

    /// How many slots have an owner.
    pub(super) fn in_flight(&self) -> usize {
        let slots = self.inner().slots.iter();
        slots.filter(|slot| !slot.is(Owner::Nobody)).count()
    }

    /// Gives up the slots and the backend, after [`VirtqueueGuard::stop`]. Does nothing unless the
    /// virtqueue is stopped and idle.
    pub(crate) fn release_backend(&mut self) {
        if self.is_running() || !self.is_idle() {
            return;
        }
        let inner = self.inner_mut();
        // INVARIANT: No slot is in flight.
        inner.slots = VVec::new();
        inner.iovecs = VVec::new();
        inner.log = LogArray::OFF;
        inner.backend = None;
        inner.memory = None;
        inner.reminder = None;
        self.set_rings(None);
    }

    /// Maps the rings, if requests are to be completed without the worker. If that cannot be, the worker
    /// completes them all.
    fn map_rings(&mut self) {
        if !self.inner().direct {
            return;
        }
        let features = self.features();
        // With that feature it matters what was fetched.
        let notify_on_empty = features & (1 << uapi::feature::NOTIFY_ON_EMPTY) != 0;
        // SAFETY: The mutex is held.
        let log_used = unsafe { (*self.vq.as_raw()).log_used };
        // The addresses of a device IOTLB may lead elsewhere at any time.
        if notify_on_empty || log_used || self.is_logging() || self.has_iotlb() {
            self.set_rings(None);
            return;
        }
        let little_endian = self.is_little_endian();
        let raw = self.vq.as_raw();
        // SAFETY: The mutex is held.
        let layout = unsafe {
            Layout {
                used: (*raw).used.addr(),
                avail: (*raw).avail.addr(),
                num: (*raw).num as u16,
                event_idx: features & (1 << uapi::feature::EVENT_IDX) != 0,
                little_endian,
            }
        };
        self.set_rings(Rings::new(layout).ok());
    }

    fn set_rings(&mut self, rings: Option<Rings>) {
        let raw = self.vq.as_raw();
        let used_ring = self.vq.completions.used_ring();
        // SAFETY: The mutex is held, under which the core uses these fields.
        unsafe {
            (*raw).last_used_idx = used_ring.set_rings(rings, (*raw).last_used_idx);
            (*raw).signalled_used_valid = false;
        }
    }

    /// Follows a change of the rings' addresses or of the owner's memory, if a backend runs.
    pub(crate) fn follow_memory(&mut self) {
        if self.is_running() {
            self.map_rings();
            if self.has_iotlb() {
                // The translations of other rings may have been there before.
                self.poll();
            }
        }
    }

    /// Whether what requests write is logged. It is when a backend runs and `VHOST_F_LOG_ALL` is set.
    #[inline]
    fn is_logging(&self) -> bool {
        self.inner().log.is_on()
    }

    /// Sets features that differ from those before in `VHOST_F_LOG_ALL` at most, with `log` as it is to be
    /// from now on.
    ///
    /// Requests in flight are not logged when they complete: before logging is switched on they are waited
    /// for, with the virtqueue paused.
    pub(super) fn change_logging(&mut self, features: u64, log: LogArray) {
        self.set_features(features);
        if self.is_running() {
            self.inner_mut().log = log;
            self.map_rings();
        }
    }

    /// Fetches nothing until [`VirtqueueGuard::unpause`]. Requests in flight go on.
    pub(super) fn pause(&mut self) {
        let inner = self.inner_mut();
        inner.paused = true;
        inner.stopped.get_or_insert_with(Instant::now);
    }

    /// Ends [`VirtqueueGuard::pause`].
    pub(super) fn unpause(&mut self) {
        let running = self.is_running();
        let inner = self.inner_mut();
        inner.paused = false;
        if running {
            inner.stopped = None;
        }
        // Whoever looked at the ring meanwhile left it as it was.
        self.poll();
    }

    /// Follows a change of the call eventfd.
    pub(crate) fn set_call(&mut self, call: Option<EventFd>) {
        self.vq.completions.used_ring().set_call(call);
    }

    /// The backend, if one runs or requests of it are in flight.
    #[inline]
    pub(crate) fn backend(&self) -> Option<&Backend> {
        self.inner().backend.as_deref()
    }

    /// The guest's memory, if it stays pinned while a backend runs.
    #[inline]
    pub(super) fn memory(&self) -> Option<&PinnedMemory> {
        self.inner().memory.as_deref()
    }

    /// Whether the guest's memory stays pinned.
    pub(crate) fn is_memory_pinned(&self) -> bool {
        self.memory().is_some()
    }

    /// Replaces the memory that stays pinned. Does nothing unless no request is in flight.
    pub(super) fn set_memory(&mut self, memory: Option<Arc<PinnedMemory>>) {
        if self.is_running() && self.is_idle() {
            // INVARIANT: No slot is in flight.
            self.inner_mut().memory = memory;
        }
    }

    /// The backend as [`VirtqueueGuard::backend`], for a request to keep.
    pub(crate) fn share_backend(&self) -> Option<Arc<Backend>> {
        self.inner().backend.clone()
    }

    /// Lets the worker look at the ring, as if the guest had kicked.
    pub(crate) fn poll(&self) {
        self.vq.queue_kick();
    }

    /// Whether kicks may be handled where they are made: see [`VirtqueueGuard::set_direct_kick`].
    #[inline]
    pub(crate) fn takes_direct_kicks(&self) -> bool {
        let direct_kick = self.vq.handler_of_direct_kicks();
        direct_kick.is_some_and(DirectKick::is_attached)
    }

    /// Says whether the next kick is to be handled where it is made, if it can be and no request is in flight.
    #[inline]
    pub(crate) fn set_direct_kick(&self, wanted: bool) {
        if let Some(direct_kick) = self.vq.handler_of_direct_kicks() {
            direct_kick.set_wanted(wanted);
        }
    }

    /// Whether a guest can be asked to add `requests` before it kicks: there are places for twice as many in its ring,
    /// it lets itself be asked, and the core has no part in that.
    #[inline]
    fn can_ask_for(&self, requests: u16) -> bool {
        const EVENT_IDX: u64 = 1 << uapi::feature::EVENT_IDX;
        // SAFETY: The mutex is held, under which it changes.
        let num = unsafe { (*self.vq.as_raw()).num };
        self.features() & EVENT_IDX != 0
            && self.is_running()
            && !self.leaves_to_core()
            && self.inner().reminder.is_some()
            && (2..=num / 2).contains(&u32::from(requests))
    }

    /// Lets the guest kick when it has added `requests`, and the worker look after `within` whatever was added. Returns
    /// whether so many are there.
    ///
    /// Context: may sleep; waits for the callback of an earlier timer, which takes no lock that the caller may hold.
    ///
    /// Source: virtio 1.3, 2.7.10: `avail_event`. `vhost_enable_notify()`, which lets it kick for the next one, in
    /// `drivers/vhost/vhost.c`.
    ///
    /// # Errors
    ///
    /// `EINVAL` if it cannot be asked, and `EFAULT` if the used ring cannot be written; the guest was told nothing.
    pub(super) fn enable_notify_after(&mut self, requests: u16, within: Delta) -> Result<bool> {
        let reminder = self.inner().reminder.clone();
        let reminder = reminder
            .filter(|_| self.can_ask_for(requests))
            .ok_or(EINVAL)?;
        let raw = self.vq.as_raw();
        // SAFETY: The mutex is held.
        let (next, num) = unsafe { ((*raw).last_avail_idx, (*raw).num) };
        let event = next.wrapping_add(requests.wrapping_sub(1));
        let at = USED_RING + num as usize * size_of::<raw::vring_used_elem>();
        self.put_used_index(event, at)?;
        // Between the index that the guest reads and the one that it writes: either it sees that it has to kick, or
        // this sees what it added.
        smp_mb();
        let is_empty = self.avail_empty();
        // SAFETY: The mutex is held, under which the core uses these. `avail_idx` is what was read last of the
        // guest's: as if it had not been read, it is when the next chain is fetched.
        unsafe {
            if !is_empty && (*raw).avail_idx.wrapping_sub(next) >= requests {
                return Ok(true);
            }
            (*raw).avail_idx = next;
            (*raw).used_flags &= !(raw::VRING_USED_F_NO_NOTIFY as u16);
        }
        let inner = self.inner_mut();
        // Before it is armed again.
        inner.armed = None;
        // SAFETY: A virtqueue that runs is part of a device, and `stop()`, which drops what is armed, comes before
        // that goes. There is no older one.
        inner.armed = Some(unsafe { reminder.arm(within) });
        Ok(false)
    }

    /// Writes an index into the used ring, `at` bytes from its start, in the guest's byte order.
    ///
    /// Context: as for the core's access to the ring; may sleep.
    ///
    /// # Errors
    ///
    /// `EFAULT`.
    #[inline]
    fn put_used_index(&self, index: u16, at: usize) -> Result {
        let index = if self.is_little_endian() {
            index.to_le()
        } else {
            index.to_be()
        };
        // SAFETY: The mutex is held, under which the core changes the ring's address. It is the owner's; what is not
        // fails.
        let written = unsafe {
            let used = (*self.vq.as_raw()).used.cast::<u8>();
            raw::rust_helper_put_user_u16(index, used.wrapping_add(at).cast())
        };
        if written {
            Ok(())
        } else {
            Err(EFAULT)
        }
    }

    /// Stops what [`VirtqueueGuard::enable_notify_after`] began, and says whether the worker was called because of it.
    /// To be called before chains are fetched.
    ///
    /// Context: may wait for the callback of the timer, which takes no lock that the caller may hold.
    #[inline]
    pub(crate) fn take_reminder(&mut self) -> Reminded {
        let inner = self.inner_mut();
        if inner.armed.is_none() {
            return Reminded::No;
        }
        inner.armed = None;
        match &inner.reminder {
            Some(reminder) if reminder.is_due() => Reminded::Yes,
            _ => Reminded::NotYet,
        }
    }

    /// Whether the current task must not wait for the disk: what would is left to the worker.
    #[inline]
    pub(crate) fn must_not_wait(&self) -> bool {
        self.must_not_wait
    }

    /// Whether a backend runs and the current task is one of the owner's, and goes back to user space.
    fn is_in_task_of_owner(&self) -> bool {
        // SAFETY: The mutex is held. While a backend runs there is an owner, which does not change.
        self.is_running() && unsafe { raw::rust_helper_in_task_of((*(*self.vq.as_raw()).dev).mm) }
    }

    /// Lets the worker come back to [`Operations::handle_completion_work`], after what else it has to do.
    pub(crate) fn requeue_completions(&self) {
        self.vq.completions.call_consumer();
    }

    /// Marks the ring as broken: nothing is fetched until the next start. Signals the error
    /// eventfd; nothing is logged.
    pub(crate) fn set_broken(&mut self) {
        let inner = self.inner_mut();
        if inner.broken {
            return;
        }
        inner.broken = true;
        // SAFETY: The mutex is held, under which the core changes the context.
        unsafe {
            let context = (*self.vq.as_raw()).error_ctx;
            if !context.is_null() {
                raw::eventfd_signal_mask(context, 0);
            }
        }
    }

    /// Switches the guest's notifications off, which fetching needs. Returns `None` if nothing may
    /// be fetched: no backend runs, the ring is broken, or it is not in the device IOTLB. In the last
    /// case the worker comes back when it is.
    #[inline]
    pub(crate) fn disable_notify(&mut self) -> Option<NotifyDisabled<'_, 'a, T>> {
        let inner = self.inner();
        if !self.is_running() || inner.broken || inner.paused {
            return None;
        }
        if !self.rings_accessible() {
            self.wait_for_rings();
            return None;
        }
        let raw = self.vq.as_raw();
        // SAFETY: The mutex is held; a backend runs, so the rings are set up.
        unsafe { raw::vhost_disable_notify((*raw).dev, raw) };
        Some(NotifyDisabled::new(self))
    }

    /// For how long user space wants the worker to poll before it sleeps, in microseconds; 0 for not at
    /// all.
    #[inline]
    pub(crate) fn busyloop_timeout(&self) -> u32 {
        // SAFETY: The mutex is held, under which the core changes it.
        unsafe { (*self.vq.as_raw()).busyloop_timeout }
    }

    /// Whether a worker that polls has to stop: the processor, the worker or the virtqueue is wanted by
    /// others.
    #[inline]
    pub(crate) fn should_yield(&self) -> bool {
        self.vq.wanted.is_wanted()
            // SAFETY: The virtqueue is initialised.
            || unsafe { raw::vhost_vq_has_work(self.vq.as_raw()) }
            || busy_poll::should_leave_processor()
    }

    /// Whether there is nothing in the available ring that could be fetched now and was not. If that cannot
    /// be told, there is: fetching says what is wrong, at the latest after the next kick.
    #[inline]
    pub(crate) fn avail_empty(&mut self) -> bool {
        if !self.is_running() || self.inner().broken || !self.rings_accessible() {
            return true;
        }
        let raw = self.vq.as_raw();
        // SAFETY: The mutex is held; a backend runs, so the rings are set up.
        unsafe { raw::vhost_vq_avail_empty((*raw).dev, raw) }
    }

    /// How many more chains were in the ring when it was last looked at.
    #[inline]
    pub(crate) fn waiting(&self) -> usize {
        // SAFETY: The mutex is held.
        let (last, next) = unsafe {
            let raw = self.vq.as_raw();
            ((*raw).last_avail_idx, (*raw).avail_idx)
        };
        usize::from(next.wrapping_sub(last))
    }

    /// Whether [`VirtqueueGuard::next_completed`] has something to take.
    #[inline]
    pub(crate) fn has_completed(&mut self) -> bool {
        let inner = self.inner();
        let none = inner.completed.is_null() && self.vq.completions.is_empty();
        !none && !inner.abandoned && self.rings_accessible()
    }

    /// Takes the next request whose bios are done, oldest first. There is none while the rings are not in
    /// the device IOTLB, so that each can be completed at once.
    #[inline]
    pub(crate) fn next_completed(&mut self) -> Option<FinishedRequest<'a, T>> {
        if self.inner().abandoned || !self.rings_accessible() {
            return None;
        }
        self.take_completed()
    }

    #[inline]
    fn take_completed(&mut self) -> Option<FinishedRequest<'a, T>> {
        let vq = self.vq;
        let inner = self.inner_mut();
        if inner.completed.is_null() {
            // SAFETY: The mutex is held.
            inner.completed = unsafe { vq.completions.take_all() };
        }
        let slot = Self::pop(&mut inner.completed)?;
        inner.progress = true;
        // SAFETY: The list has slots of this virtqueue, and this one was just taken from it.
        Some(unsafe { FinishedRequest::resume(vq, slot) })
    }

    /// Whether a request's bios were done since this was called last.
    pub(super) fn take_progress(&mut self) -> bool {
        core::mem::take(&mut self.inner_mut().progress)
    }

    /// Puts a request aside that has to go on later, until [`VirtqueueGuard::next_deferred`].
    ///
    /// One of another virtqueue fails instead.
    pub(crate) fn defer(&mut self, request: Request<'_, T>) {
        if !self.is_of(request.virtqueue()) {
            return;
        }
        let node = request.into_slot().bios.node();
        let inner = self.inner_mut();
        // SAFETY: The request's node is in no list while it has an object, which was given up. The last
        // node is that of a slot that nobody else has as long as the list is not empty.
        unsafe {
            (*node).next = core::ptr::null_mut();
            if inner.deferred.is_null() {
                inner.deferred = node;
            } else {
                (*inner.last_deferred).next = node;
            }
        }
        inner.last_deferred = node;
    }

    /// Takes the request that was put aside first.
    pub(crate) fn next_deferred(&mut self) -> Option<Request<'a, T>> {
        if self.inner().abandoned {
            return None;
        }
        self.take_deferred()
    }

    fn take_deferred(&mut self) -> Option<Request<'a, T>> {
        let vq = self.vq;
        let slot = Self::pop(&mut self.inner_mut().deferred)?;
        // SAFETY: The list has slots of this virtqueue, and this one was just taken from it.
        Some(unsafe { Request::resume(vq, slot) })
    }

    #[inline]
    fn pop(list: &mut *mut raw::llist_node) -> Option<&'a Slot<T::Request>> {
        let node = *list;
        if node.is_null() {
            return None;
        }
        // SAFETY: The lists hold nodes of slots of this virtqueue, each of which is read before its
        // slot has an object that may change it. A slot in a list has an owner, so it stays until whoever takes it
        // gives it up.
        unsafe {
            *list = (*node).next;
            Some(Slot::from_node(node))
        }
    }

    /// A bio on the backend for up to `pages` pieces of pages, from `sector` on. `first` says that
    /// its request has no other.
    ///
    /// Returns `None` if there is no backend, or no memory now: then bios are there that will be
    /// free. Context: may sleep if no request is in flight.
    #[inline]
    pub(crate) fn new_bio(
        &self,
        op: Op,
        sector: u64,
        pages: usize,
        first: bool,
    ) -> Option<Bio<'a, Building>> {
        let backend = self.backend()?;
        let bios = self.vq.bios();
        let nowait = self.must_not_wait;
        let alloc = |wait| bios.alloc(backend, op, sector, pages, nowait, wait);
        alloc(false).or_else(|| {
            // Other bios of this virtqueue are freed by this very task: only wait if there is none.
            if !first || self.must_not_wait || self.has_in_flight() {
                return None;
            }
            alloc(true)
        })
    }

    /// The first bio of the request of a head that was fetched: as [`VirtqueueGuard::new_bio`], and without an
    /// allocation if it is a small one.
    #[inline(always)]
    pub(super) fn first_bio(
        &self,
        head: u16,
        op: Op,
        sector: u64,
        pages: usize,
    ) -> Option<Bio<'a, Building>> {
        if pages <= BioRoom::VECTORS {
            let backend = self.backend()?;
            let slot = self.inner().slots.get(usize::from(head))?;
            // SAFETY: The mutex is held. Slots are not moved or freed while they have a bio.
            let bio = unsafe { slot.room().fill(backend, op, sector, self.must_not_wait) };
            if bio.is_some() {
                return bio;
            }
        }
        self.new_bio(op, sector, pages, true)
    }

    /// Has the worker called when the next request is done. Returns whether there is one in flight.
    pub(crate) fn wait_for_completion(&self) -> bool {
        self.vq.completions.set_wanted(true);
        self.has_in_flight()
    }

    /// Whether a request is the block layer's, or done and not taken yet.
    pub(crate) fn has_in_flight(&self) -> bool {
        let mut slots = self.inner().slots.iter();
        slots.any(|slot| slot.is(Owner::InFlight))
    }

    /// Completes a request: writes its status byte, then makes its used entry, which the guest sees
    /// after [`VirtqueueGuard::signal_used`] or when the guard is dropped. `written` is how many
    /// bytes were written without a gap from the start of the chain's writable memory on, the
    /// status apart.
    ///
    /// A status byte that cannot be written breaks the ring, and so does a log that cannot.
    #[inline(always)]
    pub(crate) fn complete(&mut self, mut completion: Completion, status: u8, written: usize) {
        let log = completion.take_log();
        let (head, used_len) = match completion.write_status(status, written) {
            Ok(used) => used,
            Err(head) => {
                self.set_broken();
                (head, 0)
            }
        };
        if let Some(log) = log {
            self.write_log(log);
        }
        self.push_used(head, used_len);
    }

    /// Logs what a request wrote, unless that was switched off since it was fetched: then the log may be
    /// gone.
    #[cold]
    fn write_log(&mut self, log: KBox<Log>) {
        if !self.is_logging() {
            return;
        }
        // SAFETY: The mutex is held. A chain was fetched, so there is an owner.
        if unsafe { log.write(self.vq.as_raw()) }.is_err() {
            self.set_broken();
        }
    }

    #[inline]
    fn push_used(&mut self, head: u16, len: u32) {
        // The core wraps once: more entries than the ring has would go past its end.
        if self.inner().used >= self.inner().slots.len().min(MAX_USED) {
            self.signal_used();
            if self.inner().used != 0 || self.inner().slots.is_empty() {
                // Completed while the rings are not in the device IOTLB, or after the backend was given up.
                return self.set_broken();
            }
        }
        let raw = self.vq.as_raw();
        let element = self.used_element(head, len);
        let inner = self.inner_mut();
        // SAFETY: The mutex is held. There are slots, so there is an owner and the core's array
        // of `MAX_USED` elements is allocated; `used` is less than that.
        unsafe { *(*raw).heads.add(inner.used) = element };
        inner.used += 1;
    }

    /// A used entry in the guest's byte order.
    #[inline]
    pub(super) fn used_element(&self, head: u16, len: u32) -> raw::vring_used_elem {
        let little_endian = self.is_little_endian();
        let to_guest = |value: u32| {
            if little_endian {
                value.to_le()
            } else {
                value.to_be()
            }
        };
        raw::vring_used_elem {
            id: to_guest(u32::from(head)),
            len: to_guest(len),
        }
    }

    /// Whether it is worth while to prepare requests for an end without the worker.
    #[inline]
    pub(super) fn completes_directly(&self) -> bool {
        let completions = &self.vq.completions;
        completions.finds_no_consumer() && completions.used_ring().is_mapped()
    }

    /// Whether all requests that were fetched are complete, those included that the guest was not shown yet.
    #[inline]
    pub(crate) fn is_all_complete(&self) -> bool {
        // SAFETY: The mutex is held, under which the core and this crate change both.
        let (avail, used) = unsafe {
            let raw = self.vq.as_raw();
            ((*raw).last_avail_idx, (*raw).last_used_idx)
        };
        // CAST: At most the size of a ring.
        let waiting = self.inner().used as u16;
        avail == self.vq.next_used(used).wrapping_add(waiting)
    }

    /// Shows the guest all used entries that were made, with one update of the index and at most
    /// one interrupt.
    pub(crate) fn signal_used(&mut self) {
        if self.inner().used == 0 || !self.rings_accessible() {
            return;
        }
        let used = core::mem::take(&mut self.inner_mut().used);
        let raw = self.vq.as_raw();
        // SAFETY: The mutex is held, and `used` elements of the core's array are set.
        let elements = unsafe { core::slice::from_raw_parts((*raw).heads, used) };
        let mapped = self.vq.completions.used_ring().complete(|rings| {
            for element in elements {
                rings.push(element);
            }
        });
        if mapped.is_some() {
            return;
        }
        let result = match (elements, self.leaves_to_core()) {
            ([element], false) => self.add_used_one(element),
            // SAFETY: As above.
            _ => to_result(unsafe {
                raw::vhost_add_used_n(raw, (*raw).heads, core::ptr::null_mut(), used as u32)
            })
            // SAFETY: As above.
            .and_then(|()| unsafe { log::check_used(raw) }),
        };
        if result.is_err() {
            self.set_broken();
        }
        // SAFETY: The mutex is held, under which the core changes the call context.
        unsafe { raw::vhost_signal((*raw).dev, raw) };
    }

    /// Whether the core is needed for the rings: it translates their addresses, or says what is to be logged.
    #[inline]
    fn leaves_to_core(&self) -> bool {
        const LOG_ALL: u64 = 1 << uapi::feature::LOG_ALL;
        // SAFETY: The mutex is held, under which the core changes both.
        let (iotlb, log_used) = unsafe {
            let raw = self.vq.as_raw();
            ((*raw).iotlb, (*raw).log_used)
        };
        !iotlb.is_null() || log_used || self.is_logging() || self.features() & LOG_ALL != 0
    }

    /// Writes one used entry and the index, as the core does with many: that copies from the heap, for which
    /// a hardened kernel checks more than there is to copy.
    ///
    /// # Errors
    ///
    /// `EFAULT`.
    fn add_used_one(&mut self, element: &raw::vring_used_elem) -> Result {
        // The order of its fields in memory.
        let entry = u64::from(element.id.to_le()) | u64::from(element.len.to_le()) << 32;
        let raw = self.vq.as_raw();

        // SAFETY: The mutex is held, under which the core uses the virtqueue's fields. A chain was fetched,
        // so there is a ring, whose addresses are the owner's; what is not fails.
        let new = unsafe {
            let old = (*raw).last_used_idx;
            let slot = u32::from(old) & (*raw).num.wrapping_sub(1);
            let used = (*raw).used.cast::<u8>();
            let at = USED_RING + slot as usize * size_of::<raw::vring_used_elem>();
            if !raw::rust_helper_put_user_u64(entry.to_le(), used.wrapping_add(at).cast()) {
                return Err(EFAULT);
            }
            let new = old.wrapping_add(1);
            (*raw).last_used_idx = new;
            if (*raw).signalled_used == new {
                // Once around, without a word to the guest: what it was told last says nothing any more.
                (*raw).signalled_used_valid = false;
            }
            new
        };
        // The guest reads the index first.
        smp_wmb();
        self.put_used_index(new, USED_IDX)
    }

    /// Drops all completed and deferred requests without telling the guest, for when nobody is left
    /// to tell. From now until the next start nobody else takes one.
    pub(super) fn abandon(&mut self) {
        self.inner_mut().abandoned = true;
        self.set_rings(None);
        while let Some(request) = self.take_deferred() {
            drop(request.finish());
        }
        while let Some(request) = self.take_completed() {
            drop(request.finish());
        }
        self.inner_mut().used = 0;
    }

    /// For who waits until the virtqueue is idle: drops completed requests if the rings are not in the
    /// device IOTLB, since no message for it comes while the device's mutex is held. Signals the error
    /// eventfd if there are any.
    ///
    /// # Errors
    ///
    /// `EAGAIN` if the virtqueue is not stopped: then they stay.
    pub(super) fn drop_untranslated(&mut self) -> Result {
        let inner = self.inner();
        let none =
            inner.completed.is_null() && inner.deferred.is_null() && self.vq.completions.is_empty();
        if none || self.rings_accessible() {
            return Ok(());
        }
        if self.is_running() {
            return Err(EAGAIN);
        }
        self.set_broken();
        self.abandon();
        Ok(())
    }
}

impl<T: Operations> Drop for VirtqueueGuard<'_, T> {
    #[inline]
    fn drop(&mut self) {
        self.signal_used();
        // SAFETY: The mutex is held until the fields are dropped.
        unsafe {
            self.vq
                .completions
                .leave(self.waits, self.translated == Some(false))
        };
    }
}

// What `NotifyDisabled`, `DescChain` and the device IOTLB do with their virtqueue.
impl<'a, T: Operations> VirtqueueGuard<'a, T> {
    /// The C virtqueue.
    #[inline]
    pub(super) fn as_raw(&self) -> *mut raw::vhost_virtqueue {
        self.vq.as_raw()
    }

    /// What it missed in the device IOTLB.
    #[inline]
    pub(super) fn missed(&mut self) -> &mut Missed {
        &mut self.inner_mut().missed
    }

    /// Whether the rings are in the device IOTLB, if [`VirtqueueGuard::set_translated`] said so.
    #[inline]
    pub(super) fn translated(&self) -> Option<bool> {
        self.translated
    }

    /// Says whether the rings are in the device IOTLB, which holds as long as the guard.
    #[inline]
    pub(super) fn set_translated(&mut self, translated: bool) {
        self.translated = Some(translated);
    }

    #[inline]
    pub(super) fn chain_memory(&self, start: usize, len: usize) -> &[IoVec] {
        self.inner()
            .iovecs
            .get(start..start + len)
            .unwrap_or_default()
    }

    #[inline]
    pub(super) fn chain_memory_mut(&mut self, start: usize, len: usize) -> &mut [IoVec] {
        self.inner_mut()
            .iovecs
            .get_mut(start..start + len)
            .unwrap_or_default()
    }

    /// Fetches the next chain into the arrays for its memory.
    ///
    /// # Errors
    ///
    /// See [`FetchError`].
    #[inline]
    pub(super) fn fetch(&mut self) -> Result<Option<Fetched>, FetchError> {
        if !self.is_running() || self.inner().broken {
            return Err(FetchError::Broken);
        }
        if self.waits_for_chain() {
            return Err(FetchError::Again);
        }
        match self.fetch_usual() {
            Usual::Chain(head, counts) => {
                self.free_head(head)?;
                return Ok(Some(Fetched {
                    head,
                    out_num: counts.readable,
                    in_num: counts.writable,
                    // CAST: Sums of at most `MAX_IOVECS` lengths of 32 bits.
                    readable_len: counts.readable_len as usize,
                    writable_len: counts.writable_len as usize,
                    descriptors: u32::from(counts.descriptors),
                    log: None,
                }));
            }
            Usual::Empty => return Ok(None),
            Usual::No => (),
        }
        let raw = self.vq.as_raw();
        let inner = self.inner_mut();
        let (mut out_num, mut in_num, mut descriptors) = (0, 0, 0);
        let mut log_num = 0;
        let log = inner.log.as_raw_mut();

        // SAFETY: The mutex is held and a backend runs, so there is memory and there are rings.
        // Notifications are off: switching them off again does nothing. The array of iovecs is as long
        // as said; that of the log is null or as long, and gets an entry for each descriptor that takes
        // an iovec at least.
        let head = unsafe {
            raw::vhost_disable_notify((*raw).dev, raw);
            raw::vhost_get_vq_desc_n(
                raw,
                IoVec::as_raw_mut(&mut inner.iovecs),
                inner.iovecs.len() as u32,
                &mut out_num,
                &mut in_num,
                log,
                &mut log_num,
                &mut descriptors,
            )
        };
        if head < 0 {
            if head == EAGAIN.to_errno() {
                if self.chain_missed() {
                    return Err(FetchError::Again);
                }
                self.set_broken();
                return Err(FetchError::Broken);
            }
            inner.broken = true;
            return Err(FetchError::Broken);
        }
        if inner.missed.chain {
            inner.missed = Missed::default();
        }
        // CAST: Not negative, and not above the ring's size.
        let head = head as u16;
        if usize::from(head) >= inner.slots.len() {
            // The ring's size stands for 'none'.
            return Ok(None);
        }
        self.free_head(head)?;
        let (out_num, in_num) = (out_num as usize, in_num as usize);
        let mut fetched = Fetched {
            head,
            out_num,
            in_num,
            readable_len: iov::total(self.chain_memory(0, out_num)),
            writable_len: iov::total(self.chain_memory(out_num, in_num)),
            descriptors,
            log: None,
        };
        if !log.is_null() {
            fetched.log = Some(self.keep_for_log(&fetched, log_num as usize)?);
        }
        Ok(Some(fetched))
    }

    /// Checks that the slot of a head that was fetched is nobody's.
    ///
    /// # Errors
    ///
    /// [`FetchError::Broken`] if it is not, which breaks the ring.
    #[inline]
    fn free_head(&mut self, head: u16) -> Result<(), FetchError> {
        let slot = self.inner().slots.get(usize::from(head));
        if slot.is_some_and(|slot| slot.is(Owner::Nobody)) {
            return Ok(());
        }
        self.set_broken();
        Err(FetchError::Broken)
    }

    /// Fetches the next chain without the core, if it is a usual one: a few instructions instead of many
    /// hundred. If it is not, nothing has changed, and the core fetches it, or says what is wrong with it.
    #[inline]
    fn fetch_usual(&mut self) -> Usual {
        let raw = self.vq.as_raw();
        let little_endian = self.is_little_endian();
        let leave = self.leaves_to_core();
        let mut region = self.region;
        let inner = self.inner_mut();

        // SAFETY: The mutex is held, under which the core uses the virtqueue's fields. A backend runs, so
        // the rings are set up, at addresses that are the owner's unless there is a device IOTLB.
        unsafe {
            if !little_endian
                || leave
                || u32::from((*raw).used_flags) & raw::VRING_USED_F_NO_NOTIFY == 0
            {
                return Usual::No;
            }
            let next = (*raw).last_avail_idx;
            if (*raw).avail_idx == next {
                if raw::vhost_vq_avail_empty((*raw).dev, raw) {
                    return Usual::Empty;
                }
                if (*raw).avail_idx == next {
                    // It cannot be read, or is out of range.
                    return Usual::No;
                }
            }

            // CAST: A ring that runs has at most `MAX_QUEUE_SIZE` descriptors, a power of two.
            let num = (*raw).num as u16;
            let entry = (*raw)
                .avail
                .cast::<u16>()
                .wrapping_add(AVAIL_RING + usize::from(next & num.wrapping_sub(1)));
            let mut head = 0;
            if !raw::rust_helper_get_user_u16(&mut head, entry) {
                return Usual::No;
            }
            let head = u16::from_le(head);

            let mut memory = UserMemory {
                umem: (*raw).umem,
                region: &mut region,
                iovecs: inner.iovecs.iter_mut(),
            };
            let table = (*raw).desc.addr() as u64;
            let Some(counts) = descriptors::chain(&mut memory, table, num, head) else {
                return Usual::No;
            };
            (*raw).last_avail_idx = next.wrapping_add(1);
            (*raw).next_avail_head = (*raw).next_avail_head.wrapping_add(counts.descriptors);
            self.region = region;
            Usual::Chain(head, counts)
        }
    }

    /// Keeps the writable memory of the newest chain, of which the core made so many `entries` for the log.
    ///
    /// # Errors
    ///
    /// [`FetchError::NoMemory`]: the chain is back in the ring.
    #[cold]
    fn keep_for_log(&self, chain: &Fetched, entries: usize) -> Result<KBox<Log>, FetchError> {
        let memory = self.chain_memory(chain.out_num, chain.in_num);
        // SAFETY: The virtqueue is initialised, and its mutex held.
        unsafe { Log::new(self.vq.as_raw(), &self.inner().log, entries, memory) }.map_err(|_| {
            self.discard(chain.descriptors);
            FetchError::NoMemory
        })
    }

    /// Lets the guest kick. Returns whether it added buffers meanwhile.
    #[inline]
    pub(super) fn enable_notify(&mut self) -> bool {
        let raw = self.vq.as_raw();
        // SAFETY: The mutex is held. Without rings this fails like any access to them.
        unsafe { self.is_running() && raw::vhost_enable_notify((*raw).dev, raw) }
    }

    /// Whether the worker has done enough for one turn: if so, it is let come back.
    #[inline]
    pub(super) fn exceeds_weight(&self, requests: usize, bytes: usize) -> bool {
        // SAFETY: The virtqueue is initialised.
        unsafe {
            raw::vhost_exceeds_weight(
                self.vq.as_raw(),
                requests.min(i32::MAX as usize) as i32,
                bytes.min(i32::MAX as usize) as i32,
            )
        }
    }

    /// Gives the newest chain back to the ring.
    pub(super) fn discard(&self, descriptors: u32) {
        // SAFETY: The mutex is held, and one chain was fetched since.
        unsafe { raw::vhost_discard_vq_desc(self.vq.as_raw(), 1, descriptors) };
    }

    /// Claims the slot of a head. `None` if there is no such slot.
    ///
    /// # Safety
    ///
    /// The slot is nobody's.
    #[inline]
    pub(super) unsafe fn claim(
        &self,
        head: u16,
        request: impl FnOnce() -> T::Request,
        direct: Option<Direct>,
    ) -> Option<Request<'a, T>> {
        let slot: *const Slot<T::Request> = self.inner().slots.get(usize::from(head))?;
        // SAFETY: The slots are not moved or freed while one has an owner, which this one gets now;
        // `'a` is the borrow of the virtqueue, and requests cannot outlive it. The mutex is held, and the caller
        // promises that the slot is nobody's.
        Some(unsafe { Request::claim(self.vq, &*slot, request, direct) })
    }
}
