# SPDX-License-Identifier: GPL-2.0
"""What the tests of sealed stacks share: keys, damage, and what of a device cannot be read."""

from block_devices import read_direct
from test_script import SCRATCH, run

# Of dm-verity's blocks.
BLOCK = 4096


def make_key(name):
    """A new key and its certificate; returns the files."""
    key, certificate = SCRATCH / f"{name}.key", SCRATCH / f"{name}.pem"
    run("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-subj", f"/CN={name}",
        "-keyout", key, "-out", certificate)
    return key, certificate


def failed_blocks(device, size):
    """The blocks that cannot be read. Past the page cache, which would read more than it is asked for."""
    failed = []
    for block in range(size // BLOCK):
        try:
            read_direct(device, block * BLOCK, BLOCK)
        except OSError:
            failed.append(block)
    return failed


def verity_table(device, size, superblock, root):
    """The table of dm-verity over a sealed device with an image of so many bytes, as its superblock says."""
    blocks, salt = size // BLOCK, superblock[88:88 + int.from_bytes(superblock[80:82], "little")]
    return (f"0 {size // 512} verity 1 {device} {device} {BLOCK} {BLOCK} {blocks} {blocks + 1} sha256 {root} "
            f"{salt.hex()}")


def flip(path, place):
    """Changes a bit of a file."""
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))
