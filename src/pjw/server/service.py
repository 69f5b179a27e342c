"""JobWorkerService: convert, ask the worker, convert. Every call sees the jobs of `caller.owner` only."""

import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing
from signal import SIGTERM
from typing import Final

import grpc

from pjw.arrays import Element
from pjw.certs.profile import identity_fault
from pjw.errors import InvalidJobError, NotAllowedError
from pjw.model import SUBMITTED_MAX, check_upload
from pjw.rpc.convert import (
    archive_from_message,
    exec_from_message,
    image_config_from_message,
    image_to_message,
    job_to_message,
    logs_response_head,
    queued_from_message,
    quota_to_message,
    sample_to_message,
    session_to_message,
    since_from_message,
    spec_from_message,
    terminal_from_message,
    timed_logs_response,
    workspace_to_message,
)
from pjw.rpc.status import require_known
from pjw.server.authz import Caller
from pjw.server.backend import JobCalls, Written
from pjw.server.forward import carry
from pjw.server.guard import Answer, Guard
from pjw.server.queries import (
    JobWatchers,
    after_token,
    after_workspace,
    filter_from_message,
    token_after,
    token_after_workspace,
)
from pjw.server.usage import UsageWatchers
from pjw.v1 import job_worker_pb2 as pb
from pjw.worker import Part
from pjw.worker.worker import PAGE_MAX

SERVICE_NAME: Final = pb.DESCRIPTOR.services_by_name["JobWorkerService"].full_name
# The longest grace period that makes sense to ask for: a day.
_GRACE_SECONDS_MAX: Final = 86_400
# A call of WriteInput holds a few of these in memory.
_INPUT_CHUNK_BYTES_MAX: Final = 1024**2
_DIGEST_CHARACTERS_MAX: Final = 100


