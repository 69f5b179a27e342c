"""JobWorkerService: convert, ask the worker, convert. Every call sees the jobs of `caller.owner` only."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from signal import SIGTERM
from typing import Final

import grpc

from pjw.certs.profile import identity_fault
from pjw.errors import InvalidJobError, NotAllowedError
from pjw.rpc.convert import (
    job_to_message,
    logs_response_head,
    quota_to_message,
    sample_to_message,
    since_from_message,
    spec_from_message,
    timed_logs_response,
)
from pjw.server.authz import Caller
from pjw.server.guard import Answer, Guard
from pjw.server.paging import after_token, filter_from_message, token_after
from pjw.server.usage import UsageWatchers
from pjw.v1 import job_worker_pb2 as pb
from pjw.worker import Part, Worker
from pjw.worker.input import InputWriter
from pjw.worker.worker import PAGE_MAX

SERVICE_NAME: Final = pb.DESCRIPTOR.services_by_name["JobWorkerService"].full_name
# The longest grace period that makes sense to ask for: a day.
_GRACE_SECONDS_MAX: Final = 86_400
# What a call of WriteInput holds in memory is a few of them.
_INPUT_CHUNK_BYTES_MAX: Final = 1024**2


class JobWorkerService:
    """One method for each RPC."""

    def __init__(self, worker: Worker) -> None:
        self._worker: Final = worker
        self._watchers: Final = UsageWatchers(worker)

    def handlers(self, guard: Guard) -> grpc.GenericRpcHandler:
        """The table of all methods, each behind the guard."""
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "Start": guard.unary(self.start, pb.StartRequest),
                "WriteInput": guard.bidi(self.write_input, pb.WriteInputRequest),
                "Get": guard.unary(self.get, pb.GetRequest),
                "List": guard.unary(self.list, pb.ListRequest),
                "Wait": guard.unary(self.wait, pb.WaitRequest),
                "Stop": guard.unary(self.stop, pb.StopRequest),
                "Logs": guard.stream(self.logs, pb.LogsRequest),
                "Delete": guard.unary(self.delete, pb.DeleteRequest),
                "GetUsageHistory": guard.unary(self.get_usage_history, pb.GetUsageHistoryRequest),
                "GetQuota": guard.unary(self.get_quota, pb.GetQuotaRequest),
                "WatchUsage": guard.stream(self.watch_usage, pb.WatchUsageRequest),
            },
        )

    async def start(self, request: pb.StartRequest, caller: Caller) -> pb.StartResponse:
        """Start a job for the caller."""
        job = await self._worker.start(spec_from_message(request), caller.client_name)
        return pb.StartResponse(job=job_to_message(job))

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
        async with self._worker.write_input(first.id, caller.owner) as writer:
            await answer(pb.WriteInputResponse(offset=writer.offset, ended=writer.ended))
            await self._write(writer, first, answer)
            while not writer.ended and (request := await anext(requests, None)) is not None:
                await self._write(writer, request, answer)

    @staticmethod
    async def _write(
        writer: InputWriter,
        request: pb.WriteInputRequest,
        answer: Answer[pb.WriteInputResponse],
    ) -> None:
        if len(request.data) > _INPUT_CHUNK_BYTES_MAX:
            raise InvalidJobError(f"a message of input has at most {_INPUT_CHUNK_BYTES_MAX} bytes")
        if not request.data and not request.end:
            return
        await writer.write(request.offset, request.data, end=request.end)
        await answer(pb.WriteInputResponse(offset=writer.offset, ended=writer.ended))

    async def get(self, request: pb.GetRequest, caller: Caller) -> pb.GetResponse:
        """Show a job of the caller."""
        return pb.GetResponse(job=job_to_message(await self._worker.get_with_usage(request.id, caller.owner)))

    async def list(self, request: pb.ListRequest, caller: Caller) -> pb.ListResponse:
        """Show a page of the caller's jobs."""
        count = request.page_size if 0 < request.page_size < PAGE_MAX else PAGE_MAX
        wanted = filter_from_message(request)
        after = after_token(request)
        page = await self._worker.page(caller.owner, after, count, wanted, newest_first=request.newest_first)
        token = token_after(request, page.next_after) if page.next_after is not None else ""
        return pb.ListResponse(jobs=[job_to_message(job) for job in page.jobs], next_page_token=token)

    async def wait(self, request: pb.WaitRequest, caller: Caller) -> pb.WaitResponse:
        """Answer when a job of the caller has ended, or does not when it should."""
        job = await self._worker.wait(request.id, caller.owner, or_stuck=request.or_stuck)
        return pb.WaitResponse(job=job_to_message(job))

    async def stop(self, request: pb.StopRequest, caller: Caller) -> pb.StopResponse:
        """Stop a job of the caller."""
        grace_seconds = None
        if request.HasField("grace"):
            grace_seconds = request.grace.seconds + request.grace.nanos / 1e9
            if not 0 <= grace_seconds <= _GRACE_SECONDS_MAX:
                raise InvalidJobError(f"the grace period must be from 0 to {_GRACE_SECONDS_MAX} seconds")
        job = await self._worker.stop(request.id, grace_seconds, caller.owner, request.signal or SIGTERM)
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
        )
        reading = await self._worker.read_logs(request.id, part, caller.owner)
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
        await self._worker.delete(request.id, caller.owner)
        return pb.DeleteResponse()

    async def get_usage_history(
        self, request: pb.GetUsageHistoryRequest, caller: Caller
    ) -> pb.GetUsageHistoryResponse:
        """Show what a job of the caller used over its life."""
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
        """Stream what the caller's jobs use that have not ended."""
        async with aclosing(self._watchers.watch(request, caller.owner)) as snapshots:
            async for snapshot in snapshots:
                yield snapshot
