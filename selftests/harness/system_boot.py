# SPDX-License-Identifier: GPL-2.0
"""A Debian that is booted by firmware and systemd-boot from images of a store. It updates itself from a registry five times in
a row, with a store and a state that are full and a clock that is wrong, is given an image that does not come up and one
without its layers, falls back by boot counting, is rolled back and pruned, and has an application beside it all the time.
Another keeps what it writes in a COW store. And one whose power goes at random moments while it updates itself always comes
up again.

The boot loader is the real one: OVMF and systemd-boot of Debian's packages, which are unpacked here and installed nowhere
but in the image. Only the first generation is made on this machine, whose kernel has no modules for it.
"""

import contextlib
import os
import random
import sys
import tempfile
import time

import installed
import packages
import vm
from cache import SOURCE, Failure, fresh_directory
from report import Counts

sys.path.insert(0, str(SOURCE / "selftests/lib"))
from docker_registry import docker_registry

RESULTS = SOURCE / "build/system-boot"
SYSTEM_BYTES = 1400 << 20
# Types of partitions.
ESP, DATA = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B", "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
# Of each partition: type, MiB, name, and the folder of which the file system on it is made, if there is one.
PARTITIONS = [(ESP, 192, "esp", "esp"), (DATA, 1600, "layers", "layers"), (DATA, 64, "state", "state")]
COW_PARTITIONS = [(ESP, 192, "esp", "esp-cow"), (DATA, 1600, "layers", "layers"), (DATA, 64, "data", "data"),
                  (DATA, 256, "one", None), (DATA, 64, "two", None)]
FIRST = 1 << 20
BOOT_SECONDS = 3600
# How often the power goes.
CUTS = int(os.environ.get("OVBD_CUTS", "3"))
# Where a guest finds this machine's loopback.
HOST = "10.0.2.2"
WORDS = f"console=ttyS0 loglevel=4 mitigations=off panic=1 {vm.NO_TIMER_CHECK}"
# What an update installs.
PACKAGE = "jq"
# Part of what each boot runs.
PARTS = r"""
store=/run/ovbd/layers/lib/ovbd
network() {
	mkdir -p /run/systemd/network
	printf '[Match]\nName=e*\n[Network]\nAddress=10.0.2.15/24\n' >/run/systemd/network/host.network
	systemctl start systemd-networkd
	/usr/lib/systemd/systemd-networkd-wait-online --timeout=120 || say "no network"
}
# Lines of a program that fails, without the file that it names, and numbers of bytes.
said() { sed -E 's/^ovbd: [^ ]*: //; s/[0-9]+ (bytes|left)/N \1/g' /run/said | paste -s -d';'; }
update() {
	network
	say "updating"
	ovbd --quiet system update --plain-http "$@" >/run/said 2>&1 || say "update: $(said)"
	say "updated"
	findmnt -n -o OPTIONS /run/ovbd/layers | grep -q '^ro' || say "the store can be written to"
}
with_store() {
	mount -o remount,rw /run/ovbd/layers
	"$@" >/run/said 2>&1 || say "$1: $(said)"
	mount -o remount,ro /run/ovbd/layers
}
list() { say "list: $(ovbd system list | sed -E 's/^ *([0-9]+)  .*  [^ ]+  ([^ ].*)$/\1 \2/' | paste -s -d';')"; }
root() { echo "image $(cat /etc/image), $(findmnt -n -o SOURCE,FSTYPE / | tr -s ' ')"; }
"""
# What it does where the power goes, as long as there is such a file: the other image becomes the default, and what the
# store has besides goes before.
CUT_REPORT = r"""
if [ -e /var/cuts ]; then
	image=$(cat /etc/image)
	ovbd system status >/run/said 2>&1 || say "status: $(cat /run/said)"
	say "image $image"
	systemctl start systemd-bless-boot
	prune() { ovbd system prune --keep 1 && ovbd gc --older 0 --store $store; }
	with_store prune
	update REPOSITORY:$((3 - image))
	systemctl poweroff
	exit
fi
"""
# What each boot of a machine does that keeps what it writes in a COW store for each generation. /srv/data is a file system
# of its own, and counts those that came up.
COW_REPORT = r"""
if grep -q ovbd.cow= /proc/cmdline; then
	systemctl start srv-data.mount
	stage=$(cat /srv/data/stage 2>/dev/null || echo 0)
	echo $((stage + 1)) >/srv/data/stage
	systemctl start systemd-bless-boot
	say "stage $stage: $(root), written to: $(touch /srv/x 2>&1 | sed 's/.*: //'), kept: $(cat /etc/kept 2>/dev/null), in its own: $(cat /srv/data/kept 2>/dev/null)"
	case $stage in
	0)
		echo of image 1 >/etc/kept
		echo of all >/srv/data/kept
		sync
		update REPOSITORY:2
		update --append ovbd.cow=PARTLABEL=two REPOSITORY:2
		;;
	1)
		echo of image 2 >/etc/kept
		sync
		dd if=/dev/urandom of=/srv/fill bs=1M >/run/said 2>&1 && sync && say "not full"
		say "ls: $(ovbd ls | grep -o overflow | head -n 1)"
		;;
	2)
		ovbd --quiet system rollback >/run/said 2>&1 || say "rollback: $(said)"
		;;
	*)
		systemctl poweroff
		exit
		;;
	esac
	list
	systemctl reboot
	exit
fi
"""
COW_ROOT = "/dev/mapper/root ext4"
REFUSED = ("update: the command line of the default generation has ovbd.cow=PARTLABEL=one, and what is written there is over "
           'the layers of that image: --append "ovbd.cow=..." says what it is for this one')
