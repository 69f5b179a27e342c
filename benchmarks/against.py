"""Measure the pjw of earlier commits and of this tree: whole suites in turns, on one machine, in one run.

It compares the services, with the libraries and the clients of this tree: `scripts/install-revision`
builds the commit's own wheel below build/revisions.
"""

import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from benchmarks import pjwd
from benchmarks.report import Figure, Held, median

ROOT: Final = Path(__file__).parents[1]
# The bound for a change: its cost divided by the commit's.
GOAL: Final = 1.1
TURNS: Final = 3
# The name of this tree among the commits.
OURS: Final = "this tree"

# For each pjwd its results of each turn, by the key of the figure.
Found = dict[str, dict[str, list[Figure]]]


def install(revision: str) -> tuple[str, Path]:
    """Return the short name of a commit, and its pjwd, built if it is not there yet."""
    commit, short = (
        subprocess.check_output(["git", "rev-parse", *how, f"{revision}^{{commit}}"], text=True, cwd=ROOT)
        for how in ([], ["--short"])
    )
    subprocess.run(["scripts/install-revision", commit.strip()], check=True, cwd=ROOT)
    return short.strip(), ROOT / "build/revisions" / commit.strip() / "bin/pjwd"


def measure(suite: Callable[[], list[Figure]], commits: Mapping[str, Path], turns: int = TURNS) -> Found:
    """Run a suite in turns on the pjwd of each commit, by its name, and on this tree's."""
    programs = {**commits, OURS: pjwd.THIS}
    found: Found = {name: {} for name in programs}
    for turn in range(turns):
        # each is first about as often: the machine may grow slower meanwhile
        for name in reversed(programs) if turn % 2 else programs:
            with pjwd.measured(programs[name]):
                for figure in suite():
                    found[name].setdefault(figure.key, []).append(figure)
    return found


def run(suite: Callable[[], list[Figure]], commits: Mapping[str, Path]) -> list[Figure]:
    """Run a suite in turns on all of them; return each of its numbers with that of each commit."""
    found = measure(suite, commits)
    return [figure for commit in commits for figure in _compared(found[OURS], found[commit], commit)]


def _compared(
    ours: dict[str, list[Figure]], theirs: dict[str, list[Figure]], commit: str
) -> Iterator[Figure]:
    # one number may have several references, of which the first is as good as any
    once = {figures[0].name: (key, figures) for key, figures in reversed(ours.items())}
    for name, (key, figures) in reversed(once.items()):
        one = figures[0]
        # figures that no later run is held to are unsteady here, too
        goal = None if one.held is Held.NEVER or one.ratio is None else GOAL
        yield Figure(
            one.suite,
            name,
            median([figure.value for figure in figures]),
            one.unit,
            commit,
            median([figure.value for figure in theirs.get(key, [])] or [0.0]),
            1 / goal if goal and one.more_is_better else goal,
            one.more_is_better,
        )
