# SPDX-License-Identifier: GPL-2.0
"""Tests that a VM's limits and placement hold for the workers of its disks; no guest."""

import contextlib
import json
import os
import re
import signal
import subprocess
import time

from disks import Ext4, Image, Mapped, NullBlk, sh, write
from ktap import Test, say

OPTIONS = None
# Loads the module.
load = None


class Cgroup:
    """A cgroup (v2) below the root, for the time of a test.

    limits: what is written to its files; of a name's underscores the first is a point there.
    """

    ROOT = "/sys/fs/cgroup"
    count = 0

    @classmethod
    def prepare(cls):
        """Have cgroups with all controllers that tests use."""
        if not os.path.exists(f"{cls.ROOT}/cgroup.controllers"):
            sh("mount", "-t", "cgroup2", "cgroup2", cls.ROOT)
        write(f"{cls.ROOT}/cgroup.subtree_control", "+io +cpu +memory +cpuset")

    def __init__(self, **limits):
        self.prepare()
        Cgroup.count += 1
        self.path = f"{self.ROOT}/vhost-blk-{Cgroup.count}"
        os.mkdir(self.path)
        for name, value in limits.items():
            self.write(name.replace("_", ".", 1), value)

    def write(self, name, value):
        """Write one of its files."""
        write(f"{self.path}/{name}", value)

    def read(self, name):
        """Read one of its files."""
        with open(f"{self.path}/{name}", encoding="ascii") as file:
            return file.read()

    def stat(self, name, line=""):
        """Numbers by their names: of a file, or of the line of io.stat that begins so."""
        text = self.read(name)
        if line:
            text = next((each for each in text.splitlines() if each.startswith(line)), "")
            return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", text)}
        return {key: int(value) for key, value in (each.split() for each in text.splitlines())}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        deadline = time.monotonic() + 30
        while True:
            try:
                os.rmdir(self.path)
                return
            except OSError:
                # What was in it may not be gone yet.
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)


def number(disk):
    """A disk's major and minor number."""
    with open(f"/sys/block/{os.path.basename(disk.path)}/dev", encoding="ascii") as file:
        return file.read().strip()


class Bench:
    """`vhost-blk bench` on a disk, random reads, while it runs.

    cgroup: where it runs. prefix: what runs it.
    """

    def __init__(self, disk, *options, depth=8, runtime=3, cgroup=None, prefix=()):
        command = [*prefix, OPTIONS.tool, "bench", "--path=vhost-blk", f"--disk={disk.path}",
                   "--rw=randread", f"--iodepth={depth}", f"--runtime={runtime}", "--timeout=60",
                   "--json", *options]
        if cgroup:
            command = ["sh", "-c", 'echo 0 >"$0/cgroup.procs" && exec "$@"', cgroup.path, *command]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True)

    def result(self, timeout=120):
        """Its figures, when it has ended."""
        out, err = self.process.communicate(timeout=timeout)
        if self.process.returncode:
            raise AssertionError(f"bench: status {self.process.returncode}: {err}")
        return json.loads(out)

    def workers(self, count):
        """The worker threads, by their name; there have to be so many."""
        deadline = time.monotonic() + 30
        while True:
            found = self.named(f"/proc/{self.process.pid}/task")
            if len(found) >= count:
                break
            if self.process.poll() is not None:
                self.result()
            if time.monotonic() > deadline:
                raise AssertionError(f"{len(found)} workers, expected {count}")
            time.sleep(0.1)
        # No more come.
        time.sleep(0.5)
        found = self.named(f"/proc/{self.process.pid}/task")
        if len(found) != count:
            raise AssertionError(f"{len(found)} workers, expected {count}")
        return found

    def named(self, folder):
        """Threads below a folder of /proc that have a worker's name."""
        found = []
        for task in os.listdir(folder):
            with contextlib.suppress(OSError), open(f"{folder}/{task}/comm",
                                                    encoding="ascii", errors="replace") as file:
                if file.read().strip() == f"vhost-{self.process.pid}":
                    found.append(int(task))
        return found

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(60)
        self.process.stdout.close()
        self.process.stderr.close()


