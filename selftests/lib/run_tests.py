# SPDX-License-Identifier: GPL-2.0
"""Runs test scripts inside the guest and reports what they print, one JSON object a line.

Each script runs alone with a fresh temporary directory and a time limit. The kernel log that appeared during it is
reported with it, and a kernel that warned is a failure. Device-mapper and loop devices that it leaves behind are
named, then removed, so that one test cannot spoil the next.
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time

SOURCE = pathlib.Path(__file__).resolve().parents[2]


# The tests that are also about udev. For the others its rules would be a large part of the time under emulation; the
# debug kernel's guest has none either.
WITH_UDEV = ("ovbd/up.py", "ovbd/examples.py")
UDEVD = "/usr/lib/systemd/systemd-udevd"
UDEV_CONTROL = pathlib.Path("/run/udev/control")

# What the kernel remembers of trouble, see Documentation/admin-guide/tainted-kernels.rst.
TAINTS = {5: "bad page", 7: "died", 9: "warned", 14: "locked up"}

_reporting = threading.Lock()


def report(event, **fields):
    with _reporting:
        print(json.dumps({"event": event, **fields}), flush=True)


def taints():
    """The trouble that the kernel has had so far."""
    bits = int(pathlib.Path("/proc/sys/kernel/tainted").read_text())
    return {what for bit, what in TAINTS.items() if bits >> bit & 1}


def lockdep_is_off():
    """Whether the kernel has lockdep, which stops at the first trouble it finds: from then on no lock is checked."""
    try:
        lines = pathlib.Path("/proc/lockdep_stats").read_text().splitlines()
    except OSError:
        return False
    return ["debug_locks:", "0"] in [line.split() for line in lines]


def kernel_messages(log):
    """The records that arrived in /dev/kmsg since the last call, as text."""
    messages = []
    while True:
        try:
            record = log.read(8192)
        except BlockingIOError:
            return messages
        except BrokenPipeError:
            messages.append("(the kernel log overran: messages were lost)")
            continue
        if not record:
            return messages
        prefix, _, text = record.decode(errors="replace").partition(";")
        seconds = int(prefix.split(",")[2]) / 1e6
        messages += [f"[{seconds:12.6f}] {line}" for line in text.splitlines() if not line.startswith(" ")]


@contextlib.contextmanager
def kernel_reported(log):
    """Reports the kernel log while the body runs: a script can fill the kernel's buffer more than once."""
    over = threading.Event()

    def follow():
        done = False
        while not done:
            done = over.wait(0.2)
            for message in kernel_messages(log):
                report("kernel", text=message)

    follower = threading.Thread(target=follow)
    follower.start()
    try:
        yield
    finally:
        over.set()
        follower.join()


def output_of(*command):
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout.splitlines()


def left_behind():
    """The names of mapped and loop devices that exist."""
    devices = [f"dm device {line.split()[0]}" for line in output_of("dmsetup", "ls") if line.split()[1:]
               and line != "No devices found"]
    return devices + [f"loop device {line.split(':')[0]}" for line in output_of("losetup", "--all")]


def remove_devices():
    subprocess.run(["sh", "-c",
                    "umount --all-targets /dev/mapper/* ; dmsetup remove_all --force; losetup --detach-all"],
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def set_udev(wanted):
    """Starts or ends udev's daemon, where there is one."""
    runs = UDEV_CONTROL.exists()
    if wanted:
        os.environ.pop("DM_DISABLE_UDEV", None)
        if not runs:
            subprocess.run([UDEVD, "--daemon"], check=True)
        return
    # libdm then makes nodes and links itself.
    os.environ["DM_DISABLE_UDEV"] = "1"
    if runs:
        subprocess.run(["udevadm", "settle"], check=True)
        subprocess.run(["udevadm", "control", "--exit"], check=True)
        UDEV_CONTROL.unlink(missing_ok=True)


def run(script, limit, log):
    kernel_messages(log)
    report("begin", test=script)
    start = time.monotonic()
    timed_out = False
    tainted = taints()
    with (tempfile.TemporaryDirectory(prefix="selftest-", ignore_cleanup_errors=True) as scratch,
          kernel_reported(log)):
        environment = {"KO_DIR": str(SOURCE)} | os.environ | {"SRC": str(SOURCE), "TMPDIR": scratch}
        process = subprocess.Popen([str(SOURCE / "selftests" / script)], cwd=SOURCE, env=environment,
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   text=True, errors="replace", start_new_session=True)

        def stop(_signal, _frame):
            nonlocal timed_out
            timed_out = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        signal.signal(signal.SIGALRM, stop)
        signal.alarm(limit)
        for line in process.stdout:
            report("line", text=line.rstrip("\n"))
        status = process.wait()
        signal.alarm(0)
        problems = [f"timed out after {limit} s"] if timed_out else []
        leaks = left_behind()
        if leaks:
            remove_devices()
            problems.append("left behind: " + ", ".join(leaks))
        problems += ["lockdep is off"] * lockdep_is_off()
        problems += [f"the kernel {what}" for what in taints() - tainted]
    report("end", test=script, status=status, problems=problems, seconds=round(time.monotonic() - start, 1))


def main():
    limit = int(sys.argv[1])
    # To remove a device takes several grace periods, for each of which an idle guest waits for some clock ticks. A
    # kernel for one processor has no such file.
    with contextlib.suppress(OSError):
        pathlib.Path("/sys/kernel/rcu_expedited").write_text("1")
    # A tmpfs of its own keeps test data out of the overlay, where space and features are those of the host.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60%", "tmpfs", "/tmp"], check=True)
    with open("/dev/kmsg", "rb", buffering=0) as log:
        os.set_blocking(log.fileno(), False)
        log.seek(0, os.SEEK_END)
        report("start", kernel=os.uname().release)
        has_udev = UDEV_CONTROL.exists()
        for script in sys.argv[2:]:
            set_udev(has_udev and script in WITH_UDEV)
            run(script, limit, log)


if __name__ == "__main__":
    main()
