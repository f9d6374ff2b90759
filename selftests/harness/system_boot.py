# SPDX-License-Identifier: GPL-2.0
"""A Debian that is booted by firmware and systemd-boot from images of a store, updates itself from a registry, is given an
image that does not come up, falls back by boot counting, is rolled back and pruned. And one whose power goes at random
moments while it updates itself, which always comes up again.

The boot loader is the real one: OVMF and systemd-boot of Debian's packages, which are unpacked here and installed nowhere
but in the image. Only the first generation is made on this machine, whose kernel has no modules for it.
"""

import os
import random
import sys
import tempfile
import time

import installed
import vm
from cache import SOURCE, fresh_directory
from report import Counts

sys.path.insert(0, str(SOURCE / "selftests/lib"))
from docker_registry import docker_registry

RESULTS = SOURCE / "build/system-boot"
SYSTEM_BYTES = 1400 << 20
# Of each partition: type, bytes, and how the file system is made of a folder.
PARTITIONS = [("C12A7328-F81F-11D2-BA4B-00A0C93EC93B", 192 << 20, "esp"),
              ("0FC63DAF-8483-4772-8E79-3D69D8477DE4", 1600 << 20, "layers"),
              ("0FC63DAF-8483-4772-8E79-3D69D8477DE4", 64 << 20, "state")]
FIRST = 1 << 20
BOOT_SECONDS = 2400
# How often the power goes.
CUTS = int(os.environ.get("OVBD_CUTS", "3"))
# Where a guest finds this machine's loopback.
HOST = "10.0.2.2"
WORDS = f"console=ttyS0 loglevel=4 mitigations=off panic=1 {vm.NO_TIMER_CHECK} ovbd.state=LABEL=state"
# Part of what each boot runs.
UPDATE = r"""
update() {
	mkdir -p /run/systemd/network
	printf '[Match]\nName=e*\n[Network]\nAddress=10.0.2.15/24\n' >/run/systemd/network/host.network
	systemctl start systemd-networkd
	/usr/lib/systemd/systemd-networkd-wait-online --timeout=120 || say "no network"
	say "updating"
	ovbd --quiet system update --plain-http "$@" >/run/said 2>&1 || say "update: $(cat /run/said)"
	say "updated"
	findmnt -n -o OPTIONS /run/ovbd/layers | grep -q '^ro' || say "the store can be written to"
}
"""
# What it does where the power goes, as long as there is such a file: the other image becomes the default, and what the
# store has besides goes before.
CUT_REPORT = r"""
if [ -e /var/cuts ]; then
	image=$(cat /etc/image)
	ovbd system status >/run/said 2>&1 || say "status: $(cat /run/said)"
	say "image $image"
	systemctl start systemd-bless-boot
	mount -o remount,rw /run/ovbd/layers
	{ ovbd system prune --keep 1 && ovbd gc --older 0 --store /run/ovbd/layers/lib/ovbd; } >/run/said 2>&1 ||
		say "prune: $(cat /run/said)"
	mount -o remount,ro /run/ovbd/layers
	update REPOSITORY:$((3 - image))
	systemctl poweroff
	exit
fi
"""
# What each boot of the other machine does: /var/stage, which is state of the machine, counts those that came up.
REPORT = r"""
stage=$(cat /var/stage 2>/dev/null || echo 0)
echo $((stage + 1)) >/var/stage
sync
say "stage $stage: image $(cat /etc/image), $(findmnt -n -o SOURCE,FSTYPE / | tr -s ' '), /usr is $(touch /usr/x 2>&1 | sed 's/.*: //')"
systemctl start systemd-bless-boot
list() { say "list: $(ovbd system list | sed -E 's/^ *([0-9]+)  .*  [^ ]+  ([^ ].*)$/\1 \2/' | paste -s -d';')"; }
case $stage in
0)
	list
	echo edited >/etc/edited
	touch /var/updating
	update REPOSITORY:2
	list
	systemctl reboot
	;;
1)
	say "edited: $(cat /etc/edited)"
	update --tries 2 REPOSITORY:3
	list
	systemctl reboot
	;;
2)
	list
	ovbd system prune 2 2>/run/said || say "prune: $(sed 's/.*: generation/generation/' /run/said)"
	ovbd --quiet system rollback >/run/said 2>&1 || say "rollback: $(cat /run/said)"
	list
	systemctl reboot
	;;
*)
	list
	say "edited: $(cat /etc/edited)"
	ovbd --quiet system prune --keep 1 >/run/said 2>&1 || say "prune: $(cat /run/said)"
	list
	ovbd system status >/run/said 2>&1 || say "status: $(cat /run/said)"
	say "kernels: $(ls /efi/ovbd | wc -l)"
	systemctl poweroff
	;;
esac
"""
UP = "/dev/mapper/root ext4, /usr is Read-only file system"
UPDATED = ["updating", "updated"]
WANTED = [f"stage 0: image 1, {UP}", "list: 1 good, default, running", *UPDATED, "list: 2 3 tries left, default;1 good, running", f"stage 1: image 2, {UP}", "edited: edited", *UPDATED,
          "list: 3 2 tries left, default;2 good, running;1 good",
          # Image 3 was tried twice in between.
          f"stage 2: image 2, {UP}", "list: 2 good, default, running;1 good;3 bad",
          "prune: generation 2 stays: this system runs from it", "list: 1 good, default;2 good, running;3 bad",
          f"stage 3: image 1, {UP}", "list: 1 good, default, running;2 good;3 bad", "edited: edited",
          "list: 1 good, default, running", "kernels: 2"]
