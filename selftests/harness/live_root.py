# SPDX-License-Identifier: GPL-2.0
"""A system that runs from a stack publishes itself: while apt works and files are written it pushes the stack that its root
file system is on, twice. Of the first image, which is of a moment in the middle of it, the file system is checked; the
second one is pulled elsewhere, and a machine boots from it. Another pulls it lazily, as a service of systemd, and boots from
what it is still pulling.
"""

import contextlib
import pathlib
import re
import sys
import tempfile

import installed
from cache import SOURCE

sys.path.insert(0, str(SOURCE / "selftests/lib"))
from docker_registry import docker_registry

# What apt installs and removes, again and again; the system has the packages as files. jq is looked at in the end.
PACKAGES = "jq bc"
# The file system with what a system is to do, and where it keeps layers and stores.
LABEL = "work"
# Part of what each system runs once it is up.
REPORT = f"""if [ -b /dev/disk/by-label/{LABEL} ]; then
	mount /dev/disk/by-label/{LABEL} /srv
	. /srv/script
fi
"""
STACK = "ovbd=LABEL=layers"
BOOTED = """look() {
	say "jq: $(jq -n '6 * 7')"
	say "dpkg: $(dpkg --audit)$(dpkg --verify jq)"
	say "number: $(cat /root/number)"
}
"""
LOOKS = ["jq: 42", "dpkg:"]
# Where a guest finds this machine's loopback.
HOST = "10.0.2.2"
NETWORK = """mkdir -p /run/systemd/network
printf '[Match]\\nName=e*\\n[Network]\\nAddress=10.0.2.15/24\\nKeepConfiguration=yes\\n' >/run/systemd/network/host.network
systemctl start systemd-networkd
/usr/lib/systemd/systemd-networkd-wait-online --timeout=60 || say "no network"
"""
SERVED = """served() {
	say "then: $(ls /dev | grep -c ublkb) ublk devices, $(dmsetup table $1-zfile0 | cut -d' ' -f3) over" \\
		"$(lsblk -n -o TYPE "/dev/block/$(dmsetup table $1-zfile0 | cut -d' ' -f4)" | head -n 1)"
}
"""
# What a system runs that pulls the image lazily: a service of systemd gives what is missing, and is killed.
LAZY = SERVED + NETWORK + """service=ovbd-fetch-next.service
ovbd --quiet pull --plain-http --lazy --limit 8M --jobs 1 --store /srv/lazy --up next REPOSITORY:2 >/srv/said 2>&1 ||
	say "pull: $(cat /srv/said)"
say "service: $(systemctl is-active $service)"
killed=$(systemctl show -P MainPID $service)
kill -9 $killed
mkdir -p /run/next
mount -o ro /dev/mapper/next /run/next
say "reads: $(chroot /run/next jq -n '6 * 7')"
while [ "$(systemctl show -P ActiveState $service)" = activating ]; do sleep 1; done
[ "$(systemctl show -P MainPID $service)" != $killed ] || say "not killed"
say "again: $(systemctl is-active $service)"
while [ "$(systemctl show -P ActiveState $service)" != inactive ]; do sleep 1; done
echo 3 >/proc/sys/vm/drop_caches
say "reads: $(chroot /run/next jq -n '6 * 7')"
served next
umount /run/next
ovbd down next
"""
# What a system runs that boots into an image which it is still pulling, with the kernel that runs. The process and the network
# outlast that, and the store is where it was. LVM's unit would unmount and remove devices on its way out. The new system comes
# to the same script.
LEAVE = NETWORK + """systemctl stop blk-availability
ovbd --quiet pull --plain-http --lazy --limit 3M --jobs 1 --store /srv/lazily --up lazy REPOSITORY:2 >/run/said 2>&1 ||
	say "pull: $(cat /run/said)"
systemctl show -P MainPID ovbd-fetch-lazy >/run/fetching
mkdir -p /run/nextroot
mount -o ro /dev/mapper/lazy /run/nextroot
mount --bind /srv /run/nextroot/srv
systemctl soft-reboot
exec sleep infinity
"""
ARRIVE = SERVED + """service=ovbd-fetch-lazy.service
say "service: $(systemctl is-active $service)"
[ "$(systemctl show -P MainPID $service)" = "$(cat /run/fetching)" ] || say "another process"
say "reads: $(jq -n '6 * 7')"
while [ "$(systemctl show -P ActiveState $service)" = active ]; do sleep 1; done
echo 3 >/proc/sys/vm/drop_caches
say "dpkg:$(dpkg --audit)$(dpkg --verify jq)"
served lazy
"""
BOOT_LAZILY = f"""if [ -e /run/fetching ]; then
{ARRIVE}else
{LEAVE}fi
"""
AT_LAST = "then: 0 ublk devices, zfile over loop"
LAZILY = ["service: active", "reads: 42", "again: active", "reads: 42", AT_LAST]
BOOTED_LAZILY = ["root /dev/mapper/lazy ext4", "table overlaybd", "service: active", "reads: 42", "dpkg:", AT_LAST]
# What the system runs that lives on the stack: all programs are read from the device that is replaced meanwhile.
PUBLISH = BOOTED + NETWORK + """number=0
while [ ! -e /run/enough ]; do
	number=$((number + 1))
	echo $number >/root/number.new
	sync /root/number.new
	mv /root/number.new /root/number
done &
apt_get() { apt-get -y --no-install-recommends "$@" >>/root/apt 2>&1 || say "apt: $(tail -n 5 /root/apt)"; }
while [ ! -e /run/enough ]; do
	apt_get install PACKAGES
	apt_get purge --autoremove PACKAGES
	echo >>/run/rounds
done &
push() {
	layer=$1; shift
	from=$(cat /root/number) written=$(stat -c %s /root/apt)
	ovbd --quiet push --plain-http --layer "/srv/$layer.zfile" "$@" root "REPOSITORY:$layer" >/srv/push 2>&1 ||
		say "push: $(cat /srv/push)"
	say "pushed $layer from $from to $(cat /root/number), apt wrote $(($(stat -c %s /root/apt) - written))"
}
while [ ! -e /run/rounds ]; do sleep 1; done
push 1 --cow /srv/store
touch /run/enough
wait
apt_get install PACKAGES
look
push 2
say "layers: $(dmsetup table root-lower2 | cut -d' ' -f3,4), below root: $(dmsetup table root-cow2 | cut -d' ' -f3)"
say "stores: $(cd /srv; echo store*) $(losetup -n -O BACK-FILE | grep -c -e /run/ovbd/memory)"
"""
PUBLISHED = r"""root /dev/mapper/root ext4
table linear
pushed 1 from (?P<begin>\d+) to (?P<end>\d+), apt wrote (?P<apt>\d+)
jq: 42
dpkg:
number: (?P<final>\d+)
pushed 2 from (?P=final) to (?P=final), apt wrote 0
layers: overlaybd 3, below root: snapshot
stores: store 0"""


