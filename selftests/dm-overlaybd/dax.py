#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Direct access to layers in persistent memory: EROFS, ext4 and XFS are mounted with dax, and every file, read, mapped
and executed, is what was written, while the page cache holds none of it. What happens to a device while files of it are
mapped."""

import errno
import hashlib
import json
import mmap
import os
import random
import resource
import shutil
import subprocess
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
import dm_ioctl
from block_devices import Devices, sha256
from pmem import HUGE, cached, has_dax, required
from test_script import OVBD, SCRATCH, CommandFailed, Tap, load, run

MIB = 1 << 20
# Size of the image, the command that makes the file system, and options for the mount.
WRITABLE = {
    "ext4": (24 * MIB, ["mkfs.ext4", "-q", "-F", "-b", "4096", "-O", "^has_journal"], ["dax=always"]),
    # Smaller than it is meant to be: all of it goes through the emulator several times.
    "xfs": (64 * MIB, ["mkfs.xfs", "--unsupported", "-q", "-f"], ["dax=always", "nouuid"]),
}
EROFS = ["mkfs.erofs", "--quiet", "-b", "4096", "-E", "noinline_data"]
PROGRAM = "/bin/true"


def populate(top, generator, count):
    for number in range(count):
        directory = top / f"directory{number % 3}"
        directory.mkdir(exist_ok=True)
        size = generator.choice([1, 4096, 5000, 70000, 300000])
        (directory / f"file{number}").write_bytes(generator.randbytes(size))
    shutil.copy(PROGRAM, top / "program")


def change(top, generator):
    files = sorted(top.rglob("file*"))
    for path in files[::3]:
        path.unlink()
    for path in files[1::3]:
        with open(path, "r+b") as file:
            file.seek(path.stat().st_size // 2)
            file.write(generator.randbytes(9000))
    populate(top / "directory0", generator, 6)


def checksums(top):
    return {str(path.relative_to(top)): sha256(path) for path in sorted(top.rglob("*")) if path.is_file()}


def mapped_checksums(top):
    """The same, by way of mappings."""
    found = {}
    for path in sorted(top.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
                found[str(path.relative_to(top))] = hashlib.sha256(memory).hexdigest()
    return found


def make_images(kind, generator):
    """Two states of a file system: the images, and the files in them."""
    images, trees = [SCRATCH / f"{kind}{state}.img" for state in (0, 1)], []
    if kind == "erofs":
        tree = SCRATCH / "tree"
        tree.mkdir()
        for state, act in ((0, lambda: populate(tree, generator, 15)), (1, lambda: change(tree, generator))):
            act()
            run(*EROFS, images[state], tree)
            trees.append(checksums(tree))
        shutil.rmtree(tree)
        size = max(-(-image.stat().st_size // 4096) * 4096 for image in images)
        for image in images:
            os.truncate(image, size)
        return images, trees
    size, command, _ = WRITABLE[kind]
    images[0].touch()
    os.truncate(images[0], size)
    run(*command, images[0])
    for state, act in ((0, lambda top: populate(top, generator, 15)), (1, lambda top: change(top, generator))):
        if state:
            run("cp", "--sparse=always", images[0], images[1])
        top = SCRATCH / "writable"
        top.mkdir(exist_ok=True)
        run("mount", "-o", "loop", images[state], top)
        try:
            act(top)
            trees.append(checksums(top))
        finally:
            run("umount", top)
    return images, trees


def build(*arguments):
    run(OVBD, "build", "--format", "lsmt", *arguments)


def check_tree(tap, name, device, options, wanted):
    """Mounts a device and compares each of its files."""
    with Devices() as mounts:
        top = mounts.mount(device, SCRATCH / "mnt", *options)
        before = cached()
        tap.result(all(has_dax(top / path) for path in wanted), f"{name}: statx says so of every file")
        tap.equal(checksums(top), wanted, f"{name}: {len(wanted)} files, read")
        tap.equal(mapped_checksums(top), wanted, f"{name}: {len(wanted)} files, mapped")
        tap.result(subprocess.run([top / "program"]).returncode == 0, f"{name}: a program runs")
        grown = cached() - before
        total = sum((top / path).stat().st_size for path in wanted)
        tap.result(grown < total // 2, f"{name}: the page cache has not grown by the files",
                   f"{grown} bytes, the files have {total}")


def check_kind(tap, kind, memory, generator):
    images, trees = make_images(kind, generator)
    options = WRITABLE[kind][2] if kind in WRITABLE else ["dax=always"]
    size = images[0].stat().st_size
    layers = [image.with_suffix(".lsmt") for image in images]
    build("-o", layers[0], images[0])
    build("--base", layers[0], "-o", layers[1], images[1])
    words = []
    for layer in layers:
        words += [memory.put(layer), str(layer.stat().st_size)]
    zeros = memory.zeros(size)
    for state in (0, 1):
        table = f"0 {size // 512} overlaybd {state + 1} {' '.join(words[:2 * state + 2])} 3 dax zeros {zeros}"
        with dm_ioctl.Mapped("direct", table) as mapped:
            name = f"{kind}, {'base' if state == 0 else 'base and difference'}"
            process = subprocess.run(["cmp", mapped.node, images[state]], stdout=subprocess.PIPE, text=True)
            tap.result(process.returncode == 0, f"{name}: the device is the image", process.stdout)
            check_tree(tap, name, mapped.node, options, trees[state])
    memory.forget()
    for path in [*images, *layers]:
        path.unlink()


def check_huge(tap, memory):
    """A file of 64 MiB in layers that `ovbd build --dax` made, which has huge pages; and what is on other devices, or in
    the middle of a table, has them too."""
    tree, image = SCRATCH / "tree", SCRATCH / "huge.img"
    tree.mkdir()
    block = random.Random(1).randbytes(MIB)
    with open(tree / "file", "wb") as file:
        for number in range(64):
            file.write(number.to_bytes(4, "big") + block[4:])
    wanted = sha256(tree / "file")
    run(*EROFS, f"--dsunit={HUGE // 4096}", image, tree)
    shutil.rmtree(tree)
    size = -(-image.stat().st_size // HUGE) * HUGE
    os.truncate(image, size)
    layer = SCRATCH / "huge.dax"
    run(OVBD, "build", "--dax", "-o", layer, image)
    node, sectors = memory.put(layer), size // 512
    words = f"overlaybd 1 {node} {layer.stat().st_size} 1 dax"
    front = memory.part(HUGE)
    for what, start in (("alone", 0), ("behind another target", HUGE // 512)):
        table = f"{start} {sectors} {words}"
        if start:
            table = f"0 {start} linear {front} 0\n{table}"
        with dm_ioctl.Mapped("huge", table) as mapped, \
             dm_ioctl.Mapped("above", f"0 {sectors} linear {mapped.node} {start}") as above:
            with Devices() as mounts:
                top = mounts.mount(above.node, SCRATCH / "mnt", "dax=always")
                tap.result(has_dax(top / "file"), f"{what}: statx says so")
                faults, numbers = touch(top / "file")
                tap.result(faults <= 40, f"{what}: 64 MiB are mapped in at most 40 faults", f"{faults} faults")
                print(f"# {what}: {faults} faults", flush=True)
                tap.equal(numbers, list(range(64)), f"{what}: each MiB that is mapped is where it belongs")
                if not start:
                    tap.equal(sha256(top / "file"), wanted, f"{what}: the file is right")
    layer.unlink()
    image.unlink()
    memory.forget()


def touch(path):
    """Touches each page of a file; returns the number of faults that took, and the numbers with which each MiB begins."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        with mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED) as view:
            places = range(0, size, 4096)
            before = resource.getrusage(resource.RUSAGE_SELF)
            for at in places:
                view[at]
            after = resource.getrusage(resource.RUSAGE_SELF)
            numbers = [int.from_bytes(view[at:at + 4], "big") for at in range(0, size, MIB)]
    return after.ru_minflt + after.ru_majflt - before.ru_minflt - before.ru_majflt, numbers


