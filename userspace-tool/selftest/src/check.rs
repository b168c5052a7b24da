// SPDX-License-Identifier: GPL-2.0

//! Checks that tests have in common.

use std::fmt;

use anyhow::{Result, bail, ensure};
use vhost_blk_ring::{Completion, Error, Guest, Queue, Request, Shape, Status};

use crate::context::PATIENCE;
use crate::disk::{self, SECTOR};

/// Name of an error number, as far as the tests know it.
fn errno_name(errno: i32) -> String {
    const NAMES: &[(i32, &str)] = &[
        (libc::EPERM, "EPERM"),
        (libc::EIO, "EIO"),
        (libc::E2BIG, "E2BIG"),
        (libc::EBADF, "EBADF"),
        (libc::EAGAIN, "EAGAIN"),
        (libc::ENOMEM, "ENOMEM"),
        (libc::EACCES, "EACCES"),
        (libc::EFAULT, "EFAULT"),
        (libc::ENOTBLK, "ENOTBLK"),
        (libc::EBUSY, "EBUSY"),
        (libc::ENODEV, "ENODEV"),
        (libc::EINVAL, "EINVAL"),
        (libc::ENOTTY, "ENOTTY"),
        (libc::ENOBUFS, "ENOBUFS"),
        (libc::EOPNOTSUPP, "EOPNOTSUPP"),
        (libc::EBADFD, "EBADFD"),
    ];
    NAMES
        .iter()
        .find(|(number, _)| *number == errno)
        .map_or_else(|| format!("errno {errno}"), |(_, name)| (*name).to_owned())
}

/// An ioctl has to fail with `errno`.
pub(crate) fn fails<T: fmt::Debug>(
    what: impl fmt::Display,
    result: std::result::Result<T, Error>,
    errno: i32,
) -> Result<()> {
    let wanted = errno_name(errno);
    match result {
        Ok(value) => bail!("{what}: {wanted} expected, but it returned {value:?}"),
        Err(e) => match e.errno() {
            Some(got) if got == errno => Ok(()),
            Some(got) => bail!("{what}: {wanted} expected, got {}", errno_name(got)),
            None => bail!("{what}: {wanted} expected, got: {e}"),
        },
    }
}

/// An ioctl has to succeed.
pub(crate) fn works<T>(
    what: impl fmt::Display,
    result: std::result::Result<T, Error>,
) -> Result<T> {
    match result {
        Ok(value) => Ok(value),
        Err(e) => bail!("{what}: {e}"),
    }
}

/// What `used.len` has to be.
#[derive(Clone, Copy, Debug)]
pub(crate) enum UsedLen {
    /// This.
    Is(u32),
    /// Data and status, all of it.
    Full,
    /// Nothing was written before the status: 1 if the status is all that there is to write, else 0.
    Failed,
}

impl UsedLen {
    fn number(self, request: &Request) -> u32 {
        match self {
            UsedLen::Is(len) => len,
            UsedLen::Full => u32::try_from(request.full_used_len()).unwrap_or(u32::MAX),
            UsedLen::Failed => u32::from(request.in_len == 0),
        }
    }
}

/// Checks the outcome of a request.
pub(crate) fn outcome(
    what: impl fmt::Display,
    done: &Completion,
    status: Status,
    used_len: UsedLen,
) -> Result<()> {
    ensure!(
        done.status == status,
        "{what}: status {:?}, expected {status:?} (used.len {})",
        done.status,
        done.used_len
    );
    let expected = used_len.number(&done.request);
    ensure!(
        done.used_len == expected,
        "{what}: used.len {}, expected {expected} (status {:?})",
        done.used_len,
        done.status
    );
    ensure!(
        done.stray_write.is_none(),
        "{what}: memory that is not the request's was written, at offset {:?}",
        done.stray_write
    );
    Ok(())
}

/// Does a request, and checks its outcome.
pub(crate) fn request(
    what: impl fmt::Display,
    queue: &mut Queue,
    request: Request,
    shape: &Shape,
    status: Status,
    used_len: UsedLen,
) -> Result<Completion> {
    let done = match queue.run(request, shape, PATIENCE) {
        Ok(done) => done,
        Err(e) => bail!("{what}: {e}"),
    };
    outcome(&what, &done, status, used_len)?;
    Ok(done)
}

/// Reads part of the pattern, and checks it.
pub(crate) fn read(
    what: impl fmt::Display,
    queue: &mut Queue,
    sector: u64,
    count: usize,
    shape: &Shape,
) -> Result<()> {
    let done = request(
        &what,
        queue,
        Request::read(sector, count * SECTOR),
        shape,
        Status::Ok,
        UsedLen::Full,
    )?;
    same(&what, &done.data, &disk::pattern(sector, count))
}

/// Writes, and checks the outcome.
pub(crate) fn write(
    what: impl fmt::Display,
    queue: &mut Queue,
    sector: u64,
    data: Vec<u8>,
    shape: &Shape,
) -> Result<()> {
    request(
        what,
        queue,
        Request::write(sector, data),
        shape,
        Status::Ok,
        UsedLen::Full,
    )
    .map(drop)
}

/// Compares data, and says where it differs.
pub(crate) fn same(what: impl fmt::Display, got: &[u8], expected: &[u8]) -> Result<()> {
    ensure!(
        got.len() == expected.len(),
        "{what}: {} bytes, expected {}",
        got.len(),
        expected.len()
    );
    let Some(at) = got.iter().zip(expected).position(|(a, b)| a != b) else {
        return Ok(());
    };
    let word = |bytes: &[u8]| {
        let start = at & !7;
        bytes[start..bytes.len().min(start + 8)].to_vec()
    };
    bail!(
        "{what}: wrong data from byte {at} of {}: {:02x?}, expected {:02x?}",
        got.len(),
        word(got),
        word(expected)
    )
}

/// A queue has to work: reads of several sizes, with the right data.
pub(crate) fn healthy(what: impl fmt::Display, guest: &mut Guest, index: usize) -> Result<()> {
    for (sector, count) in [(0, 8), (4096, 64), (8, 8)] {
        read(
            format_args!("{what}: read of {count} sectors at {sector} on queue {index}"),
            guest.queue(index),
            sector,
            count,
            &Shape::default(),
        )?;
    }
    Ok(())
}

/// A queue has to answer a read, whatever is on the disk.
pub(crate) fn answers(what: impl fmt::Display, guest: &mut Guest, index: usize) -> Result<()> {
    request(
        what,
        guest.queue(index),
        Request::read(0, 4096),
        &Shape::default(),
        Status::Ok,
        UsedLen::Full,
    )
    .map(drop)
}
