#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""What it costs to push and pull an image: ovbd beside skopeo, oras and curl, over docker-registry on the loopback.

Seconds of CPU time (user and system, of the client alone), of wall-clock time, and peak memory. All of it is done ROUNDS
times in turns, and the least of each counts: on a shared machine the rest is what others do.
Started by `make bench-registry` in the toolchain root. MB= is the size of the image, LAYERS= the number of its layers.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, f"{pathlib.Path(__file__).resolve().parents[1]}/lib")
from docker_registry import docker_registry

OVBD = pathlib.Path("tools/target/release/ovbd").resolve()
MEGABYTES = int(os.environ.get("MB", "1024"))
LAYERS = int(os.environ.get("LAYERS", "64"))
ROUNDS = int(os.environ.get("ROUNDS", "3"))


def peak_memory(process):
    """Bytes of memory that a process has had at most until now; 0 when it has ended.

    What wait4() says begins with the memory of this program, from which the other one was forked.
    """
    try:
        text = pathlib.Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("VmHWM")), 0)


class Figures:
    """Runs commands and keeps the least that each has used."""

    def __init__(self):
        self.cpu, self.wall, self.peak = {}, {}, {}

    def run(self, name, *command):
        """Runs one command, which must succeed."""
        with tempfile.TemporaryFile("w+") as errors:
            start = time.monotonic()
            child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
            peak = 0
            while not (ended := os.wait4(child.pid, os.WNOHANG))[0]:
                peak = max(peak, peak_memory(child.pid))
                time.sleep(0.005)
            wall = time.monotonic() - start
            _, status, used = ended
            child.returncode = os.waitstatus_to_exitcode(status)
            if child.returncode:
                errors.seek(0)
                raise SystemExit(f"{name}: {' '.join(map(str, command))}: {errors.read()}")
        self.cpu[name] = min(self.cpu.get(name, 1e9), used.ru_utime + used.ru_stime)
        self.wall[name] = min(self.wall.get(name, 1e9), wall)
        self.peak[name] = max(self.peak.get(name, 0), peak)

    def print(self):
        print(f"{'':34} {'CPU s':>8} {'wall s':>8} {'peak MiB':>9}")
        for name, cpu in self.cpu.items():
            print(f"{name:34} {cpu:8.2f} {self.wall[name]:8.2f} {self.peak[name] / (1 << 20):9.1f}")

    def ratio(self, one, other):
        """Prints how much more or less one has used than the other."""
        cpu, wall = self.cpu[one] / self.cpu[other], self.wall[one] / self.wall[other]
        print(f"{one} / {other}: {cpu:.2f} of the CPU time, {wall:.2f} of the wall-clock time")


def make_layers(folder):
    """A stack of layers of random bytes, which no tool can compress."""
    raw = folder / "raw"
    layers = []
    size = MEGABYTES * 1000 * 1000 // LAYERS // 4096 * 4096
    for number in range(LAYERS):
        raw.write_bytes(os.urandom(size))
        layer = folder / f"layer{number}"
        # One disk would be better compared with skopeo, but these need no base to be read.
        subprocess.run([OVBD, "-q", "build", "--tar", "--format", "lsmt", "-o", layer, raw], check=True)
        layers.append(layer)
    raw.unlink()
    return layers


def main():
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/var/tmp")) as name:
        folder = pathlib.Path(name)
        with docker_registry(folder) as port:
            measure(folder, f"127.0.0.1:{port}", make_layers(folder))


def measure(folder, address, layers):
    reference, store = f"{address}/bench/web:x", folder / "store"
    ovbd = [OVBD, "-q", "--progress", "never"]
    skopeo = ["skopeo", "--insecure-policy", "copy", "-q", "--preserve-digests"]
    figures = Figures()
    push = [*ovbd, "push", "--fs", "none", "--store", store, *layers, reference]
    pull = [*ovbd, "pull", "--store", store, reference, "--jobs"]
    layout = f"oci:{folder}/layout:x"
    moved = folder / "moved"
    for round_ in range(ROUNDS):
        subprocess.run(push, check=True, stdout=subprocess.DEVNULL)
        figures.run("ovbd push, nothing to send", *push)
        for jobs in ("1", "2", "8"):
            shutil.rmtree(store, ignore_errors=True)
            figures.run(f"ovbd pull --jobs {jobs}", *pull, jobs)
        shutil.rmtree(folder / "layout", ignore_errors=True)
        figures.run("skopeo pull", *skopeo, "--src-tls-verify=false", f"docker://{reference}", layout)
        figures.run("oras pull", "oras", "cp", "--from-plain-http", "--to-oci-layout", reference, f"{folder}/oras:x")
        shutil.rmtree(folder / "oras")
        digests = [path.name for path in (store / "blobs/sha256").iterdir()]
        urls = " ".join(f"http://{address}/v2/bench/web/blobs/sha256:{digest}" for digest in digests)
        figures.run("curl | openssl sha256", "sh", "-c", f"(curl -s {urls} || kill $$) | openssl dgst -sha256")
        # Into other repositories, from where nothing can be taken; the registry forgets the bytes before each.
        shutil.rmtree(moved, ignore_errors=True)
        subprocess.run(["cp", "-al", store, moved], check=True)
        (moved / "index.json").unlink()
        (moved / "index.json").write_text((store / "index.json").read_text().replace(address, "elsewhere.example"))
        for jobs in ("1", "2", "8"):
            shutil.rmtree(folder / "data")
            figures.run(f"ovbd push --jobs {jobs}", *ovbd, "push", "--store", moved, "--jobs", jobs, f"oci:{moved}",
                        f"{address}/a{round_}{jobs}/web:x")
        shutil.rmtree(folder / "data")
        figures.run("skopeo push", *skopeo, "--dest-tls-verify=false", layout, f"docker://{address}/c{round_}/web:x")
        shutil.rmtree(folder / "data")
        figures.run("oras push", "oras", "cp", "--from-oci-layout", "--to-plain-http", f"{folder}/layout:x",
                    f"{address}/d{round_}/web:x")
        shutil.rmtree(folder / "data")
    figures.print()
    for jobs in ("1", "2"):
        for what in ("pull", "push"):
            figures.ratio(f"ovbd {what} --jobs {jobs}", f"skopeo {what}")
    figures.ratio("ovbd pull --jobs 1", "curl | openssl sha256")


if __name__ == "__main__":
    main()
