"""Fuzz one target by coverage, or try inputs again: python -m tests.fuzz TARGET [libFuzzer's arguments].

The arguments are directories of inputs (the first is added to), files to try once, and options such as
-max_total_time=60; -help=1 lists them. Without any inputs it begins with the target's own.
"""

import importlib
import sys
from pathlib import Path

import atheris

from tests.fuzz import TARGETS


def main() -> None:
    """Run it; never returns."""
    name, *arguments = sys.argv[1:]
    if name not in TARGETS:
        sys.exit(f"no target {name}: there are {', '.join(TARGETS)}")
    with atheris.instrument_imports(include=["pjw", "tests.fuzz", "tomllib"]):
        target = importlib.import_module(f"tests.fuzz.{name}")
    directories = [Path(word) for word in arguments if Path(word).is_dir()]
    if directories and not any(directories[0].iterdir()):
        for number, seed in enumerate(target.seeds()):
            (directories[0] / f"seed-{number}").write_bytes(seed)
    atheris.Setup([sys.argv[0], *arguments], target.one_input)
    atheris.Fuzz()


main()
