"""What a benchmark found: figures beside what was measured in the same run, and whether they are good enough.

Absolute times on a shared machine are noise; the ratio of two that were taken in turns is not. So a goal, and
the bound that CI holds a figure to, is always one of ratios.
"""

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

# How much worse than the stored ratio a figure may be before `--check` fails.
REGRESSION: Final = 1.5


@dataclass(frozen=True, slots=True)
class Figure:
    """One number, and what it is held against."""

    suite: str
    name: str
    value: float
    unit: str
    against: str = ""
    reference: float = 0.0
    # what the ratio should be: at most that, or at least that where more is better (a rate)
    goal: float | None = None
    more_is_better: bool = False

    @property
    def key(self) -> str:
        """What names it among all figures."""
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

    def worse_than(self, stored: float) -> bool:
        """Whether the ratio is worse by half than the one that was stored."""
        if self.ratio is None:
            return False
        return self.ratio * REGRESSION < stored if self.more_is_better else self.ratio > stored * REGRESSION


def table(figures: Iterable[Figure]) -> str:
    """A table in Markdown, which reads well at a terminal too."""
    rows = [("what", "measured", "against", "ratio", "goal", "")]
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
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows.insert(1, tuple("-" * width for width in widths))  # type: ignore[arg-type]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    )


def quantity(value: float, unit: str) -> str:
    """A number with three digits that say something, and its unit."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f} {unit}".rstrip()


def median(values: Sequence[float]) -> float:
    """The middle of them."""
    return statistics.median(values)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which *share* (0 to 1) of them lie."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def save(path: Path, figures: Iterable[Figure], machine: dict[str, str]) -> None:
    """Write everything that was found, for the plots and for later."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"machine": machine, "figures": [asdict(figure) for figure in figures]}
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
