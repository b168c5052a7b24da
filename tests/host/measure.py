# SPDX-License-Identifier: GPL-2.0
"""What the host's kernel counts of a disk, of threads and of itself."""

import glob
import os
import subprocess


def read(path):
    """A small file, as text."""
    with open(path, encoding="ascii", errors="replace") as file:
        return file.read()


def requests(disk):
    """Requests that a disk was given and has completed, flushes among them."""
    words = read(f"/sys/block/{os.path.basename(disk)}/stat").split()
    # Reads, writes, discards: those that were served, and those that were
    # merged with another one before; then flushes.
    return sum(int(words[place]) for place in (0, 1, 4, 5, 11, 12, 15) if place < len(words))


def transferred():
    """Bytes that all disks together were asked to read and write, by their bios: for a disk that does not count."""
    words = dict(line.split() for line in read("/proc/vmstat").splitlines())
    return (int(words["pgpgin"]) + int(words["pgpgout"])) * 1024


def _tasks(pid, match):
    for folder in glob.glob(f"/proc/{pid}/task/*"):
        try:
            if match.match(read(f"{folder}/comm")):
                yield folder
        except (FileNotFoundError, ProcessLookupError):
            continue


def threads(pid, match):
    """What the threads of a process whose name matches have used so far, by thread:
    CPU time, nanoseconds, and how often they have left a processor, to wait and
    otherwise."""
    found = {}
    for folder in _tasks(pid, match):
        try:
            lines = dict(line.split(":", 1) for line in read(f"{folder}/status").splitlines()
                         if ":" in line)
            found[folder] = (int(read(f"{folder}/schedstat").split()[0]),
                             int(lines["voluntary_ctxt_switches"]),
                             int(lines["nonvoluntary_ctxt_switches"]))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def used(before, after):
    """The same of all of them together, between two such: of those that have not ended."""
    none = (0, 0, 0)
    return [sum(now[place] - before.get(thread, none)[place] for thread, now in after.items())
            for place in range(len(none))]


def busy():
    """Time that all processors were busy with anything but a guest's code,
    microseconds. The kernel counts it in ticks."""
    user, nice, system, _, _, irq, softirq, _, guest, guest_nice = map(
        int, read("/proc/stat").split("\n", 1)[0].split()[1:11])
    ticks = user + nice + system + irq + softirq - guest - guest_nice
    return ticks * 1_000_000 // os.sysconf("SC_CLK_TCK")


def kvm(pid):
    """KVM's counters of the virtual machine of a process, by name."""
    if not os.path.isdir("/sys/kernel/debug/kvm"):
        subprocess.run(["mount", "-t", "debugfs", "debugfs", "/sys/kernel/debug"], check=False,
                       stderr=subprocess.DEVNULL)
    counters = {}
    for path in glob.glob(f"/sys/kernel/debug/kvm/{pid}-*/*"):
        if os.path.isfile(path):
            try:
                counters[os.path.basename(path)] = int(read(path))
            except (ValueError, OSError):
                continue
    return counters
