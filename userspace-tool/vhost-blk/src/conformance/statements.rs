// SPDX-License-Identifier: GPL-2.0

//! The statements, in the order of the specification, and their tests.

use std::fmt;

use anyhow::Result;

use super::session::Subject;
use super::{block, ring};
use crate::exercise::check::Outcome;

/// How binding a statement is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    Must,
    MustNot,
    Should,
    ShouldNot,
    /// It says what a request is: no word of these stands there.
    Is,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Level::Must => "MUST",
            Level::MustNot => "MUST NOT",
            Level::Should => "SHOULD",
            Level::ShouldNot => "SHOULD NOT",
            Level::Is => "is",
        })
    }
}

/// What a test can only be run with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Needs {
    Nothing,
    /// A disk that may be written to.
    Write,
    /// A configuration space, which a server has and the module has not.
    Config,
}

/// A statement that binds the device.
#[derive(Debug)]
pub(crate) struct Statement {
    /// Its section, and a letter.
    pub(crate) id: &'static str,
    pub(crate) level: Level,
    /// What it says, in other words.
    pub(crate) text: &'static str,
    pub(crate) needs: Needs,
    pub(crate) test: Option<fn(&Subject<'_>) -> Result<Outcome>>,
    /// Where else it is tested or seen to, in a few words of Markdown; empty if nowhere.
    pub(crate) also: &'static str,
}

const fn statement(
    id: &'static str,
    level: Level,
    text: &'static str,
    test: fn(&Subject<'_>) -> Result<Outcome>,
) -> Statement {
    Statement {
        id,
        level,
        text,
        needs: Needs::Nothing,
        test: Some(test),
        also: "",
    }
}

/// One that is tested elsewhere, or whose feature is not there.
const fn elsewhere(
    id: &'static str,
    level: Level,
    text: &'static str,
    also: &'static str,
) -> Statement {
    Statement {
        id,
        level,
        text,
        needs: Needs::Nothing,
        test: None,
        also,
    }
}

impl Statement {
    const fn also(self, also: &'static str) -> Self {
        Statement { also, ..self }
    }

    const fn needs(self, needs: Needs) -> Self {
        Statement { needs, ..self }
    }
}

use Level::{Is, Must, MustNot, Should, ShouldNot};
use Needs::{Config, Write};

/// All of them.
#[rustfmt::skip]
pub(crate) const STATEMENTS: &[Statement] = &[
    elsewhere("2.1.2-a", Must, "the device status is 0 after a reset",
        "QEMU's transport"),
    statement("2.1.2-b", MustNot, "uses no buffer and notifies nobody before DRIVER_OK",
        ring::before_driver_ok),
    statement("2.1.2-c", Should, "tells of an error that only a reset ends",
        ring::broken_ring).also("`exercise`: broken-ring; QEMU makes it DEVICE_NEEDS_RESET"),
    statement("2.2.2-a", MustNot, "offers no feature without those that it requires",
        ring::requirements),
    statement("2.2.2-b", Should, "accepts every valid subset of its features",
        ring::subsets),
    statement("2.2.2-c", ShouldNot, "does not refuse after a reset the features that it had accepted",
        ring::again).also("`tests/host/guest.py`: reboot, reset, rebind"),
    statement("2.2.2-d", MustNot, "offers no feature bit that it does not know",
        ring::defined_bits),
    elsewhere("2.4.1-a", Must, "a reset makes the device status 0",
        "QEMU's transport"),
    statement("2.4.1-b", MustNot, "after a reset it touches no ring and notifies nobody",
        ring::after_reset).also("`exercise`: stop checks; `tests/host/guest.py`: reset"),
    statement("2.5.2-a", Must, "the configuration space can be read before FEATURES_OK",
        ring::config_before_features).needs(Config).also("QEMU's config space"),
    elsewhere("2.6.1.1.1-a", MustNot, "a queue that was reset is not served",
        "RING_RESET is not offered"),
    statement("2.7.4.1-a", MustNot, "expects no particular arrangement of descriptors",
        ring::any_layout).also("`exercise`: layout, id-layout, write-layout checks"),
    statement("2.7.5.1-a", MustNot, "does not write to device-readable buffers",
        ring::readable_is_not_written).also("`exercise`: guard bytes in every request"),
    statement("2.7.5.1-b", ShouldNot, "does not read device-writable buffers",
        ring::writable_is_not_read),
    statement("2.7.5.3.2-a", Must, "ignores the write flag of a descriptor that refers to a table",
        ring::indirect_write_flag),
    statement("2.7.5.3.2-b", Must, "takes a chain that ends in an indirect table",
        ring::chain_then_indirect).also("`exercise`: layout checks"),
    statement("2.7.7.2-a", Must, "without EVENT_IDX: ignores used_event",
        ring::used_event_is_ignored),
    statement("2.7.7.2-b", ShouldNot, "without EVENT_IDX: does not notify while flags is 1",
        ring::flags_suppress).also("`exercise`: notify-flags"),
    statement("2.7.7.2-c", Must, "without EVENT_IDX: notifies while flags is 0",
        ring::flags_ask).also("`exercise`: notify-flags"),
    statement("2.7.7.2-d", Must, "with EVENT_IDX: ignores the lowest bit of flags",
        ring::flags_are_ignored),
    statement("2.7.7.2-e", Must, "with EVENT_IDX: notifies at the entry that used_event names",
        ring::event_is_met).also("`exercise`: notify-event-idx"),
    statement("2.7.7.2-f", ShouldNot, "with EVENT_IDX: does not notify at others",
        ring::event_is_not_met).also("`exercise`: notify-event-idx. Not tested: the first entry after a start, which the vhost core always notifies (`vhost_notify()`)"),
    statement("2.7.8.2-a", Must, "sets len before it updates the used index",
        ring::len_before_index),
    statement("2.7.8.2-b", Must, "has written the first len writable bytes",
        ring::len_is_written).also("`exercise`: every request"),
    statement("2.7.10.2-a", Must, "without EVENT_IDX: flags of the used ring is 0 or 1",
        ring::used_flags),
    statement("2.7.10.2-b", Must, "with EVENT_IDX: flags of the used ring is 0",
        ring::used_flags_with_events),
    statement("2.7.10.2-c", Must, "takes kicks for nothing",
        ring::spurious_kicks).also("`exercise`: kick-spurious"),
    statement("5.2.5.2-a", Should, "offers FLUSH", block::flush_is_offered),
    statement("5.2.5.2-b", Must, "offers FLUSH if it offers CONFIG_WCE", block::flush_with_wce),
    statement("5.2.5.2-c", Must, "writeback is 0 with CONFIG_WCE and without FLUSH",
        block::writeback_without_flush).needs(Config).also("QEMU's config space"),
    statement("5.2.5.2-d", Must, "padding of the configuration space is 0",
        block::padding).needs(Config).also("QEMU's config space"),
    statement("5.2.5.2-e", ShouldNot, "does not offer ZONED if it is not zoned",
        block::not_zoned).also("QEMU's part, which asks the module what the disk is"),
    elsewhere("5.2.5.2-f", MustNot, "does not offer ZONED to a legacy driver",
        "QEMU's part, which leaves it out only if the device has no other interface: its qtest `zoned-legacy`"),
    elsewhere("5.2.5.2-g", Must, "refuses FEATURES_OK to a driver that leaves out ZONED of a host-managed disk",
        "QEMU's part: its qtest `zoned`"),
    elsewhere("5.2.5.2-h", Must, "with ZONED, the zone model and limits in the configuration space are the disk's",
        "QEMU's part: `tests/host/zoned.py`"),
    statement("5.2.6-a", Is, "IN gives what is on the disk, from a sector of 512 bytes on",
        block::reads).also("`exercise`: reading checks"),
    statement("5.2.6-b", Is, "OUT writes to the disk, and only there",
        block::writes).needs(Write).also("`exercise`: writing checks"),
    statement("5.2.6-c", Is, "FLUSH succeeds", block::flushes).also("`exercise`: flush"),
    statement("5.2.6-d", Is, "GET_ID gives up to 20 bytes of ASCII, padded with NUL",
        block::id_is_padded).also("`exercise`: id, id-layout"),
    statement("5.2.6-e", Is, "IOERR for what goes beyond the capacity",
        block::range_is_checked).also("`exercise`: bounds, write-bounds"),
    statement("5.2.6-f", Is, "IOERR for data that is no multiple of 512 bytes",
        block::length_is_checked).also("`exercise`: block-size, write-bounds"),
    statement("5.2.6-g", Is, "UNSUPP for types that are not defined",
        block::unknown_types).also("`exercise`: unknown-type"),
    statement("5.2.6-h", Is, "UNSUPP for types whose feature is not offered",
        block::not_offered_types),
    statement("5.2.6-i", Is, "the status says IOERR where a header is too short",
        block::status_is_written).also("`exercise`: short-header"),
    statement("5.2.6-j", Is, "DISCARD takes as many ranges as the configuration space says", block::discards).needs(Write),
    elsewhere("5.2.6.2-a", Should, "a change of the capacity is notified",
        "QEMU's config space"),
    statement("5.2.6.2-b", Must, "with RO offered, OUT gives IOERR and writes nothing",
        block::read_only).also("`exercise`: write-refused"),
    statement("5.2.6.2-c", Must, "UNSUPP for DISCARD with an unknown flag",
        block::discard_flags).needs(Write),
    statement("5.2.6.2-d", Must, "UNSUPP for SECURE_ERASE with an unknown flag",
        block::erase_flags).needs(Write),
    statement("5.2.6.2-e", Must, "UNSUPP for WRITE_ZEROES with an unknown flag",
        block::zeroes_flags).needs(Write),
    statement("5.2.6.2-f", Must, "UNSUPP for DISCARD with unmap",
        block::discard_unmap).needs(Write),
    statement("5.2.6.2-g", Must, "zeroes are read after WRITE_ZEROES, with unmap and without",
        block::zeroes_are_read).needs(Write),
    elsewhere("5.2.6.2-h", Should, "write_zeroes_may_unmap is 0 if and only if nothing can be deallocated",
        "QEMU's config space; not offered yet"),
    statement("5.2.6.2-i", Must, "without FLUSH and CONFIG_WCE, a completed write is stable",
        block::stable_without_flush).needs(Write).also("`selftest`: request.durability"),
    statement("5.2.6.2-j", Must, "with writeback 0, a completed write is stable",
        block::stable_writethrough).needs(Write).also("`selftest`: request.durability; `exercise`: write-through"),
    statement("5.2.6.2-k", Must, "after FLUSH, writes that were complete before are stable",
        block::stable_when_flushed).needs(Write).also("`selftest`: request.durability"),
    statement("5.2.6.2-l", MustNot, "does not offer LIFETIME without such numbers", block::lifetime),
    statement("5.2.6.2-m", Must, "UNSUPP for zone requests if ZONED is not negotiated",
        block::zoned_types),
    elsewhere("5.2.6.2-n", Must, "with ZONED: ZONE_INVALID_CMD for zone requests that the zone's type or state forbids",
        "`selftest`: zones.hostile"),
    elsewhere("5.2.6.2-o", Must, "with ZONED: ZONE_UNALIGNED_WP for writes beside the write pointer",
        "`selftest`: zones.write"),
    elsewhere("5.2.6.2-p", Must, "with ZONED: the resource statuses where limits of open or active zones are met",
        "`selftest`: zones.resources"),
    elsewhere("5.2.6.2-q", Must, "with ZONED: ZONE_APPEND gives the sector where the data went",
        "`selftest`: zones.append"),
    elsewhere("5.2.6.2-r", Must, "with ZONED and SECURE_ERASE: erases whole zones",
        "they are not offered together: zones.hostile of `selftest`"),
    statement("6.2-a", Must, "offers VERSION_1", ring::version_1),
    elsewhere("6.2-b", Should, "offers ACCESS_PLATFORM if it sees translated addresses",
        "QEMU offers it where the guest has an IOMMU: `guest:IOMMU`"),
    statement("6.2-c", Must, "with IN_ORDER, uses buffers in the order in which they came", ring::in_order),
    statement("6.2-d", MustNot, "does not offer SR_IOV without that capability", ring::no_sr_iov),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_sections_and_letters_in_order() {
        let key = |id: &str| -> (Vec<u32>, String) {
            let (section, letter) = id.split_once('-').expect("a section and a letter");
            let numbers = section.split('.').map(|n| n.parse().expect("a number"));
            (numbers.collect(), letter.to_owned())
        };
        let keys: Vec<_> = STATEMENTS.iter().map(|s| key(s.id)).collect();
        assert!(keys.is_sorted());
        for pair in keys.windows(2) {
            assert_ne!(pair[0], pair[1]);
            // Letters of a section leave none out.
            let next = pair[0].1.bytes().next().expect("a letter") + 1;
            let next = if pair[0].0 == pair[1].0 { next } else { b'a' };
            assert_eq!(pair[1].1.as_bytes(), [next], "{:?}", pair[1]);
        }
    }

    #[test]
    fn what_is_not_tested_says_where_it_is() {
        for statement in STATEMENTS {
            assert!(statement.test.is_some() || !statement.also.is_empty());
            assert!(!statement.text.contains('|') && !statement.also.contains('|'));
        }
    }
}
