#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""`ovbd pull --lazy`: stacks that are read while they are fetched, from a registry that is slow, silent, wrong or gone; the
process that fetches is killed, and in the end there is none. Nobody ever reads a wrong byte. OVBD_KILLS= how often."""

import contextlib
import copy
import json
import os
import pathlib
import random
import re
import signal
import sys
import threading
import time

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
from block_devices import read_direct
from ovbd_command import existing, listed, make_image, ovbd, ovbd_fails, refused, settled
from registry import has_network
from slow_registry import slow_registry
from test_script import SCRATCH, Tap, load, run

BYTES = 64 << 20
KILLS = int(os.environ.get("OVBD_KILLS", "6"))
READ = 16 << 10


def ublk_devices():
    return sorted(path.name for path in pathlib.Path("/sys/block").iterdir() if path.name.startswith("ublkb"))


def process_of(name):
    """The process that fetches a stack."""
    return json.loads(pathlib.Path(f"/run/ovbd/{name}.fetch").read_text())["process"]


def wait_until(what, true, seconds=60):
    """Fails the test where something does not become true."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {seconds} s")
        time.sleep(0.05)


def is_local(name):
    """Whether no layer of a stack is being fetched any more."""
    return all(layer["fetch"] is None for layer in listed(name)["layers"])


def done(name):
    """Waits until a stack is fetched and its process has ended."""
    wait_until(f"{name} is fetched", lambda: is_local(name) and not pathlib.Path(f"/run/ovbd/{name}.fetch").exists())


class Readers:
    """Threads that read all over a device and compare; errors are counted, wrong bytes remembered."""

    def __init__(self, device, image, threads=3):
        self.device, self.image = device, image
        self.reads, self.errors, self.wrong, self.longest = 0, 0, [], 0.0
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self.read, args=(seed,), daemon=True) for seed in range(threads)]

    def read(self, seed):
        generator = random.Random(seed)
        while not self.stop.is_set():
            at = generator.randrange(len(self.image) // READ) * READ
            begun = time.monotonic()
            try:
                data = read_direct(self.device, at, READ)
            except OSError:
                self.errors += 1
                continue
            finally:
                self.longest = max(self.longest, time.monotonic() - begun)
            self.reads += 1
            if data != self.image[at:at + READ]:
                self.wrong.append(at)

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        for thread in self.threads:
            thread.join(120)


def differs(device, image):
    """Where a device first differs from an image."""
    for at in range(0, len(image), 1 << 20):
        if read_direct(device, at, len(image[at:at + (1 << 20)])) != image[at:at + (1 << 20)]:
            return at
    return None


def tables(devices):
    """The tables of devices of a stack, with files in place of the numbers of loop devices and of others."""
    def word(text):
        if not re.fullmatch(r"\d+:\d+", text):
            return text
        backing = pathlib.Path(f"/sys/dev/block/{text}/loop/backing_file")
        return backing.read_text().strip() if backing.exists() else "device"

    return [[word(text) for text in run("dmsetup", "table", device).split()] for device in devices]


class Image:
    """An image of three layers, compressed and not, pushed to the registry."""

    def __init__(self, host):
        generator = random.Random("lazy")
        raw, base, middle, top = (SCRATCH / name for name in ("raw", "base", "middle", "top"))
        make_image(raw, generator, BYTES)
        ovbd("build", "-o", base, raw)
        self.change(raw, generator)
        ovbd("build", "--format", "lsmt", "-o", middle, raw, "--base", base)
        self.change(raw, generator)
        ovbd("build", "-o", top, raw, "--base", base, middle)
        self.bytes = raw.read_bytes()
        self.reference = f"{host}/vm/web:1"
        ovbd("push", base, middle, top, self.reference)
        self.stored = sum(path.stat().st_size for path in (base, middle, top))
        self.layers = base, middle, top

    def named(self, reference):
        """The same image by another name."""
        other = copy.copy(self)
        other.reference = reference
        return other

    @staticmethod
    def change(raw, generator):
        with open(raw, "r+b") as file:
            for _ in range(40):
                file.seek(generator.randrange(BYTES >> 12) << 12)
                file.write(generator.randbytes(generator.randrange(1, 8) << 12))


def store(name):
    return SCRATCH / f"store-{name}"


def pull(name, image, *options, **how):
    return ovbd("pull", "--lazy", "--store", store(name), "--up", name, *options, image.reference, **how).strip()


def down(name):
    ovbd("down", name)


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


def is_not_handed_over_when_wrong(tap, image, how):
    how.delay = 0.0
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


def is_taken_down_and_goes_on(tap, image, how):
    how.delay, before, how.sent = 0.05, existing(), 0
    pull("again", image, "--jobs", "2", "--limit", "2M")
    wait_until("some of it is here", lambda: how.sent > image.stored // 2)
    process = process_of("again")
    down("again")
    wait_until("the process ends", lambda: not pathlib.Path(f"/proc/{process}/exe").exists())
    tap.equal((settled(before), ublk_devices()), (before, []), "taken down in the middle, nothing is left")
    first, how.sent = how.sent, 0
    device = pull("again", image)
    done("again")
    tap.equal(differs(device, image.bytes), None, "fetched again, it is right")
    tap.result(how.sent < image.stored * 3 // 4, f"what had come was kept: {first}, then {how.sent} bytes")
    down("again")


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


def refusals(tap, image, how):
    how.delay = 0.0
    how.ranges = False
    refused(tap, "a registry without ranges", "pull without --lazy", "pull", "--lazy", "--store", store("refused"),
            "--up", "refused", image.reference)
    how.ranges = True
    pull("twice", image, "--limit", "100K", "--jobs", "1")
    status, said = ovbd_fails("pull", "--lazy", "--store", store("twice"), "--up", "twice", image.reference)
    tap.result(status == 1 and "is being fetched by process" in said, "a stack that is served", said)
    status, said = ovbd_fails("commit", "-o", SCRATCH / "none", "twice")
    tap.result(status == 1, "commit of a stack that is fetched", said)
    down("twice")
    tap.equal(ublk_devices(), [], "nothing is left")


def main(tap):
    if not has_network():
        return tap.skip("lazily fetched stacks", "this kernel has no network")
    with contextlib.suppress(Exception):
        run("modprobe", "ublk_drv")
    if not pathlib.Path("/dev/ublk-control").exists():
        return tap.skip("lazily fetched stacks", "this kernel has no ublk")
    load("loop", "dm-overlaybd", "dm-zfile")
    with slow_registry() as (host, how):
        image = Image(host)
        for test in (is_used_while_it_is_fetched, is_written_to, survives_kills, gone_process_needs_no_registry,
                     ends_reads_in_time, is_not_handed_over_when_wrong, is_taken_down_and_goes_on, two_share_layers,
                     is_verified_while_it_is_fetched, serves_without_storing, refusals):
            print(f"# {test.__name__}", flush=True)
            begun = time.monotonic()
            try:
                test(tap, image, how)
            except Exception as error:
                tap.result(False, test.__name__, f"{type(error).__name__}: {error}\n{ovbd('ls')}")
                for log in pathlib.Path("/run/ovbd").glob("*.log"):
                    print("\n".join(f"# {log.name}: {line}" for line in log.read_text().splitlines()[-20:]))
                break
            print(f"# {time.monotonic() - begun:.1f} s", flush=True)


tap = Tap()
main(tap)
tap.finish()
