"""Measures pjw beside its peers and the kernel's own limit: `make bench`, as root.

    python -m benchmarks [--quick] [--check] [--store] [SUITE]...

Prints a table with ratios; what was found is in build/bench/figures.json then. --quick takes fewer samples;
--check fails when a ratio is worse by half than the one in benchmarks/ratios.json, --store writes that file.
"""

import argparse
import importlib
import json
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from benchmarks import report
from benchmarks.machine import describe
from benchmarks.report import Figure

SUITES: Final = ("start", "stream", "line", "scale", "history", "cli", "memory")
OUTPUT: Final = Path("build/bench")
RATIOS: Final = Path(__file__).with_name("ratios.json")


def main() -> int:
    """Run the suites, each a module of this package with `run(quick)`; the exit code."""
    arguments = _arguments()
    if os.geteuid() != 0:
        print("benchmarks need root: they start jobs", file=sys.stderr)
        return 1
    figures: list[Figure] = []
    for name in arguments.suite or SUITES:
        began = time.monotonic()
        found = importlib.import_module(f"benchmarks.{name}").run(quick=arguments.quick)
        print(f"\n{name} ({time.monotonic() - began:.0f} s)\n{report.table(found)}", flush=True)
        figures += found
    machine = describe() | {"date": datetime.now(UTC).strftime("%Y-%m-%d")}
    report.save(OUTPUT / "figures.json", figures, machine)
    print("\n" + ", ".join(f"{key} {value}" for key, value in machine.items()))
    if arguments.store:
        _store(figures)
    return _check(figures) if arguments.check else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suite", nargs="*", choices=[[], *SUITES], help="all of them without one")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--store", action="store_true")
    return parser.parse_args()


def _store(figures: list[Figure]) -> None:
    stored = json.loads(RATIOS.read_text()) if RATIOS.exists() else {}
    stored |= {figure.key: round(figure.ratio, 3) for figure in figures if figure.ratio is not None}
    RATIOS.write_text(json.dumps(dict(sorted(stored.items())), indent=1) + "\n")


def _check(figures: list[Figure]) -> int:
    stored = json.loads(RATIOS.read_text())
    worse = [figure for figure in figures if figure.key in stored and figure.worse_than(stored[figure.key])]
    for figure in worse:
        was = stored[figure.key]
        print(f"{figure.key}: the ratio is {figure.ratio:.2f}, and was {was:.2f}", file=sys.stderr)
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
