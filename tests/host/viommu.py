# SPDX-License-Identifier: GPL-2.0
"""Tests of a disk behind a vIOMMU, which the guest uses for DMA."""

import os
import socket
import time

from disks import NullBlk
from ktap import Test, expect, say
from vm import Guest

OPTIONS = None

INTEL = ["-device", "intel-iommu,intremap=on,device-iotlb=on"]
VIRTIO = ["-device", "virtio-iommu-pci"]
FIO = ("fio --name=data --ioengine=libaio --direct=1 --verify=crc32c --verify_fatal=1 --randseed=7 "
       "--minimal --rw=randwrite --bsrange=4k-64k --bs_unaligned=0 --iodepth=16 --size=4m")


def find(vm):
    """The disk's name, after checks that the guest's IOMMU has it."""
    name = vm.block("viommu")
    device = f"/sys/block/{name}/device"
    # Bit 33, VIRTIO_F_ACCESS_PLATFORM.
    expect("the feature", vm.run(f"cut -c34 {device}/features"), "1")
    group = vm.run(f"readlink -f {device}/../iommu_group")
    domain = vm.run(f"cat {group}/type")
    if not domain.startswith("DMA"):
        raise AssertionError(f"its IOMMU domain is of type {domain}")
    say(f"{name}: in {group}, a domain of type {domain}")
    return name


def found(vm):
    """As find(), after a boot. The firmware had the disk before the guest's IOMMU was on, which may have
    been a fault: forget what was logged by then."""
    name = find(vm)
    vm.run("dmesg -c > /dev/null")
    return name


def rebind(vm, name):
    """Unbind the driver under load, twice, and bind it again."""
    device = vm.run(f"basename $(readlink -f /sys/block/{name}/device)")
    vm.run(f"(fio --name=load --filename=/dev/{name} --rw=randread --ioengine=libaio --direct=1 "
           "--bs=4k --iodepth=16 --time_based --runtime=600 > /dev/null 2>&1 &) ; sleep 2")
    drivers = "/sys/bus/virtio/drivers/virtio_blk"
    for _ in range(2):
        vm.run(f"echo {device} > {drivers}/unbind; sleep 1; echo {device} > {drivers}/bind")
    vm.run("killall -9 fio; i=0; while pidof fio > /dev/null; do "
           "i=$((i + 1)); [ $i -lt 300 ] || exit 1; sleep 0.1; done")


def stop_and_go(vm, name):
    """QMP stop and cont while fio writes and verifies."""
    command = f"{FIO} --filename=/dev/{name} --offset=8m --do_verify=1 --loops=2"
    vm.send(command)
    for _ in range(5):
        time.sleep(1)
        vm.qmp("stop")
        time.sleep(0.5)
        vm.qmp("cont")
    status, output = vm.finish(command, 300)
    expect("fio's status", (status, output if status else ""), (0, ""))


def check_logs(vm):
    """The guest's IOMMU reports no fault, but that of the rings that the firmware had."""
    faults = vm.run("dmesg | grep -E 'DMAR:.*fault|viommu.*fault' | head", check=False)
    expect("faults", faults[1], "")


def behind(iommu, append, device, more):
    """A test of a guest whose disk is behind an IOMMU; with `more`, it begins anew more often."""
    def run():
        # More virtqueues than the guest has processors to use them with.
        disk_args = ("vhost-blk-pci,drive=node0,serial=viommu,num-queues=4,disable-legacy=on,"
                     f"iommu_platform=on{device}")
        with NullBlk(irqmode=2) as disk, \
                Guest("viommu", OPTIONS.qemu, OPTIONS.work, OPTIONS.kernel, OPTIONS.initrd,
                      [*iommu, "-blockdev", f"driver=host_device,node-name=node0,filename={disk.path},"
                       "cache.direct=on", "-device", disk_args],
                      append=append, machine="q35,kernel-irqchip=split") as vm:
            vm.start()
            name = found(vm)
            vm.run(f"{FIO} --filename=/dev/{name} --do_verify=1")
            stop_and_go(vm, name)
            rebind(vm, name)
            name = find(vm)
            vm.run(f"{FIO} --filename=/dev/{name} --verify_only")
            check_logs(vm)
            for again in ("reboot", "reset", "reboot") if more else ("reboot",):
                vm.run(f"(fio --name=load --filename=/dev/{name} --rw=randwrite --ioengine=libaio "
                       "--direct=1 --bs=4k --offset=32m --iodepth=16 --time_based --runtime=600 "
                       "> /dev/null 2>&1 &) ; sleep 2")
                if again == "reboot":
                    vm.send("reboot -f")
                else:
                    vm.qmp("system_reset")
                vm.wait_ready()
                name = found(vm)
                vm.run(f"{FIO} --filename=/dev/{name} --verify_only")
                check_logs(vm)
            vm.shut_down()
    return run


