"""Put the figures of a run into docs/performance.md, between two marks: nobody copies numbers by hand."""

from pathlib import Path
from typing import Final, NamedTuple

from benchmarks.report import Report

DOCUMENT: Final = Path("docs/performance.md")


class Marks(NamedTuple):
    """The lines of the document between which a run writes its figures."""

    begin: str
    end: str


FIGURES: Final = Marks(
    "<!-- written by python -m benchmarks --document -->\n", "<!-- the end of what is written -->\n"
)
GOALS: Final = Marks(
    "<!-- written by python -m benchmarks goals --against COMMIT --document -->\n",
    "<!-- the end of the goals -->\n",
)


def write(report: Report, path: Path = DOCUMENT) -> None:
    """Replace the figures. Raises ValueError without their marks."""
    replace(report.text(), FIGURES, path)


def replace(text: str, marks: Marks, path: Path = DOCUMENT) -> None:
    """Replace the text between two marks. Raises ValueError if the document lacks a mark."""
    head, begin, rest = path.read_text().partition(marks.begin)
    _, end, tail = rest.partition(marks.end)
    if not begin or not end:
        raise ValueError(f"cannot write figures into {path}: it has no marks")
    path.write_text(f"{head}{begin}\n{text}\n\n{end}{tail}")
