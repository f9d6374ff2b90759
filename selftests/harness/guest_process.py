# SPDX-License-Identifier: GPL-2.0
"""What the two kinds of guests have in common: a process whose standard output arrives line by line while its kernel
console goes to a file, and that is killed where it says nothing for too long.
"""

import contextlib
import os
import pathlib
import selectors
import signal
import subprocess
import time


def keep_priority():
    """For a child that starts a session, which the kernel schedules as a group: the group gets the child's own
    niceness, which it would not count otherwise. See sched(7), autogroups."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/autogroup").write_text(str(os.nice(0)))


class GuestProcess:
    """One boot that runs one command.

    Iterating gives the lines of the command's standard output. `status` is its exit status afterwards, or None where
    the guest died or was killed; then `why` says so.
    """

    def __init__(self, console, silence):
        self.console = pathlib.Path(console)
        self.silence = silence
        self.status = None
        self.why = None

    def _run(self, command, stdin, console_has_output):
        """Starts the guest and gives its lines; returns the exit status of the process.

        The file gets what comes on standard error, and where `console_has_output` all the rest too.
        """
        self.console.parent.mkdir(parents=True, exist_ok=True)
        with open(self.console, "wb", buffering=0) as console:
            process = subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                       start_new_session=True, preexec_fn=keep_priority)
            try:
                yield from self._lines(process, console, console_has_output)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        return process.returncode

    def _lines(self, process, console, console_has_output):
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
                    if console_has_output or key.fileobj is process.stderr:
                        console.write(data)
                    if key.fileobj is process.stdout:
                        heard = time.monotonic()
                        *lines, partial = (partial + data).split(b"\n")
                        yield from (line.decode(errors="replace").rstrip("\r") for line in lines)
                if time.monotonic() - heard > self.silence:
                    self.why = f"the guest was silent for {self.silence} s and was killed"
                    os.killpg(process.pid, signal.SIGKILL)
                    break
        process.wait()
