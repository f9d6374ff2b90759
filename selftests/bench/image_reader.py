# SPDX-License-Identifier: GPL-2.0
"""In one of several guests: mounts the image that the guest got, reads and maps all files, and says by how much the page
cache has grown. Goes on saying so until the guest is ended."""

import json
import mmap
import os
import pathlib
import sys
import time

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
import dm_ioctl
from block_devices import sectors
from pmem import cached, has_dax
from test_script import OVBD, SCRATCH, load, run


def layer_disk():
    """The virtio disk with the layer."""
    for serial in pathlib.Path("/sys/block").glob("vd*/serial"):
        if serial.read_text().strip() == "layer":
            return f"/dev/{serial.parent.name}"
    raise OSError("no disk with the layer")


def device(way):
    if way == "virtio-pmem":
        for module in ("virtio_pmem", "nd_pmem"):
            run("modprobe", module)
        for _ in range(100):
            if any(name.startswith("pmem") for name in os.listdir("/dev")):
                break
            time.sleep(0.1)
        return run(OVBD, "up", "--dax", "image").strip()
    disk = layer_disk()
    bytes_ = sectors(disk) * 512
    size = json.loads(run(OVBD, "info", "--json", disk))["virtual_bytes"]
    dm_ioctl.Mapped("image", f"0 {size // 512} overlaybd 1 {disk} {bytes_}")
    return "/dev/mapper/image" if os.path.exists("/dev/mapper/image") else "/dev/dm-0"


def main(way):
    run("modprobe", "erofs")
    load("dm-overlaybd")
    top = SCRATCH / "image"
    top.mkdir()
    run("mount", "-o", "ro,dax=always" if way == "virtio-pmem" else "ro", device(way), top)
    pathlib.Path("/proc/sys/vm/drop_caches").write_text("3")
    before = cached()
    for file in sorted(top.iterdir()):
        assert has_dax(file) == (way == "virtio-pmem"), f"{file}: direct access"
        with open(file, "rb", buffering=0) as opened:
            while opened.read(1 << 20):
                pass
            with mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as view:
                view[::4096]
    grown = max(0, cached() - before)
    while True:
        print(json.dumps({"cached": grown}), flush=True)
        time.sleep(1)


main(sys.argv[1])
