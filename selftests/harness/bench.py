# SPDX-License-Identifier: GPL-2.0
"""`make bench`: boots the guest whose clock counts instructions, and makes tables of what it reports."""

import json
import os
import shlex
import subprocess
import sys

import bench_report
import build
import plot
import vm
from cache import SOURCE, Failure

OUTPUT = SOURCE / "build/bench"
# The parts of each lens, in the order of their run time.
PARTS = {"instructions": ["segments", "stacks", "zfile", "slow", "debian"],
         "wall": ["scaling", "segments", "slow", "zfile"]}


def run(kernel, parts, lens="instructions", modules=SOURCE):
    """Runs parts of the benchmark in one boot; returns what the guest reported, a list of objects.

    The lens says what a nanosecond of the guest is: an instruction, or a nanosecond. `modules` is the checkout from
    which the targets are loaded.
    """
    vm.require_vng()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["env", f"SRC={SOURCE}", f"KO_DIR={modules}", "python3",
                          str(SOURCE / "selftests/bench/guest.py"), *parts])
    counting = lens == "instructions"
    guest = vm.Guest(kernel, command, OUTPUT / f"console-{lens}.log", SOURCE, silence=900, emulated=vm.FEW_TIMERS,
                     counting=counting)
    print(f"==> booting {kernel.release}{' with a clock that counts instructions' * counting}", flush=True)
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


def bench(kernel):
    """All parts, or those that B names (and of those the rows that match: `zfile/lz4-4k*`)."""
    lens = os.environ.get("LENS", "instructions")
    if lens not in PARTS:
        raise Failure(f"LENS is one of: {' '.join(PARTS)}")
    if prepare(kernel):
        return 1
    reports = run(kernel, os.environ.get("B", "").split() or PARTS[lens], lens)
    emulated = lens == "wall" and not vm.kvm_runs(kernel.vmlinuz)
    lines = [*bench_report.tables(reports, lens), *bench_report.goal_lines(reports, lens)]
    if emulated:
        lines += ["", "WARNING: these are times under emulation (TCG), on whatever else this machine does: only ratios "
                  "mean anything, and only on a quiet machine."]
    print("\n".join(lines), flush=True)
    about = {"lens": lens, "kernel": kernel.release, "version": kernel.version, "cpu": vm.COUNTED_CPU,
             "emulated": emulated or lens == "instructions",
             "data": json.loads((OUTPUT / "data/recipe.json").read_text())}
    (OUTPUT / f"{lens}.json").write_text(json.dumps({"about": about, "reports": reports}, indent=1) + "\n")
    if lens == "instructions":
        plot.write(OUTPUT, reports)
    return 0
