#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Measure cells in the host, and keep each round as soon as it is there.

What is compared is measured next to each other, in rounds in which the paths
take turns at going first. What has been kept is not measured again.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time

from cells import FIO, GUEST, GUEST_STAGES, PARAMETERS, STAGES, TOOL, chosen
from paths import GuestPath, Server, make_disk, sh  # also makes tests/host known
import measure
import stages
from vm import Guest, GuestError, native_kvm

TRIES = 2


def say(text):
    """A line of progress, with the time since the start."""
    t = int(time.time() - float(os.environ.get("VHOST_BLK_START", time.time())))
    print(f"[{t // 60:3d}:{t % 60:02d}] {text}", flush=True)


class Kept:
    """Rounds in files, one for each cell."""

    def __init__(self, folder, order):
        self.folder = folder
        self.order = {cell.name: number for number, cell in enumerate(order)}
        for name in ("rounds", "traces"):
            os.makedirs(f"{folder}/{name}", exist_ok=True)

    def path(self, cell):
        """The file of a cell."""
        return f"{self.folder}/rounds/{cell.name.replace('/', ',')}.json"

    def read(self, cell):
        """What is kept of a cell."""
        try:
            with open(self.path(cell), encoding="utf-8") as file:
                return json.load(file)
        except (OSError, ValueError):
            return {"cell": vars(cell), "rounds": [], "command": "", "order": 0}

    def count(self, cell):
        """How many rounds are kept of it."""
        return len(self.read(cell)["rounds"])

    def add(self, cell, command, result):
        """Keep one more."""
        kept = self.read(cell)
        kept["rounds"].append(result)
        kept["command"], kept["order"] = command, self.order[cell.name]
        self.write(self.path(cell), kept)

    def forget(self, cell):
        """Drop what is kept of it."""
        if os.path.exists(self.path(cell)):
            os.unlink(self.path(cell))

    def start(self, about):
        """Keep what the report says of where it was measured; of earlier starts, too,
        if something is left of them."""
        path = f"{self.folder}/about.json"
        if os.listdir(f"{self.folder}/rounds") and os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                before = json.load(file)["machine"]
            for key in ("commit", "load of the machine before"):
                said, now = before.get(key), about["machine"].get(key)
                if said and now and now not in said.split("; "):
                    about["machine"][key] = f"{said}; {now}"
        self.write(path, about)

    @staticmethod
    def write(path, what):
        """Write a file so that it is never seen half-written."""
        with open(f"{path}.new", "w", encoding="utf-8") as file:
            json.dump(what, file, indent=1)
        os.replace(f"{path}.new", path)


class Progress:
    """How far it is, and how long it will take: from what rounds took so far."""

    # Before anything was measured: seconds that a round takes.
    GUESS = {TOOL: 0.8, FIO: 3.0, GUEST: 4.0, STAGES: 5.0, GUEST_STAGES: 10.0}
    GUEST_START = 40

    def __init__(self, todo, rounds):
        self.left = dict.fromkeys(self.GUESS, 0)
        for cell, missing in todo:
            self.left[cell.frontend] += missing
        self.all = sum(self.left.values())
        self.took = {frontend: [0, 0.0] for frontend in self.left}
        self.rounds = rounds
        self.guests = len({guest_of(cell) for cell, _ in todo if cell.in_guest})

    def seconds(self):
        """What is left, seconds."""
        total = self.guests * self.GUEST_START
        for frontend, left in self.left.items():
            count, took = self.took[frontend]
            total += left * (took / count if count >= 10 else self.GUESS[frontend])
        return total

    def done(self, frontend, seconds):
        """One round was measured."""
        self.left[frontend] -= 1
        self.took[frontend][0] += 1
        self.took[frontend][1] += seconds

    def __str__(self):
        finished = self.all - sum(self.left.values())
        return f"{finished}/{self.all} rounds, {self.seconds() / 60:.0f} min left"


