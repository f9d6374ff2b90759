#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Volumes go through Debian's docker-registry, forth and back, thin and classic; several at once; and the registry goes away
in the middle of a push and of a pull."""

import contextlib
import json
import os
import pathlib
import random
import subprocess
import sys
import time

sys.path.insert(0, f"{pathlib.Path(__file__).resolve().parents[1]}/lib")
import docker_registry
from block_devices import Devices
from ovbd_command import ovbd, ovbd_fails
from test_script import OVBD, SCRATCH, Tap, run
from volumes import MIB, Group, left, overwrite_random, push_to, set_up_lvm, write_random

SIZE = 48
# The registry's files, and the store of whoever pulls.
SERVED, STORE = SCRATCH / "served", pathlib.Path("/tmp/ovbd-store")
# So that there is a middle.
SLOWLY = ["--limit=4M", "--retries=2"]
tap = Tap()


def pull(reference, target, *words):
    """Pulls into a pool; returns what was said."""
    return json.loads(ovbd("pull", "--json", "--store", STORE, *words, "--thin", target, reference))


def round_trips(first, second, repository, count):
    """Each group changes the volume, pushes it, and the other one pulls it and goes on with that."""
    generator = random.Random("served")
    write_random(first.node("web"), generator, SIZE * MIB, 60)
    here, there, volume = first, second, "web"
    for number in range(count):
        reference = f"{repository}:{number}"
        pushed = push_to(reference, "--store", STORE, f"--snapshot=s{number}", f"{here.name}/{volume}")
        tap.equal(pushed["layers"], number + 1, f"push {number} adds a layer")
        said = pull(reference, f"{there.name}/pool/w{number}")
        pulled = said["volume"].split("/")[1]
        tap.equal(there.sha256(pulled), here.sha256(f"s{number}"), f"pull {number}: both sides hold the same")
        tap.result(number == 0 or said["base"], f"pull {number} is on top of what is there", said)
        tap.equal(left(here) + left(there), [], f"round {number} leaves nothing")
        here, there, volume = there, here, f"w{number}"
        write_random(here.node(volume), generator, SIZE * MIB, 8)


def classic(group, second, repository):
    """Snapshots of a volume that is not thin."""
    run("lvcreate", "--yes", "--wipesignatures", "n", "--size", "16m", "--name", "thick", group.name)
    generator = random.Random("classic")
    for number in range(3):
        overwrite_random(group.node("thick"), generator, 16 * MIB, 8)
        name = f"thick{number}"
        run("lvcreate", "--snapshot", "--permission", "r", "--size", "20m", "--name", name, f"{group.name}/thick")
        pushed = push_to(f"{repository}-thick:{number}", "--store", STORE, f"{group.name}/{name}")
        tap.equal(pushed["base"], f"{group.name}/thick{number - 1}" if number else None, f"classic {number} has its base")
        said = pull(f"{repository}-thick:{number}", f"{second.name}/pool/thick")
        tap.equal(second.sha256(said["volume"].split("/")[1]), group.sha256(name), f"classic {number} is the same as thin volume")
    run("lvremove", "--yes", f"{group.name}/thick")


def at_once(first, second, repository):
    """Two pushes over one base, then two pulls of one image, at the same time."""
    push_to(f"{repository}:base", "--store", STORE, "--snapshot=base", f"{first.name}/web")
    write_random(first.node("web"), random.Random("at once"), SIZE * MIB, 10)

    def together(*commands):
        processes = [subprocess.Popen([str(word) for word in [OVBD, *words]], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                      text=True) for words in commands]
        return [(process.communicate(), process.returncode) for process in processes]

    ends = together(*(["push", "--store", STORE, f"--snapshot=both{number}", f"{first.name}/web", f"{repository}:both{number}"]
                      for number in range(2)))
    tap.equal([status for _, status in ends], [0, 0], "two pushes at once")
    tap.equal(first.sha256("both0"), first.sha256("web"), "of one content")
    ends = together(*(["pull", "--store", STORE, "--json", "--thin", f"{second.name}/pool/both{number}", f"{repository}:both{number}"]
                      for number in range(2)))
    tap.result([status for _, status in ends] == [0, 0], "two pulls at once", ends)
    for number, ((said, _), status) in enumerate(ends):
        if status == 0:
            volume = json.loads(said)["volume"].split("/")[1]
            tap.equal(second.sha256(volume), first.sha256(f"both{number}"), f"pull {number} of both holds the same")
    tap.equal(left(first) + left(second), [], "they leave nothing")


def until_gone(server, transferred, *words):
    """Runs `ovbd` and ends the registry as soon as a mebibyte was transferred; returns exit status and message."""
    process = subprocess.Popen([str(word) for word in [OVBD, *words]], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and transferred() < MIB:
        time.sleep(0.01)
    alive = process.poll() is None
    docker_registry.stop(server)
    _, said = process.communicate()
    tap.result(alive, f"{words[0]}: the registry went away in the middle", said)
    return process.returncode, said.strip().splitlines()[-1] if said.strip() else ""


def size_of(folder, pattern):
    """Bytes of all files that match."""
    found = 0
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):
            found += path.stat().st_size
    return found


def gone(first, second, server, port):
    """The registry goes away, and comes back later."""
    reference = f"127.0.0.1:{port}/vm/gone:one"
    descriptor = os.open(first.node("web"), os.O_WRONLY)
    os.pwrite(descriptor, random.Random("gone").randbytes(16 * MIB), 0)
    os.fsync(descriptor)
    os.close(descriptor)
    words = ["push", *SLOWLY, "--store", STORE, "--full", "--snapshot=gone", f"{first.name}/web", reference]
    status, said = until_gone(server, lambda: size_of(SERVED, "data/**/_uploads/*/data"), *words)
    tap.result(status == 1 and f"127.0.0.1:{port}" in said, "a push to a registry that went away names it", (status, said))
    tap.equal((left(first), first.fields("gone")), ([], None), "and leaves nothing")
    status, said = ovbd_fails(*words)
    tap.result(status == 1 and f"127.0.0.1:{port}" in said, "nor does one to a registry that is not there", (status, said))
    tap.equal((left(first), first.fields("gone")), ([], None), "and that leaves nothing")
    server = docker_registry.start(SERVED, port)
    push_to(reference, "--store", STORE, "--full", "--snapshot=gone", f"{first.name}/web")
    run("rm", "-r", STORE)
    before = set(second.all())
    status, said = until_gone(server, lambda: size_of(STORE, "ingest/*.part"), "pull", *SLOWLY, "--store", STORE, "--thin",
                              f"{second.name}/pool/gone", reference)
    tap.result(status == 1 and f"127.0.0.1:{port}" in said, "a pull from a registry that went away names it", (status, said))
    tap.equal((left(second), set(second.all())), ([], before), "and leaves no volume")
    fetched = size_of(STORE, "ingest/*.part")
    tap.result(fetched >= MIB, "what was fetched stays in the store", fetched)
    server = docker_registry.start(SERVED, port)
    try:
        said = pull(reference, f"{second.name}/pool/gone")
        tap.equal(second.sha256(said["volume"].split("/")[1]), first.sha256("gone"), "when it is there again both hold the same")
    finally:
        docker_registry.stop(server)


def main():
    set_up_lvm()
    run("ip", "link", "set", "lo", "up")
    with Devices() as devices:
        first, second = Group(devices, "vg-a.b", 700), Group(devices, "vg2", 700)
        for group in (first, second):
            group.pool("pool", 500)
        first.thin("web", SIZE)
        port = docker_registry.free_port()
        server = docker_registry.start(SERVED, port)
        repository = f"127.0.0.1:{port}/vm/web"
        round_trips(first, second, repository, 6)
        classic(first, second, repository)
        at_once(first, second, repository)
        gone(first, second, server, port)
    tap.finish()


main()
