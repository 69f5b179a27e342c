"""The client that blocks: `Client`. One may be shared by threads."""

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from pjw.client.channel import Options  # isort: skip  it sets how gRPC is imported

import grpc

from pjw.client import requests
from pjw.client.base import BaseClient
from pjw.client.retry import CALLS_AT_ONCE, STOPS_AT_ONCE, WAITS_AT_ONCE, RetryState, error_from
from pjw.errors import JobNotFoundError, JobStateError, PjwError, ServerUnreachableError
from pjw.model import Archive, ClientQuota, Job, JobState, Session, TerminalSize, base_of
from pjw.rpc.status import ADMITTED_KEY
from pjw.v1 import job_worker_pb2 as pb
from pjw.v1.job_worker_pb2_grpc import JobWorkerServiceStub

if TYPE_CHECKING:
    from pjw.client.artifacts import Artifact
    from pjw.client.copies import Copied
    from pjw.client.input import Upload
    from pjw.client.watch import JobWatch

T = TypeVar("T")


class Client(BaseClient):
    """A connection to pjwd, with the certificate that identifies the caller. Use it as a context manager.

    The client reconnects after a lost connection, and repeats the call, for *reconnect_seconds*. It raises
    only the errors of `pjw.errors`; docs/library.md shows it in use.

    Every call may raise ServerUnreachableError when no server answered, LauncherGoneError when the server
    ends or cannot start and stop jobs, NotAuthenticatedError for a certificate that the server does not
    accept, NotAllowedError for a role that lacks the call, InvalidJobError for an argument that can never be
    right, LimitReachedError for too many calls at once or too fast, and ServerFailedError for a fault of the
    server's own.
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

        A command alone is a spec without anything else. With `queue` the job is put into the queue instead,
        and the answer does not wait for its turn.

        Raises LaunchError when the command cannot be executed (execve(2)), WorkdirError when its working
        directory cannot be entered, InvalidJobError for a spec that can never work, LimitRangeError for a
        limit that the operator does not allow, LimitReachedError for a quota or a lack of space,
        NameTakenError, WorkspaceBusyError, ImageNotFoundError, MountNotFoundError, MountError, GpuError,
        CopyError for an upload that is not there or cannot be unpacked, JobStateError for an image that
        cannot be used or a `link` whose network is in use, and KernelError when another step of the start
        failed. With `queue` it raises the errors of `submit`.
        """
        return self._call(requests.start(spec))

    def submit(self, specs: Iterable[requests.Startable]) -> requests.Jobs:
        """Put up to 500 jobs into the queue, all or none; each is started when its turn comes.

        Raises InvalidJobError and LimitRangeError for a spec as `start` does, LimitReachedError when the
        queue takes no more of them, NameTakenError, JobNotFoundError for a job to wait for,
        ImageNotFoundError, MountNotFoundError, GpuError, and CopyError for an upload that is not there.
        docs/queue.md describes the queue.
        """
        return self._call(requests.submit(specs))

    def run_many(self, specs: Iterable[requests.Startable]) -> requests.FinishedJobs:
        """Put jobs into the queue, wait for all of them, and return each with its output, in the same order.

        If this call ends early, it stops the jobs that have not ended. A failed job raises no error. Raises
        InvalidJobError for an array, and the errors of `submit`, `logs` and `wait`.
        """
        jobs: list[Job] = []
        try:
            for call in requests.submissions(specs):
                made = self._call(call)
                jobs += made
            finished = []
            for job in jobs:
                output = b"".join(self.logs(job.id))
                stderr = b""
                if job.split_stderr:
                    stderr = b"".join(self.logs(job.id, stderr=True))
                finished.append(requests.Finished(self.wait(job.id), output, stderr))
            return finished
        except BaseException:
            # Stop the waiting jobs first: otherwise they would begin as the others end.
            for job in reversed(jobs):
                with suppress(PjwError):
                    self.stop(job.id, grace=0)
            raise

    def hold(self, job_id: requests.JobId) -> Job:
        """Keep a job of the queue from being started.

        Raises JobNotFoundError, JobStateError when it does not wait there, and LimitReachedError when too
        many elements of an array are held one by one.
        """
        return self._call(requests.hold(job_id, all_clients=self._all_clients))

    def release(self, job_id: requests.JobId) -> Job:
        """Let a held job of the queue be started. Raises the errors of `hold`."""
        return self._call(requests.release(job_id, all_clients=self._all_clients))

    def run(self, spec: requests.Startable, *, input: bytes | None = None) -> requests.Finished:  # noqa: A002
        """Start a job, send its *input*, and wait for its end; return the job with all of its output.

        The output is in memory. As with subprocess.run(), whatever ends this call early (Ctrl-C, a lost
        connection) kills the job. An exit code other than 0 raises no error: see `job.exit_status`. Raises
        the errors of `start`, `write_input`, `logs` and `wait`, but no JobStateError for input that the job
        does not read.
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

    def exec(self, job_id: requests.JobId, command: requests.Startable, *, detach: bool = False) -> Session:
        """Start another command in a job of ours that runs: a session, in the job's limits and namespaces.

        Of a spec the command, `env`, `workdir`, `input` and `request_id` count. `logs`, `write_input`,
        `wait_session` and `stop_session` take its number. When none of these is under way for two minutes it
        is hung up, unless it is to *detach* (docs/sessions.md).

        Raises JobNotFoundError, JobStateError for a job that does not run, LaunchError when the command
        cannot be executed (execve(2)), WorkdirError, InvalidJobError, LimitReachedError for too many sessions
        or a lack of space, and KernelError when another step failed.
        """
        return self._call(requests.execute(job_id, command, detach=detach))

    def run_in(
        self,
        job_id: requests.JobId,
        command: requests.Startable,
        *,
        input: bytes | None = None,  # noqa: A002
    ) -> requests.FinishedSession:
        """Run another command in a job, as `run` does a job: with its *input*, and all output in memory.

        Raises the errors of `exec`, `write_input`, `logs` and `wait_session`, but no JobStateError for input
        that the command does not read.
        """
        session = self.exec(job_id, requests.with_input(command, input))
        try:
            if input is not None:
                with suppress(JobStateError):
                    self.write_input(job_id, [input], session=session.number)
            output = b"".join(self.logs(job_id, session=session.number))
            stderr = b"".join(self.logs(job_id, session=session.number, stderr=True))
            return requests.FinishedSession(self.wait_session(job_id, session.number), output, stderr)
        except BaseException:
            with suppress(PjwError):
                self.stop_session(job_id, session.number)
            raise

    def resize(self, job_id: requests.JobId, size: TerminalSize, *, session: int = 0) -> None:
        """Give the terminal of a job, or of the session of that number, another size (ioctl_tty(2)).

        Raises JobNotFoundError, SessionNotFoundError, and JobStateError where there is no terminal.
        """
        self._call(requests.resize(job_id, size, session))

    def copy_to(
        self,
        job_id: requests.JobId,
        source: str,
        path: str = ".",
        seen: Callable[[int], None] | None = None,
    ) -> "Copied":
        """Copy a file or a directory of this machine into a job that runs, as cp(1) would with a new name.

        If *path* is a directory, the copy goes into it under its own name; else *path* is the copy's new
        name. A *source* that ends with `/.` stands for its contents. A relative *path* begins in the job's
        workspace, or else in its own directory. *seen* is called with the number of bytes that the server
        has. Raises ConfigError for a file that cannot be read, CopyError for one that cannot be made there,
        and the errors of `write_archive`.
        """
        from pjw.client.copies import Copied, Packer

        packer = Packer(source)
        count = 0

        def count_and_tell(sent: int) -> None:
            nonlocal count
            count = sent
            if seen is not None:
                seen(sent)

        archive = Archive(path, unpack=True, name=packer.name)
        left_out = self._unpack_in(job_id, archive, packer.pieces(), count_and_tell)
        return Copied(count, packer.notes.lines + left_out)

    def copy_from(
        self,
        job_id: requests.JobId,
        path: str,
        target: str,
        seen: Callable[[int], None] | None = None,
    ) -> "Copied":
        """Copy a file or a directory of a job to this machine, as `copy_to` does the other way.

        Of a job that has ended, *path* must be among its artifacts. Nothing is at its place before the whole
        archive came. Files are executable or not, as in the job; links that lead out of the copied directory
        are left out. Raises ConfigError for a file that cannot be written, CopyError for an archive that is
        broken or has other paths, and the errors of `read_archive`.
        """
        from pjw.client.copies import Copied, Unpacker, name_of

        unpacker = Unpacker(target, name_of(path), requests.copying(job_id, path))
        left_out: list[str] = []
        count = 0
        try:
            with closing(self._packed(job_id, path, left_out)) as pieces:
                for piece in pieces:
                    unpacker.feed(piece)
                    count += len(piece)
                    if seen is not None:
                        seen(count)
            unpacker.finish()
        finally:
            unpacker.abandon()
        return Copied(count, left_out + unpacker.notes.lines)

    def read_archive(self, job_id: requests.JobId, path: str) -> Iterator[bytes]:
        """Yield a file or directory of a job as a tar archive (tar(5)).

        Of a job that has ended, *path* must be among its artifacts. The job may have made up every byte of
        it: unpack it as you would a stranger's archive. Raises, also at the end, CopyError for a path that is
        not there or cannot be read, JobNotFoundError, JobStateError for a job that neither runs nor has
        artifacts, OutputLostError, and LimitReachedError for too many sessions, or for an archive larger than
        the job's limit of output.
        """
        return self._packed(job_id, path, [])

    def _packed(self, job_id: requests.JobId, path: str, left_out: list[str]) -> Generator[bytes, None, None]:
        """Yield a file or directory of a job as an archive; add the files left out to *left_out*."""
        try:
            session = self._call(requests.archive(job_id, Archive(path)))
        except JobStateError:
            job = self.get(job_id)
            if job.artifacts is None or not job.state.final:
                raise
            yield from self._selected(job_id, base_of(job.workspace), path)
            return
        with self._archive(session):
            yield from self.logs(job_id, session=session.number)
            left_out += self._archive_end(session, path)

    def _selected(self, job_id: requests.JobId, base: str, path: str) -> Iterator[bytes]:
        from pjw.client.artifacts import Selection

        selection = Selection(path, base, requests.copying(job_id, path))
        for piece in self.read_artifacts(job_id):
            yield selection.feed(piece)
        yield selection.finish()

    def read_artifacts(self, job_id: requests.JobId) -> Iterator[bytes]:
        """Yield all artifacts of a job that has ended, as a tar archive.

        The client reconnects after a lost connection, and the stream goes on at the exact byte. The job may
        have made up every byte of it. Raises JobNotFoundError, JobStateError before the job's end, CopyError
        when there are no artifacts, and OutputLostError when the host or the node lost them.
        """
        position = requests.artifacts(job_id, all_clients=self._all_clients)
        return self._stream(position, position.take)

    def artifacts(self, job_id: requests.JobId) -> "Iterator[Artifact]":
        """Yield the artifacts of a job one by one as they arrive.

        Raises the errors of `read_artifacts`, and CopyError for an archive that is broken.
        """
        from pjw.client.artifacts import Listing

        listing = Listing(requests.listing(job_id))
        for piece in self.read_artifacts(job_id):
            yield from listing.feed(piece)
        listing.finish()

    def write_archive(
        self,
        job_id: requests.JobId,
        data: Iterable[bytes],
        path: str = ".",
        seen: Callable[[int], None] | None = None,
    ) -> requests.LeftOut:
        """Unpack a tar archive in a directory of a job that runs; return the files left out, in words.

        It is made where it is missing. Raises CopyError for an archive that cannot be unpacked there,
        JobNotFoundError, JobStateError for a job that does not run, and LimitReachedError for too many
        sessions or a lack of space.
        """
        return self._unpack_in(job_id, Archive(path, unpack=True), data, seen)

    def _unpack_in(
        self,
        job_id: requests.JobId,
        archive: Archive,
        data: Iterable[bytes],
        seen: Callable[[int], None] | None,
    ) -> requests.LeftOut:
        session = self._call(requests.archive(job_id, archive))
        with self._archive(session):
            # it has ended: it says why
            with suppress(JobStateError):
                self.write_input(job_id, data, seen, session=session.number)
            return self._archive_end(session, archive.path)

    @contextmanager
    def _archive(self, session: Session) -> Iterator[None]:
        """Have the server forget the session however the block ends."""
        try:
            yield
        except ServerUnreachableError:
            # No server can be asked; the session ends by its lease.
            raise
        except BaseException:
            with suppress(PjwError):
                self.stop_session(session.job_id, session.number)
            raise
        with suppress(PjwError):
            self.stop_session(session.job_id, session.number)

    def _archive_end(self, session: Session, path: str) -> requests.LeftOut:
        """Return the paths left out. Raises CopyError, or another error, when the session failed."""
        from pjw.client.copies import judge

        said = b""
        for piece in self.logs(session.job_id, session=session.number, stderr=True):
            said += piece
            if len(said) > requests.SAID_BYTES_MAX:
                break
        ended = self.wait_session(session.job_id, session.number)
        notes, why = judge(said, ended.exit_status.code if ended.exit_status else None)
        if why is not None:
            raise requests.archive_failure(requests.copying(session.job_id, path), ended, why)
        return notes

    def wait_session(self, job_id: requests.JobId, session: int) -> Session:
        """Wait without a time limit until a session ends, and return it.

        Raises SessionNotFoundError, and NotAllowedError with *all_clients*: a session is its owner's alone.
        """
        return self._call(requests.wait_session(job_id, session))

    def stop_session(self, job_id: requests.JobId, session: int) -> Session:
        """End a session: SIGHUP, after the server's grace period SIGKILL (signal(7)); return its final state.

        Raises the errors of `wait_session`.
        """
        return self._call(requests.stop_session(job_id, session))

    def get(self, job_id: requests.JobId) -> Job:
        """Return one job, by its id, which is a number or text. Raises JobNotFoundError."""
        return self._call(requests.get(job_id, all_clients=self._all_clients))

    def find(self, name: str) -> Job:
        """Return the newest job of that name.

        Raises JobNotFoundError, and InvalidJobError for a name that no job can have.
        """
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
        array_id: requests.JobId | None = None,
    ) -> Iterator[Job]:
        """Yield the jobs with one of these states, all these labels and that name, in order of their ids.

        Raises InvalidJobError for a state, a label or a name that no job can have.
        """
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
            yield from self._call(call)

    def wait(self, job_id: requests.JobId, *, or_stuck: bool = False) -> Job:
        """Wait without a time limit until a job ends, and return it.

        With *or_stuck* it also returns when the job cannot go on: the job was killed and does not end, or it
        waits for the disk. `detail` says which. Raises JobNotFoundError. A job that failed raises no error.
        """
        return self._call(requests.wait(job_id, or_stuck=or_stuck, all_clients=self._all_clients))

    def stop(self, job_id: requests.JobId, *, grace: float | None = None, signal: int = 0) -> Job:
        """Stop a job; return its final state. After *grace* seconds (the server's default: 10) it is killed.

        It is sent *signal* (1 to 31: signal(7)) instead of SIGTERM. Raises JobNotFoundError, InvalidJobError
        for another signal or more than a day of grace, and JobStateError for a job that was killed and that
        the kernel cannot end yet.
        """
        return self._call(requests.stop(job_id, grace, signal, all_clients=self._all_clients))

    def delete(self, job_id: requests.JobId) -> None:
        """Forget an ended job, with its output.

        Raises JobNotFoundError, and JobStateError when it has not ended.
        """
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
        session: int = 0,
    ) -> Iterator[bytes]:
        """Yield the output from *offset* on, or its last *tail* lines.

        The stream ends with the job, or without *follow* with the output that is there. With *since* it
        begins with the output of that time; a time without a time zone is local.

        The client reconnects after a lost connection, and the stream goes on at the exact byte. With
        *stderr*, the call reads the stderr of a job that keeps it apart; with the number of a *session*, the
        output of that session of the job.

        Raises JobNotFoundError, SessionNotFoundError, OffsetError for an *offset*, in bytes, beyond the end,
        JobStateError for an array, for a stderr that is not kept apart, and for a time when the output has
        none, and OutputLostError at the end of an output of which the host or the node lost a part. With
        *session* and *all_clients* NotAllowedError.
        """
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
    ) -> Iterator[requests.TimedOutput]:
        """Yield output as `logs` does, each piece with the time at which the job wrote it.

        Raises the errors of `logs`.
        """
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
        self,
        job_id: requests.JobId,
        data: Iterable[bytes],
        seen: Callable[[int], None] | None = None,
        *,
        session: int = 0,
        append: bool = False,
    ) -> int:
        """Send the whole input of a job started with `input`; return the bytes that the server has taken.

        The client reconnects after a lost connection, and the input goes on at the exact byte; bytes that the
        server has already are skipped. *seen* is called with the number of bytes the server has by then. With
        *session* the input is that of a session of the job; with *append* it comes behind the bytes that the
        server has already (docs/input.md). Raises JobNotFoundError, SessionNotFoundError, JobStateError when
        the job takes no input, or when it ends or its command reads no more before the end of *data*, and
        LimitReachedError at a quota of stored bytes.
        """
        from pjw.client.input import Upload

        return self._write(Upload(job_id, session, append=append), data, seen)

    def upload(
        self, sources: requests.UploadSources, seen: Callable[[int], None] | None = None
    ) -> requests.Uploaded:
        """Send files for a job to be started: `JobSpec.upload` takes the `name` of the result.

        *sources* are directories and files of this machine, each alone or with a path in the job's own
        directory, as `("src", "lib")`: the contents of a directory go there, a file goes there by its name.
        The client reconnects after a lost connection. An upload that no job was started with is removed after
        two minutes. Raises ConfigError for a file that cannot be read, InvalidJobError for a place outside
        the job's own directory, and LimitReachedError at a quota of uploads or of stored bytes.
        """
        from pjw.client.copies import UploadPacker
        from pjw.client.input import Upload

        packer = UploadPacker(sources)
        name = requests.upload_name()
        count = self._write(Upload(0, upload=name), packer.pieces(), seen)
        return requests.Uploaded(name, count, packer.left_out)

    def _write(self, upload: "Upload", data: Iterable[bytes], seen: Callable[[int], None] | None) -> int:
        thread = threading.Thread(
            target=self._upload, args=(upload, seen), name=f"pjw-input-{upload.outgoing.job_id}", daemon=True
        )
        thread.start()
        try:
            if all(map(upload.give, data)):
                upload.complete()
            return upload.result()
        finally:
            upload.end()
            # without this wait, the call in the thread could end the caller's next write
            thread.join()

    def connect(self, job_id: requests.JobId, port: int, data: Iterable[bytes] = ()) -> Iterator[bytes]:
        """Connect to a TCP port (1 to 65535) of a job that runs: send *data*, and yield the job's answer.

        A thread takes *data*, at most 1 MiB at a time; the job sees its end. The client does not reconnect
        after a lost connection. Raises JobNotFoundError, InvalidJobError for a wrong port, JobStateError when
        nothing listens on the port or the job does not run, and LimitReachedError.
        """
        first = requests.connection(job_id, port)
        call = self._stub.Forward(_messages(first, data))
        try:
            for answer in call:
                if answer.data:
                    yield answer.data
                if answer.end:
                    return
        except grpc.RpcError as error:
            raise error_from(error, self._link.settings, {"job_id": first.id}) from None
        finally:
            call.cancel()

    def usage_history(self, job_id: requests.JobId) -> requests.UsageHistory:
        """Return the job's usage over its life, in a bounded number of samples. Raises JobNotFoundError."""
        return self._call(requests.usage_history(job_id, all_clients=self._all_clients))

    def quota(self, client_name: str = "") -> ClientQuota:
        """Return the limits of this client, the present usage of its jobs, and its share of the machine.

        With *client_name* those of another client: this takes *all_clients*, and a role for it. Raises
        NotAllowedError without them, and InvalidJobError for a name that no client can have.
        """
        return self._call(requests.quota(client_name, all_clients=self._all_clients))

    def workspaces(self) -> requests.Workspaces:
        """Return our workspaces, by name: directories that outlive jobs (`JobSpec.workspace`).

        With *all_clients*, and a role for it, those of every client. Raises only the errors of every call.
        """
        pages = requests.WorkspacePages(all_clients=self._all_clients)
        found: requests.Workspaces = []
        while call := pages.next:
            page = self._call(call)
            found += page
        return found

    def remove_workspace(self, name: str) -> None:
        """Remove a workspace with all that is in it, however long that takes.

        Raises WorkspaceNotFoundError, WorkspaceBusyError while a job uses it or is queued for it, and
        InvalidJobError for a name that no workspace can have.
        """
        self._call(requests.remove_workspace(name))

    def images(self) -> requests.Images:
        """Return the images that our jobs can have: our own, and the operator's (docs/images.md).

        With *all_clients*, and a role for it, those of every client. Raises only the errors of every call.
        """
        return self._call(requests.images(all_clients=self._all_clients))

    def load_image(
        self, name: str, source: str, seen: Callable[[int], None] | None = None
    ) -> requests.LoadedImage:
        """Make an image of our own from a file of this machine, or from a directory (`dir:DIR`).

        A file is an archive of docker's, an OCI layout in a tar archive, or a tar archive of a root; an OCI
        layout may be a directory (`oci:DIR`). A job of ours unpacks it. An image that had the name before
        goes with the last job that has it. *seen* is called with the number of bytes that the server has.
        Raises ConfigError for a source that cannot be read or is no image, InvalidJobError for a name that no
        image can have, CopyError when it cannot be unpacked, LimitReachedError for too many images, and the
        errors of `start`. docs/images.md describes images.
        """
        from pjw.client.input import Upload
        from pjw.image_archive import ImageArchive

        with ImageArchive.open(source) as archive:
            upload = requests.upload_name()
            self._write(Upload(0, upload=upload), archive.pieces(), seen)
            image = self._call(requests.load_image(name, upload, archive.config, archive.digest))
            return requests.LoadedImage(image, archive.left_out)

    def remove_image(self, name: str) -> None:
        """Remove an image of our own; jobs that have it go on with it.

        Raises ImageNotFoundError, and InvalidJobError for a name that no image can have.
        """
        self._call(requests.remove_image(name))

    def watch_usage(self, interval: float | None = None) -> Iterator[requests.UsageSnapshot]:
        """Yield the usage of all running jobs every *interval* seconds (server's default: 2), without end.

        Raises InvalidJobError for an interval that is not from 1 to 60 seconds.
        """
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
    ) -> "JobWatch":
        """Yield changes of the states of our jobs, each once and in order; without *follow* those until now.

        They begin behind the change *since*; without it with the jobs as they are, or without a *snapshot*
        with the next change. The client reconnects after a lost connection, and the changes go on where they
        were. Another program can go on too: it begins behind the `sequence` of the last change
        (docs/events.md). Raises SequenceError when that change is too old, and InvalidJobError for a filter
        that no job can meet.
        """
        from pjw.client.watch import JobWatch, WatchPosition

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
        return JobWatch(position, self._stream(position, position.take))

    def _call(self, call: requests.Call[T]) -> T:
        with self._long.get(call.method, self._calls):
            return self._call_now(call)

    def _call_now(self, call: requests.Call[T]) -> T:
        trouble = RetryState(self._link, call, outlasts_restart=call.outlasts_restart)
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

    def _stream(self, stream: requests.Stream, take: Callable[[Any], T | None]) -> Generator[T, None, None]:
        trouble = RetryState(self._link, stream)
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
            stream.lost()
            self._pause(trouble, failure)

    def _upload(self, upload: "Upload", seen: Callable[[int], None] | None) -> None:
        trouble = RetryState(self._link, upload.outgoing)
        try:
            while not self._send(upload, trouble, seen):
                pass
        except Exception as error:  # noqa: BLE001  raised again in the caller's thread
            upload.end(error)
        else:
            upload.end()

    def _send(self, upload: "Upload", trouble: RetryState, seen: Callable[[int], None] | None) -> bool:
        """Send on one connection; return whether that was all."""
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

    def _pause(self, trouble: RetryState, error: grpc.RpcError) -> None:
        # No watch on the channel's connectivity during this wait: a thread of gRPC's goes on with it for a
        # moment after it has become ready, and dies with a traceback when the channel is closed then.
        if self._link.closed.wait(trouble.after(error)):
            raise trouble.closed()


def _messages(first: pb.ForwardRequest, data: Iterable[bytes]) -> Iterator[pb.ForwardRequest]:
    yield first
    for piece in data:
        yield pb.ForwardRequest(data=piece)
    yield pb.ForwardRequest(end=True)
