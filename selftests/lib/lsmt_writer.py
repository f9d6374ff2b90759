# SPDX-License-Identifier: GPL-2.0
"""Synthetic LSMT layers, written from the description of the format and not by the code under test, and the content
that a stack of them has.

A segment is `(start, sectors, data)` in 512-byte sectors, where data None is a discard. The segments of a layer are
in order and do not overlap.
"""

import array
import struct

SECTOR = 512
BLOCK = 4096
MAGIC = b"LSMT\0\1\2\0" + bytes.fromhex("657e63d29444084ca2d2c8ec4fcfae8a")
RAW = struct.Struct("<24sII3Q37s37sHBB256x")
HEADER_FLAGS, TRAILER_FLAGS = 7, 6
PADDING = struct.pack("<QQ", (1 << 50) - 1, 0)
# The source of a sector that no layer has; see `Model.source`.
HOLE = (None, None)


def header(virtual_sectors):
    return RAW.pack(MAGIC, RAW.size, HEADER_FLAGS, 0, 0, virtual_sectors * SECTOR, b"", b"", 0, 1,
                    1).ljust(BLOCK, b"\0")


def trailer(virtual_sectors, index_offset, entries, uuid=""):
    return RAW.pack(MAGIC, RAW.size, TRAILER_FLAGS, index_offset, entries, virtual_sectors * SECTOR, uuid.encode(), b"",
                    0, 1, 1).ljust(BLOCK, b"\0")


def entry(start, sectors, stored, zeroed=False, tag=0):
    return struct.pack("<QQ", start | sectors << 50, stored | zeroed << 55 | tag << 56)


def layer(segments, virtual_sectors, uuid=""):
    """The blob of a sealed layer. Data is stored in the order of the segments."""
    data, index = [], []
    stored = BLOCK // SECTOR
    for start, sectors, content in segments:
        index.append(entry(start, sectors, stored, content is None))
        if content is not None:
            assert len(content) == sectors * SECTOR
            data.append(content)
            stored += sectors
    index += [PADDING] * (-len(index) % 256)
    return b"".join([header(virtual_sectors), *data, *index,
                     trailer(virtual_sectors, stored * SECTOR, len(index), uuid)])


def uniform_index(count, sectors, start, stride, stored):
    """The index of `count` segments of one length, `stride` apart from sector `start` on, with their data one after
    the other from sector `stored` on. Fast enough for a million of them."""
    words = array.array("Q", bytes(16 * count))
    low = start | sectors << 50
    words[0::2] = array.array("Q", range(low, low + count * stride, stride))
    words[1::2] = array.array("Q", range(stored, stored + count * sectors, sectors))
    return words.tobytes() + PADDING * (-count % 256)


def write_sparse(path, virtual_sectors, data_sectors, index, pieces=()):
    """Writes a layer whose data section is a hole but for `pieces`: pairs of stored sector and bytes. Returns the
    length of the blob, for a file that is a block device."""
    offset = BLOCK + data_sectors * SECTOR
    with open(path, "r+b" if str(path).startswith("/dev/") else "wb") as file:
        file.write(header(virtual_sectors))
        for stored, data in pieces:
            file.seek(stored * SECTOR)
            file.write(data)
        file.seek(offset)
        file.write(index)
        file.write(trailer(virtual_sectors, offset, len(index) // 16))
        return file.tell()


class Model:
    """What a stack of layers, bottom first, reads as.

    `source` says for every sector where it comes from: the number of a layer and the sector in its blob, or None and
    the number of the layer that discarded it.
    """

    def __init__(self, stack, virtual_sectors):
        self.content = bytearray(virtual_sectors * SECTOR)
        self.source = [HOLE] * virtual_sectors
        for number, segments in enumerate(stack):
            stored = BLOCK // SECTOR
            for start, sectors, data in segments:
                place = slice(start * SECTOR, (start + sectors) * SECTOR)
                self.content[place] = data or bytes(sectors * SECTOR)
                if data is None:
                    self.source[start:start + sectors] = [(None, number)] * sectors
                else:
                    self.source[start:start + sectors] = [(number, stored + at) for at in range(sectors)]
                    stored += sectors

    def read(self, offset, length):
        return bytes(self.content[offset:offset + length])

    def run(self, sector):
        """For how many sectors from there on one source continues."""
        source = self.source[sector]
        end = sector + 1
        while end < len(self.source):
            layer, stored = source
            if self.source[end] != ((layer, stored + end - sector) if layer is not None else source):
                break
            end += 1
        return end - sector


def random_segments(random, virtual_sectors, longest, fill, discards):
    """Segments in order with random gaps; `fill` and `discards` are the probabilities of data and of a discard."""
    segments, at = [], random.randrange(longest)
    while at < virtual_sectors:
        sectors = min(random.randint(1, longest), virtual_sectors - at)
        chance = random.random()
        if chance < fill:
            segments.append((at, sectors, random.randbytes(sectors * SECTOR)))
        elif chance < fill + discards:
            segments.append((at, sectors, None))
        at += sectors
    return segments


def random_stack(random, virtual_sectors, count, longest=40, unit=1):
    """A stack whose upper layers cover ever less; all positions are multiples of `unit` sectors."""
    stack = []
    for number in range(count):
        fill = 0.7 / (number + 1)
        segments = random_segments(random, virtual_sectors // unit, longest // unit, fill, 0.15)
        stack.append([(start * unit, sectors * unit, data and random.randbytes(sectors * unit * SECTOR))
                      for start, sectors, data in segments])
    return stack
