# SPDX-License-Identifier: GPL-2.0
"""What the benchmark's reports say: tables, and whether the targets reach what is asked of them."""

import statistics

# The columns of each part, with what a figure is; instructions unless it says otherwise.
COLUMNS = {
    "segments": {"random": "4 KiB random", "split": "a bio of 4 KiB segments", "activation": "activation, k",
                 "memory": "index, KiB"},
    "stacks": {"first": "first read", "random": "4 KiB random", "odd": "4 KiB odd sector", "jobs": "2 jobs, 4 KiB",
               "sequential": "1 MiB sequential", "activation": "activation, k", "memory": "memory, KiB"},
    "zfile": {"random": "4 KiB random", "cold": "4 KiB, page cache", "sequential": "1 MiB sequential",
              "buffered": "1 MiB, page cache", "crc": "parts: CRC", "decode": "decompression",
              "kernel decode": "the kernel's", "lower": "lower read", "stored": "stored, KiB"},
    "commits": {"random": "4 KiB random", "sequential": "1 MiB sequential"},
    "verity": {"random": "4 KiB random", "sequential": "1 MiB sequential"},
    "dax": {"random": "4 KiB random", "sequential": "1 MiB sequential", "touch": "first touch", "huge": "in huge pages",
            "exec": "a program, k"},
    "slow": {"sequential": "1 MiB sequential", "buffered": "1 MiB, page cache", "stored": "stored, KiB"},
    "scaling": {"one": "1 CPU", "two": "2 CPUs"},
    "debian": {"mount": "mount, k", "start bash": "start bash, k", "start apt": "start apt-get, k", "tar": "tar c, k",
               "size": "size, KiB"},
}
TITLES = {
    "segments": "dm-overlaybd beside dm-linear: {} for each read",
    "stacks": "Layers: {} for each 4 KiB read, MiB, activation",
    "zfile": "Compression: {} for each 4 KiB read, MiB",
    "commits": "A writable stack before and after commits: {} for each 4 KiB read, MiB",
    "verity": "dm-verity over a stack: {} for each 4 KiB read, MiB",
    "dax": "Files in persistent memory: {} for each 4 KiB read, MiB, page",
    "slow": "From a device that serves 20 MB each second: {} for each MiB",
    "scaling": "dm-zfile with one CPU and with two: {} for each MiB",
    "debian": "A Debian root: {}",
}
UNITS = {"instructions": "instructions", "wall": "nanoseconds"}
# What the figures of a column are divided by.
SCALES = {"KiB": 1024, "k": 1000}
# Measurements of one boot that differ by less are called equal. The clock interrupts programs and reads alike; what
# happens once, as opposed to a read of which there are thousands, is not averaged.
EQUAL, EQUAL_ONCE = 0.003, 0.1
ONCE = ("first", "activation", "memory", "mount", "start bash", "start apt", "tar", "cold", "exec", "touch", "huge")


def number(key, values, scale=1):
    """The figure, marked where its measurements differ."""
    tolerance = EQUAL_ONCE if key in ONCE else EQUAL
    same = max(values) - min(values) <= tolerance * max(abs(value) for value in values)
    return f"{min(values) / scale:,.0f}" + ("" if same else "!")


def middle(reports):
    """The rows of several boots as those of one: of the measurements of a figure, the one in the middle."""
    rows = {}
    for report in reports:
        if "figures" in report:
            row = rows.setdefault((report["suite"], label(report)), report | {"figures": {}})
            for what, values in report["figures"].items():
                row["figures"].setdefault(what, []).extend(values)
    for row in rows.values():
        row["figures"] = {what: [statistics.median(values)] for what, values in row["figures"].items()}
    return list(rows.values())


