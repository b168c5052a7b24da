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

/// An io_uring for requests of one file, which is registered, each with its data in
/// one of the slots.
///
/// It belongs to the thread that made it: only that one may submit.
pub struct Uring<'m> {
    ring: sys::DataRing,
    slots: &'m Slots,
    /// By slot: what it does.
    ops: Vec<Op>,
}

impl<'m> Uring<'m> {
    /// Makes one with room for all slots. Whoever waits for completions with
    /// [`submit_and_wait`](Self::submit_and_wait) has them delivered there
    /// (`deferred`); whoever polls does not. The slots' data is registered
    /// (`registered`), or the kernel pins it for each request.
    ///
    /// # Errors
    ///
    /// [`Error::System`]
    pub fn new(file: &File, slots: &'m Slots, deferred: bool, registered: bool) -> Result<Self> {
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
        let ring = sys::DataRing::new(
            ring,
            data.memory().map(),
            (0..slots.count()).map(|slot| slots.data_addr(slot)),
            slots.data_len(),
            registered.then(|| (data.addr(), data.len())),
        )?;
        Ok(Uring {
            ring,
            slots,
            ops: vec![Op::In; slots.count().into()],
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
        self.ops[usize::from(slot)] = op;
        if self.ring.push(op, offset, slot) {
            Ok(())
        } else {
            Err(Error::RingFull { needed: 1, free: 0 })
        }
    }

    /// Requests that were added and not yet submitted.
    pub fn added(&self) -> usize {
        self.ring.added()
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
                Ok(()) if self.added() == 0 => return Ok(()),
                Ok(()) => {}
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
        while let Some((slot, result)) = self.ring.take() {
            let op = self.ops.get(usize::from(slot)).copied();
            let expected = match op {
                Some(Op::In | Op::Out) => i64::from(self.slots.data_len()),
                Some(Op::Flush) | None => 0,
            };
            if i64::from(result) != expected {
                return Err(failed(op, result));
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
    use std::io::{Read, Seek, SeekFrom};

    /// An io_uring on an empty file; none where the system allows none.
    fn on_file(name: &str, test: impl Fn(Uring<'_>, &Slots, &File)) {
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
        for (deferred, registered) in [(false, true), (true, true), (false, false), (true, false)] {
            file.set_len(0).expect("a file");
            match Uring::new(&file, &slots, deferred, registered) {
                Ok(ring) => test(ring, &slots, &file),
                Err(e) if matches!(e.errno(), Some(libc::EPERM | libc::ENOSYS)) => {
                    eprintln!("not tested: {e}");
                }
                Err(e) => panic!("{e}"),
            }
        }
    }

    #[test]
    fn bytes_come_from_the_slots() {
        on_file("bytes", |mut ring, slots, file| {
            let mut done = Vec::new();
            let mut run = |op, offsets: [u64; 2]| {
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
            run(Op::Out, [4096, 0]);
            run(Op::Flush, [0, 0]);
            assert_eq!(file.metadata().expect("a file").len(), 8192);
            run(Op::In, [0, 4096]);
            let data = slots.data();
            assert_eq!(data.read(4096, 4096).expect("in range"), [3; 4096]);
            assert_eq!(data.read(3 * 4096, 4096).expect("in range"), [1; 4096]);
        });
    }

    #[test]
    fn what_is_in_flight_is_done_before_its_memory_goes() {
        on_file("dropped", |mut ring, slots, mut file| {
            if ring.ring.is_registered() {
                // Then the kernel has the pages.
                return;
            }
            slots.set_data(0, &[7; 4096]).expect("it fits");
            ring.add(0, Op::Out, 0).expect("room");
            ring.submit_and_wait(0).expect("io_uring");
            slots.set_data(1, &[8; 4096]).expect("it fits");
            ring.add(1, Op::Out, 4096).expect("room");
            drop(ring);
            let mut written = Vec::new();
            file.seek(SeekFrom::Start(0)).expect("a file");
            file.read_to_end(&mut written).expect("a file");
            assert_eq!(written, [7; 4096]);
        });
    }

    #[test]
    fn short_reads_are_errors() {
        on_file("short", |mut ring, _, file| {
            file.set_len(100).expect("a file");
            ring.add(0, Op::In, 0).expect("room");
            ring.submit_and_wait(1).expect("io_uring");
            assert!(ring.take(&mut Vec::new()).is_err());
        });
    }
}
