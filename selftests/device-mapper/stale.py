#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Modules that were built for another kernel of the same release are refused, and the log says why.

They are made of the module that was built for this kernel: as the build of another version (`uname -v`), and as one
that knows another size of a C structure, which the loader compares where the kernel has its types (BTF)."""

import os
import struct
import subprocess
import sys

sys.path.insert(0, os.environ["SRC"] + "/selftests/lib")
from test_script import MODULES, SCRATCH, Tap, run

NAME = "dm-rust-linear"
BUILT = MODULES / "selftests/dm-linear-twin" / f"{NAME}.ko"
STRUCTURE = b"completion"
BTF_KIND_STRUCT = 4


def section(module, wanted):
    """Offset and size of an ELF section, or None."""
    table, = struct.unpack_from("<Q", module, 0x28)
    entry, count, names = struct.unpack_from("<3H", module, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", module, table + number * entry) for number in range(count)]
    for name, _, _, _, offset, size in headers:
        begin = headers[names][4] + name
        if module[begin:module.index(0, begin)] == wanted:
            return offset, size
    return None


def resize_structure(module, base):
    """Makes `STRUCTURE` larger in what the module notes of the kernel's types, see Documentation/bpf/btf.rst."""
    length, types, types_length, strings = struct.unpack_from("<4I", module, base + 4)
    strings += base + length
    # These have more behind the common header, and a structure that is only noted has no members.
    more = {1: lambda _: 4, 6: lambda count: 8 * count, 19: lambda count: 12 * count}
    place = base + length + types
    end = place + types_length
    while place < end:
        name, info, size = struct.unpack_from("<3I", module, place)
        kind, members = info >> 24 & 0x1F, info & 0xFFFF
        if kind == BTF_KIND_STRUCT and module.startswith(STRUCTURE + b"\0", strings + name):
            struct.pack_into("<I", module, place + 8, size + 8)
            return True
        place += 12 + more.get(kind, lambda _: 0)(members)
    return False


def load(module):
    """Loads a module from its bytes; returns what insmod said, empty if it was loaded, and the kernel's log of it."""
    path = SCRATCH / f"{NAME}.ko"
    path.write_bytes(module)
    run("dmesg", "--clear")
    result = subprocess.run(["insmod", path], stderr=subprocess.PIPE, text=True)
    log = run("dmesg")
    if result.returncode == 0:
        run("rmmod", NAME)
    return result.stderr.strip(), log


tap = Tap()
run("modprobe", "dm-mod")
sound = BUILT.read_bytes()
tap.equal(load(sound)[0], "", "the module is loaded into the kernel that it was built for")

version = os.uname().version
other = version[:-1] + "?"
tap.equal(sound.count(version.encode() + b"\0"), 1, "it holds the version of the kernel once")
said, log = load(sound.replace(version.encode(), other.encode()))
tap.result("Invalid module format" in said, "another version: refused", said)
tap.result(f'built for the kernel "{other}", but this is "{version}"' in log, "another version: the log names both", log)

if os.path.exists("/sys/kernel/btf/vmlinux"):
    module = bytearray(sound)
    place = section(module, b".BTF.base")
    tap.result(place and resize_structure(module, place[0]), "types: the module notes those of the kernel that it uses")
    said, log = load(module)
    tap.result("Invalid" in said, "types: another size is refused", said)
    tap.result("failed to validate module [dm_rust_linear] BTF" in log, "types: the log says so", log)
tap.finish()
