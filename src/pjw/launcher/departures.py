"""Cgroups on their way out, with the init in one if need be: killed, waited for, removed.

Nothing here waits: a descriptor or a timer says when the next step can be taken. A departure that takes
longer than SETTLE_SECONDS is late. Its waiters get an error, and it goes on, so that a process that ends late
leaves nothing behind.
"""

import errno
import os
import signal
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Final

from pjw.errors import KernelError
from pjw.launcher.cgroup import Cgroup
from pjw.launcher.processes import Timer, Watcher, collect, send_signal, status_of
from pjw.launcher.protocol import Remaining

# Processes that were killed and are still there: which, and the cause of each one's wait.
#
# A process in an uninterruptible sleep (state D) ends when the kernel has the thing it waits for, and for no
# signal: the answer of an NFS or FUSE server, or of a disk.

# More processes are counted and not named. Beyond the second number none is looked at: other requests wait.
NAMED_MAX: Final = 4
LOOKED_AT_MAX: Final = 200
# The kernel's words for a process that waits for nothing, or whose wait we must not see.
_NO_WCHAN: Final = ("0", "")
# of <linux/sched.h>
_PF_EXITING: Final = 0x4
_KILL_BIT: Final = 1 << (signal.SIGKILL - 1)


def describe(pids: Collection[int]) -> Remaining:
    """Look at the processes of a job, init among them, that should have ended."""
    init: list[tuple[int, int]] = []
    others: list[tuple[int, int]] = []
    for pid in islice(pids, LOOKED_AT_MAX):
        namespaces = [int(word) for word in status_of(pid, b"NSpid")]
        if namespaces:
            (init if namespaces[-1] == 1 else others).append((pid, namespaces[-1]))
    named = others or init
    words = ", ".join(_process(*both) for both in named[:NAMED_MAX])
    if more := max(0, len(named) - NAMED_MAX) + max(0, len(pids) - LOOKED_AT_MAX):
        words += f" and {more} more"
    return Remaining(words, bool(others) and all(_is_killed(pid) for pid, _ in others))


def _process(pid: int, shown: int) -> str:
    """Describe one of them, by its pid as the job sees it; with the available parts of proc(5)."""
    name = b" ".join(status_of(pid, b"Name")).decode("ascii", "replace")
    safe = "".join(
        character if character.isascii() and character.isprintable() else "?" for character in name
    )
    state = b"".join(status_of(pid, b"State")[:1]).decode()
    where = ""
    with suppress(OSError):
        where = Path(f"/proc/{pid}/wchan").read_text(errors="replace")
    waits = f" in {where}" if where not in _NO_WCHAN and where.isprintable() else ""
    return f"process {shown} ({safe}) in state {state or '?'}{waits}"


def _is_killed(pid: int) -> bool:
    """Return whether SIGKILL is pending, for the process or its main thread; or it exits already."""
    try:
        flags = int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[6])
    except (FileNotFoundError, ProcessLookupError):
        return True
    pending = [int(word, 16) for name in (b"SigPnd", b"ShdPnd") for word in status_of(pid, name)]
    return bool(flags & _PF_EXITING) or any(signals & _KILL_BIT for signals in pending)


# After how long a departure is late.
SETTLE_SECONDS: Final = 5.0
# No event tells when a cgroup without processes can be removed: the first and the longest pause.
_FIRST_PAUSE_SECONDS: Final = 0.001
_PAUSE_SECONDS_MAX: Final = 60.0


@dataclass(frozen=True, slots=True)
class Waiter:
    """Waits for a departure: one of the two is called, once."""

    gone: Callable[[], None]
    late: Callable[[KernelError], None]


@dataclass(slots=True, eq=False)
class _Departure:
    job_id: int
    cgroup: Cgroup
    finish: Callable[[], None]
    deadline: Timer | None = None
    waiters: list[Waiter] = field(default_factory=list)
    # whether its waiters know that it is late; a new waiter then has us look at once
    late: bool = False
    # whether a descriptor or a timer will tell when to look again
    watched: bool = True
    pause_seconds: float = _FIRST_PAUSE_SECONDS


