// SPDX-License-Identifier: GPL-2.0

//! What can go wrong, with enough context to print it as it is.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use vm_memory::GuestAddress;

/// The result of the functions of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be opened.
    #[error("cannot open {}: {source}", path.display())]
    Open {
        /// What was to be opened.
        path: PathBuf,
        /// Why it was not.
        source: io::Error,
    },
    /// An ioctl failed.
    #[error("{name}: {source}")]
    Ioctl {
        /// The name of the ioctl, as in the kernel's headers.
        name: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// rust-vmm's `vhost` crate refused the arguments of an ioctl itself.
    #[error("{name}: {source}")]
    Vhost {
        /// The name of the ioctl, as in the kernel's headers.
        name: &'static str,
        /// What it found wrong.
        source: vhost::Error,
    },
    /// A vhost-user server did not do what was asked.
    #[error("vhost-user server, {name}: {source}")]
    VhostUser {
        /// The name of the message, without its prefix.
        name: &'static str,
        /// What it answered, or did not.
        source: vhost::Error,
    },
    /// Another system call failed.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The guest's memory could not be mapped.
    #[error("cannot map guest memory: {0}")]
    Map(String),
    /// An access outside of the guest's memory.
    #[error("guest memory at {:#x}, {len} bytes: {source}", addr.0)]
    Access {
        /// First byte of the access.
        addr: GuestAddress,
        /// Bytes.
        len: usize,
        /// What is wrong with it.
        source: vm_memory::GuestMemoryError,
    },
    /// No free piece of guest memory is large enough.
    #[error("guest memory is exhausted: no {len} bytes, aligned to {align}")]
    OutOfMemory {
        /// Bytes that were asked for.
        len: usize,
        /// Their alignment, bytes.
        align: usize,
    },
    /// The ring has fewer free descriptors than the chain needs.
    #[error("ring is full: {needed} descriptors needed, {free} free")]
    RingFull {
        /// Descriptors of the chain.
        needed: usize,
        /// Free descriptors of the ring.
        free: usize,
    },
    /// Arguments that no ring or request can be made from.
    #[error("invalid argument: {0}")]
    Invalid(String),
    /// The device put an entry into the used ring for a chain that is not in flight.
    #[error("used entry for descriptor {id}, which is not the head of a chain in flight")]
    UnexpectedUsed {
        /// `id` of the used entry.
        id: u32,
    },
    /// Nothing came in time.
    #[error("no {what} within {} ms", timeout.as_millis())]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// How long.
        timeout: Duration,
    },
    /// The used ring has a new entry that asked for a notification and got none.
    #[error("used index went from {from} to {to} without a notification")]
    LostNotification {
        /// The used index that the driver had seen.
        from: u16,
        /// The used index in memory.
        to: u16,
    },
}

impl Error {
    /// The error number that the kernel answered with, if that is what happened.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Error::Open { source, .. }
            | Error::Ioctl { source, .. }
            | Error::System { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }

    pub(crate) fn access(
        addr: GuestAddress,
        len: usize,
    ) -> impl FnOnce(vm_memory::GuestMemoryError) -> Self {
        move |source| Error::Access { addr, len, source }
    }

    pub(crate) fn system(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Error::System { what, source }
    }
}

/// Names the ioctl in the error of one that rust-vmm's `vhost` crate issued.
pub(crate) fn named<T>(name: &'static str, result: vhost::Result<T>) -> Result<T> {
    result.map_err(|e| match e {
        vhost::Error::IoctlError(source) => Error::Ioctl { name, source },
        source => Error::Vhost { name, source },
    })
}
