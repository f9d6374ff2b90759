#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""`ovbd pull --lazy`: stacks that are read while they are fetched, from a registry that is slow, silent, wrong or gone; the
process that fetches is killed, and in the end there is none. Nobody ever reads a wrong byte. OVBD_KILLS= how often."""

import contextlib
import json
import os
import pathlib
import random
import signal
import sys
import time

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
from block_devices import read_direct
from lazy_stacks import (BYTES, Readers, differs, done, down, is_local, process_of, pull, run_tests, store, tables, ublk_devices,
                         wait_for_end, wait_until)
from ovbd_command import existing, listed, ovbd, ovbd_fails, refused, settled
from test_script import SCRATCH, CommandFailed, Tap, run

KILLS = int(os.environ.get("OVBD_KILLS", "4"))


def is_used_while_it_is_fetched(tap, image, how):
    how.delay, before, how.sent = 0.05, existing(), 0
    device = pull("web", image)
    early = how.sent
    begun = listed("web")
    tap.equal(device, "/dev/mapper/web", "the device is named")
    tap.result(early < image.stored // 2, f"it is there after {early} of {image.stored} bytes")
    tap.equal([layer["fetch"]["state"] for layer in begun["layers"] if layer["fetch"]], ["fetching"] * 3,
              "ls says that it is fetched")
    with Readers(device, image.bytes) as readers:
        done("web")
        time.sleep(0.5)
    tap.equal((readers.wrong, readers.errors), ([], 0), f"{readers.reads} reads meanwhile, all right")
    print(f"# longest read {readers.longest:.2f} s")
    tap.equal(differs(device, image.bytes), None, "all of it is right then")
    tap.equal(ublk_devices(), [], "no ublk device is left")
    tap.result(how.sent < 1.3 * image.stored, f"little is fetched twice: {how.sent} of {image.stored} bytes")
    fetched = tables(run("dmsetup", "ls").split()[::2])
    tap.result(image.reference in ovbd("images", "--store", store("web")), "the image has its name")
    down("web")
    ovbd("up", "--store", store("web"), "web", image.reference)
    tap.equal(differs(device, image.bytes), None, "ovbd up maps it")
    tap.equal(fetched, tables(run("dmsetup", "ls").split()[::2]), "and its tables are the same")
    # All of it is there: nobody has to serve anything.
    down("web")
    how.sent = 0
    pull("web", image)
    tap.equal((is_local("web"), ublk_devices()), (True, []), "with all of it there nobody serves anything")
    tap.result(how.sent < 4096, "and nothing but the configuration is fetched", how.sent)
    down("web")
    tap.equal(settled(before), before, "no device is left")


def is_written_to(tap, image, how):
    how.delay = 0.02
    device = pull("written", image, "--writable")
    with open(device, "r+b", buffering=0) as file:
        file.seek(8 << 10)
        file.write(b"x" * 4096)
        os.fsync(file.fileno())
    done("written")
    expected = image.bytes[:8192] + b"x" * 4096 + image.bytes[12288:]
    tap.equal(differs(device, expected), None, "what is written stays over what is fetched")
    down("written")


def survives_kills(tap, image, how):
    how.delay = 0.1
    generator = random.Random("kills")
    device = pull("killed", image, "--jobs", "2")
    recovered = 0
    with Readers(device, image.bytes) as readers:
        for _ in range(KILLS):
            time.sleep(generator.uniform(0.05, 0.6))
            with contextlib.suppress(OSError, KeyError):
                os.kill(process_of("killed"), signal.SIGKILL)
            time.sleep(0.1)
            if is_local("killed") and not ublk_devices():
                break
            states = [layer["fetch"]["state"] for layer in listed("killed")["layers"] if layer["fetch"]]
            if set(states) - {"waiting"}:
                tap.result(False, "ls says that readers wait", states)
            pull("killed", image)
            recovered += 1
        done("killed")
        time.sleep(0.3)
    tap.equal((readers.wrong, readers.errors), ([], 0),
              f"killed {recovered} times, {readers.reads} reads, the longest {readers.longest:.1f} s: all right")
    tap.equal(differs(device, image.bytes), None, "all of it is right then")
    down("killed")
    tap.equal(ublk_devices(), [], "no ublk device is left")


def survives_kills_while_it_is_handed_over(tap, image, how):
    """All layers change their tables at one moment, and the process is killed around that."""
    how.delay = 0.0
    generator, again = random.Random("handed over"), 0
    for _ in range(KILLS):
        device = pull("handed", image, "--trace", "1")
        begun = time.monotonic()
        process = process_of("handed")
        with Readers(device, image.bytes, 1) as readers:
            time.sleep(max(0.0, begun + 0.9 + generator.uniform(0, 0.4) - time.monotonic()))
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
            time.sleep(0.1)
            if pathlib.Path("/run/ovbd/handed.fetch").exists() or ublk_devices():
                again += 1
                pull("handed", image)
            done("handed")
            time.sleep(0.2)
        if readers.wrong or readers.errors:
            return tap.result(False, "killed while layers are handed over", f"{readers.wrong} {readers.errors}")
        fetched = tables(run("dmsetup", "ls").split()[::2])
        if ublk_devices():
            return tap.result(False, "a ublk device is left", ovbd("ls"))
        down("handed")
        ovbd("up", "--store", store("handed"), "handed", image.reference)
        if fetched != tables(run("dmsetup", "ls").split()[::2]):
            return tap.result(False, "the tables are those of ovbd up", fetched)
        down("handed")
    tap.result(True, f"killed {KILLS} times while layers are handed over, {again} times with something to go on with")


def gone_process_needs_no_registry(tap, image, how):
    """Killed when all was there, but before it was handed over: another one needs only the files."""
    how.delay = 0.0
    device = pull("files", image)
    os.kill(process_of("files"), signal.SIGSTOP)
    process = process_of("files")
    os.kill(process, signal.SIGKILL)
    left = len(ublk_devices())
    ovbd("pull", "--store", store("files"), image.reference)
    how.status = 500
    if left:
        pull("files", image)
    done("files")
    how.status = None
    tap.equal(differs(device, image.bytes), None, "with a registry that is gone, from files alone")
    down("files")


def ends_reads_in_time(tap, image, how):
    how.delay = 0.0
    how.silent.clear()
    device = pull("silent", image, "--io-timeout", "2", "--jobs", "2", "--limit", "1M")
    how.silent.set()
    with Readers(device, image.bytes) as readers:
        wait_until("a read fails", lambda: readers.errors > 2, 30)
        how.silent.clear()
        errors = readers.errors
        done("silent")
        after = readers.reads
        time.sleep(0.3)
    tap.equal(readers.wrong, [], f"silent: {readers.errors} errors ({errors} at first), {readers.reads} right reads")
    tap.result(readers.reads > after, "reads go on then")
    tap.equal(differs(device, image.bytes), None, "all of it is right then")
    down("silent")


def goes_on_after_a_suspension(tap, image, how):
    """A machine that sleeps: nothing runs, and when it wakes up all connections are gone."""
    how.delay = 0.1
    device = pull("asleep", image, "--jobs", "2", "--limit", "3M")
    process, cut = process_of("asleep"), 0
    with Readers(device, image.bytes) as readers:
        for _ in range(2):
            time.sleep(0.3)
            # Between two requests there is none, at times.
            wait_until("a connection is open", lambda: how.connections)
            os.kill(process, signal.SIGSTOP)
            cut += len(how.connections)
            how.cut_connections()
            time.sleep(0.5)
            os.kill(process, signal.SIGCONT)
        done("asleep")
    tap.result(cut > 0, f"{cut} connections are cut")
    tap.equal((readers.wrong, readers.errors), ([], 0),
              f"stopped twice, {readers.reads} reads, the longest {readers.longest:.1f} s: all right")
    tap.equal(differs(device, image.bytes), None, "all of it is right then")
    down("asleep")


def is_not_handed_over_when_wrong(tap, image, how):
    """Of an image that has no lists of its chunks."""
    how.delay = 0.0
    lists = how.remove_chunk_lists()
    digest = json.loads(ovbd("inspect", "--json", image.reference))["layers"][0]["digest"]
    how.wrong = {digest: 2 << 20}
    device = pull("wrong", image)

    def state():
        entry = listed("wrong")["layers"][0]["fetch"]
        return entry and entry["state"]

    wait_until("the layer is known to be damaged", lambda: state() == "damaged")
    tap.result((store("wrong") / "blobs/sha256" / digest.partition(":")[2]).exists() is False,
               "bytes that are not those of the digest get no name")
    tap.equal(len(ublk_devices()), 1, "and are not handed over")
    how.wrong = {}
    down("wrong")
    tap.equal(ublk_devices(), [], "it can be taken down")
    device = pull("wrong", image)
    done("wrong")
    tap.equal(differs(device, image.bytes), None, "the next pull fetches it anew")
    down("wrong")
    how.blobs.update(lists)


def is_taken_down_and_goes_on(tap, image, how):
    how.delay, before, how.sent = 0.05, existing(), 0
    pull("again", image, "--jobs", "2", "--limit", "2M")
    wait_until("some of it is here", lambda: how.sent > image.stored // 2)
    process = process_of("again")
    down("again")
    wait_for_end(process)
    tap.equal((settled(before), ublk_devices()), (before, []), "taken down in the middle, nothing is left")
    first, how.sent = how.sent, 0
    device = pull("again", image)
    done("again")
    tap.equal(differs(device, image.bytes), None, "fetched again, it is right")
    tap.result(how.sent < image.stored * 3 // 4, f"what had come was kept: {first}, then {how.sent} bytes")
    down("again")


def leaves_with_a_stack_that_others_remove(tap, image, how):
    """dmsetup and blkdeactivate know nothing of the process; who has renamed a stack still needs it."""
    how.delay, before = 0.0, existing()
    processes = []
    for name in ("left", "renamed"):
        ovbd("pull", "--lazy", "--store", store("left"), "--up", name, "--jobs", "1", "--limit", "1M", image.reference)
        processes.append(process_of(name))
    devices = run("dmsetup", "ls").split()[::2]
    for name in [name for name in devices if name.startswith("renamed")]:
        run("dmsetup", "rename", name, name.replace("renamed", "kept"))
    # What a device is made of goes after it.
    left = [name for name in devices if name.startswith("left")]
    for _ in left:
        for name in left:
            with contextlib.suppress(CommandFailed):
                run("dmsetup", "remove", name)
    wait_for_end(processes[0])
    tap.equal(len(ublk_devices()), 1, "its ublk device goes with it")
    tap.equal(differs("/dev/mapper/kept", image.bytes[:1 << 20]), None, "a stack that was renamed is served on")
    # By the name that it was made with.
    down("renamed")
    wait_for_end(processes[1])
    tap.equal((settled(before), ublk_devices()), (before, []), "nothing is left")


def two_share_layers(tap, image, how):
    how.delay = 0.02
    devices = [ovbd("pull", "--lazy", "--store", store("shared"), "--up", name, image.reference).strip()
               for name in ("one", "two")]
    with Readers(devices[0], image.bytes, 2) as one, Readers(devices[1], image.bytes, 2) as two:
        done("one")
        done("two")
    tap.equal((one.wrong, two.wrong, one.errors + two.errors), ([], [], 0), "two stacks of the same layers at once")
    for name, device in zip(("one", "two"), devices):
        tap.equal(differs(device, image.bytes), None, f"all of {name} is right then")
        down(name)


def serves_without_storing(tap, image, how):
    how.delay = 0.0
    folder = store("full")
    folder.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={image.stored // 3}", "tmpfs", folder)
    device = pull("full", image)
    with Readers(device, image.bytes, 2) as readers:
        wait_until("the disk is full",
                   lambda: "unstored" in [layer["fetch"]["state"] for layer in listed("full")["layers"] if layer["fetch"]])
        time.sleep(0.5)
    tap.equal((readers.wrong, readers.errors), ([], 0), f"with a full disk {readers.reads} reads were right")
    down("full")
    time.sleep(0.5)
    run("umount", folder)


def is_verified_while_it_is_fetched(tap, image, how):
    """One byte that the registry sends wrong costs the blocks that it is in, and no read is wrong."""
    how.delay = 0.0
    reference = image.reference.replace(":1", ":sealed")
    seal = SCRATCH / "seal"
    root = ":".join(ovbd("seal", "-o", seal, *image.layers).split())
    ovbd("push", *image.layers, seal, reference)
    damaged = json.loads(ovbd("inspect", "--json", reference))["layers"][1]["digest"]
    how.wrong = {damaged: 300 << 10}
    lists = how.remove_chunk_lists()
    sealed = image.named(reference)
    device = pull("sealed", sealed, "--verity", root)
    errors = 0
    for at in range(0, BYTES, 4096):
        try:
            data = read_direct(device, at, 4096)
        except OSError:
            errors += 1
            continue
        if data != image.bytes[at:at + 4096]:
            tap.result(False, f"byte {at} of a sealed stack is wrong")
    tap.result(0 < errors <= 2, f"{errors} blocks of {BYTES >> 12} cannot be read, all others are right")
    tap.equal(listed("sealed")["verity"]["state"], "corrupted", "ls says that a block was wrong")
    wait_until("the layer is known to be damaged",
               lambda: "damaged" in [layer["fetch"]["state"] for layer in listed("sealed")["layers"] if layer["fetch"]])
    down("sealed")
    how.wrong = {}
    device = pull("sealed", sealed, "--verity", root)
    done("sealed")
    tap.equal((differs(device, image.bytes), listed("sealed")["verity"]["state"]), (None, "verified"),
              "fetched anew it is verified")
    down("sealed")
    how.blobs.update(lists)


def refusals(tap, image, how):
    how.delay = 0.0
    how.ranges = False
    refused(tap, "a registry without ranges", "pull without --lazy", "pull", "--lazy", "--store", store("refused"),
            "--up", "refused", image.reference)
    how.ranges = True
    pull("twice", image, "--limit", "1M", "--jobs", "1")
    status, said = ovbd_fails("pull", "--lazy", "--store", store("twice"), "--up", "twice", image.reference)
    tap.result(status == 1 and "is being fetched by process" in said, "a stack that is served", said)
    status, said = ovbd_fails("commit", "-o", SCRATCH / "none", "twice")
    tap.result(status == 1, "commit of a stack that is fetched", said)
    down("twice")
    tap.equal(ublk_devices(), [], "nothing is left")


tap = Tap()
run_tests(tap, (is_used_while_it_is_fetched, is_written_to, survives_kills, survives_kills_while_it_is_handed_over,
                gone_process_needs_no_registry,
                ends_reads_in_time, goes_on_after_a_suspension, is_not_handed_over_when_wrong, is_taken_down_and_goes_on,
                leaves_with_a_stack_that_others_remove, two_share_layers,
                is_verified_while_it_is_fetched, serves_without_storing, refusals))
tap.finish()
