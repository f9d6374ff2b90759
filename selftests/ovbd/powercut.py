#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""The power goes while `ovbd commit` or `ovbd commit --fold-back` runs: before each of the system calls by which it changes
something, and at random moments. Nothing reaches the disk any more from then on (dm-flakey), whatever is in memory is lost,
and the files that are on it make the device again, with all writes that were flushed. Where the kernel has dm-log-writes, so
do disks that also lack what they had and was not flushed."""

import os
import random
import signal
import subprocess
import sys
import time

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
import syscall_steps
from block_devices import read_direct, sectors
from numbered_writes import SIZE, Model, Writer, moment
from ovbd_command import MIB, empty_layer, listed, ovbd, ovbd_fails, settled
from test_script import OVBD, SCRATCH, Tap, load, run
from write_log import WriteLog

# Every so many steps, so that a few minutes suffice; 1 is all of them.
STRIDE = int(os.environ.get("OVBD_STEP_STRIDE", "17"))
# Folding back, too, where there is the time.
FOLDS = STRIDE == 1
MOMENTS = int(os.environ.get("OVBD_MOMENTS", "3"))
DISK, TOP = SCRATCH / "disk", SCRATCH / "top"
LOG, REPLAYED = SCRATCH / "log", SCRATCH / "replayed"
LOG_BYTES = 768 * MIB


class Machine:
    """A disk with layers and a store on it, a device of these, and a writer that flushes each write."""

    def __init__(self, base):
        with open(DISK, "wb") as file:
            file.truncate(96 * MIB)
        self._loop = run("losetup", "--find", "--show", DISK).strip()
        self._map("create")
        run("mkfs.ext4", "-q", "-E", "nodiscard", "/dev/mapper/disk")
        self._mount()
        self.base, self.cow, self.out = TOP / "base.layer", TOP / "cow", TOP / "out.layer"
        run("cp", base, self.base)
        run("sync", "--file-system", TOP)
        self.durable, self.folds = None, False
        self.device = ovbd("up", "--writable", "--cow", self.cow, "cut", self.base).strip()
        self.writer = Writer(self.device, flush=True)
        self.writer.start()
        self.wait_for_writes(20)

    def wait_for_writes(self, count):
        wanted = self.writer.acknowledged + count
        while self.writer.acknowledged < wanted:
            time.sleep(0.005)

    def _map(self, verb, *features):
        up, down = (0, 3600) if features else (3600, 0)
        table = f"0 {sectors(self._loop)} flakey {self._loop} 0 {up} {down}"
        run("dmsetup", verb, "disk", "--table", " ".join([table, *features]))

    def _mount(self):
        TOP.mkdir(exist_ok=True)
        run("mount", "/dev/mapper/disk", TOP)

    def cut(self):
        """From now on nothing gets to the disk."""
        self.durable = self.writer.acknowledged
        self._map("load", "1", "drop_writes")
        run("dmsetup", "suspend", "--nolockfs", "--noflush", "disk")
        run("dmsetup", "resume", "disk")

    def start_again(self):
        """Whatever is not on the disk is forgotten."""
        self.writer.stop()
        ovbd("down", "cut")
        run("umount", TOP)
        run("dmsetup", "remove", "--retry", "disk")
        self._map("create")
        self._mount()

    def recovered(self, model):
        """What is wrong with the device that the files make, or None."""
        ways = [[self.base]]
        if self.out.exists():
            ways.append([self.base, self.out])
        found = []
        for layers in ways:
            status, error = ovbd_fails("up", "--writable", "--cow", self.cow, "cut", *layers)
            if status:
                # A layer is noted before it gets its name, and from then on the store below may be gone.
                if layers is ways[-1]:
                    return f"{len(layers)} layers: {error}"
                continue
            found.append(moment(read_direct(self.device, 0, SIZE), model))
            if self.folds and listed("cut")["frozen"]:
                # Whatever was folded back by then.
                ovbd("commit", "--fold-back", "cut")
                found.append(moment(read_direct(self.device, 0, SIZE), model))
            ovbd("down", "cut")
        limit = self.writer.acknowledged + 1
        wrong = [n for n in found if not isinstance(n, int) or not self.durable <= n <= limit]
        return f"{wrong}, wanted {self.durable} to {limit}" if wrong else None

    def remove(self):
        run("umount", TOP)
        run("dmsetup", "remove", "--retry", "disk")
        run("losetup", "--detach", self._loop)


class Logged(Machine):
    """One of which it is noted what gets to the disk, and when that is flushed."""

    def __init__(self, base):
        with open(LOG, "wb") as file:
            file.truncate(LOG_BYTES)
        self._log = run("losetup", "--find", "--show", LOG).strip()
        super().__init__(base)

    def _map(self, verb):
        run("dmsetup", verb, "disk", "--table", f"0 {sectors(self._loop)} log-writes {self._loop} {self._log}")

    def mark(self):
        """Notes which writes are on the disk at least."""
        run("dmsetup", "message", "disk", "0", "mark", self.writer.acknowledged)

    def end(self):
        self.writer.stop()
        ovbd("down", "cut")
        self.remove()
        run("losetup", "--detach", self._log)

    def start_with(self, disk, durable):
        """Starts the machine with a disk that has so many writes."""
        run("cp", "--sparse=always", disk, DISK)
        self.durable = durable
        self._loop = run("losetup", "--find", "--show", DISK).strip()
        super()._map("create")
        self._mount()


def commit(machine):
    return [OVBD, "commit", "-q", "-o", machine.out, "cut"]


def fold_back(machine):
    machine.folds = True
    ovbd("commit", "--snapshot-only", "cut")
    machine.wait_for_writes(100)
    return [OVBD, "commit", "--fold-back", "cut"]


def at_a_step(base, model, action, number):
    """The power goes before a step of a commit or the like. Returns its name, None where there are fewer steps, and what is
    wrong."""
    machine = Machine(base)
    try:
        steps, status = syscall_steps.run(action(machine), number, machine.cut)
        if status is not None:
            machine.cut()
        machine.start_again()
        wrong = machine.recovered(model)
        if status is None:
            return steps[number], wrong
        return None, wrong or (f"exit status {status}" if status else None)
    finally:
        machine.remove()


def at_a_moment(base, model, action, delay):
    machine = Machine(base)
    try:
        process = subprocess.Popen(action(machine), stderr=subprocess.DEVNULL)
        time.sleep(delay)
        machine.cut()
        process.send_signal(signal.SIGKILL)
        process.wait()
        machine.start_again()
        return machine.recovered(model)
    finally:
        machine.remove()


def without_what_was_not_flushed(base, model, action, generator, count):
    """A commit or the like, and what is wrong with `count` of the disks that a power cut may have left of it."""
    machine = Logged(base)
    command = action(machine)
    machine.mark()
    process = subprocess.Popen(command)
    while process.poll() is None:
        machine.mark()
    machine.end()
    log, wrong = WriteLog(LOG), []
    if process.returncode:
        return [f"exit status {process.returncode}"]
    marks = log.marks()
    *marks, (_, last) = marks
    # Without it the log was too small, and has not everything.
    assert last == "dm-log-writes-end", last
    ends = sorted(generator.randrange(marks[0][0] + 1, len(log)) for _ in range(count))
    done = 0
    with open(REPLAYED, "w+b") as disk:
        disk.truncate(DISK.stat().st_size)
        for end in ends:
            log.replay(disk, done, end)
            done = end
            machine.start_with(REPLAYED, max(int(mark) for number, mark in marks if number < end))
            if why := machine.recovered(model):
                wrong.append(f"after entry {end} of {len(log)}: {why}")
            machine.remove()
    print(f"# {len(log)} entries of dm-log-writes, {len(marks)} marks", flush=True)
    LOG.unlink()
    REPLAYED.unlink()
    return wrong


def check(tap, base, model, action, what):
    """The power goes at steps, and at random moments, of what `action` begins."""
    names, wrong, number = {}, [], 0
    while True:
        start = time.monotonic()
        name, why = at_a_step(base, model, action, number)
        if why:
            wrong.append(f"step {number} ({name}): {why}")
        if name is None:
            break
        names[name] = names.get(name, 0) + 1
        number += STRIDE
    whole = time.monotonic() - start
    tap.equal(wrong, [], f"the power goes at {sum(names.values())} steps of {what}")
    tap.result(len(names) > 2, "steps of several kinds", names)
    print("# " + ", ".join(f"{name} {count}" for name, count in sorted(names.items())), flush=True)
    generator = random.Random(50)
    wrong = []
    for number in range(MOMENTS):
        delay = generator.uniform(0, whole / 2)
        why = at_a_moment(base, model, action, delay)
        if why:
            wrong.append(f"after {delay * 1000:.0f} ms: {why}")
    tap.equal(wrong, [], f"the power goes at {MOMENTS} random moments of {what}")
    if "log-writes" in run("dmsetup", "targets"):
        tap.equal(without_what_was_not_flushed(base, model, action, generator, 4 * MOMENTS), [],
                  f"{4 * MOMENTS} disks of {what}, without what was not flushed")
    else:
        print("# this kernel has no dm-log-writes", flush=True)


tap = Tap()
load("loop", "dm-overlaybd", "dm-zfile")
base = empty_layer(SIZE)
model = Model()
check(tap, base, model, commit, "a commit")
if FOLDS:
    check(tap, base, model, fold_back, "folding back")
tap.equal(settled([]), [], "nothing is left")
tap.finish()
