# SPDX-License-Identifier: GPL-2.0
"""Where the time of one request goes: its way, cut into stages by the kernel's
trace events.

One request is in flight at a time, of the tool's front end or of a guest. Each
kick begins a request; what happens until the next is searched for the events
that end its stages. What is found without a kick, by who polls, is left out.
"""

import contextlib
import errno
import os
import re
import shutil
import statistics
import subprocess
from collections import Counter

from cells import URING
from disks import sh, write

TRACING = "/sys/kernel/tracing"
INSTANCE = f"{TRACING}/instances/vhost-blk-bench"
LINE = re.compile(r"^\s*(?P<comm>.+)-(?P<pid>\d+)\s+\[(?P<cpu>\d+)\]\s+\S+\s+(?P<time>[\d.]+): "
                  r"(?P<event>\w+)(?P<rest>.*)$")

EVENTS = ["sched/sched_waking", "sched/sched_switch", "block/block_bio_queue",
          "block/block_rq_issue", "block/block_rq_complete", "syscalls/sys_enter_write",
          "syscalls/sys_exit_read", "syscalls/sys_enter_io_uring_enter",
          "syscalls/sys_exit_io_uring_enter", "raw_syscalls/sys_enter"]
GUEST_EVENTS = ["kvm/kvm_exit", "kvm/kvm_entry", "kvm/kvm_inj_virq", "kvm/kvm_msi_set_irq"]
# Of the vhost core: the driver takes a request, and gives it back. An eventfd is
# signalled by the kernel: by KVM, when the guest kicks, and by vhost, when it is
# called. Left out where the kernel has no such function to probe.
PROBES = {"vb_fetch": "vhost_get_vq_desc_n", "vb_used": "vhost_add_used_n",
          "vb_signal": "eventfd_signal_mask"}
# The name of a thread that runs a guest's processor.
VCPU = re.compile(r"CPU \d+/KVM")
# The last stage of a guest's request: until it kicks for the next one.
IN_GUEST = "guest"
# What an entry to the guest is called that brings it the interrupt of the request.
INJECTED = "kvm_entry_injected"


class Event:
    """One line of the trace."""

    def __init__(self, match):
        self.comm, self.pid = match["comm"].strip(), int(match["pid"])
        self.time = float(match["time"]) * 1e6
        self.name, self.rest = match["event"], match["rest"]
        if self.name.startswith("sys_"):
            # Printed as a call, or as its result.
            if self.rest.startswith("("):
                self.name = f"sys_enter_{self.name[4:]}"
            elif self.rest.startswith(" ->"):
                self.name = f"sys_exit_{self.name[4:]}"

    def field(self, name):
        """A field of the event, as a number."""
        found = re.search(rf"\b{name}[= ](0x[0-9a-f]+|\d+)", self.rest)
        return int(found.group(1), 0) if found else None


def parse(text):
    """The events of a trace."""
    return [Event(match) for line in text.splitlines() if (match := LINE.match(line))]


def named(*names):
    """Whether it is one of these events."""
    return lambda event, front, server: event.name in names


def by_front(*names):
    """Whether it is one of these, of the front end's own thread."""
    return lambda event, front, server: event.name in names and event.pid == front


def wakes_server(event, _front, server):
    """Whether the server is woken."""
    return event.name == "sched_waking" and event.field("pid") == server


def runs_server(event, _front, server):
    """Whether the server goes on."""
    return event.name == "sched_switch" and event.field("next_pid") == server


def wakes_front(event, front, _server):
    """Whether the front end is woken."""
    return event.name == "sched_waking" and event.field("pid") == front


def runs_front(event, front, _server):
    """Whether the front end goes on."""
    return event.name == "sched_switch" and event.field("next_pid") == front


# The guest kicks by an eventfd.
KICKS = by_front("vb_signal")


def calls(event, _front, server):
    """Whether the call's eventfd is signalled, by the kernel or by a program."""
    return event.name == "vb_signal" or event.name == "sys_enter_write" and event.pid == server


# The disk's part of every request.
DISK = [("submit", named("block_bio_queue"), True),
        ("block layer", named("block_rq_issue"), False),
        ("device", named("block_rq_complete"), True)]


