"""Fronts as SVG, drawn by matplotlib and coloured by the page that holds them.

matplotlib is asked for stand-in colours, which become the page's CSS variables, so that one drawing
is legible on light, on dark and on paper.
"""

import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from effjax.evaluate.columns import count
from effjax.evaluate.fronts import Front, better, staircase
from effjax.evaluate.pareto import Direction

Kind = Literal["baseline", "trained", "transformed"]
Box = tuple[float, float, float, float]

COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--grid)",
    "#040404": "var(--band)",
    "#050505": "var(--baseline)",
    "#060606": "var(--trained)",
    "#070707": "var(--transformed)",
    "#080808": "var(--paper)",
}
INK, MUTED, GRID, BAND, BASELINE, TRAINED, TRANSFORMED, PAPER = COLOURS
MARKERS: dict[Kind, tuple[str, str]] = {
    "baseline": ("o", BASELINE),
    "trained": ("s", TRAINED),
    "transformed": ("^", TRANSFORMED),
}

SIZE = (5.4, 3.9)
LONGEST_LABEL = 26
LOGARITHMIC_FROM = 6.0
"""A cost that spans more than this factor is drawn on a logarithmic axis."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "effjax",
    "text.parse_math": False,
    "font.size": 9.5,
    "axes.linewidth": 0.8,
}


@dataclass(frozen=True)
class Mark:
    """How one row is drawn: its label, which kind of row it is, whether its saving is simulated."""

    label: str
    kind: Kind
    simulated: bool
    low: float | None
    high: float | None


def draw(
    found: Front, marks: Sequence[Mark], metric: str, band: tuple[float, float] | None, prefix: str
) -> str:
    """Draws quality against one axis as an SVG element.

    `marks` describes each of `found.rows`; `band` is the range of quality that the baseline's seeds
    span; `prefix` keeps the element's ids apart from those of the page's other drawings.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the page's font has it
        figure = Figure(figsize=SIZE, layout="constrained", dpi=72)  # SVG's: pixels are points
        axes = figure.add_subplot()
        _frame(axes, found, metric)
        if band is not None:
            axes.axhspan(*band, color=BAND, linewidth=0, zorder=0)
        across = _ranks(found) if found.equal else found.costs
        _points(axes, across, found.qualities, marks)
        _line(axes, found, better(metric))
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # the labels are placed where the points now are
        _labels(axes, across, found, marks)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _inline(out.getvalue(), prefix)


def _ranks(found: Front) -> tuple[float, ...]:
    """Where the rows stand side by side, in order of quality, on an axis that they are equal in."""
    order = sorted(found.qualities)
    ties = {q: order.count(q) for q in order}
    seen: dict[float, int] = {}
    places = []
    for q in found.qualities:
        seen[q] = seen.get(q, -1) + 1
        places.append(float(order.index(q) + min(seen[q], ties[q])))
    return tuple(places)


def _frame(axes: Any, found: Front, metric: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    costs, less = found.costs, found.axis.direction == "min"
    what = f"{found.axis.title} ({'less' if less else 'more'} is better)"
    if found.equal:
        axes.set_xticks([])
        what = f"{found.axis.title}: {count(max(costs))} each; rows in order of quality"
    elif max(costs) > LOGARITHMIC_FROM * min(costs) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(LogLocator(subs=()))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _tick(x)))
    axes.set_xlabel(what, color=INK)
    down = better(metric) == "min"
    name = metric.replace("_", " ")
    axes.set_ylabel(f"{name} ({'less' if down else 'more'} is better)", color=INK)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelcolor=MUTED, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED)
    axes.margins(0.2, 0.14)


def _tick(x: float) -> str:
    number, space, prefix = (count(round(x, 9)) or "").partition(" ")
    return (number.rstrip("0").rstrip(".") if "." in number else number) + space + prefix


