"""The calls under way, the events that end one early, and writers of streams that drop a stuck reader."""

from __future__ import annotations

import asyncio

# The stubs' generic classes are not generic when they run.
import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import grpc
from google.protobuf.message import Message

from pjw.errors import NotAuthenticatedError, PjwError, ServerUnreachableError
from pjw.server.authz import Peer

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]


_NEVER: Final = datetime.max.replace(tzinfo=UTC)


class RunningCall:
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
        self._calls: Final[set[RunningCall]] = set()
        self._timer: asyncio.TimerHandle | None = None
        # the end of a certificate that the timer is for
        self._timer_for = _NEVER

    def __iter__(self) -> Iterator[RunningCall]:
        return iter(self._calls)

    def add(self, call: RunningCall) -> None:
        """Add a call that was let in."""
        self._calls.add(call)
        if call.peer.not_valid_after < self._timer_for:
            self._set_timer(call.peer)

    def remove(self, call: RunningCall) -> None:
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


# The writing end of a stream, which drops a client that stopped reading, whatever else it does.

# A client that lives but does not read is dropped after this long; the command line then
# comes back by itself, at the byte where it was.
STALLED_WRITE_SECONDS: Final = 900

log: Final = logging.getLogger(__name__)


class ClientGoneError(Exception):
    """The client has gone: there is no reader to write to."""


class Writer:
    """Writes to one client, and drops it when it stops reading.

    One timer for all writes: starting one for each costs a tenth of the work for a line.
    """

    def __init__(self, context: Context) -> None:
        self._context: Final = context
        self._loop: Final = asyncio.get_running_loop()
        self._timeout: Final = asyncio.timeout(None)
        # when the write that is under way began
        self._since: float | None = None
        self._timer = self._loop.call_later(STALLED_WRITE_SECONDS, self._look)

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._timer.cancel()
        try:
            await self._timeout.__aexit__(kind, error, traceback)
        except TimeoutError:
            log.warning(
                "dropped %s, which has read nothing for %d s", self._context.peer(), STALLED_WRITE_SECONDS
            )
            # An error, never a clean end: that would tell it that the output is whole.
            raise ServerUnreachableError(
                f"dropped after {STALLED_WRITE_SECONDS} s in which nothing was read; ask again from there"
            ) from None

    async def write(self, answer: Message | bytes) -> None:
        """Write, and wait until there is room for more."""
        self._since = self._loop.time()
        try:
            await self._context.write(answer)
        except grpc.aio.BaseError:
            # gRPC's word for a follower that vanished while we wrote
            raise ClientGoneError from None
        self._since = None

    def _look(self) -> None:
        now = self._loop.time()
        end = (now if self._since is None else self._since) + STALLED_WRITE_SECONDS
        if end <= now:
            self._timeout.reschedule(now)
        else:
            self._timer = self._loop.call_at(end, self._look)
