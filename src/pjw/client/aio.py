"""The client for asyncio: `AsyncClient`."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from types import TracebackType
from typing import Any, Self, TypeVar

from pjw.client.channel import Options  # isort: skip  it sets how gRPC is imported

import grpc.aio

from pjw.client import requests
from pjw.client.async_upload import AsyncUpload
from pjw.client.base import BaseClient
from pjw.client.retry import CALLS_AT_ONCE, STOPS_AT_ONCE, WAITS_AT_ONCE, Trouble
from pjw.errors import JobNotFoundError, JobStateError, PjwError
from pjw.model import ClientQuota, Job, JobState
from pjw.rpc.status import ADMITTED_KEY
from pjw.v1.job_worker_pb2_grpc import JobWorkerServiceStub

T = TypeVar("T")


class AsyncClient(BaseClient):
    """`Client` for asyncio: the same calls, awaited; what streams is an asynchronous generator."""

    def _connect(self, target: str, credentials: grpc.ChannelCredentials, options: Options) -> None:
        self._channel = grpc.aio.secure_channel(target, credentials, options)
        self._stub: Any = JobWorkerServiceStub(self._channel)
        self._calls = asyncio.Semaphore(CALLS_AT_ONCE)
        self._long = {
            "Wait": asyncio.Semaphore(WAITS_AT_ONCE),
            "Stop": asyncio.Semaphore(STOPS_AT_ONCE),
        }

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connection, and every call that is under way."""
        self._link.closed.set()
        await self._channel.close()

    async def start(self, spec: requests.Startable) -> Job:
        """Start a job. However often the connection is lost meanwhile, it starts once.

        A command alone is a spec without anything else. Raises LaunchError when it cannot be executed.
        """
        return await self._call(requests.start(spec))

    async def run(self, spec: requests.Startable, *, input: bytes | None = None) -> requests.Finished:  # noqa: A002
        """Start a job, send its *input* and wait for its end: the job, with all of its output in memory.

        As with subprocess.run(), whatever ends this call early (Ctrl-C, a lost connection) kills the job. An
        exit code other than 0 is no error: see `job.exit_status`.
        """
        job = await self.start(requests.with_input(spec, input))
        try:
            if input is not None:
                with suppress(JobStateError):
                    await self.write_input(job.id, _once(input))
            output = b"".join([data async for data in self.logs(job.id)])
            stderr = b""
            if job.split_stderr:
                stderr = b"".join([data async for data in self.logs(job.id, stderr=True)])
            return requests.Finished(await self.wait(job.id), output, stderr)
        except BaseException:
            with suppress(PjwError):
                await self.stop(job.id, grace=0)
            raise

    async def get(self, job_id: requests.JobId) -> Job:
        """One job, by its id, which is a number or text."""
        return await self._call(requests.get(job_id, all_clients=self._all_clients))

    async def find(self, name: str) -> Job:
        """The newest job of that name. Raises JobNotFoundError."""
        async for job in self.list(name=name, newest_first=True, limit=1):
            return job
        raise JobNotFoundError(name)

    async def list(
        self,
        *,
        states: Iterable[JobState | str] = (),
        labels: Mapping[str, str] | None = None,
        name: str = "",
        newest_first: bool = False,
        limit: int | None = None,
    ) -> AsyncGenerator[Job, None]:
        """The jobs in one of these states, with all of these labels, of that name, in order of their ids."""
        pages = requests.Pages(
            states, labels, name, limit, newest_first=newest_first, all_clients=self._all_clients
        )
        while call := pages.next:
            for job in await self._call(call):
                yield job

    async def wait(self, job_id: requests.JobId, *, or_stuck: bool = False) -> Job:
        """One job when it has ended, however long that takes.

        With *or_stuck* it also returns when the job cannot go on: the job was killed and does not end, or it
        waits for the disk. `detail` says which.
        """
        return await self._call(requests.wait(job_id, or_stuck=or_stuck, all_clients=self._all_clients))

    async def stop(self, job_id: requests.JobId, *, grace: float | None = None, signal: int = 0) -> Job:
        """Stop a job; its final state. After *grace* seconds (the server's default: 10) it is killed.

        It is sent *signal* instead of SIGTERM.
        """
        return await self._call(requests.stop(job_id, grace, signal, all_clients=self._all_clients))

    async def delete(self, job_id: requests.JobId) -> None:
        """Forget an ended job, with its output. Raises JobStateError when it has not ended."""
        await self._call(requests.delete(job_id, all_clients=self._all_clients))

    def logs(
        self,
        job_id: requests.JobId,
        offset: int = 0,
        *,
        follow: bool = True,
        tail: int | None = None,
        since: datetime | None = None,
        stderr: bool = False,
    ) -> AsyncGenerator[bytes, None]:
        """The output from *offset* on, or its last *tail* lines; to the end of the job, or of what is there.

        With *since* it begins with the output of that time; a time without a time zone is local.

        A lost connection is made again, and the stream goes on at the exact byte. With *stderr*, that of a
        job that keeps it apart.
        """
        position = requests.LogsPosition(
            job_id, offset, tail, since, follow=follow, stderr=stderr, all_clients=self._all_clients
        )
        return self._stream(position, position.take)

    def timed_logs(
        self,
        job_id: requests.JobId,
        offset: int = 0,
        *,
        follow: bool = True,
        tail: int | None = None,
        since: datetime | None = None,
        stderr: bool = False,
    ) -> AsyncGenerator[requests.TimedOutput, None]:
        """As `logs`, each piece with the time at which the job wrote it."""
        position = requests.LogsPosition(
            job_id,
            offset,
            tail,
            since,
            follow=follow,
            stderr=stderr,
            timestamps=True,
            all_clients=self._all_clients,
        )
        return self._stream(position, position.take_timed)

    async def write_input(
        self, job_id: requests.JobId, data: AsyncIterable[bytes], seen: Callable[[int], None] | None = None
    ) -> int:
        """As `Client.write_input`, from an asynchronous iterable."""
        upload = AsyncUpload(job_id)
        trouble = Trouble(self._link, upload.outgoing)

        async def send_all() -> None:
            while not await self._send(upload, trouble, seen):
                pass

        giving, sending = (asyncio.ensure_future(work) for work in (upload.give_all(data), send_all()))
        try:
            await asyncio.wait({giving, sending}, return_when=asyncio.FIRST_COMPLETED)
            if giving.done():
                giving.result()
            await sending
        finally:
            # a source that waits for what nobody wants any more; a call whose source has failed
            for work in (giving, sending):
                work.cancel()
            await asyncio.wait({giving, sending})
        return upload.outgoing.acknowledged

    async def usage_history(self, job_id: requests.JobId) -> requests.UsageHistory:
        """What a job used over its life, in a bounded number of samples."""
        return await self._call(requests.usage_history(job_id, all_clients=self._all_clients))

    async def quota(self, client_name: str = "") -> ClientQuota:
        """The limits of this client, what its jobs use now, and its share of the machine.

        With *client_name* those of another client: this takes *all_clients*, and a role for it.
        """
        return await self._call(requests.quota(client_name, all_clients=self._all_clients))

    def watch_usage(self, interval: float | None = None) -> AsyncGenerator[requests.UsageSnapshot, None]:
        """What all running jobs use, every *interval* seconds (the server's default: 2), without end."""
        watch = requests.UsageWatch(interval, all_clients=self._all_clients)
        return self._stream(watch, watch.take)

    async def _call(self, call: requests.Call[T]) -> T:
        async with self._long.get(call.method, self._calls):
            return await self._call_now(call)

    async def _call_now(self, call: requests.Call[T]) -> T:
        trouble = Trouble(self._link, call, outlasts_restart=call.outlasts_restart)
        if self._link.closed.is_set():
            raise trouble.closed()
        while True:
            try:
                answer = await getattr(self._stub, call.method)(call.request, timeout=call.timeout)
            except grpc.RpcError as error:
                if trouble.is_done(error):
                    return call.result(None)
                await self._pause(trouble, error)
            else:
                trouble.is_over()
                return call.result(answer)

    async def _stream(
        self, stream: requests.Stream, take: Callable[[Any], T | None]
    ) -> AsyncGenerator[T, None]:
        trouble = Trouble(self._link, stream)
        while True:
            call = getattr(self._stub, stream.method)(stream.request)
            try:
                if ADMITTED_KEY in await call.initial_metadata():
                    trouble.is_over()
                async for answer in call:
                    if (taken := take(answer)) is not None:
                        yield taken
                return
            except grpc.RpcError as error:
                failure = error
            finally:
                call.cancel()
            await self._pause(trouble, failure)

    async def _send(self, upload: AsyncUpload, trouble: Trouble, seen: Callable[[int], None] | None) -> bool:
        """Send on one connection; whether that was all."""
        call = self._stub.WriteInput(upload.requests())
        try:
            async for answer in call:
                trouble.is_over()
                await upload.acknowledge(answer)
                if seen is not None:
                    seen(answer.offset)
                if answer.ended:
                    return True
            return True
        except grpc.RpcError as error:
            failure = error
        finally:
            call.cancel()
            await upload.disconnect()
        await self._pause(trouble, failure)
        return False

    async def _pause(self, trouble: Trouble, error: grpc.RpcError) -> None:
        # in a thread: to find out what is wrong with a connection, this may read files or connect by itself
        await asyncio.sleep(await asyncio.to_thread(trouble.after, error))
        if self._link.closed.is_set():
            raise trouble.closed()


async def _once(data: bytes) -> AsyncGenerator[bytes, None]:
    yield data
