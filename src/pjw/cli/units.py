"""Sizes, durations and the like, as a person types and reads them.

What is typed is parsed here alone; each function is a `type` of argparse, and its error says what would be
right.
"""

import re
from argparse import ArgumentTypeError
from typing import Final

# compiled when first used: most commands parse none of these
_SIZE: Final = r"(\d{1,18}(?:\.\d{1,18})?)([KMGTP]?)(?:I?B)?"
_DURATION: Final = r"(?:(\d{1,9})d)?(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9}(?:\.\d{1,9})?)s?)?"
_DECIMAL: Final = r"\d{1,9}(?:\.\d{1,9})?"
_POWERS: Final = "KMGTP"
_SHOWN_CHARACTERS: Final = 40


def size(text: str) -> int:
    """Bytes: `256M`, `1.5G`, `4096`; powers of 1024. 0 is no limit."""
    found = re.fullmatch(_SIZE, text, re.ASCII | re.IGNORECASE)
    if not found:
        raise _wrong(text, "size", "256M or 1.5G")
    power = _POWERS.find(found[2].upper()) + 1 if found[2] else 0
    return _whole(found[1], 1024**power, text, "number of bytes")


def seconds(text: str) -> float:
    """Seconds: `90`, `90s`, `1h30m`, `0.5s`."""
    found = re.fullmatch(_DURATION, text, re.ASCII)
    if not found or not text:
        raise _wrong(text, "duration", "90s or 1h30m")
    days, hours, minutes, rest = (float(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def whole_seconds(text: str) -> int:
    """Whole seconds: `90`, `1h`. 0 is no limit."""
    found = seconds(text)
    if not found.is_integer():
        raise ArgumentTypeError(f"{_shown(text)} is not a whole number of seconds")
    return int(found)


def millicores(text: str) -> int:
    """Thousandths of a processor, from a number of processors: `0.5`, `2`. 0 is no limit."""
    if not re.fullmatch(_DECIMAL, text, re.ASCII):
        raise _wrong(text, "number of processors", "0.5 or 2")
    return _whole(text, 1000, text, "number of thousandths of a processor")


def count(text: str) -> int:
    """A whole number from 0 on."""
    if not text.isascii() or not text.isdecimal() or len(text) > 18:
        raise _wrong(text, "whole number from 0 on", "100")
    return int(text)


def signal_number(text: str) -> int:
    """A signal by its name, with or without SIG, or its number: `INT`, `SIGHUP`, `9`."""
    import signal

    if text.isascii() and text.isdecimal() and len(text) < 3:
        number = int(text)
    else:
        name = text.upper()
        known = signal.Signals.__members__
        number = int(known.get(name) or known.get(f"SIG{name}") or 0)
    if not 1 <= number <= 31:
        raise _wrong(text, "signal", "INT, HUP, USR1 or a number from 1 to 31")
    return number


def key_and_value(text: str) -> tuple[str, str]:
    """`KEY=VALUE`; without `=` the value is empty."""
    key, _, value = text.partition("=")
    return key, value


def size_in_words(number: int) -> str:
    """Bytes as `size` reads them: exact where one unit does it, else rounded."""
    power = 0
    while power < len(_POWERS) and number >= 1024 ** (power + 1):
        power += 1
    if not power:
        return f"{number}B"
    scaled = number / 1024**power
    unit = _POWERS[power - 1]
    return f"{scaled:.0f}{unit}" if scaled >= 100 or scaled.is_integer() else f"{scaled:.1f}{unit}"


def duration_in_words(number: float) -> str:
    """Seconds in their two largest units: `45s`, `3m12s`, `2h05m`, `3d04h`."""
    whole = max(0, int(number))
    for large, small, large_unit, small_unit in (
        (86_400, 3_600, "d", "h"),
        (3_600, 60, "h", "m"),
        (60, 1, "m", "s"),
    ):
        if whole >= large:
            return f"{whole // large}{large_unit}{whole % large // small:02}{small_unit}"
    return f"{whole}s"


def _whole(number: str, factor: int, text: str, what: str) -> int:
    # not float(): 0.1 processors are 100 thousandths exactly
    whole, _, fraction = number.partition(".")
    scaled = int(whole + fraction) * factor
    divisor: int = 10 ** len(fraction)
    if scaled % divisor:
        raise ArgumentTypeError(f"{_shown(text)} is not a whole {what}")
    return scaled // divisor


def _wrong(text: str, what: str, example: str) -> ArgumentTypeError:
    return ArgumentTypeError(f"{_shown(text)} is not a {what}, such as {example}")


def _shown(text: str) -> str:
    return repr(text[:_SHOWN_CHARACTERS])
