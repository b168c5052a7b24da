# SPDX-License-Identifier: GPL-2.0
"""What is measured: cells, each a path to a disk under a load, and the sets of
them that bench/run measures. Run by itself it prints their names."""

import argparse
import dataclasses
import fnmatch

KIB, MIB = 1 << 10, 1 << 20

# What a front end can be; EXACT is the tool's, where instructions are counted,
# and STAGES and GUEST_STAGES the tool's and a guest's, where each request's way
# is traced.
EXACT, TOOL, GUEST, FIO = "exact", "tool", "guest", "fio"
STAGES, GUEST_STAGES = "stages", "guest-stages"

# null_blk's ways to complete, by the disk's name: irqmode and nanoseconds.
NULL_BLK = {"null_blk-inline": (0, 0), "null_blk-softirq": (1, 0),
            "null_blk-10us": (2, 10_000), "null_blk-100us": (2, 100_000)}
# What those add by themselves, microseconds.
DISK_TIME = {"null_blk-10us": 10, "null_blk-100us": 100}

FRONT_END = "front-end"
# The guest's memory stays pinned.
PINNED = "vhost-blk/pin-memory"
# The module with other parameters than it has by default, each by the path's name: fast paths off, or on.
WORKER = "vhost-blk/worker"
PARAMETERS = {
    WORKER: ["direct_submission=0", "direct_completion=0"],
    "vhost-blk/direct-submission": ["direct_completion=0"],
    "vhost-blk/direct-completion": ["direct_submission=0"],
    "vhost-blk/kick-for-each": ["coalesce_kicks=0"],
}
# io_uring with its buffers registered, which pins them; and without, so that it pins those of each request.
URING = "host/io_uring"
UNREGISTERED = f"{URING}/unregistered"
# Both with the guest's memory, or the buffers, in pages of 4 KiB.
SMALL_PAGES, URING_SMALL_PAGES = "vhost-blk/small-pages", f"{URING}/small-pages"
EXACT_PATHS = ["vhost-blk", PINNED, WORKER, "vhost-user-blk/nopoll", URING, UNREGISTERED, SMALL_PAGES,
               URING_SMALL_PAGES]
# At this depth the front end's kicks and calls are spread over so many
# requests that they do not count.
FRONT_END_ALONE = 256
TOOL_PATHS_QUICK = ["vhost-blk", "vhost-user-blk", URING]
TOOL_PATHS = ["vhost-blk", "vhost-user-blk", "vhost-user-blk/nopoll", URING]
GUEST_PATHS_QUICK = [
    "vhost-blk",
    "virtio-blk/iothread/io_uring",
    "virtio-blk/iothread/io_uring/nopoll",
    "virtio-blk/iothread/native",
    "virtio-blk/iothread/native/nopoll",
    "virtio-blk/iothread-vq-mapping/io_uring",
    "virtio-blk/no-iothread/ioeventfd-off/io_uring",
    "vhost-scsi/iblock",
]
GUEST_PATHS = GUEST_PATHS_QUICK + ["virtio-blk/no-iothread/io_uring", "vhost-user-blk"]
GUEST_PATHS_SEVERAL = ["vhost-blk", "virtio-blk/iothread/io_uring",
                       "virtio-blk/iothread/io_uring/nopoll", "vhost-scsi/iblock"]
FIO_PATHS = [URING, "host/libaio"]


def size_text(size):
    """A size in bytes as people write it."""
    for unit, letter in ((MIB, "m"), (KIB, "k")):
        if size % unit == 0:
            return f"{size // unit}{letter}"
    return str(size)


