// SPDX-License-Identifier: GPL-2.0

//! virtio-blk requests, cut into descriptors in any way.
//!
//! A request has a readable part (the header, then the data of a write) and a
//! writable part (the data of a read, then the status byte). Its [`Shape`] says
//! how each part is cut into segments and where those stand in guest memory.
//! Between segments there are guard bytes, by which [`Completion`] tells whether
//! the device wrote anywhere that it should not have.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_S_ZONE_ACTIVE_RESOURCE,
    VIRTIO_BLK_S_ZONE_INVALID_CMD, VIRTIO_BLK_S_ZONE_OPEN_RESOURCE, VIRTIO_BLK_S_ZONE_UNALIGNED_WP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_SECURE_ERASE, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_T_ZONE_APPEND, VIRTIO_BLK_T_ZONE_CLOSE, VIRTIO_BLK_T_ZONE_FINISH,
    VIRTIO_BLK_T_ZONE_OPEN, VIRTIO_BLK_T_ZONE_REPORT, VIRTIO_BLK_T_ZONE_RESET,
    VIRTIO_BLK_T_ZONE_RESET_ALL, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use crate::error::{Error, Result};
use crate::memory::{Buffer, Memory, PAGE_SIZE};
use crate::ring::{Segment, Table, Used};

/// Length of a request's header, bytes.
pub const HEADER_LEN: usize = 16;
/// Size of a sector, bytes: the unit of [`Request::sector`].
pub const SECTOR_SIZE: usize = 512;

/// Length of a zone's descriptor, and of the header of a report, bytes.
pub const ZONE_LEN: usize = 64;

/// What guard bytes are.
const GUARD: u8 = 0xc5;
/// What the data of a read is before the device writes it.
const FILL: u8 = 0x5a;
/// What the status is before the device writes it.
pub(crate) const UNWRITTEN: u8 = 0xee;

/// What a request asks for: `type` of its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `VIRTIO_BLK_T_IN`
    In,
    /// `VIRTIO_BLK_T_OUT`
    Out,
    /// `VIRTIO_BLK_T_FLUSH`
    Flush,
    /// `VIRTIO_BLK_T_GET_ID`
    GetId,
    /// `VIRTIO_BLK_T_DISCARD`
    Discard,
    /// `VIRTIO_BLK_T_WRITE_ZEROES`
    WriteZeroes,
    /// `VIRTIO_BLK_T_SECURE_ERASE`
    SecureErase,
    /// `VIRTIO_BLK_T_ZONE_APPEND`
    ZoneAppend,
    /// `VIRTIO_BLK_T_ZONE_REPORT`
    ZoneReport,
    /// `VIRTIO_BLK_T_ZONE_OPEN`
    ZoneOpen,
    /// `VIRTIO_BLK_T_ZONE_CLOSE`
    ZoneClose,
    /// `VIRTIO_BLK_T_ZONE_FINISH`
    ZoneFinish,
    /// `VIRTIO_BLK_T_ZONE_RESET`
    ZoneReset,
    /// `VIRTIO_BLK_T_ZONE_RESET_ALL`
    ZoneResetAll,
    /// Any number.
    Other(u32),
}

impl Kind {
    /// The number that stands for it in the header.
    pub fn number(self) -> u32 {
        match self {
            Kind::In => VIRTIO_BLK_T_IN,
            Kind::Out => VIRTIO_BLK_T_OUT,
            Kind::Flush => VIRTIO_BLK_T_FLUSH,
            Kind::GetId => VIRTIO_BLK_T_GET_ID,
            Kind::Discard => VIRTIO_BLK_T_DISCARD,
            Kind::WriteZeroes => VIRTIO_BLK_T_WRITE_ZEROES,
            Kind::SecureErase => VIRTIO_BLK_T_SECURE_ERASE,
            Kind::ZoneAppend => VIRTIO_BLK_T_ZONE_APPEND,
            Kind::ZoneReport => VIRTIO_BLK_T_ZONE_REPORT,
            Kind::ZoneOpen => VIRTIO_BLK_T_ZONE_OPEN,
            Kind::ZoneClose => VIRTIO_BLK_T_ZONE_CLOSE,
            Kind::ZoneFinish => VIRTIO_BLK_T_ZONE_FINISH,
            Kind::ZoneReset => VIRTIO_BLK_T_ZONE_RESET,
            Kind::ZoneResetAll => VIRTIO_BLK_T_ZONE_RESET_ALL,
            Kind::Other(number) => number,
        }
    }
}

