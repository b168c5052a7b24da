// SPDX-License-Identifier: GPL-2.0

//! A device with its memory and all its queues.

use std::os::fd::AsFd;
use std::path::PathBuf;

use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use crate::device::{Device, WorkerMode};
use crate::error::{Error, Result};
use crate::iotlb::{Iotlb, Translator};
use crate::memory::{Memory, Protection};
use crate::queue::Queue;
use crate::uapi::{DEVICE_PATH, VHOST_BLK_SERIAL_LEN, feature};

/// How many workers the device has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Workers {
    /// One, as the vhost core makes it.
    #[default]
    Shared,
    /// One for each queue.
    PerQueue,
}

/// What a [`Guest`] is made with.
#[derive(Clone, Debug)]
pub struct Options {
    /// The device node, or the socket of a vhost-user server.
    pub path: PathBuf,
    /// Queues.
    pub queues: u32,
    /// Size of each ring, descriptors.
    pub queue_size: u16,
    /// Where both indices of each ring start: near 65535 to see them wrap.
    pub base: u16,
    /// Guest memory, bytes.
    pub memory: usize,
    /// Feature bits to take; those that are not on offer are left out.
    pub features: u64,
    /// How many workers.
    pub workers: Workers,
    /// What the workers are; by default what the kernel makes them.
    pub worker_mode: Option<WorkerMode>,
    /// For how long the workers may poll before they sleep, microseconds.
    pub busyloop_timeout: u32,
    /// Whether the guest's memory stays pinned while a backend runs.
    pub pin_memory: bool,
    /// Whether reading a call eventfd blocks ([`Ring::set_call_event`](crate::Ring::set_call_event)).
    pub blocking_calls: bool,
    /// What `VIRTIO_BLK_T_GET_ID` returns.
    pub serial: Option<[u8; VHOST_BLK_SERIAL_LEN]>,
    /// How addresses are translated, if there is a device IOTLB. Without, they
    /// are not.
    pub iotlb: Option<Iotlb>,
}

impl Default for Options {
    /// One queue of 256 descriptors, 64 MiB, all features but those that change
    /// what a good driver sees: `RO`, which fails writes, and `NOTIFY_ON_EMPTY`.
    /// `ACCESS_PLATFORM` is taken with [`Options::iotlb`] only.
    fn default() -> Self {
        Options {
            path: DEVICE_PATH.into(),
            queues: 1,
            queue_size: 256,
            base: 0,
            memory: 64 << 20,
            features: !(feature::RO | feature::NOTIFY_ON_EMPTY | feature::LOG_ALL),
            workers: Workers::Shared,
            worker_mode: None,
            busyloop_timeout: 0,
            pin_memory: false,
            blocking_calls: false,
            serial: None,
            iotlb: None,
        }
    }
}

/// An eventfd that blocks who reads it.
pub(crate) fn blocking_event() -> Result<EventFd> {
    EventFd::new(EFD_CLOEXEC).map_err(Error::system("eventfd"))
}

/// Memory at the same addresses, which nobody may access.
fn decoy_of(memory: &Memory) -> Result<Memory> {
    let regions: Vec<_> = memory
        .regions()
        .iter()
        .map(|region| {
            let len = usize::try_from(region.memory_size);
            (
                GuestAddress(region.guest_phys_addr),
                len.unwrap_or(usize::MAX),
            )
        })
        .collect();
    let decoy = Memory::with_regions(&regions)?;
    for &(addr, len) in &regions {
        decoy.protect(addr, len, Protection::None)?;
    }
    Ok(decoy)
}

/// A device that is set up, with its memory and its queues.
#[derive(Debug)]
pub struct Guest {
    // Fields drop in this order: who has the device open besides, then the
    // device, so that the kernel has nothing in flight when the queues give
    // their memory back.
    translator: Option<Translator>,
    device: Device,
    queues: Vec<Queue>,
    memory: Memory,
    /// What the memory table of a device with an IOTLB has.
    _decoy: Option<Memory>,
    features: u64,
}

impl Guest {
    /// Opens the device and sets it up, up to [`start`](Self::start).
    ///
    /// # Errors
    ///
    /// Those of [`Device`] and of [`Memory::new`].
    pub fn new(options: &Options) -> Result<Self> {
        Self::with_memory(options, &Memory::new(options.memory)?)
    }

