# SPDX-License-Identifier: GPL-2.0
"""What the tests of `ovbd up` and its companions share: running the command, and what devices exist."""

import contextlib
import json
import os
import pathlib
import random
import subprocess
import tempfile
import time

import lsmt_writer
from test_script import OVBD, SCRATCH, run

MIB = 1 << 20


def ovbd(*words, **options):
    """Runs `ovbd`, which must succeed, and returns what it prints."""
    return run(OVBD, *words, **options)


def ovbd_fails(*words, **options):
    """Runs `ovbd` and returns its exit status and what it says on stderr."""
    result = subprocess.run([str(word) for word in [OVBD, *words]], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            text=True, errors="replace", **options)
    return result.returncode, result.stderr.strip()


def existing():
    """The mapped and the attached loop devices."""
    found = []
    for block in pathlib.Path("/sys/block").iterdir():
        if (block / "dm").exists():
            # Of one that goes away meanwhile there is no name any more.
            with contextlib.suppress(OSError):
                found.append((block / "dm/name").read_text().strip())
        elif (block / "loop").exists():
            found.append(block.name)
    return sorted(found)


def settled(wanted):
    """What exists once it is as wanted, or after a while: udev may have a device open when it is to go away."""
    for _ in range(100):
        if (found := existing()) == wanted:
            break
        time.sleep(0.1)
    return found


def has_file_system(kind):
    """Whether the kernel knows a file system, as a module too."""
    return kind in pathlib.Path("/proc/filesystems").read_text().split() or subprocess.run(
        ["modprobe", kind], stderr=subprocess.DEVNULL).returncode == 0


@contextlib.contextmanager
def mounted(device, *options):
    """Where a file system is mounted while the body runs."""
    with tempfile.TemporaryDirectory(dir=SCRATCH) as top:
        run("mount", *options, device, top)
        try:
            yield pathlib.Path(top)
        finally:
            run("umount", top)


def leaves_nothing(tap, what, function, *arguments):
    """Calls a function and fails the test where other devices exist afterwards."""
    before = existing()
    result = function(*arguments)
    tap.equal(settled(before), before, f"{what}: no device is left")
    return result


def refused(tap, what, reason, *words, **options):
    """Passes where `ovbd` fails with a message that has the reason, in one line, and leaves nothing behind."""
    status, said = leaves_nothing(tap, what, lambda: ovbd_fails(*words, **options))
    good = status == 1 and reason in said and said.count("\n") == 0 and said.startswith("ovbd: ")
    tap.result(good, f"{what}: refused", f"exit status {status}, wanted 1 and: {reason}\n{said}")


def listed(name):
    """The entry of a stack in `ovbd ls`, or None."""
    return next((entry for entry in json.loads(ovbd("ls", "--json")) if entry["name"] == name), None)


def make_image(path, generator, size):
    """An image of incompressible and compressible parts and holes."""
    with open(path, "wb") as file:
        file.truncate(size)
        for start in range(0, size, 64 << 10):
            kind = generator.randrange(4)
            if kind:
                file.seek(start)
                length = min(generator.randrange(1, 65) << 10, size - start)
                file.write(generator.randbytes(length) if kind == 1 else bytes([kind]) * length)


def empty_layer(size):
    """A layer without data, of a device of that size."""
    raw, layer = SCRATCH / "raw", SCRATCH / "base.layer"
    with open(raw, "wb") as file:
        file.truncate(size)
    ovbd("build", "--format", "lsmt", "-o", layer, raw)
    raw.unlink()
    return layer


def change_image(path, generator, count):
    """Overwrites parts of an image, some with zeros."""
    size = os.path.getsize(path)
    with open(path, "r+b") as file:
        for _ in range(count):
            length = generator.randrange(1, 100) * lsmt_writer.SECTOR
            file.seek(generator.randrange((size - length) // lsmt_writer.SECTOR) * lsmt_writer.SECTOR)
            file.write(generator.choice([generator.randbytes(length), bytes(length), b"text" * (length // 4)]))


class Images:
    """An image of three generations, and the layers of each: `raw[n]` is what the layers up to `layer[n]` hold."""

    def __init__(self, name, size=4 * MIB, options=((), (), ())):
        generator = random.Random(name)
        self.raw, self.layer = [], []
        for number, words in enumerate(options):
            raw = SCRATCH / f"{name}{number}.raw"
            if number == 0:
                make_image(raw, generator, size)
            else:
                run("cp", "--sparse=always", self.raw[-1], raw)
                change_image(raw, generator, 20)
            layer = SCRATCH / f"{name}{number}.layer"
            base = ["--base", *self.layer] if self.layer else []
            ovbd("build", *words, "-o", layer, raw, *base)
            self.raw.append(raw)
            self.layer.append(layer)
