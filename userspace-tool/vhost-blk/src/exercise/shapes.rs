// SPDX-License-Identifier: GPL-2.0

//! Descriptor layouts to try.

use rand::rngs::StdRng;
use rand::{Rng, RngExt};
use vhost_blk_ring::request::HEADER_LEN;
use vhost_blk_ring::{Cut, Request, Shape, Table};

/// Where segments stand: alignment and offset, bytes.
const PLACES: &[(usize, usize)] = &[
    (512, 0),
    (4096, 0),
    // Across a page, from an even and from an odd address.
    (4096, 3584),
    (4096, 4095),
    (512, 4),
    (512, 1),
];

/// Every layout of `request` on a ring of `queue_size` descriptors: each cut,
/// with each table, at each place. A chain longer than the ring is not allowed.
pub(crate) fn all(request: &Request, queue_size: u16) -> Vec<Shape> {
    let mut shapes = Vec::new();
    for cut in cuts(request) {
        let (readable, writable) = cut.lengths(request);
        let segments = readable.len() + writable.len();
        if segments > usize::from(queue_size) {
            continue;
        }
        for table in [
            Table::Direct,
            Table::Indirect,
            Table::After(1),
            Table::After(2),
        ] {
            if matches!(table, Table::After(count) if count >= segments) {
                continue;
            }
            for &(align, offset) in PLACES {
                shapes.push(Shape::cut(cut.clone()).table(table).at(align, offset));
            }
        }
        // All segments one after the other, as if it were not cut.
        shapes.push(Shape {
            gap: 0,
            ..Shape::cut(cut.clone()).at(1, 0)
        });
    }
    shapes
}

fn cuts(request: &Request) -> Vec<Cut> {
    let header = request.header_len;
    let (out, input) = (request.out.len(), request.in_len);
    let mut cuts = vec![
        Cut::Usual,
        Cut::Joined,
        Cut::Header(1),
        Cut::Header(8),
        Cut::Header(HEADER_LEN - 1),
        Cut::Data(512),
        Cut::Data(4096),
        // Pieces that are no sectors and not even.
        Cut::Data(1000),
        Cut::Data(333),
        Cut::Every(512),
        Cut::Every(61),
        Cut::Every(7),
        Cut::Every(1),
        // The header and the data share a segment, and so do data and status.
        Cut::Exact {
            readable: vec![header + out / 2],
            writable: vec![input / 2],
        },
        Cut::Exact {
            readable: vec![1, header],
            writable: vec![input.saturating_sub(1)],
        },
    ];
    cuts.dedup();
    cuts
}

/// A random layout of `request` with at most so many segments.
pub(crate) fn random(rng: &mut StdRng, request: &Request, max_segments: usize) -> Shape {
    let data = request.out.len().max(request.in_len).max(1);
    let cut = match rng.random_range(0..8) {
        0 => Cut::Joined,
        1 => Cut::Header(rng.random_range(1..=HEADER_LEN)),
        2 => Cut::Data(512),
        3 => Cut::Data(rng.random_range(1..=data)),
        4 => Cut::Every(rng.random_range(1..=data)),
        5 => Cut::Exact {
            readable: lengths(rng, request.header_len + request.out.len()),
            writable: lengths(rng, request.writable_len()),
        },
        _ => Cut::Usual,
    };
    let (readable, writable) = cut.lengths(request);
    let (cut, segments) = match readable.len() + writable.len() {
        count if count <= max_segments => (cut, count),
        _ => (Cut::Usual, 3),
    };
    let table = match rng.random_range(0..3) {
        0 => Table::Direct,
        1 if segments > 2 => Table::After(rng.random_range(1..segments - 1)),
        _ => Table::Indirect,
    };
    let (align, offset) = match rng.random_range(0..4) {
        0 => (512, rng.random_range(0..512)),
        1 => (4096, rng.random_range(0..4096)),
        _ => (512, 0),
    };
    Shape::cut(cut).table(table).at(align, offset)
}

/// Up to eight random lengths that make up at most `len`.
fn lengths(rng: &mut StdRng, len: usize) -> Vec<usize> {
    let mut left = len;
    let mut all = Vec::new();
    for _ in 0..rng.random_range(1..=8) {
        if left == 0 {
            break;
        }
        let piece = rng.random_range(1..=left);
        all.push(piece);
        left -= piece;
    }
    all
}

/// Random bytes.
pub(crate) fn noise(rng: &mut StdRng, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    rng.fill_bytes(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use vhost_blk_ring::memory::Memory;
    use vhost_blk_ring::request::Prepared;
    use vhost_blk_ring::ring::Ring;

    #[test]
    fn every_layout_fits_its_ring() {
        let memory = Memory::new(16 << 20).expect("16 MiB");
        for request in [Request::read(0, 4096), Request::write(0, vec![1; 4096])] {
            for size in [16, 256] {
                let mut ring = Ring::new(&memory, size, true).expect("a ring");
                let shapes = all(&request, size);
                assert!(shapes.len() > 100, "{}", shapes.len());
                for shape in shapes {
                    let prepared = Prepared::new(&memory, request.clone(), &shape).expect("room");
                    let segments = prepared.segments().expect("short");
                    ring.add(&segments, shape.table).expect("it fits");
                    ring.abandon();
                }
            }
        }
    }

    #[test]
    fn random_layouts_are_valid() {
        let memory = Memory::new(16 << 20).expect("16 MiB");
        let mut ring = Ring::new(&memory, 64, true).expect("a ring");
        let mut rng = StdRng::seed_from_u64(1);
        for round in 0..500 {
            let request = match round % 4 {
                0 => Request::read(0, 512 * rng.random_range(1..40)),
                1 => Request::write(0, vec![1; 512 * rng.random_range(1..40)]),
                2 => Request::flush(),
                _ => Request::get_id(20),
            };
            let shape = random(&mut rng, &request, 32);
            let prepared = Prepared::new(&memory, request.clone(), &shape).expect("room");
            let segments = prepared.segments().expect("short");
            assert!(segments.len() <= 32);
            ring.add(&segments, shape.table).expect("it fits");
            ring.abandon();
        }
    }
}
