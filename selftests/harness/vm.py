# SPDX-License-Identifier: GPL-2.0
"""Boots the stock kernel with virtme-ng: the toolchain root is the guest's root file system, read-only below an
overlay, so a guest sees the checkout at its own path and can damage nothing.

The guest's standard output arrives line by line; its kernel console goes to a file. A guest that says nothing for
too long is killed.
"""

import functools
import os
import pathlib
import selectors
import signal
import subprocess
import tempfile
import time

from cache import Failure

# Seconds that a real kernel may take to print its banner when the accelerator works.
KVM_PROBE = 20
MEMORY = "3G"
EMULATION = ["--disable-kvm"]
# A CPU with the instruction that the kernel's crc32c() wants, which the emulator's default lacks. Named, so that it
# stays what it is when the emulator learns more.
COUNTED_CPU = "Nehalem"
# The guest's clock advances by a nanosecond with every instruction, and jumps where nothing is to be done.
COUNT_INSTRUCTIONS = ["--cpus", "1", f"--qemu-opts=-icount shift=0,sleep=off -cpu {COUNTED_CPU}"]


@functools.cache
def accelerator_arguments(vmlinuz):
    """The vng arguments for KVM where it really runs a kernel, else for emulation (TCG)."""
    if _kvm_runs_kernel(vmlinuz):
        print("==> guests run under KVM", flush=True)
        return []
    print("==> guests run under emulation (TCG): KVM is missing or cannot run a kernel here", flush=True)
    return EMULATION


def _kvm_runs_kernel(vmlinuz):
    """Boots the kernel without a root file system: its panic shows that code runs under KVM.

    A /dev/kvm that opens is not enough; in nested set-ups it can accept a guest and never run it.
    """
    if os.environ.get("OVBD_ACCEL") in ("kvm", "tcg"):
        return os.environ["OVBD_ACCEL"] == "kvm"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    command = ["qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-m", "512M", "-nodefaults", "-nographic",
               "-no-reboot", "-serial", "stdio", "-kernel", str(vmlinuz), "-append", "console=ttyS0 panic=-1"]
    try:
        result = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.DEVNULL, timeout=KVM_PROBE)
    except subprocess.TimeoutExpired:
        return False
    return b"Kernel panic - not syncing: VFS" in result.stdout


class Guest:
    """One boot of `kernel` that runs `command` (a shell line) as root in `directory`.

    Iterating gives the lines of its standard output. `status` is the command's exit status afterwards, or None
    where the guest died or was killed; then `why` says so.
    """

    def __init__(self, kernel, command, console, directory, silence, arguments=(), accelerator=None):
        self.console = pathlib.Path(console)
        self.silence = silence
        self.status = None
        self.why = None
        self._command = [
            "vng", "--run", str(kernel.vmlinuz),
            *(accelerator or accelerator_arguments(kernel.vmlinuz)), "--verbose",
            "--cpus", "2", "--memory", MEMORY, "--cwd", str(directory), "--append", "loglevel=5",
            *arguments, "--", command,
        ]

    def __iter__(self):
        self.console.parent.mkdir(parents=True, exist_ok=True)
        # vng reopens its descriptors by name, which must therefore be pipes, and wants a readable stdin.
        with open(self.console, "wb") as console, tempfile.TemporaryFile() as nothing:
            process = subprocess.Popen(self._command, stdin=nothing, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                       start_new_session=True)
            try:
                yield from self._lines(process, console)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if self.why is None and process.returncode == 255:
            self.why = "the guest died (its console shows how)"
        if self.why is None:
            self.status = process.returncode

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
                    elif key.fileobj is process.stderr:
                        console.write(data)
                        console.flush()
                    else:
                        heard = time.monotonic()
                        *lines, partial = (partial + data).split(b"\n")
                        yield from (line.decode(errors="replace").rstrip("\r") for line in lines)
                if time.monotonic() - heard > self.silence:
                    self.why = f"the guest was silent for {self.silence} s and was killed"
                    os.killpg(process.pid, signal.SIGKILL)
                    break
        process.wait()


def require_vng():
    """A clear word where the host stands in for the root but cannot boot guests."""
    for name in ("vng", "qemu-system-x86_64"):
        if subprocess.run(["sh", "-c", f"command -v {name}"], stdout=subprocess.DEVNULL).returncode:
            raise Failure(f"{name} is missing; OVBD_ROOT=always makes a toolchain root that has it")
