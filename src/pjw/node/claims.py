"""The work of a node for its gateway: it claims jobs, starts them, reports their ends, and ends lost ones.

The node writes a job's row, with the gateway's uuid in its request id, before it starts the process. So the
table answers for every claim, whatever was killed in between: a job without a row was never started, and
never will be.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Final

import grpc

from pjw.cluster.v1 import cluster_pb2 as pb
from pjw.errors import (
    JobNotFoundError,
    JobStateError,
    KernelError,
    LimitReachedError,
    PjwError,
    ServerFailedError,
    ServerUnreachableError,
)
from pjw.model import Job
from pjw.node import cluster_rows
from pjw.node.holds import Holds
from pjw.rpc.convert import job_to_message, spec_from_message
from pjw.rpc.status import error_of
from pjw.worker import Worker
from pjw.worker.store import JobStore
from pjw.worker.tasks import Background

# Makes a claim at the gateway; raises AioRpcError.
Claim = Callable[[pb.ClaimRequest], Awaitable[pb.ClaimResponse]]

log: Final = logging.getLogger(__name__)
# Calls FetchUpload; grpc.aio has no types.
Fetch = Callable[[pb.FetchUploadRequest], Any]


class Said:
    """The messages of a node in one session, in their order."""

    def __init__(self, session: str, fetch: Fetch) -> None:
        self.session: Final = session
        # gets the files of jobs that were claimed in the session
        self.fetch: Final = fetch
        self._waiting: Final[deque[pb.SessionRequest]] = deque()
        self._woken: Final = asyncio.Event()
        self._closed = False

    def say(self, message: pb.SessionRequest) -> None:
        """Say something; does nothing when the session is over."""
        if not self._closed:
            self._waiting.append(message)
            self._woken.set()

    def close(self) -> None:
        """Note that the session is over."""
        self._closed = True
        self._woken.set()

    async def messages(self, hello: pb.SessionRequest) -> AsyncGenerator[pb.SessionRequest, None]:
        """All messages, behind *hello*."""
        yield hello
        while not self._closed:
            while self._waiting:
                yield self._waiting.popleft()
            self._woken.clear()
            if not self._closed:
                await self._woken.wait()


class Jobs:
    """The jobs of the gateway on this node."""

    def __init__(self, worker: Worker, store: JobStore, holds: Holds | None = None) -> None:
        """Begin without jobs; *holds*: places that an engine gives to the gateway here, if any."""
        self._worker: Final = worker
        self._store: Final = store
        self._holds: Final = holds
        if holds is not None:
            holds.stop_job = self.take_back
        self._background: Final = Background()
        # claims that have begun, and that may or may not have a row yet
        self._claims: Final[dict[str, asyncio.Task[None]]] = {}
        # ends that we told in this session, and that the gateway has not acknowledged yet
        self._told: Final[set[str]] = set()
        self._ended: Final = asyncio.Event()
        worker.on_end(lambda _: self._ended.set())

    async def close(self) -> None:
        """Let go of everything; jobs go on."""
        for task in self._claims.values():
            task.cancel()
        await asyncio.gather(*self._claims.values(), return_exceptions=True)
        await self._background.close()

    def session_ended(self) -> None:
        """Have the next session tell the unacknowledged ends again."""
        self._told.clear()
        self._ended.set()

    def hear(self, response: pb.SessionResponse, claim: Claim, said: Said) -> None:
        """Do what the gateway says."""
        match response.WhichOneof("message"):
            case "assign":
                self._assigned(response.assign, claim, said)
            case "release":
                if self._holds is not None:
                    self._holds.release(response.release.hold, response.release.refused)
            case "ask":
                for uuid in response.ask.uuids:
                    self._background.spawn(self._answer(uuid, said))
            case "fence":
                self._background.spawn(self._fence(response.fence.uuid, said))
            case "ack":
                self._background.spawn(self._acknowledged(response.ack.uuid))
            case _:
                # a heartbeat; or a message that only a newer gateway sends, and on which it does not rely
                pass

    # --- claims

    def _assigned(self, assign: pb.Assign, claim: Claim, said: Said) -> None:
        uuid, hold = assign.uuid, assign.hold
        if uuid in self._claims:
            return
        if hold and (self._holds is None or not self._holds.give(hold, uuid)):
            # the place has gone; the gateway hears so, and finds another one
            return
        task = asyncio.ensure_future(self._claim(uuid, hold, claim, said))
        self._claims[uuid] = task
        task.add_done_callback(partial(self._claim_over, uuid))

    def _claim_over(self, uuid: str, task: asyncio.Task[None]) -> None:
        del self._claims[uuid]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a claim failed", exc_info=error)

    async def _claim(self, uuid: str, hold: str, claim: Claim, said: Said) -> None:
        try:
            granted = await claim(pb.ClaimRequest(session=said.session, uuid=uuid, hold=hold))
        except grpc.aio.AioRpcError as error:
            # Granted or not, we do not start the job: the gateway asks about it in the next session.
            log.info("job %s was not claimed: %s", uuid, error.details())
            return
        try:
            job = await self._start(uuid, granted, said)
        except ServerUnreachableError:
            # The launcher has gone, and may have started the job: the next pjwd knows. Or the gateway has
            # gone with the job's files: it asks about the job in the next session.
            return
        except PjwError as error:
            again = isinstance(error, LimitReachedError | KernelError | ServerFailedError)
            if again:
                log.warning("cannot start job %s of the gateway now: %s", uuid, error)
            said.say(pb.SessionRequest(failed=pb.Failed(uuid=uuid, detail=str(error), again=again)))
            return
        said.say(_started(uuid, job))

    async def _start(self, uuid: str, granted: pb.ClaimResponse, said: Said) -> Job:
        name, number = granted.client_name, granted.client_number
        if fault := await self._store.transact(cluster_rows.number_client, name, number):
            log.error("this node serves no jobs of %s: %s", name, fault)
            raise LimitReachedError(f"the node cannot give {name} its user id: {fault}")
        spec = replace(spec_from_message(granted.start), request_id=cluster_rows.request_id_of(uuid))
        if spec.upload:
            spec = replace(spec, upload=await bring(self._worker, said.fetch, said.session, uuid, name))
        return await self._worker.start(spec, name)

    # --- questions of the gateway, and news for it

    async def _answer(self, uuid: str, said: Said) -> None:
        """Tell the state of a job that was claimed in an earlier session."""
        if (claim := self._claims.get(uuid)) is not None:
            # a claim in flight may have a row in a moment: wait for its end
            await asyncio.wait({claim})
        job = await self._find(uuid)
        if job is None:
            said.say(pb.SessionRequest(unknown=pb.Unknown(uuid=uuid)))
        elif job.state.final:
            self._told.add(uuid)
            said.say(_ended(uuid, job))
        else:
            said.say(_started(uuid, job))

    async def _find(self, uuid: str) -> Job | None:
        job = await self._store.transact(cluster_rows.find, uuid)
        if job is None or job.state.final:
            return job
        try:
            return await self._worker.get(job.id)
        except JobNotFoundError:
            return None

    async def tell_ends(self, said: Said) -> None:
        """Tell of each end that the gateway has not acknowledged, for as long as the session lasts."""
        while True:
            self._ended.clear()
            for uuid, job in await self._store.transact(cluster_rows.ends_to_tell, tuple(self._told)):
                self._told.add(uuid)
                said.say(_ended(uuid, job))
            await self._ended.wait()

    async def _acknowledged(self, uuid: str) -> None:
        await self._store.transact(cluster_rows.told, uuid)
        self._told.discard(uuid)
        self._worker.end_was_told()
        # there may be more ends than we tell at a time
        self._ended.set()

    async def _fence(self, uuid: str, said: Said) -> None:
        """End a job that is lost for the gateway; the node tells its end as any other."""
        if (claim := self._claims.get(uuid)) is not None:
            await asyncio.wait({claim})
        job = await self._find(uuid)
        if job is not None and not job.state.final:
            log.warning("job %d is ended: the gateway has told it to be lost", job.id)
            await self._worker.stop(job.id, 0)
        elif job is not None:
            await self._tell_again(uuid)
        else:
            said.say(pb.SessionRequest(unknown=pb.Unknown(uuid=uuid)))

    async def take_back(self, uuid: str) -> None:
        """Stop a job whose place is another's now, or soon, and wait for its end; the node tells that end."""
        if (claim := self._claims.get(uuid)) is not None:
            await asyncio.wait({claim})
        job = await self._find(uuid)
        if job is not None and not job.state.final:
            log.warning("job %d is stopped: Slurm takes its place back", job.id)
            with suppress(JobStateError, JobNotFoundError):
                # the kernel cannot end it now, and does so later; or it has just ended
                await self._worker.stop(job.id)

    async def _tell_again(self, uuid: str) -> None:
        # the gateway may have acknowledged the end before it took the job for lost
        self._told.discard(uuid)
        await self._store.transact(cluster_rows.tell_again, uuid)
        self._ended.set()


