#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""`ovbd commit` killed at any moment, and `ovbd commit --fold-back` before its steps, under a writer: the device goes on, the
next one has everything, and the files alone make the device again, with all writes that were acknowledged."""

import os
import random
import signal
import subprocess
import sys
import time

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
import syscall_steps
from block_devices import read_direct
from numbered_writes import SIZE, Model, Writer, moment
from ovbd_command import empty_layer, existing, listed, ovbd, ovbd_fails, settled
from test_script import OVBD, SCRATCH, Tap, load

KILLS = int(os.environ.get("OVBD_KILLS", "16"))
# Every so many steps of folding back, so that half a minute suffices; 1 is all of them.
STRIDE = int(os.environ.get("OVBD_STEP_STRIDE", "7"))
COW = SCRATCH / "cow"


class Crashes:
    """A stack, what was written to it, and what became of commits that were killed."""

    def __init__(self, tap):
        self._tap = tap
        self._generator = random.Random(22)
        self._model = Model()
        self._wrong = []
        self._seen = {}
        base = empty_layer(SIZE)
        self._layers = [base]
        self._device = ovbd("up", "--writable", "--cow", COW, "crash", base).strip()
        self._writer = Writer(self._device)
        self._writer.start()

    def _check(self, when, wanted):
        """The device has all writes up to one that was not acknowledged yet when it was looked at."""
        found = moment(read_direct(self._device, 0, SIZE), self._model)
        if found != wanted:
            self._wrong.append(f"{when}: {found}, wanted {wanted}")

    def _layers_now(self):
        return [layer["path"] for layer in listed("crash")["layers"]]

    def _state(self, out):
        parts = [name.removeprefix("crash-").rstrip("0123456789") for name in existing() if name.startswith("crash-")]
        counts = {part: parts.count(part) for part in ("cow", "lower", "probe", "zfile", "blob")}
        layers = len(self._layers_now()) - len(self._layers)
        return f"{counts['cow']} generations, {counts['lower']} below, {counts['probe']} probes, " \
               f"{len(list(SCRATCH.glob('cow*')))} stores, layer {'' if out.exists() else 'not '}made, " \
               f"{'on it' if layers else 'not on it'}"

    def _wait_for_writes(self, count, when):
        wanted, deadline = self._writer.acknowledged + count, time.monotonic() + 20
        while self._writer.acknowledged < wanted and time.monotonic() < deadline:
            time.sleep(0.01)
        if self._writer.acknowledged < wanted:
            self._wrong.append(f"{when}: the device does not go on")

    def commit_killed(self, number, longest):
        """Kills a commit, and goes on with what it left, or with the files alone."""
        out = SCRATCH / f"{number}.layer"
        process = subprocess.Popen([OVBD, "commit", "-q", "-o", str(out), "crash"], stderr=subprocess.DEVNULL)
        time.sleep(self._generator.uniform(0, longest))
        process.send_signal(signal.SIGKILL)
        process.wait()
        state = self._state(out)
        self._seen[state] = self._seen.get(state, 0) + 1
        # Also where the program died while the device was suspended.
        self._wait_for_writes(3, f"kill {number} ({state})")
        if number % 2:
            self._start_again(number, out, state)
        else:
            status, said = ovbd_fails("commit", "-o", SCRATCH / f"{number}.next.layer", "crash")
            if status:
                self._wrong.append(f"kill {number} ({state}): the next commit: {said}")
        self._layers = self._layers_now()

    def _start_again(self, number, out, state):
        """Nothing but the files is left."""
        self._writer.stop()
        layers = self._layers_now()
        ovbd("down", "crash")
        if out.exists() and str(out) not in layers:
            # The layer has its name and the store has not gone: both ways are right.
            ovbd("up", "--writable", "--cow", COW, "crash", *layers)
            self._check(f"kill {number} ({state}), without the layer", self._writer.acknowledged)
            ovbd("down", "crash")
            layers.append(str(out))
        ovbd("up", "--writable", "--cow", COW, "crash", *layers)
        self._check(f"kill {number} ({state}), from files", self._writer.acknowledged)
        self._writer = Writer(self._device, self._writer.acknowledged)
        self._writer.start()

    def fold_killed(self, number):
        """Kills a commit --fold-back before a step, and goes on with what it left, or with the files alone. Returns whether
        there was such a step."""
        ovbd("commit", "--snapshot-only", "crash")
        self._wait_for_writes(50, "before folding")
        steps, status = syscall_steps.run([OVBD, "commit", "--fold-back", "crash"], number)
        when = f"folding killed before step {number} ({steps[-1]})"
        self._wait_for_writes(3, when)
        if number % 2:
            self._writer.stop()
            layers = self._layers_now()
            ovbd("down", "crash")
            ovbd("up", "--writable", "--cow", COW, "crash", *layers)
            self._check(f"{when}, from files", self._writer.acknowledged)
            self._writer = Writer(self._device, self._writer.acknowledged)
            self._writer.start()
            self._wait_for_writes(3, when)
        # What is frozen is in a layer by itself only if it is of one moment.
        out, copy = SCRATCH / f"fold{number}.layer", SCRATCH / "copy"
        code, said = ovbd_fails("commit", "--continue", "-o", out, "crash")
        if code == 0:
            ovbd("export", "--force", "-o", copy, *self._layers_now())
            found = moment(copy.read_bytes(), self._model)
            said = "" if isinstance(found, int) else f"a layer of no moment: {found}"
        elif any(why in said for why in ("no commit was interrupted", "of no single moment", "is being folded back")):
            code, said = ovbd_fails("commit", "--fold-back", "crash")
            said = "" if code == 0 or "there is one generation" in said else said
        if said:
            self._wrong.append(f"{when}: {said}")
        state = f"folding, then {'--continue' if out.exists() else '--fold-back'}"
        self._seen[state] = self._seen.get(state, 0) + 1
        self._layers = self._layers_now()
        return status is None

    def finish(self):
        out = SCRATCH / "last.layer"
        self._writer.stop()
        ovbd("commit", "-o", out, "crash")
        self._tap.equal(self._writer.error, None, "the writer never failed")
        self._tap.equal(self._wrong, [], f"{KILLS} commits killed, and what folds back: nothing is lost")
        ovbd("export", "--force", "-o", SCRATCH / "copy", *self._layers_now())
        found = moment((SCRATCH / "copy").read_bytes(), self._model)
        self._tap.equal(found, self._writer.acknowledged, "the layers have all that was written")
        names = sorted(name for name in existing() if name.startswith(("crash-cow", "crash-lower", "crash-probe")))
        self._tap.equal(len(names), 2, f"one generation is left: {names}")
        self._tap.equal([path.name for path in SCRATCH.glob("cow*")], ["cow"], "one store is left, of the first name")
        for state, count in sorted(self._seen.items()):
            print(f"# {count} times: {state}", flush=True)
        ovbd("down", "crash")


tap = Tap()
load("loop", "dm-overlaybd", "dm-zfile")
crashes = Crashes(tap)
start = time.monotonic()
ovbd("commit", "-o", SCRATCH / "whole.layer", "crash")
longest = time.monotonic() - start
for number in range(KILLS):
    crashes.commit_killed(number, longest * 1.2)
step = 1
while crashes.fold_killed(step):
    step += STRIDE
tap.result(step > 15, f"folding back was killed before every {STRIDE}th of {step} steps", step)
crashes.finish()
tap.equal(settled([]), [], "nothing is left")
tap.finish()
