#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Lower devices that fail, come and go, become shorter or change: the constructor refuses, or reads fail with EIO and
are right otherwise; nothing is lost and the modules unload."""

import contextlib
import errno
import fcntl
import os
import pathlib
import subprocess
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
import dm_ioctl
from block_devices import Devices, sectors
from debug_kernel import DEBUG, attribute, no_leaks, unload
from reader_threads import Readers
from target_images import Images
from test_script import Tap, load, run

LOOP_SET_CAPACITY = 0x4C07


def has_target(name):
    subprocess.run(["modprobe", f"dm-{name}"], stderr=subprocess.DEVNULL)
    return any(line.split()[0] == name for line in run("dmsetup", "targets").splitlines())


class Below:
    """Puts a device of some kind over every loop device; remembers what it made."""

    def __init__(self, devices, kind):
        self.devices, self.kind, self.made = devices, kind, []

    def __call__(self, loop):
        words = {"linear": f"{loop} 0", "flakey": f"{loop} 0 1 1", "dust": f"{loop} 0 512"}[self.kind]
        device = self.devices.mapped(f"below{len(self.made)}", f"0 {sectors(loop)} {self.kind} {words}")
        self.made.append((device, loop))
        return device.node


def errors_instead(below, run_of):
    """Replaces sectors of the lower devices by the error target: `run_of(sectors)` says which."""
    for device, loop in below.made:
        size = sectors(loop)
        device.reload(dm_ioctl.with_errors(loop, size, [run_of(size)]))


def constructors(tap, images):
    """Header, trailer, index or jump table cannot be read."""
    for name in ("lz4", "zstd", "plain stack"):
        places = (("everything", lambda size: (0, size)), ("the first sectors", lambda size: (0, 8)),
                  ("the last sectors", lambda size: (size - 9, 9)),
                  ("all but the first and last sectors", lambda size: (8, size - 16)))
        for what, place in places:
            with Devices() as devices:
                below = Below(devices, "linear")
                table = images.table(devices, name, below)
                errors_instead(below, place)
                try:
                    mapped = devices.mapped("refused", table)
                except OSError as error:
                    tap.equal(error.errno, errno.EIO, f"{name}: {what} cannot be read: refused")
                    continue
                # The metadata of a file that is final in its header is not in its last sectors.
                with Readers(mapped.node, images.content) as readers:
                    readers.wait(20)
                tap.result(readers.only(errno.EIO), f"{name}: {what} cannot be read: EIO or the right bytes", readers)


def flaky(tap, images):
    """Down for every other second, while there are reads."""
    for name in Images.NAMES:
        with Devices() as devices:
            below = Below(devices, "linear")
            table = images.table(devices, name, below)
            mapped = devices.mapped("flaky", table)
            with Readers(mapped.node, images.content) as readers:
                readers.wait(20)
                for device, loop in below.made:
                    device.reload(f"0 {sectors(loop)} flakey {loop} 0 0 1")
                readers.wait(20)
                for device, loop in below.made:
                    device.reload(f"0 {sectors(loop)} linear {loop} 0")
                readers.wait(20)
            tap.result(readers.some_failed(), f"{name}: dm-flakey below fails reads for a while", readers)
            with Readers(mapped.node, images.content) as readers:
                readers.wait(40)
            tap.result(readers.only(), f"{name}: reads are right afterwards", readers)


def dust(tap, images):
    """Single bad sectors of the data."""
    for name in Images.NAMES:
        with Devices() as devices:
            below = Below(devices, "dust")
            table = images.table(devices, name, below)
            mapped = devices.mapped("dusty", table)
            for device, loop in below.made:
                for sector in range(16, sectors(loop) - 600, 97):
                    device.message(f"addbadblock {sector}")
                device.message("enable")
            with Readers(mapped.node, images.content) as readers:
                readers.wait(200)
            tap.result(readers.some_failed(), f"{name}: dm-dust below fails some sectors", readers)


def failing_requests(tap, images):
    """One in five requests to the loop devices fails."""
    for name in Images.NAMES:
        with Devices() as devices:
            loops = []
            table = images.table(devices, name, lambda loop: loops.append(loop) or loop)
            mapped = devices.mapped("failing", table)
            for loop in loops:
                pathlib.Path(f"/sys/block/{os.path.basename(loop)}/make-it-fail").write_text("1")
            attribute("fail_make_request", probability=20, times=-1, verbose=0)
            with Readers(mapped.node, images.content) as readers:
                readers.wait(200)
            attribute("fail_make_request", probability=0)
            tap.result(readers.some_failed(), f"{name}: failing requests below", readers)


def changed(tap, images):
    """Other bytes in the lower device after the table was loaded: CRCs notice, and without them nothing breaks."""
    for name in Images.NAMES:
        with Devices() as devices:
            table = images.table(devices, name)
            mapped = devices.mapped("changed", table)
            files = [images.path(n) for n in (name, name.replace("stack", "0"), name.replace("stack", "1"))
                     if n in images.names()]
            saved = [path.read_bytes() for path in files]
            with Readers(mapped.node, images.content) as readers:
                readers.wait(20)
                for path, data in zip(files, saved):
                    with open(path, "r+b") as file:
                        # Data, index and trailer alike: what was loaded from them is in memory.
                        for at in range(8192, len(data) - 64, 40000):
                            file.seek(at)
                            file.write(os.urandom(64))
                readers.wait(60)
            if name == "plain stack":
                # Nothing can notice here, but only data may differ.
                tap.result(not readers.errors, f"{name}: changed below, still read", readers)
            else:
                tap.result(readers.only(errno.EIO) and readers.errors, f"{name}: changed below, CRCs notice", readers)
            for path, data in zip(files, saved):
                path.write_bytes(data)


def shorter(tap, images):
    """The lower device loses its second half."""
    for name in Images.NAMES:
        with Devices() as devices:
            loops = []
            table = images.table(devices, name, lambda loop: loops.append(loop) or loop)
            mapped = devices.mapped("shorter", table)
            saved = {}
            with Readers(mapped.node, images.content) as readers:
                readers.wait(20)
                for loop in loops:
                    path = pathlib.Path(f"/sys/block/{os.path.basename(loop)}/loop/backing_file").read_text().strip()
                    saved[path] = pathlib.Path(path).read_bytes()
                    os.truncate(path, len(saved[path]) // 1024 * 512)
                    with open(loop, "rb") as device:
                        fcntl.ioctl(device, LOOP_SET_CAPACITY)
                readers.wait(60)
            tap.result(readers.only(errno.EIO) and readers.errors, f"{name}: shorter below", readers)
            for path, data in saved.items():
                pathlib.Path(path).write_bytes(data)


tap = Tap()
load("loop", "dm-zfile", "dm-overlaybd")
images = Images()
leaks = no_leaks(tap, "failing lower devices") if (DEBUG / "kmemleak").exists() else contextlib.nullcontext()
with leaks:
    constructors(tap, images)
    for target, test in (("flakey", flaky), ("dust", dust)):
        if has_target(target):
            test(tap, images)
        else:
            tap.skip(f"dm-{target} below", f"this kernel has no dm-{target}")
    if (DEBUG / "fail_make_request").exists():
        failing_requests(tap, images)
    else:
        tap.skip("failing requests below", "this kernel has no fail_make_request")
    changed(tap, images)
    shorter(tap, images)
    unload(tap, "dm-overlaybd", "dm-zfile")
tap.finish()
