# SPDX-License-Identifier: GPL-2.0
"""A guest under QEMU: its start, its QMP monitor, commands in it.

The guest runs tests/guest/init, which takes commands over a virtio-serial
port. Everything here has a timeout in seconds, and says what it waited for
when that has passed.
"""

import json
import os
import re
import selectors
import socket
import subprocess
import time

from ktap import say


class GuestError(Exception):
    """The guest, or QEMU, did not do what it should."""


class GuestReset(GuestError):
    """The guest was reset, and the test had not asked for it."""

    def __init__(self, text, guest):
        super().__init__(text)
        self.guest = guest

    def is_unexplained(self):
        """Whether it may be the emulation's fault: the host is emulated, and the guest's kernel said nothing."""
        return not native_kvm() and not re.search("Kernel panic|BUG:|Oops|WARNING:", self.guest.console())


class GuestSilent(GuestError):
    """Nothing came within the time allowed."""


class QmpError(GuestError):
    """QEMU refused a command; the text is QEMU's own."""


class Channel:
    """A Unix socket that is read while something is waited for."""

    def __init__(self, path, timeout):
        deadline = time.monotonic() + timeout
        while True:
            self.sock = socket.socket(socket.AF_UNIX)
            try:
                self.sock.connect(path)
                break
            except OSError as error:
                self.sock.close()
                if time.monotonic() > deadline:
                    raise GuestError(f"cannot connect to {path}: {error}") from error
                time.sleep(0.1)
        self.sock.setblocking(False)
        self.data = b""

    def line(self):
        """Take one complete line of what has been read, or None."""
        head, newline, rest = self.data.partition(b"\n")
        if not newline:
            return None
        self.data = rest
        return head.decode(errors="replace").rstrip("\r")


