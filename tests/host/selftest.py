#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Tests of the module without a guest; runs in the host as root. Prints KTAP."""

import argparse
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time

import backends
import cgroups
import conformance
import ktap
from disks import Brd, Delay, Ext4, HalfBad, Loop, NullBlk, ScsiDebug, settle, sh, write
from ktap import Log, Test, expect, say

NODE = "/dev/vhost-blk"
OPTIONS = None
PARAMETERS = ()


def loaded():
    """Whether the module is loaded."""
    return os.path.isdir("/sys/module/vhost_blk")


def load(*parameters):
    """Load the module, and what it needs, unless it is loaded with these parameters."""
    global PARAMETERS
    if loaded() and parameters != PARAMETERS:
        sh("rmmod", "vhost_blk")
    PARAMETERS = parameters
    if not loaded():
        sh("modprobe", "vhost")
        sh("insmod", OPTIONS.module, *parameters)
        settle(30)


def test_modinfo():
    """modinfo shows licence, description, version, parameters, and the kernel."""
    text = sh("modinfo", OPTIONS.module)
    say(text)
    fields = dict(re.split(r":\s*", line, maxsplit=1) for line in text.splitlines())
    for name in ("license", "description", "version", "parm", "vermagic"):
        if not fields.get(name):
            raise AssertionError(f"no {name}")
    expect("licence", fields["license"].split()[0], "GPL")
    expect("kernel", fields["vermagic"].split()[0], os.uname().release)
    if "max_virtqueues" not in text:
        raise AssertionError("no parameter max_virtqueues")


def test_load():
    """insmod prints one line, and the device node appears."""
    load()
    mode = os.stat(NODE).st_mode
    if not stat.S_ISCHR(mode):
        raise AssertionError(f"{NODE} is no character device")
    if stat.S_IMODE(mode) & 0o007:
        raise AssertionError(f"{NODE} is open to all: mode {stat.S_IMODE(mode):o}")


def test_busy():
    """rmmod is refused while the device is open, and the device still works."""
    load()
    with open(NODE, "r+b", buffering=0):
        done = subprocess.run(["rmmod", "vhost_blk"], capture_output=True, text=True, check=False)
        if not done.returncode or not loaded():
            raise AssertionError("rmmod succeeded with the device open")
        say(done.stderr)
    with open(NODE, "r+b", buffering=0):
        pass


def test_unload():
    """rmmod prints one line, and the device node goes."""
    sh("rmmod", "vhost_blk")
    settle(30)
    if os.path.exists(NODE):
        raise AssertionError(f"{NODE} is still there")


def test_reload():
    """The module is loaded and unloaded 10 times."""
    for _ in range(10):
        load()
        with open(NODE, "r+b", buffering=0):
            pass
        sh("rmmod", "vhost_blk")


def selftest():
    """The programs of the ioctl interface and of known defects."""
    load()
    with Brd() as disk, Delay(NullBlk(size=16, discard=1), 600, 600) as slow, \
            HalfBad(NullBlk(size=16)) as bad, Ext4(NullBlk()) as folder:
        ktap.program(OPTIONS.selftest, "--yes-destroy-data", "--disk", disk.path,
                     "--slow-disk", slow.path, "--bad-disk", bad.path, "--folder", folder.path)


class Zoned(NullBlk):
    """A zoned disk as the programs want it."""

    def __init__(self, **disk):
        super().__init__(zoned=1, zone_size=4, zone_capacity=3, zone_nr_conv=3, zone_max_open=3,
                         zone_max_active=5, **disk)


def zoned(**disk):
    """A test of zoned disks; with zone_append_max_sectors=0 the block layer does the appends."""
    def run():
        load()
        with Brd() as other, Zoned(**disk) as zoned_disk:
            ktap.program(OPTIONS.selftest, "--yes-destroy-data", "--disk", other.path,
                         "--zoned-disk", zoned_disk.path, "--only=zones.",
                         "--only=dirty_log.zones")
            ktap.program(OPTIONS.tool, "exercise", "--ktap", "--disk", zoned_disk.path)
    return run


