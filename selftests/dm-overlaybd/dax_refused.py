#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""What must be refused of tables with direct access, with the layer and the reason in the kernel log; and hostile
indexes, by which no page may ever be in two places: such a stack is refused, or each of its pages is a page of its own."""

import os
import random
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
import dm_ioctl
import lsmt_writer
from block_devices import Devices
from dm_ioctl import table_refused
from pmem import HUGE, required
from test_script import SCRATCH, Tap, load, run

SECTORS = 1024
PAGE = 8
# Hostile stacks. `make test-all` has more of them.
ROUNDS = int(os.environ.get("OVBD_HOSTILE_STACKS", "50"))
DATA = 4 * SECTORS


def write(node, entries):
    """Writes a layer with these entries, `(start, sectors, stored)` with None for zeros, to a device; returns its words
    for a table. What it stores is not written: nobody reads it."""
    index = [lsmt_writer.entry(start, sectors, stored or PAGE, stored is None) for start, sectors, stored in entries]
    index += [lsmt_writer.PADDING] * (-len(index) % 256)
    return f"{node} {lsmt_writer.write_sparse(node, SECTORS, DATA, b''.join(index))}"


def dense(stored=PAGE):
    """Entries that store all of the device in order."""
    return [(0, SECTORS, stored)]


def table(*layers, options="1 dax", sectors=SECTORS, begin=0):
    return f"{begin} {sectors} overlaybd {len(layers)} {' '.join(layers)} {options}"


def check_refused(tap, log, memory, devices):
    first, second, third = (memory.part(2 * HUGE) for _ in range(3))
    whole = write(first, dense())
    holes = write(second, [(16, 16, 8)])
    zeros = memory.zeros(SECTORS * 512)
    plain = devices.mapped("plain", f"0 {HUGE // 512} error").node

    def refused(what, line, *reasons, readonly=True):
        table_refused(tap, log, what, line, *reasons, readonly=readonly)

    for words, what, *reasons in [
        ("1 dex", "another option", "Unrecognised optional argument"),
        ("2 dax dax", "the option twice", "Optional argument is there twice"),
        ("1 zeros", "zeros without a device", "Missing device after zeros"),
        ("2 dax zeros", "dax, and zeros without a device", "Missing device after zeros"),
        (f"2 zeros {zeros}", "zeros without dax", "Option zeros is for option dax only"),
        (f"3 zeros {zeros} dx", "zeros with something else", "Unrecognised optional argument"),
        (f"5 dax zeros {zeros} zeros {zeros}", "zeros twice", "Unrecognised optional argument"),
        ("3 dax zeros /dev/missing", "a missing device of zeros", "Cannot open device of zeros"),
        (f"3 dax zeros {plain}", "a device of zeros without memory", "zeros (", "Device has no direct access"),
    ]:
        refused(what, table(whole, options=words), *reasons)
    refused("a writable table", table(whole), dm_ioctl.MUST_BE_READ_ONLY, readonly=False)
    refused("a target that is not whole pages", table(whole, sectors=SECTORS - 4), "Direct access needs a target of whole pages")
    line = f"0 4 linear {third} 0\n" + table(whole, sectors=SECTORS - 8, begin=4)
    refused("a target that does not begin with a page", line, "Direct access needs a target of whole pages")
    refused("holes without zeros", table(holes), "no layer has data for sector 0", "Direct access needs data everywhere")
    refused("zeros in a layer, without zeros", table(whole, write(third, [(8, 8, None)])), "no layer has data for sector 8")
    short = memory.part(4096, 4096)
    refused("a device of zeros that is too small", table(holes, options=f"3 dax zeros {short}"), "Device is smaller than the target")
    refused("a device of zeros that holds a layer", table(whole, holes, options=f"3 dax zeros {second}"),
            "Device is used for direct access twice")
    refused("one device for two layers", table(whole, whole), f"layer 1 ({number(first)})",
            "Device is used for direct access twice")
    for entries, what in [([(0, 12, 8), (12, SECTORS - 12, 24)], "a segment that ends inside a page"),
                          ([(0, SECTORS, 12)], "a segment that is stored inside a page"),
                          ([(4, 8, 8)], "a segment that starts inside a page")]:
        line = table(whole, write(third, entries))
        refused(what, line, "layer ", "Segments are not whole pages", "direct access is not possible at sector")
    for entries, what in [([(0, 8, 8), (8, 8, 8)], "one page for two"), ([(0, 16, 8), (16, 8, 16)], "an overlap"),
                          ([(0, 8, 16), (8, 8, 8)], "another order")]:
        line = table(whole, write(third, entries))
        refused(what, line, f"layer 1 ({number(third)})", "Segments are not stored in order",
                f"direct access is not possible at sector {entries[1][0]}")
    # What does not show need not be in order.
    words = write(third, [(0, 8, 16), (8, 8, 8)])
    with dm_ioctl.Mapped("hidden", table(whole, words, write(memory.part(2 * HUGE), [(0, 8, 8)]))):
        tap.result(True, "disorder that another layer hides")
    path = SCRATCH / "layer"
    path.touch()
    words = write(path, dense())
    loop = devices.loop(path)
    refused("a layer on a device without memory", table(holes, words.replace(str(path), loop)), f"layer 1 ({number(loop)})",
            "Device has no direct access")
    with dm_ioctl.Mapped("linear", f"0 {2 * HUGE // 512} linear {first} 0") as linear:
        with dm_ioctl.Mapped("above", table(whole.replace(first, linear.node))) as above:
            wanted = f"0 {SECTORS} overlaybd 1 {number(linear.node)} {whole.split()[1]} 1 dax"
            tap.equal(above.status(dm_ioctl.TABLE), wanted, "a layer on dm-linear; the table")
            tap.result(above.status().endswith(f" {SECTORS} dax"), "status: the word", above.status())
            tap.result(",dax=y,zeros=-;" in above.status(dm_ioctl.IMA), "IMA: that it is direct", above.status(dm_ioctl.IMA))
    with dm_ioctl.Mapped("zeros", table(holes, options=f"3 dax zeros {zeros}")) as mapped:
        line = mapped.status(dm_ioctl.TABLE)
        tap.result(line.endswith(f" 3 dax zeros {number(zeros)}"), "the table: the device of zeros", line)
        tap.result(f",dax=y,zeros={number(zeros)};" in mapped.status(dm_ioctl.IMA), "IMA: the device of zeros")
    with dm_ioctl.Mapped("zeros", line) as mapped:
        tap.equal(mapped.status(dm_ioctl.TABLE), line, "the table: reloads verbatim")
    with dm_ioctl.Mapped("first", table(whole)):
        refused("a second stack over a device", table(whole), f"layer 0 ({number(first)})",
                "Device is used for direct access by another mapped device")
        refused("zeros that are a layer elsewhere", table(holes, options=f"3 dax zeros {first}"), "zeros (",
                "Device is used for direct access by another mapped device")
        with dm_ioctl.Mapped("second", f"0 {SECTORS} overlaybd 1 {whole}"):
            tap.result(True, "a second stack without direct access")
    with dm_ioctl.Mapped("second", table(whole)):
        tap.result(True, "a second stack once the first is gone")


def number(node):
    device = os.stat(node).st_rdev
    return f"{os.major(device)}:{os.minor(device)}"


def hostile_entries(generator):
    """Entries in order, as an index must have them, which store data anywhere."""
    unit = generator.choice([1, 4, PAGE, PAGE, PAGE, PAGE])
    # How often data is not where it should be.
    risk = generator.choice([0, 0, 0.02, 0.2])
    entries, at = [], generator.choice([0, 0, unit])
    stored = PAGE
    while at < SECTORS and len(entries) < 200:
        sectors = min(unit * generator.randint(1, 8), SECTORS - at)
        if generator.random() < risk:
            stored = generator.choice([PAGE + unit * generator.randrange((DATA - SECTORS) // unit),
                                       max(PAGE, stored - unit)])
        if stored + sectors > DATA:
            break
        entries.append((at, sectors, None if generator.randrange(30) == 0 else stored))
        stored += sectors
        at += sectors + unit * generator.choice([0, 0, 0, 1, 3])
    return entries


def pages(stack):
    """Where each page is: a set of places, of which there is one, or the page is in pieces."""
    source = [None] * SECTORS
    for layer, entries in enumerate(stack):
        for start, sectors, stored in entries:
            for at in range(sectors):
                source[start + at] = None if stored is None else (layer, stored + at)
    for first in range(0, SECTORS, PAGE):
        piece = source[first:first + PAGE]
        if piece == [None] * PAGE:
            yield {("zeros", first)}
        else:
            yield {(layer, stored - at) for at, place in enumerate(piece) for layer, stored in [place or ("zeros", 0)]}


def check_hostile(tap, memory):
    nodes = [memory.part(2 * HUGE) for _ in range(2)]
    zeros = memory.part(HUGE)
    generator = random.Random(25)
    accepted, wrong, whole = 0, [], 0
    for _ in range(ROUNDS):
        stack = [hostile_entries(generator) for _ in nodes]
        words = [write(node, entries) for node, entries in zip(nodes, stack)]
        places = list(pages(stack))
        good = (all(len(place) == 1 for place in places) and len(set.union(*places)) == len(places)
                and all(stored % PAGE == 0 for place in places for _, stored in place))
        whole += good
        try:
            dm_ioctl.Mapped("hostile", table(*words, options=f"3 dax zeros {zeros}")).remove()
        except dm_ioctl.Refused:
            continue
        accepted += 1
        if not good:
            wrong.append(stack)
    tap.result(not wrong, f"{ROUNDS} hostile stacks, {accepted} accepted: no page is in two places", wrong[:1])
    tap.result(0 < accepted < ROUNDS, "hostile stacks: some are accepted and some are not")
    tap.result(accepted > whole // 4, f"hostile stacks: of {whole} that are sound many are accepted", accepted)


tap = Tap()
load("loop", "dm-overlaybd")
memory = required(tap)
with Devices() as devices:
    check_refused(tap, dm_ioctl.KernelLog(), memory, devices)
check_hostile(tap, memory)
memory.forget()
run("rmmod", "dm-overlaybd")
tap.result(True, "nothing is left open: the module is unloaded")
tap.finish()
