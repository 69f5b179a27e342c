"""Measure pjw, its peers and the kernel's own limit, as root: `make bench`; in CI `make bench-check`.

It prints a table of ratios for each suite. Then build/bench/figures.json (quick.json, when quick) has the
figures, and also those of the other suites from the same day.
"""

import argparse
import functools
import importlib
import os
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from benchmarks import against, check, document, goals, scale
from benchmarks.machine import describe
from benchmarks.report import Figure, Held, Report, table

# In this order. The last has thousands of jobs, and each mounts file systems; the kernel gives every new
# memory cgroup room for as many as there ever were at once, until it boots. So starts cost more after it.
SUITES: Final = (
    *(
        "start",
        "parts",
        "queue",
        "exec",
        "egress",
        "files",
        "images",
        "stream",
        "line",
        "history",
        "cli",
        "install",
        "memory",
        "simulation",
        "scale",
    ),
)
# It measures again, for earlier commits too, so it runs alone and only when it is named.
GOALS: Final = goals.SUITE
# These need Debian's packages of Slurm, and run only when they are named.
NAMED: Final = ("cluster",)
OUTPUT: Final = Path("build/bench")
PLOTS: Final = Path("docs/performance")


def main() -> int:
    """Run the suites, each a module of this package with `run(quick)`; the exit code."""
    arguments = _arguments()
    if os.geteuid() != 0:
        print("benchmarks need root: they start jobs", file=sys.stderr)
        return 1
    quick: bool = arguments.quick
    suites = [name for name in (*SUITES, *NAMED) if name in (arguments.suite or SUITES)]
    if arguments.jobs_max:
        scale.jobs_max = arguments.jobs_max
    if arguments.suite == [GOALS]:
        commits = dict(map(against.install, arguments.against or goals.COMMITS))
        return _judge(commits, quick=quick, into_document=arguments.document)
    if arguments.against:
        return _compare(suites, dict(map(against.install, arguments.against)), quick=quick)
    figures = [figure for name in suites for figure in _run(name, quick=quick)]
    machine = _machine(quick=quick)
    path = OUTPUT / ("quick.json" if quick else "figures.json")
    report = Report(machine, figures)
    # a file of another version of these benchmarks may have any form
    with suppress(FileNotFoundError, KeyError, TypeError, ValueError):
        report = Report.load(path).joined(report)
    report.figures.sort(key=lambda figure: (*SUITES, *NAMED).index(figure.suite))
    report.save(path)
    print("\n" + ", ".join(f"{key} {value}" for key, value in machine.items()))
    if arguments.plots:
        _plot(report, OUTPUT if quick else PLOTS)
    if arguments.document:
        document.write(report)
    if arguments.store:
        check.store(figures, suites)
    return _check(figures, suites) if arguments.check else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "suite",
        nargs="*",
        type=_suite,
        help=f"{', '.join(SUITES)}; without one, all of these; or {', '.join(NAMED)};"
        f" or {GOALS}: this tree beside earlier commits",
    )
    parser.add_argument("--quick", action="store_true", help="take fewer samples")
    parser.add_argument("--plots", action="store_true", help=f"draw them into {PLOTS}; {OUTPUT} when quick")
    parser.add_argument("--document", action="store_true", help=f"write the table into {document.DOCUMENT}")
    parser.add_argument("--check", action="store_true", help="fail when a stored ratio is missed by half")
    parser.add_argument(
        "--store", action="store_true", help="store the ratios that --check is to compare with"
    )
    parser.add_argument(
        "--against",
        metavar="REVISION",
        action="append",
        help="compare with the pjwd of that commit, in turns; store nothing; may be repeated",
    )
    parser.add_argument(
        "--jobs-max", type=int, metavar="N", help="scale: no more than N jobs, and a row with N"
    )
    arguments = parser.parse_args()
    if GOALS in arguments.suite and len(arguments.suite) > 1:
        parser.error(f"the suite {GOALS} has its own table: name no other suite with it")
    if (arguments.check or arguments.store) and (arguments.against or arguments.suite == [GOALS]):
        parser.error("ratios are stored and checked of this tree alone, without --against")
    if arguments.against and arguments.document and arguments.suite != [GOALS]:
        parser.error(f"beside earlier commits only the suite {GOALS} has a table in {document.DOCUMENT}")
    if (arguments.check or arguments.store) and not arguments.quick:
        # a full run has other levels
        parser.error("the stored ratios are those of quick runs: give --quick as well")
    if arguments.document and arguments.quick:
        parser.error(f"{document.DOCUMENT} shows no quick runs")
    return arguments


def _judge(commits: dict[str, Path], *, quick: bool, into_document: bool) -> int:
    """Print each goal and its measurement, and write them into the document; 1 if one is missed."""
    found, missed = goals.compare(commits, quick=quick)
    machine = ", ".join(f"{key} {value}" for key, value in _machine(quick=quick).items())
    text = f"{machine}\n\n{found}"
    print(f"\n{text}")
    if into_document:
        document.replace(text, document.GOALS)
    return 1 if missed else 0


def _machine(*, quick: bool) -> dict[str, str]:
    return describe() | {
        "samples": "few" if quick else "all",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def _compare(suites: list[str], commits: dict[str, Path], *, quick: bool) -> int:
    """Print each suite's figures and those of earlier commits; 1 if one is worse by more than the goal."""
    worse = 0
    for name in suites:
        suite = functools.partial(importlib.import_module(f"benchmarks.{name}").run, quick=quick)
        found = against.run(suite, commits)
        worse += sum(figure.met is False for figure in found)
        print(f"\n{name}, in {against.TURNS} turns each\n{table(found)}", flush=True)
    return 1 if worse else 0


def _suite(name: str) -> str:
    if name not in (*SUITES, *NAMED, GOALS):
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join((*SUITES, *NAMED))}, {GOALS}")
    return name


def _run(name: str, *, quick: bool) -> list[Figure]:
    began = time.monotonic()
    found: list[Figure] = importlib.import_module(f"benchmarks.{name}").run(quick=quick)
    keys = [figure.key for figure in found]
    assert len(set(keys)) == len(keys), keys
    print(f"\n{name} ({time.monotonic() - began:.0f} s)\n{table(found)}", flush=True)
    return found


def _plot(report: Report, directory: Path) -> None:
    # not at the top: only `make bench` has matplotlib
    from benchmarks import plots

    for path in plots.draw_all(report.figures, directory):
        print(path)


def _check(figures: list[Figure], suites: list[str]) -> int:
    stored = check.load()

    def again(name: str) -> list[Figure]:
        print(f"\n{name} is worse than it was; once more:", file=sys.stderr, flush=True)
        return _run(name, quick=True)

    wrong = check.check(figures, suites, stored, again)
    for key, why in wrong.items():
        print(f"{key}: {why}", file=sys.stderr)
    known = {key for ratios in stored.values() for key in ratios}
    for figure in figures:
        if figure.ratio is not None and figure.held is not Held.NEVER and figure.key not in known:
            print(f"{figure.key}: new, and not compared until --store", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