# Each generation has what was written over it, and all have what is on a file system of its own. One whose store is full
# comes up, read-only, and is rolled back.
COW_WANTED = [f"stage 0: image 1, {COW_ROOT}, written to: , kept: , in its own:", "updating", REFUSED, "updated", "updating", "updated",
              "list: 2 3 tries left, default;1 good, running",
              f"stage 1: image 2, {COW_ROOT}, written to: , kept: , in its own: of all", "ls: overflow",
              "list: 2 good, default, running;1 good",
              f"stage 2: image 2, {COW_ROOT}, written to: Read-only file system, kept: of image 2, in its own: of all",
              "list: 1 good, default;2 good, running",
              f"stage 3: image 1, {COW_ROOT}, written to: , kept: of image 1, in its own: of all"]
# What each boot of the other machine does: /var/stage, which is state of the machine, counts those that came up.
REPORT = r"""
stage=$(cat /var/stage 2>/dev/null || echo 0)
if [ -e /var/fill ]; then
	[ $(df --output=avail /var | tail -n 1) -gt 64 ] || say "what the machine writes has no room"
	rm /var/fill
fi
echo $((stage + 1)) >/var/stage
sync
say "stage $stage: $(root), /usr is $(touch /usr/x 2>&1 | sed 's/.*: //'), the clock says $(cut -d- -f1 /sys/class/rtc/rtc0/date)"
systemctl start systemd-bless-boot
clock() { hwclock --utc --set --date "$1-05-05 12:00" || say "no clock"; }
app() {
	systemctl start srv-app.mount
	say "app: $(cat /srv/app/etc/app) on $(findmnt -n -o SOURCE /srv/app)"
}
kept() { du -s --block-size=1 /run/ovbd/layers | cut -f1; }
case $stage in
0)
	list
	echo edited >/etc/edited
	network
	before=$(kept)
	with_store ovbd pull --plain-http --store $store REPOSITORY-app:1
	say "the application takes $((($(kept) - before) >> 20)) MiB"
	printf 'store %s\nlayer %s\n' $store REPOSITORY-app:1 >/etc/ovbd/app.conf
	ovbd up app >/run/said 2>&1 || say "up: $(said)"
	ovbd enable app >/run/said 2>&1 || say "enable: $(said)"
	echo '/dev/mapper/app /srv/app ext4 ro,nofail 0 0' >>/etc/fstab
	systemctl daemon-reload
	app
	clock 2001
	update REPOSITORY:2
	;;
1)
	say "edited: $(cat /etc/edited), PACKAGE: $(PACKAGE -n '6 * 7')"
	app
	fill() {
		fallocate -l $(($(df -B1 --output=avail /run/ovbd/layers | tail -n 1) - 4194304)) /run/ovbd/layers/fill
		dd if=/dev/zero of=/run/ovbd/layers/fill oflag=append conv=notrunc bs=64k || sync
	}
	with_store fill
	update REPOSITORY:3
	list
	ovbd system status >/run/said 2>&1 || say "status: $(said)"
	with_store rm /run/ovbd/layers/fill
	clock 2035
	update REPOSITORY:3
	;;
2)
	app
	sed -i 's/-app:1/-app:2/' /etc/ovbd/app.conf
	network
	with_store ovbd pull --plain-http --store $store REPOSITORY-app:2
	clock 1999
	update REPOSITORY:4
	;;
3)
	app
	clock 2050
	update REPOSITORY:5
	dd if=/dev/zero of=/var/fill bs=64k >/run/said 2>&1 && say "state is not full"
	;;
4)
	app
	update --tries 2 REPOSITORY:6
	with_store ovbd pull --plain-http --store $store REPOSITORY:7
	ovbd --quiet system add --tries 1 REPOSITORY:7 >/run/said 2>&1 || say "add: $(said)"
	with_store rm "$(ovbd images --json --store $store REPOSITORY:7 | PACKAGE -r '.[0].files[-1]')"
	ovbd system status >/dev/null 2>/run/said || say "status: $(said | sed 's/ [^ ]*sha256[^ ]*//')"
	;;
5)
	app
	list
	ovbd system prune 5 2>/run/said || say "prune: $(said)"
	for time in 1 2 3; do
		ovbd --quiet system rollback >/run/said 2>&1 || say "rollback: $(said)"
		list
	done
	ovbd --quiet system prune --keep 1 >/run/said 2>&1 || say "prune: $(said)"
	;;
*)
	list
	app
	say "edited: $(cat /etc/edited)"
	ovbd --quiet system prune --keep 1 >/run/said 2>&1 || say "prune: $(said)"
	list
	ovbd system status >/run/said 2>&1 || say "status: $(said)"
	say "kernels: $(ls /efi/ovbd | wc -l)"
	systemctl poweroff
	exit
	;;
esac
list
systemctl reboot
"""
UP = "/dev/mapper/root ext4, /usr is Read-only file system, the clock says"
UPDATED = ["updating", "updated"]
APP = "app: application {} on /dev/mapper/app".format
OLDER = "".join(f";{number} good" for number in (3, 2, 1))
WANTED = [f"stage 0: image 1, {UP} {time.gmtime().tm_year}", "list: 1 good, default, running", "the application takes 0 MiB", APP(1), *UPDATED,
          "list: 2 3 tries left, default;1 good, running",
          f"stage 1: image 2, {UP} 2001", f"edited: edited, {PACKAGE}: 42", APP(1),
          "updating", "update: no room: N bytes are to be fetched, and the file system has N left", "updated",
          "list: 2 good, default, running;1 good", *UPDATED, "list: 3 3 tries left, default;2 good, running;1 good",
          f"stage 2: image 3, {UP} 2035", APP(1), *UPDATED, "list: 4 3 tries left, default;3 good, running;2 good;1 good",
          f"stage 3: image 4, {UP} 1999", APP(2), *UPDATED, f"list: 5 3 tries left, default;4 good, running{OLDER}",
          "what the machine writes has no room",
          f"stage 4: image 5, {UP} 2050", APP(2), *UPDATED, "status: ovbd: generation 7: cannot open: No such file or directory",
          f"list: 7 1 try left, default;6 2 tries left;5 good, running;4 good{OLDER}",
          # 7 was tried once in between, and 6 twice.
          f"stage 5: image 5, {UP} 2050", APP(2), f"list: 5 good, default, running;4 good{OLDER};7 bad;6 bad",
          "prune: generation 5 stays: this system runs from it",
          # A rollback, that of it, and that of that.
          f"list: 4 good, default;5 good, running{OLDER};7 bad;6 bad",
          f"list: 5 good, default, running;4 good{OLDER};7 bad;6 bad",
          f"list: 4 good, default;5 good, running{OLDER};7 bad;6 bad",
          "list: 4 good, default;5 good, running",
          f"stage 6: image 4, {UP} 2050", "list: 4 good, default, running;5 good", APP(2), "edited: edited",
          "list: 4 good, default, running", "kernels: 2"]
