# SPDX-License-Identifier: GPL-2.0
"""Programs that are stopped before one of the system calls by which they change something, and killed there: what is not
to be seen by chance is seen at every step. By ptrace(), so nothing in the program is made for it."""

import ctypes
import os
import signal

TRACEME, PEEKUSER, CONT, SYSCALL, SETOPTIONS = 0, 3, 7, 24, 0x4200
TRACESYSGOOD, TRACECLONE, EXITKILL = 1, 8, 0x100000
WALL = 0x40000000
# Bytes of `struct user_regs_struct` of x86-64.
RAX, RDX, RSI, ORIG_RAX = 80, 96, 104, 120
ENOSYS = 38
O_CREAT = 0o100
# x86-64.
NAMES = {18: "pwrite64", 74: "fsync", 75: "fdatasync", 77: "ftruncate", 82: "rename", 86: "link", 87: "unlink",
         263: "unlinkat", 264: "renameat", 265: "linkat", 285: "fallocate", 306: "syncfs", 316: "renameat2"}
IOCTLS = {0xfd03: "create", 0xfd04: "remove", 0xfd05: "rename", 0xfd06: "suspend or resume", 0xfd09: "load",
          0xfd0a: "clear", 0x4c01: "detach a loop", 0x4c04: "set a loop", 0x4c0a: "attach a loop", 0x4c82: "get a loop",
          0x5877: "freeze", 0x5878: "thaw"}

libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.restype = ctypes.c_long
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def _ptrace(request, thread, address=0, data=0):
    ctypes.set_errno(0)
    result = libc.ptrace(request, thread, address, data)
    if result == -1 and ctypes.get_errno():
        # A thread that was killed meanwhile.
        raise ProcessLookupError(ctypes.get_errno(), "ptrace")
    return result


def _step(thread):
    """What a thread that is about to make a system call is about to change, or None."""
    if _ptrace(PEEKUSER, thread, RAX) != -ENOSYS:
        return None
    number = _ptrace(PEEKUSER, thread, ORIG_RAX)
    if number == 16:
        return IOCTLS.get(_ptrace(PEEKUSER, thread, RSI) & 0xffff)
    if number == 257:
        return "create a file" if _ptrace(PEEKUSER, thread, RDX) & O_CREAT else None
    return NAMES.get(number)


def run(command, until=None, then=lambda: None, errors=os.devnull, goes_on=False):
    """Runs a program up to step number `until`, or the first for which `until` is true, which gets the steps before it and
    its own name; calls `then` while it waits there, and kills it unless it `goes_on`. Returns its steps, and its exit status,
    or None if it was killed. What it says on stderr is in the file `errors`."""
    is_it = until if callable(until) else lambda steps, _step: len(steps) == until
    reached = False
    process = os.fork()
    if process == 0:
        try:
            null = os.open("/dev/null", os.O_RDWR)
            for number in (0, 1):
                os.dup2(null, number)
            os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            libc.ptrace(TRACEME, 0, None, None)
            os.execv(str(command[0]), [str(word) for word in command])
        finally:
            os._exit(127)
    os.waitpid(process, 0)
    _ptrace(SETOPTIONS, process, 0, TRACESYSGOOD | TRACECLONE | EXITKILL)
    _ptrace(SYSCALL, process)
    steps, killed = [], False
    while True:
        thread, status = os.waitpid(-1, WALL)
        if not os.WIFSTOPPED(status):
            if thread == process:
                return steps, None if killed else os.waitstatus_to_exitcode(status)
            continue
        stopped = os.WSTOPSIG(status)
        passed_on = 0
        try:
            if stopped == signal.SIGTRAP | 0x80:
                if not killed and (step := _step(thread)):
                    if not reached and is_it(steps, step):
                        reached = True
                        then()
                        if not goes_on:
                            os.kill(process, signal.SIGKILL)
                            killed = True
                    steps.append(step)
            elif stopped not in (signal.SIGTRAP, signal.SIGSTOP):
                passed_on = stopped
            if not killed:
                _ptrace(SYSCALL, thread, 0, passed_on)
        except ProcessLookupError:
            continue
