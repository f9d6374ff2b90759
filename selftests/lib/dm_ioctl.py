# SPDX-License-Identifier: GPL-2.0
"""Mapped devices by ioctl, for tests that make very many of them.

A `dmsetup` process takes most of a second under emulation, the ioctl almost nothing. What is tested is the kernel's
side; tests about `dmsetup` itself run it.
"""

import atexit
import errno
import fcntl
import os
import struct
import time

# linux/dm-ioctl.h
HEADER = struct.Struct("=3I 3I i 3I Q 128s 129s 7x")
SPEC = struct.Struct("=QQiI16s")
CREATE, REMOVE, SUSPEND, WAIT, LOAD, STATUS, MESSAGE = 3, 4, 6, 8, 9, 12, 14
READONLY, SUSPENDED, TABLE, NOFLUSH, REPLY, IMA = 1, 2, 16, 1 << 11, 1 << 16, 1 << 19
BUFFER = 1 << 17


def _control(command, name, payload=b"", flags=0, targets=0, event=0, number=0):
    """One ioctl on the device of this name, or without a name of this number; returns the flags, the device number,
    the number of targets and what came back."""
    # Python lets no other thread run during an ioctl with more than 1024 bytes.
    buffer = bytearray(1024 if command in (SUSPEND, WAIT) else BUFFER + len(payload))
    HEADER.pack_into(buffer, 0, 4, 0, 0, len(buffer), HEADER.size, targets, 0, flags, event, 0, number, name.encode(),
                     b"")
    buffer[HEADER.size:HEADER.size + len(payload)] = payload
    control = os.open("/dev/mapper/control", os.O_RDWR)
    try:
        fcntl.ioctl(control, 3 << 30 | HEADER.size << 16 | 0xFD << 8 | command, buffer)
    finally:
        os.close(control)
    answer = HEADER.unpack_from(buffer)
    return answer[7], answer[10], answer[5], bytes(buffer[answer[4]:answer[3]])


def suspended_for(name):
    """Suspends a device and resumes it at once; returns the seconds that it took."""
    start = time.monotonic()
    _control(SUSPEND, name, flags=SUSPENDED)
    _control(SUSPEND, name)
    return time.monotonic() - start


class Refused(OSError):
    """The kernel did not take a table."""


class Mapped:
    """A mapped device from the lines of a table; use it in a `with` statement."""

    def __init__(self, name, table, readonly=True):
        self.name = name
        self.readonly = readonly
        _, self.number, _, _ = _control(CREATE, name)
        self.minor = self.number & 0xFF | self.number >> 12 & 0xFFF00
        self.node = f"/dev/dm-{self.minor}"
        try:
            self.load(table)
            self.resume()
        except OSError as error:
            self.remove()
            raise Refused(*error.args) from error
        atexit.register(self.remove)

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        self.remove()

    def load(self, table):
        """Loads a table, which `resume` then makes live."""
        payload = b""
        lines = table.splitlines()
        for line in lines:
            start, length, kind, *words = line.split(" ", 3)
            text = (words[0] if words else "").encode() + b"\0"
            text += bytes(-len(text) % 8)
            payload += SPEC.pack(int(start), int(length), 0, SPEC.size + len(text), kind.encode()) + text
        _control(LOAD, self.name, payload, READONLY if self.readonly else 0, len(lines))

    def suspend(self, flags=0):
        _control(SUSPEND, self.name, flags=SUSPENDED | flags)

    def resume(self):
        _control(SUSPEND, self.name)

    def reload(self, table):
        """Replaces the table while the device is in use."""
        self.load(table)
        self.suspend()
        self.resume()

    def status(self, flags=0):
        """The status of all targets, one line each: `INFO`, or with TABLE the table, or with IMA the measurement."""
        _, _, targets, data = _control(STATUS, self.name, flags=flags)
        lines, at = [], 0
        for _ in range(targets):
            start, length, _, following, kind = SPEC.unpack_from(data, at)
            text = data[at + SPEC.size:following].split(b"\0")[0].decode()
            lines.append(f"{start} {length} {kind.rstrip(bytes(1)).decode()} {text}")
            at = following
        return "\n".join(lines)

    def message(self, text, sector=0):
        """Sends a message to the target at a sector; returns the reply, or None where there is none."""
        flags, _, _, data = _control(MESSAGE, self.name, struct.pack("=Q", sector) + text.encode() + b"\0")
        return data.split(b"\0")[0].decode() if flags & REPLY else None

    def wait(self, event):
        """Waits until the device, whatever it is called by then, has had more than `event` events."""
        _control(WAIT, "", event=event, number=self.number)

    def remove(self):
        """Removes the device; udev may hold it open for a moment."""
        atexit.unregister(self.remove)
        for _ in range(100):
            try:
                _control(REMOVE, self.name)
                return
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                if error.errno != errno.EBUSY:
                    raise
                time.sleep(0.1)
        raise OSError(errno.EBUSY, f"{self.name} stays in use")


def remove(name):
    """Removes the device of this name, if there is one."""
    try:
        _control(REMOVE, name)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise


def with_errors(device, sectors, bad):
    """The table of a device's first sectors, of which some fail: `bad` has pairs of a sector and a length, sorted."""
    lines, at = [], 0
    for start, length in bad:
        if start > at:
            lines.append(f"{at} {start - at} linear {device} {at}")
        lines.append(f"{start} {length} error")
        at = start + length
    if at < sectors:
        lines.append(f"{at} {sectors - at} linear {device} {at}")
    return "\n".join(lines)


class KernelLog:
    """The kernel log from the time it is opened on."""

    def __init__(self):
        self._file = open("/dev/kmsg", "rb", buffering=0)
        os.set_blocking(self._file.fileno(), False)
        self._file.seek(0, os.SEEK_END)

    def new(self):
        """What arrived since the last call, one message a line."""
        lines = []
        while True:
            try:
                record = self._file.read(8192)
            except BrokenPipeError:
                continue
            if not record:
                return "\n".join(lines)
            lines.append(record.decode(errors="replace").partition(";")[2].splitlines()[0])


# What the targets of this repository say of a table that is not read-only.
MUST_BE_READ_ONLY = "Table must be read-only (dmsetup create --readonly)"


def table_refused(tap, log, what, table, *reasons, readonly=True):
    """Passes where the table is refused and the kernel log gives all `reasons`."""
    log.new()
    try:
        mapped = Mapped("refused", table, readonly)
    except Refused:
        text = log.new()
        tap.result(all(reason in text for reason in reasons), f"{what}: refused",
                   f"table: {table}\nwanted in the log: {reasons}\n{text}")
    else:
        mapped.remove()
        tap.result(False, f"{what}: refused", f"the table was accepted: {table}")
