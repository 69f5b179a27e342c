"""Calls into a job on its node: input, terminals, sessions, and connections to its ports.

Each call goes to the node of the job, for the client whose job it is. The gateway keeps nothing of it: the
number of a session and the bytes of an input are the node's. So when the gateway or the node is killed, a
client hears what it hears of one machine, and goes on with the same call.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final

import grpc
from google.protobuf.message import Message

from pjw.errors import (
    JobNotFoundError,
    JobStateError,
    PjwError,
    ServerUnreachableError,
    SessionNotFoundError,
)
from pjw.gateway.answers import in_our_words
from pjw.gateway.dial import Dial, error_from
from pjw.gateway.node_calls import OnNode
from pjw.gateway.placement_states import PlacementState
from pjw.gateway.placements import Placements
from pjw.model import Archive, Job, JobSpec, JobState, Session, TerminalSize, check_port
from pjw.rpc.convert import (
    archive_to_message,
    exec_to_message,
    session_from_message,
    terminal_to_message,
)
from pjw.v1 import job_worker_pb2 as pb
from pjw.worker.input import ended_error, require_input
from pjw.worker.tasks import Flag, first_of, log_bug, side_by_side

Respond = Callable[[pb.ForwardResponse], Awaitable[None]]

# A script may start a job and enter it at once, as on one machine: for a moment there is no node.
_FRESH_SECONDS: Final = 1.0


class Within:
    """Calls into the jobs of a gateway."""

    def __init__(
        self,
        dial: Dial,
        placements: Placements,
        get: Callable[[int, str | None], Awaitable[Job]],
        where: Callable[[int], Awaitable[OnNode | None]],
        change_of: Callable[[int], Flag],
    ) -> None:
        """*get* looks up a job of a client, and *where* the node of one that has begun, or will.

        *change_of* is a flag that is set when a job that waits in the queue changes.
        """
        self._dial: Final = dial
        self._placements: Final = placements
        self._get: Final = get
        self._where: Final = where
        self._change_of: Final = change_of

    # --- sessions

    async def exec(self, job_id: int, spec: JobSpec, client_name: str, *, detached: bool) -> Session:
        """Start another command in a job; see `Worker.exec`."""
        there = await self._running(job_id, client_name)
        return await self._begun(there, exec_to_message(there.node_job_id, spec, detached=detached))

    async def archive(self, job_id: int, archive: Archive, client_name: str, request_id: str) -> Session:
        """Pack files of a job into an archive, or unpack one; see `Worker.archive`."""
        there = await self._running(job_id, client_name)
        return await self._begun(there, archive_to_message(there.node_job_id, archive, request_id))

    async def _begun(self, there: OnNode, request: pb.ExecRequest) -> Session:
        # a client that asks again names the same request, by which the node knows its session
        answer = await self._call(there, "Exec", request)
        return replace(session_from_message(answer.session), job_id=there.job.id)

    async def wait_session(self, job_id: int, number: int, owner: str | None) -> Session:
        """Wait until a session has ended. Raises SessionNotFoundError."""
        there = await self.of_session(job_id, number, owner)
        answer = await self._call(there, "Wait", pb.WaitRequest(id=there.node_job_id, session=number))
        return replace(session_from_message(answer.session), job_id=job_id)

    async def stop_session(self, job_id: int, number: int, owner: str | None) -> Session:
        """Hang a session up, and wait for its end. Raises SessionNotFoundError."""
        there = await self.of_session(job_id, number, owner)
        answer = await self._call(there, "Stop", pb.StopRequest(id=there.node_job_id, session=number))
        return replace(session_from_message(answer.session), job_id=job_id)

    async def of_session(self, job_id: int, number: int, owner: str | None) -> OnNode:
        """Where a session may be. Raises SessionNotFoundError, also for another client's job."""
        there: OnNode | None = None
        with suppress(JobNotFoundError):
            job = await self._launched(job_id, owner)
            # one that waits has no sessions, and nobody waits until it has some
            there = None if job.state is JobState.QUEUED else await self._where(job.id)
        if there is None:
            raise SessionNotFoundError(job_id, number)
        return there

    # --- terminals

    async def resize(self, job_id: int, size: TerminalSize, owner: str | None, session: int) -> None:
        """Give the terminal of a job, or of a session of it, another size; see `Worker.resize`."""
        if session:
            there = await self.of_session(job_id, session, owner)
        else:
            job = await self._launched(job_id, owner, _FRESH_SECONDS)
            begun = None if _is_over(job) or job.state is JobState.QUEUED else await self._where(job_id)
            if begun is None:
                raise JobStateError(f"job {job_id} has {'ended' if _is_over(job) else 'not begun'}")
            there = begun
        request = pb.ResizeRequest(id=there.node_job_id, session=session, terminal=terminal_to_message(size))
        await self._call(there, "Resize", request)

    # --- connections

    async def connect(self, job_id: int, port: int, client_name: str) -> "NodeConnection":
        """Return a connection to a port within a job, made when it is carried; see `Worker.connect`."""
        check_port(port)
        there = await self._running(job_id, client_name)
        return NodeConnection(self._dial, _connected(there))

    # --- input

    @asynccontextmanager
    async def write_input(
        self, job_id: int, owner: str | None, session: int
    ) -> AsyncGenerator["NodeInput", None]:
        """Write to the input of a job, or of a session of it; see `Worker.write_input`."""
        if session:
            there = await self.of_session(job_id, session, owner)
        else:
            require_input(await self._get(job_id, owner))
            # one that waits in the queue is waited for
            begun = await self._where(job_id)
            if begun is None or _is_over(begun.job):
                raise ended_error(f"job {job_id}")
            there = begun
        call = self._dial.duplex(_connected(there).node, "WriteInput", there.job.client_name)
        writer = NodeInput(call, there)
        timeout = asyncio.timeout(None)
        watching: asyncio.Future[None] | None = None
        try:
            async with timeout:
                watching = asyncio.ensure_future(_when_over(call, timeout.reschedule))
                watching.add_done_callback(log_bug)
                await writer.begin(pb.WriteInputRequest(id=there.node_job_id, session=session))
                yield writer
        except TimeoutError:
            if not timeout.expired():
                raise
            raise await _why(call, there) from None
        finally:
            if watching is not None:
                watching.cancel()
            call.cancel()

    # --- of all

    async def _launched(self, job_id: int, owner: str | None, fresh_seconds: float = 0) -> Job:
        """Return a job, once it is known whether its command was executed. Raises JobNotFoundError.

        One that is younger than *fresh_seconds*, and waits, is waited for until it has that age.
        """
        while True:
            # whatever comes from here on is heard
            change = self._change_of(job_id)
            job = await self._get(job_id, owner)
            placed = self._placements.live.get(job_id)
            if placed is None and job.state is not JobState.QUEUED:
                return job
            state = PlacementState.QUEUED if placed is None else placed.placement.state
            if state not in (PlacementState.QUEUED, PlacementState.CLAIMED):
                return job
            left = None
            if state is PlacementState.QUEUED:
                # even if the clock is set
                left = min(fresh_seconds, fresh_seconds - (datetime.now(UTC) - job.asked).total_seconds())
                if left <= 0:
                    return job
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await (change.wait() if placed is None else first_of(placed.changed, placed.over))

    async def _running(self, job_id: int, client_name: str) -> OnNode:
        """Where a job is whose command runs. Raises JobStateError."""
        job = await self._launched(job_id, client_name, _FRESH_SECONDS)
        there = await self._where(job_id) if job.state is JobState.RUNNING else None
        if there is None:
            raise JobStateError(f"cannot enter job {job_id}: it is {job.state}")
        return there

    async def _call(self, there: OnNode, method: str, request: Message) -> Any:  # noqa: ANN401  its answer
        """Call the node of a job. Raises what it answers, in our words."""
        try:
            return await self._dial.call(_connected(there).node, method, request, there.job.client_name)
        except PjwError as error:
            raise _told(error, there) from None
        except asyncio.CancelledError:
            if is_cancelled():
                raise
            raise _away(there) from None


