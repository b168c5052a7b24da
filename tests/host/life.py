# SPDX-License-Identifier: GPL-2.0
"""Tests of a guest's life: its disks grow, come and go, and are looked at from all sides."""

import os
import re
import time

from disks import Mapped, NullBlk, Thin, sh
from ktap import expect, say
from vm import Guest, QmpError

OPTIONS = None
VERIFY = ("fio --ioengine=libaio --direct=1 --verify=crc32c --verify_fatal=1 --minimal "
          "--name=load --rw=randwrite --bs=4k --iodepth=16 --do_verify=1 --verify_backlog=64")


class Life:
    """The guest, and its disks by name."""

    # MiB of the disk that grows.
    SMALL, LARGE = 24, 40

    def __init__(self):
        self.disks = {}
        self.guest = None

    def start(self):
        """The guest; it is started for the first test, and again if one broke it."""
        if not self.guest:
            self.disks = {
                "grows": Mapped("grows", NullBlk(size=self.LARGE), lambda path, _:
                                f"0 {self.SMALL << 11} linear {path} 0"),
                "thin": Thin(size=48),
                # Without FUA a write that has to be stable is followed by a flush, which counts.
                "cached": NullBlk(size=24, cache=8),
            }
            args = []
            for name, disk in self.disks.items():
                args += ["-blockdev", f"driver=host_device,node-name={name},filename={disk.path}",
                         "-device", f"vhost-blk-pci,drive={name},id=dev-{name},serial={name},"
                         f"num-queues=2,queue-size={1024 if name == 'cached' else 256}"]
            self.guest = Guest("life", OPTIONS.qemu, OPTIONS.work, OPTIONS.kernel, OPTIONS.initrd,
                               args)
        if self.guest.process is None or self.guest.process.poll() is not None:
            self.guest.start()
        return self.guest

    def explain(self):
        """Print the end of what the guest and QEMU have printed."""
        if self.guest:
            self.guest.explain()

    def close(self):
        """End the guest and remove the disks."""
        if self.guest:
            self.guest.kill()
            self.guest = None
        for disk in self.disks.values():
            disk.close()
        self.disks = {}


LIFE = Life()


def start_load(vm, name, extra):
    """Start fio in the guest, which verifies what it writes to a disk; end_load() waits for it."""
    vm.run(f"rm -f /tmp/load.*; ({VERIFY} --filename=/dev/{vm.block(name)} {extra} "
           "> /tmp/load.out 2>&1; echo $? > /tmp/load.status) & sleep 1; pidof fio")


def end_load(vm):
    """Wait for the end of the load, which must have had no error."""
    vm.until("the load's end", "[ -s /tmp/load.status ]")
    expect("the load's status and output",
           vm.run("cat /tmp/load.status; grep -v '^3;' /tmp/load.out", check=False)[1], "0")


def grow(disk, sectors):
    """Give a device-mapper disk another size."""
    sh("sh", "-c", f"echo 0 {sectors} linear {disk.lower.path} 0 | dmsetup load {disk.name} && "
       f"dmsetup resume {disk.name}")


def check_grown(vm, name, path, size):
    """A guest finds its disk, `path` on the host, grown to `size` MiB, and can write its last bytes."""
    vm.until("the new size", f"grep -qx {size << 11} /sys/block/{name}/size")
    last = f"bs=64k seek={size * 16 - 1}"
    written = vm.run("dd if=/dev/urandom of=/tmp/last bs=64k count=1 2>/dev/null && "
                     f"dd if=/tmp/last of=/dev/{name} {last} oflag=direct 2>/dev/null && "
                     "sha256sum < /tmp/last").split()[0]
    found = sh("sh", "-c", f"dd if={path} {last.replace('seek', 'skip')} iflag=direct "
               "status=none | sha256sum").split()[0]
    expect("the disk's last bytes on the host", found, written)


def test_resize():
    """block_resize: the guest sees a grown disk without a reboot, and writes its new part."""
    vm = LIFE.start()
    disk = LIFE.disks["grows"]
    name = vm.block("grows")
    expect("size", vm.run(f"cat /sys/block/{name}/size"), str(LIFE.SMALL << 11))
    start_load(vm, "grows", "--size=8m --time_based --runtime=8")
    try:
        vm.qmp("block_resize", node_name="grows", size=LIFE.LARGE << 20)
    except QmpError as error:
        say(error)
    else:
        raise AssertionError("QEMU made the disk larger than it is")
    grow(disk, LIFE.LARGE << 11)
    vm.qmp("block_resize", node_name="grows", size=LIFE.LARGE << 20)
    check_grown(vm, name, disk.path, LIFE.LARGE)
    end_load(vm)


