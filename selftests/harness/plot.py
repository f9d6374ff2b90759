# SPDX-License-Identifier: GPL-2.0
"""The picture of the benchmark as SVG: what a read costs against the number of layers, for everything that stacks."""

import math
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 860, 480
LEFT, RIGHT, TOP, BOTTOM = 80, 210, 56, 56
# Lines that a linear axis has at most.
LINES = 8
# Colours that people who confuse red and green can tell apart (Okabe and Ito), with markers for print.
STYLES = [("#0072b2", "circle"), ("#d55e00", "square"), ("#009e73", "triangle"), ("#cc79a7", "diamond"),
          ("#e69f00", "circle"), ("#56b4e9", "square")]


class Axis:
    """An axis from pixel to pixel, logarithmic unless it is `linear`."""

    def __init__(self, low, high, start, end, linear=False):
        self.low, self.high, self.start, self.end = low, high, start, end
        self._linear = linear
        self._scale = float if linear else math.log10

    def __call__(self, value):
        low, high = self._scale(self.low), self._scale(self.high)
        return self.start + (self._scale(value) - low) / (high - low) * (self.end - self.start)

    def round_values(self):
        """Values on the axis to draw lines at."""
        steps = [step * 10 ** power for power in range(11) for step in (1, 2, 5)]
        if self._linear:
            step = next(step for step in steps if (self.high - self.low) / step <= LINES)
            steps = range(0, int(self.high) + 1, step)
        return [value for value in steps if self.low <= value <= self.high]


def marker(shape, x, y, colour):
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>'
    corners = {"square": [(-4, -4), (4, -4), (4, 4), (-4, 4)], "triangle": [(0, -5), (5, 4), (-5, 4)],
               "diamond": [(0, -5.5), (5.5, 0), (0, 5.5), (-5.5, 0)]}[shape]
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{points}" fill="{colour}"/>'


def text(x, y, words, anchor="start", size=13, more=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" {more}>{escape(words)}</text>'


def short(value):
    return f"{value / 1e6:,g} M" if value >= 1e6 else f"{value:,}"


def spread(labels, gap=16):
    """Moves the labels at the ends of the curves apart: triples of position, text and colour."""
    placed = []
    for y, words, colour in sorted(labels):
        placed.append((max(y, placed[-1][0] + gap) if placed else y, words, colour))
    return placed


def chart(title, unit, series, level, counted="layers", marked=(1, 2, 5, 10, 20, 50, 100, 250), linear=False):
    """An SVG of `series`, names with pairs of a count, of layers or what is `counted`, and cost, and of `level`, the name
    and cost of none at all. The axis has those counts that are `marked`. Where it is `linear` both axes begin at 0, else
    they are logarithmic."""
    costs = [cost for _, points in series for _, cost in points] + [level[1]]
    most, dearest = max(count for _, points in series for count, _ in points), max(costs)
    if linear:
        x = Axis(0, most * 1.05, LEFT, WIDTH - RIGHT, linear=True)
        y = Axis(0, dearest * 1.1, HEIGHT - BOTTOM, TOP, linear=True)
    else:
        x = Axis(0.9, most * 1.1, LEFT, WIDTH - RIGHT)
        y = Axis(min(costs) / 1.6, dearest * 1.3, HEIGHT - BOTTOM, TOP)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
           'font-family="sans-serif" fill="#222">', f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
           text(LEFT, 24, title, size=16, more='font-weight="bold"'), text(LEFT, 43, unit, size=12, more='fill="#555"')]
    for value in y.round_values():
        out += [f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#e4e4e4"/>',
                text(LEFT - 8, y(value) + 4, short(value), "end", 12)]
    for count in marked:
        if count <= x.high:
            out += [f'<line x1="{x(count):.1f}" x2="{x(count):.1f}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 5}" '
                    'stroke="#888"/>', text(x(count), HEIGHT - BOTTOM + 20, str(count), "middle", 12)]
    out += [f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}" stroke="#888"/>',
            text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, counted, "middle"),
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(level[1]):.1f}" y2="{y(level[1]):.1f}" stroke="#555" '
            'stroke-dasharray="5 4"/>']
    labels = [(y(level[1]), level[0], "#555")]
    for (name, points), (colour, shape) in zip(series, STYLES):
        path = " ".join(f"{x(count):.1f},{y(cost):.1f}" for count, cost in points)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out += [marker(shape, x(count), y(cost), colour) for count, cost in points]
        labels.append((y(points[-1][1]), name, colour))
    out += [text(WIDTH - RIGHT + 14, at + 4, words, more=f'fill="{colour}"') for at, words, colour in spread(labels)]
    return "\n".join([*out, "</svg>", ""])


CHARTS = {"random": ("Random 4 KiB reads of a stack of layers", "instructions for each read"),
          "sequential": ("Sequential 1 MiB reads of a stack of layers", "instructions for each MiB"),
          "activation": ("Activation of a stack of layers", "instructions")}


def write(folder, reports):
    """Writes the charts of the stacks for which there are figures."""
    for figure, (title, unit) in CHARTS.items():
        series, level = {}, None
        for report in reports:
            if report.get("suite") != "stacks" or figure not in report.get("figures", {}):
                continue
            cost = min(report["figures"][figure])
            if report["row"] == "dm-linear":
                level = ("dm-linear, no layers", cost)
            elif cost > 0:
                series.setdefault(report["row"], []).append((report["layers"], cost))
        if series and level:
            path = folder / f"layers-{figure}.svg"
            path.write_text(chart(title, unit, list(series.items()), level))
            print(f"==> {path}", flush=True)
