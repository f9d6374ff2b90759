#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""`ovbd commit`: the layer it makes of a mounted ext4, of zeros and of a single sector; what it reads;
and that it refuses a snapshot that lost writes."""

import contextlib
import json
import os
import pathlib
import random
import struct
import subprocess
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
from block_devices import Devices, read_direct, sha256
from ovbd_command import MIB, Images, listed, make_image, ovbd, refused, settled
from test_script import SCRATCH, Tap, load, run


def json_info(*paths):
    return json.loads(ovbd("info", "--json", *paths))


def written_below():
    """Sectors that were read from every loop device so far."""
    return {block.name: int((block / "stat").read_text().split()[2])
            for block in pathlib.Path("/sys/block").glob("loop*") if (block / "loop").exists()}


def check_filesystem(tap):
    """Files that are written, changed and removed while the device is mounted."""
    raw = SCRATCH / "ext4.raw"
    with open(raw, "wb") as file:
        file.truncate(32 * MIB)
    run("mkfs.ext4", "-q", raw)
    base, second, third = (SCRATCH / f"ext4{number}.layer" for number in range(3))
    ovbd("build", "-o", base, raw)
    before = settled([])
    top = SCRATCH / "mnt"
    top.mkdir()
    wanted = {}
    for number, (paths, out, words) in enumerate([([base], second, []), ([base, second], third, ["--algo", "zstd"])]):
        device = ovbd("up", "--writable", "files", *paths).strip()
        run("mount", device, top)
        for name, content in wanted.items():
            assert (top / name).read_bytes() == content, name
        for name in list(wanted)[::3]:
            (top / name).unlink()
            del wanted[name]
        for file in range(20):
            name = f"file{number}.{file}"
            wanted[name] = os.urandom(1 + file * 3001)
            (top / name).write_bytes(wanted[name])
        # Without sync: the commit itself makes the file system consistent.
        ovbd("commit", *words, "-o", out, "files")
        (top / "after").write_bytes(b"not in the layer")
        run("umount", top)
        ovbd("down", "files")
    layers = [base, second, third]
    ovbd("verify", *layers)
    device = ovbd("up", "files", *layers).strip()
    # The frozen file system is clean: no journal to replay.
    run("mount", "-o", "ro,noload", device, top)
    found = {path.name: path.read_bytes() for path in top.glob("file*")}
    tap.result(found == wanted, f"ext4: {len(wanted)} files after two commits of the mounted device")
    run("umount", top)
    check = subprocess.run(["e2fsck", "-fn", device], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    tap.result(check.returncode == 0, "ext4: e2fsck finds nothing", check.stdout)
    ovbd("down", "files")
    tap.equal(settled(before), before, "ext4: no device is left")
    info = json_info(*layers)
    tap.equal([layer["parent_matches"] for layer in info["layers"]], [None, True, True], "ext4: parent UUIDs")
    tap.equal(info["virtual_bytes"], 32 * MIB, "ext4: virtual size")


def check_parts(tap):
    """Single sectors, zeros and the end of a device that is no multiple of a chunk."""
    raw = SCRATCH / "parts.raw"
    size = 2 * MIB + 7 * 512
    make_image(raw, random.Random(1), size)
    with open(raw, "r+b") as file:
        file.write(b"x" * MIB)
    base, out = SCRATCH / "parts0.layer", SCRATCH / "parts1.layer"
    ovbd("build", "-o", base, raw)
    device = ovbd("up", "--writable", "parts", base).strip()
    with open(device, "r+b", buffering=0) as file:
        def put(at, data):
            os.pwrite(file.fileno(), data, at)
        put(512 * 1001, b"one sector".ljust(512))
        put(size - 512, b"the last sector".ljust(512))
        put(64 << 10, bytes(256 << 10))
        put(640 << 10, b"y" * (128 << 10))
        put(640 << 10, bytes(64 << 10))
        os.fsync(file)
    wanted = read_direct(device, 0, size)
    reads = written_below()
    ovbd("commit", "--format", "lsmt", "-o", out, "parts")
    # The store is gone, and the layer's device new.
    more = sum(count - reads[name] for name, count in written_below().items() if name in reads)
    # There are the layer's metadata, and udev, which looks at a device that goes on.
    tap.result(more * 512 < size, "parts: less was read of the stack than it has", f"{more * 512} bytes")
    ovbd("down", "parts")
    [layer] = json_info(base, out)["layers"][1:]
    tap.equal(layer["data_bytes"], 4096 + 7 * 512 + (64 << 10), "parts: data that the layer stores")
    tap.equal(layer["zeroed_bytes"], (256 + 64) << 10, "parts: zeros are zeroed segments")
    device = ovbd("up", "parts", base, out).strip()
    tap.result(read_direct(device, 0, size) == wanted, "parts: content")
    ovbd("down", "parts")


def empty_store(path, chunk):
    """The file of a COW store without exceptions, with chunks of `chunk` sectors."""
    with open(path, "wb") as file:
        file.write(struct.pack("<4sIII", b"SnAp", 1, 1, chunk))
        file.truncate(max(4 * MIB, 4 * 512 * chunk))
    return path


def check_one_change_one_uuid(tap):
    """A change gives the same UUID whatever the order of its writes, whatever the chunks of the store, and where it is
    found by comparing images. What was written and is as it was below is no change."""
    images = Images("uuid", size=5 * MIB // 2 + 3 * 512, options=[[]])
    generator = random.Random("writes")
    size = os.path.getsize(images.raw[0])
    original = images.raw[0].read_bytes()
    # Places that do not overlap: of one sector, of some that begin and end anywhere, of zeros, and of what is there.
    places = sorted(generator.sample(range(0, size // 512, 64), 24))
    writes = []
    for number, place in enumerate(places):
        at, length = place * 512 + 512 * (number % 5), [512, 9 * 512, 4096, 24 << 10][number % 4]
        old = original[at:at + length]
        writes.append((at, [old, bytes(length), generator.randbytes(length)][number % 3]))
    writes.append((size - 512, b"the last sector".ljust(512, b".")))
    raw = SCRATCH / "uuid.raw"
    built = SCRATCH / "uuid-built.layer"
    content = bytearray(original)
    for at, data in writes:
        content[at:at + len(data)] = data
    raw.write_bytes(content)
    ovbd("build", "-o", built, raw, "--base", *images.layer)
    [wanted] = json_info(*images.layer, built)["layers"][1:]
    # Half of the last chunk of the last store is behind the end of the device.
    for chunk in (8, 8, 128, 2, 4, 4096):
        store = empty_store(SCRATCH / "uuid.cow", chunk)
        device = ovbd("up", "--writable", "--cow", store, "uuid", *images.layer).strip()
        with open(device, "r+b", buffering=0) as file:
            for at, data in writes:
                os.pwrite(file.fileno(), data, at)
                # Else all reach the store in the order of the device.
                os.fsync(file)
        out = SCRATCH / "uuid.layer"
        ovbd("commit", "--force", "-o", out, "uuid")
        ovbd("down", "uuid")
        ovbd("verify", *images.layer, out)
        what = f"chunks of {chunk} sectors"
        [layer] = json_info(*images.layer, out)["layers"][1:]
        for key in ("uuid", "data_bytes", "zeroed_bytes"):
            tap.equal(layer[key], wanted[key], f"{what}: {key} of commit and of build --base")
        copy = SCRATCH / "uuid.copy"
        ovbd("export", "--force", "-o", copy, *images.layer, out)
        tap.result(copy.read_bytes() == content, f"{what}: content")
        generator.shuffle(writes)


def check_small_chunks(tap):
    """A store that dmsetup made, without room for a record."""
    images = Images("small", options=[[]])
    store = empty_store(SCRATCH / "small.cow", 1)
    ovbd("up", "--writable", "--cow", store, "small", *images.layer)
    refused(tap, "chunks of 512 bytes", "no room for a record", "commit", "-o", SCRATCH / "x", "small")
    ovbd("down", "small")


def check_options(tap):
    """The options for the new layer, the same bytes for the same change, and nothing written at all."""
    images = Images("options", options=[[]])
    device = ovbd("up", "--writable", "options", *images.layer).strip()
    empty = SCRATCH / "empty.layer"
    ovbd("commit", "-o", empty, "options")
    tap.equal(json_info(*images.layer, empty)["layers"][1]["segments"], 0, "options: nothing was written")
    ovbd("down", "options")
    change = os.urandom(100 << 10)
    content = change + images.raw[0].read_bytes()[len(change):]
    outs = []
    for number, words in enumerate([[], [], ["--tar"], ["--algo", "zstd", "--level", "9", "--block-size", "16384"],
                                    ["--format", "lsmt"], ["--no-crc"], ["--force", "--format", "lsmt"]]):
        ovbd("up", "--writable", "options", *images.layer)
        with open(device, "r+b", buffering=0) as file:
            file.write(change)
            os.fsync(file)
        out = SCRATCH / f"committed{number}.layer"
        if "--force" in words:
            out = outs[0]
            refused(tap, "commit onto an existing file", "already exists", "commit", "-o", out, "options")
            digest = sha256(out)
        elif number == 1:
            refused(tap, "commit onto a layer of the stack", "is an input itself", "commit", "--force", "-o",
                    images.layer[0], "options")
        ovbd("commit", *words, "-o", out, "options")
        tap.result(read_direct(device, 0, len(content)) == content, f"options {words}: the device is as it was")
        ovbd("down", "options")
        image = SCRATCH / "options.raw"
        ovbd("export", "--force", "-o", image, *images.layer, out)
        tap.result(image.read_bytes() == content, f"options {words}: content of the layer")
        outs.append(out)
        if number == 1:
            tap.result(outs[0].read_bytes() == outs[1].read_bytes(), "options: one change gives the same bytes")
    tap.result(sha256(outs[0]) != digest, "commit --force replaces the file")
    uuids = {layer["uuid"] for out in outs for layer in json_info(*images.layer, out)["layers"][1:]}
    tap.equal(len(uuids), 1, "options: one content has one UUID")


def check_full(tap):
    """A COW store that is full refuses writes, and what it took is in the layer."""
    images = Images("full", options=[[]])
    cow = SCRATCH / "full.cow"
    device = ovbd("up", "--writable", "--cow", cow, "--size", "64K", "full", *images.layer).strip()
    written = 0
    with open(device, "r+b", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                os.pwrite(file.fileno(), b"written!" * 512, written)
                os.fsync(file)
                written += 4096
    tap.result(4096 <= written < 64 << 10, "full: writes fail", f"after {written} bytes")
    tap.equal(listed("full")["cow"]["state"], "overflow", "full: ls says so")
    out, copy = SCRATCH / "full.layer", SCRATCH / "full.copy"
    ovbd("commit", "-o", out, "full")
    ovbd("down", "full")
    ovbd("export", "-o", copy, *images.layer, out)
    wanted = b"written!" * (written // 8) + images.raw[0].read_bytes()[written:]
    tap.result(copy.read_bytes() == wanted, "full: the layer has what was taken")


def check_invalid(tap):
    """A COW store that failed loses writes, so nothing can be made of it."""
    images = Images("invalid", options=[[]])
    cow = SCRATCH / "invalid.cow"
    with open(cow, "wb") as file:
        file.truncate(4 * MIB)
    with Devices() as devices:
        loop = run("losetup", "--find", "--show", cow).strip()
        devices.undo(run, "losetup", "--detach", loop)
        devices.map("fails", f"0 8192 linear {loop} 0", readonly=False)
        store = "/dev/mapper/fails"
        device = ovbd("up", "--writable", "--cow", store, "invalid", *images.layer).strip()
        for table in ("0 8192 error", f"0 8192 linear {loop} 0"):
            run("dmsetup", "suspend", "--noflush", "fails")
            run("dmsetup", "load", "fails", "--table", table)
            run("dmsetup", "resume", "fails")
            if "error" in table:
                with open(device, "r+b", buffering=0) as file, contextlib.suppress(OSError):
                    file.write(os.urandom(4096))
                    os.fsync(file)
        tap.equal(listed("invalid")["cow"]["state"], "invalid", "invalid: ls says so")
        out = SCRATCH / "invalid.layer"
        refused(tap, "commit of an invalid snapshot", "invalid", "commit", "-o", out, "invalid")
        tap.result(not out.exists(), "invalid: no layer was made")
        ovbd("down", "invalid")
        with open(cow, "r+b") as file:
            file.write(struct.pack("<4sI", b"SnAp", 0))
        run("blockdev", "--flushbufs", loop)
        words = ["up", "--writable", "--cow", store, "invalid", *images.layer]
        refused(tap, "up with an invalid snapshot", "invalid", *words)
        ovbd(*words, "--wipe-cow")
        tap.result(sha256(device) == sha256(images.raw[0]), "up --wipe-cow starts a new store")
        ovbd("down", "invalid")


tap = Tap()
load("loop", "dm-overlaybd", "dm-zfile")
check_filesystem(tap)
check_parts(tap)
check_one_change_one_uuid(tap)
check_small_chunks(tap)
check_options(tap)
check_full(tap)
check_invalid(tap)
images = Images("other", options=[[]])
ovbd("up", "readonly", *images.layer)
refused(tap, "commit of a stack that is not writable", "not writable", "commit", "-o", SCRATCH / "x", "readonly")
ovbd("down", "readonly")
refused(tap, "commit of nothing", "no such stack", "commit", "-o", SCRATCH / "x", "readonly")
tap.finish()
