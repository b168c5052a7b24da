# SPDX-License-Identifier: GPL-2.0
"""Tests of a guest with a zoned disk: what it finds, its zones, and a file system that knows them."""

import re

from disks import NullBlk, sh
from ktap import Test, expect, say
from vm import Guest

OPTIONS = None
# MiB of the disk and of a zone; zones.
SIZE, ZONE = 256, 4
CONVENTIONAL, OPEN, ACTIVE = 4, 12, 16
# Of <linux/blkzoned.h>.
EMPTY, IMPLICITLY_OPEN, EXPLICITLY_OPEN, CLOSED, FULL = 1, 2, 3, 4, 14


def zones(report):
    """The zones of a report of blkzone(8): start, type, condition and, where there is one, write pointer."""
    found = re.findall(r"start: (0x\w+), .*wptr (0x\w+) .*zcond: *(\d+)\(\w+\) \[type: (\d+)\(", report)
    return [(int(start, 16), int(kind), int(state),
             int(pointer, 16) if int(state) in (IMPLICITLY_OPEN, EXPLICITLY_OPEN, CLOSED) else None)
            for start, pointer, state, kind in found]


def limits(run, name):
    """What a kernel says of a zoned disk in sysfs."""
    names = ("zoned", "chunk_sectors", "nr_zones", "max_open_zones", "max_active_zones",
             "discard_max_bytes", "write_zeroes_max_bytes")
    return {file: run(f"cat /sys/block/{name}/queue/{file}").strip() for file in names}


def test_guest():
    """A guest has a zoned disk: its zones, as the host sees them, and btrfs on it."""
    with NullBlk(SIZE, 4096, zoned=1, zone_size=ZONE, zone_nr_conv=CONVENTIONAL,
                 zone_max_open=OPEN, zone_max_active=ACTIVE, irqmode=2) as disk:
        args = ["-blockdev", "driver=host_device,node-name=node0,cache.direct=on,discard=unmap,"
                f"filename={disk.path}",
                "-device", "vhost-blk-pci,drive=node0,serial=zoned,num-queues=2"]
        with Guest("zoned", OPTIONS.qemu, OPTIONS.work, OPTIONS.kernel, OPTIONS.initrd,
                   args) as vm:
            vm.start()
            name = vm.block("zoned")
            found = limits(vm.run, name)
            say(found)
            expect("limits", found, {
                "zoned": "host-managed", "chunk_sectors": str(ZONE << 11),
                "nr_zones": str(SIZE // ZONE), "max_open_zones": str(OPEN),
                "max_active_zones": str(ACTIVE), "discard_max_bytes": "0",
                "write_zeroes_max_bytes": "0"})
            append = int(vm.run(f"cat /sys/block/{name}/queue/zone_append_max_bytes"))
            say(f"appends of up to {append} bytes")
            expect("appends", append >= 64 << 10, True)

            def same(what):
                here, there = (zones(text) for text in (
                    sh("blkzone", "report", disk.path), vm.run(f"blkzone report /dev/{name}")))
                expect("zones", len(here), SIZE // ZONE)
                expect(f"zones in the guest {what}", there, here)
                return here

            # Each state, by the guest; the host sees the same.
            first = CONVENTIONAL * ZONE << 11
            at = {number: f"--offset {first + (number * ZONE << 11)}" for number in range(4)}
            same("at first")
            vm.run(f"blkzone open {at[1]} --count 1 /dev/{name}; "
                   f"blkzone finish {at[2]} --count 1 /dev/{name}")
            vm.run(f"dd if=/dev/urandom of=/tmp/data bs=64k count=16 2>/dev/null && dd if=/tmp/data "
                   f"of=/dev/{name} bs=64k oflag=direct,seek_bytes seek={first << 9} 2>/dev/null")
            states = [state for _, _, state, _ in same("after writes")][CONVENTIONAL:]
            expect("states", states[:4], [IMPLICITLY_OPEN, EXPLICITLY_OPEN, FULL, EMPTY])
            read = "bs=64k count=16 iflag=direct,skip_bytes"
            wanted = vm.run("sha256sum < /tmp/data")
            expect("what the guest reads", vm.run(
                f"dd if=/dev/{name} {read} skip={first << 9} 2>/dev/null | sha256sum"), wanted)
            expect("what the host reads", sh(
                "sh", "-c", f"dd if={disk.path} {read} skip={first << 9} status=none | sha256sum")
                .split()[0], wanted.split()[0])
            # Not at the write pointer: refused, and nothing is printed in the host.
            status, text = vm.run(f"dd if=/tmp/data of=/dev/{name} bs=64k count=1 "
                                  f"oflag=direct,seek_bytes seek={first << 9}", check=False)
            if not status:
                raise AssertionError(f"a write before the write pointer succeeded: {text}")
            vm.run(f"blkzone reset /dev/{name}")
            states = {state for _, _, state, _ in same("after a reset")[CONVENTIONAL:]}
            expect("states after a reset", states, {EMPTY})

            # A file system that appends, and reports. Each file is one append, and all are in flight together:
            # with Linux 7.3, btrfs exchanges parts of a larger one now and then, on virtio-blk-pci, too.
            vm.run(f"modprobe btrfs && mkfs.btrfs -q -O zoned -d single -m single /dev/{name} && "
                   f"mount -t btrfs /dev/{name} /mnt")
            vm.run("cd /mnt && for i in $(seq 80); do dd if=/dev/urandom of=file$i bs=1k "
                   "count=$((i + 40)) 2>/dev/null; done && sha256sum file* > sums && sync && "
                   "rm file?1 file?2 && sed -i '/file.[12]$/d' sums && dd if=/dev/urandom of=later bs=64k "
                   "count=1 conv=fsync 2>/dev/null && sha256sum later >> sums && sync")
            vm.run(f"umount /mnt && mount -t btrfs /dev/{name} /mnt && cd /mnt && sha256sum -c sums "
                   "> /tmp/sums || { grep -v OK /tmp/sums; exit 1; }")
            say(vm.run("cat /sys/fs/btrfs/*/devinfo/1/error_stats 2>/dev/null | tr '\\n' ' '"))
            vm.run("umount /mnt")
            same("after btrfs")
            vm.shut_down()


TESTS = [Test(test_guest.__doc__.rstrip("."), test_guest)]
