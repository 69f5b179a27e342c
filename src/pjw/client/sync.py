"""The client that blocks: `Client`. One may be shared by threads."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from pjw.client.channel import Options  # isort: skip  it sets how gRPC is imported

import grpc

from pjw.client import requests
from pjw.client.base import BaseClient
from pjw.client.retry import Trouble
from pjw.errors import JobNotFoundError
from pjw.model import Job, JobSpec, JobState
from pjw.rpc.status import ADMITTED_KEY
from pjw.v1.job_worker_pb2_grpc import JobWorkerServiceStub

if TYPE_CHECKING:
    from pjw.client.upload import Upload

T = TypeVar("T")


class Client(BaseClient):
    """A connection to pjwd, with the certificate that says who we are. Use it as a context manager.

    A connection that is lost is made again, and the call with it, for *reconnect_seconds*. Raises only
    pjw.errors: ServerUnreachableError when no server answered.
    """

    def _connect(self, target: str, credentials: grpc.ChannelCredentials, options: Options) -> None:
        self._channel = grpc.secure_channel(target, credentials, options)
        self._stub = JobWorkerServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection, and every call that is under way."""
        self._link.closed.set()
        self._channel.close()

    def start(self, spec: JobSpec) -> Job:
        """Start a job. However often the connection is lost meanwhile, it starts once.

        Raises LaunchError when its command cannot be executed.
        """
        return self._call(requests.start(spec))

    def get(self, job_id: int) -> Job:
        """One job."""
        return self._call(requests.get(job_id, all_clients=self._all_clients))

    def find(self, name: str) -> Job:
        """The newest job of that name. Raises JobNotFoundError."""
        for job in self.list(name=name, newest_first=True, limit=1):
            return job
        raise JobNotFoundError(name)

    def list(
        self,
        *,
        states: Iterable[JobState] = (),
        labels: Mapping[str, str] | None = None,
        name: str = "",
        newest_first: bool = False,
        limit: int | None = None,
    ) -> Iterator[Job]:
        """The jobs in one of these states, with all of these labels, of that name, in order of their ids."""
        pages = requests.Pages(
            states, labels, name, limit, newest_first=newest_first, all_clients=self._all_clients
        )
        while call := pages.next:
            yield from self._call(call)

    def wait(self, job_id: int) -> Job:
        """One job when it has ended, however long that takes."""
        return self._call(requests.wait(job_id, all_clients=self._all_clients))

    def stop(self, job_id: int, *, grace: float | None = None, signal: int = 0) -> Job:
        """Stop a job; its final state. After *grace* seconds (the server's default: 10) it is killed.

        It is sent *signal* instead of SIGTERM.
        """
        return self._call(requests.stop(job_id, grace, signal, all_clients=self._all_clients))

    def delete(self, job_id: int) -> None:
        """Forget an ended job, with its output. Raises JobStateError when it has not ended."""
        self._call(requests.delete(job_id, all_clients=self._all_clients))

    def logs(
        self,
        job_id: int,
        offset: int = 0,
        *,
        follow: bool = True,
        tail: int | None = None,
        stderr: bool = False,
    ) -> Iterator[bytes]:
        """The output from *offset* on, or its last *tail* lines; to the end of the job, or of what is there.

        A lost connection is made again, and the stream goes on at the exact byte. With *stderr*, that of a
        job that keeps it apart.
        """
        position = requests.LogsPosition(
            job_id, offset, tail, follow=follow, stderr=stderr, all_clients=self._all_clients
        )
        return self._stream(position, position.take)

    def timed_logs(
        self,
        job_id: int,
        offset: int = 0,
        *,
        follow: bool = True,
        tail: int | None = None,
        stderr: bool = False,
    ) -> Iterator[requests.TimedOutput]:
        """As `logs`, each piece with the time at which the job wrote it."""
        position = requests.LogsPosition(
            job_id, offset, tail, follow=follow, stderr=stderr, timestamps=True, all_clients=self._all_clients
        )
        return self._stream(position, position.take_timed)

    def write_input(
        self, job_id: int, data: Iterable[bytes], seen: Callable[[int], None] | None = None
    ) -> int:
        """Send the whole input of a job that was started with `input`; how many bytes the server has taken.

        A lost connection is made again, and the input goes on at the exact byte; what the server has already
        is passed over. *seen* is told how many bytes it has by then. Raises JobStateError when the job ends,
        or its command reads no more, before that.
        """
        from pjw.client.upload import Upload

        upload = Upload(job_id)
        thread = threading.Thread(
            target=self._upload, args=(upload, seen), name=f"pjw-input-{job_id}", daemon=True
        )
        thread.start()
        try:
            if all(map(upload.give, data)):
                upload.complete()
            return upload.result()
        finally:
            upload.end()
            # or what it has begun would end what the caller writes next
            thread.join()

    def usage_history(self, job_id: int) -> requests.UsageHistory:
        """What a job used over its life, in a bounded number of samples."""
        return self._call(requests.usage_history(job_id, all_clients=self._all_clients))

    def watch_usage(self, interval: float | None = None) -> Iterator[requests.UsageSnapshot]:
        """What all running jobs use, every *interval* seconds (the server's default: 2), without end."""
        watch = requests.UsageWatch(interval, all_clients=self._all_clients)
        return self._stream(watch, watch.take)

    def _call(self, call: requests.Call[T]) -> T:
        trouble = Trouble(self._link, call)
        while True:
            try:
                answer = getattr(self._stub, call.method)(call.request, timeout=call.timeout)
            except grpc.RpcError as error:
                if trouble.is_done(error):
                    return call.result(None)
                self._pause(trouble, error)
            else:
                trouble.is_over()
                return call.result(answer)

    def _stream(self, stream: requests.Stream, take: Callable[[Any], T | None]) -> Iterator[T]:
        trouble = Trouble(self._link, stream)
        while True:
            call = getattr(self._stub, stream.method)(stream.request)
            try:
                if ADMITTED_KEY in dict(call.initial_metadata() or ()):
                    trouble.is_over()
                for answer in call:
                    if (taken := take(answer)) is not None:
                        yield taken
                return
            except grpc.RpcError as error:
                failure = error
            finally:
                call.cancel()
            self._pause(trouble, failure)

    def _upload(self, upload: "Upload", seen: Callable[[int], None] | None) -> None:
        trouble = Trouble(self._link, upload.outgoing)
        try:
            while not self._send(upload, trouble, seen):
                pass
        except Exception as error:  # noqa: BLE001  raised again in the caller's thread
            upload.end(error)
        else:
            upload.end()

    def _send(self, upload: "Upload", trouble: Trouble, seen: Callable[[int], None] | None) -> bool:
        """Send on one connection; whether that was all."""
        call = self._stub.WriteInput(upload.requests())
        upload.on_end(call.cancel)
        try:
            for answer in call:
                trouble.is_over()
                upload.acknowledge(answer)
                if seen is not None:
                    seen(answer.offset)
                if answer.ended:
                    return True
            return True
        except grpc.RpcError as error:
            if upload.over:
                return True
            failure = error
        finally:
            call.cancel()
        self._pause(trouble, failure)
        return False

    def _pause(self, trouble: Trouble, error: grpc.RpcError) -> None:
        # No watch on the channel's connectivity beside this: a thread of gRPC's goes on with it for a moment
        # after it has become ready, and dies with a traceback when the channel is closed in that moment.
        if self._link.closed.wait(trouble.after(error)):
            raise trouble.closed()
