# SPDX-License-Identifier: GPL-2.0
"""Threads that read a device at random while something is done to it, and say what they saw."""

import errno
import os
import random
import threading

from block_devices import read_direct

LENGTHS = (512, 4096, 4096, 5120, 65536, 131072)


class Readers:
    """Direct and buffered readers of a device whose content is known; use it in a `with` statement.

    Afterwards `wrong` lists reads that gave other bytes, `errors` counts the error numbers, and `good` the reads that
    were right.
    """

    def __init__(self, device, content, count=3, seed=1):
        self.wrong, self.errors, self.good = [], {}, 0
        self._device, self._content = device, content
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(seed + number, number % 3 == 2))
                         for number in range(count)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_exception):
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait(self, reads):
        """Waits until that many more reads have come back, well or not."""
        target = self.total() + reads
        while self.total() < target and any(thread.is_alive() for thread in self._threads):
            self._stop.wait(0.01)

    def total(self):
        with self._lock:
            return self.good + len(self.wrong) + sum(self.errors.values())

    def only(self, *numbers):
        """Whether no read was wrong and all errors were of these numbers."""
        return not self.wrong and set(self.errors) <= set(numbers)

    def some_failed(self):
        """Whether some reads gave EIO, some the right bytes, and none anything else."""
        return self.only(errno.EIO) and self.good and self.errors

    def __str__(self):
        names = {errno.errorcode.get(number, number): count for number, count in self.errors.items()}
        return f"{self.good} good, errors {names}, wrong {self.wrong[:5]}"

    def _read(self, buffered, offset, length):
        if not buffered:
            return read_direct(self._device, offset, length)
        with open(self._device, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), offset, length, os.POSIX_FADV_DONTNEED)
            return os.pread(file.fileno(), length, offset)

    def _run(self, seed, buffered):
        chosen = random.Random(seed)
        while not self._stop.is_set():
            length = chosen.choice(LENGTHS)
            offset = chosen.randrange((len(self._content) - length) // 512 + 1) * 512
            try:
                data = self._read(buffered, offset, length)
            except OSError as error:
                with self._lock:
                    self.errors[error.errno] = self.errors.get(error.errno, 0) + 1
                continue
            # A buffered read ends before a page that cannot be read.
            good = data == self._content[offset:offset + (len(data) if buffered and data else length)]
            with self._lock:
                if good:
                    self.good += 1
                else:
                    self.wrong.append((offset, length, len(data)))
