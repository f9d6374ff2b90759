#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""What must be refused: bad table lines, layers whose devices fail while they are read, and layers with a field of
header, trailer or index changed. Such a change is either refused, or the device has exactly the content that the
changed layer says. Nothing is left open afterwards: the module can be unloaded."""

import contextlib
import os
import random
import struct
import subprocess
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
import dm_ioctl
import lsmt_writer
from block_devices import Devices, read_direct, stack_table
from test_script import MODULES, Tap, load, run

SECTORS = 256
SEGMENTS = [(0, 8), (8, 24), (40, 1), (50, 30), (120, 64), (200, 56)]
DISCARDED = 3
# Field offsets of header and trailer.
FLAGS, INDEX_OFFSET, INDEX_SIZE, VIRTUAL_SIZE, UUID, RESERVED, VERSION = 28, 32, 40, 48, 56, 130, 132


def bad_lines(device, size):
    """Table lines, what is wrong with them, and what the kernel log has to say."""
    pair = f"{device} {size}"
    number = "Invalid number of layers"
    length = "Invalid layer length"
    for line, what, *reasons in [
        ("", "no parameters", number),
        ("1", "no device", "Missing layer device"),
        (f"1 {device}", "no length", length),
        (f"2 {pair}", "a pair missing", "Missing layer device"),
        (f"2 {pair} {device}", "the second length missing", length),
        (f"1 {pair} 0 x", "a word too many", "Too many arguments"),
        (f"1 {pair} 1 x", "an option", "Unrecognised optional argument"),
        (f"1 {pair} 1", "a missing option", "Not enough arguments in group"),
        (f"1 {pair} x", "a number of options that is none", "Unrecognised optional argument"),
        (f"1 {pair} -1", "a negative number of options", "Unrecognised optional argument"),
        (f"1 {pair} {pair}", "a pair too many", "Unrecognised optional argument"),
        (f"0 {pair}", "0 layers", "Number of layers must be 1 to 255"),
        ("256" + f" {pair}" * 256, "256 layers", "Number of layers must be 1 to 255"),
        (f"-1 {pair}", "a negative number of layers", number),
        (f"1.0 {pair}", "a fraction of layers", number),
        (f"0x1 {pair}", "a hexadecimal number of layers", number),
        (f"+1 {pair}", "a sign", number),
        (f"18446744073709551616 {pair}", "a number of layers beyond 64 bits", number),
        (f"18446744073709551615 {pair}", "the largest number of layers", "Number of layers must be 1 to 255"),
        (f"1 /dev/missing {size}", "a missing device", "Cannot open layer device", "/dev/missing"),
        (f"1 259:4095 {size}", "a missing device number", "Cannot open layer device"),
        (f"1 {device} 0", "length 0", "layer 0"),
        (f"1 {device} 8191", "a length below header and trailer", "layer 0"),
        (f"1 {device} -{size}", "a negative length", length),
        (f"1 {device} {size}k", "a length with a unit", length),
        (f"1 {device} 18446744073709551616", "a length beyond 64 bits", length),
        (f"1 {device} 18446744073709551615", "the largest length", "Layer length is beyond the end of its device"),
        (f"1 {device} {size + 1}", "a length beyond the device", "Layer length is beyond the end of its device"),
        (f"1 {device} {size - 1}", "a length off by a byte", "layer 0"),
        (f"1 {device} {size - 512}", "a length off by a sector", "layer 0"),
        (f"2 {pair} {device} {size - 512}", "a bad second layer", "layer 1"),
    ]:
        yield f"0 {SECTORS} overlaybd {line}", what, reasons
    yield f"0 {SECTORS + 1} overlaybd 1 {pair}", "a target longer than the virtual size", [
        "Target is longer than the virtual size"]


def check_failing(tap, log, device, size, model):
    """A part of the layer's device fails: where the constructor reads it the table is refused, else it is not."""
    total = size // 512
    trailer = total - 8
    index = trailer - 8
    for what, first, refused in [("header", 0, True), ("data", 8, False), ("index", index, True),
                                 ("trailer", trailer, True), ("end of the trailer", total - 1, True)]:
        count = 1 if what == "data" else min(8, total - first)
        with dm_ioctl.Mapped("failing", dm_ioctl.with_errors(device, total, [(first, count)])) as failing:
            line = f"0 {SECTORS} overlaybd 1 {failing.node} {size}"
            if refused:
                dm_ioctl.table_refused(tap, log, f"a device that fails in the {what}", line, "layer 0", "Cannot read")
                continue
            with dm_ioctl.Mapped("mapped", line) as mapped:
                tap.result(read_direct(mapped.node, 512, (SECTORS - 1) * 512) == model.content[512:],
                           f"a device that fails in the {what}: accepted")