def stages_of(path, direct):
    """For a path of the tool's front end: the event that begins a request, and
    (stage, the event that ends it, whether each request has it). Each takes an
    event, the front end's thread and the server's. direct: they are the same."""
    back = [("front end's wake-up", runs_front, False)]
    if path == URING:
        return (by_front("sys_enter_io_uring_enter"), DISK
                + [("complete", wakes_front, False)] + back
                + [("return", by_front("sys_exit_io_uring_enter"), True)])
    if direct:
        return (by_front("sys_enter_write"), [("fetch", named("vb_fetch"), False)] + DISK
                + [("used ring", calls, False), ("signal", wakes_front, False)] + back
                + [("return", by_front("sys_exit_read"), True)])
    return (by_front("sys_enter_write"),
            [("kick", wakes_server, False), ("server's wake-up", runs_server, False),
             ("fetch", named("vb_fetch"), False)] + DISK
            + [("complete", named("vb_used"), False), ("used ring", calls, False),
               ("signal", wakes_front, True)] + back
            + [("return", by_front("sys_exit_read"), True)])


def guest_stages(direct):
    """The same for a guest, whose requests begin with its exit. direct: the thread
    that runs its processor serves."""
    kick = [("kick", KICKS, False)]
    server = [] if direct else [("server's wake-up", runs_server, False)]
    again = [] if direct else [("server's second wake-up", runs_server, False)]
    return (kick + server + [("fetch", named("vb_fetch"), False)] + DISK + again
            + [("complete", named("vb_used"), False), ("used ring", calls, False),
               ("signal", named("kvm_msi_set_irq"), True),
               ("vCPU's wake-up", runs_front, False),
               ("injection", by_front(INJECTED), True)])


