# SPDX-License-Identifier: GPL-2.0
"""What bench/goals.py says of measurements: each cell that misses a goal is named."""

import unittest

import goals


def cell(path, cpu, busy, wakeups=0.1, iops=1000):
    """A cell of results.json: a guest, 4 KiB random reads at depth 1."""
    return {"name": f"guest/disk/randread-4k-d1/{path}", "frontend": "guest", "disk": "disk",
            "rw": "randread", "bs": 4096, "iodepth": 1, "flush": False, "path": path,
            "host_cpu_us_per_req": cpu, "host_busy_us_per_req": busy, "wakeups_per_req": wakeups,
            "iops_median": iops, "iops_min": iops - 10, "iops_max": iops + 10}


class Guest(unittest.TestCase):
    """Goals in a guest."""

    def check(self, *cells):
        """The goals that are missed, by the beginning of their text."""
        found = goals.check({"cells": cells})
        self.assertEqual(len(found), 4)
        return {goal.text.split(",")[0]: goal.missed for goal in found if goal.missed}

    def test_reached(self):
        """The limits themselves are enough."""
        self.assertEqual({}, self.check(cell("vhost-blk", 25, 90, wakeups=1, iops=990),
                                        cell("virtio-blk/iothread/native", 100, 100)))

    def test_missed(self):
        """Each is missed by itself, with the cell and the ratio."""
        name = "guest/disk/randread-4k-d1"
        missed = self.check(cell("vhost-blk", 30, 110, wakeups=1.5, iops=500),
                            cell("virtio-blk/iothread/native", 100, 100),
                            cell("vhost-scsi/iblock", 20, 120, iops=1250))
        self.assertEqual(missed, {
            "guest: CPU of who serves": [(name, "", 0.3)],
            "guest: CPU of the host outside of the guest": [(name, "", 1.1)],
            "guest: wake-ups of who serves for a request at depth 1: at most 1": [(name, "", 1.5)],
            "guest: IOPS not below any path's": [(name, "vhost-scsi/iblock", 0.4),
                                                 (name, "virtio-blk/iothread/native", 0.5)]})


if __name__ == "__main__":
    unittest.main()