def test_hotplug():
    """Disks are plugged in and out by QMP under load, with no error on another."""
    vm = LIFE.start()
    start_load(vm, "cached", "--size=16m --time_based --runtime=20")
    before = vm.run("ls -d /sys/block/vd*")
    with NullBlk(size=16) as disk:
        for queues in (1, 2, 4):
            vm.qmp("blockdev-add", driver="host_device", node_name="plugged", filename=disk.path)
            vm.qmp("device_add", driver="vhost-blk-pci", drive="plugged", id="dev-plugged",
                   serial="plugged", num_queues=queues)
            vm.until("the new disk", "grep -qx plugged /sys/block/vd*/serial")
            name = vm.block("plugged")
            vm.run(f"{VERIFY} --filename=/dev/{name} --size=1m > /dev/null")
            # It has requests in flight when it goes; those fail.
            vm.run(f"(fio --name=doomed --filename=/dev/{name} --rw=randread --ioengine=libaio "
                   "--direct=1 --bs=4k --iodepth=32 --time_based --runtime=600 > /dev/null 2>&1 &) "
                   "; sleep 1")
            seen = len(vm.events)
            vm.qmp("device_del", id="dev-plugged")
            vm.wait_event("DEVICE_DELETED", 60, seen)
            vm.qmp("blockdev-del", node_name="plugged")
            vm.run("pkill -9 -f name=doomed; true")
            expect("disks", vm.run("ls -d /sys/block/vd*"), before)
    end_load(vm)


def test_reopen():
    """blockdev-reopen: a raw node goes on if it stays whole; if it gets a size the device stops and says why."""
    vm = LIFE.start()
    with NullBlk(size=16) as disk:
        vm.qmp("blockdev-add", driver="raw", node_name="raw",
               file={"driver": "host_device", "node-name": "below", "filename": disk.path})
        vm.qmp("device_add", driver="vhost-blk-pci", drive="raw", id="dev-raw", serial="raw")
        vm.until("the new disk", "grep -qx raw /sys/block/vd*/serial")
        name = vm.block("raw")
        whole = {"driver": "raw", "node-name": "raw", "file": "below", "offset": 0}
        vm.qmp("blockdev-reopen", options=[whole])
        vm.run(f"{VERIFY} --filename=/dev/{name} --size=1m > /dev/null")
        expect("what QEMU says", "cannot go on" in vm.qemu_log(), False)
        vm.qmp("blockdev-reopen", options=[whole | {"size": 8 << 20}])
        found = re.findall("cannot go on: (.*)", vm.qemu_log())
        expect("what QEMU says", found,
               ["vhost-blk bypasses the block layer, but block node 'raw' has an offset or a size"])
        seen = len(vm.events)
        vm.qmp("device_del", id="dev-raw")
        vm.wait_event("DEVICE_DELETED", 60, seen)
        vm.qmp("blockdev-del", node_name="raw")


def statistics(disk):
    """What the host's kernel has counted of a disk, as in Documentation/block/stat.rst."""
    with open(f"/sys/block/{os.path.basename(disk.path)}/stat", encoding="ascii") as file:
        return [int(word) for word in file.read().split()]


# Places in that.
READS, WRITES, FLUSHES = 0, 4, 15


def test_suspend():
    """A guest is suspended to memory under load and resumes, with no error."""
    with NullBlk(size=24, cache=8) as disk:
        args = ["-global", "PIIX4_PM.disable_s3=0",
                "-blockdev", f"driver=host_device,node-name=node0,filename={disk.path},cache.direct=on",
                "-device", "vhost-blk-pci,drive=node0,serial=sleeps,num-queues=2"]
        with Guest("suspend", OPTIONS.qemu, OPTIONS.work, OPTIONS.kernel, OPTIONS.initrd, args) as vm:
            vm.start()
            start_load(vm, "sleeps", "--size=4m --time_based --runtime=8")
            seen = len(vm.events)
            # The port that takes commands does not outlive the sleep: the guest says on its console how it went.
            vm.send("(echo mem > /sys/power/state && until [ -s /tmp/load.status ]; do sleep 0.1; done; "
                    "echo load: $(cat /tmp/load.status; grep -v '^3;' /tmp/load.out) > /dev/ttyS0; "
                    "sleep 1; poweroff -f) &")
            vm.wait_event("SUSPEND", since=seen)
            asleep = statistics(disk)[WRITES]
            time.sleep(1)
            expect("writes while it sleeps", statistics(disk)[WRITES] - asleep, 0)
            vm.qmp("system_wakeup")
            vm.wait_event("WAKEUP", since=seen)
            vm.wait_exit(120)
            expect("the load's status and output", re.findall("load: (.*)", vm.console()), ["0"])
            expect("writes since it woke up", statistics(disk)[WRITES] > asleep, True)


