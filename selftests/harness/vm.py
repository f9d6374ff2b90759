# SPDX-License-Identifier: GPL-2.0
"""Boots the stock kernel with virtme-ng: the toolchain root is the guest's root file system, read-only below an
overlay, so a guest sees the checkout at its own path and can damage nothing.
"""

import functools
import os
import pathlib
import re
import subprocess
import tempfile
import threading

from cache import Failure
from guest_process import GuestProcess

# Seconds that a real kernel may take to print its banner when the accelerator works.
KVM_PROBE = 20
MEMORY = 3072
# What the guest has of it as persistent memory besides, at 4 GiB, behind the hole below: /dev/pmem0 once nd_e820 is
# loaded (selftests/lib/pmem.py). It takes none of the host's before it is used.
PMEM = 768
# The console gets what a dying kernel says, which is printed at any level. All else is read in the guest, as an
# emulated serial line is slow.
CONSOLE = "loglevel=3"
# At boot the kernel waits a moment for interrupts of the timer, and panics where the emulator had no processor for as
# long. Under KVM it does not by itself.
NO_TIMER_CHECK = "no_timer_check"
# What protects against the speculation of processors, which an emulated one does not do, makes every branch through a
# register slow.
NO_MITIGATIONS = ["--append", "mitigations=off"]
# What programs send to a terminal besides text.
CONTROL = re.compile(r"\x1b\[[!-?]*[@-~]|\x1b\][^\x07\x1b]*\x07?|\x1b[@-_]")
# Programs that vng is to find instead of the system's.
PROGRAMS = pathlib.Path(__file__).parent / "bin"
EMULATION = ["--disable-kvm"]
# A CPU with the instruction that the kernel's crc32c() wants, which the emulator's default lacks. Named, so that it
# stays what it is when the emulator learns more.
COUNTED_CPU = "Nehalem"
# Every timer that the guest sets is work for a thread of the emulator, for which the guest's processors have to wait
# where the machine has no more of its own. Whoever sleeps goes on with a tick of the clock, as ovbd-reads does before a
# pass.
ONLY_TICKS = "highres=off nohz=off"
# What is at random differs from boot to boot.
NOTHING_RANDOM = "nokaslr norandmaps"
# The guest's clock advances by a nanosecond with every instruction, and jumps where nothing is to be done.
COUNTED = ["-icount", "shift=0,sleep=off", "-cpu", COUNTED_CPU, "-rtc", "base=2026-01-01,clock=vm"]
COUNT_INSTRUCTIONS = ["--cpus", "1", "--append", ONLY_TICKS, "--append", NOTHING_RANDOM,
                      f"--qemu-opts={' '.join(COUNTED)}"]


@functools.cache
def kvm_runs(vmlinuz):
    """Whether guests run under KVM, that is where it really runs a kernel, and not under emulation (TCG)."""
    runs = _kvm_runs_kernel(vmlinuz)
    print("==> guests run under " + ("KVM" if runs else "emulation (TCG): KVM is missing or cannot run a kernel here"),
          flush=True)
    return runs


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


class Guest(GuestProcess):
    """One boot of `kernel` that runs `command` (a shell line) as root in `directory`.

    Of the arguments for vng, `emulated` are only for a guest that cannot have KVM. One that is `counting` instructions
    never has it, and one CPU.
    """

    def __init__(self, kernel, command, console, directory, silence, arguments=(), emulated=(), counting=False, cpus=2):
        super().__init__(console, silence)
        require_vng()
        if counting:
            accelerator = [*EMULATION, *COUNT_INSTRUCTIONS]
        elif kvm_runs(kernel.vmlinuz):
            accelerator = []
        else:
            accelerator = [*EMULATION, *emulated]
        self._command = [
            "env", f"PATH={PROGRAMS}:{os.environ['PATH']}", "vng", "--run", str(kernel.vmlinuz), "--verbose",
            "--cpus", str(cpus), "--memory", f"{MEMORY + PMEM}M", "--cwd", str(directory),
            "--append", f"memmap={PMEM}M!4G {NO_TIMER_CHECK} {CONSOLE}", *accelerator, *arguments, "--", command,
        ]

    def __iter__(self):
        # vng reopens its descriptors by name, which must therefore be pipes, and wants a readable stdin.
        with tempfile.TemporaryFile() as nothing:
            status = yield from self._run(self._command, nothing, console_has_output=False)
        if self.why is None and status == 255:
            self.why = "the guest died (its console shows how)"
        if self.why is None:
            self.status = status


def boot_system(vmlinuz, initrd, append, disk, console, seconds, arguments=(), shown=lambda report: True, counting=False):
    """Boots a whole system from its disk with its own initrd, until it switches off; returns what it reported, as
    run_system() does. With `counting` it has one CPU and its clock counts instructions."""
    if counting:
        append += f" {ONLY_TICKS} {NOTHING_RANDOM}"
    return run_system(vmlinuz, [*arguments, "-kernel", str(vmlinuz), "-initrd", str(initrd), "-append",
                                f"console=ttyS0 panic=-1 {NO_TIMER_CHECK} {append}", "-drive",
                                f"file={disk},if=virtio,format=raw,cache=unsafe"], console, seconds, shown, counting)


def reported(line):
    """What a line of a console has with `report: `. A program that asks the terminal for its size at that moment puts control
    sequences into the line, and may take the end of it."""
    return [text.strip() for text in CONTROL.sub("", line).split("report: ")[1:]]


def run_system(vmlinuz, arguments, console, seconds, shown=lambda report: True, counting=False):
    """Runs a machine with these arguments, whose kernel is `vmlinuz`, until it switches off; returns what it reported, the
    rest of the lines of its console with `report: `. Those that are `shown` are printed too."""
    if counting:
        machine = ["-accel", "tcg", *COUNTED, "-smp", "1"]
    else:
        machine = ["-accel", "kvm", "-cpu", "host"] if kvm_runs(vmlinuz) else ["-accel", "tcg"]
        machine += ["-smp", "2"]
    command = ["qemu-system-x86_64", *machine, "-m", "1G", "-nodefaults", "-nographic", "-serial",
               "stdio", *map(str, arguments)]
    reports = []
    with open(console, "w", buffering=1) as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True, errors="replace")
        # The emulator itself, and not a program that started it: who is killed must not go on writing to the disk.
        limit = threading.Timer(seconds, process.kill)
        limit.start()
        try:
            for line in process.stdout:
                log.write(line)
                for report in reported(line):
                    reports.append(report)
                    if shown(report):
                        print(f"    {report}", flush=True)
        finally:
            limit.cancel()
            process.kill()
            process.wait()
    return reports


def require_vng():
    """A clear word where the host stands in for the root but cannot boot guests."""
    for name in ("vng", "qemu-system-x86_64"):
        if subprocess.run(["sh", "-c", f"command -v {name}"], stdout=subprocess.DEVNULL).returncode:
            raise Failure(f"{name} is missing; OVBD_ROOT=always makes a toolchain root that has it")