# What is shown of that to who watches.
TITLES = {"0": "generation 1 boots: it gets an application, and an update that installs " + PACKAGE,
          "1": "generation 2 boots: its store is full, and then it is not",
          "2": "generation 3 boots, and the clock is wrong: another image of the application, and an update",
          "3": "generation 4 boots: an update, and what the machine writes has no room",
          "4": "generation 5 boots: an update to an image without init, and one that lacks a layer",
          "5": "the boot loader has tried both and given up: generation 5 again. Rolled back, forth and back, and pruned",
          "6": "generation 4 boots: the rest is pruned"}
# What the console shows of an image whose init ends at once.
BROKEN = "Attempted to kill init"
# And of one without its layers.
LACKING = "No such file or directory"


def prepare(top, debs, release, repository):
    """The image of the system, and firmware and tools out of Debian's packages."""
    report = PARTS + CUT_REPORT + COW_REPORT + REPORT
    installed.add_report(top, report.replace("REPOSITORY", repository).replace("PACKAGE", PACKAGE))
    installed.install(top, debs, release)
    (top / "etc/fstab").write_text("LABEL=ESP /efi vfat umask=077 0 2\n"
                                   "LABEL=data /srv/data ext4 noauto 0 2\n")
    (top / "etc/image").write_text("1\n")
    for folder in ("efi", "srv/app", "srv/data"):
        (top / folder).mkdir(exist_ok=True)
    installed.inside(top, f"""
        apt-get update
        apt-get install -y --no-install-recommends systemd-boot systemd-boot-efi util-linux-extra
        apt-get install -y --no-install-recommends --download-only {PACKAGE}
        echo vfat >>/etc/initramfs-tools/modules
        update-initramfs -u -k {release}
        mkdir /tmp/debs
        cd /tmp/debs
        apt-get download ovmf mtools
        for deb in *.deb; do dpkg -x "$deb" unpacked; done
    """)
    installed.run("cp", "-r", top / "tmp/debs/unpacked", RESULTS / "programs")
    installed.run("rm", "-r", top / "tmp/debs")
    installed.copy_boot_files(top, release, RESULTS)
    installed.make_image(top, RESULTS / "1.img", SYSTEM_BYTES)
    loader = (top / "usr/lib/systemd/boot/efi/systemd-bootx64.efi").read_bytes()
    for esp in ("esp", "esp-cow"):
        for folder in ("EFI/BOOT", "loader"):
            (RESULTS / esp / folder).mkdir(parents=True)
        (RESULTS / esp / "EFI/BOOT/BOOTX64.EFI").write_bytes(loader)
        (RESULTS / esp / "loader/loader.conf").write_text("default ovbd-*\ntimeout 0\n")


