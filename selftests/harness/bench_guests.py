# SPDX-License-Identifier: GPL-2.0
"""`make bench-guests`: what memory an image takes when several guests read and map all of it, as virtio-pmem and as
virtio-blk. N='1 2 4' are the numbers of guests.

Counted is what holds bytes of the image: the host's page cache, what QEMU has of the file for itself, and the page caches of
the guests.
"""

import ctypes
import hashlib
import json
import os
import pathlib
import random
import shlex
import shutil
import subprocess
import threading

import build
import plot
import vm
from cache import SOURCE, Failure
from report import Counts

OUTPUT = SOURCE / "build/bench/guests"
OVBD = SOURCE / "tools/target/release/ovbd"
MEBIBYTE = 1 << 20
FILES, FILE_BYTES = 32, 2 << 20
# Boots of several guests at once, under emulation.
SILENCE = 900
CACHESTAT = 451
WAYS = ("virtio-pmem", "virtio-blk")


def make_layer():
    """An EROFS of files that cannot be compressed, in a layer."""
    shutil.rmtree(OUTPUT, ignore_errors=True)
    tree = OUTPUT / "tree"
    tree.mkdir(parents=True)
    generator = random.Random(1)
    for number in range(FILES):
        (tree / f"file{number}").write_bytes(generator.randbytes(FILE_BYTES))
    image, layer = OUTPUT / "image", OUTPUT / "layer.dax"
    subprocess.run(["mkfs.erofs", "--quiet", "-b", "4096", "-E", "noinline_data", "--dsunit=512", image, tree], check=True)
    shutil.rmtree(tree)
    os.truncate(image, -(-image.stat().st_size // (2 * MEBIBYTE)) * 2 * MEBIBYTE)
    subprocess.run([OVBD, "build", "--dax", "-o", layer, image], check=True)
    return layer


def qemu_arguments(way, layer):
    """What QEMU is told of the layer."""
    if way == "virtio-blk":
        return (f"-drive file={layer},if=none,id=layer,format=raw,readonly=on "
                "-device virtio-blk-pci,drive=layer,serial=layer")
    words = subprocess.run([OVBD, "qemu-args", f"--memory={vm.MEMORY + vm.PMEM}M", layer], check=True,
                           stdout=subprocess.PIPE, text=True).stdout
    # vng says how much memory the guest has; what it may have at most is added to that.
    size, *devices = words.splitlines()
    return " ".join(["-m", size.split(",")[1], *devices])


def cached_bytes(path):
    """Bytes of a file that are in the page cache."""
    length, found = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
    with open(path, "rb") as file:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.syscall(CACHESTAT, file.fileno(), length, found, 0):
            raise OSError(ctypes.get_errno(), "cachestat")
    return found[0] * os.sysconf("SC_PAGE_SIZE")


def forget(path):
    """Takes a file out of the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def anonymous_bytes(path):
    """Bytes of memory that processes have of a mapped file and not of its page cache, and how many processes map it."""
    total = processes = 0
    for maps in pathlib.Path("/proc").glob("[0-9]*/smaps"):
        ours = mapped = False
        try:
            for line in maps.read_text().splitlines():
                words = line.split()
                if not words[0].endswith(":"):
                    ours = words[-1] == str(path)
                    mapped |= ours
                elif ours and words[0] == "Anonymous:":
                    total += int(words[1]) * 1024
        except OSError:
            continue
        processes += mapped
    return total, processes


class Crowd:
    """Guests that have all read and mapped the image, and written to its memory where they `write`, and wait."""

    def __init__(self, kernel, way, count, layer, write):
        command = shlex.join(["env", f"SRC={SOURCE}", f"KO_DIR={kernel.modules}", "python3",
                              str(SOURCE / "selftests/bench/image_reader.py"), way, *["write"] * write])
        self._guests = [vm.Guest(kernel, command, OUTPUT / f"console-{way}-{number}.log", SOURCE, SILENCE,
                                 arguments=[f"--qemu-opts={qemu_arguments(way, layer)}"], emulated=vm.NO_MITIGATIONS, cpus=1)
                        for number in range(count)]
        self.reports = []
        self._changed = threading.Condition()
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._follow, args=[guest]) for guest in self._guests]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        with self._changed:
            self._changed.wait_for(lambda: len(self.reports) == len(self._guests))
        return self

    def __exit__(self, *_exception):
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _follow(self, guest):
        report = {}
        try:
            for line in guest:
                try:
                    found = json.loads(line)
                except ValueError:
                    continue
                # A guest says it again and again, so that there is a line after the end.
                if not report:
                    report = found
                    self._add(report)
                if self._over.is_set():
                    break
        finally:
            # Also where it could not even be started: somebody waits for it.
            if not report:
                self._add({"failed": f"{guest.why or guest.status}; its console: {guest.console}"})

    def _add(self, report):
        with self._changed:
            self.reports.append(report)
            self._changed.notify()


def measure(kernel, way, count, layer, write=False):
    """One row of the table. What the guests write, where they do, must be in nobody's image."""
    print(f"==> booting {count} guest{'s' * (count != 1)} with {way}", flush=True)
    content = hashlib.sha256(layer.read_bytes()).digest()
    forget(layer)
    with Crowd(kernel, way, count, layer, write) as crowd:
        for report in crowd.reports:
            if "failed" in report:
                raise Failure(f"{way}: {report['failed']}")
            if report["changed"]:
                raise Failure(f"{way}: what a guest wrote is in {' '.join(report['changed'])}")
        own, processes = anonymous_bytes(layer)
        if way == "virtio-pmem" and processes != count:
            raise Failure(f"{processes} processes map {layer}, which {count} guests have")
        guests = [report["cached"] for report in crowd.reports]
        row = {"way": way, "guests": count, "host": cached_bytes(layer), "own": own, "largest": max(guests),
               "all": cached_bytes(layer) + own + sum(guests)}
    if hashlib.sha256(layer.read_bytes()).digest() != content:
        raise Failure(f"{way}: a guest changed {layer}")
    return row


def has_virtio_pmem():
    devices = subprocess.run(["qemu-system-x86_64", "-device", "help"], stdout=subprocess.PIPE, text=True).stdout
    return '"virtio-pmem-pci"' in devices


def is_shared(row):
    """What must be reached: hardly any of the image in a guest, and nothing in the host but its page cache."""
    return row["largest"] <= MEBIBYTE and row["own"] == 0


def test(kernel):
    """Two guests share an image, and write to it in vain; and two that have it as a disk do not share it."""
    if not has_virtio_pmem():
        print("skipped: this QEMU has no virtio-pmem-pci", flush=True)
        return Counts(skipped=1)
    layer = make_layer()
    counts = Counts()
    for way in WAYS:
        row = measure(kernel, way, 2, layer, write=way == "virtio-pmem")
        good = is_shared(row) == (way == "virtio-pmem")
        counts.add(Counts(passed=1) if good else Counts(failed=1))
        print(f"{'ok' if good else 'not ok'}: two guests, {way}: {row}", flush=True)
    return counts


def chart(rows):
    """The picture of these rows."""
    series = [(way, [(row["guests"], row["all"] / MEBIBYTE) for row in rows if row["way"] == way]) for way in WAYS]
    return plot.chart(f"Memory that holds an image of {FILES * FILE_BYTES // MEBIBYTE} MiB, which each guest reads whole",
                      "MiB, host and guests together", series, ("the image itself", FILES * FILE_BYTES // MEBIBYTE),
                      "guests", sorted({row["guests"] for row in rows}), linear=True)


def bench(kernel):
    """The table, the picture, and what must be reached."""
    if build.modules(kernel) or build.make("ovbd"):
        return 1
    if not has_virtio_pmem():
        print("this QEMU has no virtio-pmem-pci")
        return 1
    layer = make_layer()
    rows = [measure(kernel, way, count, layer)
            for count in map(int, os.environ.get("N", "1 2 4").split()) for way in WAYS]
    print(f"\nAn image of {FILES * FILE_BYTES // MEBIBYTE} MiB, all of it read and mapped; KiB")
    print(f"{'':24}{'guest cache':>14}{'host cache':>14}{'QEMU private':>14}{'together':>14}")
    for row in rows:
        print(f"{row['guests']:2} guest{'s' if row['guests'] > 1 else ' '}, {row['way']:12}"
              + "".join(f"{row[what] // 1024:14,}" for what in ("largest", "host", "own", "all")))
    picture = OUTPUT / "guests.svg"
    picture.write_text(chart(rows))
    print(f"==> {picture}")
    reached = all(is_shared(row) for row in rows if row["way"] == "virtio-pmem")
    print(f"{'reached' if reached else 'NOT REACHED'}: at most 1 MiB of cache in each guest, and nothing private in the host")
    return 0 if reached else 1
