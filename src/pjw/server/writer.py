"""The writing end of a stream, which drops a client that stopped reading, whatever else it does."""

# The stubs' generic classes are not generic when they run.
from __future__ import annotations

import asyncio
import logging
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import grpc
from google.protobuf.message import Message

from pjw.errors import ServerUnreachableError

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

# A client that lives but does not read is dropped after this long; the command line then
# comes back by itself, at the byte where it was.
STALLED_WRITE_SECONDS: Final = 900

log: Final = logging.getLogger(__name__)


class ReaderGoneError(Exception):
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
            raise ReaderGoneError from None
        self._since = None

    def _look(self) -> None:
        now = self._loop.time()
        end = (now if self._since is None else self._since) + STALLED_WRITE_SECONDS
        if end <= now:
            self._timeout.reschedule(now)
        else:
            self._timer = self._loop.call_at(end, self._look)