def install_package(raw):
    """apt does it, in the mounted image."""
    top = RESULTS / "top"
    top.mkdir()
    installed.run("mount", "-o", "loop", raw, top)
    try:
        installed.run("mount", "-t", "proc", "proc", top / "proc")
        installed.run("mount", "--bind", "/dev", top / "dev")
        # Not with files of its own that are larger than the package.
        installed.inside(top, "apt-get -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= install -y "
                              f"--no-install-recommends {PACKAGE}; rm -f /var/cache/apt/*.bin")
    finally:
        installed.run("umount", "--recursive", top)
    top.rmdir()


def write_files(raw, files, *commands):
    """Writes files into an image, after commands of debugfs."""
    script = list(commands)
    for name, content in files.items():
        source = RESULTS / "written" / name.lstrip("/").replace("/", "-")
        source.parent.mkdir(exist_ok=True)
        source.write_bytes(content)
        script += [f"rm {name}", f"write {source} {name}", f"sif {name} mode 0100755"]
    installed.run("debugfs", "-w", "-f", "-", raw, input="\n".join([*script, ""]))
    installed.run("e2fsck", "-fn", raw)


def add_layer(name, raw, below):
    """What an image is, over layers; returns all of them."""
    layer = RESULTS / f"{name}.layer"
    installed.run(installed.OVBD, "-q", "build", "--tar", "-o", layer, raw, *(["--base", *below] if below else []))
    return [*below, layer]


