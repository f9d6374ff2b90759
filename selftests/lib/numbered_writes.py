# SPDX-License-Identifier: GPL-2.0
"""Writes of which every one can be told from all others, so that what a device or an image has tells at which moment."""

import mmap
import os
import struct
import threading
import time

BLOCK = 4096
SIZE = 4 << 20
BLOCKS = SIZE // BLOCK


class Writer(threading.Thread):
    """Writes blocks one after the other, each with its number in the first and the last bytes; block `place(n)` with
    number n. What is on the device is what the numbers up to some n left there."""

    def __init__(self, device, acknowledged=0, flush=False):
        super().__init__(daemon=True)
        self._flush = flush
        self._file = os.open(device, os.O_RDWR | os.O_DIRECT)
        self._buffer = mmap.mmap(-1, BLOCK)
        self._ended = threading.Event()
        self.acknowledged = acknowledged
        self.longest = 0.0
        self.error = None

    @staticmethod
    def place(number):
        return (number * 0x9e3779b97f4a7c15 >> 20) % BLOCKS

    def run(self):
        try:
            while not self._ended.is_set():
                number = self.acknowledged + 1
                self._buffer[:8] = self._buffer[-8:] = struct.pack("<Q", number)
                start = time.monotonic()
                os.pwritev(self._file, [self._buffer], self.place(number) * BLOCK)
                if self._flush:
                    os.fdatasync(self._file)
                self.longest = max(self.longest, time.monotonic() - start)
                self.acknowledged = number
                time.sleep(0.0005)
        except OSError as error:
            self.error = error
        finally:
            os.close(self._file)

    def stop(self):
        self._ended.set()
        self.join()


class Model:
    """What the numbers of the writes up to one left on the device."""

    def __init__(self):
        self._blocks = [0] * BLOCKS
        self._number = 0

    def at(self, number):
        """The number that each block has after a write."""
        if number < self._number:
            self.__init__()
        for later in range(self._number + 1, number + 1):
            self._blocks[Writer.place(later)] = later
        self._number = number
        return self._blocks


def moment(image, model):
    """The number of the last write that an image has, if it is what the device had then; else why it is not."""
    found = []
    for block in range(BLOCKS):
        first = struct.unpack_from("<Q", image, block * BLOCK)
        last = struct.unpack_from("<Q", image, (block + 1) * BLOCK - 8)
        if first != last:
            return f"block {block} is torn: {first} and {last}"
        found.append(first[0])
    newest = max(found)
    wanted = model.at(newest)
    wrong = [block for block in range(BLOCKS) if found[block] != wanted[block]]
    return f"blocks {wrong[:5]} are of another moment" if wrong else newest
