"""Answers the worker's requests: the route table and, for each request, its answer.

One thread and one selector. Nothing here waits for a job: a launch in progress is a state
that its next report moves on, so a slow start holds nobody up.
"""

import array
import errno
import os
import resource
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Final

from pjw.errors import ConfigError, InvalidJobError, JobStateError, KernelError, PjwError, ProtocolError
from pjw.launcher import protocol
from pjw.launcher.cgroup import Cgroup, Hierarchy, disks_under, open_hierarchy
from pjw.launcher.lock import hold_lock
from pjw.launcher.measure import measure
from pjw.launcher.operator_files import open_operator_file
from pjw.launcher.policy import Policy, check_job_id, check_signal, instance_name
from pjw.launcher.pool import Init, Pool
from pjw.launcher.processes import Watcher, collect, find_init, has_ended, send_signal
from pjw.launcher.scratch import Scratch
from pjw.launcher.spawn import Cloned, Execed, Failed, read_report, send_order
from pjw.model import Usage

# What a launch takes while it is under way; and what is kept for all else that must go on when a client
# has taken the rest: to watch, account and remove, and to receive the next request.
LAUNCH_DESCRIPTORS: Final = 3
# What has init send signal N is this signal and N (init/init.h, SIGNAL_FIRST).
INIT_SIGNAL_FIRST: Final = 33
SPARE_DESCRIPTORS: Final = 32


class Phase(Enum):
    """Where the conversation is."""

    GREETING = auto()
    SERVING = auto()


@dataclass(slots=True)
class LaunchInProgress:
    """A launch between its request and its answer."""

    seq: int
    init: Init