def rotating():
    """A zoned disk for which the block layer queues writes."""
    load()
    with Brd() as other, Zoned(irqmode=2, rotational=1) as zoned_disk:
        ktap.program(OPTIONS.selftest, "--yes-destroy-data", "--disk", other.path,
                     "--zoned-disk", zoned_disk.path, "--only=zones.queued")


def later(*only, parameters=()):
    """A test on a disk that completes in an interrupt."""
    def run():
        load(*parameters)
        with NullBlk(irqmode=2, nsec=50000) as disk:
            ktap.program(OPTIONS.selftest, "--yes-destroy-data", "--disk", disk.path, *only)
    return run


def placement(*only, parameters=()):
    """A test of rings, memory and eventfds in unusual places."""
    def run():
        load(*parameters)
        with NullBlk(irqmode=2, nsec=50000) as disk, \
                Delay(NullBlk(size=16), 600, 600) as slow, Ext4(NullBlk()) as folder:
            ktap.program(OPTIONS.selftest, "--yes-destroy-data", "--disk", disk.path,
                         "--slow-disk", slow.path, "--folder", folder.path,
                         *(f"--only=placement.{name}" for name in only or [""]))
    return run


def dirty_log():
    """The dirty log switched on and off, of requests that complete without a worker."""
    load()
    with NullBlk(irqmode=2, nsec=50000) as disk, Delay(NullBlk(size=16), 600, 600) as slow:
        ktap.program(OPTIONS.selftest, "--yes-destroy-data", "--disk", disk.path,
                     "--slow-disk", slow.path, "--only=dirty_log.drained",
                     "--only=dirty_log.coalesced", "--only=dirty_log.switched")


def polled():
    """Requests, starts and stops, with workers that poll."""
    load()
    with NullBlk(irqmode=2, nsec=50000) as disk:
        ktap.program(OPTIONS.selftest, "--yes-destroy-data", "--disk", disk.path, POLL,
                     "--only=request.", "--only=life.")


def kicks(*parameters):
    """A test of kicks, by whom and whatever comes next, with those parameters."""
    def run():
        load(*parameters)
        with Brd() as disk, ScsiDebug("max_queue=1", size=16) as narrow, \
                Delay(NullBlk(size=16), 600, 600) as slow:
            narrow.set("ndelay", 900_000_000)
            write(f"/sys/block/{os.path.basename(narrow.path)}/queue/max_sectors_kb", 64)
            try:
                ktap.program(OPTIONS.selftest, "--yes-destroy-data", "--disk", disk.path,
                             "--narrow-disk", narrow.path, "--slow-disk", slow.path, "--only=kicks.")
            finally:
                narrow.set("delay", 0)
    return run


def wakeups():
    """At depth 1 the worker is not woken to submit a request, unless the module is told so."""
    # With data its driver may sleep, and the worker does all.
    with NullBlk(memory_backed=0) as disk:
        for parameters, woken in ((WORKER, True), ((), False)):
            load(*parameters)
            text = sh(OPTIONS.tool, "bench", "--path", "vhost-blk", "--disk", disk.path, "--rw",
                      "randread", "--bs", "4096", "--iodepth", "1", "--count", "2000", "--warmup",
                      "100", "--json")
            result = json.loads(text[text.index("{"):])
            each = sum(result["context_switches"]["server"].values())
            say(f"{' '.join(parameters) or 'as loaded'}: {each} switches for a request")
            expect("woken for a request", each > 0.5, woken)


def merged():
    """Requests are merged: small sequential ones, and with a scheduler others that are close to each other."""
    load()
    with NullBlk(memory_backed=0) as disk:
        queue = f"/sys/block/{os.path.basename(disk.path)}"
        for scheduler, part, *load_ in (("none", 2, "--rw", "read"),
                                        ("mq-deadline", 8, "--rw", "randread", "--range", "256k")):
            write(f"{queue}/queue/scheduler", scheduler)
            before = reads_and_merges(queue)
            sh(OPTIONS.tool, "bench", "--path", "vhost-blk", "--disk", disk.path, *load_, "--bs", "4096",
               "--iodepth", "32", "--count", "4000")
            reads, merges = (now - then for now, then in zip(reads_and_merges(queue), before))
            say(f"{scheduler}: of {reads + merges} requests {merges} were merged with others")
            expect("requests", reads + merges >= 4000, True)
            expect(f"one in {part} merged", merges * part > reads + merges, True)


