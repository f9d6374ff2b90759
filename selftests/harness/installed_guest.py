# SPDX-License-Identifier: GPL-2.0
"""A fresh Debian with the packages, booted with its stock kernel and the initrd that it made: a stack comes up from
/etc/ovbd, is mounted by fstab, and has after a reboot what was written to it; another, with a missing layer, does not and
says why.
"""

import installed
import vm
from cache import SOURCE, fresh_directory
from report import Counts

RESULTS = SOURCE / "build/installed"
DISK_BYTES = 1400 << 20
BOOT_SECONDS = 900
# What the booted system does: the first time it writes and reboots, the second time it looks and switches off.
REPORT = """#!/bin/sh
say() { echo "report: $*" >/dev/console; }
say "kernel $(uname -r), up for $(cut -d. -f1 /proc/uptime) s"
say "mounted $(findmnt -n -o SOURCE,FSTYPE /srv/disk)"
say "from the layer: $(cat /srv/disk/file)"
say "broken: $(systemctl is-failed ovbd@broken) $(journalctl -b -o cat -u ovbd@broken | grep '^ovbd:')"
say "modules $(lsmod | grep -c -e ^dm_overlaybd -e ^dm_zfile)"
if [ -e /srv/disk/written ]; then
	say "written: $(cat /srv/disk/written)"
	systemctl poweroff
else
	echo before the reboot >/srv/disk/written
	systemctl reboot
fi
"""
SERVICE = """[Unit]
After=multi-user.target ovbd@broken.service
RequiresMountsFor=/srv/disk
[Service]
Type=oneshot
ExecStart=/usr/local/bin/report
[Install]
WantedBy=multi-user.target
"""
# Each line in the order in which it must come; the second boot has what the first wrote.
WANTED = ["mounted /dev/mapper/disk ext4", "from the layer: hello", "broken: failed ovbd: /srv/layers/missing.zfile: "
          "cannot open: No such file or directory", "modules 2"]


def prepare(top):
    """The stacks, what mounts one of them, and the report."""
    installed.inside(top, """
        mkdir -p /srv/layers /srv/disk /tmp/files
        echo hello >/tmp/files/file
        truncate -s 64M /tmp/disk.img
        mkfs.ext4 -q -d /tmp/files /tmp/disk.img
        ovbd build -o /srv/layers/base.zfile /tmp/disk.img
        rm -r /tmp/files /tmp/disk.img
        echo '/dev/mapper/disk /srv/disk ext4 nofail 0 0' >>/etc/fstab
        echo fresh >/etc/hostname
        systemd-machine-id-setup
    """)
    (top / "etc/ovbd/disk.conf").write_text("layer /srv/layers/base.zfile\nwritable\ncow /srv/layers/disk.cow\n")
    (top / "etc/ovbd/broken.conf").write_text("layer /srv/layers/missing.zfile\n")
    (top / "usr/local/bin/report").write_text(REPORT)
    (top / "usr/local/bin/report").chmod(0o755)
    (top / "etc/systemd/system/report.service").write_text(SERVICE)
    installed.inside(top, "ovbd enable disk; ovbd enable broken; systemctl enable report")


def make_disk(top, release):
    """The system as an image; returns that, and kernel and initrd as they are in it."""
    fresh_directory(RESULTS)
    disk = RESULTS / "disk.img"
    with open(disk, "wb") as file:
        file.truncate(DISK_BYTES)
    kernel = []
    for name in ("vmlinuz", "initrd.img"):
        (RESULTS / name).write_bytes((top / f"boot/{name}-{release}").read_bytes())
        kernel.append(RESULTS / name)
    # What is mounted in there is not part of it.
    installed.run("sh", "-ec", 'umount "$0/proc" "$0/sys"; umount --recursive "$0/dev"; mkfs.ext4 -q -d "$0" "$1"', top, disk)
    return disk, *kernel


def test(kernel, debs):
    """Whether the stack is there after each boot; returns the counts."""
    counts = Counts()
    installed.check(counts, "a stack of /etc/ovbd, mounted by fstab, before and after a reboot", run, kernel, debs)
    return counts


def run(kernel, debs):
    """Installs, boots twice, and looks at what was reported."""
    with installed.overlay(installed.fresh_system(kernel)) as top:
        installed.install(top, debs, kernel.release)
        prepare(top)
        disk, vmlinuz, initrd = make_disk(top, kernel.release)
    print(f"==> booting a fresh Debian with {kernel.release} and the packages, twice", flush=True)
    report = vm.boot_system(vmlinuz, initrd, "loglevel=4 root=/dev/vda rw mitigations=off", disk,
                            RESULTS / "console.log", BOOT_SECONDS)
    installed.expect([line for line in report if line in WANTED] == WANTED * 2 and
                     report[-1:] == ["written: before the reboot"],
                     f"the system reported {report}; its console: {RESULTS}/console.log")
