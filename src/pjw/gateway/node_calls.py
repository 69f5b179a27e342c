"""The output of a job on a node, through the gateway: from any byte on, whole to the byte over every break.

The gateway stores no output. It counts the bytes that it has passed on, and asks for the rest when the node
is back.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import grpc

from pjw.errors import JobNotFoundError, OffsetError, OutputLostError, PjwError, ServerUnreachableError
from pjw.gateway.answers import in_our_words
from pjw.gateway.dial import Dial, error_from
from pjw.gateway.nodes import Node
from pjw.model import Job
from pjw.output import FramePrefix, no_head
from pjw.rpc.convert import logs_response_bytes
from pjw.server.backend import Reading
from pjw.v1 import job_worker_pb2 as pb
from pjw.worker import Part

FIRST_PAUSE_SECONDS: Final = 0.05
LONGEST_PAUSE_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class OnNode:
    """Where the output of a job is now."""

    job: Job
    node: Node
    node_job_id: int


# Finds the node of a job; returns when a node has the job, or it has ended. None: it ended without a start.
Where = Callable[[], Awaitable[OnNode | None]]
# A part of the job's output from the archive; None when that does not have it.
InArchive = Callable[[Part], Awaitable[Reading | None]]


class NoReading:
    """The output of a job that was never started: there is none."""

    def __init__(self, offset: int) -> None:
        self.offset: Final = offset

    async def chunks(self, head: FramePrefix = no_head) -> AsyncGenerator[bytes, None]:
        """Nothing. Raises OffsetError for any byte but the first."""
        if self.offset:
            raise OffsetError(f"cannot read output from byte {self.offset}: it has 0 bytes", size=0)
        nothing: tuple[bytes, ...] = ()
        for each in nothing:
            yield each

    async def timed(self) -> AsyncGenerator[tuple[bytes, datetime | None], None]:
        """Nothing, as `chunks`."""
        async for data in self.chunks():
            yield data, None


class ProxyReading:
    """A part of a job's output that is about to be read."""

    def __init__(self, dial: Dial, where: Where, in_archive: InArchive, part: Part) -> None:
        self._dial: Final = dial
        self._where: Final = where
        self._in_archive: Final = in_archive
        # the rest of the output, when the archive has it and the node does not answer
        self._rest: Reading | None = None
        self._part: Final = part
        self.offset = part.offset

    async def seek(self) -> None:
        """Look up where the part begins, when the client asks for it by lines or by time.

        Raises the node's error, ServerUnreachableError when the node goes away meanwhile, and OutputLostError
        when it is lost.
        """
        if not self._part.is_sought:
            return
        there = await self._connected()
        if there is None:
            self._rest = await self._in_archive(self._part)
            self.offset = self._rest.offset if self._rest is not None else 0
            return
        # the first answer has the offset; we need no more
        call = self._dial.stream(there.node, "Logs", self._request(there, sought=True), there.job.client_name)
        try:
            first = await call.read()
            if first is not grpc.aio.EOF:
                self.offset = pb.LogsResponse.FromString(first).offset
                return
            # the call ends with its reason
            await call
        except grpc.aio.AioRpcError as error:
            raise self._told(error_from(error, there.node), there) from None
        finally:
            call.cancel()

    async def chunks(self, head: FramePrefix = no_head) -> AsyncGenerator[bytes, None]:
        """Its bytes, as they come, each chunk behind the head that *head* makes from its length."""
        async for message in self._messages(timestamps=False):
            count = logs_response_bytes(message)
            start = len(message) - count
            made = head(count)
            # most messages go on as they came
            yield message if made == message[:start] else made + message[start:]
        if self._rest is not None:
            async with aclosing(self._rest.chunks(head)) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def timed(self) -> AsyncGenerator[tuple[bytes, datetime | None], None]:
        """Yield the same, with the time at which the job wrote each piece; None where that is not known."""
        async for message in self._messages(timestamps=True):
            response = pb.LogsResponse.FromString(message)
            time = response.time.ToDatetime(UTC) if response.HasField("time") else None
            yield response.data, time
        if self._rest is not None:
            async with aclosing(self._rest.timed()) as timed:
                async for each in timed:
                    yield each

    async def _messages(self, *, timestamps: bool) -> AsyncGenerator[bytes, None]:
        """Yield serialized answers with bytes in them, in their order, from `offset` on."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            there = await self._connected()
            if there is None:
                return
            request = self._request(there, timestamps=timestamps)
            call: Any = self._dial.stream(there.node, "Logs", request, there.job.client_name)
            try:
                async for message in call:
                    count = (
                        len(pb.LogsResponse.FromString(message).data)
                        if timestamps
                        else logs_response_bytes(message)
                    )
                    pause = FIRST_PAUSE_SECONDS
                    # before we pass it on: a reader that then takes no more has had it
                    self.offset += count
                    yield message
                return
            except grpc.aio.AioRpcError as error:
                why = self._told(error_from(error, there.node), there)
                if await self._goes_on_in_archive():
                    return
                if not isinstance(why, ServerUnreachableError):
                    raise why from None
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if not there.node.row.is_lost or (task is not None and task.cancelling()):
                    raise
                # Dial.drop has cancelled the call, since nobody waits for a node that is lost
            finally:
                call.cancel()
            # wait until the node comes back, or for a moment, as it may never have gone
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await there.node.changed.wait()
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def _connected(self) -> OnNode | None:
        """Where the job is, once its node is connected. Raises OutputLostError when the node is lost."""
        while True:
            there = await self._where()
            if there is None:
                if self.offset:
                    raise OffsetError(f"cannot read output from byte {self.offset}: it has 0 bytes", size=0)
                return None
            if there.node.session is not None:
                return there
            if await self._goes_on_in_archive():
                return None
            if there.node.row.is_lost:
                raise OutputLostError(
                    f"the output of job {there.job.id} ends here, at byte {self.offset}:"
                    f" node {there.node.row.name} is lost, and has the rest",
                    hint="what the node has can be read when it is back",
                )
            await there.node.changed.wait()

    async def _goes_on_in_archive(self) -> bool:
        """Whether the archive has what follows: that is the rest then."""
        self._rest = await self._in_archive(Part(offset=self.offset, stderr=self._part.stderr))
        return self._rest is not None

    def _request(self, there: OnNode, *, timestamps: bool = False, sought: bool = False) -> pb.LogsRequest:
        part = self._part
        request = pb.LogsRequest(
            id=there.node_job_id,
            offset=self.offset,
            no_follow=not part.follow,
            stream=pb.OUTPUT_STREAM_STDERR if part.stderr else pb.OUTPUT_STREAM_UNSPECIFIED,
            timestamps=timestamps,
            session=part.session,
            artifacts=part.artifacts,
        )
        if sought and part.tail_lines is not None:
            request.tail_lines = part.tail_lines
        if sought and part.since_ns is not None:
            request.since.FromNanoseconds(part.since_ns)
        return request

    def _told(self, error: PjwError, there: OnNode) -> PjwError:
        """Return a node's error, in words with the job's id at the gateway."""
        job_id, name = there.job.id, there.node.row.name
        if isinstance(error, JobNotFoundError):
            return OutputLostError(f"node {name} has no output of job {job_id} any more")
        if isinstance(error, OutputLostError) and not self._part.artifacts:
            size = "" if there.job.output_bytes is None else f" of its {there.job.output_bytes} bytes"
            return OutputLostError(f"the output of job {job_id} on node {name} is cut short{size}")
        return in_our_words(error, name, there.node_job_id, job_id)
