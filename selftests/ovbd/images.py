#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Images of a registry as devices: `ovbd pull --up` and `ovbd up` of names map the files of the store where they are,
past the page cache of the file system below, also on a disk with blocks of 4096 bytes; and what is mapped stays in the
store."""

import contextlib
import fcntl
import json
import os
import pathlib
import random
import re
import struct
import sys
import textwrap

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
from block_devices import read_direct, sha256
from ovbd_command import MIB, Images, change_image, existing, ovbd, settled
from registry import has_network, registry, write_layout
from test_script import OVBD, SCRATCH, SOURCE, Tap, load, run

# linux/loop.h
LOOP_GET_STATUS64 = 0x4C05
LO_FLAGS_READ_ONLY, LO_FLAGS_DIRECT_IO = 1, 16


def loops(store):
    """The file, first byte and flags of each loop device on a file of the store."""
    found = []
    for block in pathlib.Path("/sys/block").glob("loop*"):
        try:
            file = pathlib.Path((block / "loop/backing_file").read_text().strip())
        except OSError:
            continue
        if store not in file.parents:
            continue
        with open(f"/dev/{block.name}", "rb") as device:
            info = fcntl.ioctl(device, LOOP_GET_STATUS64, bytes(232))
        _, _, _, offset, _, _, _, _, flags = struct.unpack_from("=QQQQQIIII", info)
        found.append((file, offset, flags))
    return sorted(found)


@contextlib.contextmanager
def disk(name, block_bytes):
    """A file system on a disk with such blocks, and where it is mounted."""
    file, folder = SCRATCH / f"{name}.disk", SCRATCH / name
    with open(file, "wb") as image:
        image.truncate(64 * MIB)
    folder.mkdir()
    device = run("losetup", "--find", "--show", "--sector-size", block_bytes, file).strip()
    try:
        run("mkfs.ext4", "-q", "-b", "4096", device)
        run("mount", device, folder)
        try:
            yield folder
        finally:
            run("umount", folder)
    finally:
        run("losetup", "--detach", device)


def check_mapped(tap, what, store, image, raw, wanted):
    """A device over an image: content, and each layer a loop device on a file of the store, from the byte `wanted`."""
    tap.equal(sha256("/dev/mapper/image"), sha256(raw), f"{what}: content")
    tap.result(read_direct("/dev/mapper/image", 0, MIB) == raw.read_bytes()[:MIB], f"{what}: direct reads")
    layers = [store / f"blobs/sha256/{digest}" for digest in image]
    found = loops(store)
    tap.equal([file for file, _, _ in found], sorted(layers), f"{what}: the files of the store are mapped in place")
    tap.equal({offset for _, offset, _ in found}, {wanted}, f"{what}: from this byte on")
    for _, _, flags in found:
        tap.result(flags & LO_FLAGS_DIRECT_IO and flags & LO_FLAGS_READ_ONLY, f"{what}: direct I/O, read-only", flags)


def digests(name):
    """The digests of an image's layers, as its registry has them."""
    return [layer["digest"].partition(":")[2] for layer in json.loads(ovbd("inspect", "--json", name))["layers"]]


def check_table(tap, what, wanted):
    offset = re.findall(r"zfile \S+ \d+ 2 offset (\d+)\n", run("dmsetup", "table"))
    tap.equal(offset, [] if wanted else ["1536"] * 3, f"{what}: dm-zfile knows where the blobs begin")


def check_pulled(tap, folder, host, images, wanted):
    """An image of a registry, mapped as it is pulled; what is written becomes its next layer."""
    what, store = folder.name, folder / "pulled"
    name, tuesday = f"{host}/vm/web:mon", f"{host}/vm/web:tue"
    where, before = ["--store", store], settled([])
    ovbd("push", *where, "--fs", "none", *images.layer, name)
    printed = ovbd("pull", *where, "--up", "image", name)
    tap.result(printed.endswith("\n/dev/mapper/image\n"), f"{what}, pull --up: prints the device", printed)
    check_mapped(tap, f"{what}, pull --up", store, digests(name), images.raw[2], wanted)
    check_table(tap, f"{what}, pull --up", wanted)
    ovbd("down", "image")

    ovbd("pull", *where, "--up", "image", "--writable", name)
    changed = SCRATCH / "changed.raw"
    run("cp", images.raw[2], changed)
    change_image(changed, random.Random(7), 10)
    run("dd", f"if={changed}", "of=/dev/mapper/image", "bs=64k", "oflag=direct", "conv=fsync")
    next_layer = SCRATCH / f"{what}.next"
    ovbd("commit", "--tar", "image", "-o", next_layer)
    ovbd("down", "image")
    ovbd("push", *where, "--fs", "none", name, next_layer, tuesday)
    ovbd("pull", *where, "--up", "image", tuesday)
    check_mapped(tap, f"{what}, the next one", store, digests(tuesday), changed, wanted)
    ovbd("down", "image")
    tap.equal(settled(before), before, f"{what}, pulled: no device is left")


