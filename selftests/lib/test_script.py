# SPDX-License-Identifier: GPL-2.0
"""What every guest test needs: where things are, commands that must succeed, modules, and TAP output."""

import os
import pathlib
import subprocess
import sys
import tempfile

SOURCE = pathlib.Path(os.environ["SRC"])
MODULES = pathlib.Path(os.environ.get("KO_DIR") or SOURCE)
SCRATCH = pathlib.Path(os.environ.get("TMPDIR") or tempfile.mkdtemp())
OVBD = SOURCE / "tools/target/release/ovbd"


class CommandFailed(Exception):
    """A command that had to succeed did not; the text is what it said."""


def run(*command, **options):
    """Runs a command and returns its standard output; raises `CommandFailed` where it fails."""
    result = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, errors="replace", **options)
    if result.returncode:
        raise CommandFailed(f"{' '.join(map(str, command))}: exit status {result.returncode}: {result.stderr.strip()}")
    return result.stdout


class Tap:
    """Numbers and prints results; the plan comes last, so that a script that breaks off has none."""

    def __init__(self):
        self.count = 0
        self.failed = 0

    def result(self, good, what, why=""):
        self.count += 1
        self.failed += not good
        print(f"{'ok' if good else 'not ok'} {self.count} - {what}", flush=True)
        if not good and why:
            print("\n".join(f"# {line}" for line in str(why).splitlines()), flush=True)

    def equal(self, got, wanted, what):
        """Passes where both values are equal."""
        self.result(got == wanted, what, f"got    {got}\nwanted {wanted}")

    def attempt(self, what, function, *arguments):
        """Passes where `function` returns; an exception fails the test with its text."""
        try:
            function(*arguments)
        except (AssertionError, CommandFailed, OSError) as error:
            self.result(False, what, f"{type(error).__name__}: {error}")
        else:
            self.result(True, what)

    def skip(self, what, why):
        self.count += 1
        print(f"ok {self.count} - {what} # SKIP {why}", flush=True)

    def finish(self):
        print(f"1..{self.count}", flush=True)
        sys.exit(1 if self.failed else 0)


def load(*modules):
    """Loads modules of this repository, or of the kernel, where they are not loaded yet."""
    loaded = {line.split()[0] for line in open("/proc/modules")}
    for name in modules:
        if name.replace("-", "_") in loaded:
            continue
        built = MODULES / name / f"{name}.ko"
        run("modprobe", "dm-mod")
        run(*(["insmod", built] if built.exists() else ["modprobe", name]))