def within(what, value, low, high):
    """Fail unless a value is in a range."""
    say(f"{what}: {value:.0f}, from {low:.0f} to {high:.0f} expected")
    if not low <= value <= high:
        raise AssertionError(f"{what}: {value:.0f} is not from {low:.0f} to {high:.0f}")


def io_max(*options, make=NullBlk):
    """A test that io.max limits requests, and io.stat counts them, on a disk or image that `make` makes."""
    def run():
        load()
        with make() as disk:
            lower = disk.filesystem.lower if isinstance(disk, Image) else disk
            with Cgroup() as group, Bench(disk, *options, cgroup=group, runtime=1) as bench:
                free = bench.result()["iops"]
            limit = 200
            within("IOPS without a limit", free, 3 * limit, 1e9)
            with Cgroup(io_max=f"{number(lower)} riops={limit}") as group:
                with Bench(disk, *options, cgroup=group, runtime=3) as bench:
                    result = bench.result()
                counted = group.stat("io.stat", number(lower))
            within("IOPS", result["iops"], 0.7 * limit, 1.2 * limit)
            # What is in flight at the end is in no figure.
            requests = result["requests"]
            within("reads in io.stat", counted["rios"], requests, requests + 64)
            within("bytes in io.stat", counted["rbytes"], 4096 * requests,
                   4096 * counted["rios"])
    return run


def test_io_weight():
    """io.weight divides a disk between two VMs."""
    load()

    def half(place):
        return Mapped("half", disk, lambda path, sectors:
                      f"0 {sectors // 2} linear {path} {place * (sectors // 2)}", shared=True)

    with NullBlk(irqmode=2) as disk, half(0) as first, half(1) as second:
        Cgroup.prepare()
        # The disk's cost model says that it does so many random reads in a second.
        total = 500
        write(f"{Cgroup.ROOT}/io.cost.model", f"{number(disk)} ctrl=user model=linear "
              f"rbps=100000000 rseqiops={total} rrandiops={total} "
              f"wbps=100000000 wseqiops={total} wrandiops={total}")
        write(f"{Cgroup.ROOT}/io.cost.qos", f"{number(disk)} enable=1 ctrl=user rpct=0.00 "
              "rlat=1000000 wpct=0.00 wlat=1000000 min=100.00 max=100.00")
        with Cgroup(io_weight="default 100") as light, Cgroup(io_weight="default 300") as heavy, \
                Bench(first, depth=32, cgroup=light, runtime=5) as one, \
                Bench(second, depth=32, cgroup=heavy, runtime=5) as other:
            few, many = one.result()["iops"], other.result()["iops"]
        say(f"weight 100: {few:.0f} IOPS, weight 300: {many:.0f}")
        within("both", few + many, 0.7 * total, 1.3 * total)
        within("percent of the heavy one", 100 * many / (few + many), 65, 85)


def test_cpu_max():
    """cpu.max limits a worker's time, and cpu.stat counts it."""
    load()
    with NullBlk() as disk, Cgroup(cpu_max="20000 100000") as group:
        begin = time.monotonic()
        with Bench(disk, cgroup=group, runtime=3) as bench:
            result = bench.result()
        elapsed = 1e6 * (time.monotonic() - begin)
        used = group.stat("cpu.stat")
        cpu, requests = result["cpu"], result["requests"]
        ours = requests * (cpu["server_us_per_req"] + cpu["front_end_us_per_req"])
        worker = requests * cpu["server_us_per_req"]
        say(f"{used['nr_throttled']} times throttled; the worker used {worker:.0f} us")
        within("CPU time of the cgroup, us", used["usage_usec"], ours, 0.25 * elapsed)
        if not used["nr_throttled"] or worker < 0.1 * ours:
            raise AssertionError("it was not throttled, or its worker did nothing")


