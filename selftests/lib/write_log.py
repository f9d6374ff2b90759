# SPDX-License-Identifier: GPL-2.0
"""What dm-log-writes notes of a device: every write, in the order in which flushes made them last. Its beginning up to any
entry is what the disk may have after a power cut at that moment.

A block of 512 bytes says how many entries there are, each a block that says where and how much was written, and then that.
"""

import os
import struct

SECTOR = 512
MAGIC = 0x6a736677736872
DISCARD, MARK = 4, 8


class WriteLog:
    def __init__(self, path):
        self._file = open(path, "rb", buffering=0)
        magic, version, count, sector_bytes = struct.unpack("<QQQI", self._file.read(28))
        assert (magic, version, sector_bytes) == (MAGIC, 1, SECTOR), (magic, version, sector_bytes)
        # First sector and number of sectors on the device, flags, what a mark says, and where the data is.
        self._entries, at = [], SECTOR
        for _ in range(count):
            block = os.pread(self._file.fileno(), SECTOR, at)
            sector, sectors, flags, length = struct.unpack_from("<QQQQ", block)
            at += SECTOR
            self._entries.append((sector, sectors, flags, block[32:32 + length].decode() if flags & MARK else None, at))
            if not flags & DISCARD:
                at += sectors * SECTOR

    def __len__(self):
        return len(self._entries)

    def marks(self):
        """Numbers of the entries that are marks, and what they say."""
        return [(number, mark) for number, (_, _, _, mark, _) in enumerate(self._entries) if mark is not None]

    def replay(self, disk, first, end):
        """Writes what entries say to an open file."""
        for sector, sectors, flags, _, at in self._entries[first:end]:
            # What is discarded may stay as it is.
            if not flags & (DISCARD | MARK) and sectors:
                os.pwrite(disk.fileno(), os.pread(self._file.fileno(), sectors * SECTOR, at), sector * SECTOR)
