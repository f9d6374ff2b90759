# SPDX-License-Identifier: GPL-2.0
"""A fresh Debian with the packages whose root file system is a stack of one compressed layer, sealed or not: booted with
the initramfs of initramfs-tools and with that of dracut, pushed from inside, and what it costs beside the same file system
on a dm-linear, in instructions.
"""

import contextlib
import pathlib
import random
import re
import tempfile

import installed
import live_root
import vm
from cache import SOURCE, fresh_directory
from report import Counts

RESULTS = SOURCE / "build/stack-root"
SYSTEM_BYTES = 1400 << 20
BOOT_SECONDS = 900
# What the processor has run, in nanoseconds. Where a boot is counted that is exact; it has waited for disks as long as this
# machine took to read.
REPORT = """say "ran $(awk '/^cpu0 / { print $8 }' /proc/schedstat)"
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
# How many generations there are where boots of the first and the last one are counted, and how many files of each are new.
GENERATIONS, CHANGED = 50, 100
# Boots of each kind that are counted. While a machine waits for a disk timers go on: what is slow only adds to the time.
BOOTS = 3
REPOSITORY = "reg.example/generations/root"
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
        make_xfs(top)
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


def make_xfs(top):
    """A disk with the system as an XFS that was in use: a layer of it as it was while it was mounted and frozen."""
    installed.run("sh", "-ec", f"""
        mkdir "$0/files" "$0/top"
        truncate -s {SYSTEM_BYTES} "$0/raw.img"; mkfs.xfs -q "$0/raw.img"
        mount -o loop "$0/raw.img" "$0/top"
        trap 'umount "$0/top"; rm -r "$0/files" "$0/raw.img"; rmdir "$0/top"' EXIT
        cp -a "$1/." "$0/top/"
        fsfreeze --freeze "$0/top"
        made=0; "$2" --quiet build --allow-mounted -o "$0/files/xfs.zfile" "$0/raw.img" || made=$?
        fsfreeze --unfreeze "$0/top"
        [ $made = 0 ]
        truncate -s {SYSTEM_BYTES} "$0/xfs.img"; mkfs.ext4 -q -d "$0/files" "$0/xfs.img"
    """, RESULTS, top, installed.OVBD)


def boot(disk, initrd, words, more=(), counting=False):
    """Boots to the report, with more arguments for QEMU, and returns its lines and for how many seconds programs ran."""
    console = RESULTS / f"console-{disk}-{initrd}{'-more' if more else ''}.log"
    report = vm.boot_system(RESULTS / "vmlinuz", RESULTS / initrd, APPEND + words, RESULTS / disk, console, BOOT_SECONDS,
                            ["-no-reboot", *more], counting=counting)
    installed.expect(report, f"no report; the console: {console}")
    ran, *report = report
    return report, int(ran.split()[1]) / 1e9


def boots(initrd):
    """The root file system is the stack."""
    report, _ = boot("stack.img", initrd, STACK)
    installed.expect(report == WANTED, f"the system reported {report}")


def boots_from_xfs():
    """The root file system is an XFS with a log that nobody can recover, as it is read-only."""
    report, _ = boot("xfs.img", "initrd.img", "ovbd=/dev/vda:xfs.zfile rootflags=norecovery")
    installed.expect(report == ["root /dev/mapper/root xfs", "table overlaybd"], f"the system reported {report}")


def boots_checked(initrd):
    """The root file system is on dm-verity, with the root hash of the command line."""
    root = (RESULTS / "root").read_text()
    report, _ = boot("stack.img", initrd, f"{STACK},seal.zfile ovbd.verity={root}")
    installed.expect(report == [WANTED[0], "table verity"], f"the system reported {report}")


def boots_signed(initrd):
    """The root file system is an image of a repository whose images must be signed, as the policy in the initramfs says."""
    report, _ = boot("stack.img", initrd, "ovbd=/dev/vda:reg.example/vm/root:1")
    installed.expect(report == [WANTED[0], "table verity"], f"the system reported {report}")


def keeps_state(initrd):
    """What the machine writes is over folders of the root file system, which is read-only; what it has written, and what
    somebody wrote there before."""
    script = """[ $(findmnt -n -o FSTYPE /etc),$(findmnt -n -o FSTYPE /var) = overlay,overlay ] || say "no overlays"
