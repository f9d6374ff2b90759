# SPDX-License-Identifier: GPL-2.0
"""Volume groups on loop devices and thin pools, for the tests of logical volumes."""

import json
import mmap
import os
import pathlib
import re
import subprocess

from block_devices import sha256
from ovbd_command import ovbd
from test_script import SCRATCH, run

MIB = 1 << 20
# Where the images of volumes are pushed to.
LAYOUT = SCRATCH / "images"
CHUNK = 64 << 10

# LVM with files of its own, no daemon, and no udev.
CONFIG = """
devices {{ dir="/dev" scan=["/dev"] filter=["a|^/dev/loop|", "r|.*|"] use_devicesfile=0 }}
activation {{ udev_sync=0 udev_rules=0 monitoring=0 thin_pool_autoextend_threshold=100 }}
global {{ event_activation=0 use_lvmpolld=0 locking_dir="{run}" }}
backup {{ backup=0 archive=0 }}
"""


def set_up_lvm():
    """Where LVM looks for its configuration from now on."""
    folder = SCRATCH / "lvm"
    folder.mkdir()
    (folder / "lvm.conf").write_text(CONFIG.format(run=SCRATCH))
    os.environ["LVM_SYSTEM_DIR"] = str(folder)


class Group:
    """A volume group on a loop device over a sparse file, removed when the scope `devices` is left."""

    def __init__(self, devices, name, megabytes, *options):
        self.name = name
        file = SCRATCH / f"{name}.pv"
        with open(file, "wb") as pv:
            pv.truncate(megabytes * MIB)
        device = run("losetup", "--show", "--find", file).strip()
        devices.undo(lambda: run("losetup", "--detach", device))
        run("vgcreate", "--quiet", *options, name, device)
        devices.undo(lambda: run("vgchange", "--activate", "n", name))

    def pool(self, name, megabytes, *options):
        """A thin pool."""
        run("lvcreate", "--yes", "--size", f"{megabytes}m", "--thinpool", name, *options, self.name)

    def thin(self, name, megabytes, pool="pool", *options):
        """A thin volume; returns its node."""
        run("lvcreate", "--yes", "--wipesignatures", "n", "--virtualsize", f"{megabytes}m", "--thin", "--name", name,
            *options, f"{self.name}/{pool}")
        return self.node(name)

    def snapshot(self, origin, name, *options):
        """A thin snapshot."""
        run("lvcreate", "--snapshot", "--name", name, *options, f"{self.name}/{origin}")

    def node(self, name):
        """The node of a volume while it is active."""
        return pathlib.Path("/dev", self.name, name)

    def sha256(self, name):
        """Of what a volume holds, which is active only meanwhile if it was not before."""
        active = self.fields(name)["lv_active"] == "active"
        if not active:
            run("lvchange", "--activate", "y", "--ignoreactivationskip", f"{self.name}/{name}")
        try:
            subprocess.run(["blockdev", "--flushbufs", self.node(name)], check=True)
            return sha256(self.node(name))
        finally:
            if not active:
                run("lvchange", "--activate", "n", f"{self.name}/{name}")

    def fields(self, name):
        """What LVM says of a volume, or None if there is none."""
        return self.all().get(name)

    def all(self):
        """What LVM says of all volumes, by name."""
        text = run("lvs", "--reportformat", "json", "--options",
                   "lv_name,lv_tags,lv_active,lv_permissions,lv_size,origin,data_percent,zero", "--units", "b",
                   "--nosuffix", self.name)
        return {row["lv_name"]: row for row in json.loads(text)["report"][0]["lv"]}

    def tags(self, name):
        """Our tags of a volume."""
        found = self.fields(name)["lv_tags"].split(",")
        return {name: value for name, _, value in (tag.partition("=") for tag in found) if name.startswith("ovbd.")}

    def uuid(self, name):
        """The UUID of a volume."""
        return run("lvs", "--noheadings", "--options", "lv_uuid", f"{self.name}/{name}").strip()

    def target(self, pool="pool"):
        """The name that device-mapper has for a pool, for messages and its status."""
        return f"{self.name.replace('-', '--')}-{pool.replace('-', '--')}-tpool"

    def held(self, pool="pool"):
        """Whether the pool has a metadata snapshot."""
        return run("dmsetup", "status", self.target(pool)).split()[6] != "-"