def tables(reports, lens):
    """The tables of all parts that were run, as lines."""
    for suite, columns in COLUMNS.items():
        rows = [report for report in reports if report.get("suite") == suite and "row" in report]
        columns = {key: title for key, title in columns.items() if any(key in row.get("figures", {}) for row in rows)}
        if not rows:
            continue
        yield ""
        yield TITLES[suite].format(UNITS[lens])
        yield f"{'':36}" + "".join(f"{title:>{width(title)}}" for title in columns.values())
        for row in rows:
            name = label(row)
            if "skipped" in row:
                yield f"{name:36}  skipped: {row['skipped']}"
                continue
            cells = [(key, row["figures"].get(key), title) for key, title in columns.items()]
            yield f"{name:36}" + "".join(
                f"{number(key, values, SCALES.get(title.split(', ')[-1], 1)) if values else '-':>{width(title)}}"
                for key, values, title in cells)
    disturbed = [f"{label(row)}: {key}" for row in reports for key, values in row.get("figures", {}).items()
                 if number(key, values).endswith("!")]
    if disturbed and lens == "instructions":
        yield ""
        yield f"! {len(disturbed)} figures differed between measurements of one boot: " + "; ".join(disturbed)


def width(title):
    return max(12, len(title) + 2)


def label(row):
    layers = row.get("layers")
    return row["row"] + (f", {layers} layer{'s' * (layers != 1)}" if layers else "")


class Figures:
    """Looks figures up by suite, row and key; of the measurements the least counts: what disturbs one adds to it."""

    def __init__(self, reports):
        self._figures = {(report["suite"], label(report)): report["figures"] for report in reports
                         if "figures" in report}

    def __call__(self, suite, row, key):
        return min(self._figures.get((suite, row), {}).get(key, [None]))

    def rows(self, suite, *words):
        """The rows of a suite whose name contains one of the words."""
        return [row for other, row in self._figures if other == suite and any(word in row for word in words)]


def goals(reports):
    """What is asked of the targets: triples of what, the figure, and the most that it may be."""
    of = Figures(reports)

    def ratio(what, value, parts, limit):
        if value is not None and None not in parts:
            yield what, value / sum(parts), limit

    linear = [of("segments", "dm-linear", "random")]
    yield from ratio("dm-overlaybd, 1 segment / dm-linear, 4 KiB random",
                     of("segments", "dm-overlaybd, 1 segment", "random"), linear, 1.05)
    yield from ratio("dm-overlaybd, 1M segments / dm-linear, 4 KiB random",
                     of("segments", "dm-overlaybd, 1 layer, 1M segments", "random"), linear, 1.15)
    yield from ratio("dm-overlaybd, 250 layers / 1 layer, 1M segments",
                     of("segments", "dm-overlaybd, 250 layers, 1M segments", "random"),
                     [of("segments", "dm-overlaybd, 1 layer, 1M segments", "random")], 1.02)
    yield from ratio("dm-overlaybd, 4 KiB segments / dm-linear, a split bio",
                     of("segments", "dm-overlaybd, 4 KiB segments", "split"),
                     [of("segments", "dm-linear, 4 KiB targets", "split")], 2.0)

    yield from ratio("index of 1M segments in 250 layers / 24 MiB",
                     of("segments", "dm-overlaybd, 250 layers, 1M segments", "memory"), [24 << 20], 1.0)

    lz4 = "dm-zfile lz4 4k"
    blocks = 256
    crc, decode = of("zfile", lz4, "crc"), of("zfile", lz4, "decode")
    if crc is not None and decode is not None:
        yield from ratio("dm-zfile lz4 4k / raw read + CRC + decompression, 4 KiB random",
                         of("zfile", lz4, "random"), [of("zfile", "raw brd", "random"), crc / blocks, decode / blocks],
                         1.25)
        yield from ratio("dm-zfile lz4 4k / lower read + CRC + decompression, 1 MiB sequential",
                         of("zfile", lz4, "sequential"), [of("zfile", lz4, "lower"), crc, decode], 1 / 0.9)
    stack, plain = "dm-overlaybd and dm-zfile", "dm-linear"
    for key, what in (("random", "4 KiB random"), ("sequential", "1 MiB sequential")):
        below = [of("verity", row, key) for row in (f"dm-verity on {plain}", stack, plain)]
        if None not in below:
            most = below[0] + 1.05 * (below[1] - below[2])
            yield from ratio(f"dm-verity on a stack / on dm-linear + 1.05 (stack - dm-linear), {what}",
                             of("verity", f"dm-verity on {stack}", key), [most], 1.0)
    for rival in of.rows("zfile", "erofs", "squashfs", "vdo"):
        for key, what in (("cold", "4 KiB random"), ("buffered", "1 MiB sequential")):
            # EROFS is what was ahead of the kernel's decoder.
            limit = 0.9 if key == "buffered" and rival.startswith("erofs lz4") else 1.0
            yield from ratio(f"dm-zfile lz4 4k / {rival}, {what} through the page cache",
                             of("zfile", lz4, key), [of("zfile", rival, key)], limit)
    yield from ratio("dm-zfile lz4 4k / 3.75 million, 1 MiB sequential through the page cache",
                     of("zfile", lz4, "buffered"), [3_750_000], 1.0)
    yield from ratio("dm-zfile lz4 4k / 19,500, 4 KiB random, direct", of("zfile", lz4, "random"), [19_500], 1.0)
    yield from ratio("dm-zfile lz4 4k / dm-vdo, 4 KiB random, direct",
                     of("zfile", lz4, "random"), [of("zfile", "dm-vdo lz4", "random")], 1.0)
    yield from ratio("dm-zfile lz4 4k / dm-vdo, 1 MiB sequential, direct",
                     of("zfile", lz4, "sequential"), [of("zfile", "dm-vdo lz4", "sequential")], 1.0)
    yield from ratio("a writable stack after a commit / before it, 4 KiB random",
                     of("commits", "after a commit", "random"), [of("commits", "writable", "random")], 1.01)
    yield from ratio("a writable stack of a compressed layer / it read-only, 4 KiB random",
                     of("commits", "compressed, writable", "random"), [of("commits", "compressed", "random")], 1.3)
    direct, linear, cached = "dm-overlaybd, 1 layer", "dm-linear", "page cache, cold"
    yield from ratio("dm-overlaybd, DAX / dm-linear, 4 KiB random", of("dax", direct, "random"),
                     [of("dax", linear, "random")], 1.06)
    yield from ratio("dm-overlaybd, DAX / dm-linear, first touch", of("dax", direct, "touch"),
                     [of("dax", linear, "touch")], 1.03)
    yield from ratio("dm-overlaybd, DAX / page cache, cold, 4 KiB random", of("dax", direct, "random"),
                     [of("dax", cached, "random")], 0.25)
    yield from slow_goals(of)


