"""The client that blocks: `Client`. One may be shared by threads."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from pjw.client.channel import Options  # isort: skip  it sets how gRPC is imported

import grpc

from pjw.client import requests
from pjw.client.base import BaseClient
from pjw.client.retry import CALLS_AT_ONCE, STOPS_AT_ONCE, WAITS_AT_ONCE, Trouble
from pjw.errors import JobNotFoundError, JobStateError, PjwError
from pjw.model import ClientQuota, Job, JobState
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
        self._calls = threading.Semaphore(CALLS_AT_ONCE)
        self._long = {
            "Wait": threading.Semaphore(WAITS_AT_ONCE),
            "Stop": threading.Semaphore(STOPS_AT_ONCE),
        }

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

    def start(self, spec: requests.Startable) -> Job:
        """Start a job. However often the connection is lost meanwhile, it starts once.

        A command alone is a spec without anything else. Raises LaunchError when it cannot be executed.
        """
        return self._call(requests.start(spec))

    def run(self, spec: requests.Startable, *, input: bytes | None = None) -> requests.Finished:  # noqa: A002
        """Start a job, send its *input* and wait for its end: the job, with all of its output in memory.

        As with subprocess.run(), whatever ends this call early (Ctrl-C, a lost connection) kills the job. An
        exit code other than 0 is no error: see `job.exit_status`.
        """
        job = self.start(requests.with_input(spec, input))
        try:
            if input is not None:
                with suppress(JobStateError):
                    self.write_input(job.id, [input])
            output = b"".join(self.logs(job.id))
            stderr = b"".join(self.logs(job.id, stderr=True)) if job.split_stderr else b""
            return requests.Finished(self.wait(job.id), output, stderr)
        except BaseException:
            with suppress(PjwError):
                self.stop(job.id, grace=0)
            raise

    def get(self, job_id: requests.JobId) -> Job:
        """One job, by its id, which is a number or text."""
        return self._call(requests.get(job_id, all_clients=self._all_clients))

    def find(self, name: str) -> Job:
        """The newest job of that name. Raises JobNotFoundError."""
        for job in self.list(name=name, newest_first=True, limit=1):
            return job
        raise JobNotFoundError(name)

    def list(
        self,
        *,
        states: Iterable[JobState | str] = (),
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

    def wait(self, job_id: requests.JobId, *, or_stuck: bool = False) -> Job:
        """One job when it has ended, however long that takes.

        With *or_stuck* it also returns when the job cannot go on: the job was killed and does not end, or it
        waits for the disk. `detail` says which.
        """
        return self._call(requests.wait(job_id, or_stuck=or_stuck, all_clients=self._all_clients))

    def stop(self, job_id: requests.JobId, *, grace: float | None = None, signal: int = 0) -> Job:
        """Stop a job; its final state. After *grace* seconds (the server's default: 10) it is killed.

        It is sent *signal* instead of SIGTERM.
        """
        return self._call(requests.stop(job_id, grace, signal, all_clients=self._all_clients))

    def delete(self, job_id: requests.JobId) -> None:
        """Forget an ended job, with its output. Raises JobStateError when it has not ended."""
        self._call(requests.delete(job_id, all_clients=self._all_clients))

    def logs(
        self,
        job_id: requests.JobId,
        offset: int = 0,
        *,
        follow: bool = True,
        tail: int | None = None,
        since: datetime | None = None,
        stderr: bool = False,
    ) -> Iterator[bytes]:
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
    ) -> Iterator[requests.TimedOutput]:
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

    def write_input(
        self, job_id: requests.JobId, data: Iterable[bytes], seen: Callable[[int], None] | None = None
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

    def usage_history(self, job_id: requests.JobId) -> requests.UsageHistory:
        """What a job used over its life, in a bounded number of samples."""
        return self._call(requests.usage_history(job_id, all_clients=self._all_clients))

    def quota(self, client_name: str = "") -> ClientQuota:
        """The limits of this client, what its jobs use now, and its share of the machine.

        With *client_name* those of another client: this takes *all_clients*, and a role for it.
        """
        return self._call(requests.quota(client_name, all_clients=self._all_clients))

    def watch_usage(self, interval: float | None = None) -> Iterator[requests.UsageSnapshot]:
        """What all running jobs use, every *interval* seconds (the server's default: 2), without end."""
        watch = requests.UsageWatch(interval, all_clients=self._all_clients)
        return self._stream(watch, watch.take)

    def _call(self, call: requests.Call[T]) -> T:
        with self._long.get(call.method, self._calls):
            return self._call_now(call)

    def _call_now(self, call: requests.Call[T]) -> T:
        trouble = Trouble(self._link, call, outlasts_restart=call.outlasts_restart)
        if self._link.closed.is_set():
            raise trouble.closed()
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