/// A range of a discard, of zeroes or of an erase:
/// `struct virtio_blk_discard_write_zeroes`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Range {
    /// First sector.
    pub sector: u64,
    /// Sectors.
    pub sectors: u32,
    /// `VIRTIO_BLK_WRITE_ZEROES_FLAG_*`
    pub flags: u32,
}

impl Range {
    /// The flag by which zeroed sectors may be deallocated.
    pub const UNMAP: u32 = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
    /// Length of a range in a request, bytes.
    pub const LEN: usize = 16;

    /// A range without flags.
    pub fn new(sector: u64, sectors: u32) -> Self {
        Range {
            sector,
            sectors,
            flags: 0,
        }
    }

    /// The same, with these flags.
    #[must_use]
    pub fn flags(mut self, flags: u32) -> Self {
        self.flags = flags;
        self
    }
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// `VIRTIO_BLK_S_OK`
    Ok,
    /// `VIRTIO_BLK_S_IOERR`
    IoErr,
    /// `VIRTIO_BLK_S_UNSUPP`
    Unsupported,
    /// `VIRTIO_BLK_S_ZONE_INVALID_CMD`
    ZoneInvalidCommand,
    /// `VIRTIO_BLK_S_ZONE_UNALIGNED_WP`
    ZoneUnalignedWritePointer,
    /// `VIRTIO_BLK_S_ZONE_OPEN_RESOURCE`
    ZoneOpenResource,
    /// `VIRTIO_BLK_S_ZONE_ACTIVE_RESOURCE`
    ZoneActiveResource,
    /// The device did not write it.
    Unwritten,
    /// Any other byte.
    Other(u8),
}

impl From<u8> for Status {
    fn from(byte: u8) -> Self {
        match u32::from(byte) {
            VIRTIO_BLK_S_OK => Status::Ok,
            VIRTIO_BLK_S_IOERR => Status::IoErr,
            VIRTIO_BLK_S_UNSUPP => Status::Unsupported,
            VIRTIO_BLK_S_ZONE_INVALID_CMD => Status::ZoneInvalidCommand,
            VIRTIO_BLK_S_ZONE_UNALIGNED_WP => Status::ZoneUnalignedWritePointer,
            VIRTIO_BLK_S_ZONE_OPEN_RESOURCE => Status::ZoneOpenResource,
            VIRTIO_BLK_S_ZONE_ACTIVE_RESOURCE => Status::ZoneActiveResource,
            _ if byte == UNWRITTEN => Status::Unwritten,
            _ => Status::Other(byte),
        }
    }
}

/// A request, before it is cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// What it asks for.
    pub kind: Kind,
    /// Where on the disk, in sectors.
    pub sector: u64,
    /// `ioprio` (reserved) of the header.
    pub reserved: u32,
    /// Data that the device reads, after the header.
    pub out: Vec<u8>,
    /// Length of the data that the device writes, before the status, bytes.
    pub in_len: usize,
    /// How much of the header is sent, bytes: [`HEADER_LEN`], unless the device
    /// is to be tested with a short one.
    pub header_len: usize,
    /// Whether there is a status byte, which only a test leaves out.
    pub has_status: bool,
}

impl Request {
    fn new(kind: Kind, sector: u64, out: Vec<u8>, in_len: usize) -> Self {
        Request {
            kind,
            sector,
            reserved: 0,
            out,
            in_len,
            header_len: HEADER_LEN,
            has_status: true,
        }
    }

    /// Reads `len` bytes from `sector` on.
    pub fn read(sector: u64, len: usize) -> Self {
        Self::new(Kind::In, sector, Vec::new(), len)
    }

    /// Writes `data` from `sector` on.
    pub fn write(sector: u64, data: Vec<u8>) -> Self {
        Self::new(Kind::Out, sector, data, 0)
    }

    /// Makes what was written stable.
    pub fn flush() -> Self {
        Self::new(Kind::Flush, 0, Vec::new(), 0)
    }

