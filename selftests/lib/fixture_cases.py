# SPDX-License-Identifier: GPL-2.0
"""The test cases of a folder: layers that the original library wrote, with what a reader must make of them."""

import gzip
import hashlib
import json
import os
import pathlib
import shutil

from block_devices import read_direct
from test_script import SCRATCH, SOURCE

FIXTURES = SOURCE.parent / "shared" / "fixtures"
# Larger devices are checked by their probes alone.
WHOLE_DEVICE_LIMIT = 128 << 20


def cases(directory=None):
    """The test cases below a directory: pairs of path and case.json's content."""
    directory = pathlib.Path(directory or os.environ.get("CASES") or FIXTURES)
    return [(path.parent, json.loads(path.read_text())) for path in sorted(directory.glob("*/case.json"))]


def blob(directory, layer):
    """Path, offset and length of a layer's blob, in bytes; ValueError where the tar wrapper is damaged."""
    path = (directory / layer["file"]).resolve()
    if layer.get("stored_as"):
        path = SCRATCH / "unpacked"
        with gzip.open(directory / layer["stored_as"]) as packed, open(path, "wb") as file:
            shutil.copyfileobj(packed, file)
    if layer["tar"] not in (True, "ustar"):
        return path, 0, path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(1536)
    # The size is in a pax record of the wrapper, else in octal in its header.
    pax = layer["tar"] is True
    for header in [head[:512], head[1024:1536]] if pax else [head[:512]]:
        if sum(header[:148] + b" " * 8 + header[156:]) != int(header[148:156].strip(b" \0"), 8):
            raise ValueError("tar checksum")
    if pax:
        return path, 1536, int(head[512:1024].split(b"size=")[1].split(b"\n")[0])
    return path, 512, int(head[124:135], 8)


def probe_errors(device, probes):
    """The probes of a case that the device does not answer as written; empty where all agree."""
    wrong = []
    for probe in probes:
        try:
            data = read_direct(device, probe["offset"], probe["length"])
        except OSError as error:
            wrong.append(f"offset {probe['offset']}: {error}")
            continue
        if hashlib.sha256(data).hexdigest() != probe["sha256"]:
            wrong.append(f"offset {probe['offset']} length {probe['length']}: other bytes")
    return wrong
