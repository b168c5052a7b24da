// SPDX-License-Identifier: GPL-2.0

//! What is tested: the module, or a vhost-user-blk server, either with one queue.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use vhost_blk_ring::request::SECTOR_SIZE;
use vhost_blk_ring::uapi::feature;
use vhost_blk_ring::vhost_user::CONFIG_WRITEBACK;
use vhost_blk_ring::{
    Completion, Device, Guest, Memory, Options, Queue, Request, Shape, Status, VhostUserGuest,
};

use crate::exercise::check::{describe, same};
use crate::exercise::disk::Disk;

/// Guest memory of each session, bytes.
const MEMORY: usize = 64 << 20;
/// How long something is waited for that must not come.
pub(crate) const SILENCE: Duration = Duration::from_millis(50);
/// What `VIRTIO_BLK_T_GET_ID` of the module returns here.
pub(crate) const SERIAL: &[u8; 20] = b"conformance-0123456\0";

/// Who serves the rings.
#[derive(Clone, Debug)]
pub(crate) enum Target {
    /// The module, by its device node.
    Module(PathBuf),
    /// A vhost-user-blk server, by its socket.
    Server(PathBuf),
}

/// What tests work with.
#[derive(Debug)]
pub(crate) struct Subject<'a> {
    target: &'a Target,
    pub(crate) disk: &'a Disk,
    pub(crate) write: bool,
    pub(crate) timeout: Duration,
    /// The features on offer.
    pub(crate) offered: u64,
}

impl<'a> Subject<'a> {
    pub(crate) fn new(
        target: &'a Target,
        disk: &'a Disk,
        write: bool,
        timeout: Duration,
    ) -> Result<Self> {
        let mut subject = Subject {
            target,
            disk,
            write,
            timeout,
            offered: 0,
        };
        subject.offered = match target {
            Target::Module(node) => Device::open(node)?.get_features()?,
            Target::Server(_) => match &subject.connect(u64::MAX)?.side {
                Side::Server(server) => {
                    ensure!(
                        server.capacity() == disk.capacity(),
                        "the server's disk has {} sectors, and the disk {}",
                        server.capacity(),
                        disk.capacity()
                    );
                    server.offered()
                }
                Side::Module(_) => 0,
            },
        };
        Ok(subject)
    }

    /// Whether the module is tested, whose configuration space is QEMU's.
    pub(crate) fn is_module(&self) -> bool {
        matches!(self.target, Target::Module(_))
    }

    /// Whether all these features are on offer.
    pub(crate) fn offers(&self, features: u64) -> bool {
        self.offered & features == features
    }

    /// Sets a device up with the features in `mask` that a good driver takes,
    /// and does not start it.
    pub(crate) fn connect(&self, mask: u64) -> Result<Session> {
        // What changes where rings and buffers are is not for these tests.
        let usual = Options::default().features
            & !(feature::ACCESS_PLATFORM | feature::RING_PACKED | feature::IN_ORDER);
        self.connect_exactly(usual & mask)
    }

    /// The same with any features, cut to what is on offer.
    pub(crate) fn connect_exactly(&self, features: u64) -> Result<Session> {
        let options = Options {
            features,
            memory: MEMORY,
            ..Options::default()
        };
        Ok(match self.target {
            Target::Module(node) => Session {
                side: Side::Module(Guest::new(&Options {
                    path: node.clone(),
                    serial: Some(*SERIAL),
                    ..options
                })?),
                queues: Vec::new(),
            },
            Target::Server(socket) => {
                let path = socket.clone();
                let mut server = VhostUserGuest::with_memory(
                    &Options { path, ..options },
                    &Memory::shared(MEMORY)?,
                )?;
                let queues = server.take_rings().into_iter().map(Queue::with_ring);
                Session {
                    queues: queues.collect(),
                    side: Side::Server(server),
                }
            }
        })
    }

    /// The same, started.
    pub(crate) fn start(&self, mask: u64) -> Result<Session> {
        let mut session = self.connect(mask)?;
        session.start(self.disk)?;
        Ok(session)
    }

    /// A read of the disk's first block.
    pub(crate) fn a_read(&self) -> Request {
        Request::read(0, self.disk.block())
    }

