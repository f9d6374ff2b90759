#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Lazily pulled stacks for OVBD_SOAK seconds, under readers that compare every byte: at random moments the process that fetches is
killed and another one goes on, the registry is silent, refuses, breaks off or sends something else, and the store is there from
the time before or not. Reads may take long or fail; none is wrong, and in the end all is there."""

import contextlib
import os
import pathlib
import random
import signal
import sys
import time

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
from lazy_stacks import Readers, differs, done, down, is_local, process_of, pull, run_tests, store, ublk_devices
from ovbd_command import existing, ovbd, settled
from test_script import Tap, run

SECONDS = float(os.environ.get("OVBD_SOAK", "20"))
SEED = os.environ.get("OVBD_SEED", "soak")


def is_left(name):
    """Whether the process that fetches a stack is no more, and had not done all."""
    try:
        # Of a dead process that nobody has waited for too there is no program.
        os.readlink(f"/proc/{process_of(name)}/exe")
    except FileNotFoundError:
        return pathlib.Path(f"/run/ovbd/{name}.fetch").exists()
    return False


class Trouble:
    """What happens to one stack while it is fetched."""

    def __init__(self, generator, image, how, digests):
        self.generator, self.image, self.how, self.digests = generator, image, how, digests
        self.counts = dict.fromkeys(("killed", "silent", "refused", "wrong"), 0)

    def once(self):
        """One kind of trouble, for a moment."""
        kind = self.generator.choice(list(self.counts))
        self.counts[kind] += 1
        moment = self.generator.uniform(0.02, 0.4)
        if kind == "killed":
            with contextlib.suppress(OSError, KeyError):
                os.kill(process_of("soak"), signal.SIGKILL)
            time.sleep(moment)
            self.go_on()
        elif kind == "silent":
            self.how.silent.set()
            time.sleep(moment)
            self.how.silent.clear()
        elif kind == "refused":
            self.how.status = self.generator.choice([401, 404, 429, 500, 503])
            time.sleep(moment)
            self.how.status = None
        else:
            self.how.wrong = {self.generator.choice(self.digests): self.generator.randrange(1 << 20)}
            time.sleep(moment)
            self.how.wrong = {}

    def go_on(self):
        """Does what is left to do where the process was killed, be it only after the last layer was handed over."""
        if is_left("soak"):
            pull("soak", self.image, *OPTIONS)


OPTIONS = ("--io-timeout", "30", "--jobs", "2")


def soak(tap, image, how):
    generator, before = random.Random(SEED), existing()
    digests = [digest for digest, blob in how.blobs.items() if len(blob) > 1 << 20]
    end, stacks, reads, errors, counts = time.monotonic() + SECONDS, 0, 0, 0, {}
    while time.monotonic() < end:
        how.delay = generator.uniform(0, 0.1)
        if generator.random() < 0.5:
            run("rm", "-rf", store("soak"))
        device = pull("soak", image, *OPTIONS)
        trouble = Trouble(generator, image, how, digests)
        with Readers(device, image.bytes) as readers:
            while not is_local("soak") and ublk_devices() and time.monotonic() < end + 60:
                time.sleep(generator.uniform(0, 0.3))
                trouble.once()
            how.delay = 0
            trouble.go_on()
            done("soak")
        for kind, count in trouble.counts.items():
            counts[kind] = counts.get(kind, 0) + count
        stacks, reads, errors = stacks + 1, reads + readers.reads, errors + readers.errors
        different = differs(device, image.bytes)
        if readers.wrong or different is not None:
            return tap.result(False, f"stack {stacks}: bytes are wrong", f"{readers.wrong[:5]} {different}")
        if generator.random() < 0.3:
            ovbd("rmi", "--store", store("soak"), image.reference)
        down("soak")
    tap.result(True, f"{stacks} stacks, {reads} reads, none wrong, {errors} failed; {counts}")
    tap.equal((settled(before), ublk_devices()), (before, []), "nothing is left")


tap = Tap()
run_tests(tap, (soak,))
tap.finish()