class Launcher:
    """One conversation with one worker."""

    def __init__(self, requests: socket.socket) -> None:
        self._requests: Final = requests
        self._watcher: Final = Watcher()
        self._phase = Phase.GREETING
        self._open = True
        self._policy: Policy
        self._hierarchy: Hierarchy
        self._scratch: Scratch
        self._pool: Pool
        # pidfds of the inits of jobs that have not been removed
        self._inits: Final[dict[int, int]] = {}
        # jobs whose launch has not been answered; until then they are nothing but its own
        self._launching: Final[set[int]] = set()

    def run(self) -> None:
        """Answer until the other end closes. Raises ProtocolError for a broken or hostile peer.

        Launches in progress are left to themselves then: init goes on without us, and the
        next launcher finds the job by its cgroup.
        """
        self._watcher.watch(self._requests, self._on_request)
        try:
            while self._open:
                # ahead of a start only when there is nothing else to do: not while one is under way
                idle = self._phase is Phase.SERVING and self._pool.wants_more and not self._launching
                if not self._watcher.run_once(wait=not idle) and idle:
                    self._pool.fill()
        finally:
            self.close()

    def close(self) -> None:
        """Let go of all but the jobs."""
        if self._phase is Phase.SERVING:
            self._pool.close()
            self._hierarchy.release()
        self._watcher.close()

    def _on_request(self) -> None:
        # One request a turn, so that reports are not held up behind a burst of requests.
        room = array.array("i", [0] * protocol.MAX_DESCRIPTORS)
        try:
            data, ancillary, flags, _ = self._requests.recvmsg(
                protocol.MAX_DATAGRAM_BYTES + 1,
                socket.CMSG_LEN(len(room) * room.itemsize),
                socket.MSG_CMSG_CLOEXEC,
            )
        except ConnectionResetError:
            # the other end has closed with replies of ours unread
            self._open = False
            return
        descriptors = array.array("i")
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors.frombytes(payload[: len(payload) - len(payload) % descriptors.itemsize])
        try:
            # Zero bytes are the end of the conversation; an empty datagram looks the same and
            # ends it as well.
            if not data:
                self._open = False
                return
            if flags & socket.MSG_TRUNC:
                raise ProtocolError("a request was cut short")
            seq, request = protocol.decode_request(data)
            route = ROUTES[request.op]
            if self._phase is not route.allowed_in:
                raise ProtocolError(f"a request {request.op} came out of phase")
            expected = protocol.descriptors_of(request)
            if flags & socket.MSG_CTRUNC and len(descriptors) < expected:
                # we had no room for those that are missing, which is no fault of the sender's
                subject = f"a request {request.op}"
                self._reply(seq, protocol.Refused("kernel", "receive", subject, errno.EMFILE, ""))
                return
            if flags & socket.MSG_CTRUNC or len(descriptors) != expected:
                raise ProtocolError(f"a request {request.op} came with {len(descriptors)} descriptors")
            self._answer(seq, route, request, list(descriptors))
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _answer(self, seq: int, route: "Route", request: protocol.Request, descriptors: list[int]) -> None:
        try:
            answer = route.answer(self, seq, request, descriptors)
        except PjwError as error:
            self._reply(seq, refusal_of(error))
            return
        if answer is not None:
            self._reply(seq, *answer)

    def _reply(self, seq: int, reply: protocol.Reply, *descriptors: int) -> None:
        ancillary = (
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        )
        try:
            self._requests.sendmsg([protocol.encode(seq, reply)], ancillary)
        except (BrokenPipeError, ConnectionResetError):
            self._open = False

    # --- the answers, in the order of a job's life

    def answer_hello(self, seq: int, request: protocol.Hello, descriptors: list[int]) -> "Answer":
        """Take the policy, the lock on the state directory and the cgroups; from here on serve."""
        self._policy = Policy.from_hello(request)
        hold_lock(request.state_dir)
        self._scratch = Scratch(request.state_dir)
        # Jobs read the host's root and write below the state directory. Without io limits no
        # disk need be there at all (a state directory on tmpfs or an overlay).
        disks, ready = [], protocol.Ready("", "")
        try:
            disks = disks_under(["/", request.state_dir])
        except ConfigError as error:
            ready = protocol.Ready(str(error), error.hint or "")
        self._hierarchy = open_hierarchy(
            instance_name(request.state_dir), io_devices=disks, supervisor_pids=(os.getpid(), os.getppid())
        )
        self._pool = Pool(self._watcher, self._policy, self._hierarchy, self._scratch)
        self._phase = Phase.SERVING
        return (ready,)

    def answer_launch(self, seq: int, request: protocol.Launch, descriptors: list[int]) -> "Answer":
        """Take an init that waits, or make one: cgroup, scratch directory, init; then give it its order."""
        job_id = request.job_id
        self._policy.check_launch(request, descriptors)
        if job_id in self._launching or job_id in self._inits:
            raise JobStateError(f"cannot launch job {job_id}: it is there already")
        self._require_room(job_id)
        try:
            init = self._pool.take(job_id, request.limits)
        except ConfigError as error:
            # an io limit where there is no disk: not the defaults, so this client's wish
            raise InvalidJobError(str(error)) from None
        try:
            self._scratch.give_to(job_id, request.uid)
            # an init that failed already has said why, or its end says it
            with suppress(BrokenPipeError, ConnectionResetError):
                send_order(init.report, request, descriptors)
        except (OSError, PjwError) as error:
            self._pool.discard(init)
            if isinstance(error, OSError):
                raise KernelError(
                    "give an order to the init of", f"job {job_id}", error.errno or 0
                ) from error
            raise
        self._launching.add(job_id)
        if init.pidfd >= 0:
            self._inits[job_id] = init.pidfd
        launch = LaunchInProgress(seq, init)
        self._watcher.unwatch(init.report)
        self._watcher.watch(init.report, lambda: self._on_report(launch))
        return None

    def _require_room(self, job_id: int) -> None:
        # A descriptor that cannot be had once init runs would end us, see main().
        room = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE_DESCRIPTORS
        if (
            len(self._inits) + LAUNCH_DESCRIPTORS * (len(self._launching) + self._policy.waiting_inits + 1)
            > room
        ):
            raise KernelError("launch", f"job {job_id}", errno.EMFILE)

    def _on_report(self, launch: LaunchInProgress) -> None:
        init = launch.init
        match read_report(init.report):
            case Cloned(pidfd):
                init.pidfd = self._inits[init.job_id] = pidfd
            case Execed(started_ns):
                self._watcher.unwatch(init.report)
                init.report.close()
                self._launching.discard(init.job_id)
                self._reply(launch.seq, protocol.Launched(started_ns), init.pidfd)
            case Failed() as failed:
                self._on_launch_failure(launch, failed)

    def _on_launch_failure(self, launch: LaunchInProgress, failed: Failed) -> None:
        # init ends by itself after its report; it is killed as well, for one that reported nothing. Its
        # cgroup's removal waits for what is still dying in it.
        job_id = launch.init.job_id
        self._launching.discard(job_id)
        self._inits.pop(job_id, None)
        kind = failed.step if failed.step in ("exec", "workdir") else "kernel"
        refusal = protocol.Refused(kind, failed.operation, f"job {job_id}", failed.errno, "")
        try:
            self._pool.discard(launch.init)
        except KernelError as error:
            refusal = refusal_of(error)
        self._reply(launch.seq, refusal)

    def answer_adopt(self, seq: int, request: protocol.Adopt, descriptors: list[int]) -> "Answer":
        """Find the init of a job by its cgroup, which only root may write."""
        self._check_not_launching(request.job_id)
        cgroup = self._hierarchy.find(request.job_id)
        if cgroup is None:
            return (protocol.Adopted(alive=False, known=False),)
        if request.job_id not in self._inits:
            pidfd = find_init(cgroup.pids)
            if pidfd is None:
                # processes without their init cannot be: the kernel ends them with it
                return (protocol.Adopted(alive=False, known=True),)
            self._inits[request.job_id] = pidfd
        return protocol.Adopted(alive=True, known=True), self._inits[request.job_id]

    def answer_job_ids(self, seq: int, request: protocol.JobIds, descriptors: list[int]) -> "Answer":
        """List the jobs of which anything is left: a cgroup, or a scratch directory.

        The second may be alone: a host that goes down forgets cgroups, and the last removals.
        """
        left = {*self._hierarchy.job_ids(), *self._scratch.job_ids()}
        found = sorted(job_id for job_id in left if job_id > request.after and job_id not in self._pool)
        return (protocol.JobIdPage(tuple(found[: protocol.MAX_JOB_IDS])),)

    def answer_terminate(self, seq: int, request: protocol.Terminate, descriptors: list[int]) -> "Answer":
        """Have init send a signal to every process of its job, at once, whatever they fork."""
        check_signal(request.signal)
        # the usual one as itself: also the init of an older version, which has been adopted, knows it
        usual = request.signal == signal.SIGTERM
        self._signal_init(request.job_id, signal.SIGTERM if usual else INIT_SIGNAL_FIRST + request.signal)
        return (protocol.Done(),)

    def answer_kill(self, seq: int, request: protocol.Kill, descriptors: list[int]) -> "Answer":
        """Have init kill every process of its job and record the end; or kill init as well."""
        if not request.init_too:
            self._signal_init(request.job_id, signal.SIGQUIT)
            return (protocol.Done(),)
        check_job_id(request.job_id)
        self._check_not_waiting(request.job_id)
        self._signal_init(request.job_id, signal.SIGKILL)
        cgroup = self._hierarchy.find(request.job_id)
        if cgroup is not None:
            cgroup.kill()
        return (protocol.Done(),)

    def _signal_init(self, job_id: int, number: int) -> None:
        # Only what this launcher launched or adopted is in the table: no request reaches a
        # process that is not the init of a job.
        pidfd = self._inits.get(job_id)
        if pidfd is not None:
            send_signal(pidfd, number)

    def answer_measure(self, seq: int, request: protocol.Measure, descriptors: list[int]) -> "Answer":
        """Read what jobs use that this launcher has launched or adopted."""
        if len(request.job_ids) > protocol.MAX_MEASURED:
            raise InvalidJobError(f"at most {protocol.MAX_MEASURED} jobs are measured at once")
        wanted = [job_id for job_id in request.job_ids if job_id in self._inits]
        return (measure(self._hierarchy, [job_id for job_id in wanted if job_id not in self._launching]),)

    def answer_account(self, seq: int, request: protocol.Account, descriptors: list[int]) -> "Answer":
        """Read what an ended job has used."""
        cgroup = self._ended_cgroup(request.job_id)
        if cgroup is None:
            return (protocol.Accounted(known=False, usage=Usage()),)
        return (protocol.Accounted(known=True, usage=cgroup.usage()),)

    def answer_remove(self, seq: int, request: protocol.Remove, descriptors: list[int]) -> "Answer":
        """Remove what an ended job leaves; answered later when its scratch directory is full."""
        job_id = request.job_id
        cgroup = self._ended_cgroup(job_id)
        pidfd = self._inits.pop(job_id, None)
        if pidfd is not None:
            # our child (CLONE_PARENT), unless it was adopted
            collect(pidfd)
        if self._scratch.remove_if_empty(job_id):
            return (_remove_cgroup(cgroup),)

        def on_removed() -> None:
            if self._scratch.remove_if_empty(job_id):
                self._reply(seq, _remove_cgroup(cgroup))
            else:
                path = self._scratch.path(job_id)
                self._reply(seq, protocol.Refused("kernel", "remove the scratch directory", path, 0, ""))

        self._watcher.reap_helper(self._scratch.spawn_removal(job_id), on_removed)
        return None

    def answer_open_file(self, seq: int, request: protocol.OpenFile, descriptors: list[int]) -> "Answer":
        """Hand out a certificate, a key or the like that the operator has replaced; never by a path."""
        descriptor = open_operator_file(self._policy.operator_file(request.place))
        try:
            self._reply(seq, protocol.Opened(), descriptor)
        finally:
            os.close(descriptor)
        return None

    def _check_not_launching(self, job_id: int) -> None:
        # Its cgroup may have no process yet, or no longer, and its init is not in the table yet: it
        # would look like a job that has ended, while the launch goes on.
        check_job_id(job_id)
        if job_id in self._launching:
            raise JobStateError(f"job {job_id} is being launched")
        self._check_not_waiting(job_id)

    def _check_not_waiting(self, job_id: int) -> None:
        # It has a cgroup and an init, and is no job yet.
        if job_id in self._pool:
            raise JobStateError(f"job {job_id} has not been launched")

    def _ended_cgroup(self, job_id: int) -> Cgroup | None:
        self._check_not_launching(job_id)
        pidfd = self._inits.get(job_id)
        cgroup = self._hierarchy.find(job_id)
        alive = not has_ended(pidfd) if pidfd is not None else cgroup is not None and cgroup.pids()
        if alive:
            raise JobStateError(f"job {job_id} has not ended")
        return cgroup