def mutants(blob):
    """Pairs of a description and a changed copy of the layer."""
    trailer = len(blob) - lsmt_writer.BLOCK
    index, = struct.unpack_from("<Q", blob, trailer + INDEX_OFFSET)

    def changed(at, data):
        return blob[:at] + data + blob[at + len(data):]

    def numbers(name, at, form, values):
        old, = struct.unpack_from(form, blob, at)
        for value in values:
            if value != old:
                yield f"{name} {value:#x}", changed(at, struct.pack(form, value))

    for name, base in [("header", 0), ("trailer", trailer)]:
        yield f"{name}: first magic", changed(base + 7, b"\1")
        yield f"{name}: second magic", changed(base + 23, b"\0")
        flags, = struct.unpack_from("<I", blob, base + FLAGS)
        yield from numbers(f"{name}: flags", base + FLAGS, "<I",
                           [0, *(flags ^ 1 << bit for bit in (0, 1, 2, 3, 4, 31))])
        yield f"{name}: UUID", changed(base + UUID, b"\xff" * 74)
        yield f"{name}: reserved, versions and tag", changed(base + RESERVED, b"\xee" * 260)
    yield from numbers("header: index_offset", INDEX_OFFSET, "<Q", [4096, (1 << 64) - 1])
    yield from numbers("trailer: index_offset", trailer + INDEX_OFFSET, "<Q", [
        0, 512, 4096, index - 512, index - 1, index + 1, index + 16, index + 512, index + 4096, trailer, len(blob),
        1 << 55, 1 << 63, (1 << 64) - 512, (1 << 64) - 1])
    yield from numbers("trailer: index_size", trailer + INDEX_SIZE, "<Q", [
        0, 1, 3, 5, 6, 255, 257, 512, 1000000, 1000001, 1 << 32, 1 << 60, (1 << 60) + 256, (1 << 64) - 1])
    yield from numbers("trailer: virtual_size", trailer + VIRTUAL_SIZE, "<Q", [
        0, 1, 512, (SECTORS - 1) * 512, SECTORS * 512 - 1, SECTORS * 512 + 1, 1 << 40, ((1 << 50) - 1) * 512,
        1 << 59, (1 << 64) - 1])

    for number, (start, sectors) in enumerate(SEGMENTS):
        at = index + 16 * number
        low, high = struct.unpack_from("<QQ", blob, at)
        for value in {0, 1, 15, start - 1, start + 1, SECTORS - 1, SECTORS, (1 << 50) - 2, (1 << 50) - 1}:
            if value not in (start, -1):
                yield f"entry {number}: offset {value:#x}", changed(at, struct.pack("<Q", value | sectors << 50))
        for value in {0, 1, sectors - 1, sectors + 1, 16383}:
            if value != sectors:
                yield f"entry {number}: length {value}", changed(at, struct.pack("<Q", start | value << 50))
        stored = high & (1 << 55) - 1
        for value in {0, 7, 8, 9, stored - 1, stored + 1, index // 512, index // 512 + 1, (1 << 55) - 1}:
            if value != stored:
                yield f"entry {number}: moffset {value:#x}", changed(
                    at + 8, struct.pack("<Q", value | high & ~((1 << 55) - 1)))
        yield f"entry {number}: zeroed", changed(at + 8, struct.pack("<Q", high ^ 1 << 55))
        yield f"entry {number}: tag", changed(at + 15, b"\7")
    yield "all tags", b"".join([blob[:index], *(blob[index + 16 * n:index + 16 * n + 15] + b"\3" for n in range(256)),
                                blob[trailer:]])
    yield "entries swapped", changed(index, blob[index + 16:index + 32] + blob[index:index + 16])


def interpret(blob):
    """The content of the first SECTORS sectors of a layer, or None where it must be refused."""
    magic, _, flags, *_ = lsmt_writer.RAW.unpack_from(blob, 0)
    if magic != lsmt_writer.MAGIC or flags & 3 != 3:
        return None
    end = len(blob) - lsmt_writer.BLOCK
    magic, _, flags, index, count, size, *_ = lsmt_writer.RAW.unpack_from(blob, end)
    if magic != lsmt_writer.MAGIC or flags & 7 != 6 or count > 1000000:
        return None
    if index < lsmt_writer.BLOCK or index % 512 or index + 16 * count > end or size > ((1 << 50) - 1) * 512:
        return None
    # A size that is no multiple of a sector is rounded up.
    if -(-size // 512) < SECTORS:
        return None
    content, position, written = bytearray(SECTORS * 512), 0, 8
    tags, ordered = set(), True
    for low, high in struct.iter_unpack("<QQ", blob[index:index + 16 * count]):
        start, sectors = low & (1 << 50) - 1, low >> 50
        stored, zeroed, tag = high & (1 << 55) - 1, high >> 55 & 1, high >> 56
        if start == (1 << 50) - 1:
            continue
        # Beyond the size of the layer is allowed, beyond that of all stacks is not.
        if start < position or start + sectors > (1 << 50) - 1:
            return None
        if stored < 8 or stored + sectors * (not zeroed) > index // 512:
            return None
        position = start + sectors
        tags.add(tag)
        if not zeroed:
            ordered &= stored == written
            written += sectors
            content[start * 512:position * 512] = blob[stored * 512:(stored + sectors) * 512]
        # Several tags, and data that was not written in this order: the data is in more than one file.
        if len(tags) > 1 and not ordered:
            return None
    return bytes(content[:SECTORS * 512])


@contextlib.contextmanager
def loaded_with_limit(segments):
    """The module, which is not loaded, with that value of max_segments while the body runs."""
    run("insmod", MODULES / "dm-overlaybd" / "dm-overlaybd.ko", f"max_segments={segments}")
    yield
    run("rmmod", "dm-overlaybd")


def check_mutants(tap, log, blob):
    wrong, accepted, refused = [], 0, 0
    for what, mutant in mutants(blob):
        wanted = interpret(mutant)
        log.new()
        with Devices() as devices:
            line = stack_table(devices, [mutant], SECTORS)
            try:
                mapped = dm_ioctl.Mapped("mutant", line)
            except OSError:
                refused += 1
                text = log.new()
                if wanted is not None:
                    wrong.append(f"{what}: refused: {text}")
                elif "overlaybd: layer 0" not in text and "overlaybd: the table has" not in text:
                    wrong.append(f"{what}: refused without a reason: {text}")
                continue
            with mapped:
                accepted += 1
                if wanted is None:
                    wrong.append(f"{what}: accepted")
                elif read_direct(mapped.node, 0, SECTORS * 512) != wanted:
                    wrong.append(f"{what}: other content")
    tap.result(not wrong, f"{accepted + refused} changed layers: {refused} refused, {accepted} right", "\n".join(wrong))
    tap.result(refused > 40 and accepted > 20, "changed layers: both happened")


tap = Tap()
generator = random.Random(5)
load("loop", "dm-overlaybd")
log = dm_ioctl.KernelLog()
segments = [(start, sectors, None if number == DISCARDED else generator.randbytes(sectors * 512))
            for number, (start, sectors) in enumerate(SEGMENTS)]
blob = lsmt_writer.layer(segments, SECTORS)
with Devices() as devices:
    line = stack_table(devices, [blob], SECTORS)
    device = line.split()[4]
    model = lsmt_writer.Model([segments], SECTORS)
    with dm_ioctl.Mapped("good", line) as mapped:
        content = read_direct(mapped.node, 0, SECTORS * 512)
        tap.result(content == model.content == interpret(blob), "the layer unchanged")
    dm_ioctl.table_refused(tap, log, "a writable table", line, dm_ioctl.MUST_BE_READ_ONLY, readonly=False)
    for line, what, reasons in bad_lines(device, len(blob)):
        dm_ioctl.table_refused(tap, log, what, line, *reasons)
    check_failing(tap, log, device, len(blob), model)
check_mutants(tap, log, blob)
tap.equal(subprocess.run(["rmmod", "dm-overlaybd"]).returncode, 0, "the module can be unloaded")
# The layer has 256 entries, padding included; two of it still merge to 6 segments.
with loaded_with_limit(511), Devices() as devices:
    line = stack_table(devices, [blob, blob], SECTORS)
    one = line.split(" ", 4)[4].rsplit(" ", 2)[0]
    with dm_ioctl.Mapped("fits", f"0 {SECTORS} overlaybd 1 {one}"):
        tap.result(True, "max_segments: as many entries are allowed")
    dm_ioctl.table_refused(tap, log, "max_segments: an entry more", line, "512 index entries, max_segments allows 511")
# Two full layers: what is below shows on both sides of every segment above.
pair = [lsmt_writer.layer([(at * 8 + first, sectors, None) for at in range(256)], 2048)
        for first, sectors in ((0, 6), (2, 2))]
with loaded_with_limit(767), Devices() as devices:
    dm_ioctl.table_refused(tap, log, "max_segments: a merged segment more", stack_table(devices, pair, 2048),
                           "more segments than max_segments allows, 767")
with (loaded_with_limit(768), Devices() as devices,
      dm_ioctl.Mapped("fits", stack_table(devices, pair, 2048)) as mapped):
    tap.equal(mapped.status().split()[4], "768", "max_segments: as many merged segments are allowed")
tap.finish()
