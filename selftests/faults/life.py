#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""A device under load: its table is reloaded, it is suspended with and without flushing, replaced by errors, waited
for, and removed; the modules refuse to unload all the while. Reads are right or fail as they must."""

import errno
import os
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
import dm_ioctl
from block_devices import DMSETUP, Devices, read_direct
from reader_threads import Readers
from target_images import BYTES, Images
from test_script import CommandFailed, Tap, load, run

ROUNDS = 15


def refuses_unload(module):
    return subprocess.run(["rmmod", module], stderr=subprocess.DEVNULL).returncode != 0


def check(tap, name, devices, table, content):
    module = "dm-zfile" if table.split()[2] == "zfile" else "dm-overlaybd"
    mapped = devices.mapped("life", table)
    with Readers(mapped.node, content) as readers:
        for _ in range(ROUNDS):
            readers.wait(5)
            mapped.reload(table)
    tap.result(readers.only() and readers.good, f"{name}: reads while the table is reloaded", readers)

    for what, flags in (("flush", 0), ("noflush", dm_ioctl.NOFLUSH)):
        with Readers(mapped.node, content) as readers:
            for _ in range(ROUNDS):
                readers.wait(5)
                mapped.suspend(flags)
                mapped.resume()
        tap.result(readers.only() and readers.good, f"{name}: reads over suspend ({what}) and resume", readers)

    with Readers(mapped.node, content) as readers:
        refused = [refuses_unload(module) for _ in range(5)]
        for flags in (0, dm_ioctl.TABLE, dm_ioctl.IMA) * ROUNDS:
            mapped.status(flags)
    tap.result(all(refused) and readers.only(), f"{name}: {module} stays loaded under load", readers)

    event = int(run("dmsetup", "info", "-c", "--noheadings", "-o", "events", "life"))
    waiter = threading.Thread(target=mapped.wait, args=(event,), daemon=True)
    waiter.start()
    with Readers(mapped.node, content) as readers:
        readers.wait(20)
        run("dmsetup", "rename", "life", "renamed")
        waiter.join(60)
        tap.result(not waiter.is_alive() and readers.only(), f"{name}: an event wait under load ends with a new name",
                   readers)
    run("dmsetup", "rename", "renamed", "life")

    with Readers(mapped.node, content) as readers:
        readers.wait(20)
        mapped.reload(f"0 {BYTES // 512} error")
        readers.wait(20)
        mapped.reload(table)
        readers.wait(20)
    tap.result(readers.some_failed(), f"{name}: replaced by errors and back", readers)
    tap.result(read_direct(mapped.node, 0, 65536) == content[:65536], f"{name}: reads afterwards")


def removal(tap, name, devices, table, content):
    """`remove` fails while the device is open; `--deferred` and `--force` work at once."""
    mapped = devices.mapped("gone", table)
    holder = os.open(mapped.node, os.O_RDONLY)
    try:
        run(*DMSETUP, "remove", "gone")
        tap.result(False, f"{name}: an open device is not removed")
    except CommandFailed:
        tap.result(True, f"{name}: an open device is not removed")
    with Readers(mapped.node, content) as readers:
        readers.wait(10)
        run(*DMSETUP, "remove", "--deferred", "gone")
        readers.wait(10)
    tap.result(readers.only(errno.ENXIO, errno.ENOENT), f"{name}: removal deferred under load", readers)
    os.close(holder)
    # device-mapper removes it from a worker.
    for _ in range(100):
        if not os.path.exists("/sys/block/" + os.path.basename(mapped.node)):
            break
        time.sleep(0.1)
    tap.result(not os.path.exists("/sys/block/" + os.path.basename(mapped.node)), f"{name}: gone with the last user")

    mapped = devices.mapped("gone", table)
    with Readers(mapped.node, content) as readers:
        readers.wait(10)
        # Replaces the table by errors, then fails to remove the open device.
        subprocess.run([*DMSETUP, "remove", "--force", "gone"], stderr=subprocess.DEVNULL)
        readers.wait(10)
    tap.result(readers.only(errno.EIO, errno.ENXIO, errno.ENOENT), f"{name}: removal by force under load", readers)


tap = Tap()
load("loop", "dm-zfile", "dm-overlaybd")
images = Images()
for name in Images.NAMES:
    with Devices() as devices:
        table = images.table(devices, name)
        check(tap, name, devices, table, images.content)
        removal(tap, name, devices, table, images.content)
tap.finish()