    /// Asks for the first `len` bytes of the serial number.
    pub fn get_id(len: usize) -> Self {
        Self::new(Kind::GetId, 0, Vec::new(), len)
    }

    /// Does what `kind` says to each of `ranges`.
    pub fn ranges(kind: Kind, ranges: &[Range]) -> Self {
        let mut out = Vec::with_capacity(ranges.len() * Range::LEN);
        for range in ranges {
            out.extend(range.sector.to_le_bytes());
            out.extend(range.sectors.to_le_bytes());
            out.extend(range.flags.to_le_bytes());
        }
        Self::new(kind, 0, out, 0)
    }

    /// Writes `data` at the write pointer of the zone that begins at `sector`. The device returns
    /// where that was: [`Completion::appended_at`].
    pub fn zone_append(sector: u64, data: Vec<u8>) -> Self {
        Self::new(Kind::ZoneAppend, sector, data, 8)
    }

    /// Asks for up to `zones` zones, from that of `sector` on: [`Completion::zones`].
    pub fn zone_report(sector: u64, zones: usize) -> Self {
        Self::new(
            Kind::ZoneReport,
            sector,
            Vec::new(),
            ZONE_LEN + zones * ZONE_LEN,
        )
    }

    /// Does something with the zone that begins at `sector`, or with all.
    pub fn zone(kind: Kind, sector: u64) -> Self {
        Self::new(kind, sector, Vec::new(), 0)
    }

    /// Any type, with any data either way.
    pub fn other(number: u32, sector: u64, out: Vec<u8>, in_len: usize) -> Self {
        Self::new(Kind::Other(number), sector, out, in_len)
    }

    /// The same, with only the first `len` bytes of its header.
    #[must_use]
    pub fn with_header_len(mut self, len: usize) -> Self {
        self.header_len = len.min(HEADER_LEN);
        self
    }

    /// The same, without a status byte.
    #[must_use]
    pub fn without_status(mut self) -> Self {
        self.has_status = false;
        self
    }

    /// Its readable part.
    pub fn readable(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_LEN + self.out.len());
        bytes.extend(self.kind.number().to_le_bytes());
        bytes.extend(self.reserved.to_le_bytes());
        bytes.extend(self.sector.to_le_bytes());
        bytes.truncate(self.header_len);
        bytes.extend(&self.out);
        bytes
    }

    /// Length of its writable part, bytes.
    pub fn writable_len(&self) -> usize {
        self.in_len + usize::from(self.has_status)
    }

    /// `used.len` of a device that does all of it, and says so exactly.
    pub fn full_used_len(&self) -> usize {
        self.writable_len()
    }
}

/// How the parts of a request are cut into segments.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Cut {
    /// Header, data and status are a segment each.
    #[default]
    Usual,
    /// Each part is one segment: the data of a write is joined to the header,
    /// and that of a read to the status.
    Joined,
    /// As usual, with the header in pieces of so many bytes.
    Header(usize),
    /// As usual, with the data in pieces of so many bytes.
    Data(usize),
    /// Both parts in pieces of so many bytes, wherever header, data and status
    /// begin and end.
    Every(usize),
    /// Segments of exactly these lengths; the last ones are cut short, or
    /// another is added, so that they make up the part. A length of 0 gives an
    /// empty descriptor.
    Exact {
        /// Lengths for the readable part, bytes.
        readable: Vec<usize>,
        /// Lengths for the writable part, bytes.
        writable: Vec<usize>,
    },
}

impl Cut {
    /// The lengths of the segments of the readable and the writable part of
    /// `request`, bytes.
    pub fn lengths(&self, request: &Request) -> (Vec<usize>, Vec<usize>) {
        let header = request.header_len;
        let out = request.out.len();
        let input = request.in_len;
        let status = usize::from(request.has_status);
        match self {
            Cut::Usual => (
                concat([pieces(header, header), pieces(out, out)]),
                concat([pieces(input, input), pieces(status, 1)]),
            ),
            Cut::Joined => (
                pieces(header + out, header + out),
                pieces(input + status, input + status),
            ),
            Cut::Header(size) => (
                concat([pieces(header, *size), pieces(out, out)]),
                concat([pieces(input, input), pieces(status, 1)]),
            ),
            Cut::Data(size) => (
                concat([pieces(header, header), pieces(out, *size)]),
                concat([pieces(input, *size), pieces(status, 1)]),
            ),
            Cut::Every(size) => (pieces(header + out, *size), pieces(input + status, *size)),
            Cut::Exact { readable, writable } => (
                exact(header + out, readable),
                exact(input + status, writable),
            ),
        }
    }
}