    /// As [`new`](Self::new), with memory that the caller has made:
    /// [`Options::memory`] has no effect.
    ///
    /// # Errors
    ///
    /// Those of [`new`](Self::new).
    pub fn with_memory(options: &Options, memory: &Memory) -> Result<Self> {
        let mut device = Device::open(&options.path)?;
        if let Some(mode) = options.worker_mode {
            device.set_worker_mode(mode)?;
        }
        device.set_owner()?;
        let platform = feature::ACCESS_PLATFORM;
        let mut features = device.get_features()? & options.features & !platform;
        let mut translator = None;
        let mut decoy = None;
        if let Some(how) = options.iotlb {
            features |= platform;
            device.set_features(features)?;
            device.set_backend_features(how.format.backend_features())?;
            device.translate_rings();
            decoy = Some(decoy_of(memory)?);
            if !how.manual {
                translator = Some(Translator::start(&device, memory, how)?);
            }
        } else {
            device.set_features(features)?;
        }
        device.set_memory(decoy.as_ref().unwrap_or(memory))?;
        if let Some(serial) = &options.serial {
            device.set_serial(serial)?;
        }
        if options.pin_memory {
            device.set_pin_memory(true)?;
        }
        let event_idx = features & feature::EVENT_IDX != 0;
        let mut queues = Vec::new();
        for index in 0..options.queues {
            let mut queue = Queue::new(memory, options.queue_size, event_idx)?;
            queue.reset(options.base)?;
            if options.blocking_calls {
                queue.ring.set_call_event(blocking_event()?);
            }
            queue.ring.set_up(&device, index, options.base)?;
            if options.busyloop_timeout != 0 {
                device.set_vring_busyloop_timeout(index, options.busyloop_timeout)?;
            }
            // The core has made the first worker and given it to all queues.
            if options.workers == Workers::PerQueue && index > 0 {
                let worker = device.new_worker()?;
                device.attach_vring_worker(index, worker)?;
            }
            queues.push(queue);
        }
        Ok(Guest {
            translator,
            device,
            queues,
            memory: memory.clone(),
            _decoy: decoy,
            features,
        })
    }

    /// Starts all queues on the block device `disk`.
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]
    pub fn start(&self, disk: impl AsFd) -> Result<()> {
        self.device.set_backend(disk)
    }

    /// Stops all queues and returns where each stands in its available ring.
    /// Every request that the device had fetched is complete; those that it had
    /// not are still there for [`resume`](Self::resume).
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]; [`Error::Invalid`], for a base that is not an index.
    pub fn stop(&self) -> Result<Vec<u16>> {
        match &self.translator {
            // A stop cannot wait for translations.
            Some(translator) => {
                translator.check()?;
                let rings = self.queues.iter().flat_map(|q| q.ring.parts().all());
                translator.prefill_and(rings, || self.device.stop())?;
            }
            None => self.device.stop()?,
        }
        (0u32..)
            .zip(&self.queues)
            .map(|(index, _)| {
                let base = self.device.get_vring_base(index)?;
                u16::try_from(base)
                    .map_err(|_| Error::Invalid(format!("base {base:#x} of queue {index}")))
            })
            .collect()
    }

    /// Starts again what [`stop`](Self::stop) stopped, as a virtual machine
    /// monitor does: the rings are set up again, at these bases.
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]
    pub fn resume(&self, disk: impl AsFd, bases: &[u16]) -> Result<()> {
        for ((index, queue), &base) in (0u32..).zip(&self.queues).zip(bases) {
            queue.ring.set_up(&self.device, index, base)?;
        }
        self.device.set_backend(disk)
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What answers the misses of its device IOTLB, if it has one.
    pub fn translator(&self) -> Option<&Translator> {
        self.translator.as_ref()
    }

    /// The guest's memory.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The features that were taken.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Queue number `index`.
    ///
    /// # Panics
    ///
    /// If there is none.
    pub fn queue(&mut self, index: usize) -> &mut Queue {
        &mut self.queues[index]
    }

    /// The device, and all queues: to use both at once, from several threads.
    pub fn split(&mut self) -> (&Device, &mut [Queue]) {
        (&self.device, &mut self.queues)
    }

    /// All queues, for instance to drive each from a thread of its own.
    pub fn queues(&mut self) -> &mut [Queue] {
        &mut self.queues
    }
}
