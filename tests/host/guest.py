#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Tests with QEMU and real guests; runs in the host. Prints KTAP.

After those of devices.py a guest with three disks: ext4 on one with 512-byte blocks, xfs on one with 4096-byte blocks,
and a third that fio writes raw. These tests build on each other in their order.
"""

import argparse
import os
import sys
import time

import devices
import discard
import ktap
import life
import migration
import viommu
import zoned
from disks import Brd, NullBlk, ScsiDebug, sh
from ktap import expect, say
from vm import Guest, GuestReset

FIO = ("fio --ioengine=libaio --direct=1 --verify=crc32c --verify_fatal=1 --randseed=7 "
       "--output-format=terse --terse-version=3 --minimal")


class Rig:
    """The guest under test and its disks."""

    def __init__(self, options):
        self.options = options
        self.disks = []
        self.guest = None

    def start(self):
        """The guest; started again if the test before broke it."""
        if not self.guest:
            for make in (lambda: NullBlk(160, 512, irqmode=2), lambda: ScsiDebug(size=320, block_size=4096),
                         lambda: Brd(64)):
                self.disks.append(make())
            self.guest = Guest("guest", self.options.qemu, self.options.work,
                               self.options.kernel, self.options.initrd, self.disk_args())
        if self.guest.process is None or self.guest.process.poll() is not None:
            self.guest.start()
        return self.guest

    def disk_args(self):
        """QEMU's arguments for the disks."""
        args = []
        for number, disk in enumerate(self.disks):
            args += ["-blockdev", f"driver=host_device,node-name=node{number},"
                     f"filename={disk.path},cache.direct=on"]
            args += ["-device", self.device(number)]
        return args

    def device(self, number):
        """The -device argument of a disk."""
        # The first one is flushed though it has no need of that.
        return (f"{self.options.device},id=disk{number},drive=node{number},"
                f"num-queues=2,serial=vhost-blk-{number}" + (",write-cache=on" if number == 0 else ""))

    def cache_type(self, number):
        """What the guest finds: the disk's own write cache, unless that is overridden, or QEMU does not look."""
        if number == 0 or self.options.device == "virtio-blk-pci":
            return "write back"
        with open(f"/sys/block/{os.path.basename(self.disks[number].path)}/queue/write_cache",
                  encoding="ascii") as file:
            return file.read().strip()

    def explain(self):
        """Print the end of what the guest and QEMU have printed."""
        if self.guest:
            self.guest.explain()
        migration.explain()

    def close(self):
        """End the guest and remove the disks."""
        if self.guest:
            self.guest.kill()
        for disk in self.disks:
            disk.close()


RIG = None


def guest():
    """The guest with the three disks."""
    return RIG.start()


def block(vm, number):
    """The name that disk `number` has in the guest, by its serial."""
    return vm.block(f"vhost-blk-{number}")


def mount(vm):
    """Mount both filesystems in the guest."""
    vm.run(f"mkdir -p /mnt/ext4 /mnt/xfs; mount -t ext4 /dev/{block(vm, 0)} /mnt/ext4 && "
           f"mount -t xfs /dev/{block(vm, 1)} /mnt/xfs")


def umount(vm):
    """Unmount both; programs that still write are waited for by the caller."""
    vm.run("umount /mnt/ext4 /mnt/xfs")


def fio(vm, name, where, extra, timeout=300):
    """Run fio in the guest."""
    vm.run(f"{FIO} --name={name} --filename={where} {extra}", timeout)


def end_load(vm):
    """End fio in the guest, which goes on when its disk has gone."""
    vm.run("killall -9 fio; i=0; while pidof fio > /dev/null; do "
           "i=$((i + 1)); [ $i -lt 300 ] || exit 1; sleep 0.1; done")


# What is written before the reboot and verified again and again.
FILES = "--rw=randwrite --bsrange=4k-64k --bs_unaligned=0 --size=8m --iodepth=16 --fsync=64"


