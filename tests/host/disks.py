# SPDX-License-Identifier: GPL-2.0
"""Block devices of the host to test on, each removed when it is closed."""

import errno
import glob
import os
import subprocess
import time


def sh(*command, timeout=120, check=True):
    """Run a program; returns its output. Its failure is an error."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace",
                          timeout=timeout, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: status {done.returncode}\n"
                           f"{done.stdout}{done.stderr}".strip())
    return done.stdout


def settle(seconds=100):
    """Wait until udev has looked at what changed."""
    sh("udevadm", "settle", f"--timeout={seconds}")


def write(path, value):
    """Write a value to a file of sysfs or configfs."""
    with open(path, "w", encoding="ascii") as file:
        file.write(str(value))


def allocated(path):
    """Bytes that a file takes."""
    return os.stat(path).st_blocks * 512


class Disk:
    """A block device: its path, and what kind of device it is in words."""

    path = None
    kind = None

    def close(self):
        """Remove the device."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def wait(self):
        """Wait until the node is there and udev has looked at it."""
        deadline = time.monotonic() + 30
        while not os.path.exists(self.path):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.path} did not appear")
            time.sleep(0.1)
        settle()


class NullBlk(Disk):
    """null_blk, keeping its data in memory.

    size: MiB. irqmode: 0 completes within submit_bio, 1 in a softirq, 2 from
    a timer after `nsec` nanoseconds. memory_backed=0: it keeps nothing, which
    takes no time either. cache: MiB of volatile write cache; the disk has no
    FUA then, so that the kernel flushes after each write with it. queues: with more than one, those for polling
    included, a processor completes what it has submitted itself without a
    softirq even with irqmode=1; with one there is none for polling.
    discard: whether it can; memory_backed only. more: other attributes, such as
    those of zones.
    """

    count = 0

    def __init__(self, size=64, block_size=512, irqmode=0, nsec=10000, memory_backed=1,
                 queues=2, cache=0, discard=0, **more):
        if not os.path.isdir("/sys/kernel/config/nullb"):
            sh("modprobe", "null_blk", "nr_devices=0")
            if not os.path.ismount("/sys/kernel/config"):
                sh("mount", "-t", "configfs", "configfs", "/sys/kernel/config")
        NullBlk.count += 1
        name = f"test{NullBlk.count}"
        self.folder = f"/sys/kernel/config/nullb/{name}"
        self.kind = f"null_blk irqmode={irqmode} blocks={block_size}"
        os.mkdir(self.folder)
        write(f"{self.folder}/size", size)
        write(f"{self.folder}/blocksize", block_size)
        write(f"{self.folder}/irqmode", irqmode)
        write(f"{self.folder}/completion_nsec", nsec)
        write(f"{self.folder}/memory_backed", memory_backed)
        write(f"{self.folder}/submit_queues", queues)
        if cache:
            write(f"{self.folder}/cache_size", cache)
            write(f"{self.folder}/fua", 0)
        write(f"{self.folder}/discard", discard)
        for attribute, value in more.items():
            write(f"{self.folder}/{attribute}", value)
        if queues == 1:
            write(f"{self.folder}/poll_queues", 0)
        write(f"{self.folder}/power", 1)
        self.path = f"/dev/{name}"
        if not os.path.exists(f"/sys/block/{name}"):
            with open(f"{self.folder}/index", encoding="ascii") as file:
                self.path = f"/dev/nullb{file.read().strip()}"
        self.wait()

    def close(self):
        write(f"{self.folder}/power", 0)
        os.rmdir(self.folder)


class Brd(Disk):
    """A RAM disk of the brd module, of `size` MiB; one at a time."""

    def __init__(self, size=64):
        sh("modprobe", "brd", "rd_nr=1", f"rd_size={size * 1024}")
        self.path = "/dev/ram0"
        self.kind = "brd"
        self.wait()

    def close(self):
        settle()
        sh("rmmod", "brd")


