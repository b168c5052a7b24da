# SPDX-License-Identifier: GPL-2.0
"""What bench/stages.py makes of a trace: two requests each, as the kernel prints
them."""

import unittest

from stages import Trace


def lines(text):
    """Lines of a trace, from (task, its id, seconds, event)."""
    return "\n".join(f" {task}-{pid}  [000] d..1.  {seconds:.6f}: {event}"
                     for task, pid, seconds, event in text)


VCPU, IOTHREAD, IDLE = ("CPU 0/KVM", 321), ("IO d1t", 314), ("<idle>", 0)
KICK = "kvm_exit: vcpu 0 reason npf rip 0xffffffff81b4a76d info1 0x000000010000000e"
SIGNAL = "vb_signal: (eventfd_signal_mask+0x4/0xa0)"
ENTRY = "kvm_entry: vcpu 0, rip 0xffffffff81b4a770 intr_info 0x00000000"
INTERRUPT = "kvm_msi_set_irq: dst 0 vec 39 (Fixed|physical|edge)"
SUBMITTED = "block_bio_queue: 254,0 R 109168 + 8 [some]"
COMPLETE = "block_rq_complete: 254,0 R () 109168 + 8 be,0,4 [0]"
TIMER, INJECTION = "kvm_inj_virq: IRQ 0xec", "kvm_inj_virq: IRQ 0x27"


def by_vcpu(at):
    """A request that the processor of the guest submits, and that is done when its kick
    returns."""
    return [(*VCPU, at, KICK), (*VCPU, at + 60e-6, SIGNAL), (*VCPU, at + 130e-6, SUBMITTED),
            (*VCPU, at + 210e-6, COMPLETE), (*VCPU, at + 240e-6, SIGNAL),
            (*VCPU, at + 250e-6, INTERRUPT), (*VCPU, at + 290e-6, INJECTION),
            (*VCPU, at + 300e-6, ENTRY)]


def by_iothread(at):
    """One that an iothread serves, whose interrupt has to wait for the timer's."""
    return [(*VCPU, at, KICK), (*VCPU, at + 70e-6, SIGNAL),
            (*VCPU, at + 80e-6, "sched_waking: comm=IO d1t pid=314 prio=120 target_cpu=000"),
            (*VCPU, at + 90e-6, ENTRY),
            (*IDLE, at + 180e-6, "sched_switch: prev_comm=swapper/0 prev_pid=0 prev_prio=120 "
                                 "prev_state=R ==> next_comm=IO d1t next_pid=314 next_prio=120"),
            (*IOTHREAD, at + 480e-6, SUBMITTED), (*IOTHREAD, at + 580e-6, COMPLETE),
            (*IOTHREAD, at + 680e-6, "sys_write(fd: 0x42, buf: 0x5649851d7310, count: 8)"),
            (*IOTHREAD, at + 690e-6, INTERRUPT), (*VCPU, at + 700e-6, TIMER),
            (*VCPU, at + 710e-6, ENTRY), (*VCPU, at + 900e-6, INJECTION),
            (*VCPU, at + 910e-6, ENTRY)]


