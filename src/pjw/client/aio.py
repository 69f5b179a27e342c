"""The client for asyncio: `AsyncClient`."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from pjw.client.channel import Options  # isort: skip  it sets how gRPC is imported

import grpc.aio

from pjw.client import requests
from pjw.client.base import BaseClient, documented_by
from pjw.client.input import AsyncUpload
from pjw.client.retry import CALLS_AT_ONCE, STOPS_AT_ONCE, WAITS_AT_ONCE, RetryState, error_from
from pjw.client.sync import Client
from pjw.errors import JobNotFoundError, JobStateError, PjwError, ServerUnreachableError
from pjw.model import Archive, ClientQuota, Job, JobState, Session, TerminalSize, base_of
from pjw.rpc.status import ADMITTED_KEY
from pjw.v1 import job_worker_pb2 as pb
from pjw.v1.job_worker_pb2_grpc import JobWorkerServiceStub

if TYPE_CHECKING:
    from pjw.client.artifacts import Artifact
    from pjw.client.copies import Copied
    from pjw.client.watch import AsyncJobWatch

T = TypeVar("T")


@documented_by(Client)
class AsyncClient(BaseClient):
    """`Client` for asyncio: the same calls, awaited; each stream is an asynchronous generator."""

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
        """See `Client.close`."""
        self._link.closed.set()
        await self._channel.close()

    async def start(self, spec: requests.Startable) -> Job:
        """See `Client.start`."""
        return await self._call(requests.start(spec))

    async def submit(self, specs: Iterable[requests.Startable]) -> requests.Jobs:
        """See `Client.submit`."""
        return await self._call(requests.submit(specs))

    async def run_many(self, specs: Iterable[requests.Startable]) -> requests.FinishedJobs:
        """See `Client.run_many`."""
        jobs: list[Job] = []
        try:
            for call in requests.submissions(specs):
                made = await self._call(call)
                jobs += made
            finished = []
            for job in jobs:
                output = b"".join([data async for data in self.logs(job.id)])
                stderr = b""
                if job.split_stderr:
                    stderr = b"".join([data async for data in self.logs(job.id, stderr=True)])
                finished.append(requests.Finished(await self.wait(job.id), output, stderr))
            return finished
        except BaseException:
            # Stop the waiting jobs first: otherwise they would begin as the others end.
            for job in reversed(jobs):
                with suppress(PjwError):
                    await self.stop(job.id, grace=0)
            raise

    async def hold(self, job_id: requests.JobId) -> Job:
        """See `Client.hold`."""
        return await self._call(requests.hold(job_id, all_clients=self._all_clients))

    async def release(self, job_id: requests.JobId) -> Job:
        """See `Client.release`."""
        return await self._call(requests.release(job_id, all_clients=self._all_clients))

    async def run(self, spec: requests.Startable, *, input: bytes | None = None) -> requests.Finished:  # noqa: A002
        """See `Client.run`."""
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

    async def exec(
        self, job_id: requests.JobId, command: requests.Startable, *, detach: bool = False
    ) -> Session:
        """See `Client.exec`."""
        return await self._call(requests.execute(job_id, command, detach=detach))

    async def run_in(
        self,
        job_id: requests.JobId,
        command: requests.Startable,
        *,
        input: bytes | None = None,  # noqa: A002
    ) -> requests.FinishedSession:
        """See `Client.run_in`."""
        session = await self.exec(job_id, requests.with_input(command, input))
        try:
            if input is not None:
                with suppress(JobStateError):
                    await self.write_input(job_id, _once(input), session=session.number)
            output = b"".join([data async for data in self.logs(job_id, session=session.number)])
            stderr = b"".join([data async for data in self.logs(job_id, session=session.number, stderr=True)])
            return requests.FinishedSession(await self.wait_session(job_id, session.number), output, stderr)
        except BaseException:
            with suppress(PjwError):
                await self.stop_session(job_id, session.number)
            raise

    async def resize(self, job_id: requests.JobId, size: TerminalSize, *, session: int = 0) -> None:
        """See `Client.resize`."""
        await self._call(requests.resize(job_id, size, session))

    async def copy_to(
        self,
        job_id: requests.JobId,
        source: str,
        path: str = ".",
        seen: Callable[[int], None] | None = None,
    ) -> "Copied":
        """See `Client.copy_to`. Threads read the files."""
        from pjw.client.copies import Copied, Packer, in_threads

        packer = await asyncio.to_thread(Packer, source)
        count = 0

        def count_and_tell(sent: int) -> None:
            nonlocal count
            count = sent
            if seen is not None:
                seen(sent)

        archive = Archive(path, unpack=True, name=packer.name)
        pieces = in_threads(packer.pieces())
        left_out = await self._unpack_in(job_id, archive, pieces, count_and_tell)
        return Copied(count, packer.notes.lines + left_out)

    async def copy_from(
        self,
        job_id: requests.JobId,
        path: str,
        target: str,
        seen: Callable[[int], None] | None = None,
    ) -> "Copied":
        """See `Client.copy_from`. Threads write the files."""
        from pjw.client.copies import Copied, Unpacker, name_of

        unpacker = await asyncio.to_thread(Unpacker, target, name_of(path), requests.copying(job_id, path))
        left_out: list[str] = []
        count = 0
        try:
            async with aclosing(self._packed(job_id, path, left_out)) as pieces:
                async for piece in pieces:
                    await asyncio.to_thread(unpacker.feed, piece)
                    count += len(piece)
                    if seen is not None:
                        seen(count)
            await asyncio.to_thread(unpacker.finish)
        finally:
            await asyncio.to_thread(unpacker.abandon)
        return Copied(count, left_out + unpacker.notes.lines)

    async def read_archive(self, job_id: requests.JobId, path: str) -> AsyncGenerator[bytes, None]:
        """See `Client.read_archive`."""
        async with aclosing(self._packed(job_id, path, [])) as pieces:
            async for piece in pieces:
                yield piece

    async def _packed(
        self, job_id: requests.JobId, path: str, left_out: list[str]
    ) -> AsyncGenerator[bytes, None]:
        try:
            session = await self._call(requests.archive(job_id, Archive(path)))
        except JobStateError:
            job = await self.get(job_id)
            if job.artifacts is None or not job.state.final:
                raise
            async with aclosing(self._selected(job_id, base_of(job.workspace), path)) as pieces:
                async for piece in pieces:
                    yield piece
            return
        async with self._archive(session):
            async with aclosing(self.logs(job_id, session=session.number)) as pieces:
                async for piece in pieces:
                    yield piece
            left_out += await self._archive_end(session, path)

    async def _selected(self, job_id: requests.JobId, base: str, path: str) -> AsyncGenerator[bytes, None]:
        from pjw.client.artifacts import Selection

        selection = Selection(path, base, requests.copying(job_id, path))
        async with aclosing(self.read_artifacts(job_id)) as pieces:
            async for piece in pieces:
                yield selection.feed(piece)
        yield selection.finish()

    def read_artifacts(self, job_id: requests.JobId) -> AsyncGenerator[bytes, None]:
        """See `Client.read_artifacts`."""
        position = requests.artifacts(job_id, all_clients=self._all_clients)
        return self._stream(position, position.take)

    async def artifacts(self, job_id: requests.JobId) -> "AsyncGenerator[Artifact, None]":
        """See `Client.artifacts`."""
        from pjw.client.artifacts import Listing

        listing = Listing(requests.listing(job_id))
        async with aclosing(self.read_artifacts(job_id)) as pieces:
            async for piece in pieces:
                for each in listing.feed(piece):
                    yield each
        listing.finish()

    async def write_archive(
        self,
        job_id: requests.JobId,
        data: AsyncIterable[bytes],
        path: str = ".",
        seen: Callable[[int], None] | None = None,
    ) -> requests.LeftOut:
        """See `Client.write_archive`; *data* is an asynchronous iterable."""
        return await self._unpack_in(job_id, Archive(path, unpack=True), data, seen)

    async def _unpack_in(
        self,
        job_id: requests.JobId,
        archive: Archive,
        data: AsyncIterable[bytes],
        seen: Callable[[int], None] | None,
    ) -> requests.LeftOut:
        session = await self._call(requests.archive(job_id, archive))
        async with self._archive(session):
            # it has ended: it says why
            with suppress(JobStateError):
                await self.write_input(job_id, data, seen, session=session.number)
            return await self._archive_end(session, archive.path)

    @asynccontextmanager
    async def _archive(self, session: Session) -> AsyncGenerator[None, None]:
        """Have the server forget the session however the block ends."""
        try:
            yield
        except ServerUnreachableError:
            # No server can be asked; the session ends by its lease.
            raise
        except BaseException:
            with suppress(PjwError):
                await self.stop_session(session.job_id, session.number)
            raise
        with suppress(PjwError):
            await self.stop_session(session.job_id, session.number)

    async def _archive_end(self, session: Session, path: str) -> requests.LeftOut:
        """Return the paths left out. Raises CopyError, or another error, when the session failed."""
        from pjw.client.copies import judge

        said = b""
        async for piece in self.logs(session.job_id, session=session.number, stderr=True):
            said += piece
            if len(said) > requests.SAID_BYTES_MAX:
                break
        ended = await self.wait_session(session.job_id, session.number)
        notes, why = judge(said, ended.exit_status.code if ended.exit_status else None)
        if why is not None:
            raise requests.archive_failure(requests.copying(session.job_id, path), ended, why)
        return notes

    async def wait_session(self, job_id: requests.JobId, session: int) -> Session:
        """See `Client.wait_session`."""
        return await self._call(requests.wait_session(job_id, session))

    async def stop_session(self, job_id: requests.JobId, session: int) -> Session:
        """See `Client.stop_session`."""
        return await self._call(requests.stop_session(job_id, session))

    async def get(self, job_id: requests.JobId) -> Job:
        """See `Client.get`."""
        return await self._call(requests.get(job_id, all_clients=self._all_clients))

    async def find(self, name: str) -> Job:
        """See `Client.find`."""
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
        array_id: requests.JobId | None = None,
    ) -> AsyncGenerator[Job, None]:
        """See `Client.list`."""
        pages = requests.Pages(
            states,
            labels,
            name,
            limit,
            newest_first=newest_first,
            all_clients=self._all_clients,
            array_id=array_id,
        )
        while call := pages.next:
            for job in await self._call(call):
                yield job

    async def wait(self, job_id: requests.JobId, *, or_stuck: bool = False) -> Job:
        """See `Client.wait`."""
        return await self._call(requests.wait(job_id, or_stuck=or_stuck, all_clients=self._all_clients))

    async def stop(self, job_id: requests.JobId, *, grace: float | None = None, signal: int = 0) -> Job:
        """See `Client.stop`."""
        return await self._call(requests.stop(job_id, grace, signal, all_clients=self._all_clients))

    async def delete(self, job_id: requests.JobId) -> None:
        """See `Client.delete`."""
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
        session: int = 0,
    ) -> AsyncGenerator[bytes, None]:
        """See `Client.logs`."""
        position = requests.LogsPosition(
            job_id,
            offset,
            tail,
            since,
            follow=follow,
            stderr=stderr,
            session=session,
            all_clients=self._all_clients,
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
        """See `Client.timed_logs`."""
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
        self,
        job_id: requests.JobId,
        data: AsyncIterable[bytes],
        seen: Callable[[int], None] | None = None,
        *,
        session: int = 0,
        append: bool = False,
    ) -> int:
        """See `Client.write_input`; *data* is an asynchronous iterable."""
        return await self._write(AsyncUpload(job_id, session, append=append), data, seen)

    async def upload(
        self, sources: requests.UploadSources, seen: Callable[[int], None] | None = None
    ) -> requests.Uploaded:
        """See `Client.upload`. Threads read the files."""
        from pjw.client.copies import UploadPacker, in_threads

        packer = await asyncio.to_thread(UploadPacker, sources)
        name = requests.upload_name()
        count = await self._write(AsyncUpload(0, upload=name), in_threads(packer.pieces()), seen)
        return requests.Uploaded(name, count, packer.left_out)

    async def _write(
        self, upload: AsyncUpload, data: AsyncIterable[bytes], seen: Callable[[int], None] | None
    ) -> int:
        trouble = RetryState(self._link, upload.outgoing)

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
            # The source may wait for data that no call needs any more; or its failure leaves the call
            # waiting.
            for work in (giving, sending):
                work.cancel()
            await asyncio.gather(giving, sending, return_exceptions=True)
        return upload.outgoing.acknowledged

    async def connect(
        self, job_id: requests.JobId, port: int, data: AsyncIterable[bytes]
    ) -> AsyncGenerator[bytes, None]:
        """See `Client.connect`; *data* is an asynchronous iterable."""
        first = requests.connection(job_id, port)
        call = self._stub.Forward(_messages(first, data))
        try:
            async for answer in call:
                if answer.data:
                    yield answer.data
                if answer.end:
                    return
        except grpc.RpcError as error:
            raise error_from(error, self._link.settings, {"job_id": first.id}) from None
        finally:
            call.cancel()

    async def usage_history(self, job_id: requests.JobId) -> requests.UsageHistory:
        """See `Client.usage_history`."""
        return await self._call(requests.usage_history(job_id, all_clients=self._all_clients))

    async def quota(self, client_name: str = "") -> ClientQuota:
        """See `Client.quota`."""
        return await self._call(requests.quota(client_name, all_clients=self._all_clients))

    async def workspaces(self) -> requests.Workspaces:
        """See `Client.workspaces`."""
        pages = requests.WorkspacePages(all_clients=self._all_clients)
        found: requests.Workspaces = []
        while call := pages.next:
            page = await self._call(call)
            found += page
        return found

    async def remove_workspace(self, name: str) -> None:
        """See `Client.remove_workspace`."""
        await self._call(requests.remove_workspace(name))

    async def images(self) -> requests.Images:
        """See `Client.images`."""
        return await self._call(requests.images(all_clients=self._all_clients))

    async def load_image(
        self, name: str, source: str, seen: Callable[[int], None] | None = None
    ) -> requests.LoadedImage:
        """See `Client.load_image`. Threads read the files."""
        from pjw.client.copies import in_threads
        from pjw.image_archive import ImageArchive

        archive = await asyncio.to_thread(ImageArchive.open, source)
        with archive:
            upload = requests.upload_name()
            await self._write(AsyncUpload(0, upload=upload), in_threads(archive.pieces()), seen)
            image = await self._call(requests.load_image(name, upload, archive.config, archive.digest))
            return requests.LoadedImage(image, archive.left_out)

    async def remove_image(self, name: str) -> None:
        """See `Client.remove_image`."""
        await self._call(requests.remove_image(name))

    def watch_usage(self, interval: float | None = None) -> AsyncGenerator[requests.UsageSnapshot, None]:
        """See `Client.watch_usage`."""
        watch = requests.UsageWatch(interval, all_clients=self._all_clients)
        return self._stream(watch, watch.take)

    def watch_jobs(
        self,
        since: int | None = None,
        *,
        ids: Iterable[requests.JobId] = (),
        states: Iterable[JobState | str] = (),
        labels: Mapping[str, str] | None = None,
        name: str = "",
        snapshot: bool = True,
        follow: bool = True,
    ) -> "AsyncJobWatch":
        """See `Client.watch_jobs`."""
        from pjw.client.watch import AsyncJobWatch, WatchPosition

        position = WatchPosition(
            since,
            ids,
            states,
            labels,
            name,
            snapshot=snapshot,
            follow=follow,
            all_clients=self._all_clients,
        )
        return AsyncJobWatch(position, self._stream(position, position.take))

    async def _call(self, call: requests.Call[T]) -> T:
        async with self._long.get(call.method, self._calls):
            return await self._call_now(call)

    async def _call_now(self, call: requests.Call[T]) -> T:
        trouble = RetryState(self._link, call, outlasts_restart=call.outlasts_restart)
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
        trouble = RetryState(self._link, stream)
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
            stream.lost()
            await self._pause(trouble, failure)

    async def _send(
        self, upload: AsyncUpload, trouble: RetryState, seen: Callable[[int], None] | None
    ) -> bool:
        """Send on one connection; return whether that was all."""
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

    async def _pause(self, trouble: RetryState, error: grpc.RpcError) -> None:
        # In a thread: to diagnose a failed connection, this may read files or open a connection itself.
        await asyncio.sleep(await asyncio.to_thread(trouble.after, error))
        if self._link.closed.is_set():
            raise trouble.closed()


async def _once(data: bytes) -> AsyncGenerator[bytes, None]:
    yield data


async def _messages(
    first: pb.ForwardRequest, data: AsyncIterable[bytes]
) -> AsyncGenerator[pb.ForwardRequest, None]:
    yield first
    async for piece in data:
        yield pb.ForwardRequest(data=piece)
    yield pb.ForwardRequest(end=True)
