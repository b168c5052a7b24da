# SPDX-License-Identifier: GPL-2.0
"""Tests of QEMU's device: what it refuses and why, its options, booting."""

import os
import re
import subprocess

from disks import Brd, Ext4, Image, NullBlk, allocated, settle, sh
from ktap import Test, say
from life import check_grown
from vm import Guest, QmpError

OPTIONS = None


def qemu(*args, user=None, expect=None):
    """Start QEMU without a guest; it must fail and say what `expect` says."""
    command = [OPTIONS.qemu, "-nodefaults", "-no-user-config", "-display", "none", "-S",
               "-machine", "pc", "-accel", "tcg", "-m", "64", *args]
    if user:
        command = ["setpriv", f"--reuid={user}", "--clear-groups", *command]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace",
                              timeout=60, stdin=subprocess.DEVNULL, check=False)
    except subprocess.TimeoutExpired as error:
        raise AssertionError("QEMU took what it should refuse") from error
    if not done.returncode:
        raise AssertionError("QEMU ended without an error")
    if expect not in done.stderr:
        raise AssertionError(f"QEMU says {done.stderr!r}, expected {expect!r}")


def host_device(path, extra=""):
    """-blockdev for a disk of the host."""
    return ["-blockdev", f"driver=host_device,node-name=node0,filename={path}{extra}"]


DEVICE = ["-device", "vhost-blk-pci,drive=node0"]


def refused(expect, *args, device="vhost-blk-pci,drive=node0"):
    """A test that QEMU refuses a drive; {disk} in args is a disk's path."""
    def run():
        with NullBlk() as disk:
            qemu(*(arg.format(disk=disk.path) for arg in args), "-device", device, expect=expect)
    return run


def test_refuse_format():
    """QEMU refuses a qcow2 image on the disk."""
    with NullBlk() as disk:
        sh(os.path.join(os.path.dirname(OPTIONS.qemu), "qemu-img"), "create", "-f", "qcow2",
           disk.path, "32M")
        qemu("-blockdev", f"driver=qcow2,node-name=node0,file.driver=host_device,"
             f"file.filename={disk.path}", *DEVICE, expect="'node0' is 'qcow2'")


def test_image():
    """A guest with a raw image file on ext4: what it writes, discards that free space, block_resize."""
    with Image(Ext4(NullBlk(size=96)), 40) as disk, \
            Guest("image", OPTIONS.qemu, OPTIONS.work, OPTIONS.kernel, OPTIONS.initrd,
                  ["-blockdev", f"driver=file,node-name=node0,filename={disk.path},cache.direct=on,discard=unmap",
                   *DEVICE]) as vm:
        vm.start()
        name = vm.run("ls /sys/block | grep vd")
        vm.run("fio --ioengine=libaio --direct=1 --verify=crc32c --verify_fatal=1 --minimal --name=image "
               f"--rw=randwrite --bs=4k --iodepth=16 --size=16m --do_verify=1 --filename=/dev/{name}")
        before = allocated(disk.path)
        vm.run(f"blkdiscard /dev/{name}")
        say(f"{before} bytes allocated, {allocated(disk.path)} after the discards")
        if before < 40 << 20 or allocated(disk.path) > 1 << 20:
            raise AssertionError("the discards freed no space")

        # It is all holes now. A full filesystem gives errors, and nothing hangs.
        filler = f"{disk.filesystem.path}/filler"
        for block in ("bs=64k", "bs=1k"):
            sh("dd", "if=/dev/zero", f"of={filler}", block, "oflag=append", "conv=notrunc", check=False)
        sh("sync", "-f", filler)
        write = f"dd if=/dev/zero of=/dev/{name} bs=64k count=16 oflag=direct 2>/dev/null"
        if vm.run(write, check=False)[0] == 0:
            raise AssertionError("there was space left")
        os.unlink(filler)
        vm.run(write)

        vm.qmp("block_resize", node_name="node0", size=48 << 20)
        check_grown(vm, name, disk.path, 48)
        vm.shut_down()
        # All else was discarded.
        sh("cmp", f"--bytes={(48 << 20) - (64 << 10)}", disk.path, "/dev/zero")


def test_refuse_mounted():
    """QEMU refuses a disk that is mounted on the host, unless share-rw=on."""
    with NullBlk(size=32) as disk:
        sh("mkfs.ext4", "-q", disk.path)
        os.makedirs("/run/mounted", exist_ok=True)
        sh("mount", disk.path, "/run/mounted")
        try:
            qemu(*host_device(disk.path), *DEVICE, expect="is mounted or otherwise in use on")
            with Guest("share", OPTIONS.qemu, OPTIONS.work, accel="tcg", memory="64M",
                       args=["-S", *host_device(disk.path), "-device",
                             "vhost-blk-pci,drive=node0,share-rw=on"]) as vm:
                vm.launch()
        finally:
            sh("umount", "/run/mounted")


def test_module_missing():
    """Without the module QEMU says that it is not loaded."""
    sh("rmmod", "vhost_blk")
    try:
        with NullBlk() as disk:
            qemu(*host_device(disk.path), *DEVICE, expect="module is not loaded")
    finally:
        sh("insmod", OPTIONS.module)
        settle(30)