def push_to(reference, *words):
    """Pushes an image; returns what was said."""
    return json.loads(ovbd("push", "--json", *words, reference))


def push(name, *words):
    """Pushes to the layout under `name`; returns what was said."""
    return push_to(f"oci:{LAYOUT}:{name}", *words)


def image_content(name):
    """Size and SHA-256 of what an image holds, read by another path: exported."""
    raw = SCRATCH / "image.raw"
    ovbd("export", f"oci:{LAYOUT}:{name}", "-o", raw)
    try:
        return raw.stat().st_size, sha256(raw)
    finally:
        raw.unlink()


def left(group, pool="pool"):
    """What a verb must not leave: active snapshots, volumes that are not complete, a metadata snapshot."""
    found = [name for name, row in group.all().items()
             if "ovbd.partial" in row["lv_tags"] or (row["lv_permissions"] == "read-only" and row["lv_active"] == "active")]
    return found + ["a metadata snapshot"] * group.held(pool)


def changed_chunks(vg, pool, old, new):
    """What thin_delta says of a pool, by the name that device-mapper has for it: ranges in bytes of chunks that the newer
    snapshot has and the older one does not."""
    rows = json.loads(run("lvs", "--reportformat", "json", "--options", "lv_name,thin_id", vg))["report"][0]["lv"]
    ids = {row["lv_name"]: row["thin_id"] for row in rows}
    run("dmsetup", "message", pool, "0", "reserve_metadata_snap")
    text = run("thin_delta", "-m", "--thin1", ids[old], "--thin2", ids[new],
               f"/dev/mapper/{pool.removesuffix('-tpool')}_tmeta")
    run("dmsetup", "message", pool, "0", "release_metadata_snap")
    chunk = int(re.search(r'data_block_size="(\d+)"', text)[1]) * 512
    found = re.findall(r'<(?:different|right_only) begin="(\d+)" length="(\d+)"', text)
    return [(int(begin) * chunk, int(length) * chunk) for begin, length in found]


def read_ranges(node, ranges):
    """The content of ranges of a device, past the page cache: where each piece begins, and its bytes."""
    descriptor = os.open(node, os.O_RDONLY | os.O_DIRECT)
    with mmap.mmap(-1, MIB) as memory, memoryview(memory) as buffer:
        for start, length in ranges:
            for at in range(start, start + length, MIB):
                count = os.preadv(descriptor, [buffer[:min(MIB, start + length - at)]], at)
                yield at, bytes(buffer[:count])
    os.close(descriptor)


def overwrite_random(node, generator, size, count):
    """Overwrites random parts of a device of `size` bytes, which need not be able to discard."""
    descriptor = os.open(node, os.O_WRONLY)
    for _ in range(count):
        length = generator.randrange(1, 20) * 4096
        os.pwrite(descriptor, generator.randbytes(length), generator.randrange((size - length) // 4096) * 4096)
    os.fsync(descriptor)
    os.close(descriptor)


def write_random(node, generator, size, count, aligned=4096):
    """Overwrites and discards random parts of a device of `size` bytes."""
    descriptor = os.open(node, os.O_WRONLY)
    try:
        for _ in range(count):
            length = generator.randrange(1, 40) * aligned
            start = generator.randrange((size - length) // aligned) * aligned
            kind = generator.randrange(4)
            if kind == 0:
                length = generator.randrange(1, 8) * CHUNK
                start = generator.randrange((size - length) // CHUNK) * CHUNK
                subprocess.run(["blkdiscard", "--offset", str(start), "--length", str(length), node], check=True)
            elif kind == 1:
                os.pwrite(descriptor, bytes(length), start)
            else:
                data = generator.randbytes(length) if kind == 2 else b"text" * (length // 4)
                os.pwrite(descriptor, data, start)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
