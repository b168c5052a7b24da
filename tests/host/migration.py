# SPDX-License-Identifier: GPL-2.0
"""Tests of live migration: a guest that moves from one QEMU to another on this host, and its disk with it."""

import os
import time

import devices
import ktap
from disks import NullBlk, sh
from ktap import say
from vm import Guest, GuestError, QmpError

OPTIONS = None
PAIR = None

FIO = ("fio --name=load --ioengine=libaio --direct=1 --verify=crc32c --verify_fatal=1 "
       "--rw=randwrite --bs=4k --iodepth=16 --size=4m --numjobs=2 --offset_increment=8m "
       "--minimal")

# Writes and verifies, each time with another content, until told to stop. A block that was not written is one
# of another seed.
LOAD = (f"rm -f /tmp/stop /tmp/result; (n=1; r=0; while [ ! -e /tmp/stop ] && [ $r = 0 ]; do "
        f"echo $n > /tmp/round; {FIO} --filename=/dev/%s --randseed=$n --do_verify=1 "
        "--verify_backlog=128 > /tmp/load 2>&1; r=$?; n=$((n + 1)); done; "
        "echo $r > /tmp/result) &")

# A guest writes little memory, but the host is slow.
PARAMETERS = {"max-bandwidth": 10 ** 10, "downtime-limit": 5000}


class Pair:
    """Two QEMUs that have the same disk, of which one runs the guest."""

    def __init__(self):
        self.disk = NullBlk(64, irqmode=2, nsec=200000)
        self.here, self.there = self.qemu("first"), self.qemu("second")
        self.block = None

    def qemu(self, name, device="num-queues=2", disk=None):
        """A QEMU with the disk, or another one."""
        args = ["-blockdev", "driver=host_device,node-name=node0,"
                f"filename={(disk or self.disk).path},cache.direct=on",
                "-device", f"vhost-blk-pci,id=disk0,drive=node0,serial=moving,{device}"]
        return Guest(f"migration-{name}", OPTIONS.qemu, OPTIONS.work, OPTIONS.kernel,
                     OPTIONS.initrd, args, memory="256M")

    def start(self):
        """The QEMU that runs the guest, under load."""
        vm = self.here
        if vm.process is None or vm.process.poll() is not None:
            vm.start()
            self.block = vm.block("moving")
            vm.run(LOAD % self.block)
            time.sleep(2)
        return vm

    def begin(self, target, **parameters):
        """Start a target, and the migration to it. Keywords: other parameters, with _ for -."""
        target.launch("-incoming", f"unix:{target.dir}/migration")
        parameters = PARAMETERS | {name.replace("_", "-"): value
                                   for name, value in parameters.items()}
        self.here.qmp("migrate-set-parameters", **parameters)
        self.here.qmp("migrate", uri=f"unix:{target.dir}/migration")

    def wait(self, *states, timeout=120):
        """Wait for one of these states of the migration; returns what QEMU says of it."""
        deadline = time.monotonic() + timeout
        while True:
            info = self.here.qmp("query-migrate")
            if info.get("status") in states:
                return info
            if info.get("status") in ("completed", "failed", "cancelled") \
                    or time.monotonic() > deadline:
                raise GuestError(f"migration: {info}, expected to be {states}")
            time.sleep(0.1)

    def move(self):
        """Move the guest to the other QEMU, and end the one that it was in."""
        self.begin(self.there)
        info = self.wait("completed")
        self.there.wait_event("RESUME", 60)
        self.here.qmp("quit")
        self.here.wait_exit()
        self.here, self.there = self.there, self.here
        alive(self)
        return info

    def close(self):
        """End both and remove the disk."""
        for vm in (self.here, self.there):
            vm.kill()
        self.disk.close()


def pair():
    """The two QEMUs, the guest under load."""
    global PAIR
    PAIR = PAIR or Pair()
    PAIR.start()
    return PAIR


def explain():
    """Print what is known of both QEMUs."""
    if PAIR:
        for vm in (PAIR.here, PAIR.there):
            vm.explain()


def close():
    """End all."""
    global PAIR
    if PAIR:
        PAIR.close()
        PAIR = None


def alive(both):
    """The load in the guest goes on, without an error, and QEMU has none to report."""
    vm = both.here
    log = vm.qemu_log()
    if "vhost" in log:
        raise AssertionError(f"QEMU says: {log}")
    where = f"/sys/block/{both.block}/stat"
    before = vm.run(f"cat {where}")
    vm.run(f"i=0; while [ \"$(cat {where})\" = '{before}' ]; do "
           "i=$((i + 1)); [ $i -lt 100 ] || exit 1; sleep 0.1; done")
    status, output = vm.run("cat /tmp/result; cat /tmp/load", check=False)
    if status == 0 and vm.run("test -e /tmp/result", check=False)[0] == 0:
        raise AssertionError(f"the load has ended: {output}")


def claimed(disk):
    """Whether somebody claims the disk exclusively."""
    try:
        os.close(os.open(disk.path, os.O_RDWR | os.O_EXCL))
    except OSError:
        return True
    return False


def refused(vm, expect, command, **arguments):
    """QEMU refuses a command and says why."""
    try:
        vm.qmp(command, **arguments)
    except QmpError as error:
        if expect not in str(error):
            raise AssertionError(f"{error}, expected {expect!r}") from error
        return
    raise AssertionError(f"{command} was not refused")


