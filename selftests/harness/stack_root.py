# SPDX-License-Identifier: GPL-2.0
"""A fresh Debian with the packages whose root file system is a stack of one compressed layer, sealed or not: booted with
the initramfs of initramfs-tools and with that of dracut, pushed from inside, and what it costs beside the same file system
on a dm-linear, in instructions.
"""

import contextlib

import installed
import live_root
import vm
from cache import SOURCE, fresh_directory
from report import Counts

RESULTS = SOURCE / "build/stack-root"
SYSTEM_BYTES = 1400 << 20
BOOT_SECONDS = 900
REPORT = """say "up $(cut -d' ' -f1 /proc/uptime)"
say "root $(findmnt -n -o SOURCE,FSTYPE /)"
say "table $(dmsetup table root | cut -d' ' -f3)"
""" + live_root.REPORT + "systemctl poweroff\n"
# initramfs-tools: the root device as a dm-linear over a disk, where the command line says so.
LINEAR = """[ "$1" != prereqs ] || { echo udev; exit 0; }
for word in $(cat /proc/cmdline); do
	case $word in linear=*)
		disk=${word#linear=}
		dmsetup create root --table "0 $(cat /sys/class/block/${disk#/dev/}/size) linear $disk 0" ;;
	esac
done
"""
APPEND = "loglevel=4 root=/dev/mapper/root ro mitigations=off "
STACK = "ovbd=/dev/vda:base.zfile"
WANTED = ["root /dev/mapper/root ext4", "table overlaybd"]


@contextlib.contextmanager
def system(kernel, debs):
    """Disks, kernel and both initramfs below `RESULTS`, while it lasts."""
    fresh_directory(RESULTS)
    release = kernel.release
    with installed.overlay(installed.fresh_system(kernel)) as top:
        (top / "etc/initramfs-tools/scripts/local-top").mkdir(parents=True, exist_ok=True)
        installed.write_program(top / "etc/initramfs-tools/scripts/local-top/linear", LINEAR)
        installed.add_report(top, REPORT)
        installed.install(top, debs, release)
        installed.inside(top, f"""
            apt-get update
            apt-get install -y --no-install-recommends dracut-core openssl
            apt-get install -y --no-install-recommends --download-only {live_root.PACKAGES}
            mkdir -p /etc/ovbd
            cd /etc/ovbd
            openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=vm -keyout vm.key -out vm.pem 2>vm.log
            echo 'reg.example/vm /etc/ovbd/vm.pem' >policy.conf
            update-initramfs -u -k {release}
            dracut --quiet --no-hostonly --kver {release} /boot/dracut.img-{release}
        """)
        installed.copy_boot_files(top, release, RESULTS, ("vmlinuz", "initrd.img", "dracut.img"))
        installed.run("mv", top / "etc/ovbd/vm.key", RESULTS)
        installed.run("cp", top / "etc/ovbd/vm.pem", RESULTS)
        installed.make_image(top, RESULTS / "linear.img", SYSTEM_BYTES)
    installed.run("sh", "-ec", f"""
        mkdir "$0/files"
        "$1" --quiet build --verity "$0/files/seal.zfile" -o "$0/files/base.zfile" "$0/linear.img"
        mv "$0/files/seal.zfile.roothash" "$0/root"
        mkdir -p "$0/files/lib/ovbd"
        "$1" --quiet push --seal --sign-key "$0/vm.key" --certificate "$0/vm.pem" "$0/files/base.zfile" \
            "oci:$0/files/lib/ovbd:reg.example/vm/root:1"
        truncate -s {SYSTEM_BYTES} "$0/stack.img"; mkfs.ext4 -q -L layers -d "$0/files" "$0/stack.img"
        rm -r "$0/files"
    """, RESULTS, installed.OVBD)
    try:
        yield
    finally:
        for disk in RESULTS.glob("*.img"):
            disk.unlink()


def boot(disk, initrd, words, more=(), counting=False):
    """Boots to the report, with more arguments for QEMU, and returns its lines and the seconds until then."""
    console = RESULTS / f"console-{disk}-{initrd}{'-more' if more else ''}.log"
    report = vm.boot_system(RESULTS / "vmlinuz", RESULTS / initrd, APPEND + words, RESULTS / disk, console, BOOT_SECONDS,
                            ["-no-reboot", *more], counting=counting)
    installed.expect(report, f"no report; the console: {console}")
    up, *report = report
    return report, float(up.split()[1])


def boots(initrd):
    """The root file system is the stack."""
    report, _ = boot("stack.img", initrd, STACK)
    installed.expect(report == WANTED, f"the system reported {report}")


def boots_checked(initrd):
    """The root file system is on dm-verity, with the root hash of the command line."""
    root = (RESULTS / "root").read_text()
    report, _ = boot("stack.img", initrd, f"{STACK},seal.zfile ovbd.verity={root}")
    installed.expect(report == [WANTED[0], "table verity"], f"the system reported {report}")


def boots_signed(initrd):
    """The root file system is an image of a repository whose images must be signed, as the policy in the initramfs says."""
    report, _ = boot("stack.img", initrd, "ovbd=/dev/vda:reg.example/vm/root:1")
    installed.expect(report == [WANTED[0], "table verity"], f"the system reported {report}")


def publishes_itself():
    """The system pushes the stack that it runs from."""
    live_root.test(RESULTS, lambda disk, words, more: boot(disk, "initrd.img", words, more)[0])


def test(kernel, debs):
    """Both kinds of initramfs boot, and what runs from a stack publishes itself; returns the counts."""
    counts = Counts()
    with system(kernel, debs):
        installed.check(counts, "boots from a stack with initramfs-tools", boots, "initrd.img")
        installed.check(counts, "boots from a stack with dracut", boots, "dracut.img")
        installed.check(counts, "boots from a sealed stack", boots_checked, "initrd.img")
        installed.check(counts, "boots from a signed image with initramfs-tools", boots_signed, "initrd.img")
        installed.check(counts, "boots from a signed image with dracut", boots_signed, "dracut.img")
        installed.check(counts, "commits itself while apt works, and what it pushed boots elsewhere", publishes_itself)
    return counts


def bench(kernel, debs):
    """Prints what the boot costs from a stack and from a dm-linear."""
    with system(kernel, debs):
        _, linear = boot("linear.img", "initrd.img", "linear=/dev/vda", counting=True)
        _, stack = boot("stack.img", "initrd.img", STACK, counting=True)
    print(f"boot to multi-user.target, one CPU, a nanosecond for each instruction: dm-linear {linear:.2f} s, stack of one "
          f"lz4 layer {stack:.2f} s, {stack - linear:+.2f} s")
    return 0
