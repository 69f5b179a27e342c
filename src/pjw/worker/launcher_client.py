"""Asks the launcher: one method for each request; the answers are in `ROUTES` of launcher/dispatch.py."""

import asyncio
import errno
import socket
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pjw.errors import (
    RESOURCE_ERRNOS,
    ConfigError,
    CopyError,
    GpuError,
    InvalidJobError,
    JobStateError,
    KernelError,
    LauncherGoneError,
    LaunchError,
    LimitReachedError,
    MountError,
    MountNotFoundError,
    PjwError,
    ProtocolError,
    WorkdirError,
    describe_errno,
)
from pjw.launcher import protocol
from pjw.model import GroupUse, Job, JobSpec, Share, Usage, UsageSample
from pjw.process import close_all
from pjw.worker.job_rows import from_ns
from pjw.worker.launcher_process import LauncherProcess, collect
from pjw.worker.tasks import Flag


class LaunchBrokenOffError(Exception):
    """The launcher refused a launch whose init had its order, and may have executed the command.

    Where `is_left`, a part of it does not end; `request_departed` waits for that.
    """

    def __init__(self, refusal: PjwError, *, is_left: bool) -> None:
        """Make the error; *refusal* is the error for the caller that asked for the launch."""
        super().__init__(str(refusal))
        self.refusal: Final = refusal
        self.is_left: Final = is_left


# Done when the init of a job has ended; cancelled when the launcher ends first.
Ended = asyncio.Future[protocol.Ended]


@dataclass(frozen=True, slots=True)
class LauncherReply:
    """A reply and its descriptors; for a launch or an adoption also the future of that job's end."""

    reply: protocol.Reply
    descriptors: list[int]
    ended: Ended | None = None


@dataclass(frozen=True, slots=True)
class RunningInit:
    """The init of a running job: a pidfd, which the caller closes, and the future of its end."""

    pidfd: int
    ended: Ended