class Loop(Disk):
    """A loop device on a file of `size` MiB in memory."""

    def __init__(self, size=64, block_size=512):
        self.file = f"/dev/shm/loop-{os.getpid()}-{time.monotonic_ns()}"
        with open(self.file, "wb") as file:
            file.truncate(size << 20)
        sh("modprobe", "loop")
        self.path = sh("losetup", "--find", "--show", f"--sector-size={block_size}",
                       self.file).strip()
        self.kind = f"loop blocks={block_size}"
        self.wait()

    def close(self):
        sh("losetup", "--detach", self.path)
        os.unlink(self.file)


class Partition(Disk):
    """A partition in the middle of another disk, which it closes at its end."""

    START = 2056

    def __init__(self, lower):
        self.lower = lower
        self.kind = f"partition of {lower.kind}"
        sectors = int(sh("blockdev", "--getsz", lower.path)) - 2 * self.START
        sh("sh", "-c", f"echo start={self.START},size={sectors} | sfdisk --quiet {lower.path}")
        self.path = f"{lower.path}p1"
        self.wait()

    def close(self):
        self.lower.close()


class Raid1(Disk):
    """An md array of two disks, which it closes at its end; one at a time."""

    def __init__(self, *lower):
        self.lower = lower
        self.kind = f"md raid1 on {lower[0].kind}"
        sh("modprobe", "raid1")
        write("/sys/module/md_mod/parameters/new_array", "md_vhostblk")
        self.folder = "/sys/block/md_vhostblk/md"
        kilobytes = min(int(sh("blockdev", "--getsz", disk.path)) for disk in lower) // 2
        for name, value in (("metadata_version", "none"), ("level", "raid1"),
                            ("raid_disks", len(lower)), ("component_size", kilobytes)):
            write(f"{self.folder}/{name}", value)
        for number, disk in enumerate(lower):
            name = os.path.basename(disk.path)
            with open(f"/sys/block/{name}/dev", encoding="ascii") as file:
                write(f"{self.folder}/new_dev", file.read().strip())
            write(f"{self.folder}/dev-{name}/slot", number)
        # All of it is the same on both: zeroes.
        write(f"{self.folder}/resync_start", "none")
        write(f"{self.folder}/array_state", "active")
        self.path = "/dev/md_vhostblk"
        self.wait()

    def close(self):
        settle()
        write(f"{self.folder}/array_state", "clear")
        for disk in self.lower:
            disk.close()


class Nbd(Disk):
    """A network block device of `size` MiB that qemu-nbd serves; one at a time."""

    def __init__(self, size=64):
        self.file = f"/dev/shm/nbd-{os.getpid()}"
        with open(self.file, "wb") as file:
            file.truncate(size << 20)
        sh("modprobe", "nbd", "nbds_max=1")
        self.path = "/dev/nbd0"
        self.kind = "nbd"
        # It stays where it is, and would keep our pipes open.
        sh("sh", "-c", f"qemu-nbd --fork --format=raw --connect={self.path} {self.file} "
           ">/run/qemu-nbd.log 2>&1 || { cat /run/qemu-nbd.log; exit 1; }")
        self.wait()

    def close(self):
        settle()
        sh("qemu-nbd", "--disconnect", self.path)
        settle()
        sh("rmmod", "nbd")
        os.unlink(self.file)


