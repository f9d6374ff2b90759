#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""How soon a program runs from an image in a registry that is 50 ms away and sends 20 MB/s: pulled and then run, pulled lazily,
with a trace of what is read first, and from an image that is here. `make bench-lazy` runs it with a Debian system.

Nothing has a limit here but bytes; times are printed, as ratios in the same run. OVBD_LAZY_TAR is the tar of the system.
"""

import os
import pathlib
import random
import statistics
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
from block_devices import read_direct
from lazy_stacks import done, down, is_local, run_tests, store, wait_until
from ovbd_command import listed, mounted, ovbd
from test_script import SCRATCH, Tap, run

TAR = os.environ.get("OVBD_LAZY_TAR")
ROUNDS = int(os.environ.get("OVBD_LAZY_ROUNDS", "1"))
# What runs first.
PROGRAM = ["/bin/sh", "-c", "python3 -c 'print(1)'"]
DELAY, RATE = 0.05, 20_000_000


def figure(what, value):
    """One line of the benchmark."""
    print(f"# {what}: {value}", flush=True)


def drop_caches():
    run("sync")
    pathlib.Path("/proc/sys/vm/drop_caches").write_text("3")


def first_program(device):
    """Mounts a stack and runs the program in it; what it prints."""
    with mounted(device, "-o", "ro") as top:
        return subprocess.run(["chroot", top, *PROGRAM], capture_output=True, text=True, check=True,
                              env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}).stdout


class Run:
    """How one way to get to the program went."""

    def __init__(self, how, make_device):
        how.sent, begun = 0, time.monotonic()
        device = make_device()
        self.mapped = time.monotonic() - begun
        self.said = first_program(device)
        self.seconds, self.sent = time.monotonic() - begun, how.sent


def without(name):
    """Nothing of an image is here."""
    run("rm", "-rf", store(name))
    drop_caches()


def pull(name, reference, *options):
    return ovbd("pull", "--lazy", "--store", store(name), "--up", name, *options, reference).strip()


def pull_all(name, reference):
    ovbd("pull", "--store", store(name), reference)
    return ovbd("up", "--store", store(name), name, reference).strip().splitlines()[-1]


def longest_read(name, reference, how):
    """The longest read while layers are handed over to their files, when nothing is missing any more, and after that."""
    how.delay, how.rate = 0.0, None
    without(name)
    device = pull(name, reference, "--trace", "12")
    with open(device, "rb") as file:
        size = file.seek(0, os.SEEK_END)
    took, stop = [], threading.Event()

    def read(seed):
        # It does not wait for processors that the process which fetches uses, and leaves it some.
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        generator = random.Random(seed)
        while not stop.is_set():
            begun = time.monotonic()
            read_direct(device, generator.randrange(size // 4096) * 4096, 4096)
            took.append((begun, time.monotonic() - begun))
            time.sleep(0.0005)

    wait_until("all is here", lambda: [layer["fetch"]["state"] for layer in listed(name)["layers"]] == ["local"])
    reader = threading.Thread(target=read, args=(name,))
    reader.start()
    begun = time.monotonic()
    done(name)
    handed = time.monotonic()
    time.sleep(handed - begun)
    stop.set()
    reader.join()
    down(name)
    during = max(seconds for at, seconds in took if at < handed)
    after = max(seconds for at, seconds in took if at >= handed)
    return during, after


def figures(tap, _image, how):
    layer, reference = SCRATCH / "debian.layer", _image.reference.replace(":1", ":debian")
    ovbd("build", "--from-tar", TAR, "--algo", "zstd", "-o", layer)
    ovbd("push", layer, reference)
    size = layer.stat().st_size
    figure("image", f"{size / 1e6:.1f} MB, over {DELAY * 1000:.0f} ms and {RATE / 1e6:.0f} MB/s")
    kinds = {"pulled and then run": [], "lazily": [], "lazily, with a trace": [], "with a trace and --prefetch": [], "local": []}
    for number in range(ROUNDS):
        how.delay, how.rate = DELAY, RATE
        without("all")
        kinds["pulled and then run"].append(Run(how, lambda: pull_all("all", reference)))
        down("all")
        how.documents.pop(next((path for path in how.documents if "/sha256-" in path), None), None)
        for kind, options in (("lazily", ()), ("lazily, with a trace", ()), ("with a trace and --prefetch", ("--prefetch",))):
            without("part")
            kinds[kind].append(Run(how, lambda options=options: pull("part", reference, *options)))
            done("part")
            down("part")
            if kind == "lazily":
                # With nothing else on the line, so that the trace has it in order.
                how.delay, how.rate = 0.0, None
                without("part")
                Run(how, lambda: pull("part", reference, "--trace", "8"))
                wait_until("all is here", lambda: is_local("part"))
                ovbd("trace", "--push", reference, "part")
                done("part")
                down("part")
                how.delay, how.rate = DELAY, RATE
        drop_caches()
        kinds["local"].append(Run(how, lambda: ovbd("up", "--store", store("all"), "all", reference).strip()))
        down("all")
    said = {run.said for runs in kinds.values() for run in runs}
    tap.equal(len(said), 1, "the program says the same every time")
    whole = statistics.median(run.seconds for run in kinds["pulled and then run"])
    local = statistics.median(run.seconds for run in kinds["local"])
    for kind, runs in kinds.items():
        seconds, sent = (statistics.median(getattr(run, what) for run in runs) for what in ("seconds", "sent"))
        mapped = statistics.median(run.mapped for run in runs)
        after = statistics.median(run.seconds - run.mapped for run in runs)
        here = statistics.median(run.seconds - run.mapped for run in kinds["local"])
        figure(kind, f"{seconds:.2f} s ({seconds / whole:.2f} of pulled and then run, {seconds / local:.2f} of local), mapped after "
                     f"{mapped:.2f} s, the program {after / here:.2f} of local, {sent / size * 100:.0f} % of the image sent")
    lazily = statistics.median(run.sent for run in kinds["lazily"])
    tap.result(lazily < size, f"{lazily} of {size} bytes were sent before the program had run")
    stalls = [longest_read("part", reference, how) for _ in range(max(ROUNDS, 3))]
    figure("longest read in milliseconds while layers are handed over, and after that",
           ", ".join(f"{during * 1000:.1f} ({after * 1000:.1f})" for during, after in stalls))


tap = Tap()
if TAR is None:
    tap.skip("figures of lazily pulled stacks", "make bench-lazy has them")
else:
    run_tests(tap, (figures,))
tap.finish()