@dataclasses.dataclass(frozen=True, order=True)
class Cell:
    """A path to a disk under a load.

    rw: as fio calls it. bs: bytes. vcpus: of the guest, otherwise 0. flush: a
    flush after each write. disks: how many are under load at once.
    """

    frontend: str
    disk: str
    path: str
    rw: str
    bs: int
    iodepth: int
    queues: int = 1
    vcpus: int = 0
    flush: bool = False
    disks: int = 1

    @property
    def load(self):
        """The load's part of the name."""
        text = f"{self.rw}-{size_text(self.bs)}-d{self.iodepth}-q{self.queues}"
        if self.vcpus:
            text += f"-v{self.vcpus}"
        if self.flush:
            text += "-flush"
        if self.disks > 1:
            text += f"-x{self.disks}"
        return text

    @property
    def group(self):
        """The name of what is compared side by side."""
        return f"{self.frontend}/{self.disk}/{self.load}"

    @property
    def name(self):
        """The cell's own name."""
        return f"{self.group}/{self.path}"

    @property
    def tool_path(self):
        """What the tool calls the path."""
        return "io_uring" if self.path.startswith(URING) else self.path.split("/")[0]

    @property
    def in_guest(self):
        """Whether a guest is the front end."""
        return self.frontend in (GUEST, GUEST_STAGES)

    @property
    def traced(self):
        """Whether each request's way is traced."""
        return self.frontend in (STAGES, GUEST_STAGES)

    @property
    def writes(self):
        """Whether anything is written."""
        return self.rw not in ("read", "randread")

    def selected(self, words):
        """Whether one of the words, or of the patterns with *, is in the name."""
        return not words or any(
            fnmatch.fnmatch(self.name, f"*{word}*" if "*" not in word else word)
            for word in words)


def cross(frontend, disk, paths, rws, sizes, depths, **rest):
    """Cells for each of the loads, those to compare next to each other."""
    return [Cell(frontend, disk, path, rw, bs, depth, **rest)
            for rw in rws for bs in sizes for depth in depths for path in paths]


def table_of_2011(paths):
    """Sequential, 512 bytes, depth 1 to 4: what the thread of 2011 measured."""
    return cross(TOOL, "null_blk-inline", paths, ["read", "write"], [512], [1, 2, 3, 4])


def exact():
    """The cells in which instructions are counted, with disks without timers."""
    cells = cross(EXACT, "none", [FRONT_END], ["randread"], [4 * KIB], [1, 32, FRONT_END_ALONE])
    for disk in ("null_blk-inline", "null_blk-softirq"):
        cells += cross(EXACT, disk, EXACT_PATHS, ["randread"], [4 * KIB], [1, 32])
    return cells


def stages():
    """The cells whose requests are traced: the tool's."""
    return [cell for disk in ("null_blk-softirq", *DISK_TIME)
            for cell in cross(STAGES, disk, ["vhost-blk", "vhost-user-blk/nopoll", URING],
                              ["randread"], [4 * KIB], [1])]


def guest_stages():
    """The same of a guest, with one processor, which kicks and is interrupted."""
    return cross(GUEST_STAGES, "null_blk-softirq", GUEST_PATHS, ["randread"], [4 * KIB], [1],
                 queues=1, vcpus=1)


def switches():
    """The module's fast paths, on and off."""
    return [cell for disk in NULL_BLK
            for cell in cross(TOOL, disk, ["vhost-blk", *PARAMETERS], ["randread"], [4 * KIB],
                              [1, 4, 32])]


def quick():
    """The cells that the goals name."""
    cells, rand = [], ["randread", "randwrite"]
    for disk in ("null_blk-inline", "null_blk-softirq"):
        for queues in (1, 2):
            cells += cross(TOOL, disk, TOOL_PATHS, rand, [4 * KIB], [1, 32], queues=queues)
    for disk in DISK_TIME:
        cells += cross(TOOL, disk, TOOL_PATHS_QUICK, rand, [4 * KIB], [1, 32])
    cells += table_of_2011(TOOL_PATHS_QUICK)
    cells += cross(GUEST, "null_blk-softirq", GUEST_PATHS_QUICK, rand,
                   [4 * KIB], [1, 32], queues=2, vcpus=2)
    return cells + stages()


