#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Count the instructions that the host executes for one request.

A bare host runs under an emulator whose clock counts instructions: what the
tool's front end measures as nanoseconds is then the number of instructions
that were executed in the meantime, the kernel's, the server's and its own. One
processor, a disk that completes at once, and nobody who polls: so nothing
waits for a timer, and idle time, which that clock skips, does not occur.

Runs in the tree.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time

import report
from cells import (FRONT_END, FRONT_END_ALONE, NULL_BLK, PARAMETERS, PINNED, SMALL_PAGES, UNREGISTERED,
                   URING_SMALL_PAGES, chosen, exact)
from spread import Spread, number

SERVED = "vhost-user-blk/nopoll"
# The first round finds caches cold and what booting has left to do; it does
# not count.
ROUNDS = 3
COUNT = 15000
WARMUP = 400
# The figures of docs/performance.md, for who has none of their own to compare with.
KEPT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "exact.json")


def say(text):
    """A line of progress, with the time since the start."""
    t = int(time.time() - float(os.environ.get("VHOST_BLK_START", time.time())))
    print(f"[{t // 60:3d}:{t % 60:02d}] {text}", file=sys.stderr, flush=True)


def command(cell):
    """The tool's command line for a cell; $disk is the disk there."""
    words = ["vhost-blk", "bench", "--path", cell.tool_path, "--rw", cell.rw, "--bs",
             str(cell.bs), "--iodepth", str(cell.iodepth), "--count", str(COUNT), "--warmup",
             str(WARMUP), "--no-latency", "--seed", "1", "--json"]
    if cell.path != FRONT_END:
        words += ["--disk", "$disk"]
    if cell.path == SERVED:
        words += ["--socket", "$socket"]
    if cell.path == PINNED:
        words += ["--pin-memory"]
    if cell.path == UNREGISTERED:
        words += ["--unregistered"]
    if cell.path in (SMALL_PAGES, URING_SMALL_PAGES):
        words += ["--huge-pages", "off"]
    return " ".join(words)


def make_plan(cells):
    """The script that the bare host runs."""
    lines, loaded = ["sleep 3"], []
    for disk in dict.fromkeys(cell.disk for cell in cells):
        of_disk = [cell for cell in cells if cell.disk == disk]
        served = any(cell.path == SERVED for cell in of_disk)
        if disk in NULL_BLK:
            lines += [f"disk {disk} {NULL_BLK[disk][0]}", "sleep 1"]
        if served:
            lines.append("server")
        for cell in of_disk:
            parameters = PARAMETERS.get(cell.path, [])
            if cell.tool_path == "vhost-blk" and parameters != loaded:
                loaded = parameters
                lines += [f"module {' '.join(loaded)}", "sleep 1"]
            lines += [f"cell {cell.name} {number} /bench/{command(cell)}"
                      for number in range(ROUNDS)]
        if served:
            lines.append("end_server")
    return "\n".join(lines) + "\n"


def make_initrd(options, plan, folder):
    """The bare host's initramfs: the kept one, and after it what changes."""
    os.makedirs(f"{folder}/root/bench")
    for source, name in ((options.module, "vhost-blk.ko"), (options.tool, "vhost-blk")):
        subprocess.run(["cp", "-L", source, f"{folder}/root/bench/{name}"], check=True)
    subprocess.run(["strip", "--strip-debug", f"{folder}/root/bench/vhost-blk.ko"], check=True)
    with open(f"{folder}/root/bench/plan", "w", encoding="ascii") as file:
        file.write(plan)
    path = f"{folder}/initrd"
    with open(path, "wb") as out:
        with open(options.initrd, "rb") as base:
            out.write(base.read())
        out.flush()
        subprocess.run(["cpio", "--quiet", "--create", "--format=newc", "--owner=0:0"],
                       input=b"bench\nbench/plan\nbench/vhost-blk\nbench/vhost-blk.ko\n",
                       stdout=out, cwd=f"{folder}/root", check=True)
    return path