class Snapshot:
    """Counters of the host at one moment."""

    def __init__(self, disks, size, pid=None, match=None, vm=None):
        self.time = time.monotonic()
        self.requests = requests(disks, size)
        self.busy = measure.busy()
        self.threads = measure.threads(pid, match) if pid else None
        self.kvm = measure.kvm(vm) if vm else {}

    def since(self, before):
        """What happened since then, for each request."""
        count = self.requests - before.requests
        if count < 10:
            raise RuntimeError(f"only {count} requests in {self.time - before.time:.1f} s")
        result = {"host_busy_us_per_req": (self.busy - before.busy) / count}
        if self.threads is not None:
            cpu, waits, others = measure.used(before.threads, self.threads)
            result["host_cpu_us_per_req"] = cpu / 1000 / count
            result["wakeups_per_req"] = waits / count
            result["ctxsw_per_req"] = (waits + others) / count
        for metric, name in (("exits_per_req", "exits"), ("interrupts_per_req", "irq_injections")):
            if name in self.kvm and name in before.kvm:
                result[metric] = (self.kvm[name] - before.kvm[name]) / count
        return result


def requests(disks, size):
    """Requests of `size` bytes that all the disks have completed."""
    if all(os.path.basename(disk).startswith("ram") for disk in disks):
        # brd does not count. Nothing else is read or written meanwhile.
        return measure.transferred() // size
    return sum(measure.requests(disk) for disk in disks)


def fio_command(cell, engine, name, seconds):
    """fio's command line."""
    words = ["fio", "--name=bench", f"--ioengine={engine}", "--direct=1", f"--rw={cell.rw}",
             f"--bs={cell.bs}", f"--iodepth={cell.iodepth}", f"--filename={name}", "--norandommap",
             "--time_based", f"--runtime={seconds}", "--lat_percentiles=1", "--clat_percentiles=0",
             "--output-format=json"]
    if cell.rw in ("randrw", "rw"):
        words.append("--rwmixread=70")
    if cell.flush:
        words.append("--fsync=1")
    return words


def fio_result(output):
    """What fio measured. Of mixed loads: the latency of reads."""
    job = json.loads(output[output.index("{"):output.rindex("}") + 1])["jobs"][0]
    if job["error"]:
        raise RuntimeError(f"fio: error {job['error']}")
    sides = [job[side] for side in ("read", "write") if job[side]["total_ios"]]
    if not sides:
        raise RuntimeError("fio did nothing")
    latency = sides[0]["lat_ns"]
    percentile = {float(key): value / 1000 for key, value in latency.get("percentile", {}).items()}
    return {"iops": sum(side["iops"] for side in sides),
            "bytes_per_second": sum(side["bw_bytes"] for side in sides),
            "lat_mean_us": latency["mean"] / 1000, "lat_p50_us": percentile.get(50.0),
            "lat_p99_us": percentile.get(99.0), "lat_p999_us": percentile.get(99.9)}