class Departures:
    """The cgroups that are on their way out, by their jobs."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher: Final = watcher
        self._under_way: Final[dict[int, _Departure]] = {}

    def __contains__(self, job_id: int) -> bool:
        return job_id in self._under_way

    def __len__(self) -> int:
        """Return the number of departures under way."""
        return len(self._under_way)

    def begin(
        self,
        job_id: int,
        cgroup: Cgroup,
        finish: Callable[[], None] = lambda: None,
        late_seconds: float = SETTLE_SECONDS,
    ) -> None:
        """Have a cgroup removed, from `end_init` or `go_on` on; it is late after *seconds*.

        *finish* is called when the cgroup has gone, however late, and before the waiting callers.
        """
        departure = self._under_way[job_id] = _Departure(job_id, cgroup, finish)
        departure.deadline = self._watcher.call_after(late_seconds, partial(self._on_deadline, departure))

    def end_init(self, job_id: int, pidfd: int) -> None:
        """Kill its init first, whose pidfd becomes ours."""
        departure = self._under_way[job_id]

        def on_end() -> None:
            self._watcher.unwatch(pidfd)
            collect(pidfd)
            self._step(departure)

        send_signal(pidfd, signal.SIGKILL)
        self._watcher.watch(pidfd, on_end)

    def go_on(self, job_id: int) -> None:
        """Remove it: no init is in it."""
        self._step(self._under_way[job_id])

    def wait_for(self, job_id: int, waiter: Waiter) -> None:
        """Have *waiter* called when nothing of a job is left: at once where nothing is on its way out."""
        departure = self._under_way.get(job_id)
        if departure is None:
            waiter.gone()
            return
        departure.waiters.append(waiter)
        if departure.late:
            self._look(departure)
        if departure.late and departure.waiters:
            self._tell_late(departure, _busy(departure))

    def settle(self) -> None:
        """Return when all but the late ones are gone, or at a deadline; for the launcher's end."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while any(not departure.late for departure in self._under_way.values()):
            if (left := deadline - time.monotonic()) <= 0:
                return
            self._watcher.run_once(left)

    def _step(self, departure: _Departure) -> None:
        departure.watched = False
        self._look(departure)

    def _look(self, departure: _Departure) -> None:
        """Remove it if that can be done now; else have a descriptor or a timer look again."""
        try:
            gone = departure.cgroup.try_remove()
        except KernelError as error:
            # it may work later
            self._tell_late(departure, error)
            gone = False
        if gone:
            self._end(departure)
        elif not departure.watched:
            departure.watched = True
            self._watch(departure)

    def _watch(self, departure: _Departure) -> None:
        for pid in _pids(departure.cgroup):
            try:
                pidfd = os.pidfd_open(pid)
            except OSError:
                # gone, or no descriptor is left
                continue
            self._watcher.watch(pidfd, partial(self._on_exit, departure, pidfd))
            return
        # The last process has ended for pidfds and not yet for its cgroup (kernels from 6.19 on).
        self._watcher.call_after(departure.pause_seconds, partial(self._step, departure))
        departure.pause_seconds = min(2 * departure.pause_seconds, _PAUSE_SECONDS_MAX)

    def _on_exit(self, departure: _Departure, pidfd: int) -> None:
        self._watcher.unwatch(pidfd)
        os.close(pidfd)
        self._step(departure)

    def _end(self, departure: _Departure) -> None:
        del self._under_way[departure.job_id]
        if departure.deadline is not None:
            departure.deadline.cancel()
        departure.finish()
        waiters, departure.waiters = departure.waiters, []
        for waiter in waiters:
            waiter.gone()

    def _on_deadline(self, departure: _Departure) -> None:
        if not departure.late:
            self._tell_late(departure, _busy(departure))

    @staticmethod
    def _tell_late(departure: _Departure, error: KernelError) -> None:
        departure.late = True
        waiters, departure.waiters = departure.waiters, []
        for waiter in waiters:
            waiter.late(error)


def _busy(departure: _Departure) -> KernelError:
    # the departure is late also when its processes cannot be examined, such as for want of a descriptor
    words = ""
    with suppress(OSError):
        words = describe(_pids(departure.cgroup)).words
    return KernelError("remove the cgroup of", f"job {departure.job_id}", errno.EBUSY, hint=words or None)


def _pids(cgroup: Cgroup) -> list[int]:
    # a list that cannot be read now is read again later
    try:
        return cgroup.pids()
    except KernelError:
        return []
