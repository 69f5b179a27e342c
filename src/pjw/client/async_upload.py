"""Input of a job, sent by tasks: one takes it from its source, one of gRPC's sends it."""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator
from typing import Final

from pjw.client.input import Outgoing
from pjw.client.requests import JobId
from pjw.v1 import job_worker_pb2 as pb


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
