"""Sizes, durations and other amounts, as a person types and reads them.

Each function that parses is a `type` of argparse, and its error says what would be right.
"""

import re
from argparse import ArgumentTypeError
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import TYPE_CHECKING, Final, TypeVar

from pjw import amounts
from pjw.amounts import size_in_words

if TYPE_CHECKING:
    from datetime import datetime

    from pjw.model import After

__all__ = [
    "SIGNALS", "after", "array", "coming", "count", "duration_in_words", "ends", "key_and_value",
    "limit_in_words", "millicores", "moment", "priority", "seconds", "signal_number", "size", "size_in_words",
    "whole_seconds",
]  # fmt: skip

# Linux's signals, from 1 on: jobs run on Linux, while pjw's own system may have other signals.
_NAMES: Final = (
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE",
    "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ",
    "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
)  # fmt: skip
SIGNALS: Final = {name: number for number, name in enumerate(_NAMES, 1)}
_ALIASES: Final = {"IOT": 6, "CLD": 17, "POLL": 29}
_DECIMAL: Final = r"\d{1,9}(?:\.\d{1,9})?|\.\d{1,9}"
T = TypeVar("T")


def _typed(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Make a parser a `type` of argparse, which shows only the message of an ArgumentTypeError."""

    @wraps(parse)
    def typed(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise ArgumentTypeError(str(error)) from None

    return typed


size: Final = _typed(amounts.size)
seconds: Final = _typed(amounts.seconds)
whole_seconds: Final = _typed(amounts.whole_seconds)


@_typed
def moment(text: str) -> "datetime":
    """Parse a time: a duration ago (`10m`), or RFC 3339 (`2026-11-29T13:00:00Z`), local without a zone."""
    from datetime import UTC, datetime, timedelta

    # refuse a bare number: `logs --since` once took a number of bytes
    if not text.isdecimal():
        with suppress(ValueError, OverflowError):
            return datetime.now(UTC) - timedelta(seconds=amounts.seconds(text))
        with suppress(ValueError):
            return datetime.fromisoformat(text).astimezone(UTC)
    raise amounts.wrong(text, "time", "10m (ago) or 2026-11-29T13:00:00Z")


@_typed
def coming(text: str) -> "datetime":
    """Parse a time: a duration from now (`2h`), a time of day (`22:30`) or RFC 3339, local without a zone."""
    from datetime import UTC, datetime, timedelta

    now = datetime.now(UTC)
    if re.fullmatch(r"[0-2][0-9]:[0-5][0-9]", text):
        with suppress(ValueError):
            hour, minute = map(int, text.split(":"))
            then = now.astimezone().replace(hour=hour, minute=minute, second=0, microsecond=0, tzinfo=None)
            # the next day by the calendar: a day may have 23 hours
            days = 0 if then.astimezone() > now else 1
            return (then + timedelta(days=days)).astimezone(UTC)
    if not text.isdecimal():
        with suppress(ValueError, OverflowError):
            return now + timedelta(seconds=amounts.seconds(text))
        with suppress(ValueError, OverflowError):
            return datetime.fromisoformat(text).astimezone(UTC)
    raise amounts.wrong(text, "time", "2h (from now), 22:30 or 2026-11-29T13:00:00Z")


@_typed
def ends(text: str) -> frozenset[str]:
    """Parse the ends after which a job is tried again: `75,oom,timeout`."""
    found = frozenset(text.split(","))
    if not all(re.fullmatch(r"oom|timeout|[0-9]{1,3}", each) for each in found):
        raise amounts.wrong(text, "list of ends", "75,oom,timeout")
    return found


@_typed
def after(text: str) -> "After":
    """Parse a job to wait for, and its required end: `7`, `7:failed`; `7_5` is an element of an array."""
    from pjw.model import After, Condition

    found = re.fullmatch(r"([0-9]{1,18})(?:_([0-9]{1,10}))?(?::(ok|failed|any))?", text)
    if found is None or int(found[1]) == 0:
        raise amounts.wrong(text, "job to wait for", "7, 7:failed, 7:any or 7_5")
    element = None if found[2] is None else int(found[2])
    return After(int(found[1]), Condition(found[3] or "ok"), element=element)


@_typed
def array(text: str) -> str:
    """Parse the indices of an array: `1-100`, `1-100%8`, `1,3,7`, `0-20:5`."""
    from pjw.arrays import Array
    from pjw.errors import InvalidJobError

    try:
        return str(Array.of(text))
    except InvalidJobError as error:
        raise ValueError(f"{error}; right would be {error.hint}" if error.hint else str(error)) from None


@_typed
def priority(text: str) -> int:
    """Parse a whole number, which may be below 0."""
    if not re.fullmatch(r"-?[0-9]{1,9}", text):
        raise amounts.wrong(text, "whole number", "10 or -10")
    return int(text)


@_typed
def millicores(text: str) -> int:
    """Parse thousandths of a processor from a number of processors: `0.5`, `2`. 0 is no limit."""
    if not re.fullmatch(_DECIMAL, text, re.ASCII):
        raise amounts.wrong(text, "number of processors", "0.5 or 2")
    return amounts.whole(text, 1000, text, "number of thousandths of a processor")


@_typed
def count(text: str) -> int:
    """Parse a whole number from 0 on."""
    if not text.isascii() or not text.isdecimal() or len(text) > 18:
        raise amounts.wrong(text, "whole number from 0 on", "100")
    return int(text)


@_typed
def signal_number(text: str) -> int:
    """Parse a signal by its name, with or without SIG, or its number: `INT`, `SIGHUP`, `9`."""
    if text.isascii() and text.isdecimal() and len(text) < 3:
        number = int(text)
    else:
        number = (SIGNALS | _ALIASES).get(text.upper().removeprefix("SIG"), 0)
    if not 1 <= number <= len(_NAMES):
        raise amounts.wrong(text, "signal", "INT, HUP, USR1 or a number from 1 to 31")
    return number


def key_and_value(text: str) -> tuple[str, str]:
    """Split `KEY=VALUE`; without `=` the value is empty."""
    key, _, value = text.partition("=")
    return key, value


def duration_in_words(number: float) -> str:
    """Format seconds in their two largest units: `45s`, `3m12s`, `2h05m`, `3d04h`."""
    whole = max(0, int(number))
    for large, small, large_unit, small_unit in (
        (86_400, 3_600, "d", "h"),
        (3_600, 60, "h", "m"),
        (60, 1, "m", "s"),
    ):
        if whole >= large:
            return f"{whole // large}{large_unit}{whole % large // small:02}{small_unit}"
    return f"{whole}s"


def limit_in_words(limit: str, value: int) -> str:
    """Return the value of a limit, by its name, in the units that its option takes."""
    if limit == "cpu_max_millicores":
        return f"{value / 1000:g}"
    if limit.endswith("seconds"):
        return duration_in_words(value)
    return size_in_words(value) if limit.endswith(("bytes", "bps_max")) else str(value)
