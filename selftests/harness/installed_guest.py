# SPDX-License-Identifier: GPL-2.0
"""A fresh Debian, booted with its stock kernel and initrd. Two commands, apt and `ovbd up`, give a stack without a reboot;
once it is enabled it comes up from /etc/ovbd, is mounted by fstab, and has what was written to it; so has one with a volume
group on it, and one that dm-verity checks. Another, with a missing layer, does not and says why.
"""

import re
import shutil

import installed
import vm
from cache import SOURCE, fresh_directory
from report import Counts

RESULTS = SOURCE / "build/installed"
DISK_BYTES = 1400 << 20
BOOT_SECONDS = 1200
# What the booted system does: the first time it installs, writes and reboots, the second time it looks and switches off.
REPORT = """look() {
	say "mounted $(findmnt -n -o SOURCE,FSTYPE /srv/disk)"
	say "from the layer: $(cat /srv/disk/file)"
	say "modules $(lsmod | grep -c -e ^dm_overlaybd -e ^dm_zfile)"
}
now() { cut -d. -f1 /proc/uptime; }
if ! command -v ovbd >/dev/null; then
	say "kernel $(uname -r), without ovbd"
	apt-get install -y --no-install-recommends /root/debs/*.deb >/root/apt 2>&1 || say "apt: $(tail -n 5 /root/apt)"
	start=$(now)
	ovbd up --writable --cow /srv/layers/disk.cow disk /srv/layers/base.zfile
	mount /dev/mapper/disk /srv/disk
	say "$(($(now) - start)) s to up and mounted, without apt"
	look
	echo before the reboot >/srv/disk/written
	ovbd enable disk
	echo '/dev/mapper/disk /srv/disk ext4 nofail 0 0' >>/etc/fstab
	truncate --size 64M /srv/layers/empty
	ovbd --quiet build -o /srv/layers/empty.zfile /srv/layers/empty
	ovbd up --writable --cow /srv/layers/pv.cow pv /srv/layers/empty.zfile
	cp /usr/share/doc/ovbd/examples/lvm-filter.conf /etc/lvm/lvmlocal.conf
	vgcreate inside /dev/mapper/pv
	lvcreate --yes --size 16m --name data inside
	mkfs.ext4 -q /dev/inside/data
	mount /dev/inside/data /srv/inside
	echo on a volume >/srv/inside/written
	ovbd enable pv
	echo '/dev/inside/data /srv/inside ext4 nofail 0 0' >>/etc/fstab
	ovbd --quiet build --verity /srv/layers/seal.zfile -o /srv/layers/sealed.zfile /srv/layers/empty
	ovbd up --verity /srv/layers/seal.zfile.roothash sealed /srv/layers/sealed.zfile /srv/layers/seal.zfile
	ovbd enable sealed
	echo 'layer /srv/layers/missing.zfile' >/etc/ovbd/broken.conf
	ovbd enable broken
	systemctl reboot
else
	look
	say "broken: $(systemctl is-failed ovbd@broken) $(journalctl -b -o cat -u ovbd@broken | grep '^ovbd:')"
	say "written: $(cat /srv/disk/written)"
	say "volume: $(findmnt -n -o SOURCE /srv/inside) $(cat /srv/inside/written)"
	say "sealed: $(dmsetup table sealed | cut -d' ' -f3), $(ovbd ls | grep -c '^  verified: ') verified"
	systemctl poweroff
fi
"""
# Each line in the order in which it must come.
LOOK = ["mounted /dev/mapper/disk ext4", "from the layer: hello", "modules 2"]
WANTED = [*LOOK, *LOOK, "broken: failed ovbd: /srv/layers/missing.zfile: cannot open: No such file or directory",
          "written: before the reboot", "volume: /dev/mapper/inside-data on a volume",
          "sealed: verity, 1 verified"]


def prepare(top, debs, release):
    """The packages as files, a layer, and the report."""
    (top / "root/debs").mkdir()
    for path in installed.chosen(debs, release):
        shutil.copy(path, top / "root/debs")
    for folder in ("srv/layers", "srv/disk", "srv/inside", "tmp/files"):
        (top / folder).mkdir(parents=True)
    (top / "tmp/files/file").write_text("hello\n")
    installed.run("sh", "-ec", """
        truncate -s 64M "$0/tmp/disk.img"
        mkfs.ext4 -q -d "$0/tmp/files" "$0/tmp/disk.img"
        "$1" --quiet build -o "$0/srv/layers/base.zfile" "$0/tmp/disk.img"
        rm -r "$0/tmp/files" "$0/tmp/disk.img"
    """, top, installed.OVBD)
    installed.add_report(top, REPORT, "ovbd@broken.service srv-disk.mount srv-inside.mount")


def test(kernel, debs):
    """Whether the stack is there at once and after a reboot; returns the counts."""
    counts = Counts()
    installed.check(counts, "apt and ovbd up give a stack without a reboot, enable and fstab after one", run, kernel, debs)
    return counts


def run(kernel, debs):
    """Boots twice, and looks at what was reported."""
    with installed.overlay(installed.fresh_system(kernel)) as top:
        prepare(top, debs, kernel.release)
        fresh_directory(RESULTS)
        installed.copy_boot_files(top, kernel.release, RESULTS)
        installed.make_image(top, RESULTS / "disk.img", DISK_BYTES)
    print(f"==> booting a fresh Debian with {kernel.release}, twice", flush=True)
    report = vm.boot_system(RESULTS / "vmlinuz", RESULTS / "initrd.img", "loglevel=4 root=/dev/vda rw mitigations=off",
                            RESULTS / "disk.img", RESULTS / "console.log", BOOT_SECONDS)
    console = RESULTS / "console.log"
    installed.expect([line for line in report if line in WANTED] == WANTED,
                     f"the system reported {report}; its console: {console}")
    # What LVM has on a stack is taken down first, and then the stack. The console has colours around names.
    ends = re.findall(r"(Stopped|Stopping|Failed \w+) (?:\x1b\[[\d;]*m)?(blk-availability|ovbd@pv)\.service",
                      console.read_text(errors="replace").rpartition("ovbd@broken")[2])
    installed.expect(ends == [("Stopping", "blk-availability"), ("Stopped", "blk-availability"), ("Stopping", "ovbd@pv"),
                              ("Stopped", "ovbd@pv")], f"the order of the shutdown: {ends}; the console: {console}")
