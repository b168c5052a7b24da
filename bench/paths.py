# SPDX-License-Identifier: GPL-2.0
"""The ways to a disk: what each of them needs in the host, and what QEMU and the
tool are told."""

import json
import os
import re
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "../tests/host"))
# pylint: disable=wrong-import-position
from daemon import StorageDaemon
from disks import Disk, Loop, NullBlk, settle, sh, write
from cells import NULL_BLK

MIB = 1 << 20
# null_blk keeps no data and needs no memory; the others are filled once, since
# reading what was never written takes another way.
NULL_SIZE, SIZE = 1024, 64


class RamDisk(Disk):
    """One of brd's disks; they are made at once, and go with the last."""

    used = 0

    def __init__(self, many=16):
        if not RamDisk.used:
            sh("modprobe", "brd", f"rd_nr={many}", f"rd_size={SIZE * 1024}")
        self.path = f"/dev/ram{RamDisk.used}"
        RamDisk.used += 1
        self.wait()

    def close(self):
        RamDisk.used -= 1
        if not RamDisk.used:
            settle(30)
            sh("rmmod", "brd")


class NvmeLoop(Disk):
    """A disk of the NVMe driver, over nvmet in the same kernel, on a RAM disk."""

    FOLDER = "/sys/kernel/config/nvmet"
    NAME = "vhost-blk-bench"

    def __init__(self):
        self.lower = RamDisk()
        sh("modprobe", "nvmet")
        sh("modprobe", "nvme-loop")
        if not os.path.ismount("/sys/kernel/config"):
            sh("mount", "-t", "configfs", "configfs", "/sys/kernel/config")
        subsystem = f"{self.FOLDER}/subsystems/{self.NAME}"
        os.mkdir(subsystem)
        write(f"{subsystem}/attr_allow_any_host", 1)
        os.mkdir(f"{subsystem}/namespaces/1")
        write(f"{subsystem}/namespaces/1/device_path", self.lower.path)
        write(f"{subsystem}/namespaces/1/enable", 1)
        os.mkdir(f"{self.FOLDER}/ports/1")
        write(f"{self.FOLDER}/ports/1/addr_trtype", "loop")
        os.symlink(subsystem, f"{self.FOLDER}/ports/1/subsystems/{self.NAME}")
        before = set(os.listdir("/sys/block"))
        with open("/dev/nvme-fabrics", "w", encoding="ascii") as file:
            file.write(f"transport=loop,nqn={self.NAME}")
        deadline = time.monotonic() + 30
        while not (new := [name for name in set(os.listdir("/sys/block")) - before
                           if re.fullmatch(r"nvme\d+n\d+", name)]):
            if time.monotonic() > deadline:
                raise RuntimeError("nvme-loop gives no disk")
            time.sleep(0.1)
        self.path = f"/dev/{new[0]}"
        self.wait()

    def close(self):
        controller = re.match(r"(/dev/)?(nvme\d+)", self.path).group(2)
        write(f"/sys/class/nvme/{controller}/delete_controller", 1)
        os.unlink(f"{self.FOLDER}/ports/1/subsystems/{self.NAME}")
        os.rmdir(f"{self.FOLDER}/ports/1")
        subsystem = f"{self.FOLDER}/subsystems/{self.NAME}"
        write(f"{subsystem}/namespaces/1/enable", 0)
        os.rmdir(f"{subsystem}/namespaces/1")
        os.rmdir(subsystem)
        self.lower.close()


def make_disk(name):
    """A disk by the name that cells call it by."""
    if name in NULL_BLK:
        irqmode, nsec = NULL_BLK[name]
        return NullBlk(NULL_SIZE, irqmode=irqmode, nsec=nsec, memory_backed=0,
                       queues=1 if irqmode == 1 else 2)
    disk = {"brd": RamDisk, "loop": lambda: Loop(SIZE), "nvme-loop": NvmeLoop}[name]()
    try:
        sh("dd", "if=/dev/zero", f"of={disk.path}", "bs=1M", f"count={SIZE}", "oflag=direct",
           "status=none")
    except RuntimeError:
        disk.close()
        raise
    return disk


class Server(StorageDaemon):
    """qemu-storage-daemon with a disk, for vhost-user-blk."""

    # The adaptive polling of QEMU's iothreads.
    POLLING = {"vhost-user-blk": "", "vhost-user-blk/nopoll": ",poll-max-ns=0"}

    def __init__(self, path, disk, work, queues, program="qemu-storage-daemon"):
        # Several of them, and other paths, have the disk open: no locks.
        super().__init__(f"{work}/{path.replace('/', '-')}-{os.path.basename(disk)}.sock", disk,
                         iothread=self.POLLING[path], blockdev=",locking=off",
                         export=f",writable=on,num-queues={queues}", program=program)


