#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""What it costs to make one layer of 32: `ovbd squash` beside `ovbd export | ovbd build` of the same layers.

Seconds of CPU time (user and system, of all programs), of wall-clock time, and bytes of the result. Both are done ROUNDS
times in turns, and the least of each counts. Started by `make bench-host` in the toolchain root. MB= is the size of the
device, LAYERS= the number of layers, of which each above the first writes a LAYERS-th of it anew, in runs of 64 KiB.
"""

import os
import pathlib
import random
import resource
import subprocess
import tempfile
import time

OVBD = pathlib.Path("tools/target/release/ovbd").resolve()
MEGABYTES = int(os.environ.get("MB", "512"))
LAYERS = int(os.environ.get("LAYERS", "32"))
ROUNDS = int(os.environ.get("ROUNDS", "3"))
RUN = 64 << 10


def text(generator, size):
    """Bytes that lz4 leaves about half of."""
    words = [generator.randbytes(14) for _ in range(48)]
    parts = []
    while size > 0:
        parts.append(generator.choice(words) + generator.randbytes(4))
        size -= 18
    return b"".join(parts)


def make_layers(folder):
    """The layers, bottom first."""
    generator = random.Random(32)
    sample = text(generator, 4 << 20)
    raw, layers = folder / "raw", []
    runs = (MEGABYTES << 20) // RUN
    for number in range(LAYERS):
        chosen = range(runs) if number == 0 else generator.sample(range(runs), runs // LAYERS)
        with open(raw, "r+b" if layers else "w+b") as file:
            for run in chosen:
                file.seek(run * RUN)
                at = generator.randrange(len(sample) - RUN)
                file.write(sample[at:at + RUN])
        layers.append(folder / f"{number}.layer")
        base = ["--base", *layers[:-1]] if number else []
        subprocess.run([OVBD, "build", "-q", "-o", layers[-1], raw, *base], check=True)
    return layers


def measured(work):
    """CPU seconds and seconds of a function that runs programs."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    work()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, time.monotonic() - start)


def main():
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        folder = pathlib.Path(name)
        layers = make_layers(folder)
        out = {"squash": folder / "squashed", "export | build": folder / "built"}

        def squash():
            subprocess.run([OVBD, "squash", "-q", "-f", "-o", out["squash"], *layers], check=True)

        def pipe():
            export = subprocess.Popen([OVBD, "export", "-q", "-o", "-", *layers], stdout=subprocess.PIPE)
            subprocess.run([OVBD, "build", "-q", "-f", "-o", out["export | build"], "-"], stdin=export.stdout, check=True)
            if export.wait():
                raise SystemExit("export failed")
        works, best = {"squash": squash, "export | build": pipe}, {}
        for _ in range(ROUNDS):
            for what, work in works.items():
                best[what] = tuple(map(min, zip(best.get(what, (1e9, 1e9)), measured(work))))
        for one in out.values():
            subprocess.run([OVBD, "export", "-q", "-o", f"{one}.raw", one], check=True)
        subprocess.run(["cmp", *(f"{one}.raw" for one in out.values())], check=True)
        print(f"{LAYERS} layers of {MEGABYTES} MiB, least of {ROUNDS}; both give the same image")
        print(f"{'':16} {'CPU s':>8} {'wall s':>8} {'MiB':>8}")
        for what, (cpu, wall) in best.items():
            print(f"{what:16} {cpu:8.2f} {wall:8.2f} {out[what].stat().st_size / (1 << 20):8.1f}")
        cpu, wall = (slow / fast for slow, fast in zip(best["export | build"], best["squash"]))
        print(f"squash of {LAYERS} layers: {cpu:.1f} times less CPU, {wall:.1f} times faster")


main()
