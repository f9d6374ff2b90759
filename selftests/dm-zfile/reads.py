#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Reads of all shapes through dm-zfile: the right bytes, one decompression for sequential small reads, a flipped byte
that costs exactly one block and raises an event, and the device's table reloaded and the device removed under load."""

import os
import random
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
import dm_ioctl
import zfile_writer
from block_devices import DMSETUP, Devices, read_direct
from test_script import SCRATCH, CommandFailed, Tap, load, run

MIB = 1 << 20


def status(name):
    words = run("dmsetup", "status", name).split()[3:]
    names = ["algorithm", "block", "blocks", "compressed", "decompressed", "hits", "crc", "decode", "read"]
    return {key: word if key == "algorithm" else int(word) for key, word in zip(names, words)}


def make(devices, name, content, options="", damage=None, **how):
    """A dm-zfile device over `content`; `damage` flips the byte at that offset of the file."""
    blob = bytearray(zfile_writer.build(content, **how))
    if damage is not None:
        blob[damage] ^= 1
    path = SCRATCH / f"{name}.zfile"
    path.write_bytes(blob + bytes(-len(blob) % 512))
    loop = devices.loop(path)
    return devices.map(name, f"0 {-(-len(content) // 512)} zfile {loop} {len(blob)}{options}")


def random_reads(device, content, count, seed):
    """Direct and buffered reads at odd places; an AssertionError where one is wrong."""
    chosen = random.Random(seed)
    padded = content + bytes(-len(content) % 512)
    for number in range(count):
        length = chosen.choice([512, 1024, 4096, 5120, 65536, 69632, 262144, MIB]) // 512
        offset = chosen.randrange(0, max(1, len(padded) // 512 - 1))
        length = min(length, len(padded) // 512 - offset)
        start, end = offset * 512, (offset + length) * 512
        assert read_direct(device, start, end - start) == padded[start:end], f"bytes {start} to {end}"


def shapes(tap):
    for algorithm in ("lz4", "zstd"):
        for block in (512, 4096, 16384, 65536):
            for crc in (True, False):
                with Devices() as devices:
                    content = zfile_writer.content(MIB + 1337, block, seed=block)
                    what = f"{algorithm} {block} {'with' if crc else 'without'} CRC"
                    device = make(devices, "shape", content, algorithm=algorithm, block=block, crc=crc)
                    tap.attempt(f"{what}: direct reads", random_reads, device, content, 15, block)
                    with open(device, "rb") as file:
                        tap.result(file.read() == content + bytes(-len(content) % 512), f"{what}: buffered read")


def sequential(tap):
    """4 KiB after 4 KiB, each block of 64 KiB is decompressed once."""
    content = zfile_writer.content(MIB, 65536)
    for options, wanted in (("", 16), (" 2 cache_blocks 1", 16), (" 2 cache_blocks 0", 256)):
        with Devices() as devices:
            device = make(devices, "seq", content, options, block=65536)
            before = status("seq")["decompressed"]
            for offset in range(0, MIB, 4096):
                if read_direct(device, offset, 4096) != content[offset:offset + 4096]:
                    tap.result(False, f"sequential 4 KiB, options{options}: content at {offset}")
                    return
            count = status("seq")["decompressed"] - before
            tap.equal(count, wanted, f"sequential 4 KiB, options '{options}': blocks decompressed")


def damage(tap):
    """One flipped byte in block 5."""
    content = zfile_writer.content(64 * 4096, 4096)
    with Devices() as devices:
        offset = zfile_writer.offset_of(content, 5, block=4096) + 100
        device = make(devices, "flip", content, block=4096, damage=offset)
        event = int(run("dmsetup", "info", "-c", "--noheadings", "-o", "events", "flip"))
        waiter = subprocess.Popen(["dmsetup", "wait", "--noflush", "flip", str(event)], stdout=subprocess.DEVNULL)
        bad = []
        for block in range(64):
            try:
                good = read_direct(device, block * 4096, 4096) == content[block * 4096:(block + 1) * 4096]
            except OSError:
                bad.append(block)
            else:
                if not good:
                    bad.append(f"{block} wrong")
        tap.equal(bad, [5], "a flipped byte: one block fails")
        tap.equal((status("flip")["crc"], status("flip")["decode"]), (1, 0), "a flipped byte: counted")
        try:
            tap.equal(waiter.wait(20), 0, "a flipped byte: event")
        except subprocess.TimeoutExpired:
            waiter.kill()
            tap.result(False, "a flipped byte: event")
        buffered = []
        with open(device, "rb", buffering=0) as file:
            for block in range(64):
                try:
                    file.seek(block * 4096)
                    if file.read(4096) != content[block * 4096:(block + 1) * 4096]:
                        buffered.append(f"{block} wrong")
                except OSError:
                    buffered.append(block)
        # The page cache fails a whole folio, which can be larger than a block.
        tap.result(5 in buffered and all(block in range(16) for block in buffered),
                   "a flipped byte: the page cache has the other blocks", buffered)
    with Devices() as devices:
        device = make(devices, "ignore", content, " 1 ignore_crc", block=4096, damage=offset)
        read_direct(device, 5 * 4096, 4096)
        tap.equal(status("ignore")["crc"], 0, "ignore_crc")


def tables(tap):
    content = zfile_writer.content(40960, 4096)
    blob = zfile_writer.build(content, block=4096)
    path = SCRATCH / "table.zfile"
    path.write_bytes(blob + bytes(-len(blob) % 512))
    log = dm_ioctl.KernelLog()
    with Devices() as devices:
        loop = devices.loop(path)
        size = len(blob)
        for line, reason in (
            ("zfile", "Missing device"),
            (f"zfile {loop}", "Invalid length"),
            (f"zfile {loop} 12x", "Invalid length"),
            (f"zfile {loop} -1", "Invalid length"),
            (f"zfile {loop} {size - 1}", "trailer magic"),
            (f"zfile {loop} {size + 512}", "beyond the end"),
            (f"zfile {loop} 300", "too short"),
            (f"zfile /dev/nonexistent {size}", "Cannot open device"),
            (f"zfile {loop} {size} 1 fast", "Unrecognised optional argument"),
            (f"zfile {loop} {size} 1 cache_blocks", "Invalid number of cache blocks"),
            (f"zfile {loop} {size} 2 cache_blocks 257", "cache blocks must be"),
            (f"zfile {loop} {size} 1 offset", "Invalid offset"),
            (f"zfile {loop} {size} 2 offset -1", "Invalid offset"),
            (f"zfile {loop} {size} 2 offset 0x200", "Invalid offset"),
            (f"zfile {loop} {size} 2 offset {1 << 64}", "Invalid offset"),
            (f"zfile {loop} {size} 2 offset {(1 << 64) - 1}", "beyond the end"),
            (f"zfile {loop} {size} 2 offset {(1 << 64) - size}", "beyond the end"),
            (f"zfile {loop} {size} 2 offset {(1 << 63) - size}", "beyond the end"),
            (f"zfile {loop} {size} 2 offset 512", "beyond the end"),
            (f"zfile {loop} {(1 << 64) - 1} 2 offset 1", "beyond the end"),
            (f"zfile {loop} {size - 1} 2 offset 1", "magic"),
            (f"zfile {loop} {size} 9 ignore_crc", "Invalid number of optional"),
            (f"zfile {loop} {size} 0 ignore_crc", "Too many arguments"),
        ):
            dm_ioctl.table_refused(tap, log, f"table '{line.replace(loop, 'DEV')}'", f"0 80 {line}", reason)
        dm_ioctl.table_refused(tap, log, "a writable table", f"0 80 zfile {loop} {size}", dm_ioctl.MUST_BE_READ_ONLY,
                               readonly=False)
        dm_ioctl.table_refused(tap, log, "a table that is too long", f"0 81 zfile {loop} {size}",
                               "longer than the file")

        devices.map("reload", f"0 80 zfile {loop} {size} 3 ignore_crc cache_blocks 2")
        table = run("dmsetup", "table", "reload")
        tap.result(table.split()[2] == "zfile" and table.endswith(" 3 ignore_crc cache_blocks 2\n"), "table", table)
        run(*DMSETUP, "load", "--readonly", "reload", "--table", table)
        run(*DMSETUP, "resume", "reload")
        tap.equal(run("dmsetup", "table", "reload"), table, "the printed table loads again")
        tap.result("decompressed=" in run("dmsetup", "message", "reload", "0", "stats"), "message stats")
        try:
            run("rmmod", "dm-zfile")
        except CommandFailed:
            tap.result(True, "the module stays while it is used")
        else:
            tap.result(False, "the module stays while it is used")


def offsets(tap):
    """Files that begin anywhere, on devices with small and large blocks, where the last byte is in the last sector."""
    content = zfile_writer.content(MIB + 1337, 4096)
    blob = zfile_writer.build(content, block=4096)
    path = SCRATCH / "offset.zfile"
    for block_size in (512, 4096):
        for start in (1, 511, 512, 1536, 4095, 4097, 70001):
            what = f"byte {start} of a device with blocks of {block_size}"
            with Devices() as devices:
                # Whatever is around the file is not taken for a part of it.
                path.write_bytes(b"\xa5" * start + blob + b"\xa5" * (-(start + len(blob)) % block_size))
                loop = devices.loop(path, block_size=block_size)
                table = f"0 {-(-len(content) // 512)} zfile {loop} {len(blob)} 2 offset {start}"
                device = devices.map("offset", table)
                tap.attempt(f"{what}: direct reads", random_reads, device, content, 12, start)
                with open(device, "rb") as file:
                    tap.result(file.read() == content + bytes(-len(content) % 512), f"{what}: buffered read")
                before = status("offset")
                tap.equal((before["crc"], before["decode"], before["read"]), (0, 0, 0), f"{what}: no errors")


def under_load(tap):
    """Two readers while the table is replaced again and again; then removal right after they stop."""
    content = zfile_writer.content(2 * MIB, 16384)
    with Devices() as devices:
        device = make(devices, "load", content, block=16384)
        table = run("dmsetup", "table", "load")
        failed = []

        def reader(seed):
            try:
                random_reads(device, content, 40, seed)
            except (AssertionError, OSError) as error:
                failed.append(str(error))

        threads = [threading.Thread(target=reader, args=(seed,)) for seed in (1, 2)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            run(*DMSETUP, "load", "--readonly", "load", "--table", table)
            run(*DMSETUP, "suspend", "load")
            run(*DMSETUP, "resume", "load")
            time.sleep(0.2)
        tap.equal(failed, [], "reads by two threads while the table is reloaded")


tap = Tap()
load("loop", "dm-zfile")
sequential(tap)
damage(tap)
tables(tap)
shapes(tap)
offsets(tap)
under_load(tap)
tap.finish()