def _started(uuid: str, job: Job) -> pb.SessionRequest:
    return pb.SessionRequest(started=pb.Started(uuid=uuid, job=job_to_message(job)))


def _ended(uuid: str, job: Job) -> pb.SessionRequest:
    return pb.SessionRequest(ended=pb.Ended(uuid=uuid, job=job_to_message(job)))


# Brings the files that were sent with a job from the gateway to its node, before the job starts.
#
# On the node they are an upload as any other: it goes with the start of its job, or a while after it came.


_GONE: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)


async def bring(worker: Worker, fetch: Fetch, session: str, uuid: str, client_name: str) -> str:
    """Bring an upload here, and return its name on this node.

    What an earlier attempt has brought is passed over. Raises ServerUnreachableError when the gateway goes,
    CopyError when it has no such files, and what `Worker.write_upload` raises.
    """
    call = fetch(pb.FetchUploadRequest(session=session, uuid=uuid))
    try:
        async with worker.write_upload(uuid, client_name) as writer:
            offset = 0
            async for piece in call:
                await writer.write(offset, piece.data)
                offset += len(piece.data)
            await writer.write(offset, b"", end=True)
    except grpc.aio.AioRpcError as error:
        if error.code() in _GONE:
            raise ServerUnreachableError(f"the gateway does not send the files of job {uuid} now") from None
        metadata = {key: value for key, value in error.trailing_metadata() or () if isinstance(value, str)}
        raise error_of(error.code(), error.details() or "", metadata, {}) from None
    finally:
        call.cancel()
    return uuid