fn concat(parts: [Vec<usize>; 2]) -> Vec<usize> {
    parts.into_iter().flatten().collect()
}

/// Pieces of `size` bytes that make up `len`; the last may be shorter.
fn pieces(len: usize, size: usize) -> Vec<usize> {
    let size = size.max(1);
    let mut all = vec![size; len / size];
    if len % size != 0 {
        all.push(len % size);
    }
    all
}

/// `lengths`, cut short or with one more, so that they make up `len`.
fn exact(len: usize, lengths: &[usize]) -> Vec<usize> {
    let mut left = len;
    let mut all: Vec<usize> = lengths
        .iter()
        .map(|&wanted| {
            let taken = wanted.min(left);
            left -= taken;
            taken
        })
        .collect();
    if left > 0 {
        all.push(left);
    }
    all
}

/// How a request becomes a chain of descriptors in guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// How its parts are cut.
    pub cut: Cut,
    /// Which descriptors stand in an indirect table.
    pub table: Table,
    /// Every segment starts `offset` bytes after a multiple of this many bytes,
    /// a power of two up to a page.
    pub align: usize,
    /// See `align`, bytes.
    pub offset: usize,
    /// Guard bytes after each segment, at least.
    pub gap: usize,
}

impl Default for Shape {
    /// Three descriptors in the ring's own table; data at a multiple of 512.
    fn default() -> Self {
        Shape {
            cut: Cut::Usual,
            table: Table::Direct,
            align: SECTOR_SIZE,
            offset: 0,
            gap: 16,
        }
    }
}

impl Shape {
    /// This cut, with all else as by default.
    pub fn cut(cut: Cut) -> Self {
        Shape {
            cut,
            ..Self::default()
        }
    }

    /// The same, with this table.
    #[must_use]
    pub fn table(mut self, table: Table) -> Self {
        self.table = table;
        self
    }

    /// The same, with every segment at `offset` bytes after a multiple of
    /// `align`.
    #[must_use]
    pub fn at(mut self, align: usize, offset: usize) -> Self {
        self.align = align;
        self.offset = offset;
        self
    }
}

/// A request in guest memory, ready for a ring.
#[derive(Debug)]
pub struct Prepared {
    request: Request,
    buffer: Buffer,
    /// What the buffer was filled with.
    image: Vec<u8>,
    /// Readable segments, then writable ones: offset in the buffer and length.
    places: Vec<(usize, usize)>,
    readable: usize,
}

impl Prepared {
    /// Puts `request` into `memory`, cut as `shape` says.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`]; [`Error::Invalid`], if `shape` has an alignment
    /// that is not a power of two up to a page.
    pub fn new(memory: &Memory, request: Request, shape: &Shape) -> Result<Self> {
        if !shape.align.is_power_of_two() || shape.align > PAGE_SIZE {
            return Err(Error::Invalid(format!("alignment of {}", shape.align)));
        }
        let (readable, writable) = shape.cut.lengths(&request);
        let mut end = 0;
        let places: Vec<_> = readable
            .iter()
            .chain(&writable)
            .map(|&len| {
                let start = usize::next_multiple_of(end, shape.align) + shape.offset;
                end = start + len + shape.gap;
                (start, len)
            })
            .collect();
        let mut image = vec![GUARD; end];
        let (inputs, outputs) = places.split_at(readable.len());
        let bytes = request.readable();
        let mut bytes = bytes.as_slice();
        for &(start, len) in inputs {
            let (now, later) = bytes.split_at(len);
            image[start..start + len].copy_from_slice(now);
            bytes = later;
        }
        for &(start, len) in outputs {
            image[start..start + len].fill(FILL);
        }
        if request.has_status {
            if let Some((start, len)) = outputs.iter().rfind(|(_, len)| *len > 0) {
                image[start + len - 1] = UNWRITTEN;
            }
        }
        let buffer = memory.alloc(end, PAGE_SIZE)?;
        buffer.write(0, &image)?;
        Ok(Prepared {
            request,
            buffer,
            image,
            readable: readable.len(),
            places,
        })
    }

