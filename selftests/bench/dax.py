# SPDX-License-Identifier: GPL-2.0
"""Files in persistent memory, read directly: on the device itself, through dm-linear and through dm-overlaybd, and beside
them through the page cache, cold and warm. All have the same EROFS.

The figures of a row: `random`, 4 KiB reads of a file at random; `sequential`, 1 MiB reads, for each MiB; `touch`, the
first access to a page of a mapping; `huge`, the same where the file has huge pages; `exec`, a program from start to end.
"""

import contextlib
import mmap
import os
import pathlib
import shutil
import subprocess
import time

import dm_ioctl
from block_devices import Devices
from measure import DATA, drop_caches, random_reads, row, sequential_reads, skipped
from pmem import HUGE, Missing, Pmem, has_dax
from test_script import OVBD, load, run

SUITE = "dax"
WORK = pathlib.Path("/tmp/bench-dax")
MOUNT = WORK / "mnt"
# What a layer has between two pieces of the other.
PIECE = 64 << 10
PROGRAM = "/bin/true"


def touches(path):
    """For each page of a file, the first access to it in a mapping. Access to a page that is there already is what the
    program itself takes."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED) as view:
        pages = -(-len(view) // 4096)
        times = [time.perf_counter_ns()]
        for _ in range(2):
            view[::4096]
            times.append(time.perf_counter_ns())
    first, again = times[1] - times[0], times[2] - times[1]
    return (first - again) / pages


def starts(path, count=1):
    """A program's whole life; of several the shortest, as what the system does now and then falls into one or the other."""
    times = []
    for _ in range(count):
        begin = time.perf_counter_ns()
        os.waitpid(os.posix_spawn(path, [str(path)], {}), 0)
        times.append(time.perf_counter_ns() - begin)
    return min(times)


def warm(function, *arguments):
    """Two measurements, after one that warms up."""
    return [function(*arguments) for _ in range(3)][1:]


def cold(function, *arguments):
    """The same with nothing in the page cache."""
    found = []
    for _ in range(3):
        drop_caches()
        found.append(function(*arguments))
    return found[1:]


@contextlib.contextmanager
def mounted(device, option):
    with Devices() as mounts:
        yield mounts.mount(device, MOUNT, option)


def measure(name, devices):
    """The row of a device with files in small pages, and one with huge pages or None."""
    small, huge = devices
    with mounted(small, "dax=always") as top:
        if not has_dax(top / "data"):
            raise OSError(f"{name}: the file is not accessed directly")
        figures = {"random": random_reads(top / "data"), "sequential": sequential_reads(top / "data"),
                   "touch": warm(touches, top / "data"), "exec": warm(starts, top / "program", 10)}
    if huge:
        with mounted(huge, "dax=always") as top:
            figures["huge"] = warm(touches, top / "data")
    row(SUITE, name, **figures)


def measure_cached(device):
    """The rows of a device without direct access."""
    with mounted(device, "dax=never") as top:
        file, program = top / "data", top / "program"
        row(SUITE, "page cache, cold", random=random_reads(file, "--cold"), sequential=sequential_reads(file, "--cold"),
            touch=cold(touches, file), exec=cold(starts, program))
        file.read_bytes()
        row(SUITE, "page cache, warm", random=random_reads(file, "--warm"), sequential=sequential_reads(file, "--warm"),
            touch=warm(touches, file), exec=warm(starts, program, 10))


def make_image(path, data, *options):
    """An EROFS with a copy of a file as `data`, and a program."""
    tree = WORK / "tree"
    tree.mkdir()
    shutil.copy(data, tree / "data")
    shutil.copy(PROGRAM, tree / "program")
    run("mkfs.erofs", "--quiet", "-b", "4096", "-E", "noinline_data", *options, path, tree)
    shutil.rmtree(tree)
    os.truncate(path, -(-path.stat().st_size // HUGE) * HUGE)


def layers_of(memory, image, base=None):
    """The words of a table for a layer of an image, or for two: of `base`, and of what differs."""
    words, lower = [], []
    for number, source in enumerate([base, image] if base else [image]):
        path = WORK / f"layer{number}"
        run(OVBD, "build", "--dax", *(["--base", *lower] if lower else []), "-o", path, source)
        lower.append(path)
        words.append(f"{memory.put(path)} {path.stat().st_size}")
    for path in lower:
        path.unlink()
    return f"overlaybd {len(words)} {' '.join(words)}"


def alternating(path, image):
    """An image that differs in every other piece."""
    data = bytearray(image.read_bytes())
    for at in range(PIECE, len(data), 2 * PIECE):
        for page in range(at, min(at + PIECE, len(data)), 4096):
            data[page] ^= 255
    path.write_bytes(data)


def main(chosen):
    load("dm-overlaybd")
    WORK.mkdir(exist_ok=True)
    try:
        memory = Pmem()
    except Missing as why:
        skipped(SUITE, "direct access", why)
        return
    subprocess.run(["modprobe", "--quiet", "erofs"])
    small, huge, base = (WORK / name for name in ("small.img", "huge.img", "base.img"))
    make_image(small, DATA / "data")
    make_image(huge, DATA / "data", f"--dsunit={HUGE // 4096}")
    alternating(base, small)
    sectors = {small: small.stat().st_size // 512, huge: huge.stat().st_size // 512}
    raw = {path: memory.put(path) for path in sectors}
    one = {path: layers_of(memory, path) for path in sectors}
    two = {small: layers_of(memory, small, base)}
    rows = {
        "pmem": raw,
        "dm-linear": {path: f"linear {node} 0" for path, node in raw.items()},
        "dm-overlaybd, 1 layer": {path: f"{words} 1 dax" for path, words in one.items()},
        "dm-overlaybd, 2 layers, many segments": {path: f"{words} 1 dax" for path, words in two.items()},
    }
    for name, what in rows.items():
        if not chosen(name):
            continue
        with contextlib.ExitStack() as undo:
            nodes = [None, None]
            for number, path in enumerate(sectors):
                if path in what:
                    nodes[number] = what[path]
                    if name != "pmem":
                        table = f"0 {sectors[path]} {what[path]}"
                        nodes[number] = undo.enter_context(dm_ioctl.Mapped(f"bench{number}", table)).node
            measure(name, nodes)
    if chosen("page cache"):
        with dm_ioctl.Mapped("bench", f"0 {sectors[small]} {one[small]}") as cached:
            measure_cached(cached.node)
    memory.forget()
    for path in (small, huge, base):
        path.unlink()
