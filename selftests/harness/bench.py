# SPDX-License-Identifier: GPL-2.0
"""`make bench`: boots the guest whose clock counts instructions, or others, and makes tables of what they report."""

import functools
import itertools
import json
import os
import shlex
import subprocess
import sys

import bench_report
import build
import built_kernels
import plot
import vm
from cache import SOURCE, Failure

OUTPUT = SOURCE / "build/bench"
# The parts of each lens, in the order of their run time.
PARTS = {"instructions": ["segments", "stacks", "commits", "zfile", "verity", "dax", "slow", "debian"],
         "wall": ["segments", "slow", "zfile", "scaling"]}
# The part that is measured with one CPU and with two, in so many boots of each. They take turns, as the machine is now
# faster and now slower.
SCALING, BOOTS = "scaling", 7


def run(kernel, parts, guest=None, modules=None):
    """Runs parts of the benchmark in one boot; returns what the guest reported, a list of objects.

    The guest is the one whose clock counts instructions, or what `guest` makes of a command, the file for its console
    and seconds of silence. `modules` is the checkout from which the targets are loaded, if not that of the kernel.
    """
    OUTPUT.mkdir(parents=True, exist_ok=True)
    lens = "wall" if guest else "instructions"
    command = shlex.join(["env", f"SRC={SOURCE}", f"KO_DIR={modules or kernel.modules}", f"LENS={lens}", "python3",
                          str(SOURCE / "selftests/bench/guest.py"), *parts])
    if guest is None:
        guest = functools.partial(vm.Guest, kernel, directory=SOURCE, counting=True)
    guest = guest(command, OUTPUT / f"console-{kernel.name}.log", silence=900)
    print(f"==> booting {kernel.release} for {' '.join(parts)}", flush=True)
    reports = []
    for line in guest:
        try:
            report = json.loads(line)
        except ValueError:
            print(line, flush=True)
            continue
        reports.append(report)
        show(report)
    if guest.status != 0:
        raise Failure(f"{guest.why or 'the benchmark failed in the guest'}; its console: {guest.console}")
    return reports


def show(report):
    """One line for each row, as it arrives."""
    if "skipped" in report:
        print(f"    {bench_report.label(report)}: skipped: {report['skipped']}", flush=True)
    elif "row" in report:
        figures = "  ".join(f"{what} {bench_report.number(what, values)}" for what, values in report["figures"].items())
        print(f"    {bench_report.label(report)}: {figures}", flush=True)
    elif "part" in report:
        print(f"==> {report['part']}: {report['guest_seconds']} guest seconds", flush=True)


def prepare(kernel):
    """What the guest needs: modules, programs and data."""
    return (build.modules(kernel) or build.make("ovbd")
            or subprocess.run([sys.executable, SOURCE / "selftests/bench/data.py", OUTPUT / "data"]).returncode)


def profile(kernel):
    """The functions in which the workloads of W spend their instructions."""
    if prepare(kernel):
        return 1
    for report in run(kernel, [f"profile/{name}" for name in os.environ.get("W", "lz4-4k-*").split()]):
        if "profile" not in report:
            continue
        total = report["instructions"]
        print(f"\n{report['profile']}: {total:,} instructions for each {report['unit']}")
        for percent, function, module in report["functions"]:
            print(f"{percent * total / 100:12,.0f} {percent:6.1f} %  {function} {module}")
    return 0


def wall(kernel, parts):
    """Runs parts by the clock on the wall."""
    scaling = [part for part in parts if part.partition("/")[0] == SCALING]
    reports = []
    if others := [part for part in parts if part not in scaling]:
        clocked = _clocked(kernel)
        reports += run(clocked, others, clocked.guest)
    if scaling:
        # Not User Mode Linux: where CPUs are said to share no cache, workqueues keep work where it was queued.
        boots = [run(kernel, scaling, functools.partial(kernel.guest, cpus=cpus)) for cpus in (1, 2) * BOOTS]
        reports += bench_report.middle(itertools.chain(*boots))
    return reports


def _clocked(kernel):
    """The stock kernel where KVM works; elsewhere User Mode Linux."""
    if vm.kvm_runs(kernel.vmlinuz):
        return kernel
    kernel = built_kernels.NativeKernel(kernel)
    kernel.ensure()
    if build.modules(kernel):
        raise Failure(f"the modules do not build for the {kernel.name} kernel")
    return kernel


def bench(kernel):
    """All parts, or those that B names (and of those the rows that match: `zfile/lz4-4k*`)."""
    lens = os.environ.get("LENS", "instructions")
    if lens not in PARTS:
        raise Failure(f"LENS is one of: {' '.join(PARTS)}")
    if prepare(kernel):
        return 1
    reports = (run if lens == "instructions" else wall)(kernel, os.environ.get("B", "").split() or PARTS[lens])
    lines = [*bench_report.tables(reports, lens), *bench_report.goal_lines(reports, lens)]
    print("\n".join(lines), flush=True)
    about = {"lens": lens, "kernel": kernel.release, "version": kernel.version, "cpu": vm.COUNTED_CPU,
             "data": json.loads((OUTPUT / "data/recipe.json").read_text())}
    (OUTPUT / f"{lens}.json").write_text(json.dumps({"about": about, "reports": reports}, indent=1) + "\n")
    if lens == "instructions":
        plot.write(OUTPUT, reports)
    return 0