def test_memory():
    """What a device needs in the kernel is charged to the VM's cgroup."""
    load()

    def charged(*options):
        with NullBlk() as disk, Cgroup(memory_max="512M") as group, \
                Bench(disk, *options, cgroup=group, runtime=3) as bench:
            bench.workers(1)
            kernel = group.stat("memory.stat")["kernel"]
            bench.result()
        return kernel

    small = charged("--queues=1", "--queue-size=16")
    large = charged("--queues=16", "--queue-size=1024")
    within("KiB of the kernel's memory", large / 1024, small / 1024 + 512, 1e9)


def test_workers():
    """A device has one worker, or one for each virtqueue, named after the VM's pid."""
    load()
    with NullBlk() as disk:
        for workers, count in (("shared", 1), ("per-queue", 3)):
            with Bench(disk, "--queues=3", f"--workers={workers}", runtime=2) as bench:
                bench.workers(count)
                bench.result()


def allowed(tasks):
    """The processors that tasks may run on, as the kernel prints them."""
    found = set()
    for task in tasks:
        with open(f"/proc/{task}/status", encoding="ascii", errors="replace") as file:
            found.add(re.search(r"Cpus_allowed_list:\s*(\S+)", file.read()).group(1))
    return found


def on_cpu(what, tasks, cpu):
    """Fail unless tasks may run on one processor only."""
    if allowed(tasks) != {str(cpu)}:
        raise AssertionError(f"{what}: {allowed(tasks)}, expected {cpu}")


def test_taskset():
    """taskset of a VM holds for its workers, from its start and while it runs."""
    load()
    with NullBlk() as disk, Bench(disk, "--queues=2", "--workers=per-queue", runtime=3,
                                  prefix=("taskset", "--cpu-list", "1")) as bench:
        workers = bench.workers(2)
        on_cpu("started by taskset", workers, 1)
        sh("taskset", "--all-tasks", "--cpu-list", "--pid", "0", str(bench.process.pid))
        on_cpu("moved by taskset", workers, 0)
        bench.result()


def test_cpuset():
    """A VM's cpuset holds for its workers, and they move with it."""
    load()
    with NullBlk() as disk, Cgroup(cpuset_cpus="1") as group, Cgroup(cpuset_cpus="0") as other, \
            Bench(disk, "--queues=2", "--workers=per-queue", cgroup=group, runtime=4) as bench:
        workers = bench.workers(2)
        on_cpu("in its cpuset", workers, 1)
        group.write("cpuset.cpus", "0")
        on_cpu("in its changed cpuset", workers, 0)
        group.write("cpuset.cpus", "1")
        other.write("cgroup.procs", bench.process.pid)
        on_cpu("in another cpuset", workers, 0)
        threads = other.read("cgroup.threads").split()
        if not {str(worker) for worker in workers} <= set(threads):
            raise AssertionError("the workers are not in the VM's cgroup")
        bench.result()


def test_kthread():
    """A kthread worker joins the VM's cgroup, and does not follow it."""
    load()
    with NullBlk() as disk, Cgroup() as group, Cgroup() as other, \
            Bench(disk, "--worker-mode=kthread", cgroup=group, runtime=2) as bench:
        bench.workers(0)
        deadline = time.monotonic() + 30
        while not (workers := bench.named("/proc")):
            if time.monotonic() > deadline:
                raise AssertionError("no kthread worker")
            time.sleep(0.1)

        def cgroups():
            found = set()
            for worker in workers:
                with open(f"/proc/{worker}/cgroup", encoding="ascii") as file:
                    found.add(file.read().strip().rpartition("/")[2])
            return found

        for move in (False, True):
            if move:
                other.write("cgroup.procs", bench.process.pid)
            if cgroups() != {os.path.basename(group.path)}:
                raise AssertionError(f"it is in {cgroups()}, moved: {move}")
        bench.result()


TESTS = [
    Test("io.max limits a VM's disk, and io.stat counts its requests", io_max()),
    Test("io.max limits a VM's image file", io_max(make=lambda: Image(Ext4(NullBlk()))), long=True),
    Test("the same with a kthread worker", io_max("--worker-mode=kthread"),
         long=True),
    test_io_weight,
    test_cpu_max,
    test_memory,
    test_workers,
    test_taskset,
    test_cpuset,
    test_kthread,
]
