# SPDX-License-Identifier: GPL-2.0
"""Writes small ZFiles for the guest tests, without a compressor: blocks of one repeated byte become an lz4 match,
everything else is stored as lz4 literals or raw zstd blocks, which is larger than the input and valid all the same.
The content repeats few different blocks in a random order, since the CRC in Python takes its time."""

import functools
import random
import struct

BLOCK_SEED = 100007
MAGIC = b"ZFile\0\x01\0tuji.yyf@Alibaba"
HEADER, DATA, SEALED, DIGEST = 1, 2, 4, 16


def _table():
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        yield byte


TABLE = list(_table())


def crc32c(seed, data):
    """The kernel's crc32c(): nothing is inverted."""
    for byte in data:
        seed = seed >> 8 ^ TABLE[(seed ^ byte) & 255]
    return seed


def content(length, block, seed=0):
    """Bytes that are, block by block, one of a few blocks: random ones and repeated bytes."""
    chosen = random.Random(seed)
    blocks = [chosen.randbytes(block) for _ in range(6)] + [bytes([byte]) * block for byte in (0, 77)]
    return b"".join(chosen.choice(blocks) for _ in range(-(-length // block)))[:length]


def _run(length):
    """The bytes with which lz4 continues a length of 15 or more."""
    length -= 15
    return b"\xff" * (length // 255) + bytes([length % 255])


def _literals(data):
    if len(data) < 15:
        return bytes([len(data) << 4]) + data
    return b"\xf0" + _run(len(data)) + data


def _lz4(data):
    if len(data) < 64 or data != data[:1] * len(data):
        return _literals(data)
    # One literal, a match at distance 1, and the last 12 bytes as literals.
    match = len(data) - 13 - 4
    return b"\x1f" + data[:1] + b"\x01\x00" + _run(match) + _literals(data[-12:])


def _zstd(data):
    # A frame of one segment with a content size of four bytes, and one raw block.
    frame = struct.pack("<IBI", 0xFD2FB528, 0xA0, len(data))
    return frame + struct.pack("<I", len(data) << 3 | 1)[:3] + data


@functools.cache
def _stored(data, algorithm, crc):
    packed = _lz4(data) if algorithm == "lz4" else _zstd(data)
    return packed + (struct.pack("<I", crc32c(BLOCK_SEED, packed)) if crc else b"")


def _structure(flags, values):
    offset, count, size, index_crc, block, algorithm, crc = values
    fields = struct.pack("<24sIIQQQQIIIBBB5xIB7x", MAGIC, 96, 0, flags, offset, count, size, index_crc, 0, block,
                         algorithm, 0, 0, 0, crc)
    data = bytearray(fields.ljust(512, b"\0"))
    data[28:32] = struct.pack("<I", crc32c(0, data))
    return bytes(data)


def build(data, algorithm="lz4", block=4096, crc=True):
    """A ZFile around `data`, whose values are in its trailer."""
    stored = [_stored(data[start:start + block], algorithm, crc) for start in range(0, len(data), block)]
    index = struct.pack(f"<{len(stored)}I", *map(len, stored))
    rest = (block, 1 if algorithm == "lz4" else 2, crc)
    body = b"".join(stored)
    values = (512 + len(body), len(stored), len(data), crc32c(0, index), *rest)
    return (_structure(HEADER | DATA | DIGEST, (0, 0, 0, 0, *rest)) + body + index
            + _structure(DATA | SEALED | DIGEST, values))


def values(blob):
    """The structure of a ZFile that counts: its header, or its trailer where the header is not final."""
    header = blob[:512]
    return header if int.from_bytes(header[32:40], "little") & 8 else blob[-512:]


def original_bytes(blob):
    """The original size that a ZFile records."""
    return int.from_bytes(values(blob)[56:64], "little")


def offset_of(data, number, algorithm="lz4", block=4096, crc=True):
    """The byte of the ZFile at which a block starts."""
    return 512 + sum(len(_stored(data[start:start + block], algorithm, crc))
                     for start in range(0, number * block, block))