class Guest:
    """One QEMU process.

    qemu: the program. kernel, initrd: what to boot, or None to boot from the
    disks through the firmware. args: QEMU's arguments for the disks and what
    else the test is about. append: more of the kernel command line. pass_fds:
    open files that QEMU is given. shell: the serial console is the socket
    "shell" in the guest's folder, and not the file "console". machine: QEMU's
    -machine.
    """

    BOOT_TIMEOUT = 300

    def __init__(self, name, qemu, work, kernel=None, initrd=None, args=(),
                 append="", smp=2, memory="512M", accel="kvm", pass_fds=(), shell=False,
                 machine="pc"):
        self.name = name
        self.qemu = qemu
        self.dir = os.path.join(work, name)
        self.kernel = kernel
        self.initrd = initrd
        self.args = list(args)
        self.append = append
        self.smp = smp
        self.memory = memory
        self.accel = accel
        self.pass_fds = pass_fds
        self.shell = shell
        self.machine = machine
        self.process = None
        self.events = []
        self.replies = []
        self.number = 0
        os.makedirs(self.dir, exist_ok=True)

    # Start and end

    def command_line(self):
        """QEMU's arguments."""
        path = self.dir
        line = [
            self.qemu, "-name", f"{self.name},debug-threads=on",
            "-nodefaults", "-no-user-config", "-display", "none",
            "-machine", self.machine, "-accel", self.accel,
            "-cpu", "host" if self.accel == "kvm" and native_kvm() else "qemu64",
            "-smp", str(self.smp), "-m", self.memory,
            "-serial", (f"unix:{path}/shell,server=on,wait=off" if self.shell
                        else f"file:{path}/console"),
            "-chardev", f"socket,id=qmp,path={path}/qmp,server=on,wait=off",
            "-mon", "chardev=qmp,mode=control",
            "-chardev", f"socket,id=agent,path={path}/agent,server=on,wait=off",
            "-device", "virtio-serial-pci,max_ports=2",
            "-device", "virtserialport,chardev=agent,name=vhost-blk.test",
        ]
        if self.kernel:
            line += ["-kernel", self.kernel, "-initrd", self.initrd,
                     "-append", f"{KERNEL_ARGS} {self.append}".strip()]
        return line + self.args

    def start(self, timeout=BOOT_TIMEOUT):
        """Start QEMU and wait until the guest takes commands.

        Under nested emulation a guest may reset itself as it boots: a boot that
        does not end is tried again, once, and it is said.
        """
        self.launch()
        try:
            self.wait_ready(timeout)
        except GuestError as error:
            if self.process.poll() is not None:
                raise
            say(f"guest {self.name}: boot retried: {error}")
            self.kill()
            self.launch()
            self.wait_ready(timeout)
        return self

    def launch(self, *args):
        """Start QEMU, with further arguments, without waiting for the guest."""
        for name in ("qmp", "agent", "shell"):
            if os.path.exists(f"{self.dir}/{name}"):
                os.unlink(f"{self.dir}/{name}")
        self.events, self.replies = [], []
        with open(f"{self.dir}/qemu.log", "ab") as log:
            self.process = subprocess.Popen(self.command_line() + list(args),
                                            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            pass_fds=self.pass_fds)
        try:
            self.monitor = Channel(f"{self.dir}/qmp", 30)
            self.agent = Channel(f"{self.dir}/agent", 30)
        except GuestError as error:
            self.kill()
            raise GuestError(f"{error}\n{self.qemu_log()}") from error
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.monitor.sock, selectors.EVENT_READ, self.monitor)
        self.selector.register(self.agent.sock, selectors.EVENT_READ, self.agent)
        self.qmp("qmp_capabilities")

    def wait_ready(self, timeout=BOOT_TIMEOUT, what="the guest's boot"):
        """Wait until the guest takes commands; returns the seconds it took."""
        begin = time.monotonic()
        while self.agent_line(begin + timeout, what) != "@@ready":
            pass
        took = time.monotonic() - begin
        say(f"guest {self.name}: up after {took:.0f} s")
        return took

    def shut_down(self, timeout=120):
        """Power the guest off and wait for QEMU's end."""
        self.send("sync; poweroff -f")
        self.wait_exit(timeout)

    def wait_exit(self, timeout=60):
        """Wait for QEMU's end; a status other than 0 is an error."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise GuestError(f"QEMU did not end within {timeout} s") from error
        if status:
            raise GuestError(f"QEMU ended with status {status}\n{self.qemu_log()}")

    def kill(self):
        """End QEMU now."""
        if self.process and self.process.poll() is None:
            self.process.kill()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired as error:
                raise GuestError("QEMU cannot be killed: a request hangs in the host") from error

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        try:
            if error is not None:
                self.explain()
        finally:
            self.kill()

    def explain(self):
        """Print what is known of a guest with which something went wrong."""
        say(f"guest {self.name}: the end of its console:")
        say(self.console()[-2000:])
        log = self.qemu_log()
        if log:
            say(f"guest {self.name}: what QEMU printed:")
            say(log[-2000:])
        if self.process and self.process.poll() is None:
            say(f"guest {self.name}: its processors, twice:")
            for _ in range(2):
                say(self.processors())
                time.sleep(1)

    def processors(self):
        """Where the guest's processors are, and whether they rest, as QEMU's monitor says."""
        try:
            text = self.qmp("human-monitor-command", 10, command_line="info registers -a")
        except (GuestError, OSError) as error:
            return str(error)
        return "\n".join(line.strip() for line in text.splitlines()
                         if line.startswith(("CPU#", "RIP=", "EIP=")))

    def block(self, serial):
        """The name that a disk has in the guest, by its serial."""
        return self.run(f"grep -lx {serial} /sys/block/vd*/serial").split("/")[3]

    def until(self, what, condition):
        """Wait in the guest until a condition of its shell is true."""
        if self.run(f"i=0; until {condition}; do i=$((i + 1)); [ $i -lt 300 ] || exit 1; sleep 0.1; done",
                    check=False)[0]:
            raise AssertionError(f"{what}: not within 30 s")

    # What the guest and QEMU print

    def console(self):
        """The guest's serial console so far."""
        return self.read("console")

    def qemu_log(self):
        """What QEMU printed so far."""
        return self.read("qemu.log")

    def read(self, name):
        """A file of the guest's folder, as text; empty if it is not there."""
        try:
            with open(os.path.join(self.dir, name), "rb") as file:
                return file.read().decode(errors="replace").replace("\r", "")
        except FileNotFoundError:
            return ""

    # Both channels

    def pump(self, deadline, what):
        """Read what is there; wait for it until the deadline."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise GuestSilent(f"{what}: nothing within the time allowed")
        for key, _ in self.selector.select(min(left, 1.0)):
            channel = key.data
            try:
                data = channel.sock.recv(65536)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            if not data:
                self.selector.unregister(channel.sock)
                if channel is self.monitor:
                    raise GuestError(f"{what}: QEMU has ended\n{self.qemu_log()}")
            channel.data += data
        while (line := self.monitor.line()) is not None:
            message = json.loads(line)
            if "event" in message:
                self.events.append(message)
            elif "QMP" not in message:
                self.replies.append(message)

    def qmp(self, command, timeout=60, **arguments):
        """Run a QMP command; returns what it returns. _ in names becomes -."""
        self.number += 1
        message = {"execute": command, "id": self.number}
        if arguments:
            message["arguments"] = {name.replace("_", "-"): value
                                    for name, value in arguments.items()}
        self.monitor.sock.setblocking(True)
        self.monitor.sock.sendall(json.dumps(message).encode() + b"\n")
        self.monitor.sock.setblocking(False)
        deadline = time.monotonic() + timeout
        # One that came too late is still there.
        while not (replies := [reply for reply in self.replies if reply.get("id") == self.number]):
            self.pump(deadline, f"QMP {command}")
        self.replies.clear()
        reply = replies[0]
        if "error" in reply:
            raise QmpError(f"QMP {command}: {reply['error']['desc']}")
        return reply["return"]

    def wait_event(self, name, timeout=60, since=0):
        """Wait for a QMP event that is not among the first `since` ones."""
        deadline = time.monotonic() + timeout
        while True:
            for event in self.events[since:]:
                if event["event"] == name:
                    return event
            self.pump(deadline, f"QMP event {name}")

    def agent_line(self, deadline, what):
        """One line from the guest."""
        while (line := self.agent.line()) is None:
            self.pump(deadline, what)
        return line

    def send(self, command):
        """Send a shell command to the guest without waiting for its end."""
        if "\n" in command:
            raise ValueError("a command is one line")
        self.agent.sock.setblocking(True)
        self.agent.sock.sendall(command.encode() + b"\n")
        self.agent.sock.setblocking(False)

    def finish(self, command="the command sent before", timeout=300):
        """Wait for the end of what send() sent: its status and output."""
        deadline = time.monotonic() + timeout
        output = []
        while True:
            line = self.agent_line(deadline, f"in the guest: {command}")
            # Output without a newline at its end stands before the mark.
            match = re.search(r"@@status (\d+)$", line)
            if line == "@@ready":
                raise GuestReset(f"in the guest: {command}: the guest was reset\n"
                                 + "\n".join(output), self)
            if match:
                if match.start():
                    output.append(line[:match.start()])
                return int(match.group(1)), "\n".join(output)
            output.append(line)

    def run(self, command, timeout=300, check=True):
        """Run a shell command in the guest; returns its output.

        check: a status other than 0 is an error; otherwise the status and the
        output are returned.
        """
        self.send(command)
        status, output = self.finish(command, timeout)
        if not check:
            return status, output
        if status:
            raise GuestError(f"in the guest: {command}: status {status}\n{output}")
        return output


# Where it is emulated, a guest that boots may wait forever in the watchdog of its clock, with one processor in
# watchdog_check_skew() and the other in stop_machine_yield().
KERNEL_ARGS = "console=ttyS0 loglevel=5 nokaslr panic=-1 nohz=on tsc=nowatchdog"


def native_kvm():
    """Whether this host's processor is a real one (or passes as one).

    In an emulated host the guest needs QEMU's plainest processor model.
    """
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        return "QEMU TCG" not in file.read()
