"""A line for each job by the user's own template: `--format template:'{id} {state}'`.

Names in braces are those of the JSON, `age` and `duration` as in the table; a dot leads to an inner member
(`{limits.pidsMax}`, `{labels.team}`), and a width comes after a colon as Python writes it (`{id:>6}`). A
template reads no attribute, calls nothing, and has no index.
"""

import re
import string
from argparse import ArgumentTypeError
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

from pjw.cli.render import lasted, members
from pjw.cli.units import duration_in_words
from pjw.model import Job, JobState, Limits, Usage

_LEADING: Final = {"age", "duration"}


class Template:
    """A format, checked when the arguments are parsed."""

    def __init__(self, text: str) -> None:
        """Parse a template. Raises ArgumentTypeError for one that could never be filled in."""
        self._text: Final = text.replace("\\t", "\t").replace("\\n", "\n")
        known = _names()
        try:
            parts = [*string.Formatter().parse(self._text)]
        except ValueError as error:
            raise ArgumentTypeError(f"template {text[:80]!r}: {error}") from None
        for _, name, spec, conversion in parts:
            if name is None:
                continue
            first = name.partition(".")[0]
            if first not in known or conversion or (spec and "{" in spec):
                raise ArgumentTypeError(
                    f"template {text[:80]!r}: {name or '{}'!r} is none of {', '.join(sorted(known))}"
                )
            if re.search(r"\d{5}", spec or ""):
                raise ArgumentTypeError(f"template {text[:80]!r}: {{{name}}} is wider than 9999 columns")
            try:
                format("", spec or "")
            except ValueError as error:
                raise ArgumentTypeError(f"template {text[:80]!r}: {{{name}:{spec}}}: {error}") from None
        self._parts: Final = [(literal, name, spec or "") for literal, name, spec, _ in parts]

    def fill(self, job: Job, printable: Callable[[str], str]) -> str:
        """Return the line of a job, with every value passed through *printable*."""
        now = datetime.now(UTC)
        values = members(job)
        values["age"] = duration_in_words((now - job.start).total_seconds())
        values["duration"] = lasted(job, now)
        line = ""
        for literal, name, spec in self._parts:
            line += literal
            if name is not None:
                line += format(printable(_text(values, name)), spec)
        return line


def _names() -> set[str]:
    example = Job(0, "", "", JobState.RUNNING, Limits(), datetime.now(UTC), usage=Usage())
    return {*members(example), *_LEADING}


def _text(values: Any, name: str) -> str:  # noqa: ANN401  any value of JSON
    found, rest = values, name
    while rest and isinstance(found, dict):
        if rest in found:
            # the key of a label may contain dots
            found, rest = found[rest], ""
        else:
            first, _, rest = rest.partition(".")
            found = found.get(first)
    if found is None or rest:
        return ""
    if isinstance(found, bool):
        return str(found).lower()
    if isinstance(found, dict):
        return ",".join(f"{key}={value}" for key, value in found.items())
    return str(found)
