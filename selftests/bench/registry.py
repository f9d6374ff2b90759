#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""What it costs to push and pull an image: ovbd beside skopeo, oras and curl, over docker-registry on the loopback.

Seconds of CPU time (user and system, of the client alone) and peak memory; on a shared machine wall-clock time says little.
Started by `make bench-registry` in the toolchain root. MB= is the size of the image, LAYERS= the number of its layers.
"""

import os
import pathlib
import shutil
import socket
import subprocess
import tempfile
import time

OVBD = pathlib.Path("tools/target/release/ovbd").resolve()
MEGABYTES = int(os.environ.get("MB", "1024"))
LAYERS = int(os.environ.get("LAYERS", "64"))


class Figures:
    """Runs commands and prints what each has used."""

    def __init__(self):
        print(f"{'':34} {'CPU s':>8} {'wall s':>8} {'peak MiB':>9}")
        self.cpu = {}

    def run(self, name, *command):
        """Runs one command, which must succeed."""
        start = time.monotonic()
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        errors = child.stderr.read()
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit(f"{name}: {' '.join(map(str, command))}: {errors}")
        wall = time.monotonic() - start
        self.cpu[name] = used.ru_utime + used.ru_stime
        print(f"{name:34} {self.cpu[name]:8.2f} {wall:8.2f} {used.ru_maxrss / 1024:9.1f}", flush=True)

    def ratio(self, one, other):
        """Prints how much more or less CPU time one has used than the other."""
        print(f"{one} / {other}: {self.cpu[one] / self.cpu[other]:.2f} of the CPU time")


def serve(folder):
    """Starts docker-registry; returns its process and address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    config = folder / "config.yml"
    config.write_text(
        "version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\n"
        f"storage: {{filesystem: {{rootdirectory: {folder}/data}}}}\nhttp: {{addr: '{address}', secret: none}}\n")
    server = subprocess.Popen(["docker-registry", "serve", config], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    host, port = address.split(":")
    for _ in range(500):
        with socket.socket() as probe:
            if probe.connect_ex((host, int(port))) == 0:
                return server, address
        time.sleep(0.02)
    raise SystemExit("docker-registry does not start")


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
        server, address = serve(folder)
        try:
            measure(folder, address, make_layers(folder))
        finally:
            server.kill()
            server.wait()


def measure(folder, address, layers):
    reference, store = f"{address}/bench/web:x", folder / "store"
    ovbd = [OVBD, "-q", "--progress", "never"]
    skopeo = ["skopeo", "--insecure-policy", "copy", "-q", "--preserve-digests"]
    figures = Figures()
    subprocess.run([*ovbd, "push", "--fs", "none", *layers, reference], check=True, stdout=subprocess.DEVNULL)
    figures.run("ovbd push, nothing to send", *ovbd, "push", "--fs", "none", *layers, reference)
    figures.run("ovbd pull --jobs 2", *ovbd, "pull", "--jobs", "2", "--store", store, reference)
    figures.run("ovbd pull --jobs 8", *ovbd, "pull", "--jobs", "8", "--store", folder / "eight", reference)
    layout = f"oci:{folder}/layout:x"
    figures.run("skopeo pull", *skopeo, "--src-tls-verify=false", f"docker://{reference}", layout)
    figures.run("oras pull", "oras", "cp", "--from-plain-http", "--to-oci-layout", reference, f"{folder}/oras:x")
    shutil.rmtree(folder / "eight")
    shutil.rmtree(folder / "oras")
    digests = subprocess.run(["ls", store / "blobs/sha256"], check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    urls = " ".join(f"http://{address}/v2/bench/web/blobs/sha256:{digest}" for digest in digests)
    figures.run("curl | openssl sha256", "sh", "-c", f"curl -s {urls} | openssl dgst -sha256")
    # Into other repositories, from where nothing can be taken.
    for number, jobs in enumerate(("1", "8")):
        moved = folder / f"moved{number}"
        subprocess.run(["cp", "-al", store, moved], check=True)
        (moved / "index.json").write_text((store / "index.json").read_text().replace(address, "elsewhere.example"))
        image = f"oci:{moved}"
        figures.run(f"ovbd push --jobs {jobs}", *ovbd, "push", "--store", moved, "--jobs", jobs, image, f"{address}/a{number}/web:x")
        purge(folder)
    figures.run("skopeo push", *skopeo, "--dest-tls-verify=false", layout, f"docker://{address}/c/web:x")
    purge(folder)
    figures.run("oras push", "oras", "cp", "--from-oci-layout", "--to-plain-http", f"{folder}/layout:x", f"{address}/d/web:x")
    figures.ratio("ovbd pull --jobs 2", "skopeo pull")
    figures.ratio("ovbd pull --jobs 2", "curl | openssl sha256")
    figures.ratio("ovbd push --jobs 1", "skopeo push")


def purge(folder):
    """Makes the registry forget the bytes, so that the next client has to send them."""
    shutil.rmtree(folder / "data")


if __name__ == "__main__":
    main()