# What the console shows of an image whose init ends at once.
BROKEN = "Attempted to kill init"


def prepare(top, debs, release, repository):
    """The image of the system, and firmware and tools out of Debian's packages."""
    installed.add_report(top, (UPDATE + CUT_REPORT + REPORT).replace("REPOSITORY", repository))
    installed.install(top, debs, release)
    (top / "etc/fstab").write_text("LABEL=ESP /efi vfat umask=077 0 2\n")
    (top / "etc/image").write_text("1\n")
    (top / "efi").mkdir(exist_ok=True)
    installed.inside(top, f"""
        apt-get update
        apt-get install -y --no-install-recommends systemd-boot systemd-boot-efi
        echo vfat >>/etc/initramfs-tools/modules
        update-initramfs -u -k {release}
        mkdir /tmp/debs
        cd /tmp/debs
        apt-get download ovmf mtools
        for deb in *.deb; do dpkg -x "$deb" unpacked; done
    """)
    installed.run("cp", "-r", top / "tmp/debs/unpacked", RESULTS / "programs")
    installed.run("rm", "-r", top / "tmp/debs")
    loader = RESULTS / "esp/EFI/BOOT"
    loader.mkdir(parents=True)
    (loader / "BOOTX64.EFI").write_bytes((top / "usr/lib/systemd/boot/efi/systemd-bootx64.efi").read_bytes())
    installed.copy_boot_files(top, release, RESULTS)
    installed.make_image(top, RESULTS / "1.img", SYSTEM_BYTES)


def change(number, *commands):
    """The next image: a layer of what changes, by commands of debugfs; returns it."""
    raw, before = RESULTS / "next.img", RESULTS / "1.img"
    installed.run("cp", "--sparse=always", before, raw)
    (RESULTS / "image").write_text(f"{number}\n")
    script = "\n".join(["rm /etc/image", f"write {RESULTS}/image /etc/image", *commands, ""])
    installed.run("debugfs", "-w", "-f", "-", raw, input=script)
    installed.run("e2fsck", "-fn", raw)
    layer = RESULTS / f"{number}.layer"
    installed.run(installed.OVBD, "-q", "build", "--tar", "-o", layer, raw, "--base", RESULTS / "1.layer")
    raw.unlink()
    return layer


def images(repository, port):
    """Three of them on a registry, the first in the store too."""
    installed.run(installed.OVBD, "-q", "build", "--tar", "-o", RESULTS / "1.layer", RESULTS / "1.img")
    (RESULTS / "init").write_text("#!/bin/sh\nexit 1\n")
    init = "/usr/lib/systemd/systemd"
    layers = {2: change(2), 3: change(3, f"rm {init}", f"write {RESULTS}/init {init}", f"sif {init} mode 0100755")}
    for number, above in {1: [], **{number: [layer] for number, layer in layers.items()}}.items():
        installed.run(installed.OVBD, "-q", "push", "--plain-http", RESULTS / "1.layer", *above,
                      f"127.0.0.1:{port}/vm/root:{number}")
    store = RESULTS / "layers/lib/ovbd"
    store.parent.mkdir(parents=True)
    installed.run(installed.OVBD, "-q", "push", RESULTS / "1.layer", f"oci:{store}:{repository}:1")
    (RESULTS / "esp/loader").mkdir()
    (RESULTS / "esp/loader/loader.conf").write_text("default ovbd-*\ntimeout 0\n")
    installed.run(installed.OVBD, "-q", "system", "init", "--boot", RESULTS / "esp", "--store", store, "--device",
                  "LABEL=layers", "--linux", RESULTS / "vmlinuz", "--initrd", RESULTS / "initrd.img", "--append", WORDS,
                  f"{repository}:1")
    (RESULTS / "1.img").unlink()


