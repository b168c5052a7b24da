# SPDX-License-Identifier: GPL-2.0
"""The statements of the virtio specification, tested on vhost-blk and, to compare, on
qemu-storage-daemon; and what docs/conformance.md says of both."""

import os
import re
import subprocess
import tempfile

import ktap
from daemon import StorageDaemon
from disks import Loop

DOCUMENT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../docs/conformance.md")
WRITE = ("--write", "--yes-destroy-data")
# Lines around the table, for scripts/conformance.
BEGIN, END = "@@conformance", "@@end"


def run(tool, *arguments):
    """Run the tool and return what it printed; its tests may fail."""
    done = subprocess.run([tool, "conformance", *arguments], capture_output=True, text=True,
                          timeout=600, check=False)
    if done.returncode not in (0, 1) or not done.stdout:
        raise RuntimeError(f"status {done.returncode}: {done.stderr}")
    return done.stdout


def server(tool, disk, folder):
    """Test qemu-storage-daemon, with a disk that can be written and with one that cannot."""
    saved = []
    for number, (export, arguments) in enumerate([
            (",writable=on", (*WRITE,)), (",writable=off", ("--only=5.2.6.2-b",))]):
        saved.append(f"{folder}/server{number}")
        with StorageDaemon(f"{folder}/{number}.sock", disk, blockdev=",discard=unmap",
                           export=export) as daemon:
            output = run(tool, "--path=vhost-user-blk", f"--socket={daemon.socket}",
                         f"--disk={disk}", "--name=qemu-storage-daemon", "--timeout=5",
                         f"--save={saved[-1]}", *arguments)
        if not os.path.exists(saved[-1]):
            raise RuntimeError(f"qemu-storage-daemon cannot be tested:\n{output}")
    return saved


def rows(text):
    """What a table says of vhost-blk, by the statement's id."""
    cells = (line.split("|") for line in text.splitlines() if re.match(r"\| \d", line))
    return {row[1].strip(): row[5].strip() for row in cells}


def test(tool):
    """A test that runs all of it."""
    with Loop() as disk, tempfile.TemporaryDirectory() as folder:
        # Zeroes would look like what was not read.
        subprocess.run(["dd", "if=/dev/urandom", f"of={disk.path}", "bs=1M", "count=4",
                        "oflag=direct", "status=none"], check=True, timeout=60)
        module = f"{folder}/module"
        ktap.program(tool, "conformance", "--disk", disk.path, *WRITE, "--ktap",
                     f"--save={module}")
        table = run(tool, "--markdown", module, *server(tool, disk.path, folder))
    ktap.say(BEGIN)
    ktap.say(table)
    ktap.say(END)
    with open(DOCUMENT, encoding="utf-8") as file:
        claimed = rows(file.read())
    found = rows(table)
    if claimed.keys() != found.keys():
        raise AssertionError("docs/conformance.md has other statements: run scripts/conformance")
    for name, mark in claimed.items():
        if mark != found[name]:
            ktap.say(f"{name}: docs/conformance.md says {mark}, and this run {found[name]}")
    wrong = [name for name, mark in claimed.items() if mark == "✓" and found[name] != "✓"]
    if wrong:
        raise AssertionError(f"docs/conformance.md says more than is true: {' '.join(wrong)}")