class LauncherClient:
    """The worker's end of the socket. Requests may overlap; replies find theirs by number.

    A launch and an adoption have a second reply, when the job's init has ended.
    """

    def __init__(self, launcher: LauncherProcess) -> None:
        """Take a launcher over; call from a running event loop."""
        launcher.requests.setblocking(False)
        self._socket: Final = launcher.requests
        self._pidfd: Final = launcher.pidfd
        self._loop: Final = asyncio.get_running_loop()
        self._seq = 0
        self._waiting: Final[dict[int, asyncio.Future[LauncherReply]]] = {}
        # of running jobs, by the number of their launch or adoption
        self._ends: Final[dict[int, Ended]] = {}
        self._unsent: Final[deque[tuple[bytes, list[int]]]] = deque()
        self.gone: Final = Flag()
        self._loop.add_reader(self._socket, self._on_readable)

    def close(self) -> None:
        """Hang up; the launcher ends, and running jobs go on."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket.close()
        self.gone.set()
        while self._unsent:
            close_all(self._unsent.popleft()[1])
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(LauncherGoneError("the launcher has gone; running jobs go on"))
        self._waiting.clear()
        for ended in self._ends.values():
            ended.cancel()
        self._ends.clear()

    async def join(self) -> None:
        """Wait, after `close`, until the launcher has ended, and collect it."""
        await readable(self._pidfd)
        collect(self._pidfd)

    async def request_launch(
        self, launch: protocol.Launch, spec: JobSpec, descriptors: list[int]
    ) -> tuple[RunningInit, int]:
        """Start a job; give its init and the time of exec in ns. Owns the descriptors, and empties the list.

        Raises LaunchError when the program cannot be executed, WorkdirError when its directory cannot be
        entered, KernelError for another step; LaunchBrokenOffError with one of these when it is not certain
        that the program was not executed.
        """
        answer = await self._ask(launch, descriptors)
        reply, fds = answer.reply, answer.descriptors
        if isinstance(reply, protocol.Refused):
            error = _launch_error_of(reply, spec)
            if reply.left or reply.kind in ("late", "setup"):
                raise LaunchBrokenOffError(error, is_left=reply.left)
            raise error
        if not isinstance(reply, protocol.Launched) or len(fds) != 1 or answer.ended is None:
            raise ProtocolError("the launcher answered a launch with something else")
        return RunningInit(fds[0], answer.ended), reply.started_ns

    async def request_exec(self, request: protocol.Exec, spec: JobSpec, descriptors: list[int]) -> int:
        """Start a session in a running job; return the time of exec in ns. Raises as a launch does.

        Owns the descriptors, and empties the list.
        """
        answer = await self._ask(request, descriptors)
        if isinstance(answer.reply, protocol.Refused):
            raise _launch_error_of(answer.reply, spec)
        if not isinstance(answer.reply, protocol.Entered):
            raise ProtocolError("the launcher answered a request for a session with something else")
        return answer.reply.started_ns

    async def request_connect(self, job_id: int, uid: int, port: int) -> int:
        """Return a socket connected to a port within a job; the caller owns it.

        Raises JobStateError when nothing listens there, and KernelError.
        """
        answer = await self._ask(protocol.Connect(job_id, uid, port))
        reply = answer.reply
        if isinstance(reply, protocol.Refused):
            if reply.kind == "connect":
                why = describe_errno(reply.errno)
                raise JobStateError(f"cannot connect to port {port} of job {job_id}: {why}")
            raise _error_of(reply)
        if not isinstance(reply, protocol.Opened) or len(answer.descriptors) != 1:
            raise ProtocolError("the launcher answered a request for a connection with something else")
        return answer.descriptors[0]

    async def request_egress(self, reports: int) -> None:
        """Have pjwd-egress started, which tells of connections by a socket; owns that descriptor.

        Raises InvalidJobError where the operator offers nothing on the network, and KernelError.
        """
        answer = await self._ask(protocol.Egress(), [reports])
        if isinstance(answer.reply, protocol.Refused):
            raise _error_of(answer.reply)

    async def request_adopt(
        self, job_id: int, job: Job | None = None, withdrawn: tuple[str, ...] = ()
    ) -> RunningInit | None:
        """Return the init of a job that still runs; None when it has ended.

        With the *job* its names on the network are there again but for those *withdrawn*, and the link that
        others may join it by.
        """
        request = protocol.Adopt(job_id)
        if job is not None and (job.allow or job.link):
            client = job.client_name if job.allow else ""
            request = protocol.Adopt(job_id, tuple(job.allow), client, job.link, withdrawn)
        answer = await self._request(request)
        reply, fds = answer.reply, answer.descriptors
        if not isinstance(reply, protocol.Adopted) or len(fds) != reply.alive:
            raise ProtocolError("the launcher answered an adoption with something else")
        return RunningInit(fds[0], answer.ended) if answer.ended is not None else None

    async def request_job_ids(self) -> list[int]:
        """Return the ids of all jobs that have a cgroup or a scratch directory."""
        job_ids: list[int] = []
        while True:
            reply = (await self._request(protocol.JobIds(job_ids[-1] if job_ids else 0))).reply
            if not isinstance(reply, protocol.JobIdPage):
                raise ProtocolError("the launcher answered a question for job ids with something else")
            job_ids += reply.job_ids
            if len(reply.job_ids) < protocol.MAX_JOB_IDS:
                return job_ids

    async def request_nothing(self) -> None:
        """Return when the launcher has answered: a question that no job id is the answer to."""
        await self._request(protocol.JobIds(2**63 - 1))

    async def request_terminate(self, job_id: int, signal: int) -> None:
        """Send a signal to every process of the job."""
        await self._request(protocol.Terminate(job_id, signal))

    async def request_kill(self, job_id: int, *, init_too: bool = False) -> None:
        """Send SIGKILL to every process of the job; its init records the end unless killed too."""
        await self._request(protocol.Kill(job_id, init_too))

    async def request_remaining(self, job_id: int) -> protocol.Remaining:
        """Return the processes left of a job that was killed: see protocol.Remaining."""
        reply = (await self._request(protocol.Remains(job_id))).reply
        if not isinstance(reply, protocol.Remaining):
            raise ProtocolError("the launcher answered a question for what remains with something else")
        return reply

    async def request_measure(self, job_ids: Sequence[int]) -> dict[int, UsageSample]:
        """Return the usage of jobs at this moment, by their ids; leave out those that have ended.

        At most protocol.MAX_MEASURED at a time.
        """
        reply = (await self._request(protocol.Measure(tuple(job_ids)))).reply
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
        """Return the usage of an ended job; None when its cgroup is gone."""
        reply = (await self._request(protocol.Account(job_id))).reply
        if not isinstance(reply, protocol.Accounted):
            raise ProtocolError("the launcher answered a question for usage with something else")
        return reply.usage if reply.known else None

    async def request_remove(self, job_id: int) -> None:
        """Remove the cgroup and the scratch directory of an ended job."""
        await self._request(protocol.Remove(job_id))

    async def request_departed(self, job_id: int) -> None:
        """Return when nothing is left of a launch that left something, however long that takes."""
        await self._request(protocol.Departed(job_id))

    async def request_set_share(self, uid: int, share: Share) -> tuple[str, ...]:
        """Give a client another share, if it has jobs; return in words the parts that could not be set."""
        reply = (await self._request(protocol.SetShare(uid, share))).reply
        if not isinstance(reply, protocol.ShareSet):
            raise ProtocolError("the launcher answered a request for a share with something else")
        return reply.not_set

    async def request_measure_client(self, uid: int) -> GroupUse:
        """Return the joint usage of a client's jobs at this moment."""
        reply = (await self._request(protocol.MeasureClient(uid))).reply
        if not isinstance(reply, protocol.ClientMeasured):
            raise ProtocolError("the launcher answered a question for a client with something else")
        return reply.use

    async def request_scratch_use(self) -> int:
        """Have scratch directories counted; return a pipe, the caller's, with a line for each job."""
        return await self._opened(protocol.ScratchUse())

    async def request_workspaces(self) -> list[tuple[int, str]]:
        """Return all workspaces that have a directory: the user ids of their clients, and their names."""
        found: list[tuple[int, str]] = []
        after = ""
        while True:
            reply = (await self._request(protocol.WorkspaceNames(after))).reply
            if not isinstance(reply, protocol.WorkspacePage):
                raise ProtocolError("the launcher answered a question for workspaces with something else")
            for after in reply.names:
                uid, _, name = after.partition("/")
                found.append((int(uid), name))
            if len(reply.names) < protocol.MAX_WORKSPACES:
                return found

    async def request_workspace_use(self, uid: int, name: str) -> int:
        """Have a workspace counted; return a pipe, the caller's, with its bytes and inodes."""
        return await self._opened(protocol.WorkspaceUse(uid, name))

    async def request_remove_workspace(self, uid: int, name: str) -> None:
        """Remove a workspace with all that is in it. Raises KernelError when something stays."""
        await self._request(protocol.RemoveWorkspace(uid, name))

    async def request_image_table(self) -> int:
        """Open the table of the operator's images for reading; the caller owns it. Raises KernelError."""
        return await self._opened(protocol.ImageTable())

    async def request_reload_mounts(self) -> None:
        """Have the operator's mounts read again. Raises KernelError or ConfigError."""
        await self._request(protocol.ReloadMounts())

    async def request_gpus(self, names: Sequence[str] = ()) -> protocol.GpuNames:
        """Return all GPUs of the machine, and the variables of those with these *names*.

        Raises KernelError, ConfigError and GpuError.
        """
        reply = (await self._request(protocol.Gpus(tuple(names)))).reply
        if not isinstance(reply, protocol.GpuNames):
            raise ProtocolError("the launcher answered a question for GPUs with something else")
        return reply

    async def request_open_file(self, place: int) -> int:
        """Open the operator's file at that place for reading; the caller owns it.

        Raises KernelError or ConfigError when it cannot be opened.
        """
        return await self._opened(protocol.OpenFile(place))

    async def request_audit_log(self) -> int:
        """Open the audit log for appending; the caller owns it. Raises KernelError or ConfigError."""
        return await self._opened(protocol.OpenAuditLog())

    async def _opened(self, request: protocol.Request) -> int:
        answer = await self._request(request)
        if not isinstance(answer.reply, protocol.Opened) or len(answer.descriptors) != 1:
            raise ProtocolError("the launcher answered a request for a file with something else")
        return answer.descriptors[0]

    async def _request(self, request: protocol.Request) -> LauncherReply:
        answer = await self._ask(request)
        if isinstance(answer.reply, protocol.Refused):
            raise _error_of(answer.reply)
        return answer

    async def _ask(self, request: protocol.Request, descriptors: list[int] | None = None) -> LauncherReply:
        # Ours now. They are closed when they are sent, while the launcher works, and not after its answer.
        owned = [] if descriptors is None else descriptors[:]
        if descriptors:
            descriptors.clear()
        if self.gone.is_set():
            close_all(owned)
            raise LauncherGoneError("the launcher has gone; running jobs go on")
        self._seq += 1
        seq = self._seq
        data = protocol.encode(seq, request)
        waiting: asyncio.Future[LauncherReply] = self._loop.create_future()
        self._waiting[seq] = waiting
        if self._unsent or not self._send(data, owned):
            self._unsent.append((data, owned))
            self._loop.add_writer(self._socket, self._send_unsent)
        else:
            close_all(owned)
        try:
            return await waiting
        except asyncio.CancelledError:
            # The reply is there already, or will come; either may carry a descriptor.
            if seq in self._waiting:
                self._waiting[seq] = waiting = self._loop.create_future()
            waiting.add_done_callback(_drop_reply)
            raise

    def _send(self, data: bytes, descriptors: Sequence[int]) -> bool:
        """Send a request, or hang up when that cannot be; False when the socket takes no more now."""
        try:
            if descriptors:
                socket.send_fds(self._socket, [data], descriptors)
            else:
                self._socket.send(data)
        except BlockingIOError:
            return False
        except OSError:
            self.close()
        return True

    def _send_unsent(self) -> None:
        while self._unsent:
            data, descriptors = self._unsent[0]
            if not self._send(data, descriptors):
                return
            if self._unsent:  # else we have hung up
                self._unsent.popleft()
                close_all(descriptors)
        if not self.gone.is_set():
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
            if isinstance(reply, protocol.Ended):
                self._on_ended(seq, reply)
            else:
                self._on_reply(seq, reply, fds)
        except ProtocolError:
            close_all(fds)
            self.close()

    def _on_reply(self, seq: int, reply: protocol.Reply, fds: list[int]) -> None:
        waiting = self._waiting.pop(seq, None)
        if waiting is None or waiting.done():
            raise ProtocolError("the launcher answered what nobody asked")
        ended = None
        if isinstance(reply, protocol.Launched) or (isinstance(reply, protocol.Adopted) and reply.alive):
            # made now, as the end may be the next thing that is read
            ended = self._ends[seq] = self._loop.create_future()
        waiting.set_result(LauncherReply(reply, fds, ended))

    def _on_ended(self, seq: int, reply: protocol.Ended) -> None:
        ended = self._ends.pop(seq, None)
        if ended is None:
            raise ProtocolError("the launcher told the end of what it had not launched")
        ended.set_result(reply)


