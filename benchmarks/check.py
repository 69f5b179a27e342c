"""Compare a quick run with the ratios of an earlier one, in ratios.json.

A figure fails when its ratio is worse by half, or when it is missing: a benchmark that vanished in silence
would never fail again. We do not compare it with a peer that this machine lacks.
"""

import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Final

from benchmarks.report import Figure, Held

RATIOS: Final = Path(__file__).with_name("ratios.json")
# How much worse than the stored ratio a figure may be.
REGRESSION: Final = 1.5
# A suite with a complaint runs so often in all: a neighbour of the machine may be busy for a while.
TRIES: Final = 3

# By the names of `Held`: the ratio of each figure.
Ratios = dict[str, dict[str, float]]
Complaints = dict[str, str]


def load(path: Path = RATIOS) -> Ratios:
    """Return the stored ratios."""
    ratios: Ratios = json.loads(path.read_text()) if path.exists() else {}
    return ratios


def store(figures: Iterable[Figure], suites: Collection[str], path: Path = RATIOS) -> None:
    """Replace the stored ratios of these suites, except those to peers that are missing here."""
    old, new = load(path), {}
    found = {figure.key: figure for figure in figures if figure.ratio is not None}
    for held in (Held.ALWAYS, Held.IF_THERE):
        kept = {
            key: ratio
            for key, ratio in old.get(held, {}).items()
            if suite_of(key) not in suites or held is Held.IF_THERE
        }
        taken = {key: round(figure.ratio or 0, 3) for key, figure in found.items() if figure.held is held}
        new[held] = dict(sorted((kept | taken).items()))
    path.write_text(json.dumps(new, indent=1, ensure_ascii=False) + "\n")


def complaints(figures: Iterable[Figure], suites: Collection[str], stored: Ratios) -> Complaints:
    """Return the faults of a run of these suites, by the keys of the figures."""
    found = {figure.key: figure for figure in figures}
    wrong: Complaints = {}
    for held, ratios in stored.items():
        for key, was in ratios.items():
            if suite_of(key) not in suites:
                continue
            figure = found.get(key)
            if figure is None or figure.ratio is None:
                if held == Held.ALWAYS:
                    wrong[key] = "there is no such figure any more"
            elif _worse(figure.ratio, was, more_is_better=figure.more_is_better):
                wrong[key] = f"the ratio is {figure.ratio:.2f}, and was {was:.2f}"
    return wrong


def check(
    figures: Iterable[Figure], suites: Collection[str], stored: Ratios, again: Callable[[str], list[Figure]]
) -> Complaints:
    """Return the complaints that come in each of some tries; only a suite with a complaint runs again."""
    wrong = complaints(figures, suites, stored)
    for _ in range(TRIES - 1):
        suspects = {suite_of(key) for key in wrong}
        found = [figure for suite in suites if suite in suspects for figure in again(suite)]
        latest = complaints(found, suspects, stored)
        wrong = {key: why for key, why in latest.items() if key in wrong}
    return wrong


def suite_of(key: str) -> str:
    """Return the suite of a figure, by its key."""
    return key.partition(": ")[0]


def _worse(ratio: float, was: float, *, more_is_better: bool) -> bool:
    return ratio * REGRESSION < was if more_is_better else ratio > was * REGRESSION
