#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Suspend, resume and table reload under load, and the lifetime of the module."""

import os
import subprocess
import sys
import time

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
from block_devices import Devices, read_direct, sectors
from dm_ioctl import NOFLUSH, KernelLog, Mapped, Refused
from linear_twin import MODULE, load, loop, twin, unload, write_direct
from test_script import CommandFailed, Tap, run

KIB = 1 << 10
# linux/dm-ioctl.h: not to freeze the file system.
SKIP_LOCKFS = 1 << 10


def fails(tap, what, function, *arguments):
    """Passes where the kernel or a command refuses."""
    try:
        function(*arguments)
    except (CommandFailed, OSError):
        tap.result(True, what)
    else:
        tap.result(False, what)


def hooks(device):
    """How often presuspend, presuspend_undo, postsuspend, preresume and resume were called."""
    return " ".join(device.status().split()[6:11])


def reader(device, *options):
    """A process that reads the device, and writes what it read to its standard output."""
    command = ["dd", f"if={device.node}", "bs=64k", "iflag=direct", "status=none", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def check_end(tap, what, process, wanted):
    data, said = process.communicate(timeout=60)
    tap.result(process.returncode == 0 and data == wanted, what, said.decode(errors="replace"))


def check_hooks(tap):
    with twin(f"0 {length} rust-linear {lower} 0") as device:
        tap.equal(hooks(device), "0 0 0 1 1", "hooks after creation")
        device.suspend()
        tap.equal(hooks(device), "1 0 1 1 1", "hooks after suspend")
        device.resume()
        tap.equal(hooks(device), "1 0 1 2 2", "hooks after resume")
        device.suspend()
        late = reader(device)
        time.sleep(1)
        tap.equal(late.poll(), None, "a reader waits while suspended")
        device.resume()
        check_end(tap, "and reads the same after resume", late, content)
        device.suspend()
        device.message("fail_resume")
        fails(tap, "preresume refuses", device.resume)
        state = run("dmsetup", "info", "--columns", "--noheadings", "-o", "suspended", device.name)
        tap.equal(state.strip().lower(), "suspended", "the device stays suspended")
        tap.attempt("and resumes later", device.resume)


def check_requeue(tap):
    """Bios that ended while the device is suspended without flushing come back after the table was replaced."""
    run("modprobe", "dm-delay")
    with Mapped("t-slow", f"0 {length} delay {lower} 0 2000", readonly=False) as slow:
        with twin(f"0 {length} rust-linear {slow.node} 0 2 requeue 1000") as device:
            late = reader(device, "count=1")
            time.sleep(1)
            device.suspend(NOFLUSH | SKIP_LOCKFS)
            device.load(f"0 {length} rust-linear {lower} 0")
            device.resume()
            check_end(tap, "a requeued bio goes through the next table, with its data", late, content[:64 * KIB])


def write_and_read(node):
    """The load, which is a program of its own."""
    for _ in range(6):
        write_direct(node, content, 16 * KIB)
        got = b"".join(read_direct(node, at, 32 * KIB) for at in range(0, len(content), 32 * KIB))
        if got != content:
            raise OSError("other data")


def check_load(tap):
    """Tables of all kinds replace each other while somebody reads and writes."""
    with twin(f"0 {length} rust-linear {lower} 0") as device:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                write_and_read(device.node)
                status = 0
            finally:
                os._exit(status)
        reloads, ended, status = 0, 0, 0
        while not ended:
            for words in ("linear LOWER 0", "rust-linear LOWER 0 3 split 3 queue", "rust-linear LOWER 0 1 defer",
                          "rust-linear LOWER 0 2 split 16"):
                device.reload(f"0 {length} {words.replace('LOWER', lower)}")
                reloads += 1
            ended, status = os.waitpid(child, os.WNOHANG)
        tap.equal(status, 0, "load runs through table reloads")
        tap.result(reloads >= 4, "which all worked, at least four")
        print(f"# {reloads} reloads", flush=True)


def check_life(tap):
    """The module is in use as long as there is a target, active or not."""
    one = f"0 8 rust-linear {lower} 0"
    with twin(one) as device:
        fails(tap, "active target: module cannot be unloaded", unload)
        device.suspend()
        fails(tap, "suspended target: module cannot be unloaded", unload)
        device.resume()
        device.reload(f"0 8 linear {lower} 0")
        tap.attempt("target replaced: module unloads", unload)
        tap.attempt("and loads again", load)
        device.load(one)
        fails(tap, "target only loaded: module cannot be unloaded", unload)
        run("dmsetup", "clear", device.name)
        tap.attempt("table cleared: module unloads", unload)
    tap.attempt("loads again", load)
    for _ in range(3):
        try:
            twin(f"{one} 1 unknown", "t-bad").remove()
        except Refused:
            continue
        tap.result(False, "a constructor that fails")
    tap.equal(run("dmsetup", "ls").count("t-"), 0, "no device remains")
    tap.attempt("module unloads after failed constructors", unload)


tap = Tap()
log = KernelLog()
tap.attempt("module loads", load)
with Devices() as devices:
    content = os.urandom(2 << 20)
    lower, _ = loop(devices, content)
    length = sectors(lower)
    check_hooks(tap)
    check_requeue(tap)
    check_load(tap)
    check_life(tap)
    load()
    fails(tap, "the module cannot be loaded twice", run, "insmod", MODULE)
    unload()
    said = log.new()
    tap.result(not any(word in said for word in ("WARNING", "BUG", "Oops")), "no warning in the log", said)
tap.finish()