def _launch_error_of(refused: protocol.Refused, spec: JobSpec) -> PjwError:
    match refused.kind:
        case "exec":
            return LaunchError(spec.argv[0], refused.errno)
        case "workdir":
            return WorkdirError(spec.workdir, refused.errno)
        case "unpack":
            # "unpack the upload: WHY for": a name in it is the client's own
            words = f"cannot {refused.operation.removesuffix(' for')}"
            return CopyError(words if words.isprintable() else ascii(words)[1:-1])
        case "image":
            # its words end with " for", as those above
            words = f"cannot {refused.operation.removesuffix(' for')}"
            if refused.operation.startswith("use"):
                return JobStateError(words, hint="make the image anew")
            return JobStateError(
                f"{words}: {describe_errno(refused.errno)}", hint="ask the operator: pjwd check"
            )
        case "setup" if refused.operation.startswith("listen") and refused.errno == errno.EADDRINUSE:
            # those who share its network are the only ones who can be there before it
            return JobStateError(
                f"cannot {refused.operation.removesuffix(' for')}: a job with the same link listens there",
                hint="end that listener, or give this job another --link",
            )
        case "device-at":
            return GpuError.of_edit(
                refused.operation.removeprefix("give the job ").removesuffix(" for"), refused.errno
            )
        case "mount-at":
            words = f"cannot {refused.operation.removesuffix(' for')}"
            return MountError(
                f"{words if words.isprintable() else ascii(words)[1:-1]}: {describe_errno(refused.errno)}",
                hint="mount it at an existing directory of the job's, or leave the path out",
                errno=refused.errno,
            )
        case _:
            return _error_of(refused)


def _error_of(refused: protocol.Refused) -> PjwError:
    hint = refused.hint or None
    match refused.kind:
        case "kernel" | "setup" as kind:
            # A job sees the paths of its set-up in its table of mounts.
            for_client = kind == "setup"
            error = KernelError(
                refused.operation, refused.subject, refused.errno, hint=hint, for_client=for_client
            )
            return LimitReachedError(str(error), hint=hint) if error.errno in RESOURCE_ERRNOS else error
        case "late":
            left = f", and does not end: {hint}" if hint else ""
            return LimitReachedError(
                f"cannot start {refused.subject}: its command was not executed {refused.operation}{left}",
                hint="the job's limits may be too tight for that, or the file system of its program too slow",
            )
        case "invalid":
            return InvalidJobError(refused.operation, hint=hint)
        case "mount":
            # the name of a mount; without an errno the client has none of this name
            name = refused.subject
            return MountError.of_source(name, refused.errno) if refused.errno else MountNotFoundError(name)
        case "gpu":
            return GpuError(refused.operation, hint=hint, errno=refused.errno or None)
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


def _drop_reply(future: asyncio.Future[LauncherReply]) -> None:
    if not future.cancelled() and future.exception() is None:
        close_all(future.result().descriptors)
