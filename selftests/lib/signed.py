# SPDX-License-Identifier: GPL-2.0
"""Keys and signatures of root hashes, made by openssl."""

from test_script import SCRATCH, run


def make_key(name):
    """A new key and its certificate; returns the files."""
    key, certificate = SCRATCH / f"{name}.key", SCRATCH / f"{name}.pem"
    run("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-subj", f"/CN={name}",
        "-keyout", key, "-out", certificate)
    return key, certificate


def flip(path, place):
    """Changes a bit of a file."""
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))
