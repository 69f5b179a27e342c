"""Descriptors that this process may still open. Looked at before a start, which must not run out half way."""

import os
import resource
import select
from contextlib import suppress
from typing import Final

from pjw.errors import LimitReachedError, describe_errno

# The descriptors of a start at its height (14), and of other starts under way; the rest of the server
# (connections, readers) may have taken the others.
SPARE_DESCRIPTORS: Final = 32
# Where the process has no limit, the kernel has one (fs.nr_open), which is lower.
_NUMBER_MAX: Final = 2**31 - 1


class Descriptors:
    """Counts the descriptors that are left, whatever code has opened the others."""

    def __init__(self) -> None:
        self._limit = -1
        self._last = select.poll()

    def require(self) -> None:
        """Check that a start will not run out of descriptors half way. Raises LimitReachedError."""
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if limit != self._limit:
            self._limit, self._last = limit, _last_numbers(limit)
        # The kernel hands out the lowest number that is free, so the last ones are free until nearly all are
        # taken. poll(2) looks at all of them at once, and waits for nothing.
        free = [event for _, event in self._last.poll(0) if event == select.POLLNVAL]
        if len(free) < SPARE_DESCRIPTORS:
            _require_by_taking()


def _last_numbers(limit: int) -> select.poll:
    most = limit if 0 <= limit < _NUMBER_MAX else _NUMBER_MAX
    numbers = select.poll()
    for number in range(max(0, most - SPARE_DESCRIPTORS), most):
        numbers.register(number, 0)
    return numbers


def _require_by_taking() -> None:
    # near the limit, where the free ones may be anywhere
    taken: list[int] = []
    try:
        taken.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        while len(taken) < SPARE_DESCRIPTORS:
            taken.append(os.dup(taken[0]))
    except OSError as error:
        raise LimitReachedError(f"cannot start a job: {describe_errno(error.errno or 0)}") from None
    finally:
        for descriptor in taken:
            with suppress(OSError):
                os.close(descriptor)
