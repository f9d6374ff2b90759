# SPDX-License-Identifier: GPL-2.0
"""The life of a target's module: loaded by the target's name, kept while a device uses it, and unloaded."""

import os
import subprocess

from block_devices import Devices, read_direct
from test_script import MODULES, run


def loaded(module):
    return any(line.startswith(module.replace("-", "_") + " ") for line in open("/proc/modules"))


def unload(module):
    """Whether the module could be unloaded."""
    return subprocess.run(["rmmod", module], stderr=subprocess.DEVNULL).returncode == 0


def versions(target):
    """The versions in which `dmsetup targets` has the target: one, or none."""
    return [words[1] for words in map(str.split, run("dmsetup", "targets").splitlines()) if words[0] == target]


def check_autoload(tap, module, table, content):
    """Device mapper asks modprobe for the module by name; its configuration stands in for an installed module."""
    if loaded(module):
        unload(module)
    configuration = f"/run/modprobe.d/{module}-test.conf"
    os.makedirs(os.path.dirname(configuration), exist_ok=True)
    with open(configuration, "w") as file:
        file.write(f"install {module} /sbin/insmod {MODULES / module / module}.ko\n")
    with Devices() as devices:
        try:
            tap.result(not loaded(module), "autoload: the module is not loaded before")
            node = devices.map("autoloaded", table)
        finally:
            os.remove(configuration)
        tap.result(loaded(module), "autoload: dmsetup create loads it")
        tap.result(not unload(module) and loaded(module), "unload: refused while a device exists")
        tap.result(read_direct(node, 0, len(content)) == content, "autoload: content")
    tap.result(unload(module) and not loaded(module), "unload: works when the device is gone")
