#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Stores for which there is no room and stores that fail while they are committed: nothing is lost. And one commit after
the other, far more than a stack has layers: what they leave is squashed, and nothing piles up."""

import contextlib
import os
import pathlib
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
from block_devices import read_direct, sectors
from ovbd_command import MIB, empty_layer, existing, listed, mounted, ovbd, ovbd_fails, refused, settled
from test_script import SCRATCH, Tap, load, run

# Commits in a row, and layers at which they are squashed: by default fewer than a stack can have.
MANY = int(os.environ.get("OVBD_MANY_COMMITS", "24"))
MOST_LAYERS = 255 if MANY >= 255 else 9
BLOCK = 4096
SIZE = 320 * MIB


def put(device, number, text):
    with open(device, "r+b", buffering=0) as file:
        file.seek(number * BLOCK)
        file.write(text * (BLOCK // len(text)))
        os.fsync(file)


def check_no_room(tap, base):
    """The file system of the store is full."""
    with mounted("none", "-t", "tmpfs", "-o", "size=256k") as top:
        cow, out = top / "cow", SCRATCH / "room.layer"
        device = ovbd("up", "--writable", "--cow", cow, "room", base).strip()
        put(device, 0, b"1")
        ballast = top / "ballast"
        run("sh", "-c", f"head -c 1M /dev/zero >{ballast} || true")
        status, said = ovbd_fails("commit", "-o", out, "room")
        tap.result(status == 1 and f"{cow}.gen1: " in said and "No space left" in said, "no room for a store: says so", said)
        tap.equal((sorted(path.name for path in top.iterdir()), out.exists()), (["ballast", "cow"], False),
                  "no room for a store: nothing is left of it")
        tap.equal(read_direct(device, 0, BLOCK), b"1" * BLOCK, "no room for a store: the device goes on")
        ballast.unlink()
        ovbd("commit", "-o", out, "room")
        tap.equal(len(listed("room")["layers"]), 2, "with room it is committed")
        ovbd("down", "room")


@contextlib.contextmanager
def on_a_disk():
    """A folder that is not in memory, as far as programs can see."""
    image = SCRATCH / "elsewhere"
    with open(image, "wb") as file:
        file.truncate(64 * MIB)
    run("mkfs.ext4", "-q", image)
    with mounted(image, "-o", "loop") as top:
        yield top
    image.unlink()


def check_failing(tap, base):
    """What has the store fails once it is frozen, and comes back."""
    disk, copy = SCRATCH / "disk", SCRATCH / "failing.copy"
    with open(disk, "wb") as file:
        file.truncate(8 * MIB)
    loop = run("losetup", "--find", "--show", disk).strip()
    whole = f"0 {sectors(loop)} linear {loop} 0"
    run("dmsetup", "create", "disk", "--table", whole)

    def change(table):
        run("dmsetup", "load", "disk", "--table", table)
        run("dmsetup", "resume", "disk")

    device = ovbd("up", "--writable", "--cow", "/dev/mapper/disk", "failing", base).strip()
    with on_a_disk() as top:
        out = top / "out.layer"
        put(device, 0, b"1")
        if run("stat", "--file-system", "--format=%T", SCRATCH).strip() == "tmpfs":
            refused(tap, "what is on a disk, in a layer in memory", "would be in memory only", "commit", "--cow",
                    top / "next", "-o", SCRATCH / "memory.layer", "failing")
        ovbd("commit", "--snapshot-only", "--cow", top / "next", "failing")
        put(device, 1, b"2")
        # The header and the exceptions can be read, the data cannot.
        change(f"0 16 linear {loop} 0\n16 {sectors(loop) - 16} error")
        for words in (["--continue"], []):
            status, said = ovbd_fails("commit", *words, "-o", out, "failing")
            tap.result(status == 1 and "Input/output error" in said, f"a store that fails, {words}: says so", said)
            tap.result(not out.exists(), f"a store that fails, {words}: no layer is made")
        put(device, 2, b"3")
        change(whole)
        ovbd("commit", "-o", out, "failing")
        ovbd("export", "-o", copy, base, out)
        wanted = b"".join(text * BLOCK for text in (b"1", b"2", b"3"))
        with open(copy, "rb") as file:
            tap.equal(file.read(3 * BLOCK), wanted, "the store is back: all is in the layer")
        tap.equal(read_direct(device, 0, 3 * BLOCK), wanted, "the store is back: all is on the device")
        tap.equal(listed("failing")["frozen"], [], "the store is back: no generation is left")
        ovbd("down", "failing")
    run("dmsetup", "remove", "--retry", "disk")
    run("losetup", "--detach", loop)


def check_invalid(tap, base):
    """What has the store failed for good: no layer is made of the rest."""
    disk, out = SCRATCH / "disk", SCRATCH / "invalid.layer"
    with open(disk, "wb") as file:
        file.truncate(8 * MIB)
    loop = run("losetup", "--find", "--show", disk).strip()
    run("dmsetup", "create", "disk", "--table", f"0 {sectors(loop)} linear {loop} 0")
    device = ovbd("up", "--writable", "--cow", "/dev/mapper/disk", "invalid", base).strip()
    run("dmsetup", "load", "disk", "--table", f"0 {sectors(loop)} error")
    run("dmsetup", "resume", "disk")
    with contextlib.suppress(OSError):
        put(device, 0, b"1")
    for words in (["-o", out], ["--snapshot-only"]):
        refused(tap, f"a snapshot that is invalid, {words[0]}", "the snapshot is invalid: writes are lost", "commit", "--cow",
                SCRATCH / "next", *words, "invalid")
    tap.equal(listed("invalid")["frozen"], [], "a snapshot that is invalid: no generation was begun")
    ovbd("down", "invalid")
    run("dmsetup", "remove", "--retry", "disk")
    run("losetup", "--detach", loop)


def check_store_inside(tap, base):
    """The next store cannot be on the device itself."""
    device = ovbd("up", "--writable", "inside", base).strip()
    run("mkfs.ext4", "-q", device)
    with mounted(device) as top:
        refused(tap, "the next store on the device", "which cannot keep there", "commit", "--cow", top / "next", "-o",
                SCRATCH / "inside.layer", "inside")
    ovbd("down", "inside")


def kernel_memory():
    """Bytes that the kernel has for itself."""
    lines = (line.split() for line in pathlib.Path("/proc/meminfo").read_text().splitlines())
    sizes = {words[0]: int(words[1]) << 10 for words in lines}
    return sizes["SUnreclaim:"] + sizes["VmallocUsed:"]


class Series:
    """A stack that is committed again and again."""

    def __init__(self, base):
        self._base, self._cow = base, SCRATCH / "series.cow"
        self._layers, self._number = [], 0
        self._up()

    def _up(self):
        self.device = ovbd("up", "--writable", "--cow", self._cow, "series", self._base, *self._layers).strip()

    def commit(self):
        """Returns what is said about the new layer."""
        put(self.device, self._number, f"{self._number:8}".encode())
        self._layers.append(SCRATCH / f"series{self._number}.layer")
        self._number += 1
        status, said = ovbd_fails("commit", "-o", self._layers[-1], "series")
        assert status == 0, said
        if "256th" in said:
            # The stores are not over this one. The next one has what it has.
            self._layers.pop().unlink()
        return said

    def layers(self):
        return 1 + len(self._layers)

    def squash(self):
        """Makes one layer of all that were committed, and goes on with that."""
        squashed = SCRATCH / f"series-to-{self._number}.layer"
        ovbd("squash", "-q", *self._layers, "-o", squashed)
        ovbd("down", "series")
        for layer in self._layers:
            layer.unlink()
        self._layers = [squashed]
        self._up()

    def wrong(self):
        """The first block that is not what was written, or None."""
        content = read_direct(self.device, 0, self._number * BLOCK)
        wanted = (f"{number:8}".encode() * (BLOCK // 8) for number in range(self._number))
        found = (content[at:at + BLOCK] for at in range(0, len(content), BLOCK))
        return next((number for number, (one, other) in enumerate(zip(found, wanted)) if one != other), None)

    def end(self):
        ovbd("down", "series")


def check_many(tap, base):
    series, counts, said, memory = Series(base), set(), set(), []
    for _ in range(MANY):
        is_full = series.layers() == 255
        words = series.commit()
        said.add((is_full, "256th" in words))
        if is_full or series.layers() > MOST_LAYERS:
            series.squash()
            counts.add(len(existing()))
            memory.append(kernel_memory())
    tap.equal(series.wrong(), None, f"{MANY} commits in a row: content")
    tap.equal(said, {(False, False), (True, True)} if MOST_LAYERS == 255 else {(False, False)},
              "the 256th layer is made, and the stack stays where it is")
    tap.equal(len(counts), 1, f"after each squash there are as many devices: {counts}")
    tap.equal(sorted(path.name for path in SCRATCH.glob("series.cow*")), ["series.cow"], "one store is left")
    grown = memory[-1] - memory[0]
    tap.result(grown < 32 * MIB, "the memory of stores is given back", f"{grown >> 20} MiB more than after the first squash")
    print(f"# {MANY} commits: the kernel has {grown >> 10} KiB more than after the first squash", flush=True)
    series.end()


tap = Tap()
load("loop", "dm-overlaybd", "dm-zfile")
base = empty_layer(SIZE)
check_no_room(tap, base)
check_failing(tap, base)
check_invalid(tap, base)
check_store_inside(tap, base)
check_many(tap, base)
tap.equal(settled([]), [], "nothing is left")
tap.finish()
