#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""The examples of the documentation do what they say when they are pasted into a shell, and leave nothing behind."""

import os
import pathlib
import random
import re
import subprocess
import sys
import textwrap

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
from ovbd_command import MIB, existing, settled
from test_script import OVBD, SCRATCH, SOURCE, Tap, load, run

ENVIRONMENT = os.environ | {"PATH": f"{OVBD.parent}:{os.environ['PATH']}"}
MOUNT = pathlib.Path("/mnt")


def indented(name, after):
    """The literal block of a document that follows the first line which ends with `after`."""
    text = (SOURCE / name).read_text().partition(f"{after}\n\n")[2]
    return textwrap.dedent(re.match(r"(?:(?: {4}.*)?\n)+", text)[0])


def fenced(name, after):
    """The same of a Markdown file."""
    return (SOURCE / name).read_text().partition(f"{after}\n\n```\n")[2].partition("```")[0]


def paste(tap, what, commands, ends=""):
    """Pastes commands, and those that clean up after them; returns what they printed."""
    before = existing()
    assert commands.count("\n") >= 5, commands
    result = subprocess.run(["sh", "-e", "-c", commands + ends], cwd=SCRATCH, env=ENVIRONMENT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    print(textwrap.indent(result.stdout, "# "), end="", flush=True)
    tap.equal((result.returncode, result.stderr), (0, ""), f"{what}: pasted")
    tap.equal(settled(before), before, f"{what}: no device is left")
    for path in SCRATCH.glob("*.zfile"):
        path.unlink()
    return result.stdout


def main(tap):
    words = random.Random(1)
    phrases = [words.randbytes(16) for _ in range(1000)]
    image = b"".join(words.choices(phrases, k=4 * MIB // 16))
    for name, content in (("disk.img", image), ("base.img", image), ("next.img", image[:MIB] + image)):
        (SCRATCH / name).write_bytes(content)
    out = paste(tap, "a compressed copy", indented("docs/dm-zfile.rst", "A compressed copy of a raw image::"))
    tap.result(re.search(r"zfile lz4 4096 1024 \d+ \d+ \d+ 0 0 0\n", out), "its status is without errors", out)

    out = paste(tap, "two layers", indented("docs/dm-overlaybd.rst", "from two raw images::"))
    tap.result("overlaybd 2 " in out and re.search(r"^[01] \d+:\d+ \d+ \d+$", out, re.M), "status and lookup", out)

    with open(SCRATCH / "disk.img", "wb") as file:
        file.truncate(64 * MIB)
    run("mkfs.ext4", "-q", SCRATCH / "disk.img")
    MOUNT.mkdir(exist_ok=True)
    paste(tap, "the README's five lines", fenced("README.md", "two layers, as\nroot:"), "ovbd down disk\n")

    # The document leaves open what is done to the file system.
    writing = indented("docs/stacks.rst", "the stack on it, while the device is in use::").replace("...", "date >/mnt/written")
    run(OVBD, "build", "-o", SCRATCH / "base.zfile", SCRATCH / "disk.img")
    out = paste(tap, "writing and committing", writing,
                "mount -o ro /dev/mapper/disk /mnt\nls /mnt\numount /mnt\novbd down disk\n")
    tap.result("written" in out.split(), "what was written is there", out)


tap = Tap()
load("loop", "dm-zfile", "dm-overlaybd")
main(tap)
tap.finish()
