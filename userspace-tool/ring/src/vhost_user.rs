// SPDX-License-Identifier: GPL-2.0

//! The same guest on a vhost-user-blk server.
//!
//! A server is another process that serves the rings, `qemu-storage-daemon` for
//! instance. It is spoken to through a socket, with messages instead of ioctls.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use vhost::VhostBackend;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};

use crate::error::{Error, Result};
use crate::guest::{Options, blocking_event};
use crate::memory::Memory;
use crate::ring::Ring;
use crate::sys;
use crate::uapi::feature;

/// How much of the disk's configuration is asked for, bytes: up to the limits of
/// write zeroes, with their padding.
const CONFIG_LEN: u32 = 60;

/// Offset of the cache mode in a `struct virtio_blk_config`.
pub const CONFIG_WRITEBACK: u32 = 32;

/// How long a server may take to answer a message.
const ANSWER: Duration = Duration::from_secs(60);

/// A vhost-user-blk server, with the guest's memory and all its rings.
pub struct VhostUserGuest {
    // The server goes first, as a device does.
    server: Frontend,
    rings: Vec<Ring>,
    queues: usize,
    offered: u64,
    features: u64,
    capacity: u64,
}

impl VhostUserGuest {
    /// Connects to the server whose socket is [`Options::path`], and sets it up,
    /// up to [`start`](Self::start). The options on workers and on the serial
    /// number are the server's own, and have no effect.
    ///
    /// # Errors
    ///
    /// [`Error::Open`]; [`Error::VhostUser`]; [`Error::Invalid`], if `memory` is
    /// not [`shared`](Memory::shared), or the server has not so many queues;
    /// those of [`Ring::new`].
    pub fn with_memory(options: &Options, memory: &Memory) -> Result<Self> {
        let regions = memory.regions();
        if regions.iter().any(|region| region.mmap_handle < 0) {
            return Err(Error::Invalid("the memory is not shared".into()));
        }
        let socket = UnixStream::connect(&options.path).map_err(|source| Error::Open {
            path: options.path.clone(),
            source,
        })?;
        socket
            .set_read_timeout(Some(ANSWER))
            .map_err(Error::system("socket of the server"))?;
        let mut server = Frontend::from_stream(socket, u64::from(options.queues));
        let offered = said("GET_FEATURES", server.get_features())?;
        let messages = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let features = offered & (options.features | messages) & !feature::LOG_ALL;
        if features & messages == 0 {
            return Err(Error::Invalid(
                "the server has none of the protocol's features".into(),
            ));
        }
        let protocol = said("GET_PROTOCOL_FEATURES", server.get_protocol_features())?;
        let wanted = VhostUserProtocolFeatures::CONFIG;
        if !protocol.contains(wanted) {
            return Err(Error::Invalid(
                "the server does not tell its disk's configuration".into(),
            ));
        }
        let optional = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK;
        let taken = wanted | (protocol & optional);
        said("SET_PROTOCOL_FEATURES", server.set_protocol_features(taken))?;
        if taken.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            // Without, an error would be a request that never ends.
            server.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        if taken.contains(VhostUserProtocolFeatures::MQ) {
            let most = said("GET_QUEUE_NUM", server.get_queue_num())?;
            if u64::from(options.queues) > most {
                return Err(Error::Invalid(format!(
                    "the server has {most} queues, and not {}",
                    options.queues
                )));
            }
        }
        said("SET_OWNER", server.set_owner())?;
        let (capacity, queues) = parse(&get_config(&mut server)?)?;
        said("SET_FEATURES", server.set_features(features))?;
        if options.queues > 1 && options.queues > u32::from(queues) {
            return Err(Error::Invalid(format!(
                "the server's disk has {queues} queues, and not {}",
                options.queues
            )));
        }
        said("SET_MEM_TABLE", server.set_mem_table(&regions))?;
        let event_idx = features & feature::EVENT_IDX != 0;
        let mut rings = Vec::new();
        for index in 0..options.queues as usize {
            let mut ring = Ring::new(memory, options.queue_size, event_idx)?;
            ring.reset(options.base)?;
            if options.blocking_calls {
                ring.set_call_event(blocking_event()?);
            }
            ring.set_up_user(&server, index, options.base)?;
            rings.push(ring);
        }
        // Any answer, to know that the server has read what came before: it may
        // have made the eventfds that it got non-blocking, for both sides.
        said("GET_FEATURES", server.get_features())?;
        if options.blocking_calls {
            for ring in &rings {
                sys::set_blocking(ring.call_event()).map_err(Error::system("call eventfd"))?;
            }
        }
        Ok(VhostUserGuest {
            server,
            queues: rings.len(),
            rings,
            offered: offered & !messages,
            features: features & !messages,
            capacity,
        })
    }

