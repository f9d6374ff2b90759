# SPDX-License-Identifier: GPL-2.0
"""The series that could be posted: written, applied with `git am`, and compiled in the tree of the kernel.

Leaves `build/upstream/<posting>/*.patch`. Nobody has signed them off: that is for the person who posts them.
"""

import re
import subprocess

import built_kernels
import kernel as kernels
import selftests
import series
from cache import CACHE, SOURCE, Failure, alone, delete, fresh_directory, step
from report import Counts

OUTPUT = SOURCE / "build/upstream"
REPOSITORY = OUTPUT / "tree"
# What the series touches, and what it takes to look at it.
TOUCHED = ["MAINTAINERS", "Makefile", ".rustfmt.toml", ".clippy.toml", "Documentation/admin-guide/device-mapper",
           "drivers/md", "include/linux/device-mapper.h", "rust", "samples/rust"]
FIRST = "1-device-mapper"
# The first posting must be short enough to be read.
FIRST_LINES = 2500
# Guest tests that make do with targets that are part of the kernel, and unload none.
TESTS = ["upstream/*", "dm-overlaybd/fixtures", "dm-overlaybd/io", "dm-zfile/fixtures", "dm-zfile/reads"]
# What rustdoc, rustc and clippy say of a file: the place is in the line after it.
COMPLAINT = re.compile(r"^(?:warning|error)(?:\[\w+\])?: (.*)\n(?:.*\n)??\s*--> (\S+)", re.MULTILINE)


class UpstreamKernel(built_kernels.UserModeLinux):
    """The kernel with a posting in it, and those before: clippy compiles its Rust, and KUnit tests and doctests run when
    it boots."""

    make = ["ARCH=um", "CC=gcc-14", "HOSTCC=gcc-14", "KCFLAGS=-w", "CLIPPY=1"]

    def __init__(self, stock, posting):
        self.name = f"upstream-{posting}"
        super().__init__(stock)
        self.config = ["common", "um", "upstream"] + ["upstream-targets"] * (posting != FIRST)
        # The first posting has nothing that only a whole kernel would show.
        self.goals = ["prepare", "samples/rust/"] if posting == FIRST else []
        self.stock_source = stock.source
        self.source = self.directory / "linux"

    def prepare(self, commit):
        """Makes the source what a commit of the series has. Files that stay the same keep their times, so that only
        what changed is compiled."""
        if not self.source.exists():
            self.directory.mkdir(exist_ok=True)
            partial = self.directory / "linux.partial"
            delete(partial)
            step("copying the source, as links", ["cp", "-al", str(self.stock_source), str(partial)],
                 CACHE / "log" / f"{self.name}-copy.log", kernels.UPDATE)
            partial.rename(self.source)
        git("checkout", "--quiet", "--detach", commit)
        # rsync replaces files and never writes into them, so the other end of a link stays what it is.
        subprocess.run(["rsync", "--archive", "--no-times", "--checksum", "--delete", "--relative", *TOUCHED,
                        f"{self.source}/"], cwd=REPOSITORY, check=True)

    def compile(self):
        """Configures and compiles it, and makes the documentation; returns what was said."""
        self.build.mkdir(exist_ok=True)
        fragment = self.directory / "fragment.config"
        make = ["make", "-C", str(self.source), f"O={self.build}", *self.make_arguments()]
        if not fragment.exists() or fragment.read_text() != self._fragments():
            fragment.write_text(self._fragments())
            configure = [*make, f"KCONFIG_ALLCONFIG={fragment}", "allnoconfig"]
        else:
            configure = [*make, "olddefconfig"]
        said = []
        for what, command in (("configuring", configure), ("compiling", [*make, *self.goals]),
                              ("documenting", [*make, "rustdoc"])):
            log = CACHE / "log" / f"{self.name}-{what}.log"
            step(f"{what} the {self.name} kernel", command, log, f"See {log}.")
            said.append(log.read_text(errors="replace"))
            if what == "configuring":
                self._check_config()
        if not self.goals:
            self._install(make, CACHE / "log" / f"{self.name}-install.log")
        return "".join(said)


def git(*arguments, **options):
    """Runs git in the repository of the series; returns what it prints."""
    return subprocess.run(["git", *arguments], cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True,
                          **options).stdout


def identity():
    """Who is named as the author: whoever runs this, as git in this checkout knows."""
    def configured(name):
        return subprocess.run(["git", "-c", f"safe.directory={SOURCE}", "config", name], cwd=SOURCE,
                              stdout=subprocess.PIPE, text=True).stdout.strip()
    name, email = configured("user.name"), configured("user.email")
    if not (name and email):
        last = subprocess.run(["git", "-c", f"safe.directory={SOURCE}", "log", "-1", "--format=%an%n%ae"], cwd=SOURCE,
                              stdout=subprocess.PIPE, text=True).stdout.split("\n")
        name, email = last[0], last[1]
    return name, email


def message(posting, name):
    """The message of a patch or cover letter, with the tables that it asks for."""
    text = (series.UPSTREAM / posting / f"{name}.txt").read_text()
    return re.sub(r"^@(\S+): (.*)\n", lambda match: table(match[1], match[2]), text, flags=re.MULTILINE)