class Nvme(Disk):
    """An NVMe disk whose target is this host, too, over TCP or nvme-loop.

    Its target has another disk, which it closes at its end.
    """

    CONFIG = "/sys/kernel/config/nvmet"
    PORTS = {"tcp": {"trtype": "tcp", "adrfam": "ipv4", "traddr": "127.0.0.1", "trsvcid": "4420"},
             "loop": {"trtype": "loop"}}

    def __init__(self, lower, transport="tcp"):
        self.lower = lower
        self.kind = f"NVMe over {transport} on {lower.kind}"
        sh("modprobe", f"nvmet-{transport}" if transport == "tcp" else "nvme-loop")
        sh("modprobe", f"nvme-{transport}")
        sh("ip", "link", "set", "lo", "up")
        self.name = f"nqn.2026-11.test:{transport}-{time.monotonic_ns()}"
        self.subsystem = f"{self.CONFIG}/subsystems/{self.name}"
        self.port = f"{self.CONFIG}/ports/1"
        os.mkdir(self.subsystem)
        write(f"{self.subsystem}/attr_allow_any_host", 1)
        os.mkdir(f"{self.subsystem}/namespaces/1")
        write(f"{self.subsystem}/namespaces/1/device_path", lower.path)
        write(f"{self.subsystem}/namespaces/1/enable", 1)
        os.mkdir(self.port)
        port = self.PORTS[transport]
        for key, value in port.items():
            write(f"{self.port}/addr_{key}", value)
        os.symlink(self.subsystem, f"{self.port}/subsystems/{self.name}")
        options = [f"transport={transport}", f"nqn={self.name}"]
        options += [f"{key}={port[key]}" for key in ("traddr", "trsvcid") if key in port]
        #: Shell commands that connect it, and print its path then, and that take it away.
        self.connect = (
            f"echo '{','.join(options)}' >/dev/nvme-fabrics && i=0 && "
            f"until n=$(grep -slx '{self.name}' /sys/block/nvme[0-9]n1/device/subsysnqn); do "
            "i=$((i + 1)); [ $i -lt 300 ] || exit 1; sleep 0.1; done; "
            "udevadm settle; echo /dev/$(echo $n | cut -d/ -f4)")
        self.disconnect = (f"for n in $(grep -lx '{self.name}' /sys/class/nvme/nvme*/subsysnqn); "
                           "do echo 1 >${n%/*}/delete_controller; done")
        self.path = sh("sh", "-c", self.connect).strip()
        self.wait()

    def close(self):
        settle()
        sh("sh", "-c", self.disconnect)
        os.unlink(f"{self.port}/subsystems/{self.name}")
        os.rmdir(self.port)
        write(f"{self.subsystem}/namespaces/1/enable", 0)
        os.rmdir(f"{self.subsystem}/namespaces/1")
        os.rmdir(self.subsystem)
        settle()
        self.lower.close()


class ScsiDebug(Disk):
    """A disk of scsi_debug, of `size` MiB; one at a time. parameters: more of the module's."""

    def __init__(self, *parameters, size=64, block_size=512, delay=0):
        sh("modprobe", "sd_mod")
        sh("modprobe", "scsi_debug", f"dev_size_mb={size}", f"sector_size={block_size}",
           f"delay={delay}", "max_queue=64", *parameters)
        self.kind = f"scsi_debug blocks={block_size}"
        deadline = time.monotonic() + 30
        pattern = "/sys/bus/pseudo/drivers/scsi_debug/adapter*/host*/target*/*/block/*"
        while not (found := glob.glob(pattern)):
            if time.monotonic() > deadline:
                raise RuntimeError("scsi_debug has no disk")
            time.sleep(0.1)
        self.path = "/dev/" + os.path.basename(found[0])
        self.wait()

    @staticmethod
    def set(name, value):
        """Set one of the driver's attributes, as soon as no request is in flight."""
        deadline = time.monotonic() + 30
        while True:
            try:
                write(f"/sys/bus/pseudo/drivers/scsi_debug/{name}", value)
                return
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
            time.sleep(0.1)

    def close(self):
        settle()
        sh("rmmod", "scsi_debug")


class Filesystem(Disk):
    """A filesystem on another disk, which it closes at its end, mounted at `path`."""

    def __init__(self, lower, kind):
        self.lower = lower
        self.kind = f"{kind} on {lower.kind}"
        self.path = f"/run/{kind}-{time.monotonic_ns()}"
        sh(f"mkfs.{kind}", "-q", lower.path)
        os.mkdir(self.path)
        sh("mount", "-t", kind, lower.path, self.path)

    def close(self):
        sh("umount", self.path)
        os.rmdir(self.path)
        self.lower.close()


class Ext4(Filesystem):
    """An ext4 filesystem."""

    def __init__(self, lower):
        super().__init__(lower, "ext4")


class Xfs(Filesystem):
    """An XFS filesystem; its disk has 300 MiB or more."""

    def __init__(self, lower):
        super().__init__(lower, "xfs")


