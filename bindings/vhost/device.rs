// SPDX-License-Identifier: GPL-2.0

//! A vhost device: its virtqueues, its owner, its workers.
//!
//! C header: `drivers/vhost/vhost.h`.

use super::{
    completion::Wait,
    direct_kick::DirectKick,
    log::LogArray,
    virtqueue::{
        Operations,
        Virtqueue,
        MAX_USED, //
    },
};
use crate::bindings::{
    pages::PinnedMemory,
    raw,
    uapi, //
};
use core::{
    mem::size_of,
    pin::Pin, //
};
use kernel::{
    alloc::VBox,
    error::to_result,
    prelude::*,
    sync::{
        atomic::{
            ordering,
            Atomic, //
        },
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

/// How long a drain sleeps at most before it looks at the time, in milliseconds.
const DRAIN_STEP_MS: u32 = 1_000;

/// After how long without any progress a drain says what it waits for.
const DRAIN_WARNING: Delta = Delta::from_secs(10);

/// How long a paused virtqueue is drained: then it goes on as before, rather than leave a guest without its
/// disk.
const MAX_PAUSE: Delta = Delta::from_secs(15);

/// A vhost device with its virtqueues; `struct vhost_dev`.
///
/// # Invariants
///
/// `raw` is initialised with `vqs`, an array of pointers to the C part of each of `virtqueues`.
#[pin_data(PinnedDrop)]
pub(crate) struct Device<T: Operations> {
    #[pin]
    raw: Opaque<raw::vhost_dev>,
    /// There is a device IOTLB, or was when this was last read.
    has_iotlb: Atomic<bool>,
    vqs: KVec<*mut raw::vhost_virtqueue>,
    virtqueues: KVec<Pin<VBox<Virtqueue<T>>>>,
}

// SAFETY: A `struct vhost_dev` may be used by any thread, and does its own locking.
unsafe impl<T: Operations> Send for Device<T> {}
// SAFETY: As above; virtqueues are `Sync`.
unsafe impl<T: Operations> Sync for Device<T> {}

impl<T: Operations> Device<T> {
    /// Bytes of memory of an open device, its virtqueues apart.
    pub(crate) const BYTES: usize = size_of::<Self>();

    /// A device with a virtqueue for each of `data`. A worker does at most `weight` requests and
    /// `byte_weight` bytes of a virtqueue in one turn. With `direct_kicks`, the tasks that kick may do some
    /// themselves: see [`Operations::handle_direct_kick`].
    pub(crate) fn new(
        data: impl Iterator<Item = Result<T>>,
        direct_kicks: bool,
        weight: i32,
        byte_weight: i32,
    ) -> impl PinInit<Self, Error> {
        let virtqueues = Self::virtqueues_of(data, direct_kicks);

        pin_init::pin_init_scope(move || {
            let (virtqueues, mut vqs) = virtqueues?;
            let count = vqs.len() as i32;
            let pointers = vqs.as_mut_ptr();

            Ok(try_pin_init!(Self {
                // SAFETY: `raw` is memory for a `struct vhost_dev`. The virtqueues are pinned, set
                // up by `Virtqueue::new()`, and live as long as the device, as does the array. Then they
                // are part of it.
                raw <- Opaque::ffi_init(move |raw: *mut raw::vhost_dev| unsafe {
                    raw.write_bytes(0, 1);
                    raw::vhost_dev_init(
                        raw,
                        pointers,
                        count,
                        MAX_USED as i32,
                        weight,
                        byte_weight,
                        true,
                        // Messages for the device IOTLB are the core's.
                        None,
                    );
                    for index in 0..count as usize {
                        Virtqueue::<T>::from_raw(*pointers.add(index)).listen();
                    }
                }),
                has_iotlb: Atomic::new(false),
                vqs,
                virtqueues,
            }? Error))
        })
    }

    #[allow(clippy::type_complexity)]
    fn virtqueues_of(
        data: impl Iterator<Item = Result<T>>,
        direct_kicks: bool,
    ) -> Result<(
        KVec<Pin<VBox<Virtqueue<T>>>>,
        KVec<*mut raw::vhost_virtqueue>,
    )> {
        let mut virtqueues = KVec::new();
        let mut vqs = KVec::new();

        for data in data {
            let direct_kick = direct_kicks.then(DirectKick::new).transpose()?;
            let virtqueue = Virtqueue::new(data?, direct_kick);
            let virtqueue = VBox::pin_init(virtqueue, GFP_KERNEL_ACCOUNT)?;
            vqs.push(virtqueue.as_raw(), GFP_KERNEL_ACCOUNT)?;
            virtqueues.push(virtqueue, GFP_KERNEL_ACCOUNT)?;
        }
        // The core takes it that there is one.
        if vqs.is_empty() {
            return Err(EINVAL);
        }
        Ok((virtqueues, vqs))
    }

    /// Takes the device's mutex. Context: may sleep, as long as another ioctl takes.
    ///
    /// Workers that poll leave off, and no other begins while anybody has or waits for the mutex: to take
    /// a virtqueue's mutex does not wait for them.
    pub(crate) fn lock(&self) -> DeviceGuard<'_, T> {
        let quiet = Quiet::new(&self.virtqueues);
        // SAFETY: By the type invariant the device, and so its mutex, is initialised.
        let mutex: &Lock<(), MutexBackend> =
            unsafe { Lock::from_raw(&raw mut (*self.raw.get()).mutex) };
        DeviceGuard {
            device: self,
            _guard: mutex.lock(),
            _quiet: quiet,
        }
    }

    /// How many virtqueues it has.
    pub(crate) fn virtqueue_count(&self) -> usize {
        self.virtqueues.len()
    }

    /// The C device.
    pub(in crate::bindings) fn as_raw(&self) -> *mut raw::vhost_dev {
        self.raw.get()
    }

    /// Takes a message for the device IOTLB from user space.
    ///
    /// Returns what `write()` is to return: `EFAULT` if there is no device IOTLB. The core would find that
    /// out with all virtqueues locked. Context: may sleep, as long as another ioctl takes.
    ///
    /// # Safety
    ///
    /// `from` must be valid, as for `write_iter()`.
    pub(in crate::bindings) unsafe fn write_iotlb(&self, from: *mut raw::iov_iter) -> isize {
        if !self.has_iotlb.load(ordering::Relaxed) {
            return EFAULT.to_errno() as isize;
        }
        let _quiet = Quiet::new(&self.virtqueues);
        // SAFETY: The device is initialised; the caller promises what is said of `from`.
        unsafe { raw::vhost_chr_write_iter(self.as_raw(), from) }
    }

    /// `VHOST_SET_BACKEND_FEATURES` with features that were checked. Context: may sleep, as long as another
    /// ioctl takes.
    pub(crate) fn set_backend_features(&self, features: u64) {
        let _quiet = Quiet::new(&self.virtqueues);
        // SAFETY: The device is initialised. The core takes the locks.
        unsafe { raw::vhost_set_backend_features(self.as_raw(), features) };
    }

    /// Stops all virtqueues and waits until no request of any is in flight.
    ///
    /// With `abandon` nothing is written to the owner's memory any more. Without, requests are
    /// completed, but if the task is killed the rest is abandoned: nobody is left who wants it. So are
    /// requests of a virtqueue whose rings are not in the device IOTLB.
    ///
    /// Returns when `end_io` is done with the virtqueues, and with nothing queued for the workers.
    fn stop(&self, mut abandon: bool) {
        let mut any = false;
        for vq in &self.virtqueues {
            let mut guard = vq.lock();
            any |= guard.is_running() || !guard.is_idle();
            guard.stop();
        }
        for vq in &self.virtqueues {
            if let Some(direct_kick) = vq.handler_of_direct_kicks() {
                direct_kick.detach();
            }
        }
        if !any {
            return;
        }
        for (index, vq) in self.virtqueues.iter().enumerate() {
            // Of a stopped virtqueue nothing is left.
            abandon = self.drain(index, vq, abandon).unwrap_or(abandon);
        }
        // SAFETY: No lock is held that a read-side critical section or a worker waits for. The last
        // request may have been taken while `end_io`, which handed it over, still looks at the
        // list: hence the grace period. The core attaches other workers to a stopped virtqueue as
        // if it had nothing queued: hence the flush.
        unsafe {
            raw::synchronize_rcu();
            raw::vhost_dev_flush(self.as_raw());
        }
        // The same goes for whoever did what took long for the last request.
        for vq in &self.virtqueues {
            vq.slow().flush();
        }
        self.forget_misses();
    }

    /// Forgets what user space was asked for and has not answered. As long as there is such a miss of a
    /// virtqueue, the core asks for nothing else. All virtqueues are stopped.
    fn forget_misses(&self) {
        // SAFETY: The device is initialised.
        unsafe { raw::vhost_clear_msg(self.as_raw()) };
    }

    /// Waits until no request of a virtqueue that fetches none is in flight. Returns whether it abandoned
    /// some.
    ///
    /// # Errors
    ///
    /// If it is paused and not stopped: `EAGAIN` if requests that are done cannot be completed, since its rings
    /// are not in the device IOTLB, or others are not done in [`MAX_PAUSE`]; `EINTR` if the task is killed.
    fn drain(&self, index: usize, vq: &Virtqueue<T>, abandon: bool) -> Result<bool> {
        vq.completions().set_waiting(true);
        let result = self.wait_until_idle(index, vq, abandon);
        vq.completions().set_waiting(false);
        result
    }

    fn wait_until_idle(&self, index: usize, vq: &Virtqueue<T>, mut abandon: bool) -> Result<bool> {
        let mut before = usize::MAX;
        let mut since = Instant::<Monotonic>::now();
        loop {
            let mut guard = vq.lock_as(true);
            if abandon {
                guard.abandon();
            } else {
                T::handle_completions(&mut guard);
                guard.drop_untranslated()?;
            }
            if guard.is_idle() {
                guard.release_backend();
                return Ok(abandon);
            }
            let paused = guard.paused_for();
            if paused.is_some_and(|time| time > MAX_PAUSE) {
                return Err(EAGAIN);
            }
            if abandon || guard.stopped_for().is_some_and(|time| time >= T::GRACE) {
                // All were stopped together.
                self.virtqueues.iter().for_each(|vq| vq.slow().end());
            }
            let in_flight = guard.in_flight();
            let progress = guard.take_progress() || in_flight != before;
            drop(guard);

            if progress {
                (before, since) = (in_flight, Instant::now());
            } else if since.elapsed() >= DRAIN_WARNING {
                pr_warn!(
                    "virtqueue {index}: waiting for the disk to complete {in_flight} requests\n"
                );
                since = Instant::now();
            }
            match vq.completions().wait(DRAIN_STEP_MS, !abandon) {
                Wait::Killed if paused.is_some() => return Err(EINTR),
                Wait::Killed => abandon = true,
                // A kick wakes, too.
                Wait::Woken | Wait::TimedOut => (),
            }
        }
    }
}

#[pinned_drop]
impl<T: Operations> PinnedDrop for Device<T> {
    fn drop(self: Pin<&mut Self>) {
        let quiet = Quiet::new(&self.virtqueues);
        // The owner's address space may be gone.
        self.stop(true);
        drop(quiet);
        // SAFETY: The device is initialised. Nothing is in flight, so nobody queues work any more
        // once the eventfds are not polled; then the workers are flushed and freed.
        unsafe {
            raw::vhost_dev_stop(self.as_raw());
            raw::vhost_dev_cleanup(self.as_raw());
        }
    }
}

/// A device whose mutex is held, the owner's ioctls' context.
pub(crate) struct DeviceGuard<'a, T: Operations> {
    device: &'a Device<T>,
    _guard: Guard<'a, (), MutexBackend>,
    _quiet: Quiet<'a, T>,
}

