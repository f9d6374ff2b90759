# SPDX-License-Identifier: GPL-2.0
"""The verbs behind the Makefile. A verb that needs the toolchain root enters it first and continues there."""

import os
import pathlib
import signal
import sys

import bench
import bench_guests
import build
import built_kernels
import cache
import demo
import demo_tar
import kernel as kernels
import packages
import planted
import root
import selftests
import stack_root
import stages
import system_boot
import tracked
import upstream
from cache import Failure
from report import Counts


def modules(arguments):
    """Builds the modules against the cached kernel tree."""
    kernel = kernels.ensure()
    return build.kbuild(kernel, *(arguments or ["modules"]))


def clippy(_arguments):
    """Lints of the kernel for the modules, those of cargo for the tools."""
    return build.clippy(kernels.ensure()) or build.make("clippy-tools")


def rustfmt(arguments):
    """Formats, or with --check compares, all Rust source."""
    kernel = kernels.ensure()
    return build.make("rustfmt-check" if "--check" in arguments else "rustfmt", OVBD_KERNEL_SOURCE=kernel.source)


def test(_arguments):
    """All tests that fit into the time of a continuous integration; the last line is their count."""
    return _staged(lambda run: stages.test(os.environ.get("T", "*").split(), run))


def test_all(_arguments):
    """Those, and all that take longer."""
    return _staged(stages.test_all)


def _staged(work):
    run = stages.Stages()
    work(run)
    run.show()
    print(f"\n{run.total}", flush=True)
    return 1 if run.total.failed else 0


def run_selftests(_arguments):
    """The guest tests that T selects; without T, where CASES was given, its cases through ovbd and the targets."""
    stock = kernels.ensure()
    name = os.environ.get("KERNEL", stock.name)
    names = (stock.name, kernels.OldestKernel.name, *built_kernels.KINDS)
    if name not in names:
        raise Failure(f"KERNEL is one of: {' '.join(names)}")
    only_cases = "OVBD_ONLY_CASES" in os.environ and "T" not in os.environ
    scripts = selftests.select(["*/fixtures"] if only_cases else os.environ.get("T", "*").split(), name)
    kernel = stock
    if name in built_kernels.KINDS:
        kernel = built_kernels.KINDS[name](stock)
        kernel.ensure()
    elif name != stock.name:
        kernel = kernels.ensure_oldest()
    if build.modules(kernel) or build.make("ovbd"):
        return 1
    counts = stages.cases() if only_cases else Counts()
    counts.add(stages.shortfall(kernel))
    counts.add(selftests.run(kernel, scripts))
    print(f"\n{counts}", flush=True)
    return 1 if counts.failed else 0


def run_planted(_arguments):
    """Whether the tests find bugs that are there on purpose."""
    counts = planted.run(kernels.ensure())
    print(f"\n{counts}", flush=True)
    return 1 if counts.failed else 0


def run_upstream(_arguments):
    """The series for the kernel's mailing lists, applied and compiled."""
    counts = upstream.run(kernels.ensure())
    print(f"\n{counts}", flush=True)
    return 1 if counts.failed else 0


def deb(_arguments):
    """The Debian packages."""
    kernels.share()
    for path in sorted(packages.build(packages.all_kernels()).glob("*.deb")):
        print(f"{path.stat().st_size / 1e3:8.0f} kB  {path}")
    return 0


def test_packages(_arguments):
    """The packages, built twice, installed and booted."""
    return _staged(stages.test_packages)


def bench_boot(_arguments):
    """What booting from a stack costs beside a dm-linear."""
    kernel = kernels.ensure()
    return stack_root.bench(kernel, packages.build([kernel]))


def run_bench_guests(_arguments):
    """What memory an image takes in several guests."""
    return bench_guests.bench(kernels.ensure())


def run_demo_tar(_arguments):
    """A container as a layer over its tar."""
    return demo_tar.run(kernels.ensure())


