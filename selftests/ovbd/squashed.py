#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Runs of an image's layers that `ovbd system` squashes in the store: fewer devices with the same bytes, whatever happens to
the files of the runs and whenever making them is interrupted; and images that are made of such a system have the layers
themselves."""

import contextlib
import hashlib
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
import syscall_steps
from block_devices import read_direct, sha256
from ovbd_command import (MIB, change_image, empty_layer, existing, listed, make_image, mounted, ovbd, ovbd_fails, refused,
                          settled)
from sealed_stacks import flip, make_key
from test_script import OVBD, SCRATCH, Tap, load, run

SIZE = 2 * MIB
LAYERS, RUN = 20, 16
BOOT, STORE = SCRATCH / "boot", SCRATCH / "store"
KERNEL = ["--linux", SCRATCH / "vmlinuz", "--initrd", SCRATCH / "initrd"]
IMAGE = "h.x/vm/root"
# Every so many steps is the program killed.
STRIDE = int(os.environ.get("OVBD_STEP_STRIDE", "5"))


def place(store=None):
    return ["--boot", BOOT, "--store", store or STORE]


def add(number, *words, store=None):
    """`ovbd system add` of an image; returns what it warns of."""
    status, said = ovbd_fails("system", "add", *place(store), *KERNEL, *words, f"{IMAGE}:{number}")
    assert status == 0, said
    return said


def generations(store=None):
    return json.loads(ovbd("system", "list", "--json", *place(store)))


def ovbd_status():
    """What `ovbd system status` prints, whatever it thinks of that."""
    command = [str(word) for word in [OVBD, "system", "status", "--json", *place()]]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout


def digests(number, store=None):
    found = json.loads(ovbd("inspect", "--json", f"oci:{store or STORE}:{IMAGE}:{number}"))
    return [layer["digest"] for layer in found["layers"]]


def squashed(store=None):
    return sorted(path.name for path in ((store or STORE) / "squashed").glob("*"))


def run_name(layers):
    """What the file of the lowest run of an image is called."""
    return hashlib.sha256("".join(f"{digest}\n" for digest in layers[1:1 + RUN]).encode()).hexdigest()


def content(*words):
    """How many layers a stack has, and its bytes."""
    ovbd("up", "looked", *words)
    try:
        return len(listed("looked")["layers"]), sha256("/dev/mapper/looked")
    finally:
        ovbd("down", "looked")


def mapped(number):
    """How many layers the stack of an image would have."""
    script = ovbd("up", "--dry-run", "--store", STORE, "looked", f"{IMAGE}:{number}")
    return int(re.search(r" overlaybd (\d+) ", script)[1])


def make_layers(count):
    """Layers of which each changes a little, and what is on the device with each."""
    generator, layers, sums = random.Random("squashed"), [], []
    raw = SCRATCH / "raw"
    make_image(raw, generator, SIZE)
    for number in range(count):
        layer = SCRATCH / f"{number}.layer"
        ovbd("build", "-q", "-o", layer, raw, *(["--base", *layers] if layers else []))
        layers.append(layer)
        sums.append(sha256(raw))
        change_image(raw, generator, 3)
    return layers, sums


def fewer_devices(tap, layers, sums):
    """One file for sixteen layers, and another image with these shares it."""
    for count in (17, LAYERS, LAYERS + 1):
        ovbd("push", "-q", *layers[:count], f"oci:{STORE}:{IMAGE}:{count}")
    ovbd("system", "init", "-q", "--device", "LABEL=layers", *place(), *KERNEL, f"{IMAGE}:17")
    tap.equal(squashed(), [], "an image of 17 layers is left alone")
    tap.equal(add(LAYERS), "", f"a generation of {LAYERS} layers")
    tap.equal(squashed(), [run_name(digests(LAYERS))], "has one squashed file")
    file = STORE / "squashed" / squashed()[0]
    tap.equal(file.stat().st_mode & 0o777, 0o444, "which nobody writes to")
    wanted = sums[LAYERS - 1]
    tap.equal(content("--store", STORE, f"{IMAGE}:{LAYERS}"), (LAYERS - RUN + 1, wanted), "fewer devices, the same bytes")
    tap.equal(content(f"oci:{STORE}:{IMAGE}:{LAYERS}"), (LAYERS, wanted), "a layout is taken at its word")
    tap.equal(content(*layers[:LAYERS]), (LAYERS, wanted), "files are files")
    tap.equal(content("--store", STORE, f"{IMAGE}:17"), (17, sums[16]), "and so are the layers of the smaller image")
    identity = file.stat().st_ino, file.stat().st_mtime_ns
    add(LAYERS + 1)
    tap.equal((squashed(), (file.stat().st_ino, file.stat().st_mtime_ns)), ([file.name], identity), "one more layer: no new file")
    tap.equal(content("--store", STORE, f"{IMAGE}:{LAYERS + 1}"), (LAYERS + 2 - RUN, sums[LAYERS]), "and the same run")


def store_is_writable(tap):
    """A store that was written over the layers is taken over the squashed file, and the other way round."""
    file, aside = STORE / "squashed" / squashed()[0], SCRATCH / "aside"
    up = ["up", "--writable", "--cow", SCRATCH / "cow", "--store", STORE, "machine", f"{IMAGE}:{LAYERS}"]
    file.rename(aside)
    counts = []
    for number in range(2):
        device = ovbd(*up).strip()
        counts.append(len(listed("machine")["layers"]))
        if number == 0:
            with open(device, "r+b") as disk:
                disk.write(b"written" * 1000)
        else:
            tap.equal(read_direct(device, 0, 4096), (b"written" * 1000)[:4096], "what was written over the layers is there")
        ovbd("down", "machine")
        if number == 0:
            aside.rename(file)
    tap.equal(counts, [LAYERS, LAYERS - RUN + 1], "over the squashed file")
    (SCRATCH / "cow").unlink()


@contextlib.contextmanager
def instead(file, change):
    """Something else under the name of a file, or nothing."""
    aside = SCRATCH / "aside"
    file.rename(aside)
    try:
        change(file)
        yield
    finally:
        if file.is_dir() and not file.is_symlink():
            file.rmdir()
        else:
            file.unlink(missing_ok=True)
        aside.rename(file)


def what_is_wrong():
    """What `ovbd fsck` says."""
    return ovbd_fails("fsck", "--store", STORE)


def damaged_files(tap, sums):
    """Whatever is in the place of a squashed file, the layers are there."""
    file = STORE / "squashed" / squashed()[0]
    whole = file.read_bytes()
    outside = SCRATCH / "outside"
    outside.write_bytes(whole)
    changes = {"nothing": lambda path: None, "an empty file": lambda path: path.touch(), "a FIFO": os.mkfifo,
               "a link": lambda path: path.symlink_to(outside), "a folder": lambda path: path.mkdir(),
               "half of it": lambda path: path.write_bytes(whole[:len(whole) // 2]),
               "something else": lambda path: path.write_bytes(b"no layer" * 1000)}
    for what, change in changes.items():
        with instead(file, change):
            tap.equal(mapped(LAYERS), LAYERS, f"{what}: the layers are mapped")
            status, said = what_is_wrong()
            good = (status, said) == (0, "") if what == "nothing" else status == 1 and str(file) in said and "\n" not in said
            tap.result(good, f"{what}: fsck says so", said)
            ovbd("system", "status", *place())
    (STORE / "squashed/what").touch()
    tap.result("squashed/what: not the name of a digest" in what_is_wrong()[1], "what is no name is a stray", what_is_wrong())
    (STORE / "squashed/what").unlink()
    with instead(file, lambda path: path.write_bytes(whole)):
        flip(file, len(whole) // 3)
        status, said = what_is_wrong()
        tap.result(status == 1 and f"{file}: damaged: " in said, "a bit that flipped is found", said)
        ovbd("fsck", "-q", "--repair", "--store", STORE)
        tap.equal((squashed(), what_is_wrong()[0]), ([], 0), "and the file is moved away")
        tap.equal(content("--store", STORE, f"{IMAGE}:{LAYERS}"), (LAYERS, sums[LAYERS - 1]), "the layers are there")
        add(LAYERS)
        tap.equal(file.read_bytes(), whole, "and the next generation makes the same file again")
    lost = STORE / "blobs/sha256" / digests(LAYERS)[3].partition(":")[2]
    lost.rename(SCRATCH / "lost")
    tap.equal(mapped(LAYERS), LAYERS - RUN + 1, "a layer is lost that is in the squashed file")
    problems = json.loads(ovbd_status())["problems"]
    tap.equal([text.split(":")[0] for text in problems], ["generation 1"], "which only the smaller image lacks")
    add(LAYERS)
    tap.result("is missing" in what_is_wrong()[1], "fsck says that it is", what_is_wrong())
    with instead(file, lambda path: None):
        refused(tap, "without that file", "cannot open: No such file", "up", "--store", STORE, "looked", f"{IMAGE}:{LAYERS}")
        problems = json.loads(ovbd_status())["problems"]
        tap.equal(len(problems), len(generations()), "without that file all lack it")
    (SCRATCH / "lost").rename(lost)


def stop_children():
    """Sends SIGINT to the program that this one runs."""
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        number, _, rest = stat.read_text().partition(" (")
        if int(rest.rpartition(")")[2].split()[1]) == os.getpid():
            os.kill(int(number), signal.SIGINT)


def interrupted(tap, sums):
    """Killed before each step, with a signal, and with a disk that is full once it has begun."""
    file = STORE / "squashed" / squashed()[0]
    command = [OVBD, "system", "add", *place(), *KERNEL, f"{IMAGE}:{LAYERS}"]
    step, wrong, killed = 0, [], 0
    while True:
        file.unlink(missing_ok=True)
        steps, status = syscall_steps.run(command, step)
        if status is not None:
            break
        killed += 1
        if ovbd_fails("system", "status", *place())[0] or what_is_wrong()[0]:
            wrong.append(f"step {step}, {steps[-1]}")
        add(LAYERS)
        if squashed() != [file.name]:
            wrong.append(f"step {step}, {steps[-1]}: {squashed()}")
        step += STRIDE
    tap.result(status == 0 and killed > 5, f"{killed} times killed", f"exit status {status}")
    tap.equal(wrong, [], "nothing is half made, whenever it is killed")
    tap.equal(content("--store", STORE, f"{IMAGE}:{LAYERS}")[1], sums[LAYERS - 1], "and the next one is whole")
    ovbd("system", "prune", "-q", "--keep", "2", *place())
    left = STORE / "ingest" / f"squashed-{'0' * 64}.part"
    for path in (left, STORE / "ingest/.ovbd-12345"):
        path.touch()
        os.utime(path, (0, 0))
    for path in (STORE / "ingest").glob("*squashed-*"):
        os.utime(path, (0, 0))
    ovbd("gc", "-q", "--store", STORE)
    tap.equal([path.name for path in (STORE / "ingest").iterdir() if "ovbd" in path.name or "squashed" in path.name], [],
              "gc takes what is left")
    count = len(generations())
    file.unlink()
    # Its first write is that of the squashed file.
    begun = lambda _, step: step == "pwrite64"
    _, status = syscall_steps.run(command, begun, stop_children, goes_on=True)
    tap.equal((status in (1, 130), squashed() in ([], [file.name]), len(generations())), (True, True, count),
              "a signal: no generation")
    add(LAYERS)


def full_store(tap, layers):
    """No room for a squashed file, from the beginning or later, is no reason not to add a generation."""
    raw = SCRATCH / "full"
    with open(raw, "wb") as file:
        file.truncate(16 * MIB)
    run("mkfs.ext4", "-q", "-m", "0", raw)
    with mounted(raw, "-o", "loop") as top:
        store, fill = top / "store", top / "fill"
        ovbd("push", "-q", *layers[:LAYERS], f"oci:{store}:{IMAGE}:{LAYERS}")
        need = sum(layer.stat().st_size for layer in layers[1:1 + RUN])

        def fill_up(left):
            free = os.statvfs(top)
            with open(fill, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - left)

        fill_up(need + (64 << 10))
        said = add(LAYERS, store=store)
        tap.result("warning: " in said and "16 layers are not squashed" in said and "no room: " in said and "\n" not in said,
                   "no room: one warning, and a generation", said)
        fill.unlink()
        command = [OVBD, "system", "add", *place(store), *KERNEL, f"{IMAGE}:{LAYERS}"]
        errors, count = SCRATCH / "errors", len(generations(store))
        begun = lambda _, step: step == "pwrite64"
        _, status = syscall_steps.run(command, begun, lambda: fill_up(16 << 10), errors, goes_on=True)
        said = errors.read_text().strip()
        tap.result(status == 0 and "No space left on device" in said and "\n" not in said, "full later: the same", said)
        tap.equal((len(generations(store)), squashed(store)), (count + 1, []), "and nothing half made")
        fill.unlink()
        tap.equal((add(LAYERS, store=store), len(squashed(store))), ("", 1), "with room it is squashed")


def swept(tap, name, sums):
    """The file of a run stays while an image has the run, or a device is on it."""
    gc = ["gc", "--older", "0", "--store", STORE]
    ovbd(*gc)
    tap.result(name in squashed(), "gc keeps the file of an image")
    ovbd("up", "-q", "--store", STORE, "looked", f"{IMAGE}:{LAYERS}")
    for entry in json.loads(ovbd("images", "--json", "--store", STORE)):
        if entry["layers"] > 17:
            ovbd("rmi", "--store", STORE, entry["name"])
    status, said = ovbd_fails(*gc)
    tap.equal((status, squashed(), name in said), (0, [name], True), "and that alone which a device is on")
    tap.equal(sha256("/dev/mapper/looked"), sums[LAYERS - 1], "which reads as before")
    ovbd("down", "looked")
    ovbd("gc", "-q", "--store", STORE)
    tap.equal(squashed(), [name], "and one that is young")
    removed = json.loads(ovbd(*gc, "--json"))["parts"]
    tap.equal(squashed(), [], "and then takes it")
    tap.equal([part["path"] for part in removed], [str(STORE / "squashed" / name)], "and says so")


def committed(tap):
    """An image that is made of a system over squashed files has the layers."""
    own = digests(LAYERS)
    file, aside = STORE / "squashed" / squashed()[0], SCRATCH / "aside"
    for when in ("over the squashed file", "before there was one"):
        if when == "before there was one":
            file.rename(aside)
        device = ovbd("up", "--writable", "--cow", SCRATCH / "cow", "--store", STORE, "machine", f"{IMAGE}:{LAYERS}").strip()
        if when == "before there was one":
            aside.rename(file)
        with open(device, "r+b") as disk:
            disk.write(when.encode() * 200)
        ovbd("system", "commit", "-q", "--stack", "machine", *place(), *KERNEL, f"{IMAGE}:made")
        made = digests("made")
        tap.equal((made[:-1], len(made)), (own, LAYERS + 1), f"a commit {when} has the layers and one more")
        with open(device, "r+b") as disk:
            disk.seek(MIB)
            disk.write(when.encode() * 200)
        ovbd("push", "-q", "--store", STORE, "--layer", SCRATCH / "pushed", "machine", f"oci:{STORE}:{IMAGE}:pushed")
        tap.equal(digests("pushed")[:-1], made, f"and so has a push {when}")
        wanted = sha256(device)
        ovbd("down", "machine")
        tap.equal(content(f"oci:{STORE}:{IMAGE}:pushed"), (LAYERS + 2, wanted), "with all that was written")
        (SCRATCH / "cow").unlink()
        (SCRATCH / "pushed").unlink()


def sealed(tap, layers):
    """A signed image, with an older seal in the middle of what is squashed."""
    key, certificate = make_key("trusted")
    sign = ["--sign-key", key, "--certificate", certificate]
    ovbd("push", "-q", "--seal", *layers[:9], f"oci:{STORE}:{IMAGE}:older")
    older = [f"{STORE}/blobs/{digest.replace(':', '/')}" for digest in digests("older")]
    raw = SCRATCH / "raw"
    ovbd("export", "-q", "-f", "-o", raw, *layers[:9])
    generator = random.Random("sealed")
    for number in range(LAYERS):
        change_image(raw, generator, 2)
        layer = SCRATCH / f"sealed{number}.layer"
        ovbd("build", "-q", "-o", layer, "--base", *older, "--", raw)
        older.append(layer)
    name = f"{IMAGE}:sealed"
    ovbd("push", "-q", "--seal", *sign, *older, f"oci:{STORE}:{name}")
    before = squashed()
    add("sealed")
    made = [name for name in squashed() if name not in before]
    tap.equal(len(made), 1, "a sealed image has a squashed file")
    verity = ["--verity", "image", "--certificate", certificate, "--store", STORE]
    count, found = content(*verity, name)
    tap.equal(count, len(older) + 1 - RUN + 1, "and is mapped with it")
    tap.equal(found, hashlib.sha256(raw.read_bytes()).hexdigest(), "all of it is what was sealed")
    ovbd("sign", *sign, "--store", STORE, name)
    tap.result(True, "and can be signed again")


def as_many_as_can_be(tap):
    """255 layers, and no room for another one however few devices they are."""
    ovbd("push", "-q", *[empty_layer(SIZE)] * 255, f"oci:{STORE}:{IMAGE}:many")
    add("many")
    ovbd("up", "-q", "--writable", "--cow", SCRATCH / "cow", "--store", STORE, "machine", f"{IMAGE}:many")
    tap.equal(len(listed("machine")["layers"]), 30, "255 layers are 30")
    refused(tap, "a 256th layer", "has 255 layers, and nobody reads an image of more than 255", "system", "commit", "--stack",
            "machine", *place(), *KERNEL, f"{IMAGE}:more")
    ovbd("down", "machine")


tap = Tap()
load("loop", "dm-overlaybd", "dm-zfile", "dm-verity", "dm-snapshot")
start = existing()
BOOT.mkdir()
for path in KERNEL[1::2]:
    path.write_bytes(b"kernel or initrd")
all_layers, all_sums = make_layers(LAYERS + 1)
fewer_devices(tap, all_layers, all_sums)
run_of_all, = squashed()
store_is_writable(tap)
damaged_files(tap, all_sums)
interrupted(tap, all_sums)
full_store(tap, all_layers)
committed(tap)
sealed(tap, all_layers)
as_many_as_can_be(tap)
swept(tap, run_of_all, all_sums)
tap.equal(settled(start), start, "no device is left")
tap.finish()