class Stages(unittest.TestCase):
    """The stages of one request, microseconds."""

    def check(self, request, path, expected):
        """Of some requests that are a millisecond apart, the last incomplete."""
        events = [event for number in range(4) for event in request(1 + number * 1e-3)]
        found = Trace(lines(events), path, in_guest=True).stages()
        self.assertEqual(len(found), 3)
        for each in found:
            self.assertEqual({stage: round(time) for stage, time in each.items()}, expected)
            self.assertEqual(round(sum(each.values())), 1000)

    def test_vcpu_serves(self):
        """Nobody is woken; the time of the guest goes on to its next kick."""
        self.check(by_vcpu, "vhost-blk", {
            "kick": 60, "submit": 70, "device": 80, "used ring": 30, "signal": 10,
            "injection": 50, "guest": 700})

    def test_iothread_serves(self):
        """The entry that counts is that with the request's own interrupt."""
        self.check(by_iothread, "virtio-blk/iothread/io_uring", {
            "kick": 70, "server's wake-up": 110, "submit": 300, "device": 100, "used ring": 100,
            "signal": 10, "injection": 220, "guest": 90})

    def test_interrupt_without_kvm(self):
        """Where the processor takes the interrupt by itself, the next entry counts."""
        self.check(lambda at: [event for event in by_vcpu(at) if event[3] != INJECTION],
                   "vhost-blk", {
                       "kick": 60, "submit": 70, "device": 80, "used ring": 30, "signal": 10,
                       "injection": 50, "guest": 700})

    def test_polled(self):
        """What the iothread found without a kick has no beginning, nor has what came before
        it an end."""
        events = [event for number in range(6) for event in by_iothread(1 + number * 1e-3)
                  if number != 3 or event[3] != SIGNAL]
        found = Trace(lines(events), "virtio-blk/iothread/io_uring", in_guest=True).stages()
        self.assertEqual(len(found), 3)

    def test_who_takes_and_who_submits(self):
        """The worker is woken by the kick, another thread submits for it; both serve."""
        worker, other = ("vhost-300", 330), ("kworker/0:1", 40)

        def request(at):
            return [(*VCPU, at, KICK), (*VCPU, at + 60e-6, SIGNAL),
                    (*VCPU, at + 65e-6, "sched_waking: comm=vhost-300 pid=330 prio=120"),
                    (*IDLE, at + 100e-6, "sched_switch: prev_pid=0 ==> next_comm=vhost-300 next_pid=330"),
                    (*worker, at + 120e-6, "vb_fetch: (vhost_get_vq_desc_n+0x4/0x10)"),
                    (*worker, at + 130e-6, "sched_waking: comm=kworker/0:1 pid=40 prio=120"),
                    (*other, at + 200e-6, SUBMITTED), (*other, at + 300e-6, COMPLETE),
                    (*worker, at + 400e-6, SIGNAL), (*worker, at + 405e-6, INTERRUPT),
                    (*VCPU, at + 450e-6, INJECTION), (*VCPU, at + 455e-6, ENTRY)]

        events = [event for number in range(4) for event in request(1 + number * 1e-3)]
        trace = Trace(lines(events), "vhost-scsi/iblock", in_guest=True)
        self.assertEqual({stage: round(time) for stage, time in trace.stages()[0].items()}, {
            "kick": 60, "server's wake-up": 40, "fetch": 20, "submit": 80, "device": 100,
            "used ring": 100, "signal": 5, "injection": 50, "guest": 545})
        self.assertEqual(2, trace.per_request("sched_waking", lambda event: event.field("pid")))

    def test_tool(self):
        """What a request need not have is not looked for behind what it must have."""
        front, server = ("bench-0", 2084), ("vhost-2080", 2090)

        def request(at):
            return [(*front, at, "sys_write(fd: 8, buf: 0x7f6cc75fd880, count: 8)"),
                    (*front, at + 10e-6, "sched_waking: comm=vhost-2080 pid=2090 prio=120"),
                    (*server, at + 60e-6, SUBMITTED), (*server, at + 90e-6, COMPLETE),
                    (*server, at + 100e-6, SIGNAL),
                    (*server, at + 105e-6, "sched_waking: comm=bench-0 pid=2084 prio=120"),
                    (*front, at + 200e-6, "sys_read -> 0x8"),
                    (*IDLE, at + 300e-6, "sched_switch: prev_comm=swapper/0 prev_pid=0 ==> "
                                         "next_comm=vhost-2080 next_pid=2090 next_prio=120")]

        events = [event for number in range(4) for event in request(1 + number * 1e-3)]
        found = Trace(lines(events), "vhost-blk/worker").stages()
        self.assertEqual(len(found), 3)
        self.assertEqual({stage: round(time) for stage, time in found[0].items()}, {
            "kick": 10, "submit": 50, "device": 30, "used ring": 10, "signal": 5, "return": 95})


if __name__ == "__main__":
    unittest.main()