def test_snapshot():
    """A snapshot of the disk, taken on the host under load, is consistent after a crash."""
    vm = LIFE.start()
    disk = LIFE.disks["thin"]
    name = vm.block("thin")
    vm.run(f"mkfs.ext4 -q -E lazy_itable_init=0 /dev/{name} && mkdir -p /mnt/thin && "
           f"mount -t ext4 /dev/{name} /mnt/thin && cd /mnt/thin && for i in 1 2 3 4; do "
           "dd if=/dev/urandom of=file$i bs=61k count=9 2>/dev/null; done && "
           "sha256sum file* > sums && sync")
    vm.run("rm -f /tmp/stop; (cd /mnt/thin; fio --name=load --filename=load --rw=randwrite "
           "--ioengine=libaio --direct=1 --bs=4k --size=8m --iodepth=16 --fsync=8 --time_based "
           "--runtime=600 > /dev/null 2>&1 & i=0; while [ ! -e /tmp/stop ] && mkdir d$i && "
           "cp file1 d$i/ && mv d$i/file1 d$i/f; do i=$((i + 1)); "
           "[ $i -lt 40 ] || { rm -r d*; i=0; }; done > /dev/null 2>&1 &) ; sleep 3")
    pool = disk.pool
    sh("dmsetup", "suspend", disk.name)
    try:
        sh("dmsetup", "message", pool.name, "0", "create_snap 1 0")
    finally:
        sh("dmsetup", "resume", disk.name)
    # The guest goes on meanwhile.
    time.sleep(1)
    vm.run("touch /tmp/stop; cd /mnt/thin && echo after > after && sync")
    copy = f"snapshot-{time.monotonic_ns()}"
    sh("dmsetup", "create", copy, "--table",
       f"0 {sh('blockdev', '--getsz', disk.path).strip()} thin {pool.path} 1")
    try:
        path, folder = f"/dev/mapper/{copy}", "/run/snapshot"
        if "needs_recovery" not in sh("dumpe2fs", "-h", path):
            raise AssertionError("the snapshot's journal is empty: it was not taken under load")
        os.makedirs(folder, exist_ok=True)
        sh("mount", "-t", "ext4", path, folder)
        try:
            sh("sh", "-c", f"cd {folder} && sha256sum -c sums")
            expect("a file of later", os.path.exists(f"{folder}/after"), False)
            expect("the load's file", os.path.exists(f"{folder}/load"), True)
        finally:
            sh("umount", folder)
        say(sh("e2fsck", "-fn", path))
    finally:
        sh("udevadm", "settle")
        sh("dmsetup", "remove", copy)
    vm.run("killall -9 fio")
    vm.until("unmounting", "umount /mnt/thin 2>/dev/null")
    vm.run(f"e2fsck -fn /dev/{name}")


def test_monitor():
    """query-block, info block, query-blockstats and x-query-virtio-* show the disks as they are."""
    vm = LIFE.start()
    shown = {each["qdev"].split("/")[3]: each for each in vm.qmp("query-block") if "qdev" in each}
    counted = {each["qdev"].split("/")[3]: each for each in vm.qmp("query-blockstats")
               if "qdev" in each}
    text = vm.qmp("human-monitor-command", command_line="info block")
    say(text)
    paths = {each["path"].split("/")[3]: each for each in vm.qmp("x-query-virtio")}
    say(paths)
    for name, disk in LIFE.disks.items():
        device = f"dev-{name}"
        image = shown[device]["inserted"]
        expect(f"{name}: file", image["file"], disk.path)
        expect(f"{name}: node", image["node-name"], name)
        expect(f"{name}: read-only", image["ro"], False)
        if disk.path not in text:
            raise AssertionError(f"info block does not show {disk.path}")
        # The requests do not pass through QEMU: docs/install.md says where they are counted.
        expect(f"{name}: requests that QEMU counts", counted[device]["stats"]["rd_operations"], 0)
        path = paths[device]["path"]
        status = vm.qmp("x-query-virtio-status", path=path)
        expect(f"{name}: started", status["vhost-started"], True)
        expect(f"{name}: virtqueues", (status["num-vqs"], status["vhost-dev"]["nvqs"]), (2, 2))
        features = str(status["guest-features"])
        for feature in ("VIRTIO_BLK_F_FLUSH", "VIRTIO_BLK_F_CONFIG_WCE", "VIRTIO_BLK_F_MQ"):
            if feature not in features:
                raise AssertionError(f"{name}: {feature} is not among {features}")
        queue = vm.qmp("x-query-virtio-queue-status", path=path, queue=1)
        expect(f"{name}: ring size", queue["vring-num"], 1024 if name == "cached" else 256)
        ring = vm.qmp("x-query-virtio-vhost-queue-status", path=path, queue=1)
        expect(f"{name}: ring size", ring["num"], queue["vring-num"])
        element = vm.qmp("x-query-virtio-queue-element", path=path, queue=0, index=0)
        expect(f"{name}: descriptors in a chain", len(element["descs"]) > 0, True)


