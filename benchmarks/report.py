"""The results of a benchmark: figures, the references of the same run, and whether they are good enough.

Absolute times on a shared machine are noise; the ratio of two that were taken in turns is not. So a goal, and
the bound that CI holds a figure to (check.py), is always one of ratios.
"""

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any


class Held(StrEnum):
    """Whether a later run is held to the ratio of this one."""

    ALWAYS = "always"
    # the ratio to a peer, which not every machine has
    IF_THERE = "if there"
    # an unsteady figure, or one that may be 0
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class Figure:
    """One number, and its reference."""

    # the module that measured it
    suite: str
    name: str
    value: float
    unit: str
    against: str = ""
    reference: float = 0.0
    # the goal of the ratio: the most, or the least where more is better (a rate)
    goal: float | None = None
    more_is_better: bool = False
    held: Held = Held.ALWAYS

    @property
    def key(self) -> str:
        """The name that no other figure has."""
        return f"{self.suite}: {self.name}" + (f" / {self.against}" if self.against else "")

    @property
    def ratio(self) -> float | None:
        """The number in units of its reference."""
        return self.value / self.reference if self.reference else None

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None where there is none."""
        if self.goal is None or self.ratio is None:
            return None
        return self.ratio >= self.goal if self.more_is_better else self.ratio <= self.goal


def table(figures: Iterable[Figure]) -> str:
    """Return a table in Markdown, which reads well at a terminal too."""
    rows: list[Sequence[str]] = [("what", "measured", "against", "ratio", "goal", "")]
    for figure in figures:
        ratio, goal = figure.ratio, figure.goal
        sign = "≥" if figure.more_is_better else "≤"
        rows.append(
            (
                f"{figure.suite}: {figure.name}",
                quantity(figure.value, figure.unit),
                f"{figure.against}: {quantity(figure.reference, figure.unit)}" if figure.against else "",
                "" if ratio is None else f"{ratio:.2f}",
                "" if goal is None else f"{sign} {goal:g}",
                {None: "", True: "met", False: "missed"}[figure.met],
            )
        )
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of equal length, the first of them the head, as a table."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    head, *others = rows
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in (head, ["-" * width for width in widths], *others)
    )


def quantity(value: float, unit: str) -> str:
    """Return a number with three significant digits, and its unit."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f} {unit}".rstrip()


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which *share* (0 to 1) of the values lie."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


@dataclass(frozen=True, slots=True)
class Report:
    """Figures that may stand in one table: of one machine, its versions, and one day."""

    machine: dict[str, str]
    figures: list[Figure]

    @classmethod
    def load(cls, path: Path) -> "Report":
        """Return the result that `save` has written."""
        found: dict[str, Any] = json.loads(path.read_text())
        figures = [Figure(**{**members, "held": Held(members["held"])}) for members in found["figures"]]
        return cls(found["machine"], figures)

    def save(self, path: Path) -> None:
        """Write the result, for the plots and for later runs."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False)
        path.write_text(text + "\n")

    def joined(self, later: "Report") -> "Report":
        """Return the later one, with the suites that only this one ran, if they may stand in one table."""
        if self.machine != later.machine:
            return later
        again = {figure.suite for figure in later.figures}
        return Report(later.machine, [one for one in self.figures if one.suite not in again] + later.figures)

    def text(self) -> str:
        """Return the machine, and the table."""
        machine = ", ".join(f"{key} {value}" for key, value in self.machine.items())
        return f"{machine}\n\n{table(self.figures)}"
