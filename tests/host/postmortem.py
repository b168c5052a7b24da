# SPDX-License-Identifier: GPL-2.0
"""What the processors of an emulated machine were at: usage: postmortem.py SOCKET

SOCKET is QEMU's QMP monitor. Stops the machine, and prints the registers of each processor and its kernel stack, as
the memory has it by the page tables, and whether the mark is at its end that the kernel looks for: if it is, a kernel
that reports a corrupted stack end read something else than the memory. A processor that runs a guest shows the guest.
"""

import json
import re
import socket
import sys

# include/uapi/linux/magic.h, and THREAD_SIZE of x86-64.
STACK_END_MAGIC = 0x57AC6E9D
THREAD_SIZE = 16 << 10


class Monitor:
    """A QMP monitor."""

    def __init__(self, path):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(20)
        sock.connect(path)
        self.file = sock.makefile("rw", encoding="utf-8")
        self.execute("qmp_capabilities")

    def execute(self, command, **arguments):
        """Run a command; returns what it returns."""
        arguments = {name.replace("_", "-"): value for name, value in arguments.items()}
        self.file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.file.flush()
        while line := self.file.readline():
            reply = json.loads(line)
            if "error" in reply:
                raise OSError(reply["error"]["desc"])
            if "return" in reply:
                return reply["return"]
        raise OSError("QEMU has ended")

    def human(self, line, processor):
        """Run a command of the monitor for people, seen from a processor."""
        return self.execute("human-monitor-command", command_line=line, cpu_index=processor)


def stack_end(monitor, number, registers):
    """Print what is at the end of the stack that a processor is on, if that is a kernel's."""
    pointer = re.search("RSP=([89a-f][0-9a-f]{15})", registers)
    if not pointer:
        return
    end = int(pointer.group(1), 16) & -THREAD_SIZE
    print(monitor.human(f"gva2gpa {end:#x}", number).strip())
    words = monitor.human(f"x/{THREAD_SIZE // 8}gx {end:#x}", number)
    print(words)
    found = re.search(": 0x([0-9a-f]+)", words)
    if not found:
        says = "cannot be read"
    elif int(found.group(1), 16) == STACK_END_MAGIC:
        says = "has the mark"
    else:
        says = f"has {found.group(1)}, not the mark, which a stack of interrupts has not either"
    print(f"processor {number}: the memory at the end of its stack, {end:#x}, {says}")


def main():
    """See above."""
    monitor = Monitor(sys.argv[1])
    monitor.execute("stop")
    for processor in monitor.execute("query-cpus-fast"):
        number = processor["cpu-index"]
        registers = monitor.human("info registers", number)
        print(registers)
        print(monitor.human("info lapic", number))
        stack_end(monitor, number, registers)


if __name__ == "__main__":
    main()