Answer = tuple[protocol.Reply] | tuple[protocol.Reply, int] | None


@dataclass(frozen=True, slots=True)
class Route:
    """Who answers a request, and in which phase it may come."""

    answer: Callable[[Launcher, int, Any, list[int]], Answer]
    allowed_in: Phase = Phase.SERVING


# The launcher's whole surface. Anything else, or anything early, ends it: such a peer is
# broken or hostile.
ROUTES: Final[dict[str, Route]] = {
    "hello": Route(Launcher.answer_hello, allowed_in=Phase.GREETING),
    "launch": Route(Launcher.answer_launch),
    "adopt": Route(Launcher.answer_adopt),
    "job_ids": Route(Launcher.answer_job_ids),
    "terminate": Route(Launcher.answer_terminate),
    "kill": Route(Launcher.answer_kill),
    "measure": Route(Launcher.answer_measure),
    "account": Route(Launcher.answer_account),
    "remove": Route(Launcher.answer_remove),
    "open_file": Route(Launcher.answer_open_file),
}


def _remove_cgroup(cgroup: Cgroup | None) -> protocol.Reply:
    # It goes last: while it is there, a later launcher knows that something is left.
    try:
        if cgroup is not None:
            cgroup.remove()
    except KernelError as error:
        return refusal_of(error)
    return protocol.Done()


def refusal_of(error: PjwError) -> protocol.Refused:
    """Word an error as a reply, its facts as fields."""
    hint = error.hint or ""
    match error:
        case KernelError(operation=operation, subject=subject, errno=number):
            return protocol.Refused("kernel", operation, subject, number, hint)
        case InvalidJobError():
            return protocol.Refused("invalid", str(error), "", 0, hint)
        case JobStateError():
            return protocol.Refused("state", str(error), "", 0, hint)
        case ConfigError():
            return protocol.Refused("config", str(error), "", 0, hint)
        case _:
            raise error
