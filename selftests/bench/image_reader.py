# SPDX-License-Identifier: GPL-2.0
"""In one of several guests: mounts the image that the guest got, reads and maps all files, and says by how much the page
cache has grown. With `write` it then writes to the memory, as any guest's root can, which the image must survive. Goes on
saying what it has found until the guest is ended."""

import json
import mmap
import os
import pathlib
import random
import sys
import time

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
import dm_ioctl
from block_devices import sectors
from pmem import HUGE, cached, has_dax
from test_script import OVBD, SCRATCH, load, run


def layer_disk():
    """The virtio disk with the layer."""
    for serial in pathlib.Path("/sys/block").glob("vd*/serial"):
        if serial.read_text().strip() == "layer":
            return f"/dev/{serial.parent.name}"
    raise OSError("no disk with the layer")


def virtio_memory():
    """The device with the layer in memory, or None. The guest may have other memory too."""
    for name in os.listdir("/sys/class/block"):
        if name.startswith("pmem") and "/virtio" in os.path.realpath(f"/sys/class/block/{name}"):
            return f"/dev/{name}"
    return None


def device(way):
    if way == "virtio-pmem":
        for module in ("virtio_pmem", "nd_pmem"):
            run("modprobe", module)
        while not virtio_memory():
            time.sleep(0.1)
        return run(OVBD, "up", "--dax", "image").strip()
    disk = layer_disk()
    bytes_ = sectors(disk) * 512
    size = json.loads(run(OVBD, "info", "--json", disk))["virtual_bytes"]
    return dm_ioctl.Mapped("image", f"0 {size // 512} overlaybd 1 {disk} {bytes_}").node


def overwrite(files):
    """Writes over the device with the layer; returns which files are not what they were then."""
    before = [file.read_bytes() for file in files]
    with open(virtio_memory(), "r+b", buffering=0) as disk:
        # Where its data begins: some of each file.
        for at in range(HUGE, os.path.getsize(files[0]) * len(files), HUGE):
            disk.seek(at)
            disk.write(random.randbytes(4096))
        try:
            os.fsync(disk.fileno())
        except OSError:
            # It may be told, and need not be.
            pass
    return [file.name for file, data in zip(files, before) if file.read_bytes() != data]


def main(way, write=None):
    run("modprobe", "erofs")
    load("dm-overlaybd")
    top = SCRATCH / "image"
    top.mkdir()
    run("mount", "-o", "ro,dax=always" if way == "virtio-pmem" else "ro", device(way), top)
    pathlib.Path("/proc/sys/vm/drop_caches").write_text("3")
    before = cached()
    files = sorted(top.iterdir())
    for file in files:
        assert has_dax(file) == (way == "virtio-pmem"), f"{file}: direct access"
        with open(file, "rb", buffering=0) as opened:
            while opened.read(1 << 20):
                pass
            with mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as view:
                view[::4096]
    grown = max(0, cached() - before)
    changed = overwrite(files) if write else []
    while True:
        print(json.dumps({"cached": grown, "changed": changed}), flush=True)
        time.sleep(1)


main(*sys.argv[1:])
