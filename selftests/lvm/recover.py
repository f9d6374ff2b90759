#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""What programs left that were killed is taken back, nothing of the living or of others is, and what cannot be told stays and
is named with the option that removes it."""

import fcntl
import json
import os
import pathlib
import subprocess
import sys

sys.path.insert(0, f"{pathlib.Path(__file__).resolve().parents[1]}/lib")
from block_devices import Devices
from ovbd_command import ovbd, ovbd_fails
from test_script import OVBD, Tap, run
from volumes import LAYOUT, MIB, Group, left, push, set_up_lvm

NOTES = pathlib.Path("/run/ovbd")
BOOT = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
tap = Tap()


def note(*actions):
    """What a process of another number has noted that is gone."""
    NOTES.mkdir(exist_ok=True)
    path = NOTES / "lvm-99999.1-0.undo"
    path.write_text(json.dumps(actions) + "\n")
    return path


def reserve(group, pool="pool"):
    """A metadata snapshot that is in no notes; returns its block."""
    run("dmsetup", "message", group.target(pool), "0", "reserve_metadata_snap")
    return int(run("dmsetup", "status", group.target(pool)).split()[6])


def says(what, reason, *words, status=1):
    """Passes where `ovbd lvm recover` ends so and says that."""
    ended, said = ovbd_fails("lvm", "recover", *words)
    tap.result(ended == status and reason in said, what, f"exit status {ended}, wanted {status} and: {reason}\n{said}")


def metadata_snapshots(group):
    """Whose they are decides, under the lock of the pool."""
    pool, uuid = f"{group.name}/pool", group.uuid("pool")
    reserved = {"pool": uuid, "device": group.target("pool")}
    root = reserve(group)
    says("a metadata snapshot of another program stays, and is named", f"--force {pool}", pool)
    tap.equal(group.held(), True, "it stays")
    path = note({"Reserved": {**reserved, "root": root + 1}})
    says("another one than was noted stays", f"block {root}", pool)
    tap.equal((group.held(), path.exists()), (True, False), "it stays, and is noted no more")

    # A process of ours has the pool: it may have released the one that was noted, and this is its own.
    path = note({"Reserved": {**reserved, "root": root}})
    with open(NOTES / f"pool-{uuid}.lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ovbd("lvm", "recover")
        tap.equal((group.held(), path.exists()), (True, True), "while another process has the pool nothing is released")
    metadata = os.open(f"/dev/mapper/{group.target('pool').removesuffix('-tpool')}_tmeta", os.O_RDONLY)
    says("nor while somebody reads the metadata", "reads the metadata now")
    tap.equal((group.held(), path.exists()), (True, True), "it stays, and noted")
    os.close(metadata)
    said = ovbd("lvm", "recover")
    tap.result("released" in said and not group.held() and not path.exists(), "that of a dead process is released", said)

    root = reserve(group)
    note({"Reserved": {**reserved, "root": root}})
    process = subprocess.Popen([OVBD, "push", "--snapshot=waited", f"{group.name}/web", f"oci:{LAYOUT}:waited"],
                               stderr=subprocess.PIPE, text=True)
    _, said = process.communicate()
    tap.equal((process.returncode, group.held()), (0, False), "a push does not wait for what a dead process has left")
    reserve(group)
    said = ovbd("lvm", "recover", "--force", pool)
    tap.result(not group.held() and "released" in said, "--force releases whosever it is", said)
    tap.equal(ovbd("lvm", "recover", pool), "", "then there is nothing to say")


def begin(group, name):
    """A push that waits."""
    process = subprocess.Popen([OVBD, "push", f"--snapshot={name}", f"{group.name}/web", f"oci:{LAYOUT}:{name}"],
                               stderr=subprocess.PIPE, text=True)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "waiting" in line:
            return process
    raise RuntimeError(f"the push did not wait: {lines}")


def waits(group):
    """For another program's metadata snapshot a push waits, as long as it is patient."""
    reserve(group)
    process = begin(group, "patient")
    run("dmsetup", "message", group.target(), "0", "release_metadata_snap")
    _, said = process.communicate()
    tap.equal((process.returncode, group.held()), (0, False), "a push waits for another program's metadata snapshot")
    root = reserve(group)
    process = begin(group, "impatient")
    _, said = process.communicate()
    tap.result(process.returncode == 1 and f"block {root}" in said and "recover --force" in said, "and names one that stays", said)
    tap.equal((group.held(), "impatient" in group.all()), (True, False), "which it leaves, and no snapshot of its own")
    run("dmsetup", "message", group.target(), "0", "release_metadata_snap")


