# SPDX-License-Identifier: GPL-2.0
"""qemu-storage-daemon, to compare with."""

import os
import subprocess
import time


class StorageDaemon:
    """qemu-storage-daemon that serves a disk by vhost-user-blk at `socket`.

    iothread, blockdev, export: more options of each, beginning with a comma.
    """

    def __init__(self, socket, disk, iothread="", blockdev="", export="",
                 program="qemu-storage-daemon"):
        self.socket = socket
        if os.path.exists(socket):
            os.unlink(socket)
        self.command = [
            program, "--object", f"iothread,id=thread{iothread}",
            "--blockdev", f"driver=host_device,node-name=disk,filename={disk},cache.direct=on,"
                          f"aio=io_uring{blockdev}",
            "--export", "type=vhost-user-blk,id=export,node-name=disk,iothread=thread,"
                        f"addr.type=unix,addr.path={socket}{export}"]
        with open(f"{socket}.log", "wb") as log:
            self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=log,
                                            stderr=log)
        deadline = time.monotonic() + 60
        while not os.path.exists(socket):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.close()
                with open(f"{socket}.log", encoding="utf-8", errors="replace") as log:
                    raise RuntimeError(f"qemu-storage-daemon does not start: {log.read()}")
            time.sleep(0.1)

    def close(self):
        """End it."""
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(20)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
