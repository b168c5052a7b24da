// SPDX-License-Identifier: GPL-2.0

//! The same requests on the host's own io_uring, to compare with: what the disk
//! costs whoever has no guest in between.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use io_uring::IoUring;

use crate::driver::{Op, Slots};
use crate::error::{Error, Result};
use crate::sys;

/// An io_uring for requests of one file, each with its data in one of the slots:
/// both are registered.
///
/// It belongs to the thread that made it: only that one may submit.
pub struct Uring<'m> {
    ring: IoUring,
    slots: &'m Slots,
    /// By slot: what it does, and the address of its data in this process.
    requests: Vec<(Op, u64)>,
    added: usize,
}

impl<'m> Uring<'m> {
    /// Makes one with room for all slots. Whoever waits for completions with
    /// [`submit_and_wait`](Self::submit_and_wait) has them delivered there
    /// (`deferred`); whoever polls does not.
    ///
    /// # Errors
    ///
    /// [`Error::System`]
    pub fn new(file: &File, slots: &'m Slots, deferred: bool) -> Result<Self> {
        let mut builder = IoUring::builder();
        builder.setup_single_issuer();
        if deferred {
            builder.setup_defer_taskrun();
        }
        let ring = builder
            .build(slots.count().into())
            .map_err(Error::system("io_uring_setup"))?;
        ring.submitter()
            .register_files(&[file.as_raw_fd()])
            .map_err(Error::system("io_uring: cannot register the file"))?;
        let data = slots.data();
        sys::register_buffer(&ring, data.memory().map(), data.addr(), data.len())?;
        let requests = (0..slots.count())
            .map(|slot| Ok((Op::In, data.memory().host_address(slots.data_addr(slot))?)))
            .collect::<Result<_>>()?;
        Ok(Uring {
            ring,
            slots,
            requests,
            added: 0,
        })
    }

    /// Adds the request of a slot, at byte `offset` of the file, not yet
    /// submitted.
    ///
    /// # Errors
    ///
    /// [`Error::RingFull`], if a slot was added twice.
    ///
    /// # Panics
    ///
    /// If there is no such slot.
    #[inline]
    pub fn add(&mut self, slot: u16, op: Op, offset: u64) -> Result<()> {
        let request = &mut self.requests[usize::from(slot)];
        request.0 = op;
        let len = self.slots.data_len();
        if sys::push(&mut self.ring, op, offset, request.1, len, slot.into()) {
            self.added += 1;
            Ok(())
        } else {
            Err(Error::RingFull { needed: 1, free: 0 })
        }
    }

    /// Requests that were added and not yet submitted.
    pub fn added(&self) -> usize {
        self.added
    }

    /// Submits what was added, and waits until `want` requests are complete: one
    /// system call.
    ///
    /// # Errors
    ///
    /// [`Error::System`]
    #[inline]
    pub fn submit_and_wait(&mut self, want: usize) -> Result<()> {
        loop {
            match self.ring.submit_and_wait(want) {
                Ok(submitted) => {
                    self.added -= submitted;
                    if self.added == 0 {
                        return Ok(());
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::system("io_uring_enter")(e)),
            }
        }
    }

    /// Takes all completions that are there: their slots go to the end of
    /// `done`.
    ///
    /// # Errors
    ///
    /// [`Error::System`], for a request that failed or was cut short.
    #[inline]
    pub fn take(&mut self, done: &mut Vec<u16>) -> Result<()> {
        for entry in self.ring.completion() {
            // It is what `add` gave.
            let slot = u16::try_from(entry.user_data()).unwrap_or(u16::MAX);
            let op = self
                .requests
                .get(usize::from(slot))
                .map(|request| request.0);
            let expected = match op {
                Some(Op::In | Op::Out) => i64::from(self.slots.data_len()),
                Some(Op::Flush) | None => 0,
            };
            if i64::from(entry.result()) != expected {
                return Err(failed(op, entry.result()));
            }
            done.push(slot);
        }
        Ok(())
    }
}

#[cold]
fn failed(op: Option<Op>, result: i32) -> Error {
    let what = match op {
        Some(Op::In) => "io_uring: read",
        Some(Op::Out) => "io_uring: write",
        Some(Op::Flush) => "io_uring: fdatasync",
        None => "io_uring: unknown completion",
    };
    Error::system(what)(if result < 0 {
        io::Error::from_raw_os_error(-result)
    } else {
        io::ErrorKind::UnexpectedEof.into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Memory;
    use std::fs;

    /// An io_uring on an empty file; none where the system allows none.
    fn on_file(name: &str, test: impl Fn(&mut Uring<'_>, &Slots, &File)) {
        let path = std::env::temp_dir().join(format!("vhost-blk-{name}-{}", std::process::id()));
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .expect("a temporary file");
        fs::remove_file(&path).expect("it is there");
        let memory = Memory::new(1 << 20).expect("1 MiB");
        let slots = Slots::new(&memory, 4, 4096, true).expect("room");
        for deferred in [false, true] {
            match Uring::new(&file, &slots, deferred) {
                Ok(mut ring) => test(&mut ring, &slots, &file),
                Err(e) if matches!(e.errno(), Some(libc::EPERM | libc::ENOSYS)) => {
                    eprintln!("not tested: {e}");
                }
                Err(e) => panic!("{e}"),
            }
        }
    }

    #[test]
    fn bytes_come_from_the_slots() {
        on_file("bytes", |ring, slots, file| {
            let mut done = Vec::new();
            let mut run = |ring: &mut Uring<'_>, op, offsets: [u64; 2]| {
                for (slot, offset) in [1, 3].into_iter().zip(offsets) {
                    ring.add(slot, op, offset).expect("room");
                }
                ring.submit_and_wait(2).expect("io_uring");
                done.clear();
                ring.take(&mut done).expect("no error");
                done.sort_unstable();
                assert_eq!((done.as_slice(), ring.added()), ([1u16, 3].as_slice(), 0));
            };
            slots.set_data(1, &[1; 4096]).expect("it fits");
            slots.set_data(3, &[3; 4096]).expect("it fits");
            run(ring, Op::Out, [4096, 0]);
            run(ring, Op::Flush, [0, 0]);
            assert_eq!(file.metadata().expect("a file").len(), 8192);
            run(ring, Op::In, [0, 4096]);
            let data = slots.data();
            assert_eq!(data.read(4096, 4096).expect("in range"), [3; 4096]);
            assert_eq!(data.read(3 * 4096, 4096).expect("in range"), [1; 4096]);
        });
    }

    #[test]
    fn short_reads_are_errors() {
        on_file("short", |ring, _, file| {
            file.set_len(100).expect("a file");
            ring.add(0, Op::In, 0).expect("room");
            ring.submit_and_wait(1).expect("io_uring");
            assert!(ring.take(&mut Vec::new()).is_err());
        });
    }
}