def full():
    """The whole matrix.

    Thinned: other sizes than 4 KiB on two disks only; mixed loads and depth
    128 on one; the disks that are slow by themselves, where all paths are
    close to each other, with fewer loads.
    """
    cells = []
    rand = ["randread", "randwrite"]
    # Every load, on the disk that completes as a real one does.
    disk = "null_blk-softirq"
    cells += cross(TOOL, disk, TOOL_PATHS, rand + ["randrw"], [4 * KIB], [1, 4, 32, 128])
    cells += cross(TOOL, disk, TOOL_PATHS, rand, [64 * KIB, 128 * KIB, MIB], [1, 32])
    for queues in (2, 4):
        cells += cross(TOOL, disk, TOOL_PATHS, rand, [4 * KIB], [1, 32, 128], queues=queues)
    cells += cross(TOOL, disk, TOOL_PATHS, ["randwrite"], [4 * KIB], [1, 32], flush=True)
    cells += table_of_2011(TOOL_PATHS)
    cells += cross(TOOL, "null_blk-inline", TOOL_PATHS, rand, [4 * KIB], [1, 4, 32])
    cells += cross(TOOL, "null_blk-inline", TOOL_PATHS, rand, [4 * KIB], [1, 32], queues=2)
    for disk in ("null_blk-10us", "null_blk-100us"):
        cells += cross(TOOL, disk, TOOL_PATHS, rand, [4 * KIB], [1, 4, 32])
        cells += cross(TOOL, disk, TOOL_PATHS, rand, [4 * KIB], [1, 32], queues=2)
    for disk in ("brd", "loop", "nvme-loop"):
        cells += cross(TOOL, disk, TOOL_PATHS, rand, [4 * KIB, 128 * KIB], [1, 32])
    # The host's own price.
    for disk in list(NULL_BLK) + ["brd", "loop", "nvme-loop"]:
        cells += cross(FIO, disk, FIO_PATHS, rand, [4 * KIB], [1, 32])
    # Guests.
    disk = "null_blk-softirq"
    cells += cross(GUEST, disk, GUEST_PATHS, rand, [4 * KIB], [1, 32], queues=2, vcpus=2)
    cells += cross(GUEST, disk, GUEST_PATHS, ["randrw"], [4 * KIB], [4], queues=2, vcpus=2)
    cells += cross(GUEST, disk, GUEST_PATHS, ["read", "write"], [128 * KIB], [4],
                   queues=2, vcpus=2)
    cells += cross(GUEST, disk, GUEST_PATHS, ["randwrite"], [4 * KIB], [4],
                   queues=2, vcpus=2, flush=True)
    cells += cross(GUEST, disk, GUEST_PATHS, ["read", "write"], [512], [1, 4], queues=2, vcpus=2)
    cells += cross(GUEST, disk, GUEST_PATHS, rand, [4 * KIB], [1, 32], queues=1, vcpus=1)
    cells += cross(GUEST, disk, GUEST_PATHS_SEVERAL, rand, [4 * KIB], [32], queues=2, vcpus=2,
                   disks=3)
    for disk in ("null_blk-100us", "brd"):
        cells += cross(GUEST, disk, GUEST_PATHS, rand, [4 * KIB], [1, 32], queues=2, vcpus=2)
    cells += [cell for cell in switches() if cell not in cells]
    return cells + stages() + guest_stages()


SETS = {"exact": exact, "switches": switches, "quick": quick, "full": full}


def chosen(name, words):
    """The cells of a set with one of the words in their name."""
    return [cell for cell in SETS[name]() if cell.selected(words)]


def main():
    """Print the names of a set's cells."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--only", action="append", default=[])
    options = parser.parse_args()
    for cell in chosen(options.set, options.only):
        print(cell.name)


if __name__ == "__main__":
    main()