def slow_goals(of):
    """What compresses to half or less is read faster than raw."""
    raw = {key: of("slow", "raw", key) for key in ("sequential", "buffered", "stored")}
    for row in of.rows("slow", "dm-zfile"):
        if of("slow", row, "stored") <= raw["stored"] / 2:
            for key, what in (("sequential", "direct"), ("buffered", "page cache")):
                yield f"{row} / raw, slow device, 1 MiB sequential, {what}", of("slow", row, key) / raw[key], 1.0


def wall_goals(reports):
    """The goals that need a clock: activation, a slow device, the lz4 decoder, and two CPUs, which are to be 1.8 times
    as fast as one."""
    of = Figures(reports)
    activation = of("segments", "dm-overlaybd, 250 layers, 1M segments", "activation")
    if activation is not None:
        yield "activation of 250 layers, 1M segments / 2 s", activation / 2e9, 1.0
    yield from slow_goals(of)
    for row in of.rows("zfile", "dm-zfile lz4", "text"):
        own, kernel = of("zfile", row, "decode"), of("zfile", row, "kernel decode")
        if None not in (own, kernel):
            yield f"lz4 decoder / the kernel's, {row}", own / kernel, 1 / 1.15
    for row in of.rows("scaling", "dm-zfile lz4"):
        yield f"2 CPUs / 1 CPU, {row}", of("scaling", row, "two") / of("scaling", row, "one"), 1 / 1.8


def goal_lines(reports, lens):
    """The goals as a table."""
    lines = []
    for what, value, limit in (goals if lens == "instructions" else wall_goals)(reports):
        sign, verdict = ("<=", "reached") if value <= limit else ("> ", "NOT REACHED")
        lines.append(f"{value:7.3f} {sign} {limit:5.3f}  {verdict:11}  {what}")
    return ["", "What is asked of the targets", *lines] if lines else []