def _points(
    axes: Any, across: Sequence[float], qualities: Sequence[float], marks: Sequence[Mark]
) -> None:
    for x, y, mark in zip(across, qualities, marks, strict=True):
        shape, colour = MARKERS[mark.kind]
        if mark.low is not None and mark.high is not None:
            axes.plot([x, x], [mark.low, mark.high], color=colour, linewidth=0.8, alpha=0.55)
        axes.plot(
            x,
            y,
            shape,
            markersize=6,
            markerfacecolor=PAPER if mark.simulated else colour,
            markeredgecolor=colour,
            markeredgewidth=1.3,
            zorder=3,
        )


def _line(axes: Any, found: Front, quality: Direction) -> None:
    """The border of what the front beats: from its worst edge, corner by corner, to its dearest."""
    corners = staircase(found, quality)
    if found.equal or not corners:
        return
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    worst, dearest = (
        top if quality == "min" else bottom,
        right if found.axis.direction == "min" else left,
    )
    xs, ys = [corners[0][0]], [worst]
    for x, y in corners:
        xs, ys = [*xs, x, x], [*ys, ys[-1], y]
    axes.plot([*xs, dearest], [*ys, ys[-1]], color=MUTED, linewidth=1.1, dashes=(4, 2.5), zorder=1)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)


def _labels(axes: Any, across: Sequence[float], found: Front, marks: Sequence[Mark]) -> None:
    """Puts each label where it covers the fewest points and labels, the optimal rows' first."""
    bounds = axes.get_window_extent().extents
    spots = axes.transData.transform(list(zip(across, found.qualities, strict=True)))
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in spots]
    for k in sorted(range(len(marks)), key=lambda k: found.rows[k] not in found.optimal):
        optimal = found.rows[k] in found.optimal
        text = axes.text(
            0,
            0,
            _short(marks[k].label),
            transform=None,
            color=INK if optimal else MUTED,
            weight="bold" if optimal else "normal",
            fontsize=8.5,
            va="center_baseline",
            zorder=4,
        )
        extent = text.get_window_extent()
        box = _place(spots[k], (extent.width, extent.height), taken, bounds)
        text.set_position((box[0], (box[1] + box[3]) / 2))
        taken.append(box)
        _lead(axes, spots[k], box)


def _place(
    spot: Sequence[float], size: tuple[float, float], taken: Sequence[Box], bounds: Box
) -> Box:
    """The box near a point that overlaps least; among equals the nearest, then the right one."""
    (x, y), (width, height) = spot, size
    boxes = []
    for reach in (8, 13, 20, 28, 38, 50, 64):
        for degrees in (0, 180, 45, -45, 135, -135, 90, -90, 22, -22, 158, -158):
            dx, dy = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
            left = x + reach * dx - (0 if dx > 0.1 else width if dx < -0.1 else width / 2)
            low = y + reach * dy - height / 2
            boxes.append((reach, (left, low, left + width, low + height)))

    def cost(candidate: tuple[float, Box]) -> float:
        reach, box = candidate
        outside = width * height - _overlap(box, bounds)
        return sum(_overlap(box, other) for other in taken) + 4 * outside + 0.4 * reach

    return min(boxes, key=cost)[1]


def _lead(axes: Any, spot: Sequence[float], box: Box) -> None:
    """A thin line from a point to its label, where they are apart."""
    x = min(max(spot[0], box[0]), box[2])
    y = min(max(spot[1], box[1]), box[3]) if x == spot[0] else (box[1] + box[3]) / 2
    if math.dist((x, y), spot) > 12:
        line = {"color": MUTED, "linewidth": 0.6, "transform": None, "zorder": 2}
        axes.plot([spot[0], x], [spot[1], y], **line, scalex=False, scaley=False)


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(wide, 0.0) * max(high, 0.0)


def _short(label: str) -> str:
    flat = "".join(c if c.isprintable() else " " for c in label)
    return flat if len(flat) <= LONGEST_LABEL else flat[: LONGEST_LABEL - 1] + "…"


def _inline(svg: str, prefix: str) -> str:
    """The `svg` element alone, its ids made the page's and its colours the page's variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*sans-serif", "var(--font)", svg)
    for stand_in, variable in COLOURS.items():
        svg = svg.replace(stand_in, variable)
    return svg.replace("<svg", '<svg role="presentation" aria-hidden="true"', 1)