def test(folder, boot):
    """`boot` starts a system from one of `folder`'s disks, with words for the kernel and arguments for QEMU, and returns
    what it reports."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        store = pathlib.Path(place) / "files/lib/ovbd"
        with docker_registry(f"{place}/registry") as port:
            name = f"127.0.0.1:{port}/vm/root"
            with base_layer(folder) as base:
                installed.run(installed.OVBD, "push", "-q", "--plain-http", base, f"{name}:0")
            script = PUBLISH.replace("PACKAGES", PACKAGES).replace("REPOSITORY", f"{HOST}:{port}/vm/root")
            report = with_script(folder, script, lambda disk: boot("stack.img", f"{STACK}:base.zfile rw", disk))
            first, final = published(report)
            script = LAZY.replace("REPOSITORY", f"{HOST}:{port}/vm/root")
            report = with_script(folder, script, lambda disk: boot("stack.img", f"{STACK}:base.zfile ro", disk))
            installed.expect(report[2:] == LAZILY, f"the system that pulled the image lazily reported {report}")
            script = BOOT_LAZILY.replace("REPOSITORY", f"{HOST}:{port}/vm/root")
            report = with_script(folder, script, lambda disk: boot("stack.img", f"{STACK}:base.zfile ro", disk))
            installed.expect(report[3:] == BOOTED_LAZILY, f"the system that booted from an image it still pulled reported {report}")
            for image in (1, 2):
                installed.run(installed.OVBD, "pull", "-q", "--plain-http", "--store", store, f"{name}:{image}")
        moment = number_of(folder, store, f"{name}:1")
        installed.expect(moment in first, f"the first image has the number {moment}, and was pushed between {first}")
        installed.run("sh", "-ec", 'truncate -s 2G "$1"; mkfs.ext4 -q -L layers -d "$0" "$1"', f"{place}/files",
                      folder / "elsewhere.img")
    report = with_script(folder, BOOTED + "look", lambda disk: boot("elsewhere.img", f"{STACK}:{name}:2 ro", disk))
    installed.expect(report == ["root /dev/mapper/root ext4", "table overlaybd", *LOOKS, f"number: {final}"],
                     f"elsewhere the system reported {report}")


def published(report):
    """Checks what the system said that pushed itself; returns the numbers that its first image may have, and the last."""
    text = "\n".join(report)
    wanted = re.fullmatch(PUBLISHED, text)
    installed.expect(wanted, f"the system that pushed itself reported:\n{text}")
    begin, end, first, final = (int(wanted[name]) for name in ("begin", "end", "apt", "final"))
    installed.expect(first > 0, "apt did nothing while the first image was pushed")
    installed.expect(begin < end, "nothing was written while the first image was pushed")
    return range(begin, end + 2), final


@contextlib.contextmanager
def base_layer(folder):
    """The layer on the disk."""
    with tempfile.TemporaryDirectory() as files:
        base = pathlib.Path(files) / "base.zfile"
        installed.run("debugfs", "-R", f"dump /base.zfile {base}", folder / "stack.img")
        yield base


def number_of(folder, store, image):
    """The number in the file system of an image, which needs no repair."""
    raw = folder / "raw"
    installed.run(installed.OVBD, "export", "-q", "--store", store, "-o", raw, image)
    try:
        installed.run("e2fsck", "-fn", raw)
        return int(installed.run("debugfs", "-R", "cat /root/number", raw).splitlines()[-1])
    finally:
        raw.unlink()


def with_script(folder, script, work):
    """Does something with the arguments of QEMU for a disk with a script."""
    disk = folder / "work.img"
    with tempfile.TemporaryDirectory() as files:
        (pathlib.Path(files) / "script").write_text(script)
        installed.run("sh", "-ec", 'truncate -s 2G "$1"; mkfs.ext4 -q -L "$2" -d "$0" "$1"', files, disk, LABEL)
    try:
        return work(["-drive", f"file={disk},if=virtio,format=raw,cache=unsafe", "-netdev", "user,id=network", "-device",
                     "virtio-net-pci,netdev=network,romfile="])
    finally:
        disk.unlink()
