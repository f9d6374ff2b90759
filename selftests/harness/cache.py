# SPDX-License-Identifier: GPL-2.0
"""The cache outside the checkout: where it is, who may change it, and how a long step reports itself.

Everything slow to make lives in one directory (OVBD_CACHE, default /var/cache/dm-overlaybd), so that it can be
moved, measured and removed as a whole. A finished part is always the result of a rename: an interrupted step
leaves a `.partial` directory that the next run deletes, never something that looks complete.
"""

import contextlib
import fcntl
import os
import pathlib
import shutil
import subprocess
import sys
import time

SOURCE = pathlib.Path(__file__).resolve().parents[2]
CACHE = pathlib.Path(os.environ.get("OVBD_CACHE", "/var/cache/dm-overlaybd"))

# Seconds between two progress lines of a long step when standard output is not a terminal.
PROGRESS_INTERVAL = 15


class Failure(Exception):
    """An error that the person running the command can act upon: one message, no traceback."""


# Where a guest mounts file systems of its own: what the host has there it does not see.
HIDDEN_FROM_GUESTS = ("/dev", "/proc", "/run", "/sys", "/tmp", "/var/log", "/var/tmp")


def check_guests_see(**places):
    """Refuses places, by what they are to be called, that a guest would not find."""
    for what, place in places.items():
        path = pathlib.Path(place).resolve()
        for hidden in HIDDEN_FROM_GUESTS:
            if path.is_relative_to(hidden):
                raise Failure(f"{what} {path} is in {hidden}, where the tests' guests mount a file system of their own "
                              "and cannot see it: move it elsewhere")


_lock_file = None


def _lock():
    """The open lock file. The lock belongs to it and not to the process, and is kept until the process ends."""
    global _lock_file
    if _lock_file is None:
        try:
            CACHE.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Failure(f"cannot create the cache {CACHE}: {error.strerror}; set OVBD_CACHE to a writable directory")
        # A command that replaces this process inherits the file, else the two would wait for each other.
        inherited = os.environ.get("OVBD_LOCK")
        _lock_file = os.fdopen(int(inherited), "w") if inherited else open(CACHE / "lock", "w")
        os.set_inheritable(_lock_file.fileno(), True)
        os.environ["OVBD_LOCK"] = str(_lock_file.fileno())
    return _lock_file


def _flock(mode):
    try:
        fcntl.flock(_lock(), mode | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"==> waiting for another run that uses {CACHE}", flush=True)
        fcntl.flock(_lock(), mode)


def share():
    """Locks the cache against changes for as long as this process lives; waits while another run changes it."""
    _flock(fcntl.LOCK_SH)


@contextlib.contextmanager
def exclusive():
    """Holds the cache for changing it, and shares it again afterwards. Waits for the runs that use it."""
    _flock(fcntl.LOCK_EX)
    try:
        yield
    finally:
        share()


@contextlib.contextmanager
def alone(name):
    """Lets one run at a time make the part of the cache of that name, while others use the rest."""
    with open(CACHE / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def need_space(gigabytes, purpose):
    """Stops early where the file system cannot hold what is about to be made."""
    free = shutil.disk_usage(CACHE).free / 1e9
    if free < gigabytes:
        raise Failure(
            f"{CACHE} has {free:.1f} GB free but {purpose} needs {gigabytes} GB; "
            "free some space or set OVBD_CACHE to another file system"
        )


def delete(path):
    """Removes a tree, but never what is mounted below it: a stray bind mount of /dev must not empty the host's."""
    result = subprocess.run(["rm", "-rf", "--one-file-system", "--", str(path)], stderr=subprocess.PIPE, text=True)
    if result.returncode:
        raise Failure(f"cannot remove {path}: {result.stderr.splitlines()[0]}; is something mounted below it?")


def fresh_directory(path):
    """An empty directory at `path`, whatever an interrupted run left there."""
    delete(path)
    path.mkdir(parents=True)
    return path


def _say(text, live):
    if live:
        columns = shutil.get_terminal_size().columns
        sys.stdout.write("\r\x1b[K" + text[: columns - 1])
    else:
        sys.stdout.write(text + "\n")
    sys.stdout.flush()


def step(title, command, log, remedy, **options):
    """Runs a long command with its output in the file `log`, showing how it goes.

    Raises `Failure` with the end of the log and the `remedy` where the command does not succeed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    live = sys.stdout.isatty()
    start = time.monotonic()
    print(f"==> {title}", flush=True)
    with open(log, "wb") as output:
        # The command shares the lock: should this process be killed, the next run waits until the orphan is gone.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                   pass_fds=[_lock_file.fileno()], **options)
        shown = 0.0
        while True:
            try:
                process.wait(timeout=0.5)
                break
            except subprocess.TimeoutExpired:
                elapsed = time.monotonic() - start
                if elapsed - shown >= (1 if live else PROGRESS_INTERVAL):
                    shown = elapsed
                    _say(f"    {elapsed:4.0f} s  {last_line(log)}", live)
            except BaseException:
                process.kill()
                process.wait()
                raise
    if live and shown:
        _say("", live)
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
        raise Failure(f"{title}: failed (exit status {process.returncode}); the end of {log}:\n{tail}\n{remedy}")
    print(f"    done in {time.monotonic() - start:.0f} s", flush=True)


def last_line(log):
    """The last line with text in a log that is still being written."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 2000))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")[:150]


def remove():
    """Deletes the cache; refuses while another run uses it."""
    if not CACHE.exists():
        return
    lock = CACHE / "lock"
    if not lock.exists() and any(CACHE.iterdir()):
        raise Failure(f"{CACHE} holds files but no lock of this project: not removing it")
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failure(f"{CACHE} is in use by another run; stop it first")
        delete(CACHE)
