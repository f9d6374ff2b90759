# SPDX-License-Identifier: GPL-2.0
"""The few figures that `make test` watches: short, and over content that no update of a package changes."""

import pathlib
import random

from measure import ram_disk, random_reads, row, sequential_reads, write_image
import dax
import dm_ioctl
import segments
import zfile
from pmem import Pmem
from test_script import OVBD, load, run

SUITE = "tracked"
BYTES = 16 << 20
SECTORS = BYTES // 512
MANY = 100000
DIRECT_BYTES = 8 << 20
WORK = pathlib.Path("/tmp/bench-tracked")


def content():
    """Text of a kind: words from a fixed list in a fixed order, of which lz4 leaves about 60 %."""
    chosen = random.Random(1)
    words = [chosen.randbytes(chosen.randint(4, 16)) for _ in range(200)]
    text = b"".join(chosen.choices(words, k=BYTES // 8))
    return text[:BYTES]


def random_row(name, device, sectors, **more):
    row(SUITE, name, random=random_reads(device, "--direct", f"--length={sectors * 512}"), **more)


def overlaybd(name, blob, sectors):
    with dm_ioctl.Mapped("bench", f"0 {sectors} overlaybd 1 {blob}") as device:
        random_row(name, device.node, sectors)


def compressed(disk, name):
    """Reads through one ZFile and its parts."""
    run(OVBD, "build", "--raw", "--force", "--algo", name, "-o", WORK / name, WORK / "content")
    length = write_image(disk, WORK / name)
    parts = zfile.parts(disk, WORK / name) | {"lower": zfile.lower_read(disk, length, BYTES)}
    with dm_ioctl.Mapped("bench", f"0 {SECTORS} zfile {disk} {length}") as device:
        random_row(f"dm-zfile {name}", device.node, SECTORS,
                   sequential=sequential_reads(device.node, "--direct"), **parts)


def direct():
    """A file in persistent memory, read and mapped directly."""
    run("modprobe", "erofs")
    memory = Pmem()
    dax.WORK.mkdir(exist_ok=True)
    part, image = WORK / "part", WORK / "image"
    part.write_bytes((WORK / "content").read_bytes()[:DIRECT_BYTES])
    dax.make_image(image, part)
    tables = {"dm-linear": f"linear {memory.put(image)} 0", "dm-overlaybd": f"{dax.layers_of(memory, image)} 1 dax"}
    for name, words in tables.items():
        with (dm_ioctl.Mapped("bench", f"0 {image.stat().st_size // 512} {words}") as device,
              dax.mounted(device.node, "dax=always") as top):
            row(SUITE, f"{name}, DAX", random=random_reads(top / "data"), touch=dax.warm(dax.touches, top / "data"))
    memory.forget()


def main(_chosen):
    load("dm-overlaybd", "dm-zfile")
    WORK.mkdir(exist_ok=True)
    (WORK / "content").write_bytes(content())
    # Reads of a RAM disk cost less where nothing was written, as below dm-overlaybd here.
    empty, disk = ram_disk(0), ram_disk(1)
    with dm_ioctl.Mapped("bench", f"0 {SECTORS} linear {empty} 0") as device:
        random_row("dm-linear", device.node, SECTORS)
    overlaybd("dm-overlaybd, 1 segment", segments.one_segment(empty), segments.ONE)
    overlaybd("dm-overlaybd, 100k segments", segments.many_in_one(empty, MANY), MANY * segments.LENGTH)
    write_image(disk, WORK / "content")
    random_row("raw brd", disk, SECTORS)
    compressed(disk, "lz4")
    compressed(disk, "zstd")
    direct()