def branch(name, raw, below, files):
    """A layer of files in a copy of an image."""
    copy = RESULTS / "branch.img"
    installed.run("cp", "--sparse=always", raw, copy)
    write_files(copy, files)
    try:
        return add_layer(name, copy, below)
    finally:
        copy.unlink()


def images(repository, port):
    """Those of the system and of the application on a registry, and the first one in the store too."""
    generator = random.Random("images")
    raw = RESULTS / "1.img"
    of = {"root:1": add_layer("1", raw, [])}
    for number in (1, 2):
        of[f"root-app:{number}"] = branch(f"app{number}", raw, of["root:1"],
                                          {"/etc/app": f"application {number}\n".encode()})
    install_package(raw)
    for number in range(2, 6):
        write_files(raw, {"/etc/image": b"%d\n" % number, "/usr/share/data": generator.randbytes(5 << 20)})
        of[f"root:{number}"] = add_layer(str(number), raw, of[f"root:{number - 1}"])
    of["root:6"] = branch("6", raw, of["root:5"], {"/usr/lib/systemd/systemd": b"#!/bin/sh\nexit 1\n"})
    of["root:7"] = branch("7", raw, of["root:5"], {"/etc/image": b"7\n"})
    raw.unlink()
    for name, layers in of.items():
        installed.run(installed.OVBD, "-q", "push", "--plain-http", *layers, f"127.0.0.1:{port}/vm/{name}")
    store = RESULTS / "layers/lib/ovbd"
    store.parent.mkdir(parents=True)
    installed.run(installed.OVBD, "-q", "push", *of["root:1"], f"oci:{store}:{repository}:1")
    for esp, words in (("esp", "ovbd.state=LABEL=state"), ("esp-cow", "rw ovbd.cow=PARTLABEL=one")):
        installed.run(installed.OVBD, "-q", "system", "init", "--boot", RESULTS / esp, "--store", store, "--device",
                      "LABEL=layers", "--linux", RESULTS / "vmlinuz", "--initrd", RESULTS / "initrd.img", "--append",
                      f"{WORDS} {words}", f"{repository}:1")


def make_disk(path, partitions):
    """Partitions, and file systems of the folders."""
    table = "label: gpt\n" + "".join(f"size={mib << 11}, type={kind}, name={name}\n" for kind, mib, name, _ in partitions)
    with open(path, "wb") as disk:
        disk.truncate(FIRST + sum(mib << 20 for _, mib, _, _ in partitions) + FIRST)
    installed.run("sfdisk", "-q", path, input=table)
    start = FIRST
    for kind, mib, name, folder in partitions:
        if folder:
            part = RESULTS / f"{name}.part"
            with open(part, "wb") as file:
                file.truncate(mib << 20)
            if kind == ESP:
                installed.run("mkfs.vfat", "-F", "32", "-n", "ESP", part)
                installed.run(RESULTS / "programs/usr/bin/mtools", "-c", "mcopy", "-s", "-i", part,
                              *(RESULTS / folder).iterdir(), "::")
            else:
                installed.run("mkfs.ext4", "-q", "-m", "0", "-L", name, "-d", RESULTS / folder, part)
            installed.run("dd", f"if={part}", f"of={path}", "bs=1M", f"seek={start >> 20}", "conv=notrunc,sparse")
            part.unlink()
        start += mib << 20


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
    def shown(line):
        words = line.split()
        if words[0] == "stage":
            print(f"==> {TITLES[words[1].strip(':')]}", flush=True)
        return True

    text = reports(disk, "console.log", WANTED, shown)
    count = text.count(BROKEN)
    installed.expect(count == 2, f"the image that is broken was tried {count} times; the console: {RESULTS}/console.log")
    installed.expect(LACKING in text, f"no word of the layer that is not there; the console: {RESULTS}/console.log")


def keeps_writes(disk):
    """All stages of the machine with COW stores."""
    reports(disk, "console-cow.log", COW_WANTED)