def reads_and_merges(queue):
    """How many reads a disk has done, and how many more were merged with those."""
    with open(f"{queue}/stat", encoding="ascii") as file:
        fields = file.read().split()
    return int(fields[0]), int(fields[1])


def stays_pinned():
    """Starts and stops, rings that move, and the dirty log, with memory that stays pinned."""
    load()
    with NullBlk(irqmode=2, nsec=50000) as disk, Delay(NullBlk(size=16), 600, 600) as slow:
        ktap.program(OPTIONS.selftest, "--yes-destroy-data", "--disk", disk.path, "--slow-disk",
                     slow.path, PIN, "--only=life.", "--only=placement.rings_moved",
                     "--only=dirty_log.")


def exercise(make, *arguments, parameters=()):
    """A test of `vhost-blk exercise` on a disk that `make` makes."""
    def run():
        load(*parameters)
        with make() as disk:
            ktap.program(OPTIONS.tool, "exercise", "--disk", disk.path, "--ktap", *arguments)
    return run


def specification():
    """The statements of the virtio specification, here and in qemu-storage-daemon"""
    load()
    conformance.test(OPTIONS.tool)


# All by the worker, and one of both, without a kick for several requests.
WORKER = ("direct_submission=0", "direct_completion=0")
DIRECT_SUBMISSION = ("direct_completion=0", "coalesce_kicks=0")
DIRECT_COMPLETION = ("direct_submission=0",)
# The longest there is; what an emulated host's worker waits for often takes longer.
POLL = "--poll-us=1000"
WRITE = ("--write", "--yes-destroy-data", "--no-restore", "--write-size=8")
TASK = (*WRITE, "--worker-mode=task")
RANGES = ("--only=zeroes", "--only=discard", "--only=erase", "--only=ranges")
KTHREAD = (*WRITE, "--worker-mode=kthread")
# Each page of a request waits for the program to translate it: megabytes take long on a machine with other work.
IOTLB = ("--iotlb", "--invalidate-ms=20", "--timeout=120")
PIN = "--pin-memory"


def pins():
    """Pages pinned and not released, of the whole host."""
    # What each processor has counted by itself so far is in no sum before this.
    with open("/proc/sys/vm/stat_refresh", encoding="ascii") as file:
        file.read()
    with open("/proc/vmstat", encoding="ascii") as file:
        values = dict(line.split() for line in file)
    return (int(values.get("nr_foll_pin_acquired", 0))
            - int(values.get("nr_foll_pin_released", 0)))


def test_read_only():
    """exercise, reading only, on a read-only disk."""
    load()
    with Loop() as disk:
        sh("dd", "if=/dev/urandom", f"of={disk.path}", "bs=1M", "count=16", "status=none")
        sh("blockdev", "--setro", disk.path)
        try:
            ktap.program(OPTIONS.tool, "exercise", "--disk", disk.path, "--ktap")
        finally:
            # It would stay so for whoever gets the loop device next.
            sh("blockdev", "--setrw", disk.path)


def stop_in_flight(*parameters):
    """A test that stops and releases the device with requests in flight."""
    def run():
        load(*parameters)
        # Each request is in flight long enough; what compares reads the same slow disk.
        with Delay(NullBlk(), 10, 10) as disk:
            ktap.program(OPTIONS.tool, "exercise", "--disk", disk.path, "--ktap", *WRITE,
                         "--only=stop", "--timeout=60")
    return run


def stop_polled():
    """Stop and release with requests in flight, while workers poll."""
    load()
    with NullBlk(irqmode=2, nsec=200000) as disk:
        ktap.program(OPTIONS.tool, "exercise", "--disk", disk.path, "--ktap", *WRITE,
                     "--only=stop", "--timeout=60", POLL)


