"""Launches under way: so many of a client at a time, the others in turn.

The launcher takes requests as they come. So a client has only a few launches ahead of another's start,
however many starts it asks for at once (S10). It has fewer while other clients launch than alone.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Final

# Enough to keep launcher and processors busy: a launch is mostly the kernel's work.
AT_ONCE_ALONE: Final = 4
# Each launch keeps a processor busy. While one client had two launches at a time, another's stop took 3.3
# times as long as while it started and stopped one job after the other; with one launch at a time, 2.0 times.
AT_ONCE_WITH_OTHERS: Final = 1
# seconds for which a client counts after its last launch
RECENT_SECONDS: Final = 1.0
# A launch that takes longer waits for something else than a processor, such as a disk: the next may begin.
SLOW_SECONDS: Final = 0.25


class _Line:
    """The starts of one client."""

    def __init__(self) -> None:
        self.under_way = 0
        # of these, how many take long
        self.slow = 0
        self.waiting: Final[deque[asyncio.Future[None]]] = deque()


class Turn:
    """One turn of a client, as an asynchronous context manager or by `begin` and `end`.

    One for each start, so it has no generator.
    """

    __slots__ = ("_client_name", "_line", "_slow", "_timer", "_turns")

    def __init__(self, turns: "LaunchTurns", client_name: str) -> None:
        self._turns: Final = turns
        self._client_name: Final = client_name
        # while it lasts
        self._line: _Line | None = None
        self._slow = False
        self._timer: asyncio.TimerHandle | None = None

    async def begin(self) -> None:
        """Wait until it comes."""
        self._line = await self._turns.begin(self._client_name)
        self._timer = asyncio.get_running_loop().call_later(SLOW_SECONDS, self._note_slow)

    def end(self) -> None:
        """End it, if it lasts."""
        if self._timer is not None:
            self._timer.cancel()
        line, self._line = self._line, None
        if line is not None:
            self._turns.end(self._client_name, line, slow=self._slow)

    async def __aenter__(self) -> None:
        await self.begin()

    async def __aexit__(self, *exception: object) -> None:
        self.end()

    def _note_slow(self) -> None:
        if self._line is not None:
            self._slow = True
            self._turns.note_slow(self._client_name, self._line)


class LaunchTurns:
    """The turns of clients to launch."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock: Final = clock
        self._lines: Final[dict[str, _Line]] = {}
        # when each client last had a turn, in that order; those that are not recent any more are forgotten
        self._recent: Final[dict[str, float]] = {}

    def is_busy(self, client_name: str) -> bool:
        """Return whether a client's next launch would have to wait for its turn."""
        line = self._lines.get(client_name)
        return line is not None and (bool(line.waiting) or not self._has_room(client_name, line))

    def turn(self, client_name: str) -> "Turn":
        """Return a client's next turn, for the caller to wait for."""
        return Turn(self, client_name)

    async def begin(self, client_name: str) -> _Line:
        """Wait for a client's turn; its line. For a Turn."""
        line = self._lines.setdefault(client_name, _Line())
        if line.waiting or not self._has_room(client_name, line):
            await self._wait(client_name, line)
        else:
            line.under_way += 1
        self._note(client_name)
        return line

    def note_slow(self, client_name: str, line: _Line) -> None:
        """Let the client's next launch begin, as this one takes long. For a Turn."""
        line.slow += 1
        self._go_on(client_name, line)

    def end(self, client_name: str, line: _Line, *, slow: bool) -> None:
        """End a turn. For a Turn."""
        self._note(client_name)
        line.under_way -= 1
        line.slow -= slow
        self._go_on(client_name, line)

    async def _wait(self, client_name: str, line: _Line) -> None:
        turn = asyncio.get_running_loop().create_future()
        line.waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            # the turn may have come in the same round of the loop
            if turn.done() and not turn.cancelled():
                line.under_way -= 1
            self._go_on(client_name, line)
            raise

    def _go_on(self, client_name: str, line: _Line) -> None:
        """Give turns to those that have waited longest."""
        while line.waiting and (line.waiting[0].done() or self._has_room(client_name, line)):
            turn = line.waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                line.under_way += 1
        if not line.under_way and not line.waiting:
            del self._lines[client_name]

    def _has_room(self, client_name: str, line: _Line) -> bool:
        if line.under_way >= AT_ONCE_ALONE:
            return False
        return line.under_way - line.slow < AT_ONCE_WITH_OTHERS or self._is_alone(client_name)

    def _is_alone(self, client_name: str) -> bool:
        before = self._clock() - RECENT_SECONDS
        while self._recent and self._recent[oldest := next(iter(self._recent))] < before:
            del self._recent[oldest]
        return not self._recent or (len(self._recent) == 1 and client_name in self._recent)

    def _note(self, client_name: str) -> None:
        self._recent.pop(client_name, None)
        self._recent[client_name] = self._clock()
