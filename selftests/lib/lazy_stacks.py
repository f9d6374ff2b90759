# SPDX-License-Identifier: GPL-2.0
"""What the tests of lazily pulled stacks share: an image in a registry, readers that compare every byte, and waiting until all
of a stack is there."""

import contextlib
import copy
import json
import pathlib
import random
import re
import threading
import time

from block_devices import read_direct
from ovbd_command import listed, make_image, ovbd
from registry import has_network
from slow_registry import slow_registry
from test_script import SCRATCH, load, run

BYTES = 64 << 20
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


def wait_for_end(process):
    wait_until(f"process {process} ends", lambda: not pathlib.Path(f"/proc/{process}/exe").exists())


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


def run_tests(tap, tests):
    """Runs tests with an image in a registry that behaves as they want; the first that breaks ends it."""
    if not has_network():
        return tap.skip("lazily fetched stacks", "this kernel has no network")
    with contextlib.suppress(Exception):
        run("modprobe", "ublk_drv")
    if not pathlib.Path("/dev/ublk-control").exists():
        return tap.skip("lazily fetched stacks", "this kernel has no ublk")
    load("loop", "dm-overlaybd", "dm-zfile")
    with slow_registry() as (host, how):
        image = Image(host)
        for test in tests:
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