def test_there_and_back():
    """Migration: the guest moves three times, there and back, while it writes and verifies."""
    both = pair()
    for _ in range(3):
        info = both.move()
        say(f"{info['total-time']} ms, down for {info['downtime']} ms, "
            f"{info['ram']['transferred'] >> 20} MiB, "
            f"{info['ram']['dirty-sync-count']} passes")


def test_cancelled():
    """Migration: it is cancelled; the source goes on, and the disk is still its own."""
    both = pair()
    both.begin(both.there, max_bandwidth=1 << 20)
    both.wait("active")
    time.sleep(2)
    if not claimed(both.disk):
        raise AssertionError("the source has given up its claim")
    both.here.qmp("migrate_cancel")
    both.wait("cancelled")
    both.there.kill()
    alive(both)


def test_failed():
    """Migration: the target fails when all was sent; 'cont' lets the source go on."""
    both = pair()
    other = both.qemu("other", "num-queues=1")
    try:
        both.begin(other)
        info = both.wait("completed", "failed")
        say(f"the source says: {info['status']}")
        other.process.wait(60)
    finally:
        other.kill()
    state = both.here.qmp("query-status")["status"]
    if state != "running":
        if claimed(both.disk):
            raise AssertionError("the source still claims the disk")
        both.here.qmp("cont")
    if not claimed(both.disk):
        raise AssertionError("the source does not claim the disk again")
    alive(both)


def test_claimed():
    """Migration: somebody else has claimed the target's disk; it fails, and the source goes on."""
    both = pair()
    capability = {"capability": "return-path", "state": True}
    # The source lets go of its own disk only just before.
    with NullBlk(64) as disk:
        other = both.qemu("claimed", disk=disk)
        claim = os.open(disk.path, os.O_RDONLY | os.O_EXCL)
        try:
            both.here.qmp("migrate-set-capabilities", capabilities=[capability])
            both.begin(other)
            both.wait("failed")
            other.process.wait(60)
        finally:
            os.close(claim)
            other.kill()
            both.here.qmp("migrate-set-capabilities", capabilities=[capability | {"state": False}])
    if "in use on the host" not in other.qemu_log():
        raise AssertionError(f"the target says: {other.qemu_log()}")
    state = both.here.qmp("query-status")["status"]
    if state != "running":
        raise AssertionError(f"the source is {state}")
    alive(both)


def test_postcopy():
    """Migration: a target with pin-memory=on refuses postcopy, and one without does not."""
    for device, expected in (("pin-memory=on", "pin-memory=on is not capable of postcopy"), ("pin-memory=off", None)):
        with NullBlk() as disk, \
                Guest("postcopy", OPTIONS.qemu, OPTIONS.work, accel="tcg", memory="64M",
                      args=["-blockdev", f"driver=host_device,node-name=node0,filename={disk.path}",
                            "-device", f"vhost-blk-pci,drive=node0,{device}", "-incoming", "defer"]) as vm:
            vm.launch()
            arguments = {"capabilities": [{"capability": "postcopy-ram", "state": True}]}
            if expected:
                refused(vm, expected, "migrate-set-capabilities", **arguments)
            else:
                vm.qmp("migrate-set-capabilities", **arguments)


def test_both():
    """Migration: while the target runs, the source cannot use the disk, nor a third QEMU."""
    both = pair()
    both.begin(both.there)
    both.wait("completed")
    both.there.wait_event("RESUME", 60)
    refused(both.here, "lock", "cont")
    both.here.qmp("quit")
    both.here.wait_exit()
    both.here, both.there = both.there, both.here
    alive(both)
    devices.qemu(*both.here.args, expect="lock")


def test_writeback():
    """Migration: the guest's choice of a writethrough cache moves with it."""
    both = pair()

    def cache():
        entry, = both.here.qmp("query-block")
        return entry["inserted"]["cache"]["writeback"]

    where = f"/sys/block/{both.block}/cache_type"
    for mode, writeback in (("write through", False), ("write back", True)):
        both.here.run(f"echo '{mode}' > {where}")
        if cache() != writeback:
            raise AssertionError(f"{mode}: QEMU says writeback={cache()}")
        both.move()
        if cache() != writeback or both.here.run(f"cat {where}") != mode:
            raise AssertionError(f"{mode}: after the move writeback={cache()}")


def test_bytes():
    """Migration: after all that the guest and, past its page cache, the host read what was written last."""
    both = pair()
    vm = both.here
    vm.run("touch /tmp/stop; while [ ! -e /tmp/result ]; do sleep 0.2; done; "
           "cat /tmp/load; exit $(cat /tmp/result)", 300)
    seed = vm.run("cat /tmp/round")
    say(f"rounds of writing and verifying: {seed}")
    verify = f"{FIO} --randseed={seed} --verify_only"
    vm.run(f"{verify} --filename=/dev/{both.block}")
    vm.shut_down()
    sh("sh", "-c", f"{verify} --filename={both.disk.path}", timeout=300)
    close()


def test_many():
    """Migration: the guest moves twenty times in a row while it writes and verifies."""
    both = pair()
    downtime = []
    for number in range(1, 21):
        downtime.append(both.move()["downtime"])
        say(f"move {number}: down for {downtime[-1]} ms")
    say(f"down for {min(downtime)} to {max(downtime)} ms")
    test_bytes()


TESTS = [test_postcopy, ktap.test(test_there_and_back, long=True), test_cancelled, test_failed, test_claimed, test_both,
         ktap.test(test_writeback, long=True), test_bytes, ktap.test(test_many, long=True)]