/// No worker polls any of these virtqueues, or it is about to leave off.
struct Quiet<'a, T: Operations>(&'a [Pin<VBox<Virtqueue<T>>>]);

impl<'a, T: Operations> Quiet<'a, T> {
    fn new(virtqueues: &'a [Pin<VBox<Virtqueue<T>>>]) -> Self {
        for vq in virtqueues {
            vq.wanted().add(1);
        }
        Self(virtqueues)
    }
}

impl<T: Operations> Drop for Quiet<'_, T> {
    fn drop(&mut self) {
        for vq in self.0 {
            vq.wanted().add(-1);
        }
    }
}

impl<'a, T: Operations> DeviceGuard<'a, T> {
    /// The virtqueues, by index.
    pub(crate) fn virtqueues(&self) -> impl Iterator<Item = &'a Virtqueue<T>> {
        self.device.virtqueues.iter().map(|vq| &**vq)
    }

    /// Whether the calling task is of the owner's address space.
    ///
    /// # Errors
    ///
    /// `EPERM` if not, or if there is no owner.
    pub(crate) fn check_owner(&self) -> Result {
        // SAFETY: The device is initialised and its mutex held.
        unsafe {
            if !raw::vhost_dev_has_owner(self.device.as_raw()) {
                return Err(EPERM);
            }
            to_result(raw::vhost_dev_check_owner(self.device.as_raw()) as i32)
        }
    }

    /// Stops all virtqueues and waits until their requests are complete, used entries written.
    ///
    /// Context: a task of the owner's; may sleep as long as the disk takes.
    ///
    /// # Errors
    ///
    /// `EPERM` if the caller is not the owner.
    pub(crate) fn stop(&self) -> Result {
        self.check_owner()?;
        self.device.stop(false);
        Ok(())
    }

    /// Sets the features of a device whose backend may run; then only `VHOST_F_LOG_ALL` may change.
    ///
    /// When that is switched on, every byte that is written to the guest's memory after this returns is
    /// logged: nothing is fetched until all requests in flight are complete, of which it is not known
    /// what they write.
    ///
    /// Context: a task of the owner's if a backend runs; may sleep as long as the disk takes.
    ///
    /// # Errors
    ///
    /// `EBUSY` if a backend runs and other features change, `EPERM` if one runs and the caller is not the
    /// owner, `EFAULT` if the memory to log is not what the log can cover, `EAGAIN` if requests in flight are
    /// not done in [`MAX_PAUSE`], or cannot be completed for want of a translation, `EINTR` if the task was
    /// killed meanwhile, `EINVAL` if the vhost core is set to have no device IOTLB, `ENOMEM`. Nothing was
    /// changed then.
    pub(crate) fn set_features(&self, features: u64) -> Result {
        const LOG_ALL: u64 = 1 << uapi::feature::LOG_ALL;
        let mut running = false;
        let mut change = false;

        for vq in self.virtqueues() {
            let guard = vq.lock();
            if guard.is_running() || !guard.is_idle() {
                running = true;
                let changed = guard.features() ^ features;
                if changed & !LOG_ALL != 0 {
                    return Err(EBUSY);
                }
                change |= changed != 0;
            }
        }
        if change {
            // Who drains writes to the memory of the calling task.
            self.check_owner()?;
        }
        // SAFETY: The device is initialised and its mutex held, no virtqueue's is.
        if features & LOG_ALL != 0 && !unsafe { raw::vhost_log_access_ok(self.device.as_raw()) } {
            return Err(EFAULT);
        }
        if !change {
            if !running {
                self.set_iotlb(features & (1 << uapi::feature::ACCESS_PLATFORM) != 0)?;
            }
            for vq in self.virtqueues() {
                vq.lock().set_features(features);
            }
            return Ok(());
        }
        self.change_logging(features, features & LOG_ALL != 0)
    }

    /// [`DeviceGuard::set_features`] while a backend runs.
    fn change_logging(&self, features: u64, on: bool) -> Result {
        // What can fail comes first.
        let mut logs = KVec::with_capacity(self.device.virtqueues.len(), GFP_KERNEL)?;
        for vq in self.virtqueues() {
            let max_iovecs = vq.lock().max_iovecs();
            logs.push(LogArray::new(on, max_iovecs)?, GFP_KERNEL)?;
        }
        if on {
            self.pause()?;
        }
        for (vq, log) in self.virtqueues().zip(logs) {
            let mut guard = vq.lock();
            guard.change_logging(features, log);
            guard.unpause();
        }
        Ok(())
    }

    /// Lets no virtqueue fetch anything, and waits until no request of any is in flight. If it fails, all go on.
    fn pause(&self) -> Result {
        for vq in self.virtqueues() {
            vq.lock().pause();
        }
        let mut virtqueues = self.virtqueues().enumerate();
        let drained = virtqueues.try_for_each(|(index, vq)| {
            self.device.drain(index, vq, false)?;
            Ok(())
        });
        drained.inspect_err(|_| {
            for vq in self.virtqueues() {
                vq.lock().unpause();
            }
        })
    }

    /// Pins the guest's memory, all of the table that `VHOST_SET_MEM_TABLE` set.
    ///
    /// Context: a task of the owner's; may sleep, long if there is much.
    ///
    /// # Errors
    ///
    /// `EPERM` if the caller is not the owner; those of [`PinnedMemory::new`].
    pub(crate) fn pin_memory(&self) -> Result<Arc<PinnedMemory>> {
        self.check_owner()?;
        let mut stretches = KVec::new();
        // SAFETY: The device is initialised and its mutex held, under which the core changes the table.
        unsafe {
            let umem = (*self.device.as_raw()).umem;
            if !umem.is_null() {
                let mut map = raw::vhost_iotlb_itree_first(umem, 0, u64::MAX);
                while !map.is_null() {
                    let stretch = ((*map).addr as usize, (*map).size as usize);
                    stretches.push(stretch, GFP_KERNEL)?;
                    map = raw::vhost_iotlb_itree_next(map, 0, u64::MAX);
                }
            }
        }
        Arc::new(PinnedMemory::new(&stretches)?, GFP_KERNEL_ACCOUNT).map_err(Error::from)
    }

    /// `VHOST_SET_MEM_TABLE`. If a backend runs for which memory stays pinned, waits until no request is in
    /// flight, and pins the memory that is in the new table instead. If that cannot be, requests pin what they
    /// need.
    ///
    /// Context: a task of the owner's; may sleep as long as the disk takes.
    ///
    /// # Errors
    ///
    /// Those of the core; where memory stays pinned, `EPERM` if the caller is not the owner, `EAGAIN` and
    /// `EINTR` as [`DeviceGuard::set_features`].
    pub(crate) fn set_memory(&self, arg: usize) -> Result<isize> {
        if !self.virtqueues().any(|vq| vq.lock().is_memory_pinned()) {
            return self.core_ioctl(uapi::SET_MEM_TABLE, arg);
        }
        self.check_owner()?;
        self.pause()?;
        // First, so that what is in both tables is not counted twice.
        self.set_pinned(None);
        let result = self.core_ioctl(uapi::SET_MEM_TABLE, arg);
        self.set_pinned(self.pin_memory().ok());
        for vq in self.virtqueues() {
            vq.lock().unpause();
        }
        result
    }

    fn set_pinned(&self, memory: Option<Arc<PinnedMemory>>) {
        for vq in self.virtqueues() {
            vq.lock().set_memory(memory.clone());
        }
    }

    /// Takes the device from its owner, rings and features reset. It must be stopped.
    ///
    /// # Errors
    ///
    /// `EPERM` if the caller is not the owner, `EBUSY` if a backend runs, `ENOMEM`.
    pub(crate) fn reset_owner(&self) -> Result {
        self.check_owner()?;
        for vq in self.virtqueues() {
            let guard = vq.lock();
            if guard.is_running() || !guard.is_idle() {
                return Err(EBUSY);
            }
        }
        // SAFETY: The device is initialised, its mutex held, and nothing is in flight.
        unsafe {
            let memory = raw::vhost_dev_reset_owner_prepare();
            if memory.is_null() {
                return Err(ENOMEM);
            }
            raw::vhost_dev_stop(self.device.as_raw());
            raw::vhost_dev_reset_owner(self.device.as_raw(), memory);
        }
        self.device.has_iotlb.store(false, ordering::Relaxed);
        Ok(())
    }

    /// Gives the device, whose virtqueues are stopped and idle, an empty device IOTLB, or takes it away. The
    /// rings' addresses are forgotten if there was none before, or was one.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, `EINVAL` if the vhost core is set to have none.
    fn set_iotlb(&self, wanted: bool) -> Result {
        let raw = self.device.as_raw();
        // SAFETY: The device is initialised, its mutex held, and none of a virtqueue.
        unsafe {
            if wanted {
                to_result(raw::vhost_init_device_iotlb(raw))?;
            } else {
                raw::vhost_clear_device_iotlb(raw);
            }
        }
        self.device.has_iotlb.store(wanted, ordering::Relaxed);
        self.forget_misses();
        Ok(())
    }

    /// Forgets what user space was asked for, for the device IOTLB, and has not answered; all virtqueues
    /// must be stopped.
    pub(crate) fn forget_misses(&self) {
        self.device.forget_misses();
    }

    /// The ioctls that the vhost core knows: of devices, then of virtqueues.
    ///
    /// # Errors
    ///
    /// Those of `vhost_dev_ioctl()` and `vhost_vring_ioctl()`; `ENOTTY` if neither knows `cmd`.
    pub(crate) fn core_ioctl(&self, cmd: u32, arg: usize) -> Result<isize> {
        let raw = self.device.as_raw();
        let argp = arg as *mut kernel::ffi::c_void;
        // SAFETY: The device is initialised and its mutex held. The core checks `argp`.
        let mut result = unsafe { raw::vhost_dev_ioctl(raw, cmd, argp) };
        if result == ENOIOCTLCMD {
            // SAFETY: As above.
            result = unsafe { raw::vhost_vring_ioctl(raw, cmd, argp) };
        }
        from_long(result)
    }

    /// The core's ioctls for workers.
    ///
    /// # Errors
    ///
    /// Those of `vhost_worker_ioctl()`.
    pub(crate) fn worker_ioctl(&self, cmd: u32, arg: usize) -> Result<isize> {
        // SAFETY: The device is initialised and its mutex held. The core checks the argument.
        from_long(unsafe {
            raw::vhost_worker_ioctl(self.device.as_raw(), cmd, arg as *mut kernel::ffi::c_void)
        })
    }
}

/// `-ENOIOCTLCMD` of `include/linux/errno.h`, which user space never sees.
const ENOIOCTLCMD: kernel::ffi::c_long = -515;

fn from_long(result: kernel::ffi::c_long) -> Result<isize> {
    if result == ENOIOCTLCMD {
        return Err(ENOTTY);
    }
    if result < 0 {
        // CAST: An errno fits.
        to_result(result as i32)?;
    }
    Ok(result)
}