    /// Runs one request to its end.
    pub(crate) fn run(
        &self,
        session: &mut Session,
        request: Request,
        shape: &Shape,
    ) -> Result<Completion> {
        let what = describe(&request, shape);
        let done = session.queue().run(request, shape, self.timeout);
        done.map_err(anyhow::Error::new).context(what)
    }

    /// Reads the first block, and compares with the disk.
    pub(crate) fn read(&self, session: &mut Session) -> Result<()> {
        self.read_as(session, &Shape::default())
    }

    /// The same, cut so.
    pub(crate) fn read_as(&self, session: &mut Session, shape: &Shape) -> Result<()> {
        let done = self.run(session, self.a_read(), shape)?;
        self.matches_disk(&done)
            .with_context(|| describe(&done.request, shape))
    }

    /// Fails unless `done` is a read that gave what is on the disk.
    pub(crate) fn matches_disk(&self, done: &Completion) -> Result<()> {
        ended(done, Status::Ok)?;
        let expected = self.disk.read(done.request.sector, done.request.in_len)?;
        same(&done.data, &expected)
    }
}

/// Fails unless the request ended with `status` and nothing was written that is
/// not the device's to write.
pub(crate) fn ended(done: &Completion, status: Status) -> Result<()> {
    ensure!(
        done.status == status,
        "status {:?} instead of {status:?}",
        done.status
    );
    if let Some(offset) = done.stray_write {
        bail!("byte {offset} of the request's memory was written, outside of what is writable");
    }
    Ok(())
}

/// A device that is set up.
pub(crate) struct Session {
    // The device goes first, before the memory of the rings.
    side: Side,
    /// Of a server; the module's are with it.
    queues: Vec<Queue>,
}

enum Side {
    Module(Guest),
    Server(VhostUserGuest),
}

impl Session {
    pub(crate) fn start(&mut self, disk: &Disk) -> Result<()> {
        match &mut self.side {
            Side::Module(guest) => guest.start(disk.backend())?,
            Side::Server(server) => server.start()?,
        }
        Ok(())
    }

    /// Stops the rings, as the reset of a device does.
    pub(crate) fn stop(&mut self) -> Result<()> {
        match &mut self.side {
            Side::Module(guest) => drop(guest.stop()?),
            Side::Server(server) => server.stop()?,
        }
        Ok(())
    }

    pub(crate) fn queue(&mut self) -> &mut Queue {
        match &mut self.side {
            Side::Module(guest) => guest.queue(0),
            Side::Server(_) => &mut self.queues[0],
        }
    }

    pub(crate) fn features(&self) -> u64 {
        match &self.side {
            Side::Module(guest) => guest.features(),
            Side::Server(server) => server.features(),
        }
    }

    /// The module, to do more with it.
    pub(crate) fn module(&mut self) -> Option<&mut Guest> {
        match &mut self.side {
            Side::Module(guest) => Some(guest),
            Side::Server(_) => None,
        }
    }

    /// The configuration space, where it is the server's.
    pub(crate) fn config(&mut self) -> Result<Vec<u8>> {
        match &mut self.side {
            Side::Module(_) => bail!("the configuration space is QEMU's"),
            Side::Server(server) => Ok(server.config()?),
        }
    }

    /// Sets the cache mode that the guest sees.
    pub(crate) fn set_writeback(&mut self, writeback: bool) -> Result<()> {
        match &mut self.side {
            Side::Module(guest) => guest.device().set_writeback(writeback)?,
            Side::Server(server) => server.set_config(CONFIG_WRITEBACK, &[u8::from(writeback)])?,
        }
        Ok(())
    }
}

/// A range for discard, write zeroes or secure erase.
pub(crate) fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(16);
    bytes.extend(sector.to_le_bytes());
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

/// Sectors of `len` bytes.
pub(crate) fn sectors(len: usize) -> u32 {
    u32::try_from(len / SECTOR_SIZE).unwrap_or(u32::MAX)
}

impl Target {
    /// What it is, as `--path` says it.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Target::Module(_) => "vhost-blk",
            Target::Server(_) => "vhost-user-blk",
        }
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        match self {
            Target::Module(path) | Target::Server(path) => path,
        }
    }
}