def check_life(tap, memory):
    """What can be done to a device while a file of it is mapped, and by whom its memory can be had."""
    tree, image, layer = SCRATCH / "tree", SCRATCH / "life.img", SCRATCH / "life.dax"
    tree.mkdir()
    content = random.Random(2).randbytes(3 * MIB)
    (tree / "file").write_bytes(content)
    run(*EROFS, image, tree)
    shutil.rmtree(tree)
    run(OVBD, "build", "--dax", "-o", layer, image)
    node, copy = memory.put(layer), memory.put(layer)
    sectors, size = image.stat().st_size // 512, layer.stat().st_size
    table = f"0 {sectors} overlaybd 1 {node} {size} 1 dax"
    blocks = f"0 {sectors} overlaybd 1 {node} {size}"

    def fails(what, number, act, *arguments):
        try:
            act(*arguments)
        except OSError as error:
            tap.equal(errno.errorcode[error.errno], errno.errorcode[number], what)
        else:
            tap.result(False, what, "it worked")

    with dm_ioctl.Mapped("life", blocks) as mapped:
        with Devices() as mounts:
            top = mounts.mount(mapped.node, SCRATCH / "mnt", "dax=always")
            tap.result(not has_dax(top / "file"), "without the option there is none")
            tap.equal((top / "file").read_bytes(), content, "without the option the file is right")
        mapped.reload(table)
        with Devices() as mounts:
            top = mounts.mount(mapped.node, SCRATCH / "mnt", "dax=always")
            tap.result(has_dax(top / "file"), "a table with the option can follow")
            with open(top / "file", "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
                tap.result(view[:] == content, "mapped: the file is right")
                fails("mapped: a table without the option is refused", errno.EINVAL, mapped.load, blocks)
                for what, line in (("the same table", table), ("a copy of the layer", table.replace(node, copy))):
                    mapped.reload(line)
                    tap.result(view[:] == content, f"mapped: {what} can follow")
                    tap.result((top / "file").read_bytes() == content, f"mapped: the file is right over {what}")
                mapped.reload(table)
                fails("mapped: the device cannot be removed", errno.EBUSY, dm_ioctl.remove, "life")
                fails("mapped: no other stack has the memory", errno.EBUSY, dm_ioctl.Mapped, "other", table)
                with dm_ioctl.Mapped("other", table.replace(node, copy)) as other, Devices() as others:
                    second = others.mount(other.node, SCRATCH / "second", "dax=always")
                    tap.equal((second / "file").read_bytes(), content, "mapped: a copy beside it")
                mapped.suspend()
                tap.result(view[:4096] == content[:4096], "suspended: what is mapped stays")
                mapped.resume()
            upper, work, merged = (SCRATCH / name for name in ("upper", "work", "merged"))
            for directory in (upper, work, merged):
                directory.mkdir()
            run("mount", "-t", "overlay", "overlay", "-o", f"lowerdir={top},upperdir={upper},workdir={work}", merged)
            try:
                tap.result(has_dax(merged / "file"), "below an overlayfs: statx says so")
                (merged / "file").write_bytes(b"changed")
                tap.result((top / "file").read_bytes() == content, "below an overlayfs: what is written goes elsewhere")
            finally:
                run("umount", merged)
    with dm_ioctl.Mapped("next", table):
        tap.result(True, "the next stack has the memory once the first is gone")
    memory.forget()


def ovbd(*words, status=0):
    result = subprocess.run([OVBD, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert result.returncode == status, f"{words}: {result.stderr}"
    return result.stdout.strip() or result.stderr


def check_command(tap, memory):
    """A stack of a layer that is built and one that is committed, found by the command, and removed."""
    image, base, top, zeros = (SCRATCH / name for name in ("disk.img", "base.dax", "top.dax", "plain.lsmt"))
    image.touch()
    os.truncate(image, 16 * MIB)
    run("mkfs.ext4", "-q", "-F", "-b", "4096", "-O", "^has_journal", image)
    ovbd("build", "--dax", "-o", base, image)
    ovbd("up", "--writable", "written", base)
    (SCRATCH / "mnt").mkdir(exist_ok=True)
    run("mount", "/dev/mapper/written", SCRATCH / "mnt")
    content = random.Random(3).randbytes(MIB)
    (SCRATCH / "mnt/file").write_bytes(content)
    shutil.copy(PROGRAM, SCRATCH / "mnt/program")
    run("umount", SCRATCH / "mnt")
    ovbd("commit", "--dax", "written", "-o", top)
    ovbd("down", "written")
    nodes = [memory.put(top), memory.put(base)]
    uuids = [layer["uuid"] for layer in json.loads(ovbd("info", "--json", base, top))["layers"]]
    tables = []
    for what, names in (("without a name", []), ("by UUID", uuids), ("by device", nodes[::-1])):
        tap.equal(ovbd("up", "--dax", "direct", *names), "/dev/mapper/direct", f"up --dax {what}")
        tables.append(run("dmsetup", "table", "direct"))
        if names:
            tap.equal(tables[-1], tables[0], f"up --dax {what}: the same table")
        else:
            with Devices() as mounts:
                mount = mounts.mount("/dev/mapper/direct", SCRATCH / "mnt", "dax=always")
                tap.result(has_dax(mount / "file"), f"up --dax {what}: statx says so")
                tap.equal((mount / "file").read_bytes(), content, f"up --dax {what}: the file is right")
                tap.result(subprocess.run([mount / "program"]).returncode == 0, f"up --dax {what}: a program runs")
        said = ovbd("up", "--dax", "again", *nodes[::-1], status=1)
        tap.result("again" in said, f"up --dax {what}: not a second time", said)
        ovbd("down", "direct")
    said = ovbd("up", "--dax", "direct", base, status=1)
    tap.result("is not a device that begins with a layer" in said, "up --dax: no file", said)
    ovbd("build", "--format", "lsmt", "-o", zeros, image)
    plain = memory.put(zeros)
    said = ovbd("up", "--dax", "direct", plain, status=1)
    tap.result("layer" in said or "trailer" in said, "up --dax: no device that does not end with the layer", said)
    said = ovbd("up", "--dax", "direct", "--zeros", memory.put(base), nodes[1], status=1)
    tap.result("does not hold zeros" in said, "up --dax: no device of zeros with something else", said)
    empty = memory.zeros(16 * MIB)
    ovbd("up", "--dax", "direct", "--zeros", empty, nodes[1])
    tap.result(run("dmsetup", "table", "direct").strip().split()[-3:-1] == ["dax", "zeros"], "up --dax --zeros: the table")
    ovbd("down", "direct")
    memory.forget()


tap = Tap()
load("loop", "dm-overlaybd")
memory = required(tap)
for position, kind in enumerate([*WRITABLE, "erofs"]):
    subprocess.run(["modprobe", "--quiet", kind])
    try:
        check_kind(tap, kind, memory, random.Random(position))
    except (CommandFailed, OSError) as error:
        tap.result(False, kind, error)
for check in (check_huge, check_life, check_command):
    tap.attempt(f"{check.__name__} runs to its end", check, tap, memory)
tap.finish()
