# SPDX-License-Identifier: GPL-2.0
"""Tests of a guest that discards and zeroes, and of what the host sees of it."""


from disks import Loop, NullBlk, allocated, sh
from ktap import Test, expect, say
from vm import Guest

OPTIONS = None
MIB = 1 << 20
# busybox has one of its own, which its shell prefers and which writes no zeroes.
BLKDISCARD = "/bin/blkdiscard"


def zeroes(path):
    """Whether a disk holds nothing but zeroes, read past the cache."""
    return sh("sh", "-c", f"dd if={path} bs=1M iflag=direct status=none | tr -d '\\0' | head -c 1 "
              "| wc -c").strip() == "0"


def limits(vm, name):
    """The guest's limits: granularity and maximum of discards, maximum of zeroes, in bytes."""
    folder = f"/sys/block/{name}/queue"
    return tuple(int(vm.run(f"cat {folder}/{file}")) for file in (
        "discard_granularity", "discard_max_bytes", "write_zeroes_max_bytes"))


def test_guest():
    """A guest discards, trims and zeroes: the host gets its memory back, or zeroes."""
    with Loop() as loop, NullBlk(discard=1) as kept, NullBlk() as plain:
        args = []
        for number, (disk, mode) in enumerate(
                ((loop, "unmap"), (kept, "ignore"), (plain, "unmap"))):
            args += ["-blockdev", f"driver=host_device,node-name=n{number},"
                     f"filename={disk.path},discard={mode}",
                     "-device", f"vhost-blk-pci,drive=n{number},serial=range-{number}"]
        with Guest("discard", OPTIONS.qemu, OPTIONS.work, OPTIONS.kernel, OPTIONS.initrd,
                   args) as vm:
            vm.start()
            disk, ignoring, plain_disk = (
                vm.block(f"range-{number}")
                for number in range(3))
            say(vm.run("lsblk -D"))

            granularity, discard, zero = limits(vm, disk)
            if not granularity or discard < 64 * MIB or zero < 64 * MIB:
                raise AssertionError(f"limits on loop: {granularity}, {discard}, {zero}")
            # Not with discard=ignore, and not where the disk cannot. Zeroes, always.
            for what, name in (("discard=ignore", ignoring), ("no discard", plain_disk)):
                expect(f"limits with {what}", limits(vm, name)[1:], (0, 4 * MIB))
                vm.run(f"dd if=/dev/urandom of=/dev/{name} bs=1M count=64 oflag=direct")
                status, text = vm.run(f"{BLKDISCARD} /dev/{name}", check=False)
                if not status:
                    raise AssertionError(f"{BLKDISCARD} with {what} succeeded: {text}")
                vm.run(f"{BLKDISCARD} -z /dev/{name}")
            for host_disk in (kept, plain):
                if not zeroes(host_disk.path):
                    raise AssertionError(f"{host_disk.path} is not all zeroes")

            vm.run(f"mkfs.ext4 -q /dev/{disk} && mount /dev/{disk} /mnt")
            empty = allocated(loop.file)
            vm.run("dd if=/dev/urandom of=/mnt/file bs=1M count=24 && sync")
            full = allocated(loop.file)
            vm.run("rm /mnt/file && sync && fstrim -v /mnt")
            trimmed = allocated(loop.file)
            say(f"the host's file: {empty >> 10} KiB, {full >> 10} with 24 MiB in it, "
                f"{trimmed >> 10} trimmed")
            if full - empty < 23 * MIB or full - trimmed < 23 * MIB:
                raise AssertionError("trimming did not free what was written")
            vm.run("umount /mnt")

            vm.run(f"dd if=/dev/urandom of=/dev/{disk} bs=1M count=64 oflag=direct")
            expect("memory of the full disk", allocated(loop.file) >= 64 * MIB, True)
            vm.run(f"{BLKDISCARD} -z /dev/{disk}")
            expect("zeroes on the disk", zeroes(loop.path), True)
            vm.run(f"{BLKDISCARD} /dev/{disk}")
            expect("memory of the discarded disk", allocated(loop.file) < MIB, True)
            vm.shut_down()


TESTS = [Test(test_guest.__doc__.rstrip("."), test_guest)]
