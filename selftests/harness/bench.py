# SPDX-License-Identifier: GPL-2.0
"""`make bench`: boots the guest whose clock counts instructions, and makes tables of what it reports."""

import json
import os
import shlex
import subprocess
import sys

import bench_report
import stages
import vm
from cache import SOURCE, Failure

OUTPUT = SOURCE / "build/bench"
PARTS = ["segments", "stacks", "zfile", "debian"]


def run(kernel, parts, cpu=vm.COUNTED_CPU):
    """Runs parts of the benchmark in one boot; returns what the guest reported, a list of objects."""
    vm.require_vng()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["env", f"SRC={SOURCE}", "python3", str(SOURCE / "selftests/bench/guest.py"), *parts])
    guest = vm.Guest(kernel, command, OUTPUT / "console.log", SOURCE, silence=900,
                     arguments=vm.count_instructions(cpu), accelerator=vm.EMULATION)
    print(f"==> booting {kernel.release} with a clock that counts instructions (CPU {cpu})", flush=True)
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
        figures = "  ".join(f"{what} {bench_report.number(values)}" for what, values in report["figures"].items())
        print(f"    {bench_report.label(report)}: {figures}", flush=True)
    elif "part" in report:
        print(f"==> {report['part']}: {report['guest_seconds']} guest seconds", flush=True)


def build(kernel):
    """What the guest needs: modules, programs and data."""
    return (stages.kernel_make(kernel, "DM_SELFTESTS=1", "modules") or stages.make("ovbd")
            or subprocess.run([sys.executable, SOURCE / "selftests/bench/data.py", OUTPUT / "data"]).returncode)


def profile(kernel):
    """The functions in which the workloads of W spend their instructions."""
    if build(kernel):
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
    parts = os.environ.get("B", "").split() or PARTS
    if build(kernel):
        return 1
    reports = run(kernel, parts, os.environ.get("OVBD_BENCH_CPU", vm.COUNTED_CPU))
    print("\n".join([*bench_report.tables(reports), *bench_report.goal_lines(reports)]), flush=True)
    (OUTPUT / "bench.json").write_text(json.dumps(reports, indent=1) + "\n")
    return 0