class NodeInput:
    """The input of a job on its node, a message at a time: what is under way is bounded."""

    def __init__(self, call: Any, there: OnNode) -> None:  # noqa: ANN401  of grpc.aio, which has no types
        self.offset = 0
        self.ended = False
        self._call: Final = call
        self._there: Final = there

    async def begin(self, first: pb.WriteInputRequest) -> None:
        """Find out how much the node has."""
        await self._ask(first)

    async def write(self, offset: int, data: bytes, *, end: bool = False) -> None:
        """Add bytes, and the end; see `InputWriter.write`."""
        await self._ask(pb.WriteInputRequest(offset=offset, data=data, end=end))

    async def _ask(self, request: pb.WriteInputRequest) -> None:
        try:
            await self._call.write(request.SerializeToString())
            answer = await self._call.read()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            raise await _why(self._call, self._there) from None
        except asyncio.CancelledError:
            if is_cancelled():
                raise
            raise _away(self._there) from None
        if answer is grpc.aio.EOF:
            raise await _why(self._call, self._there)
        response = pb.WriteInputResponse.FromString(answer)
        self.offset, self.ended = response.offset, response.ended


class NodeConnection:
    """A connection to a port within a job on its node. No more is held than a message in each direction."""

    def __init__(self, dial: Dial, there: OnNode) -> None:
        self._dial: Final = dial
        self._there: Final = there

    async def carry(
        self, first: pb.ForwardRequest, requests: AsyncIterator[pb.ForwardRequest], answer: Respond
    ) -> None:
        """Return when both ends have no more to say; see `server.forward.carry`."""
        there = self._there
        call = self._dial.duplex(there.node, "Forward", there.job.client_name)
        begin = pb.ForwardRequest(id=there.node_job_id, port=first.port, data=first.data, end=first.end)
        try:
            # the node ends the call when both ends have no more to say
            await side_by_side(_receive(call, answer), _send(call, begin, requests))
        except grpc.aio.AioRpcError as error:
            raise _told(error_from(error, there.node), there) from None
        except asyncio.CancelledError:
            if is_cancelled():
                raise
            raise _away(there) from None
        finally:
            call.cancel()