def verify(vm):
    """Check what test_ext4 and test_xfs wrote."""
    vm.run("echo 3 > /proc/sys/vm/drop_caches")
    for place in ("ext4", "xfs"):
        fio(vm, "data", f"/mnt/{place}/data", FILES + " --verify_only")
        vm.run(f"cd /mnt/{place} && sha256sum -c sums", 300)


def test_found():
    """The guest finds its disks: size, block size, queues, serial, write cache."""
    vm = guest()
    say(vm.run("lsblk -o NAME,SIZE,LOG-SEC,PHY-SEC,SERIAL,TYPE || lsblk"))
    for number, disk in enumerate(RIG.disks):
        name = block(vm, number)
        where = f"/sys/block/{name}"
        size = int(sh("blockdev", "--getsz", disk.path))
        logical = sh("blockdev", "--getss", disk.path).strip()
        expect(f"{name} size", vm.run(f"cat {where}/size"), str(size))
        expect(f"{name} block size", vm.run(f"cat {where}/queue/logical_block_size"), logical)
        expect(f"{name} queues", vm.run(f"ls {where}/mq | wc -l"), "2")
        expect(f"{name} cache", vm.run(f"cat {where}/cache_type"), RIG.cache_type(number))
        expect(f"{name} read-only", vm.run(f"cat {where}/ro"), "0")


def test_raw():
    """fio writes the whole of a raw disk at random and reads it back, crc32c."""
    vm = guest()
    fio(vm, "raw", f"/dev/{block(vm, 2)}", RAW, 600)


RAW = "--rw=randwrite --bs=64k --iodepth=16 --size=32m --end_fsync=1 --do_verify=1"


def test_queues():
    """Both queues of a disk carry requests."""
    vm = guest()
    name = block(vm, 2)
    for cpu in (0, 1):
        vm.run(f"taskset {1 << cpu:x} dd if=/dev/{name} of=/dev/null bs=4k count=64 iflag=direct")
    say(vm.run("grep virtio /proc/interrupts"))
    device = vm.run(f"basename $(readlink -f /sys/block/{name}/device)")
    for queue in (0, 1):
        line = vm.run(f"grep -w {device}-req.{queue} /proc/interrupts")
        count = sum(int(word) for word in line.split()[1:3])
        if count < 32:
            raise AssertionError(f"queue {queue} had {count} interrupts: {line}")


def filesystem(place, mkfs):
    """Make a filesystem, write files and a verify area, read both back."""
    vm = guest()
    vm.run(mkfs, 300)
    number = 0 if place == "ext4" else 1
    vm.run(f"mkdir -p /mnt/{place} && mount -t {place} /dev/{block(vm, number)} /mnt/{place}")
    fio(vm, "data", f"/mnt/{place}/data", FILES + " --do_verify=1")
    vm.run(f"cd /mnt/{place} && for i in 1 2 3 4; do "
           f"dd if=/dev/urandom of=file$i bs=61k count=9 2>/dev/null; done && "
           f"cp -r /bin bin && sha256sum data file* bin/mke2fs bin/fio > sums && sync", 300)
    vm.run("echo 3 > /proc/sys/vm/drop_caches")
    vm.run(f"cd /mnt/{place} && sha256sum -c sums", 300)
    vm.run(f"umount /mnt/{place}")


def test_ext4():
    """ext4: make it, write with fio and files, sync, read back with checksums."""
    vm = guest()
    filesystem("ext4", f"mkfs.ext4 -q -E lazy_itable_init=0 /dev/{block(vm, 0)}")


def test_xfs():
    """xfs on 4096-byte blocks: the same."""
    vm = guest()
    vm.run("modprobe xfs")
    filesystem("xfs", f"mkfs.xfs -q -f /dev/{block(vm, 1)}")


