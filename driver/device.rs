// SPDX-License-Identifier: GPL-2.0

//! What user space sees: open files of `/dev/vhost-blk` and their ioctls.

use super::{
    queue::{
        Queue,
        BYTE_WEIGHT,
        WEIGHT, //
    },
    zone, //
};
use crate::bindings::{
    block::{
        Backend,
        Submitter, //
    },
    chardev, compat,
    uapi::{
        self,
        backend_feature,
        feature,
        Info,
        SERIAL_LEN, //
    },
    vhost::{
        self,
        DeviceGuard,
        EventFd,
        Virtqueue,
        VirtqueueGuard,
        MAX_QUEUE_SIZE, //
    },
};
use core::pin::Pin;
use kernel::{
    prelude::*,
    sync::{
        atomic::{
            ordering,
            Atomic, //
        },
        new_mutex,
        Arc,
        Mutex, //
    },
    uaccess::{
        UserPtr,
        UserSlice, //
    },
};

/// Most virtqueues of a device.
const MAX_VIRTQUEUES: u32 = 64;

/// Features that are offered.
///
/// Those of the configuration space are user space's to provide; the device works with and without
/// them.
const FEATURES: u64 = 1 << feature::SIZE_MAX
    | 1 << feature::SEG_MAX
    | 1 << feature::GEOMETRY
    | 1 << feature::RO
    | 1 << feature::BLK_SIZE
    | 1 << feature::FLUSH
    | 1 << feature::TOPOLOGY
    | 1 << feature::CONFIG_WCE
    | 1 << feature::MQ
    | 1 << feature::DISCARD
    | 1 << feature::WRITE_ZEROES
    | 1 << feature::SECURE_ERASE
    | 1 << feature::ZONED
    | 1 << feature::NOTIFY_ON_EMPTY
    | 1 << feature::LOG_ALL
    | 1 << feature::ANY_LAYOUT
    | 1 << feature::INDIRECT_DESC
    | 1 << feature::EVENT_IDX
    | 1 << feature::VERSION_1
    | 1 << feature::ACCESS_PLATFORM;

/// Features of `VHOST_GET_BACKEND_FEATURES`.
const BACKEND_FEATURES: u64 = 1 << backend_feature::IOTLB_MSG_V2;

/// Tasks of a device that may wait for its disk at the same time.
const SUBMITTERS: i32 = 4;

/// What user space sets and all virtqueues use.
#[pin_data]
pub(crate) struct Settings {
    writeback: Atomic<bool>,
    /// The guest's memory stays pinned while a backend runs, from the next start on.
    pin_memory: Atomic<bool>,
    #[pin]
    serial: Mutex<[u8; SERIAL_LEN]>,
    /// Guests may be asked to kick for several requests.
    pub(super) coalesces_kicks: bool,
    /// For what the worker must not wait for.
    pub(super) submitter: Submitter,
}

impl Settings {
    fn new() -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            writeback: Atomic::new(true),
            pin_memory: Atomic::new(false),
            serial <- new_mutex!([0; SERIAL_LEN]),
            coalesces_kicks:
                compat::parameter(crate::module_parameters::coalesce_kicks.value()) != 0,
            submitter: Submitter::new(SUBMITTERS)?,
        }? Error)
    }

    /// As after opening.
    fn reset(&self) {
        self.writeback.store(true, ordering::Relaxed);
        self.pin_memory.store(false, ordering::Relaxed);
        *self.serial.lock() = [0; SERIAL_LEN];
    }

    /// Whether completed writes may be in a volatile cache.
    pub(super) fn writeback(&self) -> bool {
        self.writeback.load(ordering::Relaxed)
    }

    /// The disk's serial string. Context: may sleep.
    pub(super) fn serial(&self) -> [u8; SERIAL_LEN] {
        *self.serial.lock()
    }
}

/// An open file of `/dev/vhost-blk`: one disk of one guest.
#[pin_data]
pub(crate) struct Device {
    #[pin]
    vhost: vhost::Device<Queue>,
    // Dropped last, when nobody submits any more.
    settings: Arc<Settings>,
}

impl chardev::File for Device {
    type Operations = Queue;

