#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Where nobody hears what `ovbd` says, it does the same: `up` that fails undoes all that it can, `commit` lets the
device go on, and an answer that cannot be written is an error, after which nothing is left of `up`."""

import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
from block_devices import sha256
from ovbd_command import Images, existing, leaves_nothing, listed, ovbd, ovbd_fails, settled
from test_script import OVBD, SCRATCH, Tap, load, run

# So many that the one in the middle can be opened before the last is there.
LAYERS = 40
HELD = LAYERS // 2


@contextlib.contextmanager
def unheard():
    """Ends for stderr by what they are: none of them takes a word."""
    reader, writer = os.pipe()
    os.close(reader)
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        yield {"a closed pipe": writer, "a full disk": full}
    finally:
        os.close(writer)
        os.close(full)


def status(*words, stderr):
    command = [str(word) for word in [OVBD, *words]]
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=stderr).returncode


def hold(name, opened, ended):
    """Opens a mapped device as soon as it is there, which is before it has a node of its name."""
    while not ended.is_set():
        for block in pathlib.Path("/sys/block").glob("dm-*"):
            with contextlib.suppress(OSError):
                if (block / "dm/name").read_text().strip() == name:
                    opened.append(os.open(f"/dev/{block.name}", os.O_RDONLY))
                    return
        time.sleep(0.001)


def check_undo(tap, what, stderr, base, damaged):
    """The last table is refused while another program has a device in the middle open."""
    cow = SCRATCH / "cow"
    layers = []
    for number in range(LAYERS):
        layers.append(SCRATCH / f"copy{number}")
        shutil.copyfile(base, layers[-1])
    before = existing()
    held, blob = f"undo-zfile{HELD}", f"undo-blob{HELD}"
    words = ["up", "--ignore-parents", "--writable", "--cow", cow, "undo", *layers, damaged]
    opened = []
    # Whoever is to open it may come too late.
    for _ in range(20):
        ended = threading.Event()
        holder = threading.Thread(target=hold, args=(held, opened, ended))
        holder.start()
        returned = status(*words, stderr=stderr)
        ended.set()
        holder.join()
        if returned != 1 or opened:
            break
    tap.equal(returned, 1, f"{what}: up fails with status 1")
    tap.equal(len(opened), 1, f"{what}: the device was held meanwhile")
    left = {name for name in existing() if name not in before and not name.startswith("loop")}
    tap.equal(left - {blob}, {held}, f"{what}: nothing else is left but what that one is made of")
    tap.result(not cow.exists(), f"{what}: the new COW store is gone")
    for descriptor in opened:
        os.close(descriptor)
    for name in (held, blob):
        if name in left:
            run("dmsetup", "remove", "--retry", name)
    tap.equal(settled(before), before, f"{what}: they go when it is closed")


def check_commit(tap, what, stderr, images):
    """A commit that fails when the store is frozen, and some that say all they do."""
    ovbd("up", "--writable", "heard", *images.layer)
    small = SCRATCH / "small"
    small.mkdir(exist_ok=True)
    run("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small)
    run("dd", "if=/dev/urandom", "of=/dev/mapper/heard", "bs=64k", "count=8", "oflag=direct")
    tap.equal(status("commit", "heard", "-o", small / "out", stderr=stderr), 1, f"{what}: commit to a full file system")
    tap.equal(list(small.iterdir()), [], f"{what}: it leaves no file")
    tap.result("SUSPENDED" not in run("dmsetup", "info", "heard"), f"{what}: the device goes on")
    run("umount", small)
    outs = []
    for words in (["-v"], ["--progress=always"], ["--progress=json"]):
        outs.append(SCRATCH / f"out{len(outs)}")
        tap.equal(status(*words, "commit", "-f", "heard", "-o", outs[-1], stderr=stderr), 0,
                  f"{what}: commit {words[0]}")
    ovbd("export", "-f", *images.layer, *outs, "-o", SCRATCH / "exported")
    tap.equal(sha256(SCRATCH / "exported"), sha256("/dev/mapper/heard"), f"{what}: the layer is right")
    tap.equal(status("-v", "down", "heard", stderr=stderr), 0, f"{what}: down")


def check_answers(tap, images):
    ovbd("up", "listed", *images.layer)
    with unheard() as streams:
        full, closed = streams["a full disk"], streams["a closed pipe"]
        for words in (["ls"], ["ls", "--json"]):
            ended = subprocess.run([OVBD, *words], stdout=full, stderr=subprocess.PIPE, text=True)
            good = ended.returncode == 1 and "standard output: cannot write: No space left" in ended.stderr
            tap.result(good, f"{' '.join(words)} to a full disk: an error", ended)
            ended = subprocess.run([OVBD, *words], stdout=closed, stderr=subprocess.PIPE, text=True)
            tap.equal((ended.returncode, ended.stderr), (141, ""), f"{' '.join(words)} to a closed pipe: quiet")
    tap.result(listed("listed"), "the stack is still there")
    ovbd("down", "listed")


def check_up(tap, images):
    """A device whose name cannot be told is taken down again, and so is its new store."""
    with unheard() as streams:
        for (what, stdout), wanted in zip(streams.items(), (141, 1)):
            cow = SCRATCH / "untold.cow"
            words = [OVBD, "up", "--writable", "--cow", cow, "untold", *images.layer]
            before = existing()
            ended = subprocess.run(words, stdout=stdout, stderr=subprocess.PIPE, text=True)
            tap.equal(ended.returncode, wanted, f"up to {what}")
            tap.result(("standard output: cannot write" in ended.stderr) == (wanted == 1), f"up to {what}: what it says",
                       ended.stderr)
            tap.equal(settled(before), before, f"up to {what}: nothing is left")
            tap.result(not cow.exists(), f"up to {what}: the new COW store is gone")


def main(tap):
    images = Images("streams")
    damaged = SCRATCH / "damaged.layer"
    ovbd("build", "--format", "lsmt", "-o", damaged, images.raw[0])
    with open(damaged, "r+b") as file:
        # The first entries of the index, which the kernel reads first.
        file.seek(-4096 - 4096, os.SEEK_END)
        file.write(b"\xff" * 8 + b"\x00" * 8 + b"\x11" * 32)
    tap.equal(ovbd_fails("up", "undo", damaged)[0], 1, "a damaged index is refused")
    with unheard() as streams:
        for what, stderr in streams.items():
            check_undo(tap, what, stderr, images.layer[0], damaged)
            leaves_nothing(tap, what, check_commit, tap, what, stderr, images)
    check_answers(tap, images)
    check_up(tap, images)


tap = Tap()
load("loop", "dm-zfile", "dm-overlaybd")
main(tap)
tap.finish()