def bench_lazy(arguments):
    """How soon a program runs from an image in a slow registry, in the native kernel."""
    kernels.ensure()
    tar = cache.CACHE / "developer.tar"
    demo_tar.prepare(tar, "build-essential,git,python3")
    os.environ["OVBD_LAZY_TAR"] = str(tar)
    status = run_selftests(arguments)
    for line in (cache.SOURCE / "build/selftests-native/ovbd/lazy_figures.log").read_text().splitlines():
        if line.startswith("# "):
            print(line[2:])
    return status


def run_demo(_arguments):
    """A Debian system on a thin volume goes to another machine, which boots from it."""
    return demo.run(kernels.ensure())


def run_demo_system(_arguments):
    """A machine that updates itself, is broken and falls back."""
    kernel = kernels.ensure()
    return build.modules(kernel) or system_boot.demo(kernel)


def run_bench(_arguments):
    """What reads cost in instructions, in a guest whose clock counts them."""
    return bench.bench(kernels.ensure())


def bench_track(_arguments):
    """Writes the tracked figures of this checkout, for the reason given."""
    kernel = kernels.ensure()
    if not os.environ.get("REASON"):
        raise Failure("REASON is missing: make bench-track REASON='why the figures changed'")
    return build.modules(kernel) or build.make("ovbd") or tracked.update(kernel, os.environ["REASON"])


def bench_compare(_arguments):
    """What the tracked benchmark counts with the modules of another commit and with these."""
    return tracked.compare_with_base(kernels.ensure())


def profile(_arguments):
    """The functions in which reads through the targets spend their instructions."""
    return bench.profile(kernels.ensure())


def shell(arguments):
    """Runs a command in the toolchain root."""
    command = arguments or ["bash"]
    os.execvp(command[0], command)


def kernel_update(_arguments):
    """Prepares the newest kernel that the archive holds, and the newest of the oldest supported series."""
    for kernel in (kernels.ensure(update=True), kernels.ensure_oldest(update=True)):
        print(f"{kernel.name}: {kernel.release} ({kernel.version})")
        stages.shortfall(kernel)
    return 0


INSIDE = {
    "modules": modules,
    "clippy": clippy,
    "rustfmt": rustfmt,
    "test": test,
    "test-all": test_all,
    "selftests": run_selftests,
    "bench": run_bench,
    "bench-track": bench_track,
    "bench-compare": bench_compare,
    "profile": profile,
    "planted": run_planted,
    "upstream": run_upstream,
    "demo": run_demo,
    "demo-tar": run_demo_tar,
    "demo-system": run_demo_system,
    "deb": deb,
    "test-packages": test_packages,
    "bench-boot": bench_boot,
    "bench-lazy": bench_lazy,
    "bench-guests": run_bench_guests,
    "shell": shell,
    "kernel-update": kernel_update,
}
# These start guests.
WITH_GUESTS = {"test", "selftests", "bench", "bench-track", "bench-compare", "profile", "planted", "demo", "demo-tar", "demo-system",
               "bench-lazy", "bench-guests"}


def main():
    verb, *arguments = sys.argv[1:] or [""]
    if verb == "in-namespace":
        root.in_namespace(arguments[0], arguments[1:])
    if verb == "remove-cache":
        cache.remove()
        return 0
    if verb not in INSIDE:
        raise Failure(f"usage: harness {{{'|'.join(INSIDE)}|remove-cache}}")
    if verb in WITH_GUESTS:
        # Said before anything is made.
        cache.check_guests_see(checkout=cache.SOURCE, cache=cache.CACHE)
        if os.path.isdir(os.environ.get("CASES", "")):
            cache.check_guests_see(CASES=os.environ["CASES"])
    if "OVBD_INSIDE" in os.environ:
        return INSIDE[verb](arguments)
    command = [*root.enter_command(root.ensure()), "python3", str(pathlib.Path(__file__).parent), verb, *arguments]
    os.execvp(command[0], command)


# Ends guests, which are process groups of their own, as an interrupt does.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

try:
    sys.exit(main())
except Failure as failure:
    print(f"error: {failure}", file=sys.stderr)
    sys.exit(1)
except KeyboardInterrupt:
    print("\ninterrupted; the next run continues where a whole step was finished", file=sys.stderr)
    sys.exit(130)