class Image(Disk):
    """A raw image file of `size` MiB on a filesystem, which it closes at its end. sparse: it is all holes."""

    def __init__(self, filesystem, size=40, sparse=False):
        self.filesystem = filesystem
        self.path = f"{filesystem.path}/image"
        self.kind = f"image on {filesystem.kind}"
        with open(self.path, "wb") as file:
            if sparse:
                file.truncate(size << 20)
            for _ in range(0 if sparse else size):
                file.write(bytes(1 << 20))
            os.fsync(file)

    def close(self):
        self.filesystem.close()


class Mapped(Disk):
    """A device-mapper device over another disk, which it closes at its end.

    table: makes the table from the other disk's path and its size in sectors.
    shared: the other disk has more such devices on it, and is not closed.
    """

    def __init__(self, what, lower, table, shared=False):
        self.lower = lower
        self.shared = shared
        self.name = f"{what}-{time.monotonic_ns()}"
        self.kind = f"dm-{what} on {lower.kind}"
        sectors = int(sh("blockdev", "--getsz", lower.path))
        # --table takes one line only.
        sh("sh", "-c", 'printf "%s\n" "$1" | dmsetup create "$0"', self.name,
           table(lower.path, sectors))
        self.path = f"/dev/mapper/{self.name}"
        self.wait()

    def close(self):
        settle()
        sh("dmsetup", "remove", self.name)
        if not self.shared:
            self.lower.close()


class Linear(Mapped):
    """A dm-linear device, as LVM makes them, with its two halves exchanged."""

    def __init__(self, lower):
        super().__init__("linear", lower, lambda path, sectors:
                         f"0 {sectors // 2} linear {path} {sectors - sectors // 2}\n"
                         f"{sectors // 2} {sectors - sectors // 2} linear {path} 0")


class Crypt(Mapped):
    """A dm-crypt device."""

    def __init__(self, lower):
        super().__init__("crypt", lower, lambda path, sectors:
                         f"0 {sectors} crypt aes-xts-plain64 {'5a' * 31}{'a5' * 33} 0 {path} 0")


class Thin(Mapped):
    """A dm-thin device of `size` MiB, of a pool of its own on two other disks, with room for a snapshot of
    all of it."""

    def __init__(self, size=64):
        room = 2 * size + 16
        self.data = NullBlk(size=room)
        # The pool has as much room as its table says, however large the disk is.
        self.pool = Mapped("pool", NullBlk(size=8), lambda path, _:
                           f"0 {room << 11} thin-pool {path} {self.data.path} 128 0")
        sh("dmsetup", "message", self.pool.name, "0", "create_thin 0")
        super().__init__("thin", self.pool, lambda path, sectors: f"0 {sectors} thin {path} 0")

    def close(self):
        super().close()
        self.data.close()


class Delay(Mapped):
    """A dm-delay device. read, write: delays in milliseconds."""

    def __init__(self, lower, read=200, write=200):
        super().__init__("delay", lower, lambda path, sectors:
                         f"0 {sectors} delay {path} 0 {read} {path} 0 {write}")


class HalfBad(Mapped):
    """A device whose second half fails every request.

    udev is told to leave it alone: what it looks for at a disk's end makes the
    kernel log errors.
    """

    RULE = ('ACTION!="remove", SUBSYSTEM=="block", ATTR{dm/name}=="error-*", '
            'ENV{DM_UDEV_DISABLE_DISK_RULES_FLAG}="1", '
            'ENV{DM_UDEV_DISABLE_OTHER_RULES_FLAG}="1", OPTIONS:="nowatch"\n')

    def __init__(self, lower):
        os.makedirs("/run/udev/rules.d", exist_ok=True)
        # Between the rules that ask device-mapper and those that look at disks.
        write("/run/udev/rules.d/12-half-bad.rules", self.RULE)
        sh("udevadm", "control", "--reload", check=False)
        super().__init__("error", lower, lambda path, sectors:
                         f"0 {sectors // 2} linear {path} 0\n"
                         f"{sectors // 2} {sectors - sectors // 2} error")