async def _when_over(call: Any, tell: Callable[[float], None]) -> None:  # noqa: ANN401  as above
    """Have the writer hear at once when the node ends the call, wherever it waits."""
    # OK is the end of all input, which the last answer tells
    if await call.code() is not grpc.StatusCode.OK:
        tell(asyncio.get_running_loop().time())


async def _send(
    call: Any,  # noqa: ANN401  of grpc.aio, which has no types
    first: pb.ForwardRequest,
    requests: AsyncIterator[pb.ForwardRequest],
) -> None:
    request: pb.ForwardRequest | None = first
    # the call may be over, and then its other direction tells why
    with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        while request is not None:
            await call.write(request.SerializeToString())
            if request.end:
                break
            request = await anext(requests, None)
        await call.done_writing()


async def _receive(call: Any, answer: Respond) -> None:  # noqa: ANN401
    while (message := await call.read()) is not grpc.aio.EOF:
        await answer(pb.ForwardResponse.FromString(message))


def _is_over(job: Job) -> bool:
    return job.state.final


def _connected(there: OnNode) -> OnNode:
    """Return *there*. Raises ServerUnreachableError while its node is away, JobStateError once it is lost."""
    if there.node.session is not None:
        return there
    if there.node.row.is_lost:
        raise JobStateError(f"node {there.node.row.name}, which has job {there.job.id}, is lost")
    raise _away(there)


def _away(there: OnNode) -> ServerUnreachableError:
    return ServerUnreachableError(f"node {there.node.row.name} does not answer now; its jobs go on")


def _told(error: PjwError, there: OnNode) -> PjwError:
    return in_our_words(error, there.node.row.name, there.node_job_id, there.job.id)


async def _why(call: Any, there: OnNode) -> PjwError:  # noqa: ANN401
    """Why a node has ended a call."""
    error = grpc.aio.AioRpcError(
        await call.code(),
        grpc.aio.Metadata(),
        await call.trailing_metadata() or grpc.aio.Metadata(),
        await call.details(),
    )
    # a node that has no more to say, though we have, drains
    return _away(there) if error.code() is grpc.StatusCode.OK else _told(error_from(error, there.node), there)


def is_cancelled() -> bool:
    """Whether the current task is; `Dial.drop` cancels calls to a lost node, and no task."""
    task = asyncio.current_task()
    return task is not None and bool(task.cancelling())
