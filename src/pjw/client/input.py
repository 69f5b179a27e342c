"""The input of a job's stdin, between its source and the server; this neither reads nor sends.

Sent bytes are kept until the server acknowledges them: so a lost connection costs nothing, and the memory
used is bounded.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from typing import Final

from pjw.client.requests import JobId, Reached, wire_id
from pjw.v1 import job_worker_pb2 as pb

WINDOW_BYTES: Final = 4 * 1024 * 1024
# The most that pjwd takes in a message: half of the cost of 256 KiB is for the message.
PIECE_BYTES: Final = 1024 * 1024


class Outgoing:
    """The input of one job from its first byte on; bytes that the server has already are skipped."""

    gone_is_done: Final = False

    def __init__(self, job_id: JobId, session: int = 0, *, append: bool = False, upload: str = "") -> None:
        """Begin the input of a job; with *append* it comes behind the bytes that the server already has.

        With the name of an *upload* the input is that upload, and belongs to no job.
        """
        self.job_id: Final = 0 if upload else wire_id(job_id)
        self.facts: Final = {} if upload else {"job_id": self.job_id}
        self.first: Final = pb.WriteInputRequest(id=self.job_id, session=session, upload=upload)
        # the number of bytes that the source has given, and the number that the server has
        self.given = 0
        self.acknowledged = 0
        self._appends = append
        self._complete = False
        self._pieces: Final[deque[bytes]] = deque()

    @property
    def full(self) -> bool:
        """Whether the source has to wait for the server."""
        return self.given - self.acknowledged >= WINDOW_BYTES

    @property
    def reached(self) -> Reached:
        """The progress of the input, and a next step."""
        if self.first.upload:
            return f" after {self.acknowledged} bytes of the upload", "nothing has been started: try again"
        return (
            f" after {self.acknowledged} bytes of input",
            f"job {self.job_id} waits for the rest of its input, or for a stop",
        )

    def give(self, data: bytes) -> None:
        """Take the next bytes of the source."""
        known = self.acknowledged - self.given
        self.given += len(data)
        if known > 0:
            data = data[known:]
        for start in range(0, len(data), PIECE_BYTES):
            self._pieces.append(data[start : start + PIECE_BYTES])

    def complete(self) -> None:
        """Note that the source has ended."""
        self._complete = True

    def acknowledge(self, answer: pb.WriteInputResponse) -> None:
        """Drop the bytes that the server has now."""
        if self._appends:
            self._appends = False
            self.given += answer.offset
            self.acknowledged = answer.offset
            return
        ahead = answer.offset - self.acknowledged
        while self._pieces and ahead >= len(self._pieces[0]):
            ahead -= len(self._pieces.popleft())
        if self._pieces and ahead > 0:
            self._pieces[0] = self._pieces[0][ahead:]
        self.acknowledged = max(self.acknowledged, answer.offset)

    def after(self, sent: int) -> pb.WriteInputRequest | None:
        """Return the request that follows the offset *sent*; None when there is nothing to send yet."""
        offset = self.acknowledged
        for piece in self._pieces:
            if offset >= sent:
                return pb.WriteInputRequest(offset=offset, data=piece)
            offset += len(piece)
        return pb.WriteInputRequest(offset=max(offset, sent), end=True) if self._complete else None


# Input of a job, sent by threads: the caller's takes it from its source, one of gRPC's sends it.


class Upload:
    """`Outgoing` for threads: a thread that finds nothing to do waits."""

    def __init__(self, job_id: JobId, session: int = 0, *, append: bool = False, upload: str = "") -> None:
        self.outgoing: Final = Outgoing(job_id, session, append=append, upload=upload)
        self._changed: Final = threading.Condition()
        # the number of the connection that sends, and whether its server has said where to begin
        self._connection = 0
        self._begun = False
        self._over = False
        self._failure: Exception | None = None
        self._cancel: Callable[[], object] = lambda: None

    def give(self, data: bytes) -> bool:
        """Take the next bytes of the source when there is room; return False once no more are wanted."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or not self.outgoing.full)
            if not self._over:
                self.outgoing.give(data)
                self._changed.notify_all()
            return not self._over

    def complete(self) -> None:
        """Note that the source has ended."""
        with self._changed:
            self.outgoing.complete()
            self._changed.notify_all()

    def acknowledge(self, answer: pb.WriteInputResponse) -> None:
        """Take the server's answer: it has so many bytes, and the bytes behind them may be sent."""
        with self._changed:
            self.outgoing.acknowledge(answer)
            self._begun = True
            self._changed.notify_all()

    @property
    def over(self) -> bool:
        """Whether nothing is sent any more."""
        return self._over

    def on_end(self, cancel: Callable[[], object]) -> None:
        """Have the call under way cancelled at the end, whatever it waits for."""
        with self._changed:
            self._cancel = cancel
            over = self._over
        if over:
            cancel()

    def end(self, failure: Exception | None = None) -> None:
        """Send nothing any more."""
        with self._changed:
            if self._over:
                return
            self._over, self._failure = True, failure
            self._changed.notify_all()
        self._cancel()

    def result(self) -> int:
        """Wait for the end; return the number of bytes the server has. Raises the error that ended it."""
        with self._changed:
            self._changed.wait_for(lambda: self._over)
        if self._failure is not None:
            raise self._failure
        return self.outgoing.acknowledged

    def requests(self) -> Iterator[pb.WriteInputRequest]:
        """Yield the requests of a new connection until the input ends; those of the connection before end."""
        with self._changed:
            self._connection += 1
            self._begun = False
            self._changed.notify_all()
            connection = self._connection
        return self._requests(connection)

    def _requests(self, connection: int) -> Iterator[pb.WriteInputRequest]:
        request: pb.WriteInputRequest | None = self.outgoing.first
        while request is not None:
            yield request
            if request.end:
                return
            request = self._next(connection, request.offset + len(request.data))

    def _next(self, connection: int, sent: int) -> pb.WriteInputRequest | None:
        """Return the request behind the offset *sent*, once there is one; None: none on this connection."""
        with self._changed:
            while not self._over and connection == self._connection:
                request = self.outgoing.after(sent) if self._begun else None
                if request is not None:
                    return request
                self._changed.wait()
        return None


