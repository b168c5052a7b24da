#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""The demo's part in the host: a guest with a disk on vhost-blk and an equal
one on QEMU's virtio-blk; a look at both, and a small measurement."""

import argparse
import json
import os
import re
import select
import socket
import statistics
import sys
import time

import measure
from disks import NullBlk, sh
from vm import Guest, GuestError, GuestSilent, native_kvm

ROUNDS = 3
SECONDS = 2
WORKLOADS = [("read", 1), ("read", 32), ("write", 1), ("write", 32)]


def step(text):
    """A line of progress, with the time since the demo's start."""
    t = int(time.time() - float(os.environ.get("VHOST_BLK_START", time.time())))
    print(f"[{t // 60:3d}:{t % 60:02d}] {text}", flush=True)


class Path:
    """A way from the guest to a disk, and the threads of QEMU that serve it."""

    def __init__(self, name, disk, threads):
        self.name = name
        self.disk = disk
        self.threads = re.compile(threads)
        self.block = None
        self.results = {}
        self.forget()

    def forget(self):
        """Drop what was measured."""
        self.results = {workload: [] for workload in WORKLOADS}

    def measure(self, vm, workload):
        """Run fio in the guest once; keep IOPS, latency and CPU per request."""
        kind, depth = workload
        pid = vm.process.pid
        before, requests = measure.threads(pid, self.threads), measure.requests(self.disk.path)
        output = vm.run("fio --name=demo --ioengine=libaio --direct=1 --norandommap --bs=4k "
                        f"--rw=rand{kind} --iodepth={depth} --filename=/dev/{self.block} "
                        f"--time_based --runtime={SECONDS} --output-format=json", 120)
        cpu, _, _ = measure.used(before, measure.threads(pid, self.threads))
        requests = measure.requests(self.disk.path) - requests
        job = json.loads(output[output.index("{"):output.rindex("}") + 1])["jobs"][0][kind]
        if not requests or not cpu:
            raise GuestError(f"{self.name}: {requests} requests, {cpu} ns of CPU time counted")
        self.results[workload].append(
            (job["iops"], job["lat_ns"]["mean"] / 1000, cpu / requests / 1000))


def table(paths):
    """Print medians, and the smallest and the largest in brackets."""
    print()
    print(f"4 KiB random, {ROUNDS} alternating runs of {SECONDS} s each: median (smallest-largest)")
    print(f"{'':16}{'':26}{'IOPS':>22}{'latency, us':>26}{'host CPU/request, us':>26}")
    for kind, depth in WORKLOADS:
        title = f"{kind}, depth {depth}"
        for path in paths:
            cells = ""
            for column, width in ((0, 22), (1, 26), (2, 26)):
                values = [result[column] for result in path.results[kind, depth]]
                text = (f"{statistics.median(values):.0f} "
                        f"({min(values):.0f}-{max(values):.0f})")
                cells += f"{text:>{width}}"
            print(f"{title:16}{path.name:26}{cells}")
            title = ""
    print()
    print("host CPU/request: CPU time of the threads that serve the disk (vhost's worker; QEMU's")
    print("iothread, which polls adaptively, QEMU's default), by the requests that the disk counted.")
    if not native_kvm():
        print("This host is emulated: IOPS and latency rank nothing here, they show how busy the")
        print("emulator was. The CPU time per request is what can be compared.")


def verified(vm, path):
    """Write in the guest, read back there and, with O_DIRECT, in the host."""
    digest = vm.run(f"dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null && "
                    f"dd if=/tmp/data of=/dev/{path.block} bs=64k oflag=direct conv=fsync "
                    "2>/dev/null && sha256sum < /tmp/data").split()[0]
    again = vm.run(f"dd if=/dev/{path.block} bs=64k count=128 iflag=direct 2>/dev/null "
                   "| sha256sum").split()[0]
    host = sh("sh", "-c", f"dd if={path.disk.path} bs=64k count=128 iflag=direct status=none "
              "| sha256sum").split()[0]
    print(f"  written in the guest   {digest}")
    print(f"  read in the guest      {again}")
    print(f"  read in the host       {host}")
    if len({digest, again, host}) != 1:
        raise GuestError("what was read is not what was written")