class Measurer:
    """Measures the groups of cells, and keeps what comes out."""

    def __init__(self, options, kept, progress):
        self.options, self.kept, self.progress = options, kept, progress
        self.notes = []
        self.given_up = set()
        # Those of the module, if it is loaded.
        self.parameters = None
        # An emulated host does little in a second, but starts programs slowly.
        emulated = not native_kvm()
        self.tool_seconds = 0.4 if emulated else 1.0
        self.window = 1.2 if emulated else 2.0

    def note(self, text):
        """Something that the reader of the report has to know."""
        say(f"  {text}")
        if text not in self.notes:
            self.notes.append(text)
            Kept.write(f"{self.kept.folder}/notes.json", self.notes)

    def rounds(self, cells, function):
        """Measure the missing rounds of cells that are compared."""
        group = cells[0].group
        alive = list(cells)
        for number in range(wanted(cells[0], self.options.rounds)):
            # Each goes first in turn.
            turn = number % max(len(alive), 1)
            for cell in alive[turn:] + alive[:turn]:
                if self.kept.count(cell) > number:
                    continue
                begin = time.monotonic()
                for attempt in range(1, TRIES + 1):
                    try:
                        command, result = function(cell)
                        self.kept.add(cell, command, result)
                        break
                    except (RuntimeError, OSError, ValueError, KeyError,
                            subprocess.SubprocessError) as error:
                        what = "tried again" if attempt < TRIES else "left out"
                        self.note(f"{cell.name}: {what}: {str(error).strip()[-300:]}")
                        if attempt == TRIES:
                            alive = [each for each in alive if each is not cell]
                            self.given_up.add(cell)
                self.progress.done(cell.frontend, time.monotonic() - begin)
        self.show(group, alive)

    def show(self, group, cells):
        """A line with what came out."""
        words = []
        for cell in cells:
            rounds = self.kept.read(cell)["rounds"]
            if cell.traced:
                sums = sorted(sum(each["stages_us"].values()) for each in rounds)
                words.append(f"{cell.path} {sums[len(sums) // 2]:.0f} us")
                continue
            metric = "host_cpu_us_per_req" if cell.frontend == GUEST else "iops"
            values = sorted(each[metric] for each in rounds if each.get(metric) is not None)
            if values:
                words.append(f"{cell.path} {values[len(values) // 2]:.0f}")
        say(f"{group}: {', '.join(words)}; {self.progress}")

    # The tool

    def load(self, path):
        """Load the module with the parameters of a path."""
        parameters = PARAMETERS.get(path, [])
        if parameters == self.parameters:
            return
        if self.parameters is not None:
            sh("rmmod", "vhost_blk")
        self.parameters = None
        sh("insmod", self.options.module, *parameters)
        self.parameters = parameters

    def tool_command(self, cell, disk, server):
        """The tool's command line for a cell."""
        words = [self.options.tool, "bench", "--path", cell.tool_path, "--disk", disk, "--rw",
                 cell.rw, "--bs", str(cell.bs), "--iodepth", str(cell.iodepth), "--queues",
                 str(cell.queues), "--warmup", "300", "--json"]
        words += (["--count", "400"] if cell.frontend == STAGES
                  else ["--runtime", str(self.tool_seconds)])
        if server:
            words += ["--socket", server.socket, "--server-pid", str(server.process.pid)]
        if cell.writes:
            words += ["--write", "--yes-destroy-data"]
        if cell.flush:
            words.append("--sync-every-write")
        return words

    def tool_round(self, cell, disk, server):
        """One round with the tool."""
        command = self.tool_command(cell, disk, server)
        output = sh(*command, timeout=60 + 20 * self.tool_seconds)
        data = json.loads(output[output.index("{"):])
        latency = data.get("lat_us") or {}
        cpu = data.get("cpu") or {}
        switches = data.get("context_switches") or {}
        server_switches = switches.get("server") or {}
        return " ".join(command), {
            "iops": data["iops"], "bytes_per_second": data.get("bytes_per_second"),
            "lat_mean_us": latency.get("mean"), "lat_p50_us": latency.get("p50"),
            "lat_p99_us": latency.get("p99"), "lat_p999_us": latency.get("p999"),
            "host_cpu_us_per_req": cpu.get("server_us_per_req"),
            "front_end_cpu_us_per_req": cpu.get("front_end_us_per_req"),
            "host_busy_us_per_req": data.get("host_non_guest_us_per_req"),
            "ctxsw_per_req": sum(server_switches.values()) if server_switches else None,
            "wakeups_per_req": server_switches.get("voluntary"),
            "interrupts_per_req": data.get("interrupts_per_req"),
            "kicks_per_req": data.get("kicks_per_req"), "calls_per_req": data.get("calls_per_req")}

    def stages_round(self, cell, disk, server):
        """One round with the tool, traced."""
        command = self.tool_command(cell, disk, server)
        found = stages.measure(cell.path, lambda: sh(*command, timeout=120), self.trace_of(cell))
        return " ".join(command), found

    def trace_of(self, cell):
        """The file that a trace is kept in."""
        return f"{self.kept.folder}/traces/{cell.name.replace('/', ',')}"

    def tool(self, cells):
        """Cells of the tool and of fio in the host, on one disk."""
        with make_disk(cells[0].disk) as disk:
            servers = {}
            try:
                for path in dict.fromkeys(cell.path for cell in cells
                                          if cell.path.startswith("vhost-user-blk")):
                    most = max(cell.queues for cell in cells)
                    servers[path] = Server(path, disk.path, self.options.work, most)

                def one(cell):
                    if cell.frontend == FIO:
                        return self.fio_round(cell, disk.path)
                    if cell.tool_path == "vhost-blk":
                        self.load(cell.path)
                    how = self.stages_round if cell.frontend == STAGES else self.tool_round
                    return how(cell, disk.path, servers.get(cell.path))

                for group in by(cells, lambda cell: cell.group):
                    self.rounds(group, one)
            finally:
                for server in servers.values():
                    server.close()

    # fio in the host

    def fio_round(self, cell, disk):
        """One round of fio in the host."""
        engine = cell.path.split("/")[1]
        command = fio_command(cell, engine, disk, self.window + 1)
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True) as fio:
            try:
                counted = self.sample(lambda: requests([disk], cell.bs),
                                      lambda: Snapshot([disk], cell.bs),
                                      lambda: fio.poll() is None)
                output, _ = fio.communicate(timeout=60)
            finally:
                if fio.poll() is None:
                    fio.kill()
        if fio.returncode:
            raise RuntimeError(f"{' '.join(command)}: status {fio.returncode}\n{output}")
        return " ".join(command), {**fio_result(output), **counted}

    def sample(self, count, snapshot, alive):
        """What happens for each request while the load is on: neither when it
        starts nor when it ends."""
        before = count()
        deadline = time.monotonic() + 60
        while count() - before < 20:
            if time.monotonic() > deadline or not alive():
                raise RuntimeError("the load does not start")
            time.sleep(0.05)
        first = snapshot()
        time.sleep(self.window)
        return snapshot().since(first)

    # Guests

    def guest_round(self, vm, cell, paths):
        """One round in a guest, on one or several disks of the same path."""
        disks = [path.disk.path for path in paths]
        pid = paths[0].server.process.pid if paths[0].server else vm.process.pid
        serves = re.compile("|".join(path.serves for path in paths))
        command = " ".join(fio_command(cell, "libaio", ":".join(f"/dev/{path.block}"
                                                                for path in paths),
                                       self.window + 1))
        vm.send(f"{command} --output=/tmp/fio && cat /tmp/fio")
        try:
            counted = self.sample(
                lambda: requests(disks, cell.bs),
                lambda: Snapshot(disks, cell.bs, pid, serves, vm.process.pid),
                lambda: vm.process.poll() is None)
        finally:
            status, output = vm.finish(command, 120)
        if status:
            raise RuntimeError(f"fio in the guest: status {status}: {output}")
        # The whole command line, for who wants to see how the disk was attached.
        args = " ".join(word for path in paths for word in path.args)
        return f"{command}  # QEMU: {args}", {**fio_result(output), **counted}

    def guest_stages_round(self, vm, cell, paths):
        """One round in a guest, traced."""
        command = " ".join(fio_command(cell, "libaio", f"/dev/{paths[0].block}", 1))
        return command, stages.measure(cell.path, lambda: vm.run(command), self.trace_of(cell),
                                       in_guest=True)

    def guest(self, cells):
        """Cells of a guest that has a disk, or several, for each path."""
        self.load("vhost-blk")
        sample = cells[0]
        name = f"bench-{sample.disk}-q{sample.queues}-v{sample.vcpus}-x{sample.disks}"
        names = list(dict.fromkeys(cell.path for cell in cells))
        paths, disks = {}, []
        try:
            for number, path in enumerate(names * sample.disks):
                disks.append(make_disk(sample.disk))
                try:
                    paths.setdefault(path, []).append(
                        GuestPath(path, number, disks[-1], sample.queues, self.options.work))
                except (RuntimeError, OSError) as error:
                    self.note(f"{name}: no {path}: {error}")
                    self.drop(paths, path)
            args = ["-object", "memory-backend-memfd,id=memory,size=512M,share=on",
                    "-machine", "memory-backend=memory"]
            for path in sum(paths.values(), []):
                args += path.args
            say(f"{name}: starting a guest with {len(sum(paths.values(), []))} disks")
            with Guest(name, self.options.qemu, self.options.work, self.options.kernel,
                       self.options.initrd, args, smp=sample.vcpus) as vm:
                vm.start()
                self.progress.guests -= 1
                taken = set()
                for path in list(paths):
                    try:
                        for each in paths[path]:
                            each.block = each.find(vm, taken)
                            taken.add(each.block)
                    except (GuestError, IndexError) as error:
                        self.note(f"{name}: the guest has no disk on {path}: {error}")
                        self.drop(paths, path)
                for group in by([cell for cell in cells if cell.path in paths],
                                lambda cell: cell.group):
                    how = self.guest_stages_round if group[0].traced else self.guest_round
                    self.rounds(group, lambda cell, how=how: how(vm, cell, paths[cell.path]))
                vm.shut_down()
        finally:
            for path in sum(paths.values(), []):
                path.close()
            for disk in disks:
                disk.close()

    @staticmethod
    def drop(paths, name):
        """Go on without a path."""
        for path in paths.pop(name, []):
            path.close()