def test_rights():
    """Without the right to open the node QEMU says that."""
    with NullBlk() as disk:
        os.chmod(disk.path, 0o666)
        qemu(*host_device(disk.path), *DEVICE, user=65534, expect="needs the right to read and write")


def qtest(program, *args, **environment):
    """Run one of QEMU's qtests; returns its output. Its failure is an error."""
    folder = os.path.dirname(OPTIONS.qemu)
    environment |= {"QTEST_QEMU_BINARY": OPTIONS.qemu, "QTEST_QEMU_IMG": f"{folder}/qemu-img"}
    done = subprocess.run([f"{folder}/{program}", *args], capture_output=True, text=True, errors="replace",
                          timeout=300, stdin=subprocess.DEVNULL, check=False,
                          env=os.environ | environment)
    if done.returncode:
        raise AssertionError(f"{program}: status {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def passed(output):
    """The tests that a qtest's output says have passed; each must have."""
    results = re.findall(r"^((?:not )?ok) \d+ (\S+)(.*)$", output, re.MULTILINE)
    for status, name, more in results:
        say(f"{status} {name}{more}")
        if status != "ok" or "SKIP" in more:
            raise AssertionError(f"{status} {name}{more}")
    return {name for _, name, _ in results}


def test_qtest():
    """QEMU's own tests of virtio-blk pass on vhost-blk-pci."""
    # As large as those tests expect.
    with NullBlk(size=64, discard=1) as disk, NullBlk(size=64, zoned=1, zone_size=4) as zoned:
        where = {"QTEST_VHOST_BLK_DISK": disk.path, "QTEST_VHOST_BLK_ZONED_DISK": zoned.path}
        names = set(re.findall(r"^# (/\S*/vhost-blk-pci/\S*)$", qtest("qos-test", "-l", **where), re.MULTILINE))
        for name in ("basic", "indirect", "config", "resize", "msix", "idx", "nxvirtq", "hotplug",
                     "multiqueue", "zoned", "zoned-legacy"):
            if not any(each.endswith(f"/{name}") for each in names):
                raise AssertionError(f"no {name} among {names}")
        done = passed(qtest("qos-test", *(word for name in sorted(names) for word in ("-p", name)), **where))
        if done != names:
            raise AssertionError(f"{names - done} did not run")


def test_monitor():
    """Block jobs and a second user are refused while the device is there."""
    with NullBlk() as disk, NullBlk() as other, \
            Guest("monitor", OPTIONS.qemu, OPTIONS.work, accel="tcg", memory="64M",
                  args=["-S", *host_device(disk.path),
                        "-blockdev", f"driver=host_device,node-name=other,filename={other.path}",
                        "-device", "vhost-blk-pci,drive=node0,id=disk0"]) as vm:
        vm.launch()

        def refuse(command, **arguments):
            try:
                vm.qmp(command, **arguments)
            except QmpError:
                return
            raise AssertionError(f"QEMU took {command}")

        refuse("blockdev-mirror", device="node0", target="other", sync="full", job_id="job")
        refuse("blockdev-backup", device="node0", target="other", sync="full", job_id="job")
        refuse("blockdev-del", node_name="node0")
        refuse("device_add", driver="virtio-blk-pci", drive="node0", id="second")
        refuse("device_add", driver="vhost-blk-pci", drive="node0", id="second")
        if vm.qmp("query-status")["running"]:
            raise AssertionError("it runs")


def check_locked(vm, least):
    """Check that QEMU has so many KiB of locked memory, and not much more."""
    with open(f"/proc/{vm.process.pid}/status", encoding="ascii") as file:
        locked = int(re.search(r"^VmLck:\s*(\d+)", file.read(), re.MULTILINE).group(1))
    if not least <= locked <= least * 1.1:
        raise AssertionError(f"QEMU has {locked} KiB of locked memory, not {least}")


def test_options():
    """A guest with a disk for each option: read-only, one queue, legacy, vhostfd, workers, polls, pinned."""
    disks = [NullBlk(), NullBlk(), NullBlk(), NullBlk(irqmode=1), NullBlk(block_size=4096),
             NullBlk(irqmode=2)]
    vhost = os.open("/dev/vhost-blk", os.O_RDWR)
    choices = ["", "num-queues=1,disable-modern=on",
               "worker_per_virtqueue=on,poll-us=100,write-cache=off",
               f"vhostfd={vhost},num-queues=4,queue-size=1024,write-cache=on",
               "disable-legacy=on,queue-size=16", "pin-memory=on,config-wce=off"]
    args = []
    for number, (disk, choice) in enumerate(zip(disks, choices)):
        extra = ",read-only=on" if number == 0 else ""
        args += ["-blockdev", f"driver=host_device,node-name=n{number},filename={disk.path}{extra}",
                 "-device", f"vhost-blk-pci,drive=n{number},serial=option-{number}"
                            + (f",{choice}" if choice else "")]
    sh("sh", "-c", f"head -c 1M /dev/urandom | dd of={disks[0].path} oflag=direct bs=64k "
       "iflag=fullblock status=none")
    wanted = sh("sh", "-c", f"dd if={disks[0].path} iflag=direct bs=64k count=16 status=none "
                "| sha256sum").split()[0]
    try:
        with Guest("options", OPTIONS.qemu, OPTIONS.work, OPTIONS.kernel, OPTIONS.initrd,
                   args, pass_fds=(vhost,)) as vm:
            vm.start()
            names = [vm.block(f"option-{number}")
                     for number in range(len(disks))]

            def expect(what, command, value):
                found = vm.run(command, check=False)[1]
                if found != value:
                    raise AssertionError(f"{what}: {found!r}, expected {value!r}")

            expect("read-only", f"cat /sys/block/{names[0]}/ro", "1")
            expect("data of the read-only disk", f"dd if=/dev/{names[0]} bs=64k count=16 "
                   "iflag=direct 2>/dev/null | sha256sum | cut -d' ' -f1", wanted)
            expect("writing to it", f"dd if=/dev/zero of=/dev/{names[0]} bs=4k count=1 "
                   "oflag=direct 2>/dev/null && echo written", "")
            expect("one queue", f"ls /sys/block/{names[1]}/mq | wc -l", "1")
            # None of the disks has one.
            for number, mode in ((1, "through"), (2, "through"), (3, "back"), (4, "through"), (5, "back")):
                expect(f"write cache with {choices[number]}",
                       f"cat /sys/block/{names[number]}/cache_type", f"write {mode}")
            expect("block size", f"cat /sys/block/{names[4]}/queue/logical_block_size", "4096")
            check_locked(vm, 512 << 10)
            for name in names[1:]:
                vm.run("fio --name=x --ioengine=libaio --direct=1 --verify=crc32c --rw=randwrite "
                       f"--bs=16k --iodepth=16 --size=2m --filename=/dev/{name} --fsync=16 "
                       "--do_verify=1 --verify_fatal=1 --minimal")
            # The guest may change the cache's mode where it could at first.
            vm.run(f"echo 'write through' > /sys/block/{names[3]}/cache_type")
            expect("cache mode", f"cat /sys/block/{names[3]}/cache_type", "write through")
            vm.run(f"dd if=/dev/zero of=/dev/{names[3]} bs=4k count=16 oflag=direct")
            vm.run(f"device=$(readlink -f /sys/block/{names[5]}/device) && "
                   "echo ${device##*/} > /sys/bus/virtio/drivers/virtio_blk/unbind")
            check_locked(vm, 0)
            vm.shut_down()
    finally:
        os.close(vhost)
        for disk in disks:
            disk.close()


def test_boot():
    """The firmware boots a guest from a disk: syslinux, kernel, initramfs."""
    size = os.path.getsize(OPTIONS.boot_disk)
    with Brd(size=(size >> 20) + 1) as disk:
        sh("dd", f"if={OPTIONS.boot_disk}", f"of={disk.path}", "bs=1M", "oflag=direct")
        wanted = sh("sha256sum", OPTIONS.boot_disk).split()[0]
        with Guest("boot", OPTIONS.qemu, OPTIONS.work, args=[
                *host_device(disk.path),
                "-device", "vhost-blk-pci,drive=node0,bootindex=0,serial=boot"]) as vm:
            vm.start(360)
            found = vm.run(f"head -c {size} /dev/vda | sha256sum").split()[0]
            if found != wanted:
                raise AssertionError("the disk holds other data than what was booted from")
            vm.shut_down()


TESTS = [
    test_refuse_format,
    Test("QEMU refuses a filter over the disk", refused(
        "must be a 'host_device'", "-object", "throttle-group,id=group", "-blockdev",
        "driver=throttle,node-name=node0,throttle-group=group,file.driver=host_device,"
        "file.filename={disk}")),
    Test("QEMU refuses I/O throttling", refused(
        "I/O throttling", "-drive",
        "if=none,id=node0,format=raw,file={disk},throttling.iops-total=100")),
    Test("QEMU refuses detect-zeroes", refused(
        "bypasses the block layer", "-drive",
        "if=none,id=node0,format=raw,file={disk},detect-zeroes=on")),
    Test("QEMU refuses a part of a disk (raw with an offset)", refused(
        "has an offset or a size", "-blockdev",
        "driver=raw,node-name=node0,offset=1048576,file.driver=host_device,file.filename={disk}")),
    Test("QEMU refuses an error policy other than report", refused(
        "can only be 'report'", *host_device("{disk}"),
        device="vhost-blk-pci,drive=node0,werror=stop")),
    Test("QEMU refuses more queues than the module has", refused(
        "num-queues must not exceed 64", *host_device("{disk}"),
        device="vhost-blk-pci,drive=node0,num-queues=65")),
    test_refuse_mounted,
    Test(test_module_missing.__doc__.rstrip("."), test_module_missing, prints=2),
    test_rights,
    test_qtest,
    test_image,
    test_monitor,
    test_options,
    test_boot,
]