class Output:
    """The bare host's output, read while it grows."""

    def __init__(self, path):
        self.path = path
        self.offset = 0
        self.rest = b""

    def lines(self):
        """The complete lines that are new."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                data = file.read()
        except FileNotFoundError:
            return []
        self.offset += len(data)
        *lines, self.rest = (self.rest + data).split(b"\n")
        return [line.decode(errors="replace").rstrip("\r") for line in lines]


class Results:
    """What the output says: for each cell its rounds, or why there are none."""

    def __init__(self):
        self.rounds = {}
        self.errors = []
        self.ended = False
        self.cell = None
        self.text = []

    def take(self, line):
        """Take a line; returns the name of a cell that is complete with it."""
        word, _, rest = line.partition(" ")
        if word == "@@cell":
            self.cell, self.text = rest.split()[0], []
        elif word == "@@status" and self.cell:
            return self.end_of_round(rest)
        elif word == "@@error":
            self.errors.append(rest)
        elif word == "@@end":
            self.ended = True
        elif not word.startswith("@@"):
            if self.cell:
                self.text.append(line)
            elif line:
                self.errors.append(line)
        return None

    def end_of_round(self, status):
        cell, self.cell = self.cell, None
        text = "\n".join(self.text)
        match = re.search(r"\{.*\}", text, re.DOTALL)
        if status != "0" or not match:
            self.errors.append(f"{cell}: status {status}: {text}")
            return None
        result = json.loads(match.group(0))
        if not result.get("requests") or not result.get("seconds"):
            self.errors.append(f"{cell}: no requests or no time: {text}")
            return None
        rounds = self.rounds.setdefault(cell, [])
        rounds.append(result["seconds"] * 1e9 / result["requests"])
        return cell if len(rounds) == ROUNDS else None

    def counted(self, name):
        """The rounds of a cell that count."""
        return self.rounds.get(name, [])[1:]


def boot(options, cells, folder):
    """Run the plan under the emulator; returns what came out."""
    initrd = make_initrd(options, make_plan(cells), folder)
    results, output = Results(), Output(f"{folder}/results")
    # Not the processor of scripts/lib.sh: with this one the figures of exact.json were counted. Each byte of a
    # 'rep movsb' counts as an instruction.
    line = [options.emulator, "-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off",
            "-cpu", "max,la57=off", "-smp", "2", "-m", "1G", "-machine", "pc",
            "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-serial", f"file:{options.output}/console", "-serial", f"file:{folder}/results",
            "-kernel", options.kernel, "-initrd", initrd, "-append",
            "console=ttyS0 loglevel=5 panic=-1 oops=panic nokaslr norandmaps quiet maxcpus=1"]
    begin, done, first = time.monotonic(), 0, None
    with open(f"{options.output}/emulator.log", "wb") as log, \
            subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=log, stderr=log) as process:
        try:
            while True:
                running = process.poll() is None
                for text in output.lines():
                    if text.startswith("@@boot"):
                        say(f"  the bare host is up after {time.monotonic() - begin:.0f} s")
                    if text.startswith("@@cell") and first is None:
                        first = time.monotonic()
                    name = results.take(text)
                    if not name:
                        continue
                    done += 1
                    values = results.counted(name)
                    left = (time.monotonic() - first) / done * (len(cells) - done)
                    say(f"  {done}/{len(cells)} {name}: {number(sum(values) / len(values))}"
                        f" instructions; {left:.0f} s left")
                if not running:
                    break
                if time.monotonic() - begin > options.timeout:
                    results.errors.append(f"stopped after {options.timeout} s")
                    process.kill()
                time.sleep(0.5)
        finally:
            process.kill()
    if not results.ended and not results.errors:
        results.errors.append("the bare host died")
    return results


def summarize(cells, results):
    """The report's cells: medians and ranges, less what the front end takes."""
    own = {cell.iodepth: Spread(results.counted(cell.name)).median for cell in cells
           if cell.path == FRONT_END and results.counted(cell.name)}
    summary = []
    for cell in cells:
        values = results.counted(cell.name)
        if not values:
            continue
        entry = report.entry(cell, [{"host_insns_per_req": value} for value in values],
                             command(cell))
        # io_uring has no kicks and no calls: they are its own system calls.
        front = own.get(FRONT_END_ALONE if cell.tool_path == "io_uring" else cell.iodepth)
        if front is not None and cell.path != FRONT_END:
            entry["host_insns_less_front_end"] = round(entry["host_insns_per_req"] - front, 1)
        summary.append(entry)
    return summary


def main():
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--module", "--tool", "--kernel", "--initrd", "--emulator", "--output"):
        parser.add_argument(name, required=True)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--about", type=json.loads, default={},
                        help="what else the report says of the machine, JSON")
    parser.add_argument("--timeout", type=int, default=280, help="seconds")
    options = parser.parse_args()
    os.makedirs(options.output, exist_ok=True)

    cells = chosen("exact", options.only)
    if not cells:
        sys.exit("error: no cell has that in its name; bench/run exact --list shows them")
    # The front end is always needed, to be subtracted.
    cells = [cell for cell in exact() if cell in cells or cell.path == FRONT_END]
    begin = time.monotonic()
    say(f"counting instructions: {len(cells)} cells, {ROUNDS} rounds of {COUNT} requests each, "
        "the first does not count")
    with tempfile.TemporaryDirectory() as folder:
        results = boot(options, cells, folder)

    document = {"emulated": True, "machine": options.about, "clock": "instructions",
                "cells": summarize(cells, results)}
    last = report.load(f"{options.output}/results.json") or report.load(KEPT)
    report.write_all(options.output, document, last)
    print(report.exact_text(document, last))
    for error in results.errors:
        print(f"error: {error}", file=sys.stderr)
    missing = [cell.name for cell in cells if not results.counted(cell.name)]
    if missing:
        print(f"not measured: {', '.join(missing)}", file=sys.stderr)
    say(f"done in {time.monotonic() - begin:.0f} s; {options.output}/report.html")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
