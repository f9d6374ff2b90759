#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Real data that ovbd compressed, through dm-zfile: fio verifies it with two jobs while the table is replaced, the
device suspended, and in the end taken away under load. Where the lower device fails, has changed or ends too early,
exactly the blocks that need that part fail; its logical block size does not matter. Writes are refused."""

import errno
import os
import pathlib
import random
import subprocess
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
import dm_ioctl
import zfile_writer
from block_devices import Devices, read_direct
from read_checks import Reader, check_writes, fio
from test_script import OVBD, SCRATCH, Tap, load, run

BLOCK = 4096
BLOCKS = 96


def block_errors(device, count=BLOCKS, size=BLOCK):
    """The error number of a read of each block, 0 for none."""
    with Reader(device) as reader:
        return [reader.error(block * size, size) for block in range(count)]


def padded(path, blob, unit=512):
    path.write_bytes(blob + bytes(-len(blob) % unit))
    return path


def touching(starts, sectors):
    """The blocks whose stored bytes, between two of `starts`, are in any of the sectors of the file."""
    return {block for block in range(BLOCKS) for sector in sectors
            if starts[block] < (sector + 1) * 512 and starts[block + 1] > sector * 512}


def check_lower(tap, devices):
    """The lower device loses sectors, its content changes, and it becomes shorter."""
    content = zfile_writer.content(BLOCKS * BLOCK, BLOCK, seed=3)
    blob = zfile_writer.build(content, block=BLOCK)
    starts = [zfile_writer.offset_of(content, block, block=BLOCK) for block in range(BLOCKS + 1)]
    loop = devices.loop(padded(SCRATCH / "lower.zfile", blob))
    total = -(-len(blob) // 512)
    linear = f"0 {total} linear {loop} 0"
    table = f"0 {len(content) // 512} zfile {{}} {len(blob)} 2 cache_blocks 0"

    bad = sorted(random.Random(9).sample(range(1, total - 8), 6))
    failing = touching(starts, bad)

    with dm_ioctl.Mapped("lower", linear) as lower, dm_ioctl.Mapped("upper", table.format(lower.node)) as upper:
        lower.reload(dm_ioctl.with_errors(loop, total, [(sector, 1) for sector in bad]))
        wanted = [errno.EIO if block in failing else 0 for block in range(BLOCKS)]
        tap.equal(block_errors(upper.node), wanted, f"sectors that fail: exactly {len(failing)} blocks fail")
        errors = int(upper.status().split()[-1])
        tap.equal(errors, len(failing), "and are counted as read errors")

        changed = bytearray(blob)
        changed_blocks = {5, 50}
        for block in changed_blocks:
            changed[starts[block] + 7] ^= 0x40
        other = devices.loop(padded(SCRATCH / "changed.zfile", bytes(changed)))
        lower.reload(f"0 {total} linear {other} 0")
        wanted = [errno.EIO if block in changed_blocks else 0 for block in range(BLOCKS)]
        tap.equal(block_errors(upper.node), wanted, "content that changed below: the CRC finds both blocks")

        # All of the metadata is gone; it was read when the table was loaded.
        lower.reload(f"0 1 zero\n1 {total - 9} linear {loop} 1\n{total - 8} 8 zero")
        gone = touching(starts, range(total - 8, total))
        wanted = [errno.EIO if block in gone else 0 for block in range(BLOCKS)]
        tap.equal(block_errors(upper.node), wanted, "metadata that changed below is not read again")

        kept = total // 2
        lower.reload(f"0 {kept} linear {loop} 0")
        gone = touching(starts, range(kept, total))
        wanted = [errno.EIO if block in gone else 0 for block in range(BLOCKS)]
        tap.equal(block_errors(upper.node), wanted, "a device that became shorter: its blocks alone fail")
        lower.reload(linear)
        tap.result(read_direct(upper.node, 0, len(content)) == content, "the device works again")


def check_failing_metadata(tap, devices, log):
    """A table over a device that fails where header, jump table or trailer are is refused."""
    content = zfile_writer.content(64 * BLOCK, BLOCK)
    blob = zfile_writer.build(content, block=BLOCK)
    loop = devices.loop(padded(SCRATCH / "metadata.zfile", blob))
    total = -(-len(blob) // 512)
    for what, sector in (("header", 0), ("jump table", (len(blob) - 512 - 8) // 512), ("trailer", total - 1)):
        with dm_ioctl.Mapped("lower", dm_ioctl.with_errors(loop, total, [(sector, 1)])) as lower:
            dm_ioctl.table_refused(tap, log, f"a device that fails in the {what}",
                                   f"0 {len(content) // 512} zfile {lower.node} {len(blob)}", "Cannot read")


def check_blocks(tap, devices):
    """A lower device with blocks of 4096 bytes serves reads of 512."""
    content = zfile_writer.content(40 * BLOCK + 100, BLOCK, seed=2)
    blob = zfile_writer.build(content, block=BLOCK)
    loop = devices.loop(padded(SCRATCH / "large.zfile", blob, 4096), block_size=4096)
    wanted = content + bytes(-len(content) % 512)
    with dm_ioctl.Mapped("blocks", f"0 {len(wanted) // 512} zfile {loop} {len(blob)}") as mapped:
        queue = pathlib.Path(f"/sys/block/dm-{mapped.minor}/queue")
        hints = [int((queue / name).read_text()) for name in ("logical_block_size", "minimum_io_size",
                                                              "optimal_io_size")]
        tap.equal(hints, [512, BLOCK, 128 << 10], "sizes of blocks and of I/O, over a device with larger blocks")
        with Reader(mapped.node) as reader:
            good = all(reader.read(at, 512) == wanted[at:at + 512] for at in range(0, len(wanted), 512))
            tap.result(good, "each sector, over a device with larger blocks")
            tap.result(reader.read(0, len(wanted)) == wanted, "all of it, over a device with larger blocks")


def build(path, raw, *options):
    run(OVBD, "build", "--format", "zfile", "--raw", *options, "-o", path, raw)
    size = path.stat().st_size
    os.truncate(path, -(-size // 512) * 512)
    return size


def check_fio(tap, devices):
    """What fio wrote to a file, compressed in different ways; each is verified, then one while it is disturbed."""
    raw = SCRATCH / "pattern"
    # Its blocks compress to about half.
    run(*fio(f"--filename={raw}", "--rw=write", "--bs=64k", "--size=8M", "--do_verify=0",
             "--buffer_compress_percentage=50"))
    tables = []
    for options in (("--algo", "lz4"), ("--algo", "zstd", "--block-size", "65536"),
                    ("--algo", "lz4", "--block-size", "16384", "--no-crc")):
        path = SCRATCH / f"{len(tables)}.zfile"
        size = build(path, raw, *options)
        tables.append(f"0 {8 << 11} zfile {devices.loop(path)} {size}")
        with dm_ioctl.Mapped("fio", tables[-1]) as mapped:
            tap.attempt(f"fio verifies mixed sizes and depth: {' '.join(options)}", run, *reads(mapped),
                        "--io_size=8M", "--numjobs=2")
    with dm_ioctl.Mapped("fio", tables[0]) as mapped:
        process = subprocess.Popen([*reads(mapped), "--time_based", "--runtime=8", "--numjobs=2"],
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        rounds = 0
        while process.poll() is None:
            rounds += 1
            mapped.load(tables[rounds % 3])
            mapped.suspend(dm_ioctl.NOFLUSH if rounds % 2 else 0)
            mapped.resume()
        output = process.stdout.read()
        tap.result(process.returncode == 0, "fio verifies while tables are replaced", output[-2000:])
        tap.result(rounds > 3, f"the table was replaced {rounds} times")
    check_writes(tap, tables[0], raw.read_bytes())
    return tables[0]


def reads(mapped):
    return fio(f"--filename={mapped.node}", "--rw=randread", "--bssplit=4k/40:8k/20:12k/10:64k/20:1m/10",
               "--ioengine=libaio", "--direct=1", "--iodepth=16", "--norandommap", "--size=8M", "--readonly")


def check_removal(tap, table):
    """dmsetup removes the device by force, then for good when its readers are gone."""
    mapped = dm_ioctl.Mapped("removed", table)
    process = subprocess.Popen([*reads(mapped), "--time_based", "--runtime=60", "--numjobs=2"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with Reader(mapped.node) as reader:
        reader.read(0, BLOCK)
        # Replaces the table by one that fails all I/O, since the device is open.
        subprocess.run(["dmsetup", "--noudevsync", "remove", "--force", "removed"], stderr=subprocess.DEVNULL)
        tap.equal(mapped.status().split()[2], "error", "removal by force under load: the table fails everything")
        tap.equal(reader.error(0, BLOCK), errno.EIO, "a reader gets an error")
        tap.result(process.wait() != 0, "fio gets errors and ends")
        run("dmsetup", "--noudevsync", "remove", "--deferred", "removed")
        tap.result("removed" in run("dmsetup", "ls"), "deferred removal waits for the reader")
    tap.result("removed" not in run("dmsetup", "ls"), "and happens when it has gone")


tap = Tap()
load("loop", "dm-zfile")
log = dm_ioctl.KernelLog()
with Devices() as devices:
    check_lower(tap, devices)
    check_failing_metadata(tap, devices, log)
    check_blocks(tap, devices)
    check_removal(tap, check_fio(tap, devices))
tap.equal(subprocess.run(["rmmod", "dm-zfile"]).returncode, 0, "the module can be unloaded")
tap.finish()
