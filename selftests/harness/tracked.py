# SPDX-License-Identifier: GPL-2.0
"""The tracked figures: a short benchmark whose results must be those of selftests/bench/tracked.json.

A figure is a ratio: a read through the target over one through dm-linear, or over what it cannot do without, all in
one boot. What the kernel changes below both cancels out, so an update of Debian's kernel within a series changes
nothing; for another series the figures are not compared until someone updates them.
"""

import json
import re

import bench
import build
from bench_report import Figures, label
from cache import SOURCE
from report import Counts

FILE = SOURCE / "selftests/bench/tracked.json"
TOLERANCE = 0.02
# Where the Makefile unpacks the commit to compare with.
BASE = bench.OUTPUT / "base"


def ratios(reports):
    """The tracked figures of a run."""
    of = Figures(reports)

    def reads(row, key="random"):
        return of("tracked", row, key)

    figures = {f"{row} / dm-linear, 4 KiB random": reads(row) / reads("dm-linear")
               for row in ("dm-overlaybd, 1 segment", "dm-overlaybd, 100k segments")}
    for key, what in (("random", "4 KiB random"), ("touch", "first touch")):
        figures[f"dm-overlaybd / dm-linear, DAX, {what}"] = reads("dm-overlaybd, DAX", key) / reads("dm-linear, DAX", key)
    # Blocks of 4 KiB: 256 of them are a MiB.
    for row in ("dm-zfile lz4", "dm-zfile zstd"):
        codec = reads(row, "crc") + reads(row, "decode")
        figures[f"{row} / its parts, 4 KiB random"] = reads(row) / (reads("raw brd") + codec / 256)
        figures[f"{row} / its parts, 1 MiB sequential"] = reads(row, "sequential") / (reads(row, "lower") + codec)
    return figures


def series(kernel):
    """The part of a release that a stable update does not change."""
    return re.match(r"\d+\.\d+", kernel.release)[0]


def compare(wanted, figures):
    """Prints each figure beside the one that is wanted, and returns their counts."""
    counts = Counts()
    for name in sorted(wanted.keys() | figures.keys()):
        old, new = wanted.get(name), figures.get(name)
        good = old is not None and new is not None and abs(new / old - 1) <= TOLERANCE
        counts.add(Counts(passed=1) if good else Counts(failed=1))
        print(f"{'ok  ' if good else 'FAIL'}  {name}: {shown(new)}, tracked {shown(old)}", flush=True)
    return counts


def shown(value):
    return "none" if value is None else f"{value:.3f}"


def check(kernel):
    """Runs the tracked benchmark and compares; for `make test`."""
    known = json.loads(FILE.read_text())
    if known["kernel"] != series(kernel):
        print(f"skipped: the tracked figures are for Linux {known['kernel']}; `make bench-track` renews them")
        return Counts(skipped=1)
    counts = compare(known["figures"], ratios(bench.run(kernel, ["tracked"])))
    if counts.failed:
        print(f"A figure moved by more than {TOLERANCE:.0%}. If that is meant: `make bench-track REASON='why'` and "
              f"commit {FILE.relative_to(SOURCE)} with the change.", flush=True)
    return counts


def update(kernel, reason):
    """Writes the figures of this checkout."""
    figures = ratios(bench.run(kernel, ["tracked"]))
    known = {"kernel": series(kernel), "reason": reason,
             "figures": {name: round(value, 3) for name, value in figures.items()}}
    FILE.write_text(json.dumps(known, indent=2) + "\n")
    print(FILE.read_text(), end="")
    return 0


def compare_with_base(kernel):
    """The tracked benchmark with the modules of another commit, whose tree is in BASE, and with those of this one."""
    if build.modules(kernel) or build.make("ovbd") or build.kbuild(kernel, "DM_SELFTESTS=1", "modules", source=BASE):
        return 1
    runs = [{(label(report), key): min(values) for report in bench.run(kernel, ["tracked"], modules=modules)
             if "figures" in report for key, values in report["figures"].items()} for modules in (BASE, SOURCE)]
    print(f"\n{'instructions':44} {'base':>12} {'now':>12} {'change':>8}")
    for (row, key), old in runs[0].items():
        if new := runs[1].get((row, key)):
            print(f"{row + ': ' + key:44} {old:12,.0f} {new:12,.0f} {new / old - 1:+8.1%}")
    return 0
