"""Puts what a run has found into docs/performance.md, between two marks: nobody copies numbers by hand."""

from pathlib import Path
from typing import Final

from benchmarks.report import Report

DOCUMENT: Final = Path("docs/performance.md")
BEGIN: Final = "<!-- written by python -m benchmarks --document -->\n"
END: Final = "<!-- the end of what is written -->\n"


def write(report: Report, path: Path = DOCUMENT) -> None:
    """Replace what is between the marks. Raises ValueError without them."""
    head, begin, rest = path.read_text().partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"cannot write figures into {path}: it has no marks")
    path.write_text(f"{head}{begin}\n{report.text()}\n\n{end}{tail}")
