# SPDX-License-Identifier: GPL-2.0
"""One image in every form that the targets read, made by ovbd: what a test uses that is about the devices and not
about the formats."""

import random

import zfile_writer
from test_script import OVBD, SCRATCH, run

BYTES = 2 << 20
BLOCK = 4096


def content(seed, base=None):
    """Bytes of which half the blocks compress, some are zero, and in part are those of `base`."""
    chosen = random.Random(seed)
    blocks = []
    for at in range(0, BYTES, BLOCK):
        kind = chosen.randrange(6)
        if base and kind < 4:
            blocks.append(base[at:at + BLOCK])
        elif kind == 5:
            blocks.append(bytes(BLOCK))
        elif kind % 2:
            blocks.append(chosen.randbytes(BLOCK))
        else:
            blocks.append(chosen.randbytes(64) * (BLOCK // 64))
    return b"".join(blocks)


class Images:
    """The files; `table` gives the line for one of `NAMES`, over loop devices."""

    NAMES = ("lz4", "zstd", "plain stack", "compressed stack")

    def __init__(self):
        self.base = content(1)
        self.content = content(2, self.base)
        base, top = SCRATCH / "base.img", SCRATCH / "top.img"
        base.write_bytes(self.base)
        top.write_bytes(self.content)
        self._files = {}
        for name, options in (("lz4", ["--format", "zfile", "--raw", "--block-size", "16384"]),
                              ("zstd", ["--format", "zfile", "--raw", "--algo", "zstd"])):
            self._build(name, top, *options)
        for name, kind in (("plain", "lsmt"), ("compressed", "zfile")):
            lower = self._build(f"{name} 0", base, "--format", kind)
            self._build(f"{name} 1", top, "--format", kind, "--base", lower)

    def _build(self, name, source, *options):
        path = SCRATCH / name.replace(" ", "-")
        run(OVBD, "build", *options, "-o", path, source)
        size = path.stat().st_size
        with open(path, "ab") as file:
            # A loop device has whole sectors.
            file.write(bytes(-size % 512))
        self._files[name] = (path, size)
        return path

    def _device(self, devices, name, below):
        path, size = self._files[name]
        return f"{below(devices.loop(path))} {size}"

    def names(self):
        """The names that `path` knows."""
        return self._files.keys()

    def path(self, name):
        """The file of "lz4", "zstd", "plain 0", "plain 1", "compressed 0" or "compressed 1"."""
        return self._files[name][0]

    def table(self, devices, name, below=lambda loop: loop):
        """The table line; `below` may put a device over each loop device and returns its path."""
        sectors = BYTES // 512
        if not name.endswith(" stack"):
            return f"0 {sectors} zfile {self._device(devices, name, below)}"
        kind = name.split()[0]
        words = []
        for number in range(2):
            words.append(self._device(devices, f"{kind} {number}", below))
            if kind == "compressed":
                path, size = self._files[f"compressed {number}"]
                inner = zfile_writer.original_bytes(path.read_bytes()[:size])
                mapped = devices.mapped(f"layer{number}", f"0 {-(-inner // 512)} zfile {words.pop()}")
                words.append(f"{mapped.node} {inner}")
        return f"0 {sectors} overlaybd 2 {' '.join(words)}"