    fn open() -> Result<Pin<KBox<Self>>> {
        let settings = Arc::pin_init(Settings::new(), GFP_KERNEL_ACCOUNT)?;
        let count = compat::parameter(crate::module_parameters::max_virtqueues.value());
        let count = count.clamp(1, MAX_VIRTQUEUES);
        let direct_submission =
            compat::parameter(crate::module_parameters::direct_submission.value()) != 0;

        let of_queues = settings.clone();
        let queues = (0..count).map(move |_| Ok(Queue::new(of_queues.clone())));
        KBox::try_pin_init(
            try_pin_init!(Self {
                vhost <- vhost::Device::new(queues, direct_submission, WEIGHT, BYTE_WEIGHT),
                settings,
            }? Error),
            GFP_KERNEL_ACCOUNT,
        )
    }

    fn device(&self) -> &vhost::Device<Queue> {
        &self.vhost
    }

    fn ioctl(&self, cmd: u32, arg: usize) -> Result<isize> {
        match cmd {
            uapi::GET_FEATURES => write(arg, FEATURES),
            uapi::SET_FEATURES => self.set_features(read(arg)?),
            uapi::GET_BACKEND_FEATURES => write(arg, BACKEND_FEATURES),
            uapi::SET_BACKEND_FEATURES => self.set_backend_features(read(arg)?),
            uapi::SET_BACKEND => match read::<uapi::VringFile>(arg)?.fd() {
                Some(fd) => self.start(fd),
                None => self.stop(),
            },
            uapi::RESET_OWNER => self.reset_owner(),
            uapi::SET_SERIAL => self.set_serial(read(arg)?),
            uapi::SET_WRITEBACK => set_switch(&self.settings.writeback, read(arg)?),
            uapi::SET_PIN_MEMORY => set_switch(&self.settings.pin_memory, read(arg)?),
            uapi::GET_INFO => self.info(arg),
            uapi::NEW_WORKER
            | uapi::FREE_WORKER
            | uapi::ATTACH_VRING_WORKER
            | uapi::GET_VRING_WORKER => self.vhost.lock().worker_ioctl(cmd, arg),
            // The core allows larger rings. A ring that is resized behind this check does not start.
            uapi::SET_VRING_NUM if read::<uapi::VringState>(arg)?.num() > MAX_QUEUE_SIZE => {
                self.vhost.lock().check_owner()?;
                Err(EINVAL)
            }
            uapi::SET_VRING_CALL => self.set_vring_call(arg),
            uapi::SET_MEM_TABLE | uapi::SET_VRING_ADDR => {
                let device = self.vhost.lock();
                let result = if cmd == uapi::SET_MEM_TABLE {
                    device.set_memory(arg)?
                } else {
                    device.core_ioctl(cmd, arg)?
                };
                for vq in device.virtqueues() {
                    vq.lock().follow_memory();
                }
                Ok(result)
            }
            _ => self.vhost.lock().core_ioctl(cmd, arg),
        }
    }
}

impl Device {
    fn set_features(&self, features: u64) -> Result<isize> {
        check_features(features, FEATURES)?;
        self.vhost.lock().set_features(features)?;
        Ok(0)
    }

    fn set_backend_features(&self, features: u64) -> Result<isize> {
        check_features(features, BACKEND_FEATURES)?;
        self.vhost.set_backend_features(features);
        Ok(0)
    }

    /// Besides the core, those who complete requests without it have a reference to the eventfd. If user
    /// space changes the argument meanwhile, it has two.
    fn set_vring_call(&self, arg: usize) -> Result<isize> {
        let device = self.vhost.lock();
        let file = read::<uapi::VringFile>(arg);
        let call = file.as_ref().map(|file| file.fd().map(EventFd::from_fd));
        // It knows all errors, and their order.
        let result = device.core_ioctl(uapi::SET_VRING_CALL, arg)?;
        let (Ok(file), Ok(call)) = (&file, call) else {
            return Err(EFAULT);
        };
        let call = call.transpose()?;
        if let Some(vq) = device.virtqueues().nth(file.index()) {
            vq.lock().set_call(call);
        }
        Ok(result)
    }