def neighbour(group):
    """thin-send-recv has metadata snapshots under a lock of its own."""
    path = pathlib.Path("/run/thin-send-recv.lock")
    with open(path, "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = begin(group, "neighbour")
        tap.equal(group.held(), False, "while thin-send-recv has its lock, there is no metadata snapshot of ours")
    _, said = process.communicate()
    tap.equal(process.returncode, 0, "and a push goes on after that")
    path.unlink()
    run("lvremove", "--yes", f"{group.name}/neighbour")


def volumes(group):
    """Those that are not complete are known by what made them, and not by their names."""
    vg = group.name

    def make(name, tag, *words):
        words = words or ("--wipesignatures", "n", "--virtualsize", "8m", "--thin", f"{vg}/pool")
        run("lvcreate", "--yes", "--name", name, "--addtag", tag, *words)

    # From before a power cut: no notes, and of one there is no origin.
    make("web.0123.part", "ovbd.partial=before.1")
    make("cut", "ovbd.partial=before.2", "--snapshot", f"{vg}/web")
    make("now.part", f"ovbd.partial={BOOT}.3")
    make("bare.part", "ovbd.partial")
    make("user.part", "other")
    says("what cannot be told is named with the option", f"--force {vg}/now.part")
    tap.equal(sorted(name for name in group.all() if name == "cut" or name.endswith(".part")),
              ["bare.part", "now.part", "user.part"], "what is from before the boot is removed, the rest stays")
    for name in ("now.part", "bare.part"):
        ovbd_fails("lvm", "recover", "--force", f"{vg}/{name}")
        tap.result(name not in group.all(), f"--force removes {name}", group.all())
    status, said = ovbd_fails("lvm", "recover", "--force", f"{vg}/user.part")
    tap.result(status == 1 and "user.part" in group.all(), "--force does not remove a volume of the user", said)

    # Notes of a dead process: the name is another's by now.
    make("swapped", f"ovbd.partial={BOOT}.4")
    run("lvrename", f"{vg}/swapped", f"{vg}/renamed")
    make("swapped", f"ovbd.partial={BOOT}.5")
    note({"Made": {"mark": f"{BOOT}.4"}})
    says("the volume of a mark is removed", f"--force {vg}/swapped")
    tap.result("swapped" in group.all() and "renamed" not in group.all(), "under its new name, and no other", group.all())
    path = note("damaged")
    says("notes that cannot be read are named", str(path))
    tap.result("swapped" in group.all() and path.exists(), "and what may be in them stays", group.all())
    path.unlink()
    make("old", "ovbd.partial=before.6")
    tap.equal(ovbd("lvm", "prune", "--dry-run", f"{vg}/web"), f"{vg}/old\n", "prune would remove what is from before the boot")
    tap.result("old" in group.all(), "a dry run removes nothing", group.all())
    tap.equal(ovbd("lvm", "prune", f"{vg}/web"), f"{vg}/old\n", "prune removes it")
    run("lvremove", "--yes", f"{vg}/swapped", f"{vg}/user.part")


def active(group):
    """A volume that a dead process activated, unless somebody uses it."""
    push("base", "--snapshot=base", f"{group.name}/web")
    uuid = group.uuid("base")

    def activate():
        run("lvchange", "--activate", "y", "--ignoreactivationskip", f"{group.name}/base")
        (NOTES / f"active-{uuid}.lock").write_text("1")
        return note({"Activated": {"name": f"{group.name}/base", "uuid": uuid}})

    path = activate()
    device = os.open(group.node("base"), os.O_RDONLY)
    says("a volume that is in use stays active", "in use now")
    tap.equal((group.fields("base")["lv_active"], path.exists()), ("active", True), "and noted")
    os.close(device)
    ovbd("lvm", "recover")
    tap.equal((group.fields("base")["lv_active"], path.exists()), ("", False), "and is deactivated then")
    run("lvchange", "--activate", "y", "--ignoreactivationskip", f"{group.name}/base")
    note({"Activated": {"name": f"{group.name}/base", "uuid": uuid}})
    ovbd("lvm", "recover")
    tap.equal(group.fields("base")["lv_active"], "active", "what somebody else has activated since stays")
    run("lvchange", "--activate", "n", f"{group.name}/base")


def failing_lvcreate(group):
    """lvcreate fails after it has made the volume: nothing is left of it."""
    folder = pathlib.Path(os.environ["LVM_SYSTEM_DIR"])
    program = folder / "lvcreate"
    program.write_text("#!/bin/sh\n/usr/sbin/lvcreate \"$@\" && echo cannot activate >&2\nexit 5\n")
    program.chmod(0o755)
    path = os.environ["PATH"]
    os.environ["PATH"] = f"{folder}:{path}"
    status, said = ovbd_fails("push", "--snapshot=half", f"{group.name}/web", f"oci:{LAYOUT}:half")
    os.environ["PATH"] = path
    tap.result(status == 1 and "cannot activate" in said, "a snapshot that was made, and failed", said)
    tap.result("half" not in group.all(), "is removed", group.all())
    tap.equal(list(NOTES.glob("*.undo")), [], "and noted no more")


def together(group):
    """Pushes at the same time, which share a base."""
    path = NOTES / f"active-{group.uuid('base')}.lock"
    with open(path, "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        lock.write("1")
        lock.flush()
        run("lvchange", "--activate", "y", "--ignoreactivationskip", f"{group.name}/base")
        push("used", "--snapshot=used", f"--base={group.name}/base", f"{group.name}/web")
        tap.equal(group.fields("base")["lv_active"], "active", "a base that another push reads stays active")
    push("last", f"--base={group.name}/base", f"{group.name}/used")
    tap.equal((group.fields("base")["lv_active"], path.exists()), ("", False), "and the last one deactivates it")
    before = set(NOTES.glob("active-*"))
    with open(group.node("web"), "r+b") as device:
        device.write(os.urandom(4 * MIB))
    run("blockdev", "--flushbufs", group.node("web"))
    processes = [subprocess.Popen([OVBD, "push", *words, f"{group.name}/web", f"oci:{LAYOUT}:t{number}"],
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                 for number, words in enumerate([["--snapshot"]] * 3 + [["--snapshot=t3", f"--base={group.name}/base"]])]
    for number, process in enumerate(processes):
        _, said = process.communicate()
        tap.equal(process.returncode, 0, f"push {number} of several at once")
        if process.returncode:
            print(f"# {said}")
    tap.equal(left(group), [], "they leave nothing")
    tap.equal(set(NOTES.glob("active-*")) - before, set(), "and no locks of volumes")
    made = [name for name in group.all() if group.tags(name).get("ovbd.tag", "").startswith("t")]
    tap.equal(len(made), 4, "each has a snapshot")
    tap.equal(len({group.sha256(name) for name in [*made, "web"]}), 1, "of the same content")


def main():
    set_up_lvm()
    with Devices() as devices:
        group = Group(devices, "vg", 300)
        group.pool("pool", 200)
        with open(group.thin("web", 24), "r+b") as device:
            device.write(os.urandom(8 * MIB))
        metadata_snapshots(group)
        waits(group)
        neighbour(group)
        volumes(group)
        active(group)
        failing_lvcreate(group)
        together(group)
    tap.finish()


main()
