#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""What it costs to seal an image: `ovbd seal` beside `veritysetup format` of the same bytes, and again after one block of
4 KiB in a hundred changed.

Seconds of wall-clock time and of CPU time, the least of ROUNDS, in turns. The image is random bytes in an uncompressed
layer, so that neither has to decompress. Started by `make bench-seal` in the toolchain root; MB= is the size.
"""

import os
import pathlib
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time

OVBD = pathlib.Path("tools/target/release/ovbd").resolve()
MEGABYTES = int(os.environ.get("MB", "1024"))
ROUNDS = int(os.environ.get("ROUNDS", "3"))
BLOCK = 4096


def run(*command):
    """Runs a command, and returns its wall-clock time and CPU time in seconds and what it prints."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"error: {' '.join(map(str, command))}: {done.stderr}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def make_image(path):
    generator = random.Random("seal")
    with open(path, "wb") as file:
        for _ in range(MEGABYTES):
            file.write(generator.randbytes(1 << 20))


def change(path):
    """Changes one block in a hundred, anywhere; returns how many."""
    generator = random.Random("change")
    blocks = MEGABYTES * (1 << 20) // BLOCK
    chosen = generator.sample(range(blocks), blocks // 100)
    with open(path, "r+b") as file:
        for block in chosen:
            file.seek(block * BLOCK)
            file.write(generator.randbytes(BLOCK))
    return len(chosen)


def main():
    folder = pathlib.Path(tempfile.mkdtemp(dir="build"))
    try:
        raw, base, tree = folder / "raw", folder / "base", folder / "tree"
        seal, after, again = folder / "seal", folder / "next", folder / "again"
        make_image(raw)
        run(OVBD, "build", "--format", "lsmt", "-o", base, raw)
        times = {"veritysetup format": [], "ovbd seal": [], "ovbd seal --old-root": []}
        for _ in range(ROUNDS):
            times["veritysetup format"].append(run("veritysetup", "format", raw, tree))
            times["ovbd seal"].append(run(OVBD, "seal", "--force", base, "-o", seal))
        changed = change(raw)
        run(OVBD, "build", "--format", "lsmt", "--base", base, seal, "-o", after, raw)
        for _ in range(ROUNDS):
            times["ovbd seal --old-root"].append(run(OVBD, "seal", "--force", "--old-root", f"{seal}.roothash", base, seal,
                                                     after, "-o", again))
        whole = run(OVBD, "seal", "--force", base, seal, after, "-o", folder / "whole")[2]
        if whole != times["ovbd seal --old-root"][0][2]:
            sys.exit("error: sealing what changed gives another root hash")
        print(f"{MEGABYTES} MiB, then {changed} of its blocks changed; the seals store {seal.stat().st_size:,} and "
              f"{again.stat().st_size:,} bytes")
        least = {name: (min(one[0] for one in all_), min(one[1] for one in all_)) for name, all_ in times.items()}
        peer = least["veritysetup format"]
        for name, (wall, cpu) in least.items():
            print(f"{name:24} {wall:8.2f} s, {cpu:8.2f} s of CPU: {wall / peer[0]:.3f} and {cpu / peer[1]:.3f} of veritysetup")
    finally:
        shutil.rmtree(folder)


main()