def table(document, heading):
    """The first table after a line of a document, in columns."""
    text = (SOURCE / document).read_text()
    place = text.find(heading)
    if place < 0:
        raise Failure(f"{document} has no line with: {heading}")
    rows = []
    for line in text[place:].splitlines():
        if line.startswith("|"):
            rows.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
        elif rows:
            break
    rows = [row for row in rows if not all(re.fullmatch(r":?-+:?", cell) for cell in row)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  " + "  ".join([row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in
                                                           zip(row[1:], widths[1:])]).rstrip() for row in rows]
    return "\n".join(lines) + "\n"


def write(stock):
    """Writes the patches, posting by posting; returns their directories."""
    fresh_directory(REPOSITORY)
    for path in TOUCHED:
        subprocess.run(["cp", "-a", "--parents", path, str(REPOSITORY)], cwd=stock.source, check=True)
    git("init", "--quiet", "--initial-branch=series")
    name, email = identity()
    git("config", "user.name", name)
    git("config", "user.email", email)
    git("add", "--all", "--force")
    git("commit", "--quiet", "--message", f"Linux {stock.release}")
    git("tag", "base")
    directories = []
    for posting, patches in series.POSTINGS.items():
        start = git("rev-parse", "HEAD").strip()
        if posting == FIRST:
            for patch in sorted(series.UPSTREAM.glob("*.patch")):
                git("am", "--quiet", str(patch))
        tree = series.Tree(REPOSITORY, f"{name} <{email}>")
        for patch, put in patches:
            put(tree)
            git("add", "--all")
            changed = git("diff", "--cached", "--name-only", "--diff-filter=d").split()
            rust = [path for path in changed if path.endswith(".rs")]
            if rust:
                subprocess.run(["rustfmt", "--edition", "2021", *rust], cwd=REPOSITORY, check=True)
                git("add", "--all")
            git("commit", "--quiet", "--file=-", input=message(posting, patch))
        git("tag", posting)
        directories.append(format_patches(posting, start))
    return directories


def format_patches(posting, start):
    """Writes the commits since `start` as mails, with the cover letter in front."""
    directory = OUTPUT / posting
    fresh_directory(directory)
    git("format-patch", "--quiet", "--subject-prefix=RFC PATCH" if posting == FIRST else "--subject-prefix=PATCH",
        "--cover-letter", "--no-signature", "--output-directory", str(directory), f"{start}..HEAD")
    subject, _, body = message(posting, "cover").partition("\n\n")
    cover, = directory.glob("0000-*")
    text = cover.read_text().replace("*** SUBJECT HERE ***", subject).replace("*** BLURB HERE ***", body.rstrip("\n"))
    cover.write_text(text)
    return directory


def apply(directories):
    """Applies the mails to the tree as it was; whether that gives the tree that they were made of."""
    wanted = git("rev-parse", "HEAD^{tree}")
    git("checkout", "--quiet", "--detach", "base")
    for directory in directories:
        git("am", "--quiet", *(str(path) for path in sorted(directory.glob("*.patch")) if "/0000-" not in str(path)))
    return git("rev-parse", "HEAD^{tree}") == wanted


def added_lines(directory):
    """How many lines the patches of a posting add."""
    return sum(line.startswith("+") and not line.startswith("+++ ")
               for path in directory.glob("*.patch") for line in path.read_text().splitlines())


def ours(path):
    """Whether a file is one that the series adds."""
    return re.search(r"rust/kernel/(device_mapper|lower_read|codec)|drivers/md/dm-overlaybd|rust_dm_linear", path)


def complaints(said):
    """What rustc, clippy and rustdoc say of files of the series."""
    return [f"{place}: {what}" for what, place in COMPLAINT.findall(said) if ours(place)]


def checkpatch(kernel, directory):
    """The errors of checkpatch, which does not miss a signature here, and how many remarks it has in all."""
    mails = [str(path) for path in sorted(directory.glob("*.patch")) if "/0000-" not in str(path)]
    said = subprocess.run(["perl", "scripts/checkpatch.pl", "--strict", "--terse", "--no-summary", "--show-types",
                           "--ignore", "MISSING_SIGN_OFF", *mails], cwd=kernel.source, stdout=subprocess.PIPE,
                          text=True).stdout.splitlines()
    (directory / "checkpatch.log").write_text("\n".join(said) + "\n")
    return [line for line in said if "ERROR:" in line], len(said)


def run(stock):
    """Everything; returns the counts."""
    counts = Counts()

    def check(good, what, why=""):
        counts.add(Counts(passed=1) if good else Counts(failed=1))
        print(f"{'ok    ' if good else 'FAIL  '}{what}", flush=True)
        if not good and why:
            print("\n".join(f"        {line}" for line in why), flush=True)

    directories = write(stock)
    for directory in directories:
        print(f"==> {directory}: {len(list(directory.glob('*.patch'))) - 1} patches, {added_lines(directory)} lines")
    check(apply(directories), "git am gives the tree that the patches were made of")
    lines = added_lines(directories[0])
    check(lines <= FIRST_LINES, f"the first posting adds {lines} lines, at most {FIRST_LINES}")
    for directory in directories:
        posting = directory.name
        kernel = UpstreamKernel(stock, posting)
        with alone(kernel.name):
            kernel.prepare(posting)
            errors, said = checkpatch(kernel, directory)
            check(not errors, f"{posting}: checkpatch --strict has no errors, and {said} remarks", errors)
            # A warning of rustc or clippy is an error, and stops here.
            found = complaints(kernel.compile())
            check(not found, f"{posting}: compiles, and rustdoc has nothing to say of it", found)
    kernel.modules.mkdir(parents=True, exist_ok=True)
    counts.add(selftests.run(kernel, selftests.select(TESTS, kernel.name)))
    return counts
