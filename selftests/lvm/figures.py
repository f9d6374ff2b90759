#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""What an incremental push and pull of a thin volume cost, in bytes, memory and time, beside pipes of the same steps.

The volume of OVBD_LVM_MB holds the files of a Debian system, one behind the other, and a hundredth of its blocks is changed
at random. The bytes and the memory have limits; times are printed only, as ratios to the pipe in the same run. `make bench-lvm`
runs it with large volumes. Everything is in memory, so of those that are larger than a GiB only the side that pushes is there.
"""

import ctypes
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import time

sys.path.insert(0, f"{pathlib.Path(__file__).resolve().parents[1]}/lib")
from block_devices import Devices
from ovbd_command import ovbd
from test_script import OVBD, SCRATCH, Tap, run
from volumes import LAYOUT, MIB, Group, changed_chunks, push, read_ranges, set_up_lvm

MEGABYTES = int(os.environ.get("OVBD_LVM_MB", "128"))
ROUNDS = int(os.environ.get("OVBD_LVM_ROUNDS", "1"))
PULLS = MEGABYTES <= 1024
BLOCK = 4096
MEMORY = 64 * MIB
# What lz4 -1 calls.
LZ4 = ctypes.CDLL("liblz4.so.1")
tap = Tap()


def figure(what, value):
    """One line of the benchmark."""
    print(f"# {what}: {value}", flush=True)


def measured(*words):
    """Runs a command; returns what it prints, the seconds it took, and the memory that it and each of its children had at most."""
    process = subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    start, peaks = time.monotonic(), {}
    while process.poll() is None:
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=False)
        for pid in [process.pid, *map(int, children.stdout.split())]:
            try:
                status = pathlib.Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
            except OSError:
                continue
            peak = re.search(r"VmHWM:\s*(\d+)", status)
            name = re.search(r"Name:\s*(\S+)", status)[1]
            if peak:
                peaks[name] = max(peaks.get(name, 0), int(peak[1]) << 10)
        time.sleep(0.002)
    output, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{words}: {errors}")
    return output, time.monotonic() - start, peaks


def timed(*words):
    """Runs a command with nobody looking at it; returns what it prints and the seconds it took."""
    start = time.monotonic()
    return run(*words), time.monotonic() - start


def fill(node, mebibytes):
    """Writes what a system holds, as often as it takes."""
    def pieces():
        while True:
            for folder, folders, files in os.walk("/usr"):
                folders.sort()
                for path in (pathlib.Path(folder, name) for name in sorted(files)):
                    if path.is_file() and not path.is_symlink():
                        with open(path, "rb") as file:
                            while piece := file.read(MIB):
                                yield piece

    left = mebibytes * MIB
    with open(node, "wb") as device:
        for piece in pieces():
            device.write(piece[:left])
            left -= len(piece)
            if left <= 0:
                break
        device.flush()
        os.fsync(device.fileno())


def change(node, generator, mebibytes):
    """Overwrites a hundredth of the blocks, each with something that compresses to a half; returns where."""
    blocks = generator.sample(range(mebibytes * MIB // BLOCK), mebibytes * MIB // BLOCK // 100)
    descriptor = os.open(node, os.O_WRONLY)
    for block in blocks:
        os.pwrite(descriptor, generator.randbytes(BLOCK // 2) + bytes([generator.randrange(1, 256)]) * (BLOCK // 2), block * BLOCK)
    os.fsync(descriptor)
    os.close(descriptor)
    subprocess.run(["blockdev", "--flushbufs", node], check=True)
    return sorted(blocks)


def compress(data):
    """One block as lz4 -1 has it."""
    out = ctypes.create_string_buffer(LZ4.LZ4_compressBound(len(data)))
    return ctypes.string_at(out, LZ4.LZ4_compress_fast(data, out, len(data), len(out), 1))


def pipe(group, old, new):
    """thin_delta, reading the changed chunks, compressing them as lz4 -1 does; returns seconds and bytes."""
    out = SCRATCH / "pipe.lz4"
    start = time.monotonic()
    run("lvcreate", "--snapshot", "--permission", "r", "--name", new, f"{group.name}/web")
    run("lvchange", "--activate", "y", "--ignoreactivationskip", f"{group.name}/{new}")
    with open(out, "wb", buffering=0) as file:
        for _, data in read_ranges(group.node(new), changed_chunks(group.name, group.target(), old, new)):
            file.write(compress(data))
    run("lvchange", "--activate", "n", f"{group.name}/{new}")
    taken = time.monotonic() - start
    sent = out.stat().st_size
    out.unlink()
    return taken, sent


def send_and_receive(source, old, new, target, base):
    """What thin_send | thin_recv do: the chunks go as they are, into a snapshot of what the other side has; returns seconds,
    bytes."""
    start = time.monotonic()
    run("lvcreate", "--snapshot", "--name", f"{new}r", f"{target.name}/{base}")
    for group, name in ((source, new), (target, f"{new}r")):
        run("lvchange", "--activate", "y", "--ignoreactivationskip", f"{group.name}/{name}")
    descriptor = os.open(target.node(f"{new}r"), os.O_WRONLY)
    sent = 0
    for at, data in read_ranges(source.node(new), changed_chunks(source.name, source.target(), old, new)):
        os.pwrite(descriptor, data, at)
        sent += len(data)
    os.fsync(descriptor)
    os.close(descriptor)
    for group, name in ((source, new), (target, f"{new}r")):
        run("lvchange", "--activate", "n", f"{group.name}/{name}")
    return time.monotonic() - start, sent


def alone(node, blocks):
    """Bytes of blocks of 4 KiB, each compressed by lz4 alone."""
    with open(node, "rb") as device:
        def read(block):
            device.seek(block * BLOCK)
            return device.read(BLOCK)
        return sum(min(BLOCK, len(compress(read(block)))) for block in blocks)


def round_of_push(source, generator, node, number, before):
    """Changes the volume, and pushes a snapshot of it on top of the one before; returns what was said, seconds, and those of the
    pipe."""
    name, base = f"s{number}", f"--base={source.name}/{before}"
    blocks = change(node, generator, MEGABYTES)
    said, seconds = timed(OVBD, "push", "--json", f"--snapshot={name}", base, f"{source.name}/web", f"oci:{LAYOUT}:{name}")
    said = json.loads(said)
    taken, sent = pipe(source, before, f"p{number}")
    figure("sent, to a pipe of thin_delta, reading and lz4", f"{said['layer-bytes'] / sent:.3f}")
    least = alone(node, blocks)
    tap.result(said["read"] <= 2 * said["changed"], "read are no more than the changed chunks of both", said)
    tap.result(said["layer-bytes"] <= 1.05 * least + (64 << 10), "sent is little more than the changed blocks, compressed",
               (said["layer-bytes"], least))
    figure("sent, to changed blocks of 4 KiB each compressed alone", f"{said['layer-bytes'] / least:.3f}")
    figure("seconds of push, and of the pipe with lz4", f"{seconds:.2f} {taken:.2f}")
    # The same once more, with somebody looking.
    _, _, peaks = measured(OVBD, "push", "--dry-run", base, f"{source.name}/{name}", f"oci:{LAYOUT}:{name}")
    tap.result(peaks.get("ovbd", 0) <= MEMORY, "push takes little memory", peaks)
    figure("memory of push, MiB", f"{peaks.get('ovbd', 0) / MIB:.0f}")
    return said, seconds, taken


def round_of_pull(source, target, pushed, number, before, received):
    """Pulls what was pushed; returns the name of the volume, seconds, and those of a pipe that sends chunks as they are."""
    said, seconds = timed(OVBD, "pull", "--json", "--thin", f"{target.name}/pool/web", f"oci:{LAYOUT}:s{number}")
    said = json.loads(said)
    tap.result(said["written"] <= 1.1 * pushed["data"], "written is little more than the layer maps", (said, pushed))
    figure("pull, written to what the layer maps", f"{said['written'] / pushed['data']:.3f}")
    taken, moved = send_and_receive(source, before, f"p{number}", target, received)
    figure("sent, to a pipe that sends chunks as they are", f"{pushed['layer-bytes'] / moved:.3f}")
    name = said["volume"].split("/")[1]
    tap.equal(target.sha256(name), source.sha256(f"s{number}"), "both sides hold the same")
    return name, seconds, taken


def main():
    # The half of the memory is what file systems in it have otherwise.
    run("mount", "-o", "remount,size=95%", SCRATCH.parent)
    set_up_lvm()
    generator = random.Random("figures")
    with Devices() as devices:
        # A round changes the seventh part of the chunks, twice on the side that receives.
        room = MEGABYTES + MEGABYTES * ROUNDS // 2 + 60
        source, target = Group(devices, "source", room + 100), Group(devices, "target", room + 100)
        source.pool("pool", room, "--chunksize", "64k")
        target.pool("pool", room, "--chunksize", "64k")
        node = source.thin("web", MEGABYTES)
        fill(node, MEGABYTES)
        # How it is compressed does not matter to what follows; so it takes less memory.
        push("base", "--algo=zstd", "--snapshot=base", f"{source.name}/web")
        received = None
        if PULLS:
            ovbd("pull", "--thin", f"{target.name}/pool/web", f"oci:{LAYOUT}:base")
            received = next(name for name in target.all() if name.startswith("web."))
        before = "base"
        # Of each the least counts: the rest is what others do on the machine.
        pushes, both, pipes, moves = [], [], [], []
        for number in range(ROUNDS):
            pushed, seconds, taken = round_of_push(source, generator, node, number, before)
            pushes.append(seconds)
            pipes.append(taken)
            if PULLS:
                name, pulling, moving = round_of_pull(source, target, pushed, number, before, received)
                both.append(seconds + pulling)
                moves.append(moving)
                run("lvremove", "--yes", f"{target.name}/{received}", f"{target.name}/p{number}r")
                received = name
            # Of what is in memory no more than has to be.
            run("lvremove", "--yes", f"{source.name}/{before}", f"{source.name}/p{number}")
            before = f"s{number}"
        figure("push, seconds to those of the pipe with lz4", f"{min(pushes) / min(pipes):.2f}")
        if PULLS:
            figure("push and pull, seconds to those of the pipe without", f"{min(both) / min(moves):.2f}")
    tap.finish()


main()
