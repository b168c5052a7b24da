# SPDX-License-Identifier: GPL-2.0
"""Block devices of the host to test on, each removed when it is closed."""

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
    takes no time either. queues: with more than one, those for polling
    included, a processor completes what it has submitted itself without a
    softirq even with irqmode=1; with one there is none for polling.
    """

    count = 0

    def __init__(self, size=64, block_size=512, irqmode=0, nsec=10000, memory_backed=1,
                 queues=2):
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


class ScsiDebug(Disk):
    """A disk of scsi_debug, of `size` MiB; one at a time."""

    def __init__(self, size=64, block_size=512, delay=0):
        sh("modprobe", "sd_mod")
        sh("modprobe", "scsi_debug", f"dev_size_mb={size}", f"sector_size={block_size}",
           f"delay={delay}", "max_queue=64")
        self.kind = f"scsi_debug blocks={block_size}"
        deadline = time.monotonic() + 30
        pattern = "/sys/bus/pseudo/drivers/scsi_debug/adapter*/host*/target*/*/block/*"
        while not (found := glob.glob(pattern)):
            if time.monotonic() > deadline:
                raise RuntimeError("scsi_debug has no disk")
            time.sleep(0.1)
        self.path = "/dev/" + os.path.basename(found[0])
        self.wait()

    def close(self):
        settle()
        sh("rmmod", "scsi_debug")


class Ext4(Disk):
    """An ext4 filesystem on another disk, which it closes at its end, mounted at `path`."""

    def __init__(self, lower):
        self.lower = lower
        self.kind = f"ext4 on {lower.kind}"
        self.path = f"/run/ext4-{time.monotonic_ns()}"
        sh("mkfs.ext4", "-q", lower.path)
        os.mkdir(self.path)
        sh("mount", "-t", "ext4", lower.path, self.path)

    def close(self):
        sh("umount", self.path)
        os.rmdir(self.path)
        self.lower.close()


class Mapped(Disk):
    """A device-mapper device over another disk, which it closes at its end.

    table: makes the table from the other disk's path and its size in sectors.
    """

    def __init__(self, what, lower, table):
        self.lower = lower
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
        self.lower.close()


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
