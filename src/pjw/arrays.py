"""Arrays: the elements of a job, as text (`1-100%8`), and the name of one of them (`17_5`). No I/O."""

import re
from dataclasses import dataclass
from functools import lru_cache
from math import gcd, lcm
from typing import Final, Self

from pjw.errors import InvalidJobError

ELEMENTS_MAX: Final = 1_000_000
INDEX_MAX: Final = 2**31 - 1
# A part is checked against all others, so this bounds the work: 20 ms.
TEXT_MAX_CHARACTERS: Final = 1000

_PART: Final = re.compile(r"([0-9]{1,10})(?:-([0-9]{1,10})(?::([0-9]{1,10}))?)?")
_AT_ONCE: Final = re.compile(r"[0-9]{1,7}")
_ELEMENT: Final = re.compile(r"([0-9]{1,18})_([0-9]{1,10})")


@dataclass(frozen=True, slots=True)
class Element:
    """An element of an array, by the array's id and its index: `17_5`."""

    array_id: int
    index: int

    @classmethod
    def of(cls, text: str) -> Self | None:
        """Return the element that a text names; None when it names none."""
        found = _ELEMENT.fullmatch(text)
        return None if found is None else cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.array_id}_{self.index}"


@dataclass(frozen=True, slots=True)
class Array:
    """The indices of an array's elements, in the order of their turns, and how many run at once (0: any)."""

    parts: tuple[range, ...]
    at_once: int = 0

    @staticmethod
    def of(text: str) -> "Array":
        """Parse an array such as `1-100`, `1-100%8`, `1,3,7` or `0-20:5`. Raises InvalidJobError."""
        return _array_of(text)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __str__(self) -> str:
        return ",".join(map(_part_text, self.parts)) + (f"%{self.at_once}" if self.at_once else "")

    @property
    def lowest(self) -> int:
        """The lowest index."""
        return min(part[0] for part in self.parts)

    @property
    def highest(self) -> int:
        """The highest index."""
        return max(part[-1] for part in self.parts)

    def index(self, place: int) -> int:
        """Return the index of the element at a place, counted from 0. Raises IndexError."""
        for part in self.parts:
            if place < len(part):
                return part[place]
            place -= len(part)
        raise IndexError(place)

    def place(self, index: int) -> int | None:
        """Return the place of the element with an index; None when there is none."""
        before = 0
        for part in self.parts:
            if index in part:
                return before + part.index(index)
            before += len(part)
        return None


@lru_cache(maxsize=64)
def _array_of(text: str) -> Array:
    if len(text) > TEXT_MAX_CHARACTERS:
        raise InvalidJobError(f"the indices of an array are text of at most {TEXT_MAX_CHARACTERS} characters")
    indices, percent, most = text.partition("%")
    parts = [_part_of(text, part) for part in indices.split(",")]
    if percent and (not _AT_ONCE.fullmatch(most) or not int(most)):
        raise _wrong(text, f"{most[:20]!r} is no number of elements that run at once")
    if (count := sum(map(len, parts))) > ELEMENTS_MAX:
        raise InvalidJobError(f"an array has at most {ELEMENTS_MAX} elements, not {count}")
    if (twice := _first_common(parts)) is not None:
        raise _wrong(text, f"{twice} is in it twice")
    return Array(tuple(parts), int(most or 0))


def _part_of(text: str, part: str) -> range:
    found = _PART.fullmatch(part)
    if found is None:
        raise _wrong(text, f"{part[:20]!r} is neither an index nor a range of them")
    first, last, step = int(found[1]), int(found[2] or found[1]), int(found[3] or 1)
    if last > INDEX_MAX:
        raise _wrong(text, f"an index is at most {INDEX_MAX}")
    if last < first or not step:
        raise _wrong(text, f"{part[:40]!r} has no element")
    return range(first, last + 1, step)


def _part_text(part: range) -> str:
    if len(part) == 1:
        return str(part[0])
    return f"{part[0]}-{part[-1]}" + (f":{part.step}" if part.step > 1 else "")


def _wrong(text: str, why: str) -> InvalidJobError:
    return InvalidJobError(
        f"{text[:80]!r} are no indices of an array: {why}", hint="1-100, 1-100%8, 1,3,7 or 0-20:5"
    )


def _first_common(parts: list[range]) -> int | None:
    """Return an index that is in two of the parts; None when there is none."""
    open_parts: list[range] = []
    for part in sorted(parts, key=lambda part: part[0]):
        open_parts = [other for other in open_parts if other[-1] >= part[0]]
        for other in open_parts:
            if (common := _common(other, part)) is not None:
                return common
        open_parts.append(part)
    return None


def _common(one: range, other: range) -> int | None:
    """Return the lowest number that is in both; *other* begins no earlier."""
    divisor = gcd(one.step, other.step)
    apart = other.start - one.start
    if apart % divisor:
        return None
    turns = apart // divisor * pow(one.step // divisor, -1, other.step // divisor) % (other.step // divisor)
    found = one.start + one.step * turns
    # the next one that is in both is so much further
    further = lcm(one.step, other.step)
    found += max(0, -((found - other.start) // further)) * further
    return found if found <= min(one[-1], other[-1]) else None
