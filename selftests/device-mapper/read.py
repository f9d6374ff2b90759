#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Reads of constructors: any range of bytes, any logical block size, many at once, and devices that fail."""

import os
import sys
import time

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
from block_devices import Devices
from linear_twin import load, loop, twin
from test_script import Tap, run

SIZE = 2 << 20


def crcs(device, *ranges):
    """The checksums that a constructor gets of ranges, each a byte and a length, or the errors instead."""
    options = [word for offset, length in ranges for word in ("read", offset, length)]
    with twin(f"0 8 rust-linear {device} 0 {len(options)} {' '.join(map(str, options))}") as mapped:
        return mapped.status().split()[11:]


tap = Tap()
tap.attempt("module loads", load)
with Devices() as devices:
    content = bytearray(os.urandom(SIZE))
    # The checksum of a known text, wherever it is.
    known = [0, 11, 505, 1019, 4090, 65536, 131069, SIZE - 9]
    for offset in known:
        content[offset:offset + 9] = b"123456789"
    lower, _ = loop(devices, content)
    lower4k, _ = loop(devices, content, "--sector-size", 4096)
    wanted = ["e3069283"] * len(known)
    ranges = [(offset, 9) for offset in known]
    tap.equal(crcs(lower, *ranges), wanted, "nine bytes at odd places")
    tap.equal(crcs(lower4k, *ranges), wanted, "the same with blocks of 4096 bytes")

    # The same bytes give the same checksum: cut out of the device they are at the start of another one.
    for offset, length in ((1, 130000), (511, 131073), (4095, 262145), (77, 1234567), (0, SIZE)):
        with Devices() as inner:
            part = bytes(content[offset:offset + length])
            cut, _ = loop(inner, part + bytes(-len(part) % 512))
            wanted = crcs(cut, (0, length))
        got = crcs(lower, (offset, length)) + crcs(lower4k, (offset, length))
        tap.equal(got, 2 * wanted, f"{length} bytes at {offset}")

    tap.equal(crcs(lower, (5, 0)), ["00000000"], "nothing at all")
    tap.equal(crcs(lower, (SIZE - 8, 9)), ["-22"], "one byte too far: EINVAL")
    far = (1 << 64) - 1
    tap.equal(crcs(lower, (far, 1), (far, 9)), ["-22", "-22"], "far away: EINVAL")

    # More requests than fit into flight at once, in disorder, one of them wrong
    starts = [number * 7919 % 100 * 20000 for number in range(80)]
    batch = crcs(lower, *((start, 20001) for start in starts), (SIZE, 1))
    tap.equal(len(batch), 81, "batch of 81 requests")
    for number in (0, 43, 79):
        tap.equal([batch[number]], crcs(lower, (starts[number], 20001)), f"number {number} of the batch")
    tap.equal(batch[80], "-22", "the wrong one")

    # A device with a bad place: only what touches it fails.
    with twin(f"0 2048 linear {lower} 0\n2048 8 error\n2056 2040 linear {lower} 2056", "t-hole") as hole:
        good = crcs(lower, (0, 1 << 20)) + ["-5", "-5"] + crcs(lower, (1052672, 512))
        got = crcs(hole.node, (0, 1 << 20), (1 << 20, 1), (1000000, 100000), (1052672, 512))
        tap.equal(got, good, "bad sectors: only their requests fail")

    # Requests overlap: 60 of them on a device that takes half a second for each.
    run("modprobe", "dm-delay")
    with twin(f"0 4096 delay {lower} 0 500", "t-slow") as slow:
        start = time.monotonic()
        got = crcs(slow.node, *((number * 512, 512) for number in range(60)))
        print(f"# 60 reads of 0.5 s took {time.monotonic() - start:.1f} s", flush=True)
    tap.equal(got, crcs(lower, *((number * 512, 512) for number in range(60))), "a slow device")
tap.finish()