class ScsiTarget:
    """A LUN of vhost-scsi on a block device, by the kernel's SCSI target."""

    CONFIG = "/sys/kernel/config/target"

    def __init__(self, disk, number):
        sh("modprobe", "-a", "target_core_mod", "target_core_iblock", "vhost_scsi")
        if not os.path.ismount("/sys/kernel/config"):
            sh("mount", "-t", "configfs", "configfs", "/sys/kernel/config")
        self.wwpn = f"naa.500140500000{number:04x}"
        self.store = f"{self.CONFIG}/core/iblock_{number}/disk"
        self.fabric = f"{self.CONFIG}/vhost/{self.wwpn}"
        self.group = f"{self.fabric}/tpgt_1"
        os.makedirs(self.store)
        write(f"{self.store}/control", f"udev_path={disk}")
        write(f"{self.store}/enable", 1)
        os.makedirs(f"{self.group}/lun/lun_0")
        write(f"{self.group}/nexus", f"naa.500140510000{number:04x}")
        os.symlink(self.store, f"{self.group}/lun/lun_0/disk")

    def close(self):
        """Remove it; QEMU has ended."""
        os.unlink(f"{self.group}/lun/lun_0/disk")
        os.rmdir(f"{self.group}/lun/lun_0")
        write(f"{self.group}/nexus", "NULL")
        for folder in (self.group, self.fabric, f"{self.CONFIG}/vhost", self.store,
                       os.path.dirname(self.store)):
            try:
                os.rmdir(folder)
            except OSError:
                continue


class GuestPath:
    """A disk of the guest on one of the paths.

    args: QEMU's. serves: what the names of the threads that serve it begin with,
    a regular expression. block: the disk's name in the guest, once found.
    server: the process that they are of, if it is not QEMU.
    """

    def __init__(self, name, number, disk, queues, work):
        self.name, self.disk = name, disk
        self.id = f"d{number}"
        self.args, self.held, self.server, self.block, self.serves = [], [], None, None, ""
        kind, *rest = name.split("/")
        getattr(self, "_" + kind.replace("-", "_"))(rest, number, queues, work)

    def close(self):
        """Remove what was made in the host."""
        for each in self.held:
            each.close()

    def _node(self, aio):
        self.args += ["-blockdev", f"driver=host_device,node-name={self.id},"
                                   f"filename={self.disk.path},cache.direct=on,aio={aio}"]

    def _vhost_blk(self, _rest, _number, queues, _work):
        self._node("io_uring")
        self.args += ["-device", f"vhost-blk-pci,drive={self.id},num-queues={queues},"
                                 f"serial={self.id}"]
        self.serves = "vhost-"

    def _virtio_blk(self, rest, _number, queues, _work):
        self._node("native" if "native" in rest else "io_uring")
        device = {"driver": "virtio-blk-pci", "drive": self.id, "num-queues": queues,
                  "serial": self.id}
        polling = ",poll-max-ns=0" if "nopoll" in rest else ""
        if "iothread" in rest:
            self.args += ["-object", f"iothread,id={self.id}t{polling}"]
            device["iothread"] = f"{self.id}t"
        elif "iothread-vq-mapping" in rest:
            device["iothread-vq-mapping"] = []
            for number in range(queues):
                self.args += ["-object", f"iothread,id={self.id}t{number}{polling}"]
                device["iothread-vq-mapping"].append({"iothread": f"{self.id}t{number}"})
        # Otherwise QEMU's main thread serves it, whose name is the program's.
        threads = "iothread" in rest or "iothread-vq-mapping" in rest
        self.serves = f"IO {self.id}t|iou-" if threads else "qemu-system|iou-"
        if "ioeventfd-off" in rest:
            device["ioeventfd"] = False
            # A processor of the guest does part of it, and is not counted here.
        self.args += ["-device", json.dumps(device)]

    def _vhost_scsi(self, _rest, number, queues, _work):
        target = ScsiTarget(self.disk.path, number)
        self.held.append(target)
        self.args += ["-device", f"vhost-scsi-pci,wwpn={target.wwpn},num_queues={queues}"]
        self.serves = "vhost-"

    def _vhost_user_blk(self, _rest, _number, queues, work):
        self.server = Server(self.name, self.disk.path, work, queues)
        self.held.append(self.server)
        self.args += ["-chardev", f"socket,id={self.id}s,path={self.server.socket}",
                      "-device", f"vhost-user-blk-pci,chardev={self.id}s,num-queues={queues}"]
        self.serves = ""

    def find(self, vm, taken):
        """The name of the disk in the guest; not one of those in `taken`."""
        if self.name.startswith("vhost-scsi"):
            # They have no serial number.
            vm.run("modprobe virtio_scsi; modprobe sd_mod; sleep 2")
            command = "ls -d /sys/block/sd*"
        elif self.name.startswith("vhost-user-blk"):
            # The daemon gives every disk the same one.
            command = "grep -l vhost_user_blk /sys/block/vd*/serial"
        else:
            command = f"grep -lx {self.id} /sys/block/vd*/serial"
        names = [path.split("/")[3] for path in vm.run(command).split()]
        return [name for name in names if name not in taken][0]