def check_named(tap, folder, images, wanted):
    """An image of a store by every way to map it, and what the store keeps meanwhile."""
    what, store, name = folder.name, folder / "store", "reg.example/vm/web:mon"
    image = write_layout(store, name, images.layer)
    where, before = ["--store", store], settled([])
    for way, words in (("a name", [*where, "image", name]), ("oci:", ["image", f"oci:{store}:{name}"])):
        ovbd("up", *words)
        tap.result(ovbd("images", *where).endswith("  in use\n"), f"{what}, up of {way}: images says so")
        check_mapped(tap, f"{what}, up of {way}", store, image, images.raw[2], wanted)
        check_table(tap, f"{what}, up of {way}", wanted)
        ovbd("down", "image")
    run("sh", "-euc", ovbd("up", *where, "--dry-run", "image", name))
    check_mapped(tap, f"{what}, pasted dry run", store, image, images.raw[2], wanted)
    # Without its name it stays, because it is mapped; and then it does not.
    ovbd("rmi", *where, name)
    ovbd("gc", *where, "--older", "0")
    tap.equal(sha256("/dev/mapper/image"), sha256(images.raw[2]), f"{what}: gc leaves what is mapped alone")
    ovbd("down", "image")
    tap.equal(settled(before), before, f"{what}, down: no device is left")
    files = list((store / "blobs/sha256").iterdir())
    tap.equal(sorted(file.name for file in files), sorted(image), f"{what}: gc left the layers and nothing else")
    ovbd("gc", *where, "--older", "0")
    tap.equal(list((store / "blobs/sha256").iterdir()), [], f"{what}: then gc takes them")


def check_documents(tap, host):
    """The lines of docs/registry.rst from a disk image to a registry and to another machine."""
    before = settled([])
    text = (SOURCE / "docs/registry.rst").read_text().partition("and to another machine::\n\n")[2]
    commands = textwrap.dedent(text.partition("\n\n")[0])
    tap.equal(commands.count("ovbd "), 4, "docs: four commands, and where the device is mounted")
    # The other machine's store and place to mount, of which this guest can write to neither.
    commands = commands.replace("reg.example:5000", host).replace("/mnt", str(SCRATCH / "mnt"))
    commands = re.sub(r"^ovbd (pull|up)", rf"ovbd \1 --store {SCRATCH}/var-lib-ovbd", commands, flags=re.M)
    image, folder = SCRATCH / "disk.img", SCRATCH / "mnt"
    with open(image, "wb") as file:
        file.truncate(16 * MIB)
    folder.mkdir()
    run("mkfs.ext4", "-q", "-d", SOURCE / "selftests/lib", image)
    environment = os.environ | {"PATH": f"{OVBD.parent}:{os.environ['PATH']}"}
    try:
        tap.attempt("docs: pasted", lambda: run("sh", "-euc", commands, cwd=SCRATCH, env=environment))
        tap.equal((folder / "registry.py").read_bytes(), (SOURCE / "selftests/lib/registry.py").read_bytes(),
                  "docs: the files are there")
    finally:
        run("umount", folder)
        ovbd("down", "web")
    tap.equal(settled(before), before, "docs: no device is left")


def check_small_and_plain(tap, folder):
    """Layers without compression, which are mapped sector by sector, and one that is smaller than a block."""
    images = Images("plain", options=[["--tar", "--format", "lsmt"], ["--tar"], []])
    small, raw = folder / "small.layer", SCRATCH / "small.raw"
    with open(raw, "wb") as file:
        file.truncate(MIB)
    layers = [folder / f"plain{number}" for number in range(3)]
    for number, layer in enumerate(images.layer):
        run("cp", layer, layers[number])
    ovbd("up", "image", *layers)
    tap.equal(sha256("/dev/mapper/image"), sha256(images.raw[2]), "layers that are not compressed among others: content")
    ovbd("down", "image")
    ovbd("build", "-o", small, raw)
    tap.result(small.stat().st_size < 4096, "a layer smaller than a block", small.stat().st_size)
    ovbd("up", "image", small)
    tap.equal(sha256("/dev/mapper/image"), sha256(raw), "a layer smaller than a block: content")
    ovbd("down", "image")


def main(tap):
    load("loop", "dm-overlaybd", "dm-zfile")
    images = Images("image", options=[["--tar"], ["--tar", "--algo", "zstd"], ["--tar", "--block-size", "16k"]])
    with registry() if has_network() else contextlib.nullcontext() as host:
        for name, block_bytes, wanted in (("blocks-of-512", 512, 1536), ("blocks-of-4096", 4096, 0)):
            with disk(name, block_bytes) as folder:
                before = existing()
                check_named(tap, folder, images, wanted)
                if host:
                    check_pulled(tap, folder, host, images, wanted)
                else:
                    tap.skip(f"{name}, pull --up", "this kernel has no network")
                if block_bytes == 4096:
                    check_small_and_plain(tap, folder)
                tap.equal(settled(before), before, f"{name}: no device is left")
        if host:
            check_documents(tap, host)


tap = Tap()
main(tap)
tap.finish()