def killed(*arguments, make=lambda: Delay(NullBlk(), 1000, 1000)):
    """A test that kills a program whose requests are in flight."""
    def run():
        load()
        before = pins()
        with make() as disk:
            for delay in (0.5, 1.0, 1.5, 2.0):
                process = subprocess.Popen(
                    [OPTIONS.tool, "exercise", "--disk", disk.path, "--ktap", *WRITE, *arguments],
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                time.sleep(delay)
                process.send_signal(signal.SIGKILL)
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired as error:
                    raise AssertionError("it cannot be killed:\n" + ktap.stacks(process.pid)
                                         ) from error
            time.sleep(2)
        expect("pages pinned and not released", pins() - before, 0)
        with open(NODE, "r+b", buffering=0):
            pass
    return run


def test_pins():
    """No page is left pinned and no reference left on the module."""
    expect("pages pinned and not released", pins() - OPTIONS.pins, 0)
    sh("rmmod", "vhost_blk")


def test_dmesg():
    """The host's kernel log is clean from boot to end."""
    trouble = Log(mark=False).trouble()
    if trouble:
        raise AssertionError("\n".join(trouble))


LOADED = Test("the module is loaded for what follows", load, prints=1)
LOADED_AGAIN = Test("the module is loaded again, to have the worker do it all", lambda: load(*WORKER), prints=2)
LAST = [
    Test("no page is left pinned, and the module can go", test_pins, prints=1),
    test_dmesg,
]

# Each has a host of its own.
SUITES = {
    "interface": [
        test_modinfo,
        Test("insmod prints one line, and the device node appears", test_load, prints=1),
        test_busy,
        Test("rmmod prints one line, and the device node goes", test_unload, prints=1),
        Test("the module is loaded and unloaded 10 times", test_reload, prints=20),
        LOADED,
        Test("the ioctl interface, and known defects of an earlier driver", selftest),
        Test("zoned disks", zoned(irqmode=2)),
        Test("zoned disks, with appends made of writes", zoned(zone_append_max_sectors=0), long=True),
        Test("a zoned disk that rotates", rotating),
        specification,
        Test("kicks", kicks()),
        Test("wake-ups of the worker at depth 1", wakeups),
        merged,
        Test("requests, starts and stops, on a disk that completes in an interrupt",
             later("--only=request.", "--only=life.")),
        Test("rings, memory and eventfds moved, on a disk that completes in an interrupt", placement()),
        Test("the dirty log switched on and off, on a disk that completes in an interrupt", dirty_log),
        Test("requests, starts and stops, with workers that poll", polled, long=True),
        ktap.test(stays_pinned, long=True),
        LOADED_AGAIN,
        Test("kicks, handled by the worker", kicks(*WORKER)),
        Test("requests, all by the worker", later("--only=request.", parameters=WORKER)),
        Test("rings, memory and eventfds moved, all by the worker", placement(parameters=WORKER),
             long=True),
        *LAST,
    ],
    "disks": [
        LOADED,
        Test("exercise: null_blk irqmode=0", exercise(NullBlk, *TASK)),
        Test("exercise: null_blk irqmode=1, completed in a softirq, kthread workers",
             exercise(lambda: NullBlk(irqmode=1, queues=1), *KTHREAD), long=True),
        Test("exercise: null_blk irqmode=2, a worker for each queue",
             exercise(lambda: NullBlk(irqmode=2), *TASK, "--workers=per-queue")),
        Test("exercise: brd", exercise(Brd, *TASK)),
        Test("discards and zeroes: null_blk irqmode=2",
             exercise(lambda: NullBlk(irqmode=2, discard=1), *TASK, *RANGES)),
        Test("discards and zeroes: scsi_debug, small pieces",
             exercise(lambda: ScsiDebug("lbpu=1", "unmap_max_blocks=64",
                                        "lbpws=1", "write_same_length=32"), *TASK, *RANGES)),
        Test("exercise: loop, kthread workers", exercise(Loop, *KTHREAD)),
        Test("exercise: loop, 4096-byte blocks, kthread workers",
             exercise(lambda: Loop(block_size=4096), *KTHREAD), long=True),
        Test("exercise: loop, rings of 1024", exercise(Loop, *TASK, "--queue-size=1024"), long=True),
        Test("exercise: scsi_debug", exercise(ScsiDebug, *TASK), long=True),
        Test("exercise: scsi_debug, 4096-byte blocks",
             exercise(lambda: ScsiDebug(block_size=4096), *TASK)),
        Test("exercise: null_blk irqmode=2, through a device IOTLB that loses translations",
             exercise(lambda: NullBlk(irqmode=2), *TASK, *IOTLB), long=True),
        test_read_only,
        *backends.TESTS,
        *cgroups.TESTS,
        Test("Stop and release with requests in flight, dm-delay of 10 ms", stop_in_flight()),
        Test("killed with requests in flight: nothing hangs or leaks", killed("--worker-mode=task")),
        Test("killed with requests in flight, kthread workers", killed("--worker-mode=kthread"), long=True),
        Test("exercise: null_blk irqmode=2, a worker that polls",
             exercise(lambda: NullBlk(irqmode=2), *TASK, POLL)),
        Test("exercise: loop, a polling worker for each queue",
             exercise(Loop, *TASK, "--workers=per-queue", POLL), long=True),
        Test("Stop and release with requests in flight, while workers poll", stop_polled),
        Test("killed with requests in flight, while workers poll",
             killed(POLL, make=lambda: NullBlk(irqmode=2, nsec=100000))),
        Test("exercise: null_blk irqmode=2, memory that stays pinned",
             exercise(lambda: NullBlk(irqmode=2), *TASK, PIN)),
        Test("killed with requests in flight, and memory that stays pinned",
             killed(PIN, make=lambda: NullBlk(irqmode=2, nsec=100000))),
        Test("stop and restart through a device IOTLB, for which the worker is needed",
             exercise(lambda: NullBlk(irqmode=2), *TASK, *IOTLB, "--only=stop", "--only=read")),
        LOADED_AGAIN,
        Test("exercise: null_blk irqmode=1, all by the worker",
             exercise(lambda: NullBlk(irqmode=1, queues=1), *TASK, parameters=WORKER), long=True),
        Test("exercise: null_blk irqmode=2, all by the worker",
             exercise(lambda: NullBlk(irqmode=2), *TASK, parameters=WORKER)),
        Test("exercise: brd, all by the worker", exercise(Brd, *TASK, parameters=WORKER), long=True),
        Test("exercise: loop, all by kthread workers", exercise(Loop, *KTHREAD, parameters=WORKER),
             long=True),
        Test("exercise: null_blk irqmode=2, memory that stays pinned, all by the worker",
             exercise(lambda: NullBlk(irqmode=2), *TASK, PIN, parameters=WORKER), long=True),
        Test("Stop and release with requests in flight, all by the worker",
             stop_in_flight(*WORKER), long=True),
        Test("exercise: null_blk irqmode=2, all by a worker that polls",
             exercise(lambda: NullBlk(irqmode=2), *TASK, POLL, parameters=WORKER), long=True),
        Test("exercise: brd, submitted where kicks are made, completed by the worker",
             exercise(Brd, *TASK, parameters=DIRECT_SUBMISSION)),
        Test("exercise: scsi_debug, submitted by the worker, completed where the disk does",
             exercise(ScsiDebug, *TASK, parameters=DIRECT_COMPLETION)),
        *LAST,
    ],
}


def main():
    """Run the tests."""
    global OPTIONS
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--module", required=True, help="vhost-blk.ko")
    parser.add_argument("--tool", required=True, help="the program vhost-blk")
    parser.add_argument("--selftest", required=True, help="the program selftest")
    parser.add_argument("--suite", required=True, choices=SUITES,
                        help="interface: what programs ask of the module, mostly by the program selftest; disks: "
                        "requests on disks of all kinds, and what becomes of them")
    ktap.add_options(parser)
    OPTIONS = parser.parse_args()
    OPTIONS.pins = pins()
    for module in (backends, cgroups):
        module.OPTIONS, module.load = OPTIONS, load
    return ktap.run(SUITES[OPTIONS.suite], OPTIONS)


if __name__ == "__main__":
    sys.exit(main())