def test_reboot():
    """The guest reboots with writes in flight; what was synced before is there."""
    vm = guest()
    vm.run("modprobe xfs")
    mount(vm)
    vm.run("for d in ext4 xfs; do (fio --name=load --filename=/mnt/$d/load --rw=randwrite "
           "--ioengine=libaio --direct=1 --bs=16k --size=16m --iodepth=16 --time_based "
           "--runtime=600 > /dev/null 2>&1 &) ; done; sleep 3; ls -la /mnt/*/load")
    vm.send("reboot -f")
    vm.wait_ready()
    vm.run("modprobe xfs")
    mount(vm)
    verify(vm)
    umount(vm)


def test_reset():
    """A reset of the machine with reads and writes in flight; all is there."""
    vm = guest()
    name = block(vm, 2)
    vm.run(f"(fio --name=load --filename=/dev/{name} --rw=randrw --ioengine=libaio --direct=1 "
           "--bs=4k --offset=40m --size=16m --iodepth=32 --numjobs=2 --time_based "
           "--runtime=600 > /dev/null 2>&1 &) ; sleep 3")
    vm.qmp("system_reset")
    vm.wait_ready()
    name = block(vm, 2)
    fio(vm, "raw", f"/dev/{name}", RAW + " --verify_only", 600)


def test_stop_cont():
    """QMP stop and cont under load: every request is done, once."""
    vm = guest()
    name = block(vm, 2)
    command = (f"{FIO} --name=load --filename=/dev/{name} --rw=randwrite --bs=4k --iodepth=32 "
               "--offset=40m --size=8m --numjobs=2 --offset_increment=8m --do_verify=1 "
               "--verify_backlog=128 --loops=2")
    vm.send(command)
    time.sleep(4)
    for _ in range(5):
        vm.qmp("stop")
        time.sleep(1)
        expect("state", vm.qmp("query-status")["status"], "paused")
        vm.qmp("cont")
        time.sleep(2)
    status, output = vm.finish(command, 600)
    expect("fio's status", (status, output if status else ""), (0, ""))


def test_rebind():
    """The driver is unbound from its disk under load and bound again."""
    vm = guest()
    name = block(vm, 2)
    device = vm.run(f"basename $(readlink -f /sys/block/{name}/device)")
    # Its requests fail once the driver has gone; nothing may hang.
    vm.run(f"(fio --name=load --filename=/dev/{name} --rw=randread --ioengine=libaio --direct=1 "
           "--bs=4k --iodepth=32 --time_based --runtime=600 > /dev/null 2>&1 &) ; sleep 2")
    drivers = "/sys/bus/virtio/drivers/virtio_blk"
    for _ in range(3):
        vm.run(f"echo {device} > {drivers}/unbind")
        expect("disk after unbind", vm.run(f"ls /sys/bus/virtio/devices/{device} | grep -c block",
                                           check=False)[1], "0")
        vm.run(f"echo {device} > {drivers}/bind")
    end_load(vm)
    name = block(vm, 2)
    fio(vm, "raw", f"/dev/{name}", RAW + " --verify_only", 600)


def test_unplug():
    """The disk is unplugged under load and plugged in again."""
    vm = guest()
    name = block(vm, 2)
    vm.run(f"(fio --name=load --filename=/dev/{name} --rw=randread --ioengine=libaio --direct=1 "
           "--bs=4k --iodepth=32 --time_based --runtime=600 > /dev/null 2>&1 &) ; sleep 2")
    for _ in range(2):
        seen = len(vm.events)
        vm.qmp("device_del", id="disk2")
        vm.wait_event("DEVICE_DELETED", 120, seen)
        expect("disks left", vm.run("ls -d /sys/block/vd* | wc -l"), "2")
        arguments = dict(part.split("=") for part in RIG.device(2).split(",")[1:])
        arguments["num-queues"] = int(arguments["num-queues"])
        vm.qmp("device_add", driver=RIG.options.device, **arguments)
        vm.run("i=0; until grep -qx vhost-blk-2 /sys/block/vd*/serial; do "
               "i=$((i + 1)); [ $i -lt 200 ] || exit 1; sleep 0.1; done")
    end_load(vm)
    fio(vm, "raw", f"/dev/{block(vm, 2)}", RAW + " --verify_only", 600)