def make_disk(path):
    """Partitions and file systems of the folders."""
    table = "label: gpt\n" + "".join(f"size={size // 512}, type={kind}\n" for kind, size, _ in PARTITIONS)
    with open(path, "wb") as disk:
        disk.truncate(FIRST + sum(size for _, size, _ in PARTITIONS) + FIRST)
    installed.run("sfdisk", "-q", path, input=table)
    start = FIRST
    for _, size, name in PARTITIONS:
        part, folder = RESULTS / f"{name}.part", RESULTS / name
        with open(part, "wb") as file:
            file.truncate(size)
        if name == "esp":
            installed.run("mkfs.vfat", "-F", "32", "-n", "ESP", part)
            installed.run(RESULTS / "programs/usr/bin/mtools", "-c", "mcopy", "-s", "-i", part, *folder.iterdir(), "::")
        else:
            installed.run("mkfs.ext4", "-q", "-L", name, "-d", folder, part)
        installed.run("dd", f"if={part}", f"of={path}", "bs=1M", f"seek={start >> 20}", "conv=notrunc,sparse")
        part.unlink()
        start += size


def machine(disk):
    """The arguments of QEMU for a machine with firmware, that has this disk."""
    firmware = RESULTS / "programs/usr/share/OVMF"
    variables = disk.with_suffix(".vars")
    if not variables.exists():
        variables.write_bytes((firmware / "OVMF_VARS_4M.fd").read_bytes())
    return ["-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={firmware}/OVMF_CODE_4M.fd",
            "-drive", f"if=pflash,format=raw,unit=1,file={variables}",
            "-drive", f"file={disk},if=virtio,format=raw,cache=unsafe",
            "-netdev", "user,id=network", "-device", "virtio-net-pci,netdev=network,romfile="]


def updates_and_falls_back(disk):
    """All stages, in one run of the machine."""
    console = RESULTS / "console.log"
    report = vm.run_system(RESULTS / "vmlinuz", machine(disk), console, BOOT_SECONDS)
    installed.expect(report == WANTED, "the system reported\n" + "\n".join(report) + f"\nthe console: {console}")
    count = console.read_text(errors="replace").count(BROKEN)
    installed.expect(count == 2, f"the image that is broken was tried {count} times; the console: {console}")


class Cut(Exception):
    """The power goes."""


def survives(disk):
    """The first update takes its time; the others are cut somewhere in it, or just after it. What is in the memory of the
    guest is lost then. Each boot has an image that is whole."""
    console = RESULTS / "console-cut.log"
    began, took = 0.0, 0.0

    def measure(line):
        nonlocal began, took
        if line == "updating":
            began = time.monotonic()
        elif line == "updated":
            took = time.monotonic() - began
        return True

    report = vm.run_system(RESULTS / "vmlinuz", machine(disk), console, BOOT_SECONDS, measure)
    installed.expect(report == ["image 1", *UPDATED], f"the first update: {report}; the console: {console}")
    generator = random.Random("cuts")
    for number in range(CUTS):
        lines = []

        def cut(line):
            lines.append(line)
            if line == "updating":
                time.sleep(generator.uniform(0, 1.2 * took))
                raise Cut
            return True

        try:
            vm.run_system(RESULTS / "vmlinuz", machine(disk), console, BOOT_SECONDS, cut)
        except Cut:
            pass
        installed.expect(len(lines) == 2 and lines[0] in ("image 1", "image 2"),
                         f"after cut {number}: {lines}; the console: {console}")
    report = vm.run_system(RESULTS / "vmlinuz", machine(disk), console, BOOT_SECONDS)
    installed.expect(report[0] in ("image 1", "image 2") and report[1:] == UPDATED,
                     f"after the last cut: {report}; the console: {console}")


def test(kernel, debs):
    """Updates, fall-back and power cuts; returns the counts."""
    counts = Counts()
    fresh_directory(RESULTS)
    with tempfile.TemporaryDirectory() as folder, docker_registry(f"{folder}/registry") as port:
        repository = f"{HOST}:{port}/vm/root"
        with installed.overlay(installed.fresh_system(kernel)) as top:
            prepare(top, debs, kernel.release, repository)
        images(repository, port)
        disk, cut = RESULTS / "disk.img", RESULTS / "cut.img"
        (RESULTS / "state").mkdir()
        make_disk(disk)
        (RESULTS / "state/var/upper").mkdir(parents=True)
        (RESULTS / "state/var/upper/cuts").touch()
        make_disk(cut)
        print(f"==> firmware, systemd-boot and {kernel.release}: three images, one of them broken", flush=True)
        installed.check(counts, "updates by a layer, falls back by boot counting, is rolled back and pruned",
                        updates_and_falls_back, disk)
        installed.check(counts, f"comes up again after {CUTS} power cuts in an update", survives, cut)
        for path in [*RESULTS.glob("*.img"), *RESULTS.glob("*.layer")]:
            path.unlink()
    return counts
