# SPDX-License-Identifier: GPL-2.0
"""Tests of a disk behind a vIOMMU, which the guest uses for DMA."""

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


STRICT = "iommu.passthrough=0 iommu.strict=1"
TESTS = [
    Test("a disk behind an Intel IOMMU: verified I/O, stop and cont, unbind and bind, reboot",
         behind(INTEL, f"intel_iommu=on,sm_off {STRICT}", ",ats=on", False)),
    Test("an Intel IOMMU with deferred invalidation, without ATS, and resets",
         behind(INTEL, "intel_iommu=on,sm_off iommu.passthrough=0 iommu.strict=0", "", True), long=True),
    Test("a virtio IOMMU, and resets",
         behind(VIRTIO, STRICT, "", True), long=True),
]
