# SPDX-License-Identifier: GPL-2.0
"""The demo of layers over tars: the root file system of a Debian container becomes a layer, which the stock kernel mounts; tar
itself compares all files, and the container runs.

The tar is made once and kept in the cache. The layer is made on this machine, and the rest happens in a guest.
"""

import shlex
import shutil
import subprocess

import build
import root
import vm
from cache import CACHE, SOURCE, Failure, alone, fresh_directory, need_space, step

TAR = CACHE / "container.tar"
RESULTS = SOURCE / "build/demo-tar"
OVBD = SOURCE / "tools/target/release/ovbd"


def prepare(tar=TAR, packages=""):
    """The tar of a Debian with these packages, separated by commas, as images of containers have it."""
    with alone(tar.stem):
        if tar.exists():
            return
        need_space(1, "the root file system of a container")
        partial = tar.with_suffix(".partial")
        step(f"making a Debian {root.SUITE} container with mmdebstrap",
             ["mmdebstrap", "--variant=minbase", "--format=tar", f"--include={packages}", root.SUITE, str(partial),
              f"deb {root.MIRROR} {root.SUITE} main"], CACHE / f"log/{tar.stem}.log", root.NETWORK)
        partial.rename(tar)


def run(kernel):
    """All of it; returns the exit status."""
    if build.modules(kernel) or build.make("ovbd"):
        return 1
    vm.require_vng()
    prepare()
    fresh_directory(RESULTS)
    layer = RESULTS / "debian.layer"
    print(f"==> making a layer over {TAR.stat().st_size >> 20} MiB of tar", flush=True)
    subprocess.run([OVBD, "build", "--from-tar", TAR, "-o", layer], check=True)
    print(f"    {layer.stat().st_size >> 20} MiB", flush=True)
    # Guests do not see the cache.
    tar = RESULTS / "debian.tar"
    shutil.copy(TAR, tar)
    words = ["env", f"SRC={SOURCE}", "python3", str(SOURCE / "selftests/demo/container.py"), str(tar), str(layer)]
    console = RESULTS / "console.log"
    print(f"==> booting the stock kernel {kernel.release}", flush=True)
    guest = vm.Guest(kernel, shlex.join(words), console, SOURCE, silence=600)
    for line in guest:
        print(line, flush=True)
    if guest.status != 0:
        raise Failure(f"{guest.why or 'the demo failed in the guest'}; its console: {console}")
    return 0
