#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Commits of a device that is written to all the time: each layer has what the device had at one moment, between the
start of its commit and its end."""

import os
import random
import subprocess
import sys
import time

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
import syscall_steps
from block_devices import read_direct
from numbered_writes import BLOCK, SIZE, Model, Writer, moment
from ovbd_command import (MIB, empty_layer, existing, has_file_system, listed, make_image, mounted, ovbd, ovbd_fails,
                          refused, settled)
from read_checks import fio
from test_script import OVBD, SCRATCH, Tap, load, run

COMMITS = int(os.environ.get("OVBD_COMMITS", "20"))
# XFS wants no less.
SPACE = 320 * MIB
CHECKS = {"ext4": ["e2fsck", "-fn"], "xfs": ["xfs_repair", "-n", "-f"]}
# XFS leaves something to recover on purpose when it is frozen, and its UUID is that of what is mounted.
OPTIONS = {"ext4": "ro,noload", "xfs": "nouuid"}


def check_under_writer(tap, base):
    """Many commits under a writer."""
    before = existing()
    cow = SCRATCH / "cow"
    device = ovbd("up", "--writable", "--cow", cow, "live", base).strip()
    writer = Writer(device)
    writer.start()
    layers, wrong, copy, model = [base], [], SCRATCH / "copy", Model()
    for number in range(COMMITS):
        layers.append(SCRATCH / f"{number}.layer")
        begun = writer.acknowledged
        ovbd("commit", "-q", "--format", ("lsmt", "zfile")[number % 2], "-o", layers[-1], "live")
        ended = writer.acknowledged + 1
        ovbd("export", "--force", "-q", "-o", copy, *layers)
        found = moment(copy.read_bytes(), model)
        if not isinstance(found, int) or not begun <= found <= ended:
            wrong.append(f"commit {number}: {found}, wanted {begun} to {ended}")
    writer.stop()
    tap.equal(writer.error, None, "the writer never failed")
    tap.equal(wrong, [], f"{COMMITS} commits under a writer: each layer is of one moment of its commit")
    tap.equal(moment(read_direct(device, 0, SIZE), model), writer.acknowledged, "the device has all that was written")
    tap.equal([layer["path"] for layer in listed("live")["layers"]], list(map(str, layers)), "it is on all layers")
    parts = [name for name in existing() if name.startswith("live-cow") or name.startswith("live-lower")]
    tap.equal(parts, [f"live-cow{COMMITS}", f"live-lower{COMMITS}"], "one generation is left")
    tap.equal(sorted(path.name for path in SCRATCH.glob("cow*")), ["cow"], "one store is left, of the first name")
    print(f"# {writer.acknowledged} writes, the longest took {writer.longest * 1000:.1f} ms", flush=True)
    ovbd("down", "live")
    tap.equal(settled(before), before, "down leaves nothing")
    refused(tap, "the store over too few layers", "written over the layer", "up", "--writable", "--cow", cow, "live",
            *layers[:-1])
    ovbd("up", "--writable", "--cow", cow, "live", *layers)
    tap.equal(moment(read_direct(device, 0, SIZE), model), writer.acknowledged, "the store over all layers has the rest")
    ovbd("down", "live")
    cow.unlink()


def check_fio(tap, base):
    """fio writes in blocks of many sizes, four at a time, while the device is committed, and finds it all there again and
    again."""
    device = ovbd("up", "--writable", "verified", base).strip()
    jobs = ["--numjobs=4", f"--size={SIZE // 4}", f"--offset_increment={SIZE // 4}", "--loops=4", "--rate=1m"]
    process = subprocess.Popen(fio(f"--filename={device}", "--rw=randwrite", "--bsrange=4k-64k", "--direct=1", *jobs),
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    layers = []
    while process.poll() is None:
        layers.append(SCRATCH / f"verified{len(layers)}.layer")
        ovbd("commit", "-q", "-o", layers[-1], "verified")
    tap.equal(process.returncode, 0, f"{len(layers)} commits under fio, which finds what it wrote")
    if process.returncode:
        print(process.stdout.read().replace("\n", "\n# "), flush=True)
    tap.result(len(layers) > 1, "commits while fio ran", len(layers))
    ovbd("down", "verified")
    for path in layers:
        path.unlink()


def check_file_system(tap, kind):
    """A file system that is written to while its device is committed: in the layer it needs no repair, and has what was
    written until one moment."""
    raw, base, copy = SCRATCH / "fs.raw", SCRATCH / "fs.base", SCRATCH / "fs.copy"
    with open(raw, "wb") as file:
        file.truncate(SPACE)
    ovbd("build", "--format", "lsmt", "-o", base, raw)
    device = ovbd("up", "--writable", "fs", base).strip()
    run(f"mkfs.{kind}", "-q", device)
    layers, model, wrong = [base], Model(), []
    with mounted(device) as top:
        file = top / "file"
        run("dd", "if=/dev/zero", f"of={file}", "bs=1M", f"count={SIZE // MIB}", "conv=fsync")
        writer = Writer(file)
        writer.start()
        for number in range(3):
            # Not synced: the freeze does that.
            (top / f"{number}.text").write_text("text " * 1000)
            layers.append(SCRATCH / f"fs{number}.layer")
            begun = writer.acknowledged
            ovbd("commit", "-q", "-o", layers[-1], "fs")
            ended = writer.acknowledged + 1
            ovbd("export", "--force", "-q", "-o", copy, *layers)
            with mounted(copy, "-o", OPTIONS[kind]) as other:
                found = moment((other / "file").read_bytes(), model)
                texts = [(other / f"{n}.text").read_text() == "text " * 1000 for n in range(number + 1)]
            run(*CHECKS[kind], copy)
            if not isinstance(found, int) or not begun <= found <= ended or not all(texts):
                wrong.append(f"commit {number}: {found}, wanted {begun} to {ended}; files {texts}")
        writer.stop()
    tap.equal((writer.error, wrong), (None, []), f"{kind}: each layer is of one moment, and its file system in order")
    ovbd("down", "fs")
    for path in (raw, copy, *layers):
        path.unlink()


def check_refusals(tap, base):
    cow, out = SCRATCH / "cow", SCRATCH / "out.layer"
    device = ovbd("up", "--writable", "--cow", cow, "odd", base).strip()
    refused(tap, "--continue of nothing", "no commit was interrupted", "commit", "--continue", "-o", out, "odd")
    taken = SCRATCH / "cow.gen1"
    taken.write_bytes(b"precious" * 1000)
    refused(tap, "the name of the next store is taken", "is not what an interrupted commit", "commit", "-o", out, "odd")
    tap.equal(taken.read_bytes(), b"precious" * 1000, "what has the name stays")
    taken.unlink()
    refused(tap, "no folder for the next store", "No such file", "commit", "--cow", SCRATCH / "none/cow", "-o", out,
            "odd")
    refused(tap, "the next store is to be a file that exists", "needs a new file", "commit", "--cow", base, "-o", out,
            "odd")
    run("dmsetup", "suspend", "odd")
    refused(tap, "a suspended device", "dmsetup resume odd", "commit", "-o", out, "odd")
    run("dmsetup", "resume", "odd")
    table = run("dmsetup", "table", "odd")
    run("dmsetup", "load", "odd", "--table", f"0 {SIZE // 512} zero")
    run("dmsetup", "resume", "odd")
    refused(tap, "a table that somebody changed", "changed by something else", "commit", "-o", out, "odd")
    run("dmsetup", "load", "odd", "--table", table)
    run("dmsetup", "resume", "odd")
    # A table that was loaded, and that nobody asked for, does not become live.
    run("dmsetup", "load", "odd", "--table", f"0 {SIZE // 512} zero")
    with open(device, "r+b", buffering=0) as file:
        file.write(b"x" * BLOCK)
        os.fsync(file)
    tap.result(not out.exists(), "no layer was made")
    other = SCRATCH / "other-cow"
    ovbd("commit", "--cow", other, "-o", out, "odd")
    tap.equal((cow.exists(), listed("odd")["cow"]["path"]), (False, str(other)), "commit --cow: the store is there")
    tap.equal(read_direct(device, 0, BLOCK), b"x" * BLOCK, "commit --cow: content")
    ovbd("down", "odd")


def check_snapshot_only(tap, base):
    """A generation that is frozen and in no layer: it can be read, is listed, survives down, and becomes a layer."""
    cow, out, copy = SCRATCH / "cow", SCRATCH / "frozen.layer", SCRATCH / "frozen.copy"
    device = ovbd("up", "--writable", "--cow", cow, "frozen", base).strip()

    def put(text):
        with open(device, "r+b", buffering=0) as file:
            file.write(text * BLOCK)
            os.fsync(file)
    put(b"1")
    lower = ovbd("commit", "--snapshot-only", "frozen").strip()
    put(b"2")
    tap.equal(lower, "/dev/mapper/frozen-lower1", "--snapshot-only prints the device")
    tap.equal((read_direct(lower, 0, BLOCK), read_direct(device, 0, BLOCK)), (b"1" * BLOCK, b"2" * BLOCK),
              "which has what was written before")
    entry = listed("frozen")
    tap.equal(([one["path"] for one in entry["frozen"]], entry["cow"]["path"]), ([str(cow)], f"{cow}.gen1"),
              "ls has both stores")
    ovbd("down", "frozen")
    tap.result(ovbd("up", "--dry-run", "--writable", "--cow", cow, "frozen", base).count(" snapshot ") == 2,
               "up --dry-run shows both generations")
    refused(tap, "--wipe-cow of a part", "is part of what is written", "up", "--writable", "--cow", cow, "--wipe-cow",
            "frozen", base)
    other = SCRATCH / "cow.gen7"
    run("cp", "--sparse=always", f"{cow}.gen1", other)
    refused(tap, "two newest stores", "several stores", "up", "--writable", "--cow", cow, "frozen", base)
    other.unlink()
    hidden = SCRATCH / "hidden"
    cow.rename(hidden)
    refused(tap, "a store that is missing", "which is missing", "up", "--writable", "--cow", cow, "frozen", base)
    hidden.rename(cow)
    newest = SCRATCH / "cow.gen1"
    newest.rename(hidden)
    ovbd("up", "--writable", "--cow", cow, "frozen", base)
    tap.equal(read_direct(device, 0, BLOCK), b"1" * BLOCK, "without the newest store it is what was frozen")
    ovbd("down", "frozen")
    hidden.rename(newest)
    ovbd("up", "--writable", "--cow", cow, "frozen", base)
    tap.equal(read_direct(device, 0, BLOCK), b"2" * BLOCK, "up puts both together")
    ovbd("commit", "--continue", "-o", out, "frozen")
    ovbd("export", "-o", copy, base, out)
    tap.equal((copy.read_bytes()[:BLOCK], read_direct(device, 0, BLOCK)), (b"1" * BLOCK, b"2" * BLOCK),
              "--continue makes the layer without what was written since")
    tap.equal([path.name for path in SCRATCH.glob("cow*")], ["cow"], "--continue: one store is left")
    ovbd("down", "frozen")
    ovbd("up", "--writable", "--cow", cow, "frozen", base, out)
    tap.equal(read_direct(device, 0, BLOCK), b"2" * BLOCK, "the store over the new layer")
    ovbd("down", "frozen")
    cow.unlink()


def check_fold_back(tap, base):
    """Generations that are folded back under a writer, and again by another run where one was killed. Returns the step with
    which the kernel begins."""
    cow, copy, model = SCRATCH / "cow", SCRATCH / "fold.copy", Model()
    device = ovbd("up", "--writable", "--cow", cow, "fold", base).strip()
    writer = Writer(device)
    writer.start()

    def begin():
        while writer.acknowledged < begin.next:
            time.sleep(0.005)
        begin.next = writer.acknowledged + 300
        return ovbd("commit", "--snapshot-only", "fold").strip()
    begin.next = 300
    frozen = [begin(), begin()]
    moments = [moment(read_direct(lower, 0, SIZE), model) for lower in frozen]
    with open(frozen[1], "rb"):
        refused(tap, "what somebody reads", "what is frozen would change", "commit", "--fold-back", "fold")
    tap.equal([moment(read_direct(lower, 0, SIZE), model) for lower in frozen], moments, "frozen ones are as they were")
    ovbd("commit", "--fold-back", "fold")
    tap.equal([name for name in existing() if name.startswith("fold-")], ["fold-cow0", "fold-lower0"],
              "--fold-back: one generation is left")
    tap.equal((listed("fold")["frozen"], [path.name for path in SCRATCH.glob("cow*")]), ([], ["cow"]),
              "--fold-back: one store is left")
    refused(tap, "nothing to fold back", "there is one generation", "commit", "--fold-back", "fold")
    begin()
    all_steps, _ = syscall_steps.run([OVBD, "commit", "--fold-back", "fold"])
    print("# " + ", ".join(all_steps), flush=True)
    # The device's own table is the last that is loaded.
    folding_begins = all_steps.index("load")
    folding = len(all_steps) - 1 - all_steps[::-1].index("load")
    for line in (["commit", "-o", copy], ["commit", "--snapshot-only"], ["commit", "--continue", "-o", copy]):
        begin()
        # Before the first step after that of which the kernel does the work.
        steps, _ = syscall_steps.run([OVBD, "commit", "--fold-back", "fold"], folding)
        tap.equal(" snapshot-merge " in run("dmsetup", "table", "fold-cow1"), True, f"killed before: {steps[-1]}")
        refused(tap, f"{' '.join(map(str, line[:2]))} of what is being folded back", "is being folded back", *line, "fold")
        ovbd("commit", "--fold-back", "fold")
    writer.stop()
    tap.equal(writer.error, None, "--fold-back: the writer never failed")
    tap.equal(moment(read_direct(device, 0, SIZE), model), writer.acknowledged, "--fold-back: content")
    ovbd("down", "fold")
    cow.unlink()
    return folding_begins


def check_half_folded(tap, base, folding_begins):
    """What the kernel could only fold back in part: nothing is lost, and no layer is made of what is below alone."""
    cow, out, copy = SCRATCH / "cow", SCRATCH / "half.layer", SCRATCH / "half.copy"
    device = ovbd("up", "--writable", "--cow", cow, "--size", "64K", "half", base).strip()

    def put(first, count, text):
        with open(device, "r+b", buffering=0) as file:
            for number in range(first, first + count):
                file.seek(number * BLOCK)
                file.write(text * BLOCK)
                os.fsync(file)
    put(0, 6, b"1")
    ovbd("commit", "--snapshot-only", "half")
    put(100, 5, b"2")
    # The record says by then what is about to happen.
    syscall_steps.run([OVBD, "commit", "--fold-back", "half"], folding_begins)
    put(110, 7, b"3")
    refused(tap, "no room below", "has no room for the 48.0 KiB", "commit", "--fold-back", "half")
    # As it would be if that were written meanwhile.
    for name, old, new in (("half-lower1", " linear ", " linear "), ("half-cow1", " snapshot ", " snapshot-merge ")):
        run("dmsetup", "load", name, "--table", run("dmsetup", "table", name).replace(old, new))
        run("dmsetup", "resume", name)
    for _ in range(100):
        if "Merge failed" in run("dmsetup", "status", "half-cow1"):
            break
        time.sleep(0.05)
    refused(tap, "what is below takes no more", "dm-snapshot gave up", "commit", "--fold-back", "half")
    before = read_direct(device, 0, SIZE)
    wanted = b"".join(count * BLOCK * text for count, text in
                      ((6, b"1"), (94, b"\0"), (5, b"2"), (5, b"\0"), (7, b"3"), (SIZE // BLOCK - 117, b"\0")))
    tap.equal(before == wanted, True, "half folded back: content")
    refused(tap, "a layer of what is below", "of no single moment", "commit", "--continue", "-o", out, "half")
    ovbd("down", "half")
    ovbd("up", "--writable", "--cow", cow, "half", base)
    refused(tap, "a layer of what is below, from the files", "of no single moment", "commit", "--continue", "-o", out,
            "half")
    ovbd("commit", "-o", out, "half")
    ovbd("export", "-o", copy, base, out)
    tap.equal(copy.read_bytes() == wanted, True, "half folded back: the layer has all")
    ovbd("down", "half")
    cow.unlink()


def check_device(tap, base):
    """A store on a block device: the next one goes elsewhere."""
    disk, out, cow = SCRATCH / "disk", SCRATCH / "device.layer", SCRATCH / "after-device"
    with open(disk, "wb") as file:
        file.truncate(MIB)
    loop = run("losetup", "--find", "--show", disk).strip()
    device = ovbd("up", "--writable", "--cow", loop, "disk", base).strip()
    with open(device, "r+b", buffering=0) as file:
        file.write(b"y" * BLOCK)
        os.fsync(file)
    refused(tap, "the store is a device", "--cow FILE", "commit", "-o", out, "disk")
    ovbd("commit", "--cow", cow, "-o", out, "disk")
    tap.equal(read_direct(device, 0, BLOCK), b"y" * BLOCK, "after a store on a device: content")
    ovbd("down", "disk")
    refused(tap, "the old store over the new layer", "written over the layer", "up", "--writable", "--cow", loop, "disk",
            base, out)
    ovbd("up", "--writable", "--cow", cow, "disk", base, out)
    ovbd("down", "disk")
    run("losetup", "--detach", loop)


def check_replaced_layer(tap):
    """A layer whose name another file has by now: what counts is what the device has."""
    generator = random.Random(7)
    raw, copy = SCRATCH / "replaced.raw", SCRATCH / "replaced.copy"
    names = ("replaced.base", "replaced.original", "replaced.other", "replaced.layer", "replaced.wanted")
    base, original, other, out, wanted = (SCRATCH / name for name in names)
    contents = []
    for path in (base, other):
        make_image(raw, generator, MIB)
        contents.append(raw.read_bytes())
        ovbd("build", "-o", path, raw)
    os.link(base, original)
    device = ovbd("up", "--writable", "replaced", base).strip()
    other.rename(base)
    # As it is on the device, and as it is in the other file.
    with open(device, "r+b", buffering=0) as file:
        for content, first in zip(contents, (0, MIB // 2)):
            file.seek(first)
            file.write(content[first:first + MIB // 2])
        os.fsync(file)
    copy.write_bytes(read_direct(device, 0, MIB))
    ovbd("commit", "-o", out, "replaced")
    ovbd("build", "--base", original, "-o", wanted, copy)
    tap.equal(out.read_bytes() == wanted.read_bytes(), True, "a layer that another file has the name of: not compared with")
    ovbd("down", "replaced")


def check_interrupted(tap, base):
    """What is refused after a commit that did not come to its end."""
    cow, out, uuid = SCRATCH / "cow", SCRATCH / "cut.layer", "11111111-2222-3333-4444-555555555555"
    device = ovbd("up", "--writable", "--cow", cow, "cut", base).strip()
    commit = [OVBD, "commit", "-o", out, "cut"]

    def put(path, text):
        with open(path, "r+b", buffering=0) as file:
            file.write(text * BLOCK)
            os.fsync(file)

    # The first link is that of the store, and the newest store names the layer before the layer has its own name.
    put(device, b"1")
    steps, status = syscall_steps.run([*commit, "--uuid", uuid],
                                      lambda steps, step: step == "linkat" and "linkat" in steps)
    tap.equal((status, out.exists()), (None, False), f"killed before the layer has its name: {', '.join(steps[-3:])}")
    refused(tap, "folding back what a layer was made of", f"made the layer {uuid}", "commit", "--fold-back", "cut")
    put(device, b"2")
    refused(tap, "another layer with its UUID", "made another layer with this UUID", *commit[1:], "--uuid", uuid)
    # Where the layer has its name, another one gets it.
    other = SCRATCH / "cut.other"
    run("cp", base, other)
    said = SCRATCH / "cut.said"
    steps, status = syscall_steps.run(commit, lambda steps, _step: steps.count("linkat") == 2, lambda: other.rename(out),
                                      said, goes_on=True)
    tap.equal((status, "another layer has that name by now" in said.read_text()), (1, True),
              "another layer gets the name: the stack is not put on it")
    tap.equal((read_direct(device, 0, BLOCK), len(listed("cut")["layers"])), (b"2" * BLOCK, 1), "and the device goes on")
    # Of the calls that suspend or resume, three are for new devices: the new store's, the one below, the one that tries.
    window = [number for number, step in enumerate(steps) if step == "suspend or resume"][3]
    tap.equal(steps[window:window + 4], ["suspend or resume", "fdatasync", "load", "suspend or resume"],
              "the old store is flushed while the device is suspended")
    out.unlink()
    ovbd(*commit[1:])
    tap.equal((read_direct(device, 0, BLOCK), [path.name for path in SCRATCH.glob("cow*")]), (b"2" * BLOCK, ["cow"]),
              "the next commit has all of it")
    # Several stores that a layer made unneeded: whatever is left of them, the files still make the device.
    for text in (b"3", b"4"):
        ovbd("commit", "--snapshot-only", "cut")
        put(device, text)
    layers, last = [base, out], SCRATCH / "cut.last"
    steps, status = syscall_steps.run([OVBD, "commit", "-o", last, "cut"],
                                      lambda steps, step: step == "unlink" and "rename" in steps)
    left = sorted(path.name for path in SCRATCH.glob("cow*"))
    tap.equal((status, len(left)), (None, 3), f"killed before the second of three stores goes: {left}")
    ovbd("down", "cut")
    ovbd("up", "--writable", "--cow", cow, "cut", *layers, last)
    tap.equal(read_direct(device, 0, BLOCK), b"4" * BLOCK, "the files make the device all the same")
    # Who dies while the device is suspended is not needed for it to go on.
    steps, status = syscall_steps.run([OVBD, "commit", "--snapshot-only", "cut"],
                                      lambda steps, step: step == "fdatasync" and steps.count("suspend or resume") == 4)
    tap.equal((status, steps[-2]), (None, "suspend or resume"), "killed while the device is suspended")
    for _ in range(100):
        if not listed("cut")["suspended"]:
            break
        time.sleep(0.1)
    tap.equal(listed("cut")["suspended"], False, "the device goes on")
    # A table that holds the new layer, and that never became live.

    def is_rebase(steps, step):
        # All but the device below were made just before.
        return step == "suspend or resume" and steps.count("linkat") == 2 and steps[-1] == "load" and steps[-2] != "create"

    lost, next_one = SCRATCH / "cut.lost", SCRATCH / "cut.next"
    steps, status = syscall_steps.run([OVBD, "commit", "-o", lost, "cut"], is_rebase)
    tap.equal((status, lost.exists()), (None, True), "killed before the stack is on the layer")
    ovbd("commit", "-o", next_one, "cut")
    tap.equal((listed("cut")["layers"][-1]["path"], read_direct(device, 0, BLOCK)), (str(next_one), b"4" * BLOCK),
              "the next commit goes on")
    # A store that the device was not put over yet.
    steps, status = syscall_steps.run([OVBD, "commit", "--snapshot-only", "cut"],
                                      lambda steps, step: step == "suspend or resume" and steps.count(step) == 3)
    tap.equal(status, None, f"killed before the window: {', '.join(steps)}")
    store = max(name for name in existing() if name.startswith("cut-cow"))
    put(f"/dev/mapper/{store}", b"3")
    status, words = ovbd_fails("commit", "--snapshot-only", "cut")
    tap.result(status == 1 and f"{store}: was written to, though" in words, "a store that was written to by others: stays", words)
    ovbd("down", "cut")
    for path in SCRATCH.glob("cow*"):
        path.unlink()


tap = Tap()
load("loop", "dm-overlaybd", "dm-zfile")
base = empty_layer(SIZE)
check_under_writer(tap, base)
check_fio(tap, base)
for kind in CHECKS:
    if has_file_system(kind):
        check_file_system(tap, kind)
    else:
        print(f"# this kernel has no {kind}", flush=True)
check_refusals(tap, base)
check_snapshot_only(tap, base)
check_half_folded(tap, base, check_fold_back(tap, base))
check_device(tap, base)
check_replaced_layer(tap)
check_interrupted(tap, base)
tap.equal(settled([]), [], "nothing is left")
tap.finish()