touch /usr/written 2>/dev/null && say "/usr can be written to"
say "before: $(cat /etc/before)"
echo now >/var/now
sync
"""
    state = RESULTS / "state.img"
    with tempfile.TemporaryDirectory() as files:
        (pathlib.Path(files) / "etc/upper").mkdir(parents=True)
        (pathlib.Path(files) / "etc/upper/before").write_text("of an earlier boot\n")
        installed.run("sh", "-ec", 'truncate -s 64M "$1"; mkfs.ext4 -q -L state -d "$0" "$1"', files, state)
    drive = ["-drive", f"file={state},if=virtio,format=raw,cache=unsafe"]
    words = f"{live_root.STACK}:base.zfile ovbd.state=LABEL=state"
    report = live_root.with_script(RESULTS, script, lambda disk: boot("stack.img", initrd, words, [*disk, *drive])[0])
    installed.expect(report == [*WANTED, "before: of an earlier boot"], f"the system reported {report}")
    written = installed.run("debugfs", "-R", "cat /var/upper/now", state).splitlines()[-1]
    installed.expect(written == "now", f"on the device is {written}")


def publishes_itself():
    """The system pushes the stack that it runs from."""
    live_root.test(RESULTS, lambda disk, words, more: boot(disk, "initrd.img", words, more)[0])


def test(kernel, debs):
    """Both kinds of initramfs boot, and what runs from a stack publishes itself; returns the counts."""
    counts = Counts()
    with system(kernel, debs):
        installed.check(counts, "boots from a stack with initramfs-tools", boots, "initrd.img")
        installed.check(counts, "boots from a stack with dracut", boots, "dracut.img")
        installed.check(counts, "boots from an XFS that was in use", boots_from_xfs)
        installed.check(counts, "boots from a sealed stack", boots_checked, "initrd.img")
        installed.check(counts, "boots from a signed image with initramfs-tools", boots_signed, "initrd.img")
        installed.check(counts, "boots from a signed image with dracut", boots_signed, "dracut.img")
        installed.check(counts, "keeps what it writes to /etc and /var with dracut", keeps_state, "dracut.img")
        installed.check(counts, "commits itself while apt works, and what it pushed boots elsewhere", publishes_itself)
    return counts


def generations(count):
    """A disk with generations of the system, each a layer more in which some files are new: images 1, `count` - 1 and
    `count`, of which the last one was added as a generation, so that runs of its layers are squashed. Returns how many
    layers of each are mapped."""
    generator, store = random.Random("generations"), RESULTS / "files/lib/ovbd"
    raw, top, layers = RESULTS / "raw.img", RESULTS / "top", []
    installed.run("cp", "--sparse=always", RESULTS / "linear.img", raw)
    store.parent.mkdir(parents=True)
    top.mkdir()
    for number in range(1, count + 1):
        if number > 1:
            installed.run("mount", "-o", "loop", raw, top)
            try:
                names = [path for folder in ("usr/bin", "usr/lib") for path in sorted((top / folder).rglob("*"))
                         if path.is_file() and not path.is_symlink() and "modules" not in path.parts]
                for path in generator.sample(names, CHANGED):
                    installed.run("cp", "-a", path, f"{path}.new")
                    installed.run("mv", f"{path}.new", path)
            finally:
                installed.run("umount", top)
        layer = RESULTS / f"{number}.layer"
        installed.run(installed.OVBD, "-q", "build", "-o", layer, raw, *(["--base", *layers] if layers else []))
        layers.append(layer)
    numbers = (1, count - 1, count)
    for number in numbers:
        installed.run(installed.OVBD, "-q", "push", *layers[:number], f"oci:{store}:{REPOSITORY}:{number}")
    # The kernel that is booted is given to QEMU; no entry is read.
    (RESULTS / "boot").mkdir()
    installed.run(installed.OVBD, "-q", "system", "init", "--boot", RESULTS / "boot", "--store", store, "--device",
                  "LABEL=layers", "--linux", RESULTS / "vmlinuz", "--initrd", RESULTS / "initrd.img", f"{REPOSITORY}:{count}")
    mapped = {}
    for number in numbers:
        script = installed.run(installed.OVBD, "up", "--dry-run", "--store", store, "stack", f"{REPOSITORY}:{number}")
        mapped[number] = int(re.search(r" overlaybd (\d+) ", script)[1])
    installed.run("sh", "-ec", """
        truncate -s 4G "$0/generations.img"; mkfs.ext4 -q -L layers -d "$0/files" "$0/generations.img"
        rm -r "$0/files" "$0/boot" "$0"/*.layer "$0/raw.img"; rmdir "$0/top"
    """, RESULTS)
    return mapped


def count_boots(disk, words):
    """For how many seconds programs run in a boot to the report, at least."""
    return min(boot(disk, "initrd.img", words, counting=True)[1] for _ in range(BOOTS))


def bench(kernel, debs):
    """Prints what the boot costs from a stack and from a dm-linear, and of the first and the last of many generations."""
    with system(kernel, debs):
        linear = count_boots("linear.img", "linear=/dev/vda")
        stack = count_boots("stack.img", STACK)
        layers = generations(GENERATIONS)
        seconds = {number: count_boots("generations.img", f"ovbd=/dev/vda:{REPOSITORY}:{number}") for number in layers}
    print(f"boot to multi-user.target, one CPU, a nanosecond for each instruction, the least of {BOOTS}:")
    print(f"  dm-linear {linear:.2f} s, stack of one lz4 layer {stack:.2f} s: {stack / linear:.3f}")
    print(f"generations, each a layer with {CHANGED} files anew:")
    for number, time in seconds.items():
        print(f"  {number:3}, of {layers[number]:2} mapped layers, {time:.2f} s: {time / seconds[1]:.3f}")
    return 0
