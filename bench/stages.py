# SPDX-License-Identifier: GPL-2.0
"""Where the time of one request goes: its way, cut into stages by the kernel's
trace events.

The tool's front end has one request in flight at a time. Each of its kicks
begins a request; what happens until the next is searched for the events that
end its stages.
"""

import os
import re
import statistics
import subprocess

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
# Of the vhost core: the driver takes a request, and gives it back. Left out
# where the kernel has no such function to probe.
PROBES = {"vb_fetch": "vhost_get_vq_desc_n", "vb_used": "vhost_add_used_n"}


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
        found = re.search(rf"\b{name}=(\d+)", self.rest)
        return int(found.group(1)) if found else None


def parse(text):
    """The events of a trace."""
    return [Event(match) for line in text.splitlines() if (match := LINE.match(line))]


def stages_of(path, direct):
    """For a path: the event that begins a request, and (stage, the event that
    ends it, whether each request has it). Each takes an event, the front end's
    thread and the server's. direct: they are the same."""
    def named(*names):
        return lambda event, front, server: event.name in names

    def by_front(*names):
        return lambda event, front, server: event.name in names and event.pid == front

    def wakes_server(event, _front, server):
        return event.name == "sched_waking" and event.field("pid") == server

    def runs_server(event, _front, server):
        return event.name == "sched_switch" and event.field("next_pid") == server

    def wakes_front(event, front, _server):
        return event.name == "sched_waking" and event.field("pid") == front

    def runs_front(event, front, _server):
        return event.name == "sched_switch" and event.field("next_pid") == front

    device = [("submit", named("block_bio_queue"), True),
              ("block layer", named("block_rq_issue"), False),
              ("device", named("block_rq_complete"), True)]
    back = [("front end's wake-up", runs_front, False)]
    if path == URING:
        return (by_front("sys_enter_io_uring_enter"), device
                + [("complete", wakes_front, False)] + back
                + [("return", by_front("sys_exit_io_uring_enter"), True)])
    if direct:
        return (by_front("sys_enter_write"), device
                + [("signal", wakes_front, False)] + back
                + [("return", by_front("sys_exit_read"), True)])
    return (by_front("sys_enter_write"),
            [("kick", wakes_server, False), ("server's wake-up", runs_server, False),
             ("fetch", named("vb_fetch"), False)] + device
            + [("complete", named("vb_used"), False), ("signal", wakes_front, True)] + back
            + [("return", by_front("sys_exit_read"), True)])


class Trace:
    """The requests of one trace."""

    def __init__(self, text, path):
        self.events = parse(text)
        self.front = next((event.pid for event in self.events
                           if event.comm.startswith("bench-")), None)
        # The server is who most often submits to the disk.
        submitters = [event.pid for event in self.events if event.name == "block_bio_queue"]
        self.server = statistics.mode(submitters) if submitters else None
        # The front end itself submits for a path that is served, too.
        self.direct = path != URING and self.server == self.front
        begins, self.wanted = stages_of(path, self.direct)
        starts = [number for number, event in enumerate(self.events)
                  if begins(event, self.front, self.server)]
        # The first ones find everything cold.
        self.starts = starts[len(starts) // 10:]

    def stages(self):
        """For each request whose events are all there: its stages' microseconds."""
        requests = []
        for first, last in zip(self.starts, self.starts[1:]):
            request, now, place = {}, self.events[first].time, first + 1
            for stage, ends_it, needed in self.wanted:
                found = next((number for number in range(place, last)
                              if ends_it(self.events[number], self.front, self.server)), None)
                if found is None:
                    if needed:
                        break
                    continue
                request[stage] = self.events[found].time - now
                now, place = self.events[found].time, found + 1
            else:
                requests.append(request)
        return requests

    def per_request(self, name, pid):
        """How often an event with the server's thread happens for each request; 0
        if it is the front end itself that serves."""
        if self.direct:
            return 0.0
        within = self.events[self.starts[0]:self.starts[-1]]
        return sum(event.name == name and pid(event) == self.server
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


def trace(command):
    """Run a program under the trace; returns the trace."""
    if not os.path.ismount(TRACING):
        sh("mount", "-t", "tracefs", "tracefs", TRACING)
    probes = []
    for name, function in PROBES.items():
        try:
            with open(f"{TRACING}/kprobe_events", "a", encoding="ascii") as file:
                file.write(f"p:kprobes/{name} {function}\n")
            probes.append(name)
        except OSError:
            continue
    os.makedirs(INSTANCE, exist_ok=True)
    try:
        write(f"{INSTANCE}/trace_clock", "mono")
        write(f"{INSTANCE}/buffer_size_kb", 8192)
        for event in EVENTS + [f"kprobes/{name}" for name in probes]:
            write(f"{INSTANCE}/events/{event}/enable", 1)
        write(f"{INSTANCE}/tracing_on", 1)
        sh(*command, timeout=120)
        write(f"{INSTANCE}/tracing_on", 0)
        with open(f"{INSTANCE}/trace", encoding="utf-8", errors="replace") as file:
            return file.read()
    finally:
        for event in EVENTS + [f"kprobes/{name}" for name in probes]:
            write(f"{INSTANCE}/events/{event}/enable", 0)
        os.rmdir(INSTANCE)
        for name in probes:
            with open(f"{TRACING}/kprobe_events", "a", encoding="ascii") as file:
                file.write(f"-:kprobes/{name}\n")


def measure(path, command, keep):
    """The stages of a path, under the tool's command line, and what else the
    trace tells. It is kept in a file."""
    try:
        text = trace(command)
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"tracing: {error}") from error
    with open(keep, "w", encoding="utf-8") as file:
        file.write(text)
    found = Trace(text, path)
    requests = found.stages()
    if len(requests) < 20:
        raise RuntimeError(f"the trace shows only {len(requests)} complete requests: {keep}")
    return {"stages_us": summarize(requests, [stage for stage, _, _ in found.wanted]),
            "syscalls_per_req": found.per_request("sys_enter", lambda event: event.pid),
            "wakeups_per_req": found.per_request("sched_waking",
                                                 lambda event: event.field("pid"))}
