# SPDX-License-Identifier: GPL-2.0
"""Tests of every kind of disk, and of what happens to disks; no guest."""

import os

import ktap
from disks import (Crypt, Ext4, Image, Linear, Loop, Mapped, Nbd, NullBlk, Nvme, Partition, Raid1,
                   ScsiDebug, Thin, Xfs, sh)
from ktap import Test

OPTIONS = None
# Loads the module.
load = None

# A part of `vhost-blk exercise` that says whether a kind of disk works at all.
PART = ("info", "layout-unaligned", "bounds", "write-layout", "write-through", "write-random")


# The same for a disk that another process serves, slowly where the host is emulated.
SLOW_PART = ("info", "layout-unaligned", "write-bounds")


def on(make, only=()):
    """A test of `vhost-blk exercise` on a disk that `make` makes."""
    def run():
        load()
        with make() as disk:
            ktap.program(OPTIONS.tool, "exercise", "--disk", disk.path, "--ktap", "--write",
                         "--yes-destroy-data", "--no-restore", "--write-size=8",
                         *(f"--only={name}" for name in only))
    return run


def event(name, disk, begin, end="true"):
    """Something happens to a disk, and ends again, while there are requests on it."""
    with NullBlk() as other:
        ktap.program(OPTIONS.selftest, "--yes-destroy-data", "--disk", other.path,
                     f"--only=event.{name}", "--event-disk", disk.path, "--event", begin,
                     "--event-end", end)


def test_removed():
    """A SCSI disk is removed with requests in flight, and found again."""
    load()
    with ScsiDebug(delay=1) as disk:
        name = os.path.basename(disk.path)
        device = os.path.realpath(f"/sys/block/{name}/device")
        host = next(part for part in device.split("/") if part.startswith("host"))
        event("fails", disk, f"echo 1 >{device}/delete",
              f"echo - - - >/sys/class/scsi_host/{host}/scan && i=0; "
              f"until [ -d {device}/block ]; do i=$((i + 1)); [ $i -lt 300 ] || exit 1; "
              f"sleep 0.1; done; udevadm settle; echo /dev/$(ls {device}/block)")


def test_switched_off():
    """A null_blk disk is switched off with requests in flight, which frees what the kernel had of it, and on again."""
    load()
    with NullBlk(irqmode=2) as disk:
        event("fails", disk, f"echo 0 >{disk.folder}/power",
              f"echo 1 >{disk.folder}/power && udevadm settle")


def disconnected(transport):
    """A test that an NVMe disk is disconnected with requests in flight, and connected again."""
    def run():
        load()
        with Nvme(slow(), transport) as disk:
            event("fails", disk, disk.disconnect, disk.connect)
    return run


def reload(disk, lines):
    """A shell command that gives a device-mapper device another table."""
    return (f"printf '{lines}\\n' | dmsetup load {disk.name} && dmsetup resume {disk.name} && "
            "udevadm settle")


def test_error_table():
    """A device-mapper disk gets a table that fails everything, and then its own again."""
    load()
    with Linear(slow()) as disk:
        sectors = sh("blockdev", "--getsz", disk.path).strip()
        good = sh("dmsetup", "table", disk.name).strip().replace("\n", "\\n")
        event("fails", disk, reload(disk, f"0 {sectors} error"), reload(disk, good))


def test_suspended():
    """A device-mapper disk is suspended with requests in flight, and resumed."""
    load()
    with Linear(slow()) as disk:
        event("waits", disk, f"dmsetup suspend {disk.name}", f"dmsetup resume {disk.name}")


def test_set_read_only():
    """A disk becomes read-only with requests in flight, and writable again."""
    load()
    with slow() as disk:
        event("read_only", disk, f"blockdev --setro {disk.path}", f"blockdev --setrw {disk.path}")


def test_resized():
    """A loop device grows and shrinks under load."""
    load()
    with Loop(48) as disk:
        def resize(size):
            return (f"truncate -s {size}M {disk.file} && losetup -c {disk.path} && "
                    "udevadm settle")
        event("resized", disk, resize(64), resize(48))


def test_table_resized():
    """A device-mapper disk grows and shrinks under load."""
    load()
    with Mapped("part", NullBlk(), lambda path, _: f"0 {48 << 11} linear {path} 0") as disk:
        line = f"linear {disk.lower.path} 0"
        event("resized", disk, reload(disk, f"0 {64 << 11} {line}"),
              reload(disk, f"0 {48 << 11} {line}"))


def test_image_resized():
    """An image file grows and shrinks under load."""
    load()
    with Image(Ext4(NullBlk(size=96)), 48) as disk:
        event("resized", disk, f"truncate -s 64M {disk.path}", f"truncate -s 48M {disk.path}")


def test_image_waits():
    """The disk under an image file is suspended with requests in flight, and resumed."""
    load()
    with Image(Ext4(Linear(NullBlk(irqmode=2, nsec=1000000, size=80)))) as disk:
        lower = disk.filesystem.lower.name
        event("waits", disk, f"dmsetup suspend {lower}", f"dmsetup resume {lower}")


def test_image_flushes():
    """Flushes of an image file that take seconds keep no read waiting."""
    load()
    with Image(Ext4(Linear(NullBlk(size=80, cache=1)))) as disk:
        lower = disk.filesystem.lower
        path, sectors = lower.lower.path, sh("blockdev", "--getsz", lower.path).strip()
        good = sh("dmsetup", "table", lower.name).strip().replace("\n", "\\n")
        half = int(sectors) // 2
        line = f"{half} delay {{0}} {{1}} 0 {{0}} {{1}} 0 {{0}} {{1}} 2000".format
        event("flushes", disk,
              reload(lower, f"0 {line(path, half)}\\n{half} {line(path, 0)}"), reload(lower, good))


def slow():
    """A disk that has requests in flight for a while."""
    return NullBlk(irqmode=2, nsec=1000000)


BACKENDS = {
    "partition": lambda: Partition(NullBlk()),
    "dm-crypt": lambda: Crypt(NullBlk()),
    "dm-thin": Thin,
    "md raid1": lambda: Raid1(NullBlk(), NullBlk()),
    "nbd": Nbd,
    "NVMe over TCP": lambda: Nvme(NullBlk()),
    "an image file on ext4": lambda: Image(Ext4(NullBlk(size=80)), sparse=True),
    "an image file on xfs with 4096-byte blocks": lambda: Image(Xfs(ScsiDebug(size=320, block_size=4096))),
}

# Those of which the tests of what happens to disks already have one.
OTHERS = {
    "dm-linear": lambda: Linear(NullBlk()),
    "nvme-loop": lambda: Nvme(NullBlk(), "loop"),
}

TESTS = [
    *(Test(f"the usual requests on {name}", on(make, SLOW_PART if make is Nbd else PART))
      for name, make in BACKENDS.items()),
    *(Test(f"exercise: {name}", on(make), long=True)
      for name, make in {**BACKENDS, **OTHERS}.items()),
    test_removed,
    test_switched_off,
    Test("an NVMe disk (nvme-loop) is disconnected with requests in flight, and connected again",
         disconnected("loop")),
    Test("an NVMe disk (TCP) is disconnected with requests in flight, and connected again",
         disconnected("tcp"), long=True),
    test_error_table,
    test_suspended,
    test_set_read_only,
    test_resized,
    test_image_resized,
    test_image_flushes,
    ktap.test(test_image_waits, long=True),
    ktap.test(test_table_resized, long=True),
]
