#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Push and pull of logical volumes are killed at random moments: the next run succeeds, and nothing is left active, reserved
or with half a name."""

import os
import pathlib
import random
import subprocess
import sys
import time

sys.path.insert(0, f"{pathlib.Path(__file__).resolve().parents[1]}/lib")
from block_devices import Devices
from ovbd_command import ovbd
from test_script import OVBD, Tap
from volumes import LAYOUT, MIB, Group, left, set_up_lvm, write_random

SIZE = 48
MOMENTS = int(os.environ.get("OVBD_KILLS", "20"))
tap = Tap()


def killed(words, seconds):
    """Runs `ovbd` and kills it after a while; returns whether it lived so long."""
    process = subprocess.Popen([str(word) for word in [OVBD, *words]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        # What it started may still run, as it would elsewhere.
        return True


def length_of(words):
    """Seconds that a command takes."""
    start = time.monotonic()
    ovbd(*words)
    return time.monotonic() - start


def main():
    set_up_lvm()
    generator = random.Random("killed")
    with Devices() as devices:
        first, second = Group(devices, "vg1", 700), Group(devices, "vg2", 700)
        first.pool("pool", 500)
        second.pool("pool", 500)
        node = first.thin("web", SIZE)
        write_random(node, generator, SIZE * MIB, 80)
        push_words = ["push", "--snapshot=s{n}", f"{first.name}/web", f"oci:{LAYOUT}:{{n}}"]
        pull_words = ["pull", "--thin", f"{second.name}/pool/web", f"oci:{LAYOUT}:{{n}}"]

        def words(template, number):
            return [word.format(n=number) for word in template]

        longest = length_of(words(push_words, "first")), length_of(words(pull_words, "first"))
        for template, length, group, what in ((push_words, longest[0], first, "push"),
                                              (pull_words, longest[1], second, "pull")):
            deaths = 0
            for number in range(MOMENTS):
                write_random(node, generator, SIZE * MIB, 6)
                if what == "pull":
                    ovbd(*words(push_words, f"p{number}"))
                name = f"p{number}" if what == "pull" else number
                deaths += killed(words(template, name), generator.uniform(0.01, length))
                if what == "push" and f"s{name}" in group.all() and "ovbd.partial" not in group.fields(f"s{name}")["lv_tags"]:
                    # It was complete.
                    continue
                tap.attempt(f"{what} {number} after one that was killed", ovbd, *words(template, name))
                tap.equal(left(group), [], f"{what} {number} leaves nothing")
                parts = [found for found in group.all() if found.endswith(".part")]
                tap.equal(parts, [], f"{what} {number}: no half name")
            print(f"# {deaths} of {MOMENTS} were killed", flush=True)
            tap.result(deaths > MOMENTS // 4, f"{what}: enough were killed", deaths)
        newest = first.tags(f"sp{MOMENTS - 1}")["ovbd.manifest"].removeprefix("sha256:")[:12]
        tap.equal(second.sha256(f"web.{newest}"), first.sha256(f"sp{MOMENTS - 1}"), "the last holds the same on both sides")
        tap.equal(sorted(path.name for path in pathlib.Path("/run/ovbd").glob("*.undo")), [], "no notes are left")
        tap.equal(sorted(path.name for path in pathlib.Path("/var/tmp").glob(".ovbd-*")), [], "no folder is left")
    tap.finish()


main()