    /// The segments, as a ring takes them.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`], if one is longer than a descriptor can say.
    pub fn segments(&self) -> Result<Vec<Segment>> {
        self.places
            .iter()
            .enumerate()
            .map(|(index, &(start, len))| {
                Ok(Segment {
                    addr: self.buffer.at(start),
                    len: u32::try_from(len)
                        .map_err(|_| Error::Invalid(format!("segment of {len} bytes")))?,
                    writable: index >= self.readable,
                })
            })
            .collect()
    }

    /// The request.
    pub fn request(&self) -> &Request {
        &self.request
    }

    /// The guest memory that it is in.
    pub fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// Collects what the device wrote, when it has used the chain.
    ///
    /// # Errors
    ///
    /// [`Error::Access`], if its memory was taken away.
    pub fn complete(self, used: Used) -> Result<Completion> {
        let now = self.buffer.read(0, self.buffer.len())?;
        let mut expected = self.image;
        let mut writable = Vec::with_capacity(self.request.writable_len());
        for &(start, len) in &self.places[self.readable..] {
            writable.extend(&now[start..start + len]);
            // What remains different is what the device must not touch.
            expected[start..start + len].copy_from_slice(&now[start..start + len]);
        }
        let stray_write = now.iter().zip(&expected).position(|(a, b)| a != b);
        let status = if self.request.has_status {
            writable.pop().map_or(Status::Unwritten, Status::from)
        } else {
            Status::Unwritten
        };
        Ok(Completion {
            untouched: writable.iter().all(|&byte| byte == FILL),
            request: self.request,
            head: used.head,
            status,
            used_len: used.len,
            data: writable,
            stray_write,
        })
    }
}

/// A request that the device has used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The request.
    pub request: Request,
    /// Head of its chain.
    pub head: u16,
    /// What became of it.
    pub status: Status,
    /// Bytes that the device says that it wrote.
    pub used_len: u32,
    /// The data that the device was to write, without the status.
    pub data: Vec<u8>,
    /// Whether the data is as it was before.
    pub untouched: bool,
    /// Offset in the request's memory of the first byte outside its writable
    /// part that has changed.
    pub stray_write: Option<usize>,
}

/// A zone, as the device or the host reports it. All positions are in sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Zone {
    /// Where it begins.
    pub start: u64,
    /// How much of it can be written.
    pub capacity: u64,
    /// Where it is written next. Without meaning for zones that are not.
    pub write_pointer: u64,
    /// `VIRTIO_BLK_ZT_*`, or `BLK_ZONE_TYPE_*`, which are the same.
    pub kind: u8,
    /// `VIRTIO_BLK_ZS_*`, or `BLK_ZONE_COND_*`, which are the same.
    pub state: u8,
}

impl Zone {
    /// From `struct virtio_blk_zone_descriptor`.
    fn from_descriptor(bytes: &[u8]) -> Self {
        Zone {
            capacity: number(bytes, 0),
            start: number(bytes, 8),
            write_pointer: number(bytes, 16),
            kind: bytes[24],
            state: bytes[25],
        }
    }
}

fn number(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(number)
}

impl Completion {
    /// How many of the bytes that [`used_len`](Self::used_len) covers are as they were before: none,
    /// if what the device wrote looks different, as zeroes and letters do.
    pub fn claimed_unwritten(&self) -> usize {
        let claimed = self.used_len as usize;
        let data = self.data.iter().take(claimed);
        let status = claimed > self.data.len() && self.status == Status::Unwritten;
        data.filter(|&&byte| byte == FILL).count() + usize::from(status)
    }

    /// Where a zone append wrote, in sectors; `None` if there is no room for that in the request.
    pub fn appended_at(&self) -> Option<u64> {
        (self.data.len() >= 8).then(|| number(&self.data, 0))
    }