def wanted(cell, rounds):
    """How many rounds a cell is to have; a trace has many requests by itself."""
    return 1 if cell.traced else rounds


def guest_of(cell):
    """What tells the guests apart that cells need."""
    return cell.disk, cell.queues, cell.vcpus, cell.disks


def by(cells, key):
    """Cells in lists of equal keys, in their order."""
    found = {}
    for cell in cells:
        found.setdefault(key(cell), []).append(cell)
    return list(found.values())


def machine(about):
    """What the report says of where it was measured."""
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        text = file.read()
    model = re.search(r"model name\s*: (.*)", text)
    flags = re.search(r"^flags\s*: (.*)$", text, re.MULTILINE)
    virtualised = bool(flags and "hypervisor" in flags.group(1).split())
    return {"emulated": not native_kvm(), "machine": {
        **about, "processor": model.group(1) if model else "not known",
        "processors": os.cpu_count(), "virtualised": virtualised,
        "running kernel": os.uname().release}}


def main():
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--module", "--tool", "--qemu", "--kernel", "--initrd", "--work", "--kept",
                 "--set"):
        parser.add_argument(name, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--about", type=json.loads, default={})
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)

    cells = chosen(options.set, options.only)
    if not cells:
        sys.exit(f"error: no cell has that in its name; bench/run {options.set} --list shows them")
    kept = Kept(options.kept, chosen(options.set, []))
    if options.again:
        for cell in cells:
            kept.forget(cell)
    todo = [(cell, missing) for cell in cells
            if (missing := wanted(cell, options.rounds) - kept.count(cell)) > 0]
    progress = Progress(todo, options.rounds)
    say(f"{len(cells)} cells, {len(cells) - len(todo)} of them measured already; {progress}")
    missing = [cell for cell, _ in todo]
    if not missing:
        return 0
    kept.start(machine(options.about))

    if os.path.isdir("/sys/module/vhost_blk"):
        sys.exit("error: the module is loaded, and is to be measured with several parameters: "
                 "rmmod vhost_blk")
    sh("modprobe", "vhost")
    # In the host's memory, not on a filesystem that another program serves.
    sh("cp", options.tool, f"{options.work}/vhost-blk")
    options.tool = f"{options.work}/vhost-blk"
    measurer = Measurer(options, kept, progress)
    groups = by([cell for cell in missing if not cell.in_guest], lambda cell: cell.disk)
    groups += by([cell for cell in missing if cell.in_guest], guest_of)
    for group in groups:
        tries = 0
        while tries < TRIES:
            group = [cell for cell in group if kept.count(cell) < wanted(cell, options.rounds)
                     and cell not in measurer.given_up]
            if not group:
                break
            left = sum(progress.left.values())
            try:
                (measurer.guest if group[0].in_guest else measurer.tool)(group)
                break
            except (GuestError, RuntimeError, OSError, subprocess.SubprocessError) as error:
                first = str(error).strip().splitlines()[0]
                measurer.note(f"{group[0].frontend}/{group[0].disk}: started again after: "
                              f"{first[:200]} ... {str(error).strip()[-100:]}")
            # Under nested emulation guests may reset themselves: as long as
            # something is measured, it goes on.
            tries = 0 if sum(progress.left.values()) < left else tries + 1
    if measurer.parameters is not None:
        sh("rmmod", "vhost_blk")
    lost = [cell for cell in cells if kept.count(cell) < wanted(cell, options.rounds)]
    say(f"measured; {len(lost)} of {len(cells)} cells are incomplete" if lost else "measured")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
