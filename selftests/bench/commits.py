# SPDX-License-Identifier: GPL-2.0
"""What reads of a writable stack cost, before and after commits: the tables that `ovbd up --writable` and `ovbd commit`
make, over RAM disks. Nothing that is read was written since, so each read passes all generations. Beside them, what the
least costs that can be written to: dm-snapshot alone, over the stack and over a dm-linear with the same bytes.

The figures of a row: `random`, 4 KiB direct reads; `sequential`, 1 MiB direct reads, for each MiB.
"""

import contextlib
import struct

import dm_ioctl
import layered
import lsmt_writer
import zfile_writer
from measure import DATA, ram_disk, random_reads, require_content, row, sequential_reads, write_image
from test_script import load, run

SUITE = "commits"
CHUNK_SECTORS = 8
# Layers of one stack, and where stores are.
LAYERS, STORES = 2, 10


def stack(data, layers):
    """The table of the stack: all layers but the lowest hold a sixteenth of it."""
    table = f"0 {len(data) // 512} overlaybd {layers}"
    for number in range(layers):
        part = layered.share(data, 0, 1) if number == 0 else layered.share(data, number, 16)
        segments = [(at * layered.SECTORS, layered.SECTORS, bytes_) for at, bytes_ in part]
        blob = lsmt_writer.layer(segments, len(data) // 512)
        layered.write_all(ram_disk(number), [(0, blob)])
        table += f" {ram_disk(number)} {len(blob)}"
    return table


class Tables:
    """Mapped devices on each other."""

    def __init__(self, undo, sectors):
        self._undo, self._sectors, self._count = undo, sectors, 0

    def map(self, table, readonly=True):
        self._count += 1
        device = self._undo.enter_context(dm_ioctl.Mapped(f"bench-{self._count}", table, readonly))
        return device.node

    def linear(self, below, readonly=True):
        return self.map(f"0 {self._sectors} linear {below} 0", readonly)

    def generation(self, below, number):
        """A generation with an empty store."""
        store = ram_disk(STORES + number)
        header = struct.pack("<IIII", 0x70416E53, 1, 1, CHUNK_SECTORS)
        layered.write_all(store, [(0, header.ljust(2 * CHUNK_SECTORS * 512, b"\0"))])
        return self.map(f"0 {self._sectors} snapshot {below} {store} PO {CHUNK_SECTORS}", readonly=False)


    def compressed(self):
        """A stack of one compressed layer."""
        path = DATA / "sealed/base.zfile"
        stored, bytes_ = write_image(ram_disk(0), path), zfile_writer.original_bytes(path.read_bytes())
        zfile = self.map(f"0 {-(-bytes_ // 512)} zfile {ram_disk(0)} {stored}")
        return self.map(f"0 {self._sectors} overlaybd 1 {zfile} {bytes_}")

    def plain(self, data):
        """A dm-linear with the content."""
        layered.write_all(ram_disk(0), [(0, data)])
        return self.linear(ram_disk(0))


def reads(name, device):
    require_content(device)
    row(SUITE, name, random=random_reads(device, "--direct"), sequential=sequential_reads(device, "--direct"))


def main(_chosen):
    load("dm-zfile", "dm-overlaybd")
    run("modprobe", "dm-snapshot")
    data = layered.content()
    for name, layers, frozen in (("read-only", LAYERS, None), ("writable", LAYERS, 0), ("after a commit", LAYERS + 1, 0),
                                 ("one frozen generation", LAYERS, 1), ("three frozen generations", LAYERS, 3)):
        with contextlib.ExitStack() as undo:
            tables = Tables(undo, len(data) // 512)
            device = tables.map(stack(data, layers))
            if frozen is not None:
                for number in range(frozen + 1):
                    below = tables.linear(device) if number else device
                    device = tables.generation(below, number)
                device = tables.linear(device, readonly=False)
            reads(name, device)
    below = {"dm-linear": lambda tables: tables.plain(data), "compressed": Tables.compressed,
             "read-only": lambda tables: tables.map(stack(data, LAYERS))}
    for name, make in below.items():
        with contextlib.ExitStack() as undo:
            tables = Tables(undo, len(data) // 512)
            device = make(tables)
            if name != "read-only":
                reads(name, device)
            device = tables.generation(device, 0)
            reads(f"{name}, under dm-snapshot alone", device)
            if name == "compressed":
                reads("compressed, writable", tables.linear(device, readonly=False))
