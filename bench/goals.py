# SPDX-License-Identifier: GPL-2.0
"""What the measurements must show, checked against a results.json."""

from cells import DISK_TIME, PINNED, SMALL_PAGES, STAGES, UNREGISTERED, URING, URING_SMALL_PAGES
from spread import Spread, group_of

REACHED, MISSED = "reached", "missed"
SERVED = ("vhost-user-blk", "vhost-user-blk/nopoll")
EXACT_DISKS = ("null_blk-inline", "null_blk-softirq")


class Goal:
    """A goal, what was measured for it, and where it was missed.

    missed: (name of what is compared, path that was better or "", figure), of the
    worst first.
    """

    def __init__(self, text, measured, missed):
        self.text, self.measured, self.missed = text, measured, missed
        self.verdict = MISSED if missed else REACHED


class Cells:
    """Cells to be found by what they are."""

    def __init__(self, document):
        self.cells = document["cells"]

    def find(self, **want):
        """The cells of which all that is true."""
        return [cell for cell in self.cells
                if all(cell.get(key) == value for key, value in want.items())]

    def groups(self, **want):
        """Those, each with all cells that it is compared with, by path."""
        result = {}
        for cell in self.find(**want):
            result.setdefault(group_of(cell), {})[cell["path"]] = cell
        return {name: paths for name, paths in result.items() if "vhost-blk" in paths}


def worst(text, ratios, limit, at_least):
    """A goal that holds if it holds in each of its cells.

    ratios: (name of the cell, ratio).
    """
    if not ratios:
        return None
    ratios = sorted(ratios, key=lambda each: each[1], reverse=not at_least)
    missed = [(name, "", ratio) for name, ratio in ratios
              if not (ratio >= limit if at_least else ratio <= limit)]
    name, value = ratios[0]
    good = len(ratios) - len(missed)
    return Goal(text, f"{good} of {len(ratios)} cells; the worst: {value:.2f} ({name})", missed)


def exact(cells):
    """Goals in instructions."""
    # vhost-blk, and an io_uring: that which pins as it does, and the best there is.
    pairs = (("vhost-blk", UNREGISTERED, "both pinning for each request"),
             (PINNED, URING, "both with memory that stays pinned"),
             ("vhost-blk", URING, "only io_uring's memory staying pinned"),
             (SMALL_PAGES, URING_SMALL_PAGES, "only io_uring's memory staying pinned, all in pages of 4 KiB"))
    to_served, to_uring = [], {(depth, which): [] for depth in (1, 32) for which in pairs}
    for disk in EXACT_DISKS:
        for depth in (1, 32):
            count = {cell["path"].split("/nopoll")[0]: cell.get("host_insns_less_front_end")
                     for cell in cells.find(frontend="exact", disk=disk, iodepth=depth)
                     if cell.get("host_insns_less_front_end")}
            name = f"{disk}, depth {depth}"
            if count.get("vhost-blk") and count.get("vhost-user-blk"):
                to_served.append((name, count["vhost-blk"] / count["vhost-user-blk"]))
            for which in pairs:
                own, other = which[:2]
                if count.get(own) and count.get(other):
                    to_uring[depth, which].append((name, count[own] / count[other]))
    yield worst("instructions, to vhost-user-blk: at most 0.5", to_served, 0.5, False)
    for depth, limit in ((1, 1.3), (32, 1.0)):
        for which in pairs:
            yield worst(f"instructions, to io_uring at depth {depth}, {which[2]}: at most {limit}",
                        to_uring[depth, which], limit, False)


def best(paths, names, metric, most=True):
    """The best median of some paths, or None."""
    values = [paths[name][metric] for name in names
              if name in paths and paths[name][metric] is not None]
    return (max if most else min)(values) if values else None


def added(traced):
    """The time of a traced request besides the disk's."""
    return sum(time for stage, time in traced["stages_us"].items() if stage != "device")


