"""Draw the figures of a run: `python -m benchmarks.plots [FIGURES [DIRECTORY]]`.

Needs matplotlib (`scripts/install bench`). The same figures give the same bytes: no dates, no random names.
"""

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from cycler import cycler
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import FuncFormatter

from benchmarks.report import Figure, Report, quantity

FIGURES: Final = "build/bench/figures.json"
DIRECTORY: Final = "docs/performance"
# Readable on white and on GitHub's dark page alike; there is no background.
INK: Final = "#808890"
COLOURS: Final = ("#2f81f7", "#e0823d", "#3fa45b", "#b35ed1", "#d1495b")
OURS, THEIRS = COLOURS[0], "#9aa4ae"
STYLE: Final[Any] = {
    "svg.hashsalt": "pjw",
    # text stays text: small files, and the reader's own font
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.facecolor": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": INK,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
WIDTH: Final = 7.5

# The points of each curve, by its name.
Curves = dict[str, list[tuple[float, float]]]


def main() -> None:
    """Draw each plot whose figures are there."""
    source, directory = (Path(word) for word in (sys.argv[1:] + [FIGURES, DIRECTORY][len(sys.argv) - 1 :]))
    for path in draw_all(Report.load(source).figures, directory):
        print(path)


def draw_all(figures: Iterable[Figure], directory: Path) -> list[Path]:
    """Write the plots into a directory; return the written ones."""
    figures, written = list(figures), []
    directory.mkdir(parents=True, exist_ok=True)
    mpl.use("svg")
    mpl.rcParams.update(STYLE)
    for name, draw in PLOTS.items():
        drawing = draw(figures)
        if drawing is not None:
            path = directory / f"{name}.svg"
            drawing.savefig(path, transparent=True, bbox_inches="tight", metadata={"Date": None})
            plt.close(drawing)
            written.append(path)
    return written


def _start(figures: list[Figure]) -> Drawing | None:
    return _bars(figures, "start", "ms", "milliseconds, less is better")


def _stream(figures: list[Figure]) -> Drawing | None:
    return _bars(figures, "stream", "MB/s", "MB/s, more is better")


def _bars(figures: list[Figure], suite: str, unit: str, label: str) -> Drawing | None:
    """Draw for each measurement pjw, and below it each contestant of the same turns."""
    groups: dict[str, dict[str, float]] = {}
    for figure in figures:
        if figure.suite == suite and figure.unit == unit:
            group = groups.setdefault(figure.name, {"pjw": figure.value})
            if figure.against:
                group[figure.against] = figure.reference
    if not groups:
        return None
    drawing, all_axes = plt.subplots(
        len(groups),
        1,
        sharex=True,
        squeeze=False,
        figsize=(WIDTH, sum(0.28 * len(group) + 0.5 for group in groups.values())),
        height_ratios=[len(group) + 1 for group in groups.values()],
        layout="constrained",
    )
    for axes, (name, group) in zip(all_axes[:, 0], groups.items(), strict=True):
        bars = axes.barh(list(group), list(group.values()), color=[OURS] + [THEIRS] * (len(group) - 1))
        axes.bar_label(bars, [quantity(value, "") for value in group.values()], padding=3)
        axes.margins(x=0.1)
        axes.invert_yaxis()
        axes.set_title(name, loc="left")
        axes.tick_params(axis="y", length=0)
    all_axes[-1, 0].set_xlabel(label)
    return drawing


def _scale(figures: list[Figure]) -> Drawing | None:
    memory = _curves(figures, "scale", r"(?P<curve>.*)memory of each of (?P<x>\d+) jobs", "the bound|")
    starts = _curves(figures, "scale", r"(?P<curve>start) beside (?P<x>\d+) jobs", "beside .*")
    if not memory or not starts:
        return None
    named = {"": "processes (PSS)", "kernel's ": "kernel", "available ": "less available"}
    memory = {named[name]: points for name, points in memory.items()}
    drawing, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3), layout="constrained")
    _draw_curves(left, memory, "running jobs", "KiB per job")
    _draw_curves(right, starts, "running jobs", "ms until started")
    return drawing


def _history(figures: list[Figure]) -> Drawing | None:
    curves = _curves(figures, "history", r"(?P<curve>.*), (?P<x>[\d,]+) ended jobs", ".*")
    if not curves:
        return None
    drawing, axes = plt.subplots(figsize=(WIDTH, 3.2), layout="constrained")
    axes.set_yscale("log")
    _draw_curves(axes, curves, "ended jobs", "microseconds")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return drawing


def _curves(figures: list[Figure], suite: str, name: str, against: str) -> Curves:
    """Return the series among figures whose names say which *curve* they belong to, and at which *x*."""
    curves: Curves = {}
    for figure in figures:
        match = re.fullmatch(name, figure.name)
        if figure.suite == suite and match and re.fullmatch(against, figure.against):
            point = float(match["x"].replace(",", "")), figure.value
            curves.setdefault(match["curve"], []).append(point)
    return curves


def _draw_curves(axes: Axes, curves: Curves, across: str, up: str) -> None:
    for name, points in curves.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=name)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.set_ylim(bottom=0 if axes.get_yscale() == "linear" else None)
    axes.grid(visible=True)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    if len(curves) > 1:
        axes.legend()


PLOTS: Final[dict[str, Callable[[list[Figure]], Drawing | None]]] = {
    "start": _start,
    "stream": _stream,
    "scale": _scale,
    "history": _history,
}

if __name__ == "__main__":
    main()
