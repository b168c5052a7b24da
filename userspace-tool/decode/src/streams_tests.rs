// SPDX-License-Identifier: GPL-2.0

use crate::streams::Streams;

#[test]
fn nothing_goes_on_at_first() {
    let mut streams = Streams::default();
    assert!(!streams.goes_on(0, 8));
    let mut streams = Streams::default();
    assert!(!streams.goes_on(u64::MAX - 8, 8));
}

#[test]
fn a_stream_goes_on() {
    let mut streams = Streams::default();
    assert!(!streams.goes_on(64, 8));
    for number in 1..100 {
        assert!(streams.goes_on(64 + number * 8, 8), "request {number}");
    }
    // What comes before or leaves a gap does not.
    for sector in [56, 64 + 101 * 8] {
        assert!(!streams.goes_on(sector, 8), "at {sector}");
    }
}

#[test]
fn two_streams_go_on_at_once() {
    let mut streams = Streams::default();
    for number in 0..50 {
        for stream in 0..2 {
            let goes_on = streams.goes_on((stream << 32) + number, 1);
            assert_eq!(goes_on, number > 0, "request {number} of stream {stream}");
        }
    }
}

#[test]
fn it_is_known_behind_another_request() {
    let mut streams = Streams::default();
    let mut next = 0;
    streams.goes_on(next, 8);
    // However long the stream is there.
    for between in [1, 1, 0, 1, 0, 0, 1] {
        for other in 0..between {
            assert!(!streams.goes_on((other + 1) << 32, 8), "another one");
        }
        next += 8;
        assert!(streams.goes_on(next, 8), "{between} others came between");
    }
    for other in 0..2 {
        assert!(!streams.goes_on((other + 1) << 32, 8), "another one");
    }
    assert!(!streams.goes_on(next + 8, 8), "two others came between");
}