class Driver:
    """A driver of virtio that is no guest: it works on the device's registers by QEMU's qtest protocol."""

    BAR = 0xe0000000
    STATUS = 0x14

    def __init__(self, path, slot):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(path)
        self.replies = self.socket.makefile()
        # Where its registers are, and that it may be used.
        for register, value in ((0x20, self.BAR), (0x24, 0), (0x04, 6)):
            self.ask(f"outl 0xcf8 {0x80000000 | slot << 11 | register:#x}")
            self.ask(f"outl 0xcfc {value:#x}")

    def ask(self, command):
        """Send a command; returns the reply."""
        self.socket.sendall(command.encode() + b"\n")
        reply = self.replies.readline().split()
        expect(command, reply[:1], ["OK"])
        return reply[1:]

    def write(self, size, register, value):
        """Write a register of the common configuration; size: b, w or l."""
        self.ask(f"write{size} {self.BAR + register:#x} {value:#x}")

    def status(self):
        """The device's status."""
        return int(self.ask(f"readb {self.BAR + self.STATUS:#x}")[0], 16)

    def start(self, rings):
        """Reset the device and start it with one virtqueue, whose three parts are at these addresses."""
        self.write("b", self.STATUS, 0)
        self.write("b", self.STATUS, 3)
        # VERSION_1 and ACCESS_PLATFORM.
        for select, features in ((0, 0), (1, 3)):
            self.write("l", 0x08, select)
            self.write("l", 0x0c, features)
        self.write("b", self.STATUS, 0xb)
        for number, address in enumerate(rings):
            self.write("l", 0x20 + 8 * number, address & 0xffffffff)
            self.write("l", 0x24 + 8 * number, address >> 32)
        self.write("w", 0x1c, 1)
        self.write("b", self.STATUS, 0xf)


def test_rings():
    """A driver puts rings where its IOMMU maps nothing, and at the end of the address space: QEMU loses nothing."""
    with NullBlk() as disk, \
            Guest("rings", OPTIONS.qemu, OPTIONS.work, accel="qtest", machine="q35", memory="64M", args=[
                *VIRTIO, "-qtest", f"unix:{OPTIONS.work}/rings/qtest,server=on,wait=off", "-qtest-log", "none",
                "-blockdev", f"driver=host_device,node-name=node0,filename={disk.path}",
                "-device", "vhost-blk-pci,drive=node0,addr=0x10,num-queues=1,disable-legacy=on,"
                "iommu_platform=on"]) as vm:
        vm.launch()
        driver = Driver(f"{vm.dir}/qtest", 0x10)
        files = []
        for _ in range(8):
            driver.start((0x10000, 0x11000, 1 << 40))
            expect("the status without a used ring", driver.status(), 0x4f)
            files.append(len(os.listdir(f"/proc/{vm.process.pid}/fd")))
        expect("open files", len(set(files)), 1)
        driver.start((0x10000, 0xfffffffffffff000, 0x12000))
        expect("the status", driver.status(), 0xf)
        vm.qmp("stop")
        vm.qmp("cont")
        expect("the status after a stop", driver.status(), 0xf)


STRICT = "iommu.passthrough=0 iommu.strict=1"
TESTS = [
    test_rings,
    Test("a disk behind an Intel IOMMU: verified I/O, stop and cont, unbind and bind, reboot",
         behind(INTEL, f"intel_iommu=on,sm_off {STRICT}", ",ats=on", False)),
    Test("an Intel IOMMU with deferred invalidation, without ATS, and resets",
         behind(INTEL, "intel_iommu=on,sm_off iommu.passthrough=0 iommu.strict=0", "", True), long=True),
    Test("a virtio IOMMU, and resets",
         behind(VIRTIO, STRICT, "", True), long=True),
]
