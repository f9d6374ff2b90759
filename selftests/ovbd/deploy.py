#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Generations of a system: kernel and initrd out of images, images that must be signed, updates from a registry, systems
changed by hand and as trees; `ovbd system add` and `commit` killed before each of the system calls by which they change
something."""

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
import syscall_steps
from ovbd_command import MIB, empty_layer, existing, listed as running, mounted, ovbd, ovbd_fails, refused, settled
from registry import registry
from sealed_stacks import make_key
from test_script import OVBD, SCRATCH, Tap, load, run

# Every so many steps, so that a minute suffices; 1 is all of them.
STRIDE = int(os.environ.get("OVBD_STEP_STRIDE", "8"))
SIZE = 8 * MIB
BOOT, STORE = SCRATCH / "boot", SCRATCH / "store"
PLACE = ["--boot", BOOT, "--store", STORE]
POLICY = pathlib.Path("/etc/ovbd/policy.conf")


def image(name, files, *below):
    """A layer with an ext4 that has these files, over others."""
    tree, raw, layer = SCRATCH / "tree", SCRATCH / "raw", SCRATCH / f"{name}.layer"
    shutil.rmtree(tree, ignore_errors=True)
    for path, content in files.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(content)
    raw.unlink(missing_ok=True)
    with open(raw, "wb") as file:
        file.truncate(SIZE)
    # Not smaller: a device below dm-verity has such blocks.
    run("mkfs.ext4", "-q", "-b", "4096", "-d", tree, raw)
    ovbd("build", "-q", "-o", layer, raw, *(["--base", *below] if below else []))
    return layer


def system(release, word):
    """The files of an image that can be booted."""
    return {f"boot/vmlinuz-{release}": f"kernel {word}".encode() * 9000, "etc/word": word.encode(),
            f"boot/initrd.img-{release}": f"initrd {word}".encode() * 9000}


@contextlib.contextmanager
def writable_etc():
    """A copy of /etc in its place while the body runs: not every guest can write there."""
    run("cp", "-a", "/etc", SCRATCH / "etc")
    run("mount", "--bind", SCRATCH / "etc", "/etc")
    try:
        (SCRATCH / "etc/ovbd").mkdir(exist_ok=True)
        yield
    finally:
        run("umount", "--lazy", "/etc")


@contextlib.contextmanager
def policy(text):
    """The policy while the body runs."""
    POLICY.write_text(text)
    try:
        yield
    finally:
        POLICY.unlink()


def listed():
    """The generations, in the order of the loader."""
    return json.loads(ovbd("system", "list", "--json", *PLACE))


def unbootable():
    """What is wrong with the entries: each must name files that are whole, and an image that is."""
    wrong = []
    for entry in listed():
        words = []
        for kind in ("linux", "initrd"):
            content = (BOOT / entry[kind].lstrip("/")).read_bytes()
            word = content.split(b" ")[1].split(b"kernel")[0].split(b"initrd")[0] if content else b""
            expected = f"{'kernel' if kind == 'linux' else 'initrd'} {word.decode()}".encode() * 9000
            if content != expected:
                wrong.append(f"{entry['number']}: {kind}")
            words.append(word)
        if len(set(words)) != 1:
            wrong.append(f"{entry['number']}: {words}")
    ovbd("system", "status", *PLACE)
    return wrong


def everything():
    """What must not change where something is refused."""
    return sorted(str(path) for path in BOOT.rglob("*")), ovbd("images", "--store", STORE)


def refused_whole(tap, what, reason, *words):
    """Refused, and nothing has changed."""
    before = everything()
    refused(tap, what, reason, "system", *words, *PLACE)
    tap.equal(everything(), before, f"{what}: nothing has changed")


def kernels_of_images(tap, one, two):
    """What is on the boot partition is what is in the images."""
    BOOT.mkdir()
    for number, layers in (("1", [one]), ("2", [one, two])):
        ovbd("push", "-q", *layers, f"oci:{STORE}:h.x/vm/root:{number}")
    ovbd("system", "init", "-q", "--device", "LABEL=layers", *PLACE, "h.x/vm/root:1")
    ovbd("system", "add", *PLACE, "h.x/vm/root:2")
    tap.equal([(entry["number"], entry["kernel"]) for entry in listed()], [(2, "7.3.5"), (1, "7.3.4")], "both releases")
    tap.equal(unbootable(), [], "kernels and initrds are those of the images")
    tap.equal(len(list((BOOT / "ovbd").iterdir())), 4, "each once")
    ovbd("system", "add", *PLACE, "--kernel", "7.3.5", "h.x/vm/root:2")
    tap.equal(len(list((BOOT / "ovbd").iterdir())), 4, "and shared where they are the same")
    refused_whole(tap, "a kernel that is not there", "has no kernel 7.0", "add", "--kernel", "7.0", "h.x/vm/root:2")


def images_without(tap):
    """Nothing to boot, or no file system at all."""
    ovbd("push", "-q", image("none", {"etc/word": b"x"}), f"oci:{STORE}:h.x/vm/none:1")
    refused_whole(tap, "an image without a kernel", "has no kernel, neither in", "add", "h.x/vm/none:1")
    half = {name: content for name, content in system("7.3.6", "half").items() if "initrd" not in name}
    ovbd("push", "-q", image("half", half), f"oci:{STORE}:h.x/vm/half:1")
    refused_whole(tap, "an image without an initrd", "has the kernel 7.3.6, but no initrd", "add", "h.x/vm/half:1")
    (SCRATCH / "raw").write_bytes(b"no file system" * 100000 + bytes(720))
    ovbd("build", "-q", "-f", "-o", SCRATCH / "noise.layer", SCRATCH / "raw")
    ovbd("push", "-q", SCRATCH / "noise.layer", f"oci:{STORE}:h.x/vm/noise:1")
    refused_whole(tap, "an image without a file system", "no file system that blkid knows", "add", "h.x/vm/noise:1")


def killed(tap, number):
    """Before each step."""
    command = [OVBD, "system", "add", *PLACE, f"h.x/vm/root:{number}"]
    before = existing()
    step, wrong, again = 0, [], 0
    while True:
        count = len(listed())
        steps, status = syscall_steps.run(command, step)
        if status is not None:
            break
        wrong += [f"step {step}, {steps[-1]}: {what}" for what in unbootable()]
        if len(listed()) not in (count, count + 1):
            wrong.append(f"step {step}, {steps[-1]}: {count} generations became {len(listed())}")
        # What is left of it is in nobody's way.
        ovbd(*command[1:])
        again += 1
        step += STRIDE
    tap.result(status == 0 and again > 5, f"{again} times killed", f"exit status {status}")
    tap.equal(wrong, [], "what boots is whole, whenever it is killed")
    tap.equal(settled(before), before, "and the next one leaves no device")
    ovbd("system", "prune", "--keep", "1", *PLACE)
    tap.equal([entry["number"] for entry in listed()], [max(entry["number"] for entry in listed())], "pruned to one")
    tap.equal(len(list((BOOT / "ovbd").iterdir())), 2, "with its kernel and initrd alone")


def committed(tap, top, name, word):
    """A running system is changed and committed, and goes on running; returns what is not as it must be."""
    wrong = []
    run("cp", "-a", top / "boot/vmlinuz-7.3.5", top / "boot/vmlinuz-7.3.9")
    (top / "boot/initrd.img-7.3.9").write_bytes((top / "boot/initrd.img-7.3.5").read_bytes())
    (top / "etc/word").write_text(word)
    said = ovbd("system", "commit", "-q", "--json", "--stack", "machine", *PLACE, name)
    if json.loads(said)["kernel"] != "7.3.9" or (top / "etc/word").read_text() != word:
        wrong.append(said)
    ovbd("up", "looked", "--store", STORE, name)
    with mounted("/dev/mapper/looked", "-o", "ro") as looked:
        if (looked / "etc/word").read_text() != word:
            wrong.append(f"the image has not what was written: {word}")
    ovbd("down", "looked")
    return wrong + unbootable()


def changed_by_hand(tap):
    """A system that is mounted and written to, as that of a machine whose writes are in memory."""
    before = existing()
    up = ["up", "-q", "--writable", "--cow", SCRATCH / "writes", "--store", STORE, "machine"]
    command = [OVBD, "system", "commit", "--stack", "machine", *PLACE, "h.x/vm/root:killed"]
    ovbd(*up, "h.x/vm/root:2")
    with mounted("/dev/mapper/machine") as top:
        tap.equal(committed(tap, top, "h.x/vm/root:hand", "by hand"), [], "a system changed by hand becomes a generation")
        layers = json.loads(ovbd("inspect", "--json", f"oci:{STORE}:h.x/vm/root:hand"))["layers"]
        tap.equal(len(layers), 3, "by one layer more")
        tap.equal(len(running("machine")["layers"]), 3, "which the system runs on")
        written = json.loads(ovbd("images", "--json", "--store", STORE, "h.x/vm/root:hand"))[0]["files"][-1]
        over = ["--store", STORE, "--from", "h.x/vm/root:2", "--to", "h.x/vm/root:3"]
        refused(tap, "carried to the next image", "that it changed are not as they were below it", "rebase", written, *over,
                "-o", SCRATCH / "carried")
        tap.equal(committed(tap, top, "h.x/vm/root:again", "again"), [], "and again")
        with policy("* reject\n"):
            refused_whole(tap, "an image that would be rejected", "rejects images", *command[2:5], "h.x/vm/root:no")
        refused_whole(tap, "a name with a digest", "called by a tag", *command[2:5], f"h.x/vm/root@sha256:{'0' * 64}")
        step, wrong, words, errors = 0, [], [], SCRATCH / "errors"
        while True:
            words.append(f"word {step}")
            (top / "etc/word").write_text(words[-1])
            count = len(listed())
            steps, status = syscall_steps.run(command, step, errors=errors)
            if status is not None:
                break
            wrong += [f"step {step}, {steps[-1]}: {what}" for what in unbootable()]
            if len(listed()) not in (count, count + 1) or (top / "etc/word").read_text() != words[-1]:
                wrong.append(f"step {step}, {steps[-1]}")
            step += 4 * STRIDE
        tap.result(status == 0 and len(words) > 3, f"killed {len(words) - 1} times",
                   f"exit status {status} after {steps}: {errors.read_text()}")
        tap.equal(wrong, [], "whenever it is killed, all entries boot and the system has what was written")
        tap.equal(committed(tap, top, "h.x/vm/root:last", "last"), [], "and the next one has all of it")
    ovbd("down", "machine")
    (SCRATCH / "writes").unlink()
    ovbd("gc", "-q", "--older", "0", "--store", STORE)
    tap.equal(unbootable(), [], "all is there when nothing runs from it")
    tap.equal(settled(before), before, "no device is left of systems changed by hand")


def from_trees(tap):
    """From a tree on a build host, as a tar: one layer, over the former image or over nothing."""
    tree = SCRATCH / "tree"
    for number, below in ((5, []), (6, ["--base", SCRATCH / "5.zfile"])):
        shutil.rmtree(tree, ignore_errors=True)
        for path, content in system(f"7.4.{number}", f"tree {number}".replace(" ", "")).items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_bytes(content)
        run("tar", "-C", tree, "-cf", SCRATCH / "tree.tar", ".")
        ovbd("build", "-q", *below, "--from-tar", SCRATCH / "tree.tar", "-o", SCRATCH / f"{number}.zfile")
        layers = [SCRATCH / f"{lower}.zfile" for lower in range(5, number + 1)]
        ovbd("push", "-q", *layers, f"oci:{STORE}:h.x/vm/tree:{number}")
        ovbd("system", "add", "-q", *PLACE, f"h.x/vm/tree:{number}")
        tap.equal(listed()[0]["kernel"], f"7.4.{number}", f"{len(layers)} layers of tars become a generation")
    tap.equal(unbootable(), [], "and can be booted")


def too_many_layers(tap):
    """A system on as many layers as there can be."""
    ovbd("push", "-q", *[empty_layer(SIZE)] * 255, f"oci:{STORE}:h.x/vm/many:1")
    ovbd("up", "-q", "--writable", "--store", STORE, "machine", "h.x/vm/many:1")
    refused_whole(tap, "a 256th layer", 'has 255 layers, and nobody reads an image of more than 255: "ovbd squash"',
                  "commit", "--stack", "machine", "h.x/vm/many:2")
    ovbd("down", "machine")


def full_store(tap, layers):
    """Updates and a commit where the store has more and more room, but too little; and then enough."""
    place, raw = SCRATCH / "small", SCRATCH / "raw"
    place.mkdir()
    with open(raw, "wb") as file:
        file.truncate(24 * MIB)
    run("mkfs.ext4", "-q", "-m", "0", raw)
    with mounted(raw, "-o", "loop") as top, registry() as host, small_place(top / "store"):
        name = f"{host}/vm/root:stable"
        ovbd("push", "-q", *layers[:-1], name)
        ovbd("pull", "-q", "--store", STORE, name)
        ovbd("system", "init", "-q", "--device", "LABEL=layers", *PLACE, name)
        ovbd("push", "-q", *layers, name)
        size, reasons, left = layers[-1].stat().st_size, [], 0
        for left in (0, 1 << 14, size // 2, *range(size, size + (1 << 20), 1 << 12)):
            before = everything()
            with filled(top, left):
                status, said = ovbd_fails("system", "update", "-q", *PLACE)
                if status == 0:
                    break
                reasons += [reason for reason in ("no room: ", "No space left on device") if reason in said] or [said]
                if (everything(), unbootable()) != (before, []):
                    reasons.append(f"{before} became {everything()}, {unbootable()}")
        # What it knows it needs, and what it only finds out.
        tap.equal(set(reasons), {"no room: ", "No space left on device"}, f"{len(reasons)} updates without room")
        tap.equal((len(listed()), unbootable()), (2, []), f"and one with {left} bytes, for a layer of {size}")
        up = ["up", "-q", "--writable", "--cow", SCRATCH / "writes", "--store", STORE, "machine"]
        ovbd(*up, name)
        with mounted("/dev/mapper/machine") as machine:
            (machine / "etc/more").write_bytes(os.urandom(MIB // 4))
            before = everything()
            with filled(top, 1 << 16):
                status, said = ovbd_fails("system", "commit", "--stack", "machine", *PLACE, f"{host}/vm/root:hand")
            tap.result(status == 1 and "No space left on device" in said, "a commit without room is refused", said)
            tap.equal((everything(), unbootable()), (before, []), "and changes no entry and no image")
            tap.equal(committed(tap, machine, f"{host}/vm/root:hand", "later"), [], "and with room it has all")
        ovbd("down", "machine")
        (SCRATCH / "writes").unlink()


def full_root(tap):
    """What the initramfs does where the store of the root file system is full: it can be mounted read-only, with all that
    was written, and where the initramfs cannot do that, it says so."""
    top, layers, cow = SCRATCH / "top", SCRATCH / "layers", SCRATCH / "cow"
    (top / "lib").mkdir(parents=True)
    run("cp", "-r", STORE, top / "lib/ovbd")
    with open(layers, "wb") as file:
        file.truncate(64 * MIB)
    run("mkfs.ext4", "-q", "-d", top, layers)
    with open(cow, "wb") as file:
        file.truncate(2 * MIB)
    devices = [run("losetup", "--find", "--show", path).strip() for path in (layers, cow)]
    command_line = SCRATCH / "cmdline"
    command_line.write_text(f"ovbd={devices[0]}:h.x/vm/root:2 rw ovbd.cow={devices[1]}\n")
    environment = os.environ | {"OVBD_CMDLINE": str(command_line), "PATH": f"{OVBD.parent}:{os.environ['PATH']}"}

    def initramfs(**more):
        command = [f"{os.environ['SRC']}/tools/boot/root-stack"]
        return subprocess.run(command, env=environment | more, stderr=subprocess.PIPE, text=True)

    try:
        tap.equal(initramfs().returncode, 0, "the initramfs makes the root device")
        with mounted("/dev/mapper/root") as root:
            (root / "etc/word").write_text("written")
            os.sync()
            with contextlib.suppress(OSError), open(root / "fill", "wb", buffering=0) as file:
                while True:
                    file.write(os.urandom(1 << 16))
                    os.fsync(file.fileno())
        tap.equal("Overflow" in run("dmsetup", "status", "root-cow0"), True, "its store is full")
        ovbd("down", "root")
        said = initramfs()
        tap.result(said.returncode == 1 and "is full: boot with ro" in said.stderr, "which is said", said.stderr)
        tap.equal(initramfs(OVBD_READ_ONLY="yes").returncode, 0, "the initramfs makes the root device again")
        tap.result(pathlib.Path("/run/ovbd/full").exists(), "and says that it is to be mounted read-only")
        with mounted("/dev/mapper/root", "-o", "ro") as root:
            tap.equal((root / "etc/word").read_text(), "written", "which it can be, with what was written")
        ovbd("down", "root")
        pathlib.Path("/run/ovbd/full").unlink()
        # With enough room nothing is tried.
        run("fallocate", "-l", 16 * MIB, cow)
        run("losetup", "--set-capacity", devices[1])
        tap.equal((initramfs().returncode, pathlib.Path("/run/ovbd/full").exists()), (0, False), "nor with more room")
        ovbd("down", "root")
    finally:
        run("umount", "/run/ovbd/layers", "/run/ovbd/memory")
        run("losetup", "--detach", *devices)


@contextlib.contextmanager
def small_place(store):
    """Another store and boot partition while the body runs."""
    global BOOT, STORE, PLACE
    former = BOOT, STORE, PLACE
    BOOT, STORE = SCRATCH / "small-boot", store
    BOOT.mkdir()
    PLACE = ["--boot", BOOT, "--store", STORE]
    try:
        yield
    finally:
        BOOT, STORE, PLACE = former


@contextlib.contextmanager
def filled(top, left):
    """A file system with about so many bytes left while the body runs."""
    fill = top / "fill"
    with open(fill, "wb", buffering=0) as file:
        free = os.statvfs(top)
        os.posix_fallocate(file.fileno(), 0, max(0, free.f_bavail * free.f_frsize - max(left, 1 << 14)))
        with contextlib.suppress(OSError):
            while left == 0:
                file.seek(0, os.SEEK_END)
                file.write(bytes(1024))
                os.fsync(file.fileno())
    try:
        yield
    finally:
        fill.unlink()
        os.sync()


def of_xfs(tap):
    """Two images of one XFS, which have its UUID: the second is added while the first is mounted, as the root file system of
    a system is. And one that is committed while it is mounted, whose log XFS leaves to be recovered."""
    raw, layers = SCRATCH / "xfs", []
    with open(raw, "wb") as file:
        file.truncate(320 * MIB)
    run("mkfs.xfs", "-q", raw)
    for number in (1, 2):
        with mounted(raw, "-o", "loop") as top:
            for path, content in system(f"7.5.{number}", f"xfs{number}").items():
                (top / path).parent.mkdir(parents=True, exist_ok=True)
                (top / path).write_bytes(content)
        layer = SCRATCH / f"xfs{number}.layer"
        ovbd("build", "-q", "-o", layer, raw, *(["--base", *layers] if layers else []))
        layers.append(layer)
        ovbd("push", "-q", *layers, f"oci:{STORE}:h.x/vm/xfs:{number}")
    raw.unlink()
    ovbd("system", "add", "-q", *PLACE, "h.x/vm/xfs:1")
    ovbd("up", "-q", "--writable", "--cow", SCRATCH / "writes", "--store", STORE, "machine", "h.x/vm/xfs:1")
    with mounted("/dev/mapper/machine") as top:
        ovbd("system", "add", "-q", *PLACE, "h.x/vm/xfs:2")
        tap.equal((listed()[0]["kernel"], unbootable()), ("7.5.2", []), "an image of the XFS that is mounted")
        for path, content in system("7.5.3", "xfs3").items():
            (top / path).write_bytes(content)
        ovbd("system", "commit", "-q", "--stack", "machine", *PLACE, "h.x/vm/xfs:3")
        tap.equal((listed()[0]["kernel"], unbootable()), ("7.5.3", []), "and one that is committed while it is mounted")
    ovbd("down", "machine")
    (SCRATCH / "writes").unlink()
    ovbd("up", "-q", "--store", STORE, "machine", "h.x/vm/xfs:3")
    words = listed()[0]["options"].split()
    flags = [word.removeprefix("rootflags=") for word in words if word.startswith("rootflags=")]
    with mounted("/dev/mapper/machine", "-o", ",".join(["ro", *flags])) as top:
        tap.equal((top / "etc/word").read_bytes(), b"xfs3", "whose command line says how to mount it read-only, without its log")
    ovbd("down", "machine")
    ovbd("system", "add", "-q", *PLACE, "--append", "rw", "h.x/vm/xfs:3")
    tap.result("norecovery" not in listed()[0]["options"], "one that can be written to recovers its log")


def updates(tap, one, two, sign, unknown):
    """From a registry, signed or not."""
    with registry() as host:
        root = f"{host}/vm/root:stable"
        push = ["push", "-q", "--seal"]
        ovbd(*push, *sign, one, root)
        with policy(f"{host}/vm {sign[-1]}\n"):
            ovbd("system", "update", "-q", *PLACE, root)
            first = listed()[0]
            tap.equal(first["kernel"], "7.3.4", "an image that is signed becomes a generation")
            said = ovbd("system", "update", "-q", *PLACE)
            tap.equal(listed()[0], first, "and is not added again while it is the newest")
            tap.result(f"generation {first['number']}: " in said, "which is said", said)
        ovbd(*push, *unknown, one, two, root)
        with policy(f"{host}/vm {sign[-1]}\n"):
            refused_whole(tap, "signed by another", "none of the certificates fits", "update")
        with policy("* reject\n"):
            refused_whole(tap, "a repository that is rejected", "rejects images", "update")
            refused_whole(tap, "an image of the store by then", "rejects images", "add", root)
        ovbd("push", "-q", one, two, root)
        with policy(f"{host}/vm {sign[-1]}\n"):
            refused_whole(tap, "not signed", "has no root hash", "update")
        ovbd(*push, *sign, one, two, root)
        with policy(f"{host}/vm {sign[-1]}\n"):
            ovbd("system", "update", "-q", *PLACE)
        tap.equal(listed()[0]["kernel"], "7.3.5", "the same name stands for another image by now")
        tap.equal(unbootable(), [], "all can be booted")
        ovbd("rmi", "--store", STORE, root)
        ovbd("gc", "-q", "--older", "0", "--store", STORE)
        tap.equal(unbootable(), [], "also when nothing else names their images")


def main(tap):
    load("loop", "dm-overlaybd", "dm-zfile", "dm-verity")
    before = existing()
    one = image("one", system("7.3.4", "one"))
    two = image("two", system("7.3.5", "two"), one)
    kernels_of_images(tap, one, two)
    images_without(tap)
    from_trees(tap)
    three = image("three", system("7.3.5", "three"), one, two)
    ovbd("push", "-q", one, two, three, f"oci:{STORE}:h.x/vm/root:3")
    killed(tap, 3)
    too_many_layers(tap)
    sign, unknown = ([f"--sign-key={key}", "--certificate", certificate]
                     for key, certificate in (make_key("trusted"), make_key("unknown")))
    with writable_etc():
        updates(tap, one, two, sign, unknown)
        changed_by_hand(tap)
        four = {**system("7.3.5", "four"), "usr/data": os.urandom(2 * MIB)}
        full_store(tap, [one, two, image("four", four, one, two)])
        of_xfs(tap)
    full_root(tap)
    tap.equal(settled(before), before, "no device is left")


tap = Tap()
main(tap)
tap.finish()
