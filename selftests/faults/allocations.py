#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Every allocation of loading a table, activating it, status, messages and reads fails once: each time there is an
error or the right result, and afterwards everything works and nothing is lost."""

import os
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
import dm_ioctl
from block_devices import Devices, read_direct
from debug_kernel import Nth, no_leaks, quiet_faults, require, unload
from target_images import BYTES, Images
from test_script import Tap, load

STATUS = {"info": 0, "table": dm_ioctl.TABLE, "ima": dm_ioctl.IMA}


class Walk:
    """The walks over one device."""

    def __init__(self, tap, name, table, content):
        self.tap, self.name, self.table, self.content = tap, name, table, content
        self.nth = Nth()

    def report(self, what, count, wrong):
        # A walk that made nothing fail has tested nothing.
        self.tap.result(count > 0 and not wrong, f"{self.name}: {what}, {count} failed allocations", wrong[:5])

    def load(self, mapped):
        wrong, refused = [], []

        def after(result):
            if isinstance(result, OSError):
                refused.append(result)
            elif result is not None:
                wrong.append(result)

        count = self.nth.walk(lambda: None, lambda _: mapped.load(self.table), after)
        self.report("load", count, wrong)
        self.tap.result(len(refused) > 1, f"{self.name}: most of these are refusals", len(refused))

    def activate(self, mapped):
        wrong = []

        def after(result):
            if isinstance(result, OSError):
                # What was loaded is still there, or has to be loaded again.
                mapped.reload(self.table)
            if read_direct(mapped.node, 4096, 4096) != self.content[4096:8192]:
                wrong.append("other bytes")

        count = self.nth.walk(lambda: mapped.load(self.table), lambda _: mapped.resume(), after)
        self.report("activate", count, wrong)

    def status(self, mapped):
        for what, flags in STATUS.items():
            wrong, right = [], mapped.status(flags).split()[2:3]
            after = lambda result: isinstance(result, (OSError, str)) or wrong.append(result)
            count = self.nth.walk(lambda: None, lambda _: mapped.status(flags), after)
            self.report(f"status {what}", count, wrong)
            self.tap.equal(mapped.status(flags).split()[2:3], right, f"{self.name}: status {what} afterwards")
        message = "stats" if self.table.split()[2] == "zfile" else "lookup 8"
        wrong = []
        after = lambda result: isinstance(result, (OSError, str)) or wrong.append(result)
        self.report("message", self.nth.walk(lambda: None, lambda _: mapped.message(message), after), wrong)

    def reads(self, mapped):
        """A fresh table for each read, so that no cache has the block."""
        for offset, length in ((0, 4096), (4096 + 512, 1024), (65536, 262144)):
            wrong = []

            def after(result):
                if isinstance(result, bytes) and result != self.content[offset:offset + length]:
                    wrong.append(f"other bytes at {offset}")

            prepare = lambda: mapped.reload(self.table)
            count = self.nth.walk(prepare, lambda _: read_direct(mapped.node, offset, length), after)
            self.report(f"direct read of {length} bytes", count, wrong)
        wrong = []

        def buffered(_):
            with open(mapped.node, "rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                return file.read(65536)

        def after(result):
            if isinstance(result, bytes) and result != self.content[:len(result)]:
                wrong.append("other bytes")

        self.report("buffered read", self.nth.walk(lambda: None, buffered, after), wrong)
        wrong = [at for at in range(0, BYTES, 1 << 18)
                 if read_direct(mapped.node, at, 1 << 18) != self.content[at:at + (1 << 18)]]
        self.tap.equal(wrong, [], f"{self.name}: everything is read afterwards")


require("failslab", "fail_page_alloc", "kmemleak")
tap = Tap()
load("loop", "dm-zfile", "dm-overlaybd")
quiet_faults()
images = Images()
with no_leaks(tap, "failed allocations"):
    for name in Images.NAMES:
        with Devices() as devices:
            table = images.table(devices, name)
            mapped = devices.mapped("walk", table)
            walk = Walk(tap, name, table, images.content)
            walk.load(mapped)
            walk.activate(mapped)
            walk.status(mapped)
            walk.reads(mapped)
    unload(tap, "dm-overlaybd", "dm-zfile")
tap.finish()
