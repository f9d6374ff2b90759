#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""What updates of a system cost: ten generations of an image of 200 packages, each of which replaces the files of 100. Bytes
that are fetched and kept, beside the layers; and what is written where another generation becomes the default.
`make bench-system` prints it."""

import os
import random
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
import registry
from ovbd_command import MIB, mounted, ovbd
from test_script import SCRATCH, Tap, load, run

SIZE = 96 * MIB
PACKAGES, CHANGED, GENERATIONS = 200, 100, 10
BOOT, STORE, RAW = SCRATCH / "boot", SCRATCH / "store", SCRATCH / "raw"
PLACE = ["--boot", BOOT, "--store", STORE]


def write_packages(top, generator, packages):
    """Writes all files of packages anew, as a package manager does: another file takes the place of the former."""
    for package in packages:
        for number in range(10):
            path = top / f"usr/lib/{package}/{number}"
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_suffix(".new")
            # Half of it can be compressed.
            new.write_bytes(b"".join(generator.randbytes(1024) + bytes(1024) for _ in range(generator.randrange(1, 12))))
            new.rename(path)


def stored(folder):
    """Bytes on the disk."""
    return int(run("du", "-s", "--block-size=1", folder).split()[0])


def everything(folder):
    """Name, time and inode of each file, by which is known what was written."""
    return {(str(path), path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*") if path.is_file()}


def main(tap):
    load("loop", "dm-overlaybd", "dm-zfile")
    generator, layers, sent = random.Random("figures"), [], 0
    with open(RAW, "wb") as file:
        file.truncate(SIZE)
    run("mkfs.ext4", "-q", "-b", "4096", RAW)
    answer = registry.Handler.answer

    def counting(handler, status, body=b"", **headers):
        nonlocal sent
        sent += len(body)
        answer(handler, status, body, **headers)

    registry.Handler.answer = counting
    BOOT.mkdir()
    for name in ("linux", "initrd"):
        (SCRATCH / name).write_bytes(generator.randbytes(MIB))
    kernel = ["--linux", SCRATCH / "linux", "--initrd", SCRATCH / "initrd"]
    worst = 0
    with registry.registry() as host:
        for number in range(GENERATIONS):
            with mounted(RAW, "-o", "loop") as top:
                packages = range(PACKAGES) if number == 0 else generator.sample(range(PACKAGES), CHANGED)
                write_packages(top, generator, packages)
            layer = SCRATCH / f"{number}.layer"
            ovbd("build", "-q", "--tar", "-o", layer, RAW, *(["--base", *layers] if layers else []))
            layers.append(layer)
            ovbd("push", "-q", *layers, f"{host}/vm/root:stable")
            sent = 0
            if number == 0:
                ovbd("pull", "-q", "--store", STORE, f"{host}/vm/root:stable")
                ovbd("system", "init", "-q", "--device", "LABEL=x", *kernel, *PLACE, f"{host}/vm/root:stable")
            else:
                ovbd("system", "update", "-q", *kernel, *PLACE)
                worst = max(worst, sent / layer.stat().st_size)
    size = sum(layer.stat().st_size for layer in layers)
    ratio = stored(STORE) / size
    print(f"# {CHANGED} packages updated: at most {worst:.3f} of the layer is fetched", flush=True)
    print(f"# {GENERATIONS} generations, {size / MIB:.0f} MiB of layers: {ratio:.4f} of that on the disk", flush=True)
    tap.result(1 <= worst <= 1.1, "an update fetches no more than 1.1 of its layer", f"{worst}")
    tap.result(0.9 <= ratio <= 1.01, "generations take no more than their layers and 1 %", f"{ratio}")
    for words in (["rollback"], ["set-default", "3"]):
        boot, store = everything(BOOT), everything(STORE)
        ovbd("system", words[0], *PLACE, *words[1:])
        gone, new = boot - everything(BOOT), everything(BOOT) - boot
        ids = [{one[1:] for one in part} for part in (gone, new)]
        tap.result(len(gone) == 1 and ids[0] == ids[1], f"{words[0]}: an entry is renamed, and nothing else", f"{gone} {new}")
        tap.equal(everything(STORE), store, f"{words[0]}: the store is as it was")


tap = Tap()
main(tap)
tap.finish()
