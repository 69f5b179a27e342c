"""Sizes and durations as people type and read them: `256M`, `1h30m`. Each error gives a valid example."""

import re
from typing import Final

# compiled when first used: most commands parse none of these
_SIZE: Final = r"(\d{1,18}(?:\.\d{1,18})?|\.\d{1,18})([KMGTP]?)(?:I?B)?"
_DURATION: Final = r"(?:(\d{1,9})d)?(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9}(?:\.\d{1,9})?|\.\d{1,9})s?)?"
POWERS: Final = "KMGTP"
_SHOWN_CHARACTERS: Final = 40


def size(text: str) -> int:
    """Parse a number of bytes: `256M`, `1.5G`, `4096`; powers of 1024. Raises ValueError."""
    found = re.fullmatch(_SIZE, text, re.ASCII | re.IGNORECASE)
    if not found:
        raise wrong(text, "size", "256M or 1.5G")
    power = POWERS.find(found[2].upper()) + 1 if found[2] else 0
    return whole(found[1], 1024**power, text, "number of bytes")


def size_in_words(number: int) -> str:
    """Format bytes as options take them, `900M`: exact if one unit can express it, else rounded."""
    power = 0
    while power < len(POWERS) and number >= 1024 ** (power + 1):
        power += 1
    if not power:
        return f"{number}B"
    scaled = number / 1024**power
    unit = POWERS[power - 1]
    return f"{scaled:.0f}{unit}" if scaled >= 100 or scaled.is_integer() else f"{scaled:.1f}{unit}"


def exact_size(number: int) -> str:
    """Format bytes for an error, rounded and exact: `900M (943718400 bytes)`."""
    return f"{size_in_words(number)} ({number} bytes)"


def seconds(text: str) -> float:
    """Parse seconds: `90`, `90s`, `1h30m`, `0.5s`. Raises ValueError."""
    found = re.fullmatch(_DURATION, text, re.ASCII)
    if not found or not text:
        raise wrong(text, "duration", "90s or 1h30m")
    days, hours, minutes, rest = (float(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def whole_seconds(text: str) -> int:
    """Parse whole seconds: `90`, `1h`. Raises ValueError."""
    found = seconds(text)
    if not found.is_integer():
        raise ValueError(f"{_shown(text)} is not a whole number of seconds")
    return int(found)


def whole(number: str, factor: int, text: str, what: str) -> int:
    """Return a decimal *number* times *factor*, exactly. Raises ValueError when that is not whole."""
    # not float(): 0.1 processors are 100 thousandths exactly
    digits, _, fraction = number.partition(".")
    scaled = int(digits + fraction) * factor
    divisor: int = 10 ** len(fraction)
    if scaled % divisor:
        raise ValueError(f"{_shown(text)} is not a whole {what}")
    return scaled // divisor


def wrong(text: str, what: str, example: str) -> ValueError:
    """Return the error for *text* that is not a valid *what*."""
    return ValueError(f"{_shown(text)} is not a {what}, such as {example}")


def _shown(text: str) -> str:
    return repr(text[:_SHOWN_CHARACTERS])
