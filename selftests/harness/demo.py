# SPDX-License-Identifier: GPL-2.0
"""The demo: a Debian system becomes a stack of three layers in one VM and the root device of another.

What does not depend on the source under test is made once and kept in the cache: a Debian system, its ext4 image, and
the packages that the demo installs. Results go to build/demo/ and are made anew each time.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import time

import build
import cache
import root
import vm
from cache import CACHE, SOURCE, Failure, fresh_directory, step

# The system: one that boots, and can make the initramfs that it boots with.
PACKAGES = "systemd-sysv udev dmsetup initramfs-tools kmod passwd"
INSTALLED_LATER = "jq"
IMAGE_BYTES = 1 << 30
DISK_BYTES = 2 << 30

PREPARED = CACHE / "demo"
TREE = PREPARED / "tree"
RESULTS = SOURCE / "build/demo"
PARTS = SOURCE / "selftests/demo"
DISK = RESULTS / "layers.img"


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


def _make_disk():
    """The disk that both guests have: a file system with the base layer and what the first one wants."""
    fresh_directory(RESULTS)
    files = fresh_directory(RESULTS / "files")
    shutil.copytree(PREPARED / "packages", files / "packages")
    shutil.copy(PREPARED / "base.json", files)
    log = RESULTS / "base.log"
    step("building the base layer: ovbd build --format zfile --algo lz4",
         [str(SOURCE / "tools/target/release/ovbd"), "build", "--format", "zfile", "--algo", "lz4",
          "-o", str(files / "base.zfile"), str(PREPARED / "base.img")], log, "")
    with open(DISK, "wb") as file:
        file.truncate(DISK_BYTES)
    step("making the disk with the layers", ["mkfs.ext4", "-q", "-d", str(files), str(DISK)], log, "")
    shutil.rmtree(files)


def _drives():
    return [f"-drive file={DISK},if=virtio,format=raw,cache=unsafe",
            f"-drive file={PREPARED / 'base.img'},if=virtio,format=raw,readonly=on"]


def _first_guest(kernel):
    """Changes the system twice; returns the sizes and speeds that the guest reports."""
    print(f"==> booting the stock kernel {kernel.release} to work on the system", flush=True)
    guest = vm.Guest(kernel, f"python3 {shlex.quote(str(PARTS / 'guest.py'))}", RESULTS / "console-1.log", SOURCE,
                     silence=300, arguments=[f"--qemu-opts={' '.join(_drives())}"])
    figures = None
    for line in guest:
        if line.startswith("{"):
            figures = json.loads(line)
        else:
            print(line, flush=True)
    if guest.status != 0 or not figures:
        raise Failure(f"{guest.why or 'the demo failed in the guest'}; its console: {guest.console}")
    return figures


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
        install -D {boot}/root-stack {TREE}/usr/local/lib/ovbd/root-stack
        cp -r {TREE}/etc/initramfs-tools {TREE}/tmp/conf
        install {boot}/initramfs-hook {TREE}/tmp/conf/hooks/ovbd
        install {boot}/initramfs-local-top {TREE}/tmp/conf/scripts/local-top/ovbd
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


def _second_guest(kernel, initramfs):
    """Boots the system from its layers; returns what it reports."""
    append = ("quiet loglevel=4 root=/dev/mapper/root rw ovbd=/dev/vda:base.zfile,second.zfile,third.zfile "
              "systemd.unit=report.service")
    console = RESULTS / "console-2.log"
    print("==> booting it again: the root device is the stack of three layers", flush=True)
    report = vm.boot_system(kernel.vmlinuz, initramfs, append, DISK, console, 300, ["-no-reboot"],
                            lambda line: not line.startswith("package "))
    if not any("packages, jq says 42" in line for line in report):
        raise Failure(f"the system did not report; its console: {console}")
    return report


def _summary(figures, report, seconds):
    raw, layers, speed = figures["raw"], figures["layers"], figures["speed"]
    packages = sum(line.startswith("package ") for line in report)
    print(f"""
summary
  raw image             {raw / 1e6:8.1f} MB
  base layer, lz4       {layers[0] / 1e6:8.1f} MB
  second layer, lz4     {layers[1] / 1e6:8.1f} MB   jq installed, documentation deleted
  third layer, zstd     {layers[2] / 1e6:8.1f} MB   a service, a user, a host name
  all layers            {sum(layers) / 1e6:8.1f} MB   1:{raw / sum(layers):.1f}
  reading raw           {speed['raw']:8.1f} MiB/s through dm-linear
  reading the layer     {speed['base']:8.1f} MiB/s through dm-zfile and dm-overlaybd
  booted from the stack, with {packages} packages
  all in {seconds:.0f} s; layers and consoles are in {RESULTS}""", flush=True)


def run(kernel):
    """All of it; returns the exit status."""
    start = time.monotonic()
    if build.modules(kernel) or build.make("ovbd"):
        return 1
    # The disk takes minutes.
    vm.require_vng()
    with _alone():
        _prepare()
        _make_disk()
        figures = _first_guest(kernel)
        report = _second_guest(kernel, _make_initramfs(kernel))
    _summary(figures, report, time.monotonic() - start)
    return 0
