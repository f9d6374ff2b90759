# SPDX-License-Identifier: GPL-2.0
"""Starts User Mode Linux with the toolchain root as its root file system, read-only, so that it sees the checkout at
its own path and can damage nothing. Looks like vm.Guest from outside.
"""

import os
import pathlib
import selectors
import shlex
import signal
import subprocess
import tempfile
import time

MEMORY = "1500M"
# What the guest prints when the command has ended.
EXIT = "uml-exit-status"
INIT = """#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
mount -t debugfs debug /sys/kernel/debug
mount -t cgroup2 cgroup /sys/fs/cgroup
ln -s /proc/self/fd /dev/fd
stty -opost -echo </dev/console
cd {directory}
{command} </dev/null
echo {exit} $?
busybox poweroff -f
"""


class Guest:
    """One run of `kernel` that runs `command` (a shell line) as root.

    Iterating gives the lines of its standard output. `status` is the command's exit status afterwards, or None where
    the guest died or was killed; then `why` says so.
    """

    def __init__(self, kernel, command, console, silence):
        self.console = pathlib.Path(console)
        self.silence = silence
        self.status = None
        self.why = None
        self._kernel = kernel
        self._command = command

    def __iter__(self):
        self.console.parent.mkdir(parents=True, exist_ok=True)
        with (open(self.console, "wb") as console,
              tempfile.NamedTemporaryFile("w", prefix="init", dir=self._kernel.modules, delete_on_close=False) as init):
            init.write(INIT.format(directory=shlex.quote(os.getcwd()), command=self._command, exit=EXIT))
            os.chmod(init.name, 0o755)
            init.close()
            command = [str(self._kernel.program), f"mem={MEMORY}", "ncpus=2", "seccomp=on", "root=/dev/root",
                       "rootfstype=hostfs", "rootflags=/", "ro", f"init={init.name}", "con=null",
                       "con0=null,fd:1", "stderr=1", "console=tty0", "loglevel=5", "kunit.enable=1"]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                       stderr=subprocess.PIPE, start_new_session=True)
            try:
                yield from self._lines(process, console)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if self.status is None and self.why is None:
            self.why = "the guest died (its console shows how)"

    def _lines(self, process, console):
        partial = b""
        heard = time.monotonic()
        with selectors.DefaultSelector() as ready:
            ready.register(process.stdout, selectors.EVENT_READ)
            ready.register(process.stderr, selectors.EVENT_READ)
            while ready.get_map():
                for key, _ in ready.select(timeout=1):
                    data = os.read(key.fd, 65536)
                    if not data:
                        ready.unregister(key.fileobj)
                        continue
                    console.write(data)
                    console.flush()
                    if key.fileobj is process.stderr:
                        continue
                    heard = time.monotonic()
                    *lines, partial = (partial + data).split(b"\n")
                    for line in lines:
                        text = line.decode(errors="replace").rstrip("\r")
                        if text.startswith(EXIT):
                            self.status = int(text.split()[1])
                        else:
                            yield text
                if time.monotonic() - heard > self.silence:
                    self.why = f"the guest was silent for {self.silence} s and was killed"
                    os.killpg(process.pid, signal.SIGKILL)
                    break
        process.wait()
