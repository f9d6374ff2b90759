# SPDX-License-Identifier: GPL-2.0
"""The demo: a Debian system on a thin volume is pushed to a registry, changed, and pushed again; another machine pulls both
into its own pool, compares every file, and boots from the layers.

The machines are guests of the stock kernel, one after the other, and the registry is on this one. What does not depend on the source under test is made once and kept in the cache: a Debian system, its ext4 image, and
the packages that the demo installs. Results go to build/demo/ and are made anew each time.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time

import build
import cache
import root
import vm
from cache import CACHE, SOURCE, Failure, fresh_directory, step

sys.path.insert(0, str(SOURCE / "selftests/lib"))
from docker_registry import docker_registry

# The system: one that boots, and can make the initramfs that it boots with.
PACKAGES = "systemd-sysv udev dmsetup initramfs-tools kmod passwd"
INSTALLED_LATER = "jq"
IMAGE_BYTES = 1 << 30
# Of each machine, for volumes; and of the file system that the second one boots from.
DISK_BYTES = 2 << 30
STORE_BYTES = 512 << 20

PREPARED = CACHE / "demo"
TREE = PREPARED / "tree"
RESULTS = SOURCE / "build/demo"
PARTS = SOURCE / "selftests/demo"
FILES = RESULTS / "files"
STORE = RESULTS / "store.img"


@contextlib.contextmanager
def _alone():
    """Demos of several checkouts share what is prepared."""
    CACHE.mkdir(exist_ok=True)
    with open(CACHE / "demo.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _prepare():
    """The Debian system, its image and checksums, and the packages."""
    stamp = PREPARED / "made-from"
    wanted = f"{root.SUITE} {PACKAGES} + {INSTALLED_LATER}, {IMAGE_BYTES} bytes"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    cache.need_space(4, "the demo")
    cache.delete(PREPARED)
    partial = fresh_directory(CACHE / "demo.partial")
    packages = partial / "packages"
    packages.mkdir()
    # The packages are downloaded by the system itself, so that they are what it lacks.
    download = f'chroot "$1" sh -ec "apt-get clean; apt-get install -y --download-only {INSTALLED_LATER}"'
    step(f"making a Debian {root.SUITE} system with mmdebstrap",
         ["mmdebstrap", "--variant=minbase", "--aptopt=Apt::Install-Recommends \"false\"",
          f"--include={PACKAGES.replace(' ', ',')}", f"--customize-hook={download}",
          f'--customize-hook=mv "$1"/var/cache/apt/archives/*.deb {shlex.quote(str(packages))}',
          root.SUITE, str(partial / "tree"), f"deb {root.MIRROR} {root.SUITE} main"],
         CACHE / "log/demo-system.log", root.NETWORK)
    image = partial / "base.img"
    with open(image, "wb") as file:
        file.truncate(IMAGE_BYTES)
    step("making an ext4 image of it", ["mkfs.ext4", "-q", "-d", str(partial / "tree"), str(image)],
         CACHE / "log/demo-image.log", "")
    (partial / "base.json").write_text(json.dumps(_checksums(partial / "tree")))
    (partial / stamp.name).write_text(wanted)
    partial.rename(PREPARED)


def _checksums(tree):
    found = {}
    for path in tree.rglob("*"):
        name = str(path.relative_to(tree))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _make_disks():
    """What the guests have: two empty disks, a file system for the store of the second one, and files to read."""
    fresh_directory(RESULTS)
    fresh_directory(FILES)
    shutil.copytree(PREPARED / "packages", FILES / "packages")
    shutil.copy(PREPARED / "base.json", FILES)
    for name, size in (("first.img", DISK_BYTES), ("second.img", DISK_BYTES), (STORE.name, STORE_BYTES)):
        with open(RESULTS / name, "wb") as file:
            file.truncate(size)
    step("making a file system for the layers of the second machine", ["mkfs.ext4", "-q", str(STORE)], RESULTS / "disks.log",
         "")


def _guest(kernel, program, disk, other, repository):
    """Boots the stock kernel for a program of selftests/demo; prints what it says, and returns what it says in JSON."""
    console = RESULTS / f"console-{program}.log"
    drives = [f"-drive file={RESULTS / disk},if=virtio,format=raw,cache=unsafe", f"-drive file={other},if=virtio,format=raw",
              "-netdev user,id=network", "-device virtio-net-pci,netdev=network,romfile="]
    words = ["env", f"SRC={SOURCE}", "python3", str(PARTS / f"{program}.py"), repository, str(FILES)]
    guest = vm.Guest(kernel, shlex.join(words), console, SOURCE, silence=300, arguments=[f"--qemu-opts={' '.join(drives)}"])
    said = None
    for line in guest:
        if line.startswith("{"):
            said = json.loads(line)
        else:
            print(line, flush=True)
    if guest.status != 0:
        raise Failure(f"{guest.why or 'the demo failed in the guest'}; its console: {console}")
    return said


def _make_initramfs(kernel):
    """An initramfs of the system with the hook and the boot script; returns its path.

    The modules are where `make modules_install` would put them. All in a namespace of its own: nothing stays mounted.
    """
    modules = fresh_directory(RESULTS / "modules")
    shutil.copytree(CACHE / "modules" / kernel.release, modules / kernel.release, symlinks=True)
    ours = modules / kernel.release / "updates"
    ours.mkdir(exist_ok=True)
    for name in ("dm-overlaybd", "dm-zfile"):
        shutil.copy(SOURCE / name / f"{name}.ko", ours)
    boot = SOURCE / "tools/boot"
    script = f"""
        mount --bind {modules} {TREE}/usr/lib/modules
        mount -t tmpfs tmpfs {TREE}/tmp
        mount -t proc proc {TREE}/proc
        mount -t tmpfs tmpfs {TREE}/usr/local
        install -D {SOURCE}/tools/target/release/ovbd {TREE}/usr/local/bin/ovbd
        mkdir -p {TREE}/usr/local/lib/ovbd
        install {boot}/boot-functions {boot}/root-stack {boot}/root-state {TREE}/usr/local/lib/ovbd
        cp -r {TREE}/etc/initramfs-tools {TREE}/tmp/conf
        install {boot}/initramfs-hook {TREE}/tmp/conf/hooks/ovbd
        install {boot}/initramfs-local-top {TREE}/tmp/conf/scripts/local-top/ovbd
        install -D {boot}/initramfs-local-bottom {TREE}/tmp/conf/scripts/local-bottom/ovbd
        printf '%s\\n' virtio_pci virtio_blk ext4 >{TREE}/tmp/conf/modules
        sed -i 's/^MODULES=.*/MODULES=list/' {TREE}/tmp/conf/initramfs.conf
        chroot {TREE} depmod {kernel.release}
        chroot {TREE} mkinitramfs -d /tmp/conf -o /tmp/initrd.img {kernel.release}
        cp {TREE}/tmp/initrd.img {RESULTS}
    """
    for place in ("usr/lib/modules", "usr/local"):
        (TREE / place).mkdir(exist_ok=True)
    step("making an initramfs",
         ["unshare", "--mount", "--propagation", "unchanged", "sh", "-euxc", script], RESULTS / "initramfs.log", "")
    return RESULTS / "initrd.img"


def _boot(kernel, initramfs, repository, root_hash):
    """Boots the system from its layers in the store of the second machine, every block checked against the root hash that
    was signed; returns what it reports."""
    append = (f"quiet loglevel=4 root=/dev/mapper/root rw ovbd=/dev/vda:{repository}:sealed ovbd.verity={root_hash} "
              "systemd.unit=report.service")
    console = RESULTS / "console-boot.log"
    print("==> booting machine B from what it pulled: the root device is the stack of both layers, below dm-verity",
          flush=True)
    report = vm.boot_system(kernel.vmlinuz, initramfs, append, STORE, console, 300, ["-no-reboot"],
                            lambda line: not line.startswith("package "))
    if not any("packages, jq says 42" in line for line in report):
        raise Failure(f"the system did not report; its console: {console}")
    return report


def _summary(figures, report, seconds):
    def mib(size):
        return f"{size / (1 << 20):8.1f} MiB"

    image = PREPARED / "base.img"
    whole = int(subprocess.run(["sh", "-c", 'zstd -3 -c "$0" | wc -c', image], capture_output=True, check=True).stdout)
    first, second = figures["layers"]
    packages = sum(line.startswith("package ") for line in report)
    print(f"""