class Trace:
    """The requests of one trace: of the tool's front end, or of a guest with one processor."""

    def __init__(self, text, path, in_guest=False):
        self.events = parse(text)
        self.in_guest = in_guest
        self.front = next((event.pid for event in self.events
                           if (VCPU.match(event.comm) if in_guest
                               else event.comm.startswith("bench-"))), None)
        # The server is who most often takes requests off the ring, if that is to be seen, or
        # submits to the disk. Another thread may submit what it took.
        submitters, takers = ([event.pid for event in self.events if event.name == name]
                              for name in ("block_bio_queue", "vb_fetch"))
        several = [takers, submitters] if 2 * len(takers) > len(submitters) else [submitters]
        self.server = statistics.mode(several[0]) if several[0] else None
        # Whoever else serves has its part in that, or is a worker of the vhost core's.
        self.servers = {pid for pids in several for pid, times in Counter(pids).items()
                        if 20 * times >= len(pids)}
        self.servers |= {event.pid for event in self.events if event.comm.startswith("vhost-")}
        # The front end itself submits for a path that is served, too.
        self.direct = path != URING and self.server == self.front
        if in_guest:
            self.mark_injections()
            self.wanted, starts = guest_stages(self.direct), self.exits()
        else:
            begins, self.wanted = stages_of(path, self.direct)
            starts = [number for number, event in enumerate(self.events)
                      if self.is_end(begins, event)]
        # The first ones find everything cold.
        self.starts = starts[len(starts) // 10:]
        kicks = sum(self.is_end(KICKS, event) for event in self.events)
        self.needs_kicks = in_guest and 2 * kicks >= len(self.starts)

    def is_end(self, predicate, event):
        """Whether this is the event."""
        return predicate(event, self.front, self.server)

    def mark_injections(self):
        """Find the entry to the guest with which each request's interrupt comes: the
        next one, if the processor takes it without KVM."""
        vector = entry = None
        injected = False
        for event in self.events:
            if event.name == "kvm_msi_set_irq":
                vector, entry, injected = event.field("vec"), None, False
            elif event.name == "block_bio_queue" and vector is not None:
                if entry is not None:
                    entry.name = INJECTED
                vector = None
            elif vector is None or event.pid != self.front:
                continue
            elif event.name == "kvm_inj_virq":
                injected |= event.field("IRQ") == vector
            elif event.name == "kvm_entry" and injected:
                event.name, vector = INJECTED, None
            elif event.name == "kvm_entry" and entry is None:
                entry = event

    def exits(self):
        """Where the guest's processor leaves it to kick: its last exit before what
        leads to the submission."""
        found = []
        last = kick = None
        for number, event in enumerate(self.events):
            if event.name == "kvm_exit" and event.pid == self.front:
                last = number
            elif kick is None and (self.is_end(KICKS, event)
                                   or self.is_end(wakes_server, event)):
                kick = last
            elif event.name == "kvm_msi_set_irq":
                kick = None
            elif event.name == "block_bio_queue":
                begin = last if kick is None or self.direct else kick
                if begin is not None and begin not in found[-1:]:
                    found.append(begin)
        return found

    def stages(self):
        """For each request whose events are all there: its stages' microseconds."""
        requests = []
        kicked = [self.is_kicked(first, last)
                  for first, last in zip(self.starts, self.starts[1:] + [None])]
        for number, (first, last) in enumerate(zip(self.starts, self.starts[1:])):
            if kicked[number] and kicked[number + 1]:
                request = self.request(first, last)
                if request:
                    requests.append(request)
        return requests

    def is_kicked(self, first, last):
        """Whether a request of a guest begins with a kick, if most of them do."""
        return not self.needs_kicks or any(self.is_end(KICKS, event)
                                           for event in self.events[first:last])

    def request(self, first, last):
        """The stages of the request whose events are these, or None. What not each
        request has is searched for before the next that each one has."""
        request, now, place = {}, self.events[first].time, first + 1

        def find(predicate, until):
            return next((number for number in range(place, until)
                         if self.is_end(predicate, self.events[number])), None)

        for number, (stage, ends_it, needed) in enumerate(self.wanted):
            until = last
            if not needed:
                following = next(predicate for _, predicate, must in self.wanted[number:] if must)
                until = find(following, last)
                if until is None:
                    return None
            found = find(ends_it, until)
            if found is None:
                if needed:
                    return None
                continue
            request[stage] = self.events[found].time - now
            now, place = self.events[found].time, found + 1
        if self.in_guest:
            request[IN_GUEST] = self.events[last].time - now
        return request

    def per_request(self, name, pid):
        """How often an event with a thread that serves happens for each request."""
        within = self.events[self.starts[0]:self.starts[-1]]
        return sum(event.name == name and pid(event) in self.servers
                   for event in within) / (len(self.starts) - 1)


def middle(values):
    """The mean of the middle half: the trace's clock shows whole microseconds."""
    values = sorted(values)
    quarter = len(values) // 4
    return statistics.mean(values[quarter:len(values) - quarter])


def summarize(requests, stages):
    """Microseconds of each of the stages, in their order."""
    result = {}
    for stage in stages:
        values = [request.get(stage, 0.0) for request in requests]
        if any(values):
            result[stage] = round(middle(values), 2)
    return result


def probe(command):
    """Add a kprobe, or take it away. Not by open(): it seeks, which that file cannot."""
    file = os.open(f"{TRACING}/kprobe_events", os.O_WRONLY | os.O_APPEND)
    try:
        os.write(file, f"{command}\n".encode())
    finally:
        os.close(file)


@contextlib.contextmanager
def traced(keep, events):
    """Trace what happens within, into a file."""
    if not os.path.ismount(TRACING):
        sh("mount", "-t", "tracefs", "tracefs", TRACING)
    with contextlib.ExitStack() as undo:
        probes = []
        for name, function in PROBES.items():
            with contextlib.suppress(OSError):
                # One that was left when somebody was killed.
                probe(f"-:kprobes/{name}")
            try:
                probe(f"p:kprobes/{name} {function}")
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EADDRNOTAVAIL):
                    continue
                raise
            undo.callback(probe, f"-:kprobes/{name}")
            probes.append(f"kprobes/{name}")
        os.makedirs(INSTANCE, exist_ok=True)
        undo.callback(os.rmdir, INSTANCE)
        write(f"{INSTANCE}/trace_clock", "mono")
        write(f"{INSTANCE}/buffer_size_kb", 8192)
        for event in [*events, *probes]:
            write(f"{INSTANCE}/events/{event}/enable", 1)
            undo.callback(write, f"{INSTANCE}/events/{event}/enable", 0)
        write(f"{INSTANCE}/tracing_on", 1)
        yield
        write(f"{INSTANCE}/tracing_on", 0)
        with open(f"{INSTANCE}/trace", encoding="utf-8", errors="replace") as file, \
                open(keep, "w", encoding="utf-8") as copy:
            shutil.copyfileobj(file, copy)


def measure(path, load, keep, in_guest=False):
    """The stages of a path while `load()` runs, and what else the trace tells. It
    is kept in a file."""
    try:
        with traced(keep, EVENTS + (GUEST_EVENTS if in_guest else [])):
            load()
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"tracing: {error}") from error
    with open(keep, encoding="utf-8") as file:
        found = Trace(file.read(), path, in_guest)
    requests = found.stages()
    if len(requests) < 20:
        raise RuntimeError(f"the trace shows only {len(requests)} complete requests: {keep}")
    names = [stage for stage, _, _ in found.wanted] + [IN_GUEST] * in_guest
    return {"stages_us": summarize(requests, names),
            "syscalls_per_req": found.per_request("sys_enter", lambda event: event.pid),
            "wakeups_per_req": found.per_request("sched_waking",
                                                 lambda event: event.field("pid"))}
