"""Asks the launcher: one method for each request; the answering ends are in launcher/dispatch.py."""

import array
import asyncio
import contextlib
import os
import socket
from collections import deque
from collections.abc import Sequence
from typing import Final

from pjw.errors import (
    RESOURCE_ERRNOS,
    ConfigError,
    InvalidJobError,
    JobStateError,
    KernelError,
    LauncherGoneError,
    LaunchError,
    LimitReachedError,
    PjwError,
    ProtocolError,
    WorkdirError,
    describe_errno,
)
from pjw.launcher import protocol
from pjw.model import JobSpec, Usage, UsageSample
from pjw.worker.launcher_process import LauncherProcess
from pjw.worker.rows import from_ns

# What a start takes at its height (14), and those that are under way beside it; the rest of the server
# (connections, readers) may have taken the others.
SPARE_DESCRIPTORS: Final = 32


class LauncherClient:
    """The worker's end of the socket. Requests may overlap; replies find theirs by number."""

    def __init__(self, launcher: LauncherProcess) -> None:
        """Take a launcher over; call from a running event loop."""
        launcher.requests.setblocking(False)
        self._socket: Final = launcher.requests
        self._pidfd: Final = launcher.pidfd
        self._loop: Final = asyncio.get_running_loop()
        self._seq = 0
        self._waiting: Final[dict[int, asyncio.Future[tuple[protocol.Reply, list[int]]]]] = {}
        self._unsent: Final[deque[tuple[bytes, list[int]]]] = deque()
        self.gone: Final = asyncio.Event()
        self._loop.add_reader(self._socket, self._on_readable)

    def close(self) -> None:
        """Hang up; the launcher ends, and running jobs go on."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket.close()
        self.gone.set()
        while self._unsent:
            _close_all(self._unsent.popleft()[1])
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(LauncherGoneError("the launcher has gone; running jobs go on"))
        self._waiting.clear()

    async def join(self) -> None:
        """After `close`: wait until the launcher has ended, and collect it."""
        await readable(self._pidfd)
        os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)  # noqa: ASYNC222  it has ended
        os.close(self._pidfd)

    def require_descriptors(self) -> None:
        """Raises LimitReachedError when a launch might run out of descriptors half way."""
        taken: list[int] = []
        try:
            for _ in range(SPARE_DESCRIPTORS):
                taken.append(os.dup(self._pidfd))  # noqa: PERF401  those that could be had are closed
        except OSError as error:
            raise LimitReachedError(f"cannot start a job: {describe_errno(error.errno or 0)}") from None
        finally:
            _close_all(taken)

    async def request_launch(
        self, launch: protocol.Launch, spec: JobSpec, descriptors: list[int]
    ) -> tuple[int, int]:
        """Start a job; give a pidfd of its init, which the caller owns, and the time of exec in ns.

        Raises LaunchError when the program cannot be executed, WorkdirError when its directory cannot be
        entered, KernelError for another step.
        """
        try:
            reply, fds = await self._request(launch, descriptors)
        except _ExecRefusedError as error:
            raise LaunchError(spec.argv[0], error.errno) from None
        except _WorkdirRefusedError as error:
            raise WorkdirError(spec.workdir, error.errno) from None
        if not isinstance(reply, protocol.Launched) or len(fds) != 1:
            raise ProtocolError("the launcher answered a launch with something else")
        return fds[0], reply.started_ns

    async def request_adopt(self, job_id: int) -> tuple[bool, int | None]:
        """Tell whether the job has a cgroup; give a pidfd of its init while that lives."""
        reply, fds = await self._request(protocol.Adopt(job_id))
        if not isinstance(reply, protocol.Adopted) or len(fds) != reply.alive:
            raise ProtocolError("the launcher answered an adoption with something else")
        return reply.known, fds[0] if fds else None

    async def request_job_ids(self) -> list[int]:
        """The ids of all jobs of which a cgroup or a scratch directory is there."""
        job_ids: list[int] = []
        while True:
            reply, _ = await self._request(protocol.JobIds(job_ids[-1] if job_ids else 0))
            if not isinstance(reply, protocol.JobIdPage):
                raise ProtocolError("the launcher answered a question for job ids with something else")
            job_ids += reply.job_ids
            if len(reply.job_ids) < protocol.MAX_JOB_IDS:
                return job_ids

    async def request_nothing(self) -> None:
        """Return when the launcher has answered: a question that no job id is the answer to."""
        await self._request(protocol.JobIds(2**63 - 1))

    async def request_terminate(self, job_id: int, signal: int) -> None:
        """A signal to every process of the job."""
        await self._request(protocol.Terminate(job_id, signal))

    async def request_kill(self, job_id: int, *, init_too: bool = False) -> None:
        """SIGKILL to every process of the job; its init records the end unless killed too."""
        await self._request(protocol.Kill(job_id, init_too))

    async def request_measure(self, job_ids: Sequence[int]) -> dict[int, UsageSample]:
        """What jobs use at this moment, by their ids; those that have ended are left out.

        At most protocol.MAX_MEASURED at a time.
        """
        reply, _ = await self._request(protocol.Measure(tuple(job_ids)))
        if not isinstance(reply, protocol.Measured):
            raise ProtocolError("the launcher answered a question for measurements with something else")
        return {
            job.job_id: UsageSample(
                time=from_ns(job.time_ns),
                cpu_usage_usec=job.cpu_usage_usec,
                memory_bytes=job.memory_bytes,
                io_read_bytes=job.io_read_bytes,
                io_write_bytes=job.io_write_bytes,
                pids=job.pids,
            )
            for job in reply.jobs
        }

    async def request_account(self, job_id: int) -> Usage | None:
        """What an ended job has used; None when its cgroup is gone."""
        reply, _ = await self._request(protocol.Account(job_id))
        if not isinstance(reply, protocol.Accounted):
            raise ProtocolError("the launcher answered a question for usage with something else")
        return reply.usage if reply.known else None

    async def request_remove(self, job_id: int) -> None:
        """Remove the cgroup and the scratch directory of an ended job."""
        await self._request(protocol.Remove(job_id))

    async def request_open_file(self, place: int) -> int:
        """The operator's file at that place, open for reading; the caller owns it.

        Raises KernelError or ConfigError when it cannot be opened.
        """
        reply, fds = await self._request(protocol.OpenFile(place))
        if not isinstance(reply, protocol.Opened) or len(fds) != 1:
            raise ProtocolError("the launcher answered a request for a file with something else")
        return fds[0]

    async def _request(
        self, request: protocol.Request, descriptors: list[int] | None = None
    ) -> tuple[protocol.Reply, list[int]]:
        if self.gone.is_set():
            raise LauncherGoneError("the launcher has gone; running jobs go on")
        self._seq += 1
        seq = self._seq
        data = protocol.encode(seq, request)
        waiting = self._waiting[seq] = self._loop.create_future()
        # Copies, since the caller may close its own when it is cancelled before they are sent.
        self._unsent.append((data, [os.dup(fd) for fd in descriptors or []]))
        self._send_unsent()
        try:
            reply, fds = await waiting
        except asyncio.CancelledError:
            # The reply is there already, or will come; either may carry a descriptor.
            if seq in self._waiting:
                self._waiting[seq] = waiting = self._loop.create_future()
            waiting.add_done_callback(_drop_reply)
            raise
        if isinstance(reply, protocol.Refused):
            raise _error_of(reply)
        return reply, fds

    def _send_unsent(self) -> None:
        while self._unsent:
            data, descriptors = self._unsent[0]
            ancillary = (
                [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
            )
            try:
                self._socket.sendmsg([data], ancillary)
            except BlockingIOError:
                self._loop.add_writer(self._socket, self._send_unsent)
                return
            except OSError:
                self.close()
                return
            self._unsent.popleft()
            _close_all(descriptors)
        self._loop.remove_writer(self._socket)

    def _on_readable(self) -> None:
        try:
            data, fds, flags, _ = socket.recv_fds(
                self._socket,
                protocol.MAX_DATAGRAM_BYTES + 1,
                protocol.MAX_DESCRIPTORS,
                socket.MSG_CMSG_CLOEXEC,
            )
        except BlockingIOError:
            return
        except OSError:
            data, fds, flags = b"", [], 0
        try:
            if not data or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise ProtocolError("the launcher hung up, or its reply was cut short")
            seq, reply = protocol.decode_reply(data)
            waiting = self._waiting.pop(seq, None)
            if waiting is None or waiting.done():
                raise ProtocolError("the launcher answered what nobody asked")
        except ProtocolError:
            _close_all(fds)
            self.close()
            return
        waiting.set_result((reply, fds))


class _ExecRefusedError(PjwError):
    """The launch got as far as exec, which failed."""

    def __init__(self, error: int) -> None:
        super().__init__("exec failed")
        self.errno: Final = error


class _WorkdirRefusedError(PjwError):
    """The launch got as far as the client's working directory, which cannot be entered."""

    def __init__(self, error: int) -> None:
        super().__init__("chdir failed")
        self.errno: Final = error


def _error_of(refused: protocol.Refused) -> PjwError:
    hint = refused.hint or None
    match refused.kind:
        case "exec":
            return _ExecRefusedError(refused.errno)
        case "workdir":
            return _WorkdirRefusedError(refused.errno)
        case "kernel" if refused.errno in RESOURCE_ERRNOS:
            error = KernelError(refused.operation, refused.subject, refused.errno, hint=hint)
            return LimitReachedError(str(error), hint=hint)
        case "kernel":
            return KernelError(refused.operation, refused.subject, refused.errno, hint=hint)
        case "invalid":
            return InvalidJobError(refused.operation, hint=hint)
        case "state":
            return JobStateError(refused.operation, hint=hint)
        case "config":
            return ConfigError(refused.operation, hint=hint)
        case _:
            return ProtocolError(f"the launcher refused for an unknown kind of reason, {refused.kind!r}")


async def readable(descriptor: int) -> None:
    """Wait until a descriptor is readable: a pidfd is when its process has ended."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)


def _drop_reply(future: asyncio.Future[tuple[protocol.Reply, list[int]]]) -> None:
    if not future.cancelled() and future.exception() is None:
        _close_all(future.result()[1])


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
