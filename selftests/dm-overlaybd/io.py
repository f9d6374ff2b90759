#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Reads of a random stack compared with a model: direct and buffered, at every alignment and of every size, while
tables are replaced and devices suspended. Writes are refused. Where a layer's device fails or ends too early, exactly
the reads that need that part fail."""

import errno
import os
import random
import subprocess
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
import dm_ioctl
import lsmt_writer
from block_devices import Devices, read_direct, stack_table
from read_checks import Reader, check_writes, fio
from test_script import SCRATCH, Tap, load, run

SECTORS = 8192
SIZE = SECTORS * 512


def check_direct(reader, model, generator):
    for _ in range(800):
        sectors = generator.choice([1, 1, 2, 7, 8, 9, 64, 255, 2048, generator.randint(1, 2048)])
        offset = generator.randrange(SECTORS - sectors + 1) * 512
        shift = generator.choice([0, 0, 512, 1024, 3584])
        pieces = generator.choice([piece for piece in (1, 1, 2, 16, 64) if sectors % piece == 0])
        wanted = model.read(offset, sectors * 512)
        got = reader.read(offset, sectors * 512, shift, pieces)
        assert got == wanted, f"{sectors} sectors at byte {offset}, shift {shift}, {pieces} pieces: other bytes"


def check_each_sector(reader, model):
    for sector in range(SECTORS // 4):
        got = reader.read(sector * 512, 512)
        assert got == model.read(sector * 512, 512), f"sector {sector}: other bytes"


def check_buffered(device, model, generator):
    with Reader(device, 0) as reader:
        for _ in range(400):
            length = min(generator.choice([1, 100, 4096, 5000, 100000, 1 << 20]), SIZE)
            offset = generator.randrange(SIZE - length + 1)
            assert reader.read(offset, length) == model.read(offset, length), f"{length} bytes at {offset}: other bytes"


def check_nowait(reader, model):
    served = 0
    for sector in range(0, SECTORS, 8):
        try:
            got = reader.read(sector * 512, 512, flags=os.RWF_NOWAIT)
        except BlockingIOError:
            continue
        served += 1
        assert got == model.read(sector * 512, 512), f"sector {sector}: other bytes"
    assert served > SECTORS // 16, f"only {served} of {SECTORS // 8} reads were served"


def check_targets(tap, line, model):
    """Two targets in one table, which begin at other sectors than 0 and do not show the whole stack."""
    words = line.split(" ", 2)[2]
    table = f"0 1001 {words}\n1001 2000 {words}\n3001 77 zero\n3078 1 {words}"
    wanted = model.read(0, 1001 * 512) + model.read(0, 2000 * 512) + bytes(77 * 512) + model.read(0, 512)
    with dm_ioctl.Mapped("several", table) as mapped:
        tap.result(read_direct(mapped.node, 0, len(wanted)) == wanted, "several targets in one table: content")
        tap.equal(mapped.message("lookup 5", 1006), mapped.message("lookup 5", 0),
                  "lookup counts from the target's start")
        with Reader(mapped.node) as reader, dm_ioctl.Mapped("whole", line) as whole, Reader(whole.node) as flat:
            good = all(reader.read(at * 512, 512) == wanted[at * 512:at * 512 + 512]
                       for at in (0, 1000, 1001, 3000, 3001))
            tap.result(good and flat.read(0, 512) == model.read(0, 512), "sectors at the ends of targets")


def check_failing(tap, line, stack, model, generator):
    """Layer 1 on a device of which some sectors fail; then on one that has become shorter."""
    words = line.split()
    device, size = words[6], int(words[7])
    total = size // 512
    data = sum(sectors for _, sectors, content in stack[1] if content is not None)
    bad = sorted(generator.sample(range(8, 8 + data), 12))
    failing = {sector for sector, source in enumerate(model.source) if source in {(1, place) for place in bad}}
    assert failing
    with dm_ioctl.Mapped("lower", dm_ioctl.with_errors(device, total, [(sector, 1) for sector in bad])) as lower:
        words[6] = lower.node
        with dm_ioctl.Mapped("upper", " ".join(words)) as upper, Reader(upper.node) as reader:
            affected = sorted({sector + near for sector in failing for near in range(-20, 21)} & set(range(SECTORS)))
            wrong = [sector for sector in affected
                     if reader.error(sector * 512, 512) != (errno.EIO if sector in failing else 0)]
            tap.equal(wrong, [], f"error target under a layer: exactly {len(failing)} sectors fail")
            wrong = []
            for _ in range(300):
                sectors = generator.randint(1, 256)
                first = generator.randrange(SECTORS - sectors)
                hit = not failing.isdisjoint(range(first, first + sectors))
                if reader.error(first * 512, sectors * 512) != (errno.EIO if hit else 0):
                    wrong.append((first, sectors))
            tap.equal(wrong, [], "error target under a layer: larger reads fail where they need a sector that fails")
            lower.reload(f"0 {total} linear {device} 0")
            tap.result(read_direct(upper.node, 0, SIZE) == model.content, "the device works again: so does the stack")

            kept = 8 + data // 2
            lower.reload(f"0 {kept} linear {device} 0")
            wrong, gone = [], 0
            for sector in range(0, SECTORS, 5):
                number, place = model.source[sector]
                beyond = number == 1 and place >= kept
                gone += beyond
                if reader.error(sector * 512, 512) != (errno.EIO if beyond else 0):
                    wrong.append(sector)
            tap.equal(wrong, [], f"a device that became shorter: exactly {gone} of the sectors read fail")
            lower.reload(f"0 {total} linear {device} 0")


def scattered(generator, content, count):
    """A stack of `count` layers that together hold `content`, in pieces of random length, some also in lower layers
    with other data."""
    stack = [[] for _ in range(count)]
    at, total = 0, len(content) // 512
    while at < total:
        sectors = min(generator.choice([1, 3, 8, 8, 8, 13, 64, 200]), total - at)
        owner = generator.randrange(count)
        for below in range(owner):
            if generator.random() < 0.3:
                stack[below].append((at, sectors, bytes([below]) * (sectors * 512)))
        stack[owner].append((at, sectors, content[at * 512:(at + sectors) * 512]))
        at += sectors
    return stack


def check_fio(tap, devices, generator):
    """What fio wrote to a file, stored in two different stacks; fio verifies it on the device while the table changes
    from one stack to the other and the device is suspended."""
    path = SCRATCH / "pattern"
    run(*fio(f"--filename={path}", "--rw=write", "--bs=64k", "--size=8M", "--do_verify=0"))
    content = path.read_bytes()
    tables = []
    for count in (3, 5):
        blobs = [lsmt_writer.layer(segments, len(content) // 512) for segments in scattered(generator, content, count)]
        tables.append(stack_table(devices, blobs, len(content) // 512))
    with dm_ioctl.Mapped("fio", tables[0]) as mapped:
        read = fio(f"--filename={mapped.node}", "--rw=randread", "--bssplit=4k/40:8k/20:12k/10:64k/20:1m/10",
                   "--ioengine=libaio", "--direct=1", "--iodepth=16", "--norandommap", "--size=8M", "--readonly")
        tap.attempt("fio verifies mixed sizes and depth", run, *read, "--io_size=32M")
        process = subprocess.Popen([*read, "--time_based", "--runtime=6", "--numjobs=2"], stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True)
        rounds = 0
        while process.poll() is None:
            rounds += 1
            mapped.load(tables[rounds % 2])
            mapped.suspend(dm_ioctl.NOFLUSH if rounds % 3 == 0 else 0)
            mapped.resume()
            mapped.suspend()
            mapped.resume()
        output = process.stdout.read()
        tap.result(process.returncode == 0, "fio verifies while tables are replaced and the device is suspended",
                   output[-2000:])
        tap.result(rounds > 5, f"the table was replaced {rounds} times")


tap = Tap()
generator = random.Random(6)
load("loop", "dm-overlaybd")
stack = lsmt_writer.random_stack(generator, SECTORS, 4)
model = lsmt_writer.Model(stack, SECTORS)
with Devices() as devices:
    line = stack_table(devices, [lsmt_writer.layer(segments, SECTORS) for segments in stack], SECTORS)
    with dm_ioctl.Mapped("io", line) as mapped, Reader(mapped.node) as reader:
        tap.attempt("direct reads of one sector", check_each_sector, reader, model)
        tap.attempt("direct reads up to 1 MiB, into one or many places", check_direct, reader, model, generator)
        tap.attempt("reads that must not wait", check_nowait, reader, model)
        tap.result(reader.read(0, SIZE) == model.content, "the whole device in one read")
        tap.attempt("buffered reads at any byte", check_buffered, mapped.node, model, generator)
    check_targets(tap, line, model)
    check_writes(tap, line, model.content)
    check_failing(tap, line, stack, model, generator)
    check_fio(tap, devices, generator)
tap.finish()
