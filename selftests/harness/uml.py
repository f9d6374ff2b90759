# SPDX-License-Identifier: GPL-2.0
"""Starts User Mode Linux with the toolchain root as its root file system, read-only, so that it sees the checkout at
its own path and can damage nothing. Looks like vm.Guest from outside.
"""

import os
import shlex
import subprocess
import tempfile

from guest_process import GuestProcess

MEMORY = os.environ.get("OVBD_UML_MEMORY", "1500M")
# What the guest prints when the command has ended.
EXIT = "uml-exit-status"
INIT = """#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /var/tmp
mount -t debugfs debug /sys/kernel/debug
mount -t cgroup2 cgroup /sys/fs/cgroup
ln -s /proc/self/fd /dev/fd
stty -opost -echo </dev/console
cd {directory}
{command} </dev/null
echo {exit} $?
busybox poweroff -f
"""


class Guest(GuestProcess):
    """One run of `kernel` that runs `command` (a shell line) as root."""

    def __init__(self, kernel, command, console, silence):
        super().__init__(console, silence)
        self._kernel = kernel
        self._command = command

    def __iter__(self):
        with tempfile.NamedTemporaryFile("w", prefix="init", dir=self._kernel.modules, delete_on_close=False) as init:
            init.write(INIT.format(directory=shlex.quote(os.getcwd()), command=self._command, exit=EXIT))
            os.chmod(init.name, 0o755)
            init.close()
            command = [str(self._kernel.program), f"mem={MEMORY}", "seccomp=on", "root=/dev/root",
                       "rootfstype=hostfs", "rootflags=/", "ro", f"init={init.name}", "con=null",
                       "con0=null,fd:1", "stderr=1", "console=tty0", "loglevel=5", "kunit.enable=1",
                       "kunit.autorun=1"]
            for line in self._run(command, subprocess.DEVNULL, console_has_output=True):
                if line.startswith(EXIT):
                    self.status = int(line.split()[1])
                else:
                    yield line
        if self.status is None and self.why is None:
            self.why = "the guest died (its console shows how)"