    /// Starts every virtqueue that is set up on the block device or image file `fd`.
    fn start(&self, fd: i32) -> Result<isize> {
        let device = self.vhost.lock();
        device.check_owner()?;
        let backend = backend(fd)?;

        if device.virtqueues().any(|vq| vq.lock().is_running()) {
            return Err(EBUSY);
        }
        if !device.virtqueues().any(|vq| vq.lock().is_set_up()) {
            return Err(EINVAL);
        }
        backend.sync_and_invalidate()?;

        device.forget_misses();
        let backend = Arc::new(backend, GFP_KERNEL_ACCOUNT)?;
        let direct = compat::parameter(crate::module_parameters::direct_completion.value()) != 0;
        let pin_memory = self.settings.pin_memory.load(ordering::Relaxed);
        let memory = pin_memory.then(|| device.pin_memory()).transpose()?;
        start_all(&device, |guard| {
            guard.start(backend.clone(), direct, memory.clone())
        })
        .inspect_err(|_| {
            // The caller is the owner, which is all that stopping asks for.
            let _ = self.stop_all(&device);
        })?;
        Ok(0)
    }

    fn stop(&self) -> Result<isize> {
        self.stop_all(&self.vhost.lock())?;
        Ok(0)
    }

    fn stop_all(&self, device: &DeviceGuard<'_, Queue>) -> Result {
        // Let go of last, so that the disk is closed when this task returns to user space.
        let backend = device.virtqueues().find_map(|vq| vq.lock().share_backend());
        device.stop()?;
        // Until then who submitted for it keeps the disk open.
        self.settings.submitter.flush();
        drop(backend);
        Ok(())
    }

    fn reset_owner(&self) -> Result<isize> {
        let device = self.vhost.lock();
        self.stop_all(&device)?;
        device.reset_owner()?;
        for vq in device.virtqueues() {
            vq.lock().set_call(None);
        }
        self.settings.reset();
        Ok(0)
    }

    fn set_serial(&self, serial: [u8; SERIAL_LEN]) -> Result<isize> {
        *self.settings.serial.lock() = serial;
        Ok(0)
    }

    fn info(&self, arg: usize) -> Result<isize> {
        let (len, fd) = Info::read_query(arg)?;
        let mut info = Info::new();

        info.set_device(
            self.vhost.virtqueue_count(),
            MAX_QUEUE_SIZE,
            vhost::Device::<Queue>::BYTES,
            Virtqueue::<Queue>::BYTES,
            Virtqueue::<Queue>::SLOT_BYTES,
        );
        let device = self.vhost.lock();
        for vq in device.virtqueues() {
            let guard = vq.lock();
            if guard.is_running() {
                info.set_running(guard.is_memory_pinned());
                if let (None, Some(backend)) = (fd, guard.backend()) {
                    set_backend(&mut info, backend);
                }
                break;
            }
        }
        drop(device);
        if let Some(fd) = fd {
            set_backend(&mut info, &backend(fd)?);
        }
        info.write_to(arg, len)?;
        Ok(0)
    }
}

fn start_all(
    device: &DeviceGuard<'_, Queue>,
    start: impl Fn(&mut VirtqueueGuard<'_, Queue>) -> Result,
) -> Result {
    for vq in device.virtqueues() {
        let mut guard = vq.lock();
        if guard.is_set_up() {
            guard.data_mut().reset();
            start(&mut guard)?;
        }
    }
    Ok(())
}

/// Sets what user space says with 0 or 1.
fn set_switch(switch: &Atomic<bool>, value: u32) -> Result<isize> {
    let on = match value {
        0 => false,
        1 => true,
        _ => return Err(EINVAL),
    };
    switch.store(on, ordering::Relaxed);
    Ok(0)
}

/// Sets the fields of a backend: what it can do, as far as the device can make use of it.
fn set_backend(info: &mut Info, backend: &Backend) {
    info.set_backend(backend, zone::max_append_sectors(backend));
}

/// What is behind a descriptor: see [`Backend::from_fd`].
fn backend(fd: i32) -> Result<Backend> {
    Backend::from_fd(u32::try_from(fd).map_err(|_| EBADF)?)
}

/// `EOPNOTSUPP` if there are other features than those offered.
fn check_features(features: u64, offered: u64) -> Result<isize> {
    if features & !offered == 0 {
        Ok(0)
    } else {
        Err(compat::eopnotsupp())
    }
}

/// Reads an ioctl's argument, once.
fn read<T: kernel::transmute::FromBytes>(arg: usize) -> Result<T> {
    UserSlice::new(UserPtr::from_addr(arg), size_of::<T>())
        .reader()
        .read()
}

/// Writes an ioctl's result.
fn write<T: kernel::transmute::AsBytes>(arg: usize, value: T) -> Result<isize> {
    UserSlice::new(UserPtr::from_addr(arg), size_of::<T>())
        .writer()
        .write(&value)?;
    Ok(0)
}