def reports(disk, console, wanted, shown=lambda line: True):
    """Runs a machine, which must report this; returns what its console had."""
    console = RESULTS / console
    report = vm.run_system(RESULTS / "vmlinuz", machine(disk), console, BOOT_SECONDS, shown)
    installed.expect(report == wanted, "the system reported\n" + "\n".join(report) + f"\nthe console: {console}")
    return console.read_text(errors="replace")


class Cut(Exception):
    """The power goes."""


def update_undisturbed(disk):
    """One boot and its update, to the end; returns the seconds of the update."""
    began, took = 0.0, 0.0

    def measure(line):
        nonlocal began, took
        if line == "updating":
            began = time.monotonic()
        elif line == "updated":
            took = time.monotonic() - began
        return True

    console = RESULTS / "console-cut.log"
    report = vm.run_system(RESULTS / "vmlinuz", machine(disk), console, BOOT_SECONDS, measure)
    installed.expect(report[:1] in (["image 1"], ["image 2"]) and report[1:] == UPDATED, f"{report}; the console: {console}")
    return took


def update_cut(disk, seconds):
    """One boot, and the power goes so many seconds after its update has begun. What is in the memory of the guest is lost."""
    lines, console = [], RESULTS / "console-cut.log"

    def cut(line):
        lines.append(line)
        if line == "updating":
            time.sleep(seconds)
            raise Cut
        return True

    with contextlib.suppress(Cut):
        vm.run_system(RESULTS / "vmlinuz", machine(disk), console, BOOT_SECONDS, cut)
    installed.expect(len(lines) == 2 and lines[0] in ("image 1", "image 2"), f"{lines}; the console: {console}")


def survives(disk):
    """The first update takes its time; the others are cut somewhere in it, or just after it. Each boot has an image that is
    whole."""
    took = update_undisturbed(disk)
    generator = random.Random("cuts")
    for number in range(CUTS):
        print(f"    cut {number + 1}", flush=True)
        update_cut(disk, generator.uniform(0, 1.2 * took))
    update_undisturbed(disk)


@contextlib.contextmanager
def disks(kernel, debs):
    """Folders of which disks are made, and a registry, while it lasts."""
    fresh_directory(RESULTS)
    with tempfile.TemporaryDirectory() as folder, docker_registry(f"{folder}/registry") as port:
        repository = f"{HOST}:{port}/vm/root"
        with installed.overlay(installed.fresh_system(kernel)) as top:
            prepare(top, debs, kernel.release, repository)
        images(repository, port)
        for name in ("state", "data"):
            (RESULTS / name).mkdir()
        try:
            yield
        finally:
            for path in [*RESULTS.glob("*.img"), *RESULTS.glob("*.layer")]:
                path.unlink()


def test(kernel, debs):
    """Updates, fall-back, COW stores and power cuts; returns the counts."""
    counts = Counts()
    with disks(kernel, debs):
        disk, cow, cut = (RESULTS / f"{name}.img" for name in ("disk", "cow", "cut"))
        make_disk(disk, PARTITIONS)
        make_disk(cow, COW_PARTITIONS)
        (RESULTS / "state/var/upper").mkdir(parents=True)
        (RESULTS / "state/var/upper/cuts").touch()
        make_disk(cut, PARTITIONS)
        print(f"==> firmware, systemd-boot and {kernel.release}: five updates, and two that do not come up", flush=True)
        installed.check(counts, "updates by layers, falls back by boot counting, is rolled back and pruned",
                        updates_and_falls_back, disk)
        installed.check(counts, "keeps what it writes in a COW store for each generation", keeps_writes, cow)
        installed.check(counts, f"comes up again after {CUTS} power cuts in an update", survives, cut)
    return counts


def demo(kernel):
    """The first of these machines, for who watches; returns the exit status."""
    with disks(kernel, packages.build([kernel])):
        disk = RESULTS / "disk.img"
        make_disk(disk, PARTITIONS)
        print(f"==> a machine with firmware, systemd-boot and Debian's {kernel.release}, and a registry on this one", flush=True)
        try:
            updates_and_falls_back(disk)
        except installed.Unexpected as unexpected:
            raise Failure(str(unexpected)) from unexpected
    return 0