    /// Starts all queues.
    ///
    /// # Errors
    ///
    /// [`Error::VhostUser`]
    pub fn start(&mut self) -> Result<()> {
        for index in 0..self.queues {
            said(
                "SET_VRING_ENABLE",
                self.server.set_vring_enable(index, true),
            )?;
        }
        Ok(())
    }

    /// Stops all queues.
    ///
    /// # Errors
    ///
    /// [`Error::VhostUser`]
    pub fn stop(&self) -> Result<()> {
        for index in 0..self.queues {
            said("GET_VRING_BASE", self.server.get_vring_base(index))?;
        }
        Ok(())
    }

    /// The rings of all queues.
    pub fn rings(&mut self) -> &mut [Ring] {
        &mut self.rings
    }

    /// Takes the rings of all queues out: they have to live as long as this.
    pub fn take_rings(&mut self) -> Vec<Ring> {
        std::mem::take(&mut self.rings)
    }

    /// The disk's `struct virtio_blk_config`, up to the limits of write zeroes.
    ///
    /// # Errors
    ///
    /// [`Error::VhostUser`]; [`Error::Invalid`], if it is shorter.
    pub fn config(&mut self) -> Result<Vec<u8>> {
        get_config(&mut self.server)
    }

    /// Writes `bytes` at `offset` of the disk's `struct virtio_blk_config`.
    ///
    /// # Errors
    ///
    /// [`Error::VhostUser`]
    pub fn set_config(&mut self, offset: u32, bytes: &[u8]) -> Result<()> {
        let flags = VhostUserConfigFlags::empty();
        said("SET_CONFIG", self.server.set_config(offset, flags, bytes))
    }

    /// The features that the server offers, without those of the protocol.
    pub fn offered(&self) -> u64 {
        self.offered
    }

    /// The features that were taken, without those of the protocol.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The size of the server's disk, sectors.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }
}

fn get_config(server: &mut Frontend) -> Result<Vec<u8>> {
    let (_, config) = said(
        "GET_CONFIG",
        server.get_config(
            0,
            CONFIG_LEN,
            VhostUserConfigFlags::empty(),
            &[0; CONFIG_LEN as usize],
        ),
    )?;
    if config.len() != CONFIG_LEN as usize {
        return Err(Error::Invalid(format!(
            "the server's configuration of {} bytes",
            config.len()
        )));
    }
    Ok(config)
}

/// The capacity and the number of queues in a `struct virtio_blk_config`.
fn parse(config: &[u8]) -> Result<(u64, u16)> {
    match (config.first_chunk(), config.get(34..36)) {
        (Some(capacity), Some(&[low, high])) => Ok((
            u64::from_le_bytes(*capacity),
            u16::from_le_bytes([low, high]),
        )),
        _ => Err(Error::Invalid(format!(
            "the server's configuration of {} bytes",
            config.len()
        ))),
    }
}

fn said<T>(name: &'static str, result: vhost::Result<T>) -> Result<T> {
    result.map_err(|source| Error::VhostUser { name, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configuration() {
        let mut bytes = [0; 36];
        bytes[..8].copy_from_slice(&0x1234_5678_9abcu64.to_le_bytes());
        bytes[34] = 4;
        assert_eq!(parse(&bytes).expect("36 bytes"), (0x1234_5678_9abc, 4));
        assert!(parse(&bytes[..20]).is_err());
    }

    #[test]
    fn memory_has_to_be_shared() {
        let options = Options {
            path: "/nonexistent".into(),
            ..Options::default()
        };
        let private = Memory::new(1 << 20).expect("1 MiB");
        assert!(matches!(
            VhostUserGuest::with_memory(&options, &private),
            Err(Error::Invalid(_))
        ));
        let shared = Memory::shared(1 << 20).expect("1 MiB");
        assert!(matches!(
            VhostUserGuest::with_memory(&options, &shared),
            Err(Error::Open { .. })
        ));
    }
}