def relay(vm, port, ready):
    """Connect the guest's serial console with a port of the host.

    Ends when the guest does, or when the file `ready` has gone.
    """
    console = socket.socket(socket.AF_UNIX)
    console.connect(f"{vm.dir}/shell")
    terminal = os.open(port, os.O_RDWR)
    console.sendall(b"\n")
    while vm.process.poll() is None and os.path.exists(ready):
        readable, _, _ = select.select([console, terminal], [], [], 1)
        if console in readable:
            data = console.recv(4096)
            if not data:
                break
            os.write(terminal, data)
        if terminal in readable:
            data = os.read(terminal, 4096)
            if data:
                console.sendall(data)
            else:
                time.sleep(0.2)  # nobody is at the other end
    os.close(terminal)


def show(options, args, vhost, virtio):
    """Start the guest, show its disks, check one, and measure both."""
    step("starting a guest with two disks: one on vhost-blk, one on QEMU's virtio-blk")
    with Guest("demo", options.qemu, options.work, options.kernel, options.initrd, args,
               append="vb.shell" if options.shell else "", shell=bool(options.shell)) as vm:
        vm.start()
        step("the guest is up; its view of the disks:")
        for path, serial in ((vhost, "vhost-blk"), (virtio, "virtio-blk")):
            path.block = vm.block(serial)
            path.forget()
        print(vm.run("uname -sr; lsblk -o NAME,SIZE,TYPE,LOG-SEC,PHY-SEC,RO; "
                     "grep . /sys/block/vd*/serial /sys/block/vd*/cache_type"))

        step("8 MiB of random data through vhost-blk:")
        verified(vm, vhost)

        step(f"4 KiB random reads and writes, {ROUNDS} rounds")
        for number in range(ROUNDS):
            for workload in WORKLOADS:
                # Each goes first in turn.
                for path in (vhost, virtio) if number % 2 else (virtio, vhost):
                    path.measure(vm, workload)
            step(f"  round {number + 1} of {ROUNDS}")
        table([vhost, virtio])

        if options.shell:
            with open(options.ready, "w", encoding="ascii"):
                pass  # says to tests/demo that it can connect
            relay(vm, options.shell, options.ready)
        else:
            vm.shut_down()


def main():
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--module", "--qemu", "--kernel", "--initrd", "--work"):
        parser.add_argument(name, required=True)
    parser.add_argument("--shell", help="a port of the host to offer a shell in the guest on")
    parser.add_argument("--ready", help="a file to make when the shell is there")
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)

    step(f"in the host: Linux {os.uname().release}, {os.cpu_count()} processors, "
         f"{'KVM' if native_kvm() else 'emulated'}; loading vhost-blk.ko")
    sh("modprobe", "vhost")
    sh("insmod", options.module)
    print("  " + sh("sh", "-c", "dmesg | grep 'vhost_blk:' | tail -n 1").strip())

    # Completed from a timer's interrupt, as real devices do.
    disks = [NullBlk(256, irqmode=2, nsec=20000) for _ in range(2)]
    vhost = Path("vhost-blk", disks[0], "vhost-")
    virtio = Path("QEMU virtio-blk, iothread", disks[1], "IO iothread0|iou-")
    args = [
        "-object", "iothread,id=iothread0",
        "-blockdev", f"driver=host_device,node-name=vhost,filename={disks[0].path},"
                     "cache.direct=on,aio=io_uring",
        "-blockdev", f"driver=host_device,node-name=virtio,filename={disks[1].path},"
                     "cache.direct=on,aio=io_uring",
        # As many descriptors as QEMU's own disk offers its guest.
        "-device", "vhost-blk-pci,drive=vhost,num-queues=2,queue-size=1024,serial=vhost-blk",
        "-device", "virtio-blk-pci,drive=virtio,num-queues=2,serial=virtio-blk,iothread=iothread0",
    ]
    try:
        show(options, args, vhost, virtio)
    except GuestSilent as problem:
        if native_kvm():
            raise
        step(f"the guest does not answer: {problem}")
        step("emulated guests hang now and then, on QEMU's own disks too; once more from its start")
        show(options, args, vhost, virtio)
    for disk in disks:
        disk.close()
    sh("rmmod", "vhost_blk")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (GuestError, RuntimeError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(1)