# Input of a job, sent by tasks: one takes it from its source, one of gRPC's sends it.


class AsyncUpload:
    """`Outgoing` for tasks: a task that finds nothing to do waits."""

    def __init__(self, job_id: JobId, session: int = 0, *, append: bool = False, upload: str = "") -> None:
        self.outgoing: Final = Outgoing(job_id, session, append=append, upload=upload)
        self._changed: Final = asyncio.Condition()
        # the number of the connection that sends, and whether its server has said where to begin
        self._connection = 0
        self._begun = False

    async def give_all(self, data: AsyncIterable[bytes]) -> None:
        """Take all that the source has, each piece when there is room."""
        async for piece in data:
            async with self._changed:
                await self._changed.wait_for(lambda: not self.outgoing.full)
                self.outgoing.give(piece)
                self._changed.notify_all()
        async with self._changed:
            self.outgoing.complete()
            self._changed.notify_all()

    async def acknowledge(self, answer: pb.WriteInputResponse) -> None:
        """Take the server's answer: it has so many bytes, and the bytes behind them may be sent."""
        async with self._changed:
            self.outgoing.acknowledge(answer)
            self._begun = True
            self._changed.notify_all()

    async def requests(self) -> AsyncIterator[pb.WriteInputRequest]:
        """Yield the requests of a new connection, until the input or the connection ends."""
        self._begun = False
        connection = self._connection
        request = self.outgoing.first
        while True:
            yield request
            if request.end:
                return
            sent = request.offset + len(request.data)
            async with self._changed:
                await self._changed.wait_for(
                    lambda: self._connection != connection or (self._begun and self.outgoing.after(sent))  # noqa: B023
                )
                found = self.outgoing.after(sent)
            if self._connection != connection or found is None:
                return
            request = found

    async def disconnect(self) -> None:
        """End the requests of the connection."""
        async with self._changed:
            self._connection += 1
            self._changed.notify_all()
