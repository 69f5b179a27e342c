"""The calls under way, and the events that end one early: a drain, a revocation, an expired certificate."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Final

from google.protobuf.message import Message

from pjw.errors import NotAuthenticatedError, PjwError
from pjw.server.peer import Peer

_NEVER: Final = datetime.max.replace(tzinfo=UTC)


class Call:
    """A call that runs in the current task, and why it was ended if it was."""

    __slots__ = ("_cancelling", "_task", "ended_by", "for_client", "method", "peer", "request")

    def __init__(
        self, peer: Peer, method: str, request: Message | None, for_client: str | None = None
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task: Final = task
        self._cancelling: Final = task.cancelling()
        self.peer: Final = peer
        self.method: Final = method
        self.request: Final = request
        # the client that a gateway calls for
        self.for_client: Final = for_client
        self.ended_by: PjwError | None = None

    def end(self, error: PjwError) -> None:
        """Have the call end with *error*. A call that is ending already keeps its first one."""
        if self.ended_by is None:
            self.ended_by = error
            self._task.cancel()

    def take_end(self) -> PjwError | None:
        """Return the error that the call was cancelled for, which is then no cancellation any more.

        None when its caller, or anything else, has cancelled it too. For where CancelledError arrives.
        """
        if self.ended_by is None or self._task.uncancel() > self._cancelling:
            return None
        return self.ended_by


class Calls:
    """All calls under way. One timer, for the certificate that expires first, ends those that are due."""

    def __init__(self) -> None:
        self._calls: Final[set[Call]] = set()
        self._timer: asyncio.TimerHandle | None = None
        # the end of a certificate that the timer is for
        self._timer_for = _NEVER

    def __iter__(self) -> Iterator[Call]:
        return iter(self._calls)

    def add(self, call: Call) -> None:
        """Add a call that was let in."""
        self._calls.add(call)
        if call.peer.not_valid_after < self._timer_for:
            self._set_timer(call.peer)

    def remove(self, call: Call) -> None:
        """Remove a call that is over. The timer stays: it will find that there is nothing to do."""
        self._calls.discard(call)

    def _set_timer(self, peer: Peer) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_for = peer.not_valid_after
        # by the monotonic clock, which is never set; the sweep looks at the wall clock again
        self._timer = asyncio.get_running_loop().call_later(max(0.0, peer.seconds_left()), self._sweep)

    def _sweep(self) -> None:
        self._timer, self._timer_for = None, _NEVER
        next_peer: Peer | None = None
        for call in self._calls:
            if call.ended_by is not None:
                continue
            if call.peer.seconds_left() <= 0:
                call.end(NotAuthenticatedError("the client certificate has expired during the call"))
            elif next_peer is None or call.peer.not_valid_after < next_peer.not_valid_after:
                next_peer = call.peer
        if next_peer is not None:
            self._set_timer(next_peer)