summary: bytes sent                 the first time    what changed
  full copy                         {mib(IMAGE_BYTES)}    {mib(IMAGE_BYTES)}
  thin_delta, its chunks, zstd -3   {mib(whole)}    {mib(figures["chunks"])}
  ovbd push, lz4 and then zstd      {mib(first)}    {mib(second)}
  the second machine booted from the stack, with {packages} packages
  all in {seconds:.0f} s; disks and consoles are in {RESULTS}""", flush=True)


def run(kernel):
    """All of it; returns the exit status."""
    start = time.monotonic()
    if build.modules(kernel) or build.make("ovbd"):
        return 1
    # The disks take minutes.
    vm.require_vng()
    with _alone():
        _prepare()
        _make_disks()
        with docker_registry(RESULTS / "registry") as port:
            # That is where a guest reaches this machine's loopback.
            repository = f"10.0.2.2:{port}/vm/system"
            print(f"==> booting the stock kernel {kernel.release}: machine A", flush=True)
            base = f"{PREPARED / 'base.img'},readonly=on"
            figures = _guest(kernel, "first", "first.img", base, repository)
            (FILES / "changed.json").write_text(json.dumps(figures["files"]))
            print("==> booting it again: machine B", flush=True)
            sealed = _guest(kernel, "second", "second.img", STORE, repository)
        report = _boot(kernel, _make_initramfs(kernel), repository, sealed["root"])
    _summary(figures, report, time.monotonic() - start)
    return 0
