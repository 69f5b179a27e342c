"""The host: its resources, the descriptors that are left, and whether its operator lets jobs start."""

import os
import resource
import select
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from pjw.errors import LimitReachedError, describe_errno
from pjw.model import Limits, Sums
from pjw.worker.settings import NO_CEILING

# The rest is for the host's own services, pjwd, and root's shell.
PERCENT_OF_MEMORY: Final = 80
PERCENT_OF_PIDS: Final = 80
PERCENT_OF_CPUS: Final = 90


def resources() -> Sums:
    """Return the memory, processes and processor time of this host, all of it."""
    return Sums(_memory_bytes(), _pids(), (os.cpu_count() or 1) * 1000)


def default_sums() -> Sums:
    """Return the most that all jobs may use together by default."""
    host = resources()
    return Sums(
        host.memory_max_bytes * PERCENT_OF_MEMORY // 100,
        host.pids_max * PERCENT_OF_PIDS // 100,
        host.cpu_max_millicores * PERCENT_OF_CPUS // 100,
    )


def memory_of(sums: Sums) -> int:
    """Return the bytes of memory that all jobs have together: their sum, or without one all the host's."""
    return sums.memory_max_bytes or resources().memory_max_bytes


def default_ceiling(sums: Sums, defaults: Limits) -> Limits:
    """Return the default ceilings: the most that can be given, or a default limit that is higher.

    Of processor time that is all that the host has, though the sum is less: such a limit promises nothing.
    """
    host = resources()
    most = {
        "memory_max_bytes": memory_of(sums),
        "pids_max": sums.pids_max or host.pids_max,
        "cpu_max_millicores": host.cpu_max_millicores,
    }
    unasked = {name: getattr(defaults, name) for name in most}
    # a default of 0 is no limit, which is above any
    return replace(NO_CEILING, **{name: unasked[name] and max(most[name], unasked[name]) for name in most})


def _memory_bytes() -> int:
    # `MemTotal:       24684092 kB` (proc_meminfo(5))
    with open("/proc/meminfo", encoding="ascii") as file:
        return int(file.readline().split()[1]) * 1024


def _pids() -> int:
    # Either bounds processes and threads together (proc_sys_kernel(5)).
    names = ("pid_max", "threads-max")
    return min(int(Path("/proc/sys/kernel", name).read_text(encoding="ascii")) for name in names)


# Descriptors that this process may still open. Looked at before a start, which must not run out half way.

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


# Whether this machine starts jobs: not while its operator has drained it (`pjwd drain`).
#
# A drained machine starts no job. What runs goes on, and what waits in the queue waits on.

DRAINED: Final = "the operator has drained this machine"


class Admission:
    """Whether jobs are started now, and the callbacks for a change of that."""

    def __init__(self) -> None:
        self.drained = False
        # called when that has changed
        self.changed: Final[list[Callable[[], None]]] = []

    def set(self, *, drained: bool) -> None:
        """Start no more jobs, or start jobs again."""
        if drained != self.drained:
            self.drained = drained
            for each in self.changed:
                each()

    def require(self) -> None:
        """Raise LimitReachedError while the machine is drained."""
        if self.drained:
            raise LimitReachedError(
                f"cannot start a job: {DRAINED}",
                hint="try again later, or let the job wait for its turn: pjw start --queue",
            )