def test_after():
    """After all that both filesystems are whole and hold what was written."""
    vm = guest()
    vm.run("modprobe xfs")
    mount(vm)
    verify(vm)
    umount(vm)
    vm.run(f"e2fsck -fn /dev/{block(vm, 0)}", 300)
    vm.shut_down()


def test_host_fsck():
    """The host's fsck finds both filesystems clean."""
    RIG.guest.kill()
    for disk in RIG.disks:
        sh("blockdev", "--flushbufs", disk.path)
    say(sh("e2fsck", "-fn", RIG.disks[0].path, timeout=300))
    sh("xfs_repair", "-n", RIG.disks[1].path, timeout=300)


def test_host_bytes():
    """The host reads, with O_DIRECT, the very bytes that the guest wrote."""
    RIG.guest.kill()
    for number, (place, options) in enumerate((("ext4", "ro,noload"), ("xfs", "ro,norecovery"))):
        folder = os.path.join("/run", place)
        os.makedirs(folder, exist_ok=True)
        sh("mount", "-t", place, "-o", options, RIG.disks[number].path, folder)
        try:
            with open(f"{folder}/sums", encoding="ascii") as file:
                sums = [line.split() for line in file]
            if len(sums) != 7:
                raise AssertionError(f"{place}: {len(sums)} checksums, expected 7")
            for digest, name in sums:
                found = sh("sh", "-c", f"dd if={folder}/{name} bs=64k iflag=direct status=none "
                           "| sha256sum", timeout=300).split()[0]
                expect(f"{place} {name}", found, digest)
        finally:
            sh("umount", folder)
    sh("sh", "-c", f"{FIO} --name=raw --filename={RIG.disks[2].path} {RAW} --verify_only",
       timeout=300)


TESTS = [test_found, test_raw, test_queues, test_ext4, test_xfs, test_reboot, test_reset,
         test_stop_cont, test_rebind, test_unplug, test_after, test_host_fsck, test_host_bytes]


def explain():
    """Print what is known of the guests."""
    life.LIFE.explain()
    RIG.explain()


def again(error):
    """Whether a test is to be run again; its guest is ended then, and the test starts it."""
    if not isinstance(error, GuestReset) or not error.is_unexplained():
        return False
    error.guest.kill()
    if error.guest is life.LIFE.guest:
        # As it found them: the test may have made one larger, or a snapshot.
        life.LIFE.close()
    return True


def main():
    """Run the tests."""
    global RIG
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--module", help="vhost-blk.ko; none is loaded without it")
    parser.add_argument("--qemu", required=True, help="QEMU's program")
    parser.add_argument("--kernel", required=True, help="the guest's kernel")
    parser.add_argument("--initrd", required=True, help="the guest's initramfs")
    parser.add_argument("--work", required=True, help="a folder for sockets and logs")
    parser.add_argument("--device", default="vhost-blk-pci",
                        help="the device under test (virtio-blk-pci tests the tests)")
    parser.add_argument("--boot-disk", help="an image that boots a guest")
    ktap.add_options(parser)
    options = parser.parse_args()
    if options.module:
        sh("modprobe", "vhost")
        sh("insmod", options.module)
    for tests in (devices, discard, life, migration, viommu, zoned):
        tests.OPTIONS = options
    tests = (TESTS if options.device == "virtio-blk-pci"
             else (devices.TESTS + discard.TESTS + zoned.TESTS + viommu.TESTS + life.TESTS + migration.TESTS
                   + TESTS))
    RIG = Rig(options)
    try:
        return ktap.run(tests, options, explain, again)
    finally:
        migration.close()
        life.LIFE.close()
        RIG.close()


if __name__ == "__main__":
    sys.exit(main())