def test_cache_type():
    """The guest switches its write cache, and the next write is stable, or need not be."""
    vm = LIFE.start()
    disk = LIFE.disks["cached"]
    name = vm.block("cached")
    for mode, flushes in (("write back", 0), ("write through", 16), ("write back", 0)):
        vm.run(f"echo {mode} > /sys/block/{name}/cache_type")
        expect("mode", vm.run(f"cat /sys/block/{name}/cache_type"), mode)
        before = statistics(disk)
        vm.run(f"dd if=/dev/zero of=/dev/{name} bs=4k count=16 oflag=direct 2>/dev/null")
        after = statistics(disk)
        expect(f"{mode}: writes", after[WRITES] - before[WRITES], 16)
        expect(f"{mode}: flushes", after[FLUSHES] - before[FLUSHES], flushes)


def test_flush():
    """QMP stop flushes the disk's write cache, in which the guest has left what it wrote."""
    vm = LIFE.start()
    disk = LIFE.disks["cached"]
    name = vm.block("cached")
    vm.run(f"echo write back > /sys/block/{name}/cache_type")
    vm.run(f"dd if=/dev/zero of=/dev/{name} bs=4k count=16 oflag=direct 2>/dev/null")
    before = statistics(disk)
    vm.qmp("stop")
    after = statistics(disk)
    vm.qmp("cont")
    expect("flushes of the stop", after[FLUSHES] - before[FLUSHES], 1)


def test_large():
    """A request of the guest may be as large as its ring: 1 MiB of scattered pages in one."""
    vm = LIFE.start()
    for name, segments, requests in (("cached", 1022, 16), ("grows", 254, 32)):
        where = f"/sys/block/{vm.block(name)}"
        expect(f"{name}: segments", vm.run(f"cat {where}/queue/max_segments"), str(segments))
        size = int(vm.run(f"cat {where}/queue/max_sectors_kb"))
        if size < 1024:
            raise AssertionError(f"{name}: requests of {size} KiB")
        found = vm.run(f"before=$(awk '{{print $1}}' {where}/stat); "
                       f"dd if=/dev/{os.path.basename(where)} of=/dev/null bs=1M count=16 "
                       f"iflag=direct 2>/dev/null; after=$(awk '{{print $1}}' {where}/stat); "
                       "echo $((after - before))")
        say(f"{name}: {found} requests for 16 reads of 1 MiB")
        if not 16 <= int(found) <= requests:
            raise AssertionError(f"{name}: {found} requests for 16 reads of 1 MiB")
    vm.run("fio --ioengine=libaio --direct=1 --verify=crc32c --verify_fatal=1 --minimal --name=big "
           "--rw=write --bs=4m --iodepth=2 --size=8m --do_verify=1 "
           f"--filename=/dev/{vm.block('cached')}")


def test_read_only():
    """A disk becomes read-only on the host: the guest's writes fail until it is writable again."""
    vm = LIFE.start()
    disk = LIFE.disks["cached"]
    name = vm.block("cached")
    write = f"dd if=/dev/zero of=/dev/{name} bs=4k count=1 oflag=direct 2>/dev/null"
    vm.run(write)
    sh("blockdev", "--setro", disk.path)
    try:
        if not vm.run(write, check=False)[0]:
            raise AssertionError("a write to a read-only disk succeeds")
        vm.run(f"dd if=/dev/{name} of=/dev/null bs=4k count=64 iflag=direct 2>/dev/null")
    finally:
        sh("blockdev", "--setrw", disk.path)
    vm.run(write)


def test_end():
    """The guest of these tests ends well."""
    LIFE.start().shut_down()
    LIFE.close()


TESTS = [test_monitor, test_large, test_cache_type, test_flush, test_read_only, test_resize, test_hotplug,
         test_reopen, test_snapshot, test_end, test_suspend]