def tool(cells):
    """Goals with the tool's front end, against the better way to run the daemon."""
    for depth, limit in ((1, 1.3), (32, 1.5)):
        ratios = []
        for rw in ("randread", "randwrite"):
            for name, paths in cells.groups(frontend="tool", rw=rw, bs=4096, iodepth=depth,
                                            flush=False).items():
                other = best(paths, SERVED, "iops_median")
                if other and paths["vhost-blk"]["disk"] in EXACT_DISKS:
                    ratios.append((name, paths["vhost-blk"]["iops_median"] / other))
        yield worst(f"IOPS at depth {depth}, 4 KiB, to vhost-user-blk: at least {limit}", ratios,
                    limit, True)
    ratios = []
    for rw in ("read", "write"):
        for name, paths in cells.groups(frontend="tool", rw=rw, bs=512).items():
            other = best(paths, SERVED, "iops_median")
            if other:
                ratios.append((name, paths["vhost-blk"]["iops_median"] / other))
    yield worst("IOPS in the table of 2011, to vhost-user-blk: at least 1.3", ratios, 1.3, True)
    ratios = []
    for disk, own in DISK_TIME.items():
        for name, paths in cells.groups(frontend="tool", disk=disk, bs=4096, iodepth=1).items():
            other = best(paths, SERVED, "lat_p50_us", False)
            mine = paths["vhost-blk"]["lat_p50_us"]
            if other and mine and other > own:
                ratios.append((name, (mine - own) / (other - own)))
    yield worst("time added to the disk's own, p50, to vhost-user-blk: at most 0.5", ratios, 0.5,
                False)
    # A timer that comes late counts as added there, though it is later the less the host has to do.
    ratios = []
    for disk in DISK_TIME:
        for name, paths in cells.groups(frontend=STAGES, disk=disk).items():
            paths = {path: added(cell) for path, cell in paths.items() if cell.get("stages_us")}
            others = [paths[path] for path in SERVED if path in paths]
            if others and "vhost-blk" in paths:
                ratios.append((name, paths["vhost-blk"] / min(others)))
    yield worst("time of a traced request besides the disk's, to vhost-user-blk (one round): "
                "at most 0.5", ratios, 0.5, False)
    ratios = []
    for name, paths in cells.groups(frontend="tool", bs=4096, iodepth=1).items():
        own = Spread.of(paths["vhost-blk"], "lat_p99_us")
        others = [Spread.of(paths[path], "lat_p99_us") for path in SERVED if path in paths]
        if own and all(others) and others:
            other = min(others, key=lambda each: each.median)
            ratios.append((name, 1.0 if own.overlaps(other) else own.median / other.median))
    yield worst("p99 at depth 1, to vhost-user-blk: at most 1.0 (1.0: within the spread)", ratios,
                1.0, False)


def nowhere_slower(cells, frontend, what, others):
    """No cell with fewer IOPS, beyond the spread."""
    below, within, count = [], 0, 0
    for name, paths in cells.groups(frontend=frontend).items():
        own = Spread.of(paths["vhost-blk"], "iops")
        for path, cell in paths.items():
            spread = Spread.of(cell, "iops")
            if path == "vhost-blk" or not others(path) or not spread or not own:
                continue
            count += 1
            if own.median < spread.median:
                if own.overlaps(spread):
                    within += 1
                else:
                    below.append((name, path, own.median / spread.median))
    if not count:
        return None
    below.sort(key=lambda each: each[2])
    measured = f"{len(below)} of {count} comparisons below, {within} more within the spread"
    if below:
        name, path, ratio = below[0]
        measured += f"; the worst: {ratio:.2f} ({name}/{path})"
    return Goal(what, measured, below)


def guest(cells):
    """Goals in a guest, against the best of QEMU's and vhost-scsi's."""
    cpu, busy, wakeups = [], [], []
    for name, paths in cells.groups(frontend="guest", bs=4096, flush=False).items():
        if paths["vhost-blk"]["iodepth"] not in (1, 32):
            continue
        own = paths["vhost-blk"]
        threads = [path for path in paths if path.startswith("virtio-blk/iothread")]
        other = best(paths, threads, "host_cpu_us_per_req", False)
        if other and own["host_cpu_us_per_req"] is not None:
            cpu.append((name, own["host_cpu_us_per_req"] / other))
        other = best(paths, [path for path in paths if path != "vhost-blk"],
                     "host_busy_us_per_req", False)
        if other and own["host_busy_us_per_req"]:
            busy.append((name, own["host_busy_us_per_req"] / other))
        if own["iodepth"] == 1 and own["wakeups_per_req"] is not None:
            wakeups.append((name, own["wakeups_per_req"]))
    yield worst("guest: CPU of who serves, a vCPU that does it itself apart, to the best "
                "iothread's: at most 0.25", cpu, 0.25, False)
    yield worst("guest: CPU of the host outside of the guest, to the best other path's: below 1.0",
                busy, 1.0, False)
    yield worst("guest: wake-ups of who serves for a request at depth 1: at most 1", wakeups, 1.0,
                False)


def check(document):
    """The goals for which something was measured."""
    cells = Cells(document)
    found = [*exact(cells), *tool(cells),
             nowhere_slower(cells, "tool", "the tool: IOPS nowhere below vhost-user-blk's, beyond "
                            "the spread", lambda path: path.startswith("vhost-user-blk")),
             *guest(cells),
             nowhere_slower(cells, "guest", "guest: IOPS not below any path's, beyond the spread",
                            lambda path: True)]
    return [goal for goal in found if goal]
