"""Measures an earlier commit's pjwd beside this tree's: whole suites in turns, on one machine, in one run.

What it compares is the service, with the libraries and the clients of this tree: `scripts/install-revision`
builds the commit's own wheel below build/revisions.
"""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from benchmarks import pjwd
from benchmarks.report import Figure, Held, median

ROOT: Final = Path(__file__).parents[1]
# What a change may cost, beside the commit.
GOAL: Final = 1.1
TURNS: Final = 3


def install(revision: str) -> tuple[str, Path]:
    """The short name of a commit, and its pjwd, built if it is not there yet."""
    commit, short = (
        subprocess.check_output(["git", "rev-parse", *how, f"{revision}^{{commit}}"], text=True, cwd=ROOT)
        for how in ([], ["--short"])
    )
    subprocess.run(["scripts/install-revision", commit.strip()], check=True, cwd=ROOT)
    return short.strip(), ROOT / "build/revisions" / commit.strip() / "bin/pjwd"


def run(suite: Callable[[], list[Figure]], commit: str, program: Path) -> list[Figure]:
    """A suite in turns on both; each of its numbers beside what the commit's was."""
    ours: dict[str, list[Figure]] = {}
    theirs: dict[str, list[Figure]] = {}
    for turn in range(TURNS):
        # either is first as often as it can be: the machine may grow slower meanwhile
        for mine in (True, False) if turn % 2 else (False, True):
            with pjwd.measured(pjwd.THIS if mine else program):
                # one number may be beside several references
                once = {figure.name: figure for figure in reversed(suite())}
            for name, figure in reversed(once.items()):
                (ours if mine else theirs).setdefault(name, []).append(figure)
    return list(_compared(ours, theirs, commit))


def _compared(
    ours: dict[str, list[Figure]], theirs: dict[str, list[Figure]], commit: str
) -> Iterator[Figure]:
    for name, figures in ours.items():
        one = figures[0]
        # what no later run is held to is no steadier here
        goal = None if one.held is Held.NEVER or one.ratio is None else GOAL
        yield Figure(
            one.suite,
            name,
            median([figure.value for figure in figures]),
            one.unit,
            commit,
            median([figure.value for figure in theirs.get(name, [])] or [0.0]),
            1 / goal if goal and one.more_is_better else goal,
            one.more_is_better,
        )
