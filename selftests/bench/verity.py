# SPDX-License-Identifier: GPL-2.0
"""dm-verity over a sealed stack of compressed layers and over a plain device with the same bytes.

The figures of a row: `random`, 4 KiB direct reads; `sequential`, 1 MiB direct reads, for each MiB. What dm-zfile and
dm-overlaybd add below dm-verity is to be what they add without it.
"""

import dm_ioctl
import zfile_writer
from measure import DATA, ram_disk, random_reads, require_content, row, sequential_reads, write_image
from sealed_stacks import BLOCK, verity_table
from test_script import load, run

SUITE = "verity"


def reads(name, device, length):
    """The row of a device that begins with the content."""
    require_content(device)
    part = f"--length={length}"
    row(SUITE, name, random=random_reads(device, part, "--direct"),
        sequential=sequential_reads(device, part, "--direct"))


def main(_chosen):
    load("dm-zfile", "dm-overlaybd")
    run("modprobe", "dm-verity")
    length = (DATA / "data").stat().st_size
    whole = write_image(ram_disk(0), DATA / "sealed/image")
    with open(DATA / "sealed/image", "rb") as image:
        image.seek(length)
        superblock = image.read(BLOCK)
    root = (DATA / "sealed/seal.zfile.roothash").read_text()
    with dm_ioctl.Mapped("bench", f"0 {whole // 512} linear {ram_disk(0)} 0") as linear:
        reads("dm-linear", linear.node, length)
        with dm_ioctl.Mapped("bench-verity", verity_table(linear.node, length, superblock, root)) as device:
            reads("dm-verity on dm-linear", device.node, length)
    table = f"0 {whole // 512} overlaybd 2"
    files = [DATA / "sealed/base.zfile", DATA / "sealed/seal.zfile"]
    zfiles = []
    for number, file in enumerate(files, 1):
        stored = write_image(ram_disk(number), file)
        original = zfile_writer.original_bytes(file.read_bytes())
        zfiles.append(dm_ioctl.Mapped(f"bench-{number}", f"0 {-(-original // 512)} zfile {ram_disk(number)} {stored}"))
        table += f" {zfiles[-1].node} {original}"
    with zfiles[0], zfiles[1], dm_ioctl.Mapped("bench", table) as stack:
        reads("dm-overlaybd and dm-zfile", stack.node, length)
        with dm_ioctl.Mapped("bench-verity", verity_table(stack.node, length, superblock, root)) as device:
            reads("dm-verity on dm-overlaybd and dm-zfile", device.node, length)

