"""In which order, and how fast, calls go on to their handlers: before anything else is done for them.

Calls of one client wait for each other, and not for those of others. This holds the calls that a client sends
beyond its rate. That costs the server little, and HTTP/2's own bound of streams then holds the client up. A
client that goes on all the same, by cancelling held calls (CVE-2023-44487), is cut off.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import grpc

# Calls that need only our processor, or a moment of the launcher's. Of one client only one is under way at a
# time, so others wait for one call, and not for a burst of thousands.
QUICK: Final = frozenset(
    {
        b"/pjw.v1.JobWorkerService/Get",
        b"/pjw.v1.JobWorkerService/List",
        b"/pjw.v1.JobWorkerService/GetUsageHistory",
        b"/pjw.v1.JobWorkerService/GetQuota",
        b"/pjw.v1.JobWorkerService/ListWorkspaces",
        b"/pjw.v1.JobWorkerService/ListImages",
        b"/grpc.health.v1.Health/Check",
    }
)
QUICK_AT_ONCE: Final = 1
# Calls of one client that are held, of 20 KiB each: as many as twenty full connections have.
HELD_MAX: Final = 2000
# A call that its client cancels so soon counts as taken back. A client that loses its connection takes back
# all that it follows, so it may take back that many at once; beyond that, only some a second.
EARLY_NS: Final = 10**9
TAKEN_BACK_BURST: Final = 1000
TAKEN_BACK_PER_SECOND: Final = 50
# For how long the calls of a client that was cut off are dropped; doubled each time that it goes on.
PENALTY_SECONDS: Final = 5
PENALTY_SECONDS_MAX: Final = 60
FORGET_ABOVE: Final = 64

_SECOND_NS: Final = 10**9

Context = grpc.aio.ServicerContext[Any, Any]
Deliver = Callable[[], None]


class _Line:
    """The calls of one client."""

    __slots__ = (
        "banned_until",
        "client",
        "full_at",
        "penalty",
        "quick",
        "taken_back_full_at",
        "timer",
        "under_way",
        "waiting",
    )

    def __init__(self, client: str) -> None:
        self.client: Final = client
        self.waiting: Final[deque[tuple[int, int, Context, Deliver]]] = deque()
        self.under_way = self.quick = 0
        # a token bucket is one number: when it is full again
        self.full_at = self.taken_back_full_at = 0
        self.timer: asyncio.TimerHandle | None = None
        self.banned_until = 0
        self.penalty = 0

    def is_forgotten(self, now: int) -> bool:
        """Return whether its state is that of a client that never came."""
        busy = self.waiting or self.under_way or self.timer
        last = self.banned_until + PENALTY_SECONDS_MAX * _SECOND_NS if self.penalty else 0
        return not busy and now > max(self.full_at, self.taken_back_full_at, last)


class Turns:
    """Holds calls until it is their turn."""

    def __init__(
        self,
        rate: Callable[[], tuple[float, int]],
        cut_off: Callable[[str], None],
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        # called with a client that cancels the calls that it begins
        self._cut_off: Final = cut_off
        # calls a second, 0 for no bound, and how many at once after a rest
        self._rate: Final = rate
        self._clock_ns: Final = clock_ns
        self._lines: Final[dict[str, _Line]] = {}
        self._forget_above = FORGET_ABOVE
        self._open = False

    def came(self, client: str, method: bytes, context: Context, deliver: Deliver) -> bool:
        """Have *deliver* called when it is the call's turn; false when it never will be."""
        line = self._lines.get(client)
        if line is None:
            self._forget()
            line = self._lines[client] = _Line(client)
        if len(line.waiting) >= HELD_MAX:
            return False
        line.waiting.append((int(method in QUICK), self._clock_ns(), context, deliver))
        self._go_on(line)
        return True

    def ban(self, client: str) -> int:
        """Forget *client*'s waiting calls, and ban it for a while; return the seconds of the ban."""
        line, now = self._lines[client], self._clock_ns()
        line.waiting.clear()
        line.taken_back_full_at = 0
        again = line.penalty and now < line.banned_until + PENALTY_SECONDS_MAX * _SECOND_NS
        line.penalty = min(2 * line.penalty, PENALTY_SECONDS_MAX) if again else PENALTY_SECONDS
        line.banned_until = now + line.penalty * _SECOND_NS
        return line.penalty

    def is_banned(self, client: str) -> bool:
        """Return whether the client is banned."""
        line = self._lines.get(client)
        return line is not None and self._clock_ns() < line.banned_until

    def open(self) -> None:
        """Let all go at once from now on, for the server ends and answers none of it."""
        self._open = True
        for line in self._lines.values():
            self._go_on(line)

    def _go_on(self, line: _Line) -> None:
        if line.timer is not None and not self._open:
            return
        while line.waiting:
            quick, came, context, deliver = line.waiting[0]
            if not self._open:
                if quick and line.quick >= QUICK_AT_ONCE:
                    return
                if (nanoseconds := self._take(line)) > 0:
                    loop = asyncio.get_running_loop()
                    line.timer = loop.call_later(nanoseconds / 1e9, self._timed, line)
                    return
            line.waiting.popleft()
            line.under_way += 1
            line.quick += quick
            context.add_done_callback(partial(self._ended, line, quick, came))  # type: ignore[arg-type]
            deliver()

    def _take(self, line: _Line) -> int:
        """Take a token; 0, or after how many nanoseconds there is one."""
        rate, burst = self._rate()
        if not rate:
            return 0
        now, step = self._clock_ns(), round(1e9 / rate)
        full_at = max(now, line.full_at) + step
        if (too_early := full_at - now - burst * step) > 0:
            return too_early
        line.full_at = full_at
        return 0

    def _timed(self, line: _Line) -> None:
        line.timer = None
        self._go_on(line)

    def _ended(self, line: _Line, quick: int, came: int, context: Context) -> None:
        line.under_way -= 1
        line.quick -= quick
        # no status was sent: the caller has gone, or has cancelled the call
        if not context.done() and not self._open:
            now = self._clock_ns()
            if now - came < EARLY_NS and now >= line.banned_until:
                self._note_taken_back(line, now)
        self._go_on(line)

    def _note_taken_back(self, line: _Line, now: int) -> None:
        step = _SECOND_NS // TAKEN_BACK_PER_SECOND
        line.taken_back_full_at = max(now, line.taken_back_full_at) + step
        if line.taken_back_full_at - now > TAKEN_BACK_BURST * step:
            self._cut_off(line.client)

    def _forget(self) -> None:
        if len(self._lines) <= self._forget_above:
            return
        now = self._clock_ns()
        for client in [name for name, line in self._lines.items() if line.is_forgotten(now)]:
            del self._lines[client]
        # doubled, so that the clients that came since the last look pay for the next one
        self._forget_above = max(FORGET_ABOVE, 2 * len(self._lines))