    /// The zones of a report; `None` if it says that there are more than there is room for.
    pub fn zones(&self) -> Option<Vec<Zone>> {
        let (header, zones) = self.data.split_at_checked(ZONE_LEN)?;
        let count = usize::try_from(number(header, 0)).ok()?;
        let zones = zones.chunks_exact(ZONE_LEN).map(Zone::from_descriptor);
        (count <= zones.len()).then(|| zones.take(count).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prepare(request: Request, shape: &Shape) -> (Memory, Prepared) {
        let memory = Memory::new(8 << 20).expect("8 MiB");
        let prepared = Prepared::new(&memory, request, shape).expect("room");
        (memory, prepared)
    }

    /// What the device reads, and the addresses that it writes, byte by byte.
    fn device_side(memory: &Memory, prepared: &Prepared) -> (Vec<u8>, Vec<u64>) {
        let mut reads = Vec::new();
        let mut writes = Vec::new();
        for segment in prepared.segments().expect("short") {
            if segment.writable {
                writes.extend(segment.addr.0..segment.addr.0 + u64::from(segment.len));
            } else {
                assert!(writes.is_empty(), "readable after writable");
                let mut bytes = vec![0; segment.len as usize];
                memory.read(segment.addr, &mut bytes).expect("mapped");
                reads.extend(bytes);
            }
        }
        (reads, writes)
    }

    fn cuts() -> Vec<Cut> {
        vec![
            Cut::Usual,
            Cut::Joined,
            Cut::Header(1),
            Cut::Header(7),
            Cut::Data(512),
            Cut::Every(1),
            Cut::Every(4095),
            Cut::Exact {
                readable: vec![0, 15, 2, 0],
                writable: vec![3, 0],
            },
        ]
    }

    #[test]
    fn every_cut_is_the_same_request() {
        let requests = [
            Request::read(7, 1024),
            Request::write(1 << 40, (0..=255).cycle().take(1536).collect()),
            Request::flush(),
            Request::get_id(20),
            Request::other(99, 3, vec![1; 5], 6),
        ];
        for request in requests {
            for cut in cuts() {
                for (align, offset) in [(512, 0), (1, 0), (4096, 4000)] {
                    let shape = Shape::cut(cut.clone()).at(align, offset);
                    let (memory, prepared) = prepare(request.clone(), &shape);
                    let (reads, writes) = device_side(&memory, &prepared);
                    assert_eq!(reads, request.readable(), "{cut:?}");
                    assert_eq!(writes.len(), request.writable_len(), "{cut:?}");
                    for segment in prepared.segments().expect("short") {
                        assert_eq!(segment.addr.0 % align as u64, (offset % align) as u64);
                    }
                    for (n, addr) in writes.iter().enumerate() {
                        let last = n + 1 == writes.len();
                        let byte = if last {
                            0
                        } else {
                            u8::try_from(n % 251).expect("small")
                        };
                        memory
                            .write(vm_memory::GuestAddress(*addr), &[byte])
                            .expect("mapped");
                    }
                    let done = prepared.complete(Used { head: 3, len: 9 }).expect("mapped");
                    assert_eq!(done.status, Status::Ok);
                    assert_eq!((done.head, done.used_len), (3, 9));
                    assert_eq!(done.stray_write, None);
                    let data: Vec<u8> = (0..request.in_len)
                        .map(|n| u8::try_from(n % 251).expect("small"))
                        .collect();
                    assert_eq!(done.data, data);
                }
            }
        }
    }

    #[test]
    fn lengths_of_cuts() {
        let read = Request::read(0, 1024);
        let write = Request::write(0, vec![0; 1024]);
        let cases: &[(&Request, Cut, &[usize], &[usize])] = &[
            (&read, Cut::Usual, &[16], &[1024, 1]),
            (&write, Cut::Usual, &[16, 1024], &[1]),
            (&read, Cut::Joined, &[16], &[1025]),
            (&write, Cut::Joined, &[1040], &[1]),
            (&read, Cut::Header(12), &[12, 4], &[1024, 1]),
            (&write, Cut::Data(512), &[16, 512, 512], &[1]),
            (&read, Cut::Every(1000), &[16], &[1000, 25]),
        ];
        for (request, cut, readable, writable) in cases {
            assert_eq!(
                cut.lengths(request),
                (readable.to_vec(), writable.to_vec()),
                "{cut:?}"
            );
        }
        assert_eq!(exact(5, &[3, 0, 9, 1]), [3, 0, 2, 0]);
        assert_eq!(exact(5, &[3]), [3, 2]);
        assert_eq!(exact(5, &[]), [5]);
    }

    #[test]
    fn a_device_that_does_nothing_or_too_much_is_seen() {
        let used = Used { head: 0, len: 0 };
        let (_memory, prepared) = prepare(Request::read(0, 512), &Shape::default());
        let done = prepared.complete(used).expect("mapped");
        assert_eq!(done.status, Status::Unwritten);
        assert!(done.untouched);

        let (memory, prepared) = prepare(Request::read(0, 512), &Shape::default());
        let data = prepared.segments().expect("short")[1];
        let beyond = vm_memory::GuestAddress(data.addr.0 + 512);
        memory.write(beyond, &[0]).expect("mapped");
        memory.write(data.addr, &[0]).expect("mapped");
        let done = prepared.complete(used).expect("mapped");
        assert_eq!(done.stray_write, Some(512 + 512));
        assert!(!done.untouched);
    }

    #[test]
    fn short_headers_and_no_status() {
        let request = Request::read(0, 512).with_header_len(15).without_status();
        assert_eq!(request.readable().len(), 15);
        assert_eq!(request.writable_len(), 512);
        let (readable, writable) = Cut::Usual.lengths(&request);
        assert_eq!((readable, writable), (vec![15], vec![512]));
        let bare = Request::flush().with_header_len(0).without_status();
        assert_eq!(Cut::Usual.lengths(&bare), (vec![], vec![]));
    }

    #[test]
    fn ranges_are_sixteen_bytes_each() {
        let ranges = [
            Range::new(0x0102_0304_0506_0708, 9),
            Range::new(1, u32::MAX).flags(Range::UNMAP),
        ];
        let request = Request::ranges(Kind::WriteZeroes, &ranges);
        assert_eq!(request.kind.number(), 13);
        assert_eq!(
            request.out,
            [
                8, 7, 6, 5, 4, 3, 2, 1, 9, 0, 0, 0, 0, 0, 0, 0, //
                1, 0, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255, 1, 0, 0, 0
            ]
        );
        let numbers = [Kind::Discard, Kind::SecureErase].map(Kind::number);
        assert_eq!(numbers, [11, 14]);
    }

    #[test]
    fn zones_are_read() {
        let memory = Memory::new(1 << 20).expect("1 MiB");
        let report = Prepared::new(&memory, Request::zone_report(0, 2), &Shape::default());
        let mut done = report
            .and_then(|report| report.complete(Used { head: 0, len: 0 }))
            .expect("room");
        assert_eq!(done.data.len(), 3 * ZONE_LEN);
        // Filled with what is no count.
        assert_eq!(done.zones(), None);
        done.data.fill(0);
        assert_eq!(done.zones(), Some(vec![]));
        done.data[0] = 1;
        for (at, byte) in [(64, 1), (72, 2), (81, 3), (88, 4), (89, 5), (128, 9)] {
            done.data[at] = byte;
        }
        let zone = Zone {
            start: 2,
            capacity: 1,
            write_pointer: 0x300,
            kind: 4,
            state: 5,
        };
        assert_eq!(done.zones(), Some(vec![zone]));
        done.data[0] = 3;
        assert_eq!(done.zones(), None);
        assert_eq!(done.appended_at(), Some(3));
        done.data.truncate(7);
        assert_eq!((done.appended_at(), done.zones()), (None, None));
    }

    #[test]
    fn statuses_have_names() {
        let all = [0, 1, 2, 3, 4, 5, 6, 7, UNWRITTEN].map(Status::from);
        let names = [
            Status::Ok,
            Status::IoErr,
            Status::Unsupported,
            Status::ZoneInvalidCommand,
            Status::ZoneUnalignedWritePointer,
            Status::ZoneOpenResource,
            Status::ZoneActiveResource,
            Status::Other(7),
            Status::Unwritten,
        ];
        assert_eq!(all, names);
    }
}