class JobWorkerService:
    """One method for each RPC."""

    def __init__(self, worker: JobCalls) -> None:
        self._worker: Final = worker
        self._watchers: Final = UsageWatchers(worker)
        self._job_watchers: Final = JobWatchers(worker)

    def handlers(self, guard: Guard) -> grpc.GenericRpcHandler:
        """Return the table of all methods, each behind the guard."""
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "Start": guard.unary(self.start, pb.StartRequest),
                "Submit": guard.unary(self.submit, pb.SubmitRequest),
                "Hold": guard.unary(self.hold, pb.HoldRequest),
                "Release": guard.unary(self.release, pb.ReleaseRequest),
                "WriteInput": guard.bidi(self.write_input, pb.WriteInputRequest),
                "Exec": guard.unary(self.exec, pb.ExecRequest),
                "Resize": guard.unary(self.resize, pb.ResizeRequest),
                "Forward": guard.bidi(self.forward, pb.ForwardRequest),
                "Get": guard.unary(self.get, pb.GetRequest),
                "List": guard.unary(self.list, pb.ListRequest),
                "Wait": guard.unary(self.wait, pb.WaitRequest),
                "Stop": guard.unary(self.stop, pb.StopRequest),
                "Logs": guard.stream(self.logs, pb.LogsRequest),
                "Delete": guard.unary(self.delete, pb.DeleteRequest),
                "GetUsageHistory": guard.unary(self.get_usage_history, pb.GetUsageHistoryRequest),
                "GetQuota": guard.unary(self.get_quota, pb.GetQuotaRequest),
                "WatchUsage": guard.stream(self.watch_usage, pb.WatchUsageRequest),
                "WatchJobs": guard.stream(self.watch_jobs, pb.WatchJobsRequest),
                "ListWorkspaces": guard.unary(self.list_workspaces, pb.ListWorkspacesRequest),
                "RemoveWorkspace": guard.unary(self.remove_workspace, pb.RemoveWorkspaceRequest),
                "LoadImage": guard.unary(self.load_image, pb.LoadImageRequest),
                "ListImages": guard.unary(self.list_images, pb.ListImagesRequest),
                "RemoveImage": guard.unary(self.remove_image, pb.RemoveImageRequest),
            },
        )

    async def start(self, request: pb.StartRequest, caller: Caller) -> pb.StartResponse:
        """Start a job for the caller."""
        require_known(request)
        job = await self._worker.start(spec_from_message(request), caller.client_name)
        return pb.StartResponse(job=job_to_message(job))

    async def submit(self, request: pb.SubmitRequest, caller: Caller) -> pb.SubmitResponse:
        """Put jobs of the caller into the queue."""
        require_known(request)
        if not 1 <= len(request.jobs) <= SUBMITTED_MAX:
            raise InvalidJobError(
                f"from 1 to {SUBMITTED_MAX} jobs are put into the queue at once, not {len(request.jobs)}"
            )
        specs = [queued_from_message(job) for job in request.jobs]
        jobs = await self._worker.submit(specs, caller.client_name)
        return pb.SubmitResponse(jobs=[job_to_message(job) for job in jobs])

    async def hold(self, request: pb.HoldRequest, caller: Caller) -> pb.HoldResponse:
        """Keep a job of the caller in the queue."""
        return pb.HoldResponse(job=job_to_message(await self._worker.hold(_job_of(request), caller.owner)))

    async def release(self, request: pb.ReleaseRequest, caller: Caller) -> pb.ReleaseResponse:
        """Let a job of the caller be started that was held."""
        return pb.ReleaseResponse(
            job=job_to_message(await self._worker.release(_job_of(request), caller.owner))
        )

    async def write_input(
        self,
        requests: AsyncIterator[pb.WriteInputRequest],
        caller: Caller,
        answer: Answer[pb.WriteInputResponse],
    ) -> None:
        """Take the input of a job of the caller; answer how much there is, first and after each request."""
        first = await anext(requests, None)
        if first is None:
            raise InvalidJobError("the first message of WriteInput must say which job")
        async with self._written(first, caller) as writer:
            await answer(pb.WriteInputResponse(offset=writer.offset, ended=writer.ended))
            await self._write(writer, first, answer)
            while not writer.ended and (request := await anext(requests, None)) is not None:
                await self._write(writer, request, answer)

    def _written(self, first: pb.WriteInputRequest, caller: Caller) -> AbstractAsyncContextManager[Written]:
        if not first.upload:
            return self._worker.write_input(first.id, caller.owner, first.session)
        if first.id or first.session:
            raise InvalidJobError("an upload is of no job yet: give no id with it")
        return self._worker.write_upload(first.upload, caller.client_name)

    @staticmethod
    async def _write(
        writer: Written,
        request: pb.WriteInputRequest,
        answer: Answer[pb.WriteInputResponse],
    ) -> None:
        if len(request.data) > _INPUT_CHUNK_BYTES_MAX:
            raise InvalidJobError(f"a message of input has at most {_INPUT_CHUNK_BYTES_MAX} bytes")
        if not request.data and not request.end:
            return
        await writer.write(request.offset, request.data, end=request.end)
        await answer(pb.WriteInputResponse(offset=writer.offset, ended=writer.ended))

    async def exec(self, request: pb.ExecRequest, caller: Caller) -> pb.ExecResponse:
        """Start another command in a job of the caller, or pack or unpack files there."""
        require_known(request)
        if request.HasField("archive"):
            archive = archive_from_message(request.archive)
            session = await self._worker.archive(
                request.id, archive, caller.client_name, request_id=request.request_id
            )
            return pb.ExecResponse(session=session_to_message(session))
        spec = exec_from_message(request)
        session = await self._worker.exec(request.id, spec, caller.client_name, detached=request.detach)
        return pb.ExecResponse(session=session_to_message(session))

    async def resize(self, request: pb.ResizeRequest, caller: Caller) -> pb.ResizeResponse:
        """Give a terminal of the caller's another size."""
        size = terminal_from_message(request.terminal)
        await self._worker.resize(request.id, size, caller.owner, request.session)
        return pb.ResizeResponse()

    async def forward(
        self,
        requests: AsyncIterator[pb.ForwardRequest],
        caller: Caller,
        answer: Answer[pb.ForwardResponse],
    ) -> None:
        """Carry a connection to a port within a job of the caller."""
        first = await anext(requests, None)
        if first is None:
            raise InvalidJobError("the first message of Forward must say which job")
        connection = await self._worker.connect(first.id, first.port, caller.client_name)
        if not isinstance(connection, socket.socket):
            await connection.carry(first, requests, answer)
            return
        with connection:
            await carry(connection, first, requests, answer)

    async def get(self, request: pb.GetRequest, caller: Caller) -> pb.GetResponse:
        """Show a job of the caller."""
        return pb.GetResponse(
            job=job_to_message(await self._worker.get_with_usage(_job_of(request), caller.owner))
        )

    async def list(self, request: pb.ListRequest, caller: Caller) -> pb.ListResponse:
        """Show a page of the caller's jobs."""
        count = request.page_size if 0 < request.page_size < PAGE_MAX else PAGE_MAX
        wanted = filter_from_message(request)
        after = after_token(request)
        page = await self._worker.page(caller.owner, after, count, wanted, newest_first=request.newest_first)
        token = token_after(request, page.next_after) if page.next_after is not None else ""
        return pb.ListResponse(jobs=[job_to_message(job) for job in page.jobs], next_page_token=token)

    async def wait(self, request: pb.WaitRequest, caller: Caller) -> pb.WaitResponse:
        """Answer when a job of the caller has ended, or does not when it should; or when a session has."""
        if request.session:
            owner = _owner_of_session(caller)
            session = await self._worker.wait_session(request.id, request.session, owner)
            return pb.WaitResponse(session=session_to_message(session))
        job = await self._worker.wait(_job_of(request), caller.owner, or_stuck=request.or_stuck)
        return pb.WaitResponse(job=job_to_message(job))

    async def stop(self, request: pb.StopRequest, caller: Caller) -> pb.StopResponse:
        """Stop a job of the caller, or a session."""
        if request.session:
            owner = _owner_of_session(caller)
            session = await self._worker.stop_session(request.id, request.session, owner)
            return pb.StopResponse(session=session_to_message(session))
        grace_seconds = None
        if request.HasField("grace"):
            grace_seconds = request.grace.seconds + request.grace.nanos / 1e9
            if not 0 <= grace_seconds <= _GRACE_SECONDS_MAX:
                raise InvalidJobError(f"the grace period must be from 0 to {_GRACE_SECONDS_MAX} seconds")
        job = await self._worker.stop(
            _job_of(request), grace_seconds, caller.owner, request.signal or SIGTERM
        )
        return pb.StopResponse(job=job_to_message(job))

    async def logs(
        self, request: pb.LogsRequest, caller: Caller
    ) -> AsyncGenerator[bytes | pb.LogsResponse, None]:
        """Stream the output of a job of the caller, most of it in messages that are serialized already."""
        if request.stream not in (pb.OUTPUT_STREAM_UNSPECIFIED, pb.OUTPUT_STREAM_STDERR):
            raise InvalidJobError(f"no stream of output has the number {request.stream}")
        part = Part(
            offset=request.offset,
            stderr=request.stream == pb.OUTPUT_STREAM_STDERR,
            follow=not request.no_follow,
            tail_lines=request.tail_lines if request.HasField("tail_lines") else None,
            since_ns=since_from_message(request),
            session=request.session,
            artifacts=request.artifacts,
        )
        owner = _owner_of_session(caller) if request.session else caller.owner
        reading = await self._worker.read_logs(_job_of(request), part, owner)
        if part.is_sought:
            # at once: the job may be silent, and the connection lost before it says the next word
            yield pb.LogsResponse(offset=reading.offset)
        if request.timestamps:
            async with aclosing(reading.timed()) as timed:
                async for data, time in timed:
                    yield timed_logs_response(data, time)
            return
        async with aclosing(reading.chunks(logs_response_head)) as messages:
            async for message in messages:
                yield message

    async def delete(self, request: pb.DeleteRequest, caller: Caller) -> pb.DeleteResponse:
        """Forget an ended job of the caller."""
        await self._worker.delete(_job_of(request), caller.owner)
        return pb.DeleteResponse()

    async def get_usage_history(
        self, request: pb.GetUsageHistoryRequest, caller: Caller
    ) -> pb.GetUsageHistoryResponse:
        """Show the usage of a job of the caller over its life."""
        job, samples = await self._worker.usage_history(request.id, caller.owner)
        return pb.GetUsageHistoryResponse(
            job=job_to_message(job), samples=[sample_to_message(sample) for sample in samples]
        )

    async def get_quota(self, request: pb.GetQuotaRequest, caller: Caller) -> pb.GetQuotaResponse:
        """Show the limits, use and share of the caller, or of another client."""
        client_name = request.client_name or caller.client_name
        if caller.owner not in (None, client_name):
            raise NotAllowedError(
                f"{caller.client_name} may not see the quota of another client",
                hint="a viewer or an admin asks for it on the jobs of every client: pjw --all quota CLIENT",
            )
        if fault := identity_fault(client_name):
            raise InvalidJobError(fault)
        return quota_to_message(await self._worker.quota(client_name))

    async def watch_usage(
        self, request: pb.WatchUsageRequest, caller: Caller
    ) -> AsyncGenerator[pb.WatchUsageResponse, None]:
        """Stream the usage of the caller's jobs that have not ended."""
        async with aclosing(self._watchers.watch(request, caller.owner)) as snapshots:
            async for snapshot in snapshots:
                yield snapshot

    async def watch_jobs(
        self, request: pb.WatchJobsRequest, caller: Caller
    ) -> AsyncGenerator[pb.WatchJobsResponse, None]:
        """Stream changes of the states of the caller's jobs."""
        async with aclosing(self._job_watchers.watch(request, caller.owner)) as responses:
            async for response in responses:
                yield response

    async def list_workspaces(
        self, request: pb.ListWorkspacesRequest, caller: Caller
    ) -> pb.ListWorkspacesResponse:
        """Show a page of the caller's workspaces."""
        found = await self._worker.workspaces(caller.owner, after_workspace(request), PAGE_MAX)
        token = token_after_workspace(found[-1]) if len(found) == PAGE_MAX else ""
        return pb.ListWorkspacesResponse(workspaces=map(workspace_to_message, found), next_page_token=token)

    async def remove_workspace(
        self, request: pb.RemoveWorkspaceRequest, caller: Caller
    ) -> pb.RemoveWorkspaceResponse:
        """Remove a workspace of the caller."""
        await self._worker.remove_workspace(request.name, caller.client_name)
        return pb.RemoveWorkspaceResponse()

    async def load_image(self, request: pb.LoadImageRequest, caller: Caller) -> pb.LoadImageResponse:
        """Make an image of the caller's own."""
        require_known(request)
        check_upload(request.upload)
        if len(request.digest) > _DIGEST_CHARACTERS_MAX or not request.digest.isprintable():
            raise InvalidJobError("the digest of an image is short and printable")
        config = image_config_from_message(request.config)
        image = await self._worker.load_image(
            request.name, request.upload, config, request.digest, caller.client_name
        )
        return pb.LoadImageResponse(image=image_to_message(image))

    async def list_images(self, request: pb.ListImagesRequest, caller: Caller) -> pb.ListImagesResponse:
        """Show the images that the caller's jobs can have."""
        return pb.ListImagesResponse(images=map(image_to_message, await self._worker.images(caller.owner)))

    async def remove_image(self, request: pb.RemoveImageRequest, caller: Caller) -> pb.RemoveImageResponse:
        """Remove an image of the caller."""
        await self._worker.remove_image(request.name, caller.client_name)
        return pb.RemoveImageResponse()


_OfAJob = (
    pb.HoldRequest
    | pb.ReleaseRequest
    | pb.GetRequest
    | pb.WaitRequest
    | pb.StopRequest
    | pb.LogsRequest
    | pb.DeleteRequest
)


def _job_of(request: _OfAJob) -> int | Element:
    """Return the job of a request, or the element of an array."""
    return Element(request.id, request.element) if request.HasField("element") else request.id


def _owner_of_session(caller: Caller) -> str:
    """Return the owner whose sessions a call may see: its typing is private, whatever a caller's role."""
    if caller.owner is None:
        raise NotAllowedError("a session is its owner's alone", hint="ask without all_clients (pjw --all)")
    return caller.owner
