"""Answers the worker's requests: the route table and, for each request, its answer.

One thread and one selector. Nothing here waits for a job: a launch in progress is a state that its next
report moves on, so a slow start holds up no other.
"""

import array
import errno
import os
import resource
import select
import signal
import socket
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from functools import partial
from typing import Any, Final

from pjw.errors import (
    ConfigError,
    GpuError,
    InvalidJobError,
    JobStateError,
    KernelError,
    MountError,
    MountNotFoundError,
    PjwError,
    ProtocolError,
)
from pjw.launcher import protocol
from pjw.launcher.accounts import keep_accounts
from pjw.launcher.archive_program import ArchiveProgram
from pjw.launcher.cdi import NO_EDITS, Edits, edits_of, read_devices
from pjw.launcher.cgroup import Cgroup, Hierarchy, disks_under, open_hierarchy
from pjw.launcher.departures import SETTLE_SECONDS, Departures, Waiter, describe
from pjw.launcher.egress import Egress
from pjw.launcher.image_store import ImageStore
from pjw.launcher.images import Images
from pjw.launcher.inits import Init, Pool
from pjw.launcher.job_users import claim_users
from pjw.launcher.lock import hold_lock
from pjw.launcher.measure import measure
from pjw.launcher.mounts import Mounts, Source, read_mounts_of
from pjw.launcher.operator_files import open_audit_log, open_operator_file
from pjw.launcher.phases import InitPhase, require_permitted
from pjw.launcher.policy import Policy, check_job_id, check_signal, instance_name, still_offered
from pjw.launcher.processes import (
    ENTERED_SIGNAL,
    INIT_SIGNAL_FIRST,
    Timer,
    Watcher,
    collect,
    find_init,
    has_ended,
    is_ready,
    network_of,
    say,
    send_signal,
)
from pjw.launcher.protocol import LAUNCH_SECONDS, SESSIONS_MAX
from pjw.launcher.removals import Removals
from pjw.launcher.scratch import Scratch
from pjw.launcher.scratch_use import spawn_count
from pjw.launcher.spawn import (
    Cloned,
    Connected,
    Execed,
    Failed,
    Listening,
    listeners_for,
    read_report,
    send_order,
)
from pjw.launcher.visible import check_visible
from pjw.launcher.workspaces import Workspaces
from pjw.model import Usage, is_image_key, offered
from pjw.process import close_all

# Descriptors of a launch while it is under way; those of a job until its end (the pidfd of its init, its
# status file); and the reserve for all work that must go on when a client has taken the rest: to watch,
# account and remove, and to receive the next request.
LAUNCH_DESCRIPTORS: Final = 3
JOB_DESCRIPTORS: Final = 2
SPARE_DESCRIPTORS: Final = 40
# Workspaces that are counted at once: the worker has two counted, but does not wait for each to the end.
COUNTED_AT_ONCE: Final = 4
# After so long a launch no longer keeps us from making inits ahead.
FILL_AFTER_SECONDS: Final = 0.05
# So long after a launch there is no hurry to make the next init ahead: meanwhile the server answers its
# client, and the job begins. Both share the processors with us.
REST_SECONDS: Final = 0.003
# The steps of init whose failure is not the host's alone, and the kind of refusal for each.
KINDS: Final = {step: step for step in ("exec", "workdir", "unpack", "image", "mount-at", "device-at")} | {
    "overlay": "image"
}
# its report, and the pidfd of the process that waits for its command
SESSION_DESCRIPTORS: Final = 2
# The attempts, and the pause before each, to make the listeners of an adopted job again: the process that had
# the former ones may just be about to end.
LISTEN_TRIES: Final = 10
LISTEN_PAUSE_SECONDS: Final = 0.2


class Phase(Enum):
    """The phase of the conversation with the worker."""

    GREETING = auto()
    SERVING = auto()


@dataclass(slots=True)
class Running:
    """A job whose init has its order, or was adopted, until its removal."""

    # of its init
    pidfd: int
    cgroup: Cgroup
    # the number of the request that its end answers: its launch, or its adoption
    seq: int
    # of its status file, for its accounts; -1: they stay in its cgroup until the worker has them
    status: int = -1
    # that were started by this launcher and have not ended
    sessions: list["Session"] = field(default_factory=list)
    # its user, and the name of the network that it shares; None: its own
    link: tuple[int, str] | None = None
    # whether it is on its way into that: until then its init has another
    is_joining: bool = False


@dataclass(slots=True, eq=False)
class Session:
    """Another command in a job that runs, by the process that waits for it."""

    # the number of the request that is answered when the command was executed
    seq: int
    report: socket.socket
    timer: Timer | None = None
    # -1 until it has reported that it is there
    pidfd: int = -1


@dataclass(slots=True)
class LaunchInProgress:
    """A launch between its request and its answer, and while its failure leaves something behind."""

    seq: int
    request: protocol.Launch
    since: float
    # the descriptors of the request, until its init has its order
    descriptors: list[int]
    # one of them that stays open until the job's end
    status: int = -1
    # mounts of the operator's directories and devices, until then too; and their number in the end
    mounts: list[int] = field(default_factory=list)
    mount_count: int = 0
    edits: Edits = NO_EDITS
    init: Init | None = None
    timer: Timer | None = None
    phase: InitPhase = InitPhase.LAUNCHING
    # the number of the request that waits for its end
    awaited_by: int | None = None
    # the processes that listen in the job, until its command was executed
    listeners: list[int] = field(default_factory=list)
    is_joining: bool = False
    # callbacks for when its init's process is known, or the launch has failed
    followers: list[Callable[[], None]] = field(default_factory=list)


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
        self._workspaces: Workspaces
        self._mounts: Mounts
        self._removals: Removals
        self._image_store: ImageStore
        self._images: Images
        self._pool: Pool
        self._egress: Egress
        # the name of our cgroups
        self._instance: str
        # whether scratch directories are being counted
        self._counting = False
        # the number of workspaces that are being counted
        self._counting_workspaces = 0
        # jobs that have not been removed
        self._jobs: Final[dict[int, Running]] = {}
        # jobs whose launch is not over; until then they are nothing but its own
        self._launching: Final[dict[int, LaunchInProgress]] = {}
        self._departures: Final = Departures(self._watcher)
        # of all jobs
        self._sessions = 0
        self._archive_program: Final = ArchiveProgram()
        # when a launch was last answered
        self._launched_at = 0.0

    def run(self) -> None:
        """Answer until the other end closes. Raises ProtocolError for a broken or hostile peer.

        Launches in progress are left to themselves then: init goes on without us, and the
        next launcher finds the job by its cgroup.
        """
        self._watcher.watch(self._requests, self._on_request)
        try:
            while self._open:
                seconds = self._seconds_to_fill()
                if not self._watcher.run_once(seconds) and seconds == 0:
                    self._pool.fill()
        finally:
            self.close()

    def _seconds_to_fill(self) -> float | None:
        """Return the delay before an init is made ahead: at once when idle, not while a start is under way.

        But a start that takes long does not count: else a client with slow programs would make all starts
        slow.
        """
        if self._phase is not Phase.SERVING or not self._pool.wants_more:
            return None
        if not self._launching:
            rest = self._launched_at + REST_SECONDS - time.monotonic() if self._pool.is_half_full else 0.0
            return max(0.0, rest)
        youngest = next(reversed(self._launching.values()))
        return max(0.0, youngest.since + FILL_AFTER_SECONDS - time.monotonic())

    def close(self) -> None:
        """Close all but the jobs."""
        self._watcher.unwatch(self._requests)
        if self._phase is Phase.SERVING:
            self._mounts.close()
            self._egress.close()
            self._pool.close()
            self._hierarchy.release()
            self._images.close()
            self._scratch.close()
        self._archive_program.close()
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
        # closed here, except those that an answer takes out
        held = list(descriptors)
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
            self._answer(seq, route, request, held)
        finally:
            close_all(held)

    def _answer(self, seq: int, route: "Route", request: protocol.Request, descriptors: list[int]) -> None:
        try:
            if isinstance(request, protocol.AboutJob):
                check_job_id(request.job_id)
                require_permitted(request.op, request.job_id, self._phase_of(request.job_id))
            answer = route.answer(self, seq, request, descriptors)
        except PjwError as error:
            self._reply(seq, refusal_of(error))
            return
        except OSError as error:
            # A process that was made and cannot be watched concerns more than one request, see main().
            if route.makes_processes:
                raise
            self._reply(
                seq, protocol.Refused("kernel", "answer", f"a request {request.op}", error.errno or 0, "")
            )
            return
        if answer is not None:
            self._reply(seq, *answer)

    def _phase_of(self, job_id: int) -> InitPhase:
        """Return the phase of a job's init. Only the container that holds its launch or job is asked."""
        if (launch := self._launching.get(job_id)) is not None:
            return launch.phase
        if (job := self._jobs.get(job_id)) is not None:
            # at once, and not only when the worker knows of its end
            return InitPhase.ENDED if has_ended(job.pidfd) else InitPhase.RUNNING
        return self._pool.phase_of(job_id)

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
        Policy.from_hello(request)
        check_visible(request.visible_paths)
        hold_lock(request.state_dir)
        uid_first, not_claimed = claim_users(request.state_dir, request.uid_first, request.uid_count)
        # again, with the range that was found: its end may be beyond the last user id
        self._policy = Policy.from_hello(replace(request, uid_first=uid_first))
        self._scratch = Scratch(
            request.state_dir, request.scratch_dir, request.scratch_bytes_max, request.scratch_inodes_max
        )
        self._workspaces = Workspaces(request.state_dir, uid_first, request.workspace_bytes_max)
        self._mounts = Mounts(self._watcher, self._policy.mounts)
        self._removals = Removals(self._watcher, self._scratch)
        # Jobs read the host's root and write to their scratch directories and, by init, to the state
        # directory. Without io limits no disk need be there at all (directories on tmpfs or an overlay).
        disks, no_disk, hint = [], "", ""
        try:
            disks = disks_under(["/", request.state_dir, self._scratch.directory])
        except ConfigError as error:
            no_disk, hint = str(error), error.hint or ""
        self._instance = instance_name(request.state_dir)
        self._hierarchy = open_hierarchy(
            self._instance, io_devices=disks, supervisor_pids=(os.getpid(), os.getppid())
        )
        not_set = [*filter(None, [not_claimed]), *self._hierarchy.set_sums(request.sums)]
        self._image_store = ImageStore(request.state_dir, self._scratch.places)
        self._images = Images(self._image_store, self._workspaces, self._scratch)
        self._pool = Pool(
            self._watcher, self._policy, self._hierarchy, self._scratch, self._departures, self._images
        )
        self._scratch.left = self._on_image_left
        self._sweep_images()
        self._egress = Egress(self._watcher, self._policy)
        self._phase = Phase.SERVING
        return protocol.Ready(no_disk, hint, uid_first, tuple(not_set)), self._scratch.descriptor

    def answer_launch(self, seq: int, request: protocol.Launch, descriptors: list[int]) -> "Answer":
        """Take an init that waits, or make one: cgroup, scratch directory, init; then give it its order."""
        job_id = request.job_id
        self._policy.check_launch(request, descriptors)
        if request.allow and not self._egress.has_begun:
            raise JobStateError("pjwd-egress, which connects jobs to names on the network, was not started")
        edits = self._edits_of(request.gpus, image=bool(request.image)) if request.gpus else NO_EDITS
        sources: list[Source] = [
            *offered(self._mounts.sources, request.client_name, request.mounts),
            *edits.edits,
        ]
        self._require_room(job_id, _kept_of(len(sources), descriptors) + len(listeners_for(request)))
        # its files are the launch's from here on
        launch = LaunchInProgress(
            seq, request, time.monotonic(), descriptors[:], mount_count=len(sources), edits=edits
        )
        descriptors.clear()
        self._launching[job_id] = launch
        if sources:
            self._mounts.open(sources, partial(self._on_opened, launch))
        else:
            self._take_init(launch)
        return None

    def _edits_of(self, names: tuple[str, ...], *, image: bool) -> Edits:
        """Return the edits for GPUs, as the operator's files are now. Raises GpuError."""
        offer = self._policy.gpus
        try:
            edits = edits_of(read_devices(offer.kind, offer.cdi_dirs), names, image=image)
            self._policy.check_edits(edits)
        except (ConfigError, KernelError):
            # `gpus`, which comes before a launch, has said why
            raise GpuError.unknown() from None
        return edits

    def _on_opened(self, launch: LaunchInProgress, mounts: list[int] | PjwError) -> None:
        if isinstance(mounts, PjwError):
            self._on_taken(launch, mounts)
            return
        launch.mounts = mounts
        self._take_init(launch)

    def _take_init(self, launch: LaunchInProgress) -> None:
        self._pool.take(launch.request, partial(self._on_taken, launch))

    def _on_taken(self, launch: LaunchInProgress, init: Init | PjwError) -> None:
        if isinstance(init, Init) and (mate := self._mate_to_be(launch.request)) is not None:
            mate.followers.append(lambda: self._on_taken(launch, init))
            return
        try:
            if isinstance(init, PjwError):
                del self._launching[launch.request.job_id]
                self._reply(launch.seq, refusal_of(_in_clients_words(init)))
            else:
                self._order(launch, init)
        finally:
            close_all(launch.descriptors)
            close_all(launch.mounts)

    def _order(self, launch: LaunchInProgress, init: Init) -> None:
        launch.init = init
        request = launch.request
        try:
            self._scratch.give_to(request.job_id, request.uid)
            workspace, link = self._open_workspace(request), self._linked(request)
            launch.is_joining = link >= 0
            try:
                # an init that failed already has said why, or its end says it
                with suppress(BrokenPipeError, ConnectionResetError):
                    needs_tool = request.upload or request.artifacts or request.archive
                    tool = [self._archive_program.descriptor()] if needs_tool else []
                    send_order(
                        init.report,
                        request,
                        [*launch.descriptors, *tool],
                        workspace,
                        launch.mounts,
                        link,
                        launch.edits.edits,
                    )
            finally:
                close_all([each for each in (workspace, link) if each >= 0])
            launch.status = launch.descriptors.pop(request.files.index("status"))
        except OSError as error:
            subject = f"job {request.job_id}"
            self._fail(launch, KernelError("give an order to the init of", subject, error.errno or 0))
            return
        except PjwError as error:
            self._fail(launch, error)
            return
        if init.pidfd >= 0:
            self._jobs[request.job_id] = self._running(launch, init)
        launch.timer = self._watcher.call_after(request.seconds_max, lambda: self._on_late(launch, init))
        self._watcher.watch(init.report, lambda: self._on_report(launch, init))

    def _running(self, launch: LaunchInProgress, init: Init) -> Running:
        request = launch.request
        link = (request.uid, request.link) if request.link else None
        return Running(init.pidfd, init.cgroup, launch.seq, link=link, is_joining=launch.is_joining)

    def _linked(self, request: protocol.Launch) -> int:
        """Return the network namespace a job is to share; -1 for its own, which others may share then.

        Only of a job of the same user, as our own records have it.
        """
        if not request.link:
            return -1
        link = (request.uid, request.link)
        mates = (job for job in self._jobs.values() if job.link == link and not job.is_joining)
        return next((network for job in mates if (network := network_of(job.pidfd)) >= 0), -1)

    def _mate_to_be(self, request: protocol.Launch) -> LaunchInProgress | None:
        """Return a launch whose network this one is to share, and whose init is not known yet."""
        if not request.link:
            return None
        for other in self._launching.values():
            is_unknown = (
                other.init is not None and other.init.pidfd < 0 and other.phase is InitPhase.LAUNCHING
            )
            if is_unknown and (other.request.uid, other.request.link) == (request.uid, request.link):
                return other
        return None

    def _listen(self, job_id: int, request: protocol.Launch | protocol.Adopt, sockets: list[int]) -> None:
        """Have the connections of a job accepted; takes the sockets."""
        allow = still_offered(request)
        self._egress.add(job_id, request.client_name, allow, listeners_for(request), sockets)
        sockets.clear()

    def _open_workspace(self, request: protocol.Launch) -> int:
        """Make a mount for a job's workspace; -1 without one. Raises JobStateError and KernelError."""
        if not request.workspace:
            return -1
        if (request.uid, request.workspace) in self._removals:
            raise JobStateError(f"the workspace {request.workspace} is being removed")
        return self._workspaces.tree(request.uid, request.workspace)

    def _require_room(self, job_id: int, come: int) -> None:
        # A descriptor that cannot be had once init runs would end us, see main().
        room = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE_DESCRIPTORS
        # a launch that waits for its mounts, or for a wrongly guessed init to end, keeps its descriptors
        kept = sum(_kept_of(launch.mount_count, launch.descriptors) for launch in self._launching.values())
        begun = len(self._launching) + self._policy.waiting_inits + 1
        held = JOB_DESCRIPTORS * len(self._jobs) + len(self._departures) + kept
        held += SESSION_DESCRIPTORS * (self._sessions + 1) + self._egress.descriptors
        if held + come + LAUNCH_DESCRIPTORS * begun > room:
            raise KernelError("launch", f"job {job_id}", errno.EMFILE)

    def _on_report(self, launch: LaunchInProgress, init: Init) -> None:
        match read_report(init.report):
            case Cloned(pidfd):
                init.pidfd = pidfd
                self._jobs[init.job_id] = self._running(launch, init)
                _call_all(launch.followers)
            case Listening(sockets):
                launch.listeners = list(sockets)
            case Execed(started_ns):
                try:
                    init.cgroup.make_equal()
                except KernelError as error:
                    self._fail(launch, error)
                    return
                self._watcher.unwatch(init.report)
                init.report.close()
                del self._launching[init.job_id]
                if launch.timer is not None:
                    launch.timer.cancel()
                job = self._jobs[init.job_id]
                job.status, launch.status = launch.status, -1
                job.is_joining = False
                if launch.listeners:
                    self._listen(init.job_id, launch.request, launch.listeners)
                self._watcher.watch(job.pidfd, partial(self._on_end, init.job_id, job))
                self._reply(launch.seq, protocol.Launched(started_ns), job.pidfd)
                self._launched_at = time.monotonic()
            case Failed() as failed:
                # init ends by itself after its report; it is killed as well, for one that reported nothing
                kind = KINDS.get(failed.step, "setup")
                subject = f"job {init.job_id}"
                self._fail(launch, protocol.Refused(kind, failed.operation, subject, failed.errno, ""))

    def _on_late(self, launch: LaunchInProgress, init: Init) -> None:
        if is_ready(init.report.fileno(), select.POLLIN):
            # then we were the slow one
            launch.timer = self._watcher.call_after(FILL_AFTER_SECONDS, lambda: self._on_late(launch, init))
            return
        subject = f"job {init.job_id}"
        seconds = f"within {launch.request.seconds_max:.0f} s"
        self._fail(launch, protocol.Refused("late", seconds, subject, 0, ""))

    def _fail(self, launch: LaunchInProgress, why: PjwError | protocol.Refused) -> None:
        """Take all back, then answer: at a deadline at the latest, though something of it may be left."""
        assert launch.init is not None
        job_id = launch.request.job_id
        launch.phase = InitPhase.REFUSED
        if launch.timer is not None:
            launch.timer.cancel()
        self._jobs.pop(job_id, None)
        close_all(launch.listeners)
        _call_all(launch.followers)
        if launch.status >= 0:
            close_all([launch.status])
        refusal = why if isinstance(why, protocol.Refused) else refusal_of(why)

        def reply() -> None:
            self._reply(launch.seq, refusal)

        def reply_late(late: KernelError) -> None:
            launch.phase = InitPhase.LEFT
            self._reply(launch.seq, replace(refusal, hint=late.hint or refusal.hint, left=True))

        def on_gone() -> None:
            del self._launching[job_id]
            if launch.awaited_by is not None:
                self._reply(launch.awaited_by, protocol.Done())

        self._pool.discard(launch.init, on_gone, SETTLE_SECONDS)
        self._departures.wait_for(job_id, Waiter(reply, reply_late))

    def answer_exec(self, seq: int, request: protocol.Exec, descriptors: list[int]) -> "Answer":
        """Start another command in a job that runs, as its user and in its cgroup; answer when executed."""
        job_id = request.job_id
        job = self._jobs[job_id]
        self._policy.check_exec(request, self._scratch.owner(job_id), descriptors)
        self._admit_session(job_id, job, len(descriptors))
        tool = self._archive_program.descriptor() if request.archive else None
        session = self._begin_session(job_id, job, seq, self._pool.enter(job_id, job.pidfd, job.cgroup, tool))
        try:
            # one that failed already has said why
            with suppress(BrokenPipeError, ConnectionResetError):
                send_order(session.report, request, descriptors)
        except OSError as error:
            failed = KernelError("give an order to", f"a session of job {job_id}", error.errno or 0)
            self._refuse_session(job, session, refusal_of(failed))
        return None

    def answer_connect(self, seq: int, request: protocol.Connect, descriptors: list[int]) -> "Answer":
        """Connect to a port of a job that runs, within its network; answer with the socket."""
        job_id = request.job_id
        job = self._jobs[job_id]
        self._policy.check_connect(request, self._scratch.owner(job_id))
        self._admit_session(job_id, job, 1)
        report = self._pool.connect(job_id, job.pidfd, job.cgroup, request.uid, request.port)
        self._begin_session(job_id, job, seq, report)
        return None

    def _admit_session(self, job_id: int, job: Running, come: int) -> None:
        """Have room for one more session, with which so many descriptors *come*.

        Raises JobStateError and KernelError.
        """
        # we know only those of our own
        if len(job.sessions) >= SESSIONS_MAX:
            raise JobStateError(f"job {job_id} has {SESSIONS_MAX} sessions, and no more may be")
        self._require_room(job_id, come)
        # before there is one, so that its init has heard of it at its end
        send_signal(job.pidfd, ENTERED_SIGNAL)

    def _begin_session(self, job_id: int, job: Running, seq: int, report: socket.socket) -> Session:
        session = Session(seq, report)
        job.sessions.append(session)
        self._sessions += 1
        session.timer = self._watcher.call_after(
            LAUNCH_SECONDS, lambda: self._on_late_session(job_id, job, session)
        )
        self._watcher.watch(report, lambda: self._on_session_report(job_id, job, session))
        return session

    def _on_session_report(self, job_id: int, job: Running, session: Session) -> None:
        match read_report(session.report):
            case Cloned(pidfd):
                session.pidfd = pidfd
            case Connected(connected):
                self._end_report(session)
                self._drop(job, session)
                self._hand_out(session.seq, connected)
            case Execed(started_ns):
                self._end_report(session)
                self._watcher.watch(session.pidfd, lambda: self._drop(job, session))
                self._reply(session.seq, protocol.Entered(started_ns))
            case Failed() as failed:
                if has_ended(job.pidfd):
                    ended = JobStateError(f"job {job_id} has ended")
                    self._refuse_session(job, session, refusal_of(ended))
                    return
                kind = failed.step if failed.step in ("exec", "workdir", "connect") else "setup"
                subject = f"a session of job {job_id}"
                self._refuse_session(
                    job, session, protocol.Refused(kind, failed.operation, subject, failed.errno, "")
                )

    def _on_late_session(self, job_id: int, job: Running, session: Session) -> None:
        subject = f"a session of job {job_id}"
        self._refuse_session(
            job, session, protocol.Refused("late", f"within {LAUNCH_SECONDS:.0f} s", subject, 0, "")
        )

    def _refuse_session(self, job: Running, session: Session, refusal: protocol.Refused) -> None:
        self._end_report(session)
        if session.pidfd >= 0:
            # one that reported nothing may be there; a part of the job, it ends with that at the latest
            send_signal(session.pidfd, signal.SIGKILL)
        self._drop(job, session)
        self._reply(session.seq, refusal)

    def _end_report(self, session: Session) -> None:
        if session.timer is not None:
            session.timer.cancel()
        self._watcher.unwatch(session.report)
        session.report.close()

    def _drop(self, job: Running, session: Session) -> None:
        """Forget a session that has ended, or was never started."""
        if session.pidfd >= 0:
            self._watcher.unwatch(session.pidfd)
            os.close(session.pidfd)
            session.pidfd = -1
        if session in job.sessions:
            job.sessions.remove(session)
            self._sessions -= 1

    def answer_departed(self, seq: int, request: protocol.Departed, descriptors: list[int]) -> "Answer":
        """Answer, maybe much later, when nothing is left of a refused launch."""
        launch = self._launching.get(request.job_id)
        if launch is None:
            return (protocol.Done(),)
        if launch.awaited_by is not None:
            raise JobStateError(f"the end of job {request.job_id} is waited for already")
        launch.awaited_by = seq
        return None

    def answer_adopt(self, seq: int, request: protocol.Adopt, descriptors: list[int]) -> "Answer":
        """Find the init of a job by its cgroup, which only root may write."""
        self._policy.check_network(request)
        cgroup = self._hierarchy.find(request.job_id)
        if cgroup is None:
            return (protocol.Adopted(alive=False, known=False),)
        job = self._jobs.get(request.job_id)
        if job is not None and has_ended(job.pidfd):
            return (protocol.Adopted(alive=False, known=True),)
        if job is None:
            pidfd = find_init(cgroup.pids)
            if pidfd is None:
                # processes without their init cannot be: it ends after them all
                return (protocol.Adopted(alive=False, known=True),)
            # a launcher that was killed may have left that to us
            cgroup.make_equal()
            job = self._jobs[request.job_id] = Running(pidfd, cgroup, seq)
            if request.link:
                job.link = (self._scratch.owner(request.job_id), request.link)
            self._watcher.watch(pidfd, partial(self._on_end, request.job_id, job))
        job.seq = seq
        if still_offered(request) and request.job_id not in self._egress and self._egress.has_begun:
            self._listen_again(job, request, LISTEN_TRIES)
        return protocol.Adopted(alive=True, known=True), job.pidfd

    def _listen_again(self, job: Running, request: protocol.Adopt, tries: int) -> None:
        """Have the listeners of an adopted job made again, by a process that enters it for that."""
        job_id = request.job_id
        if self._jobs.get(job_id) is not job or has_ended(job.pidfd):
            return

        def again(why: str) -> None:
            if tries > 1:
                self._watcher.call_after(
                    LISTEN_PAUSE_SECONDS, lambda: self._listen_again(job, request, tries - 1)
                )
            elif not has_ended(job.pidfd):
                say(f"job {job_id} reaches no names on the network any more: cannot {why}")

        send_signal(job.pidfd, ENTERED_SIGNAL)
        try:
            report = self._pool.listen(job_id, job.pidfd, job.cgroup, listeners_for(request))
        except KernelError as error:
            again(str(error))
            return

        def on_report() -> None:
            match read_report(report):
                case Cloned(pidfd):
                    os.close(pidfd)
                    return
                case Listening(sockets):
                    found = list(sockets)
                    if self._jobs.get(job_id) is job:
                        self._listen(job_id, request, found)
                    close_all(found)
                case Failed() as failed:
                    again(f"{failed.operation} it ({errno.errorcode.get(failed.errno, 'no reason')})")
            self._watcher.unwatch(report)
            report.close()

        self._watcher.watch(report, on_report)

    def answer_egress(self, seq: int, request: protocol.Egress, descriptors: list[int]) -> "Answer":
        """Start the process that connects jobs to names on the network, and keep it going."""
        if not self._policy.egress_hosts or not self._policy.egress_uid:
            raise InvalidJobError("the operator offers no names on the network")
        if self._egress.has_begun:
            raise JobStateError("pjwd-egress was started before")
        if not stat.S_ISSOCK(os.fstat(descriptors[0]).st_mode):
            raise InvalidJobError("what pjwd-egress is to tell of connections by is no socket")
        self._egress.begin(descriptors.pop())
        return (protocol.Done(),)

    def answer_job_ids(self, seq: int, request: protocol.JobIds, descriptors: list[int]) -> "Answer":
        """List the jobs of which anything is left: a cgroup, or a scratch directory.

        The second may be alone: a host that goes down forgets cgroups, and the last removals.
        """
        left = {*self._hierarchy.job_ids(), *self._scratch.job_ids()}
        found = sorted(
            job_id
            for job_id in left
            if job_id > request.after and self._pool.phase_of(job_id) is InitPhase.ABSENT
        )
        return (protocol.JobIdPage(tuple(found[: protocol.MAX_JOB_IDS])),)

    def answer_terminate(self, seq: int, request: protocol.Terminate, descriptors: list[int]) -> "Answer":
        """Have init send a signal to every process of its job, at once, however they fork."""
        check_signal(request.signal)
        # never SIGTERM itself: init takes that for the host's shutdown, and applies its own grace period
        self._signal_init(request.job_id, INIT_SIGNAL_FIRST + request.signal)
        return (protocol.Done(),)

    def answer_kill(self, seq: int, request: protocol.Kill, descriptors: list[int]) -> "Answer":
        """Have init kill every process of its job and record the end; or kill init as well."""
        job = self._jobs.get(request.job_id)
        self._signal_init(request.job_id, signal.SIGKILL if request.init_too else signal.SIGQUIT)
        if job is not None:
            try:
                if request.init_too:
                    job.cgroup.kill()
            finally:
                # init does so itself; not that of an older version, nor one that hangs
                job.cgroup.lift_throttles()
        return (protocol.Done(),)

    def answer_remains(self, seq: int, request: protocol.Remains, descriptors: list[int]) -> "Answer":
        """Look at the processes of a job that does not end."""
        job = self._jobs.get(request.job_id)
        return (describe(job.cgroup.pids() if job is not None else []),)

    def _signal_init(self, job_id: int, number: int) -> None:
        # Only jobs that this launcher launched or adopted are in the table: no request reaches a process that
        # is not the init of a job.
        job = self._jobs.get(job_id)
        if job is not None:
            send_signal(job.pidfd, number)

    def answer_measure(self, seq: int, request: protocol.Measure, descriptors: list[int]) -> "Answer":
        """Read the usage of jobs that this launcher has launched or adopted."""
        if len(request.job_ids) > protocol.MAX_MEASURED:
            raise InvalidJobError(f"at most {protocol.MAX_MEASURED} jobs are measured at once")
        running = [(job_id, self._jobs.get(job_id)) for job_id in request.job_ids]
        wanted = [(job_id, job.cgroup) for job_id, job in running if job and job_id not in self._launching]
        return (measure(wanted),)

    def _on_end(self, job_id: int, job: Running) -> None:
        """Tell the end of a job's init, with its accounts; first remove the job where that is safe and quick.

        Safe: the accounts are where no crash loses them before the cgroup goes. Quick: the job left no files.
        Else all stays as it is until the worker has written the end down, and asks for the removal.
        """
        self._watcher.unwatch(job.pidfd)
        self._egress.remove(job_id)
        known, removed, usage = False, False, Usage()
        # The worker asks for a step that fails now, and so learns why.
        with suppress(KernelError, OSError):
            usage = job.cgroup.usage()
            known = True
            if job.status >= 0 and keep_accounts(job.status, usage):
                removed = self._scratch.remove_if_empty(job_id) and job.cgroup.try_remove()
        if removed:
            self._let_go(job_id)
        self._reply(job.seq, protocol.Ended(known, usage, removed))

    def _let_go(self, job_id: int) -> None:
        """Close the descriptors and records of a job that has ended."""
        job = self._jobs.pop(job_id, None)
        if job is None:
            return
        self._watcher.unwatch(job.pidfd)
        # our child (CLONE_PARENT), unless it was adopted
        collect(job.pidfd)
        if job.status >= 0:
            close_all([job.status])

    def answer_account(self, seq: int, request: protocol.Account, descriptors: list[int]) -> "Answer":
        """Read an ended job's usage."""
        cgroup = self._ended_cgroup(request.job_id)
        if cgroup is None:
            return (protocol.Accounted(known=False, usage=Usage()),)
        return (protocol.Accounted(known=True, usage=cgroup.usage()),)

    def answer_remove(self, seq: int, request: protocol.Remove, descriptors: list[int]) -> "Answer":
        """Remove an ended job's remains; answered later when its scratch directory is full."""
        job_id = request.job_id
        cgroup = self._ended_cgroup(job_id)
        self._let_go(job_id)
        if self._scratch.remove_if_empty(job_id):
            self._remove_cgroup(seq, job_id, cgroup)
            return None

        def on_removed() -> None:
            if self._scratch.remove_if_empty(job_id):
                self._remove_cgroup(seq, job_id, cgroup)
            else:
                path = self._scratch.path(job_id)
                self._reply(seq, protocol.Refused("kernel", "remove the scratch directory", path, 0, ""))

        self._removals.begin(job_id, on_removed)
        return None

    def _remove_cgroup(self, seq: int, job_id: int, cgroup: Cgroup | None) -> None:
        # It goes last: while it is there, a later launcher knows that something is left.
        done = Waiter(
            lambda: self._reply(seq, protocol.Done()), lambda late: self._reply(seq, refusal_of(late))
        )
        if cgroup is None or job_id in self._departures:
            self._departures.wait_for(job_id, done)
            return
        self._departures.begin(job_id, cgroup)
        self._departures.go_on(job_id)
        self._departures.wait_for(job_id, done)

    def answer_set_share(self, seq: int, request: protocol.SetShare, descriptors: list[int]) -> "Answer":
        """Give a client another share of the host, beside the jobs that it has."""
        self._policy.check_uid(request.uid)
        return (protocol.ShareSet(tuple(self._pool.set_share(request.uid, request.share))),)

    def answer_measure_client(
        self, seq: int, request: protocol.MeasureClient, descriptors: list[int]
    ) -> "Answer":
        """Read the joint usage of a client's jobs."""
        self._policy.check_uid(request.uid)
        return (protocol.ClientMeasured(self._hierarchy.use_of(request.uid)),)

    def answer_scratch_use(self, seq: int, request: protocol.ScratchUse, descriptors: list[int]) -> "Answer":
        """Have a process count the files in jobs' scratch directories; one at a time."""
        if self._counting:
            raise JobStateError("scratch directories are being counted")
        try:
            pid, words = spawn_count(self._instance, self._scratch.places)
        except OSError as error:
            raise KernelError("count", "scratch directories", error.errno or 0) from error
        self._counting = True
        self._watcher.reap_helper(pid, self._on_counted)
        try:
            self._reply(seq, protocol.Opened(), words)
        finally:
            os.close(words)
        return None

    def _on_counted(self) -> None:
        self._counting = False

    def answer_workspace_names(
        self, seq: int, request: protocol.WorkspaceNames, descriptors: list[int]
    ) -> "Answer":
        """List the directories of workspaces, a page at a time."""
        return (protocol.WorkspacePage(self._workspaces.page(request.after)),)

    def answer_workspace_use(
        self, seq: int, request: protocol.WorkspaceUse, descriptors: list[int]
    ) -> "Answer":
        """Have a process count a workspace; some at a time, as one may have told all."""
        self._policy.check_workspace(request)
        if self._counting_workspaces >= COUNTED_AT_ONCE:
            raise JobStateError(f"{COUNTED_AT_ONCE} workspaces are being counted, and no more may be")
        try:
            pid, words = self._workspaces.spawn_count(request.uid, request.name)
        except OSError as error:
            raise KernelError("count", f"the workspace {request.name}", error.errno or 0) from error
        self._counting_workspaces += 1
        self._watcher.reap_helper(pid, self._on_workspace_counted)
        return self._hand_out(seq, words)

    def _on_workspace_counted(self) -> None:
        self._counting_workspaces -= 1

    def answer_remove_workspace(
        self, seq: int, request: protocol.RemoveWorkspace, descriptors: list[int]
    ) -> "Answer":
        """Remove a workspace, in its turn beside jobs' remains; the worker knows which jobs use it."""
        self._policy.check_workspace(request)
        uid, name = request.uid, request.name
        if (uid, name) not in self._removals and self._workspaces.remove_if_empty(uid, name):
            return (protocol.Done(),)

        def on_removed() -> None:
            if self._workspaces.remove_if_empty(uid, name):
                self._reply(seq, protocol.Done())
            else:
                path = self._workspaces.path(uid, name)
                self._reply(seq, protocol.Refused("kernel", "remove the workspace", path, 0, ""))

        spawn = partial(self._workspaces.spawn_removal, uid, name)
        self._removals.begin_workspace(uid, name, spawn, on_removed)
        return None

    def _on_image_left(self, image: str) -> None:
        # an operator may have removed it while the job ran; the worker removes the images that clients have
        # loaded
        with suppress(KernelError):
            if not is_image_key(image) and not self._image_store.is_named(image):
                self._sweep_images()

    def _sweep_images(self) -> None:
        for pid, path in self._images.sweep():
            self._watcher.reap_helper(pid, partial(self._images.removed, path))

    def answer_image_table(self, seq: int, request: protocol.ImageTable, descriptors: list[int]) -> "Answer":
        """Hand out the table of the operator's images: their names, and how jobs begin in each."""
        return self._hand_out(seq, self._image_store.open_table())

    def answer_reload_mounts(
        self, seq: int, request: protocol.ReloadMounts, descriptors: list[int]
    ) -> "Answer":
        """Take the operator's mounts anew, from the file that root named in the greeting, and root owns."""
        path = self._policy.configuration
        if not path:
            raise InvalidJobError("there is no configuration")
        sources = read_mounts_of(open_operator_file(path), path)
        self._policy.check_sources(sources)
        self._mounts.sources = sources
        return (protocol.Done(),)

    def answer_gpus(self, seq: int, request: protocol.Gpus, descriptors: list[int]) -> "Answer":
        """Return the GPUs of the machine, and the variables of some."""
        offer = self._policy.gpus
        devices = read_devices(offer.kind, offer.cdi_dirs) if offer.kind else ()
        edits = edits_of(devices, request.names)
        self._policy.check_edits(edits)
        return (protocol.GpuNames(tuple(device.name for device in devices), edits.environment),)

    def answer_open_file(self, seq: int, request: protocol.OpenFile, descriptors: list[int]) -> "Answer":
        """Hand out a certificate, a key or the like that the operator has replaced; never by a path."""
        return self._hand_out(seq, open_operator_file(self._policy.operator_file(request.place)))

    def answer_open_audit_log(
        self, seq: int, request: protocol.OpenAuditLog, descriptors: list[int]
    ) -> "Answer":
        """Hand out the audit log for appending, after the operator has moved the old one."""
        if not self._policy.audit_log:
            raise InvalidJobError("there is no audit log")
        return self._hand_out(seq, open_audit_log(self._policy.audit_log))

    def _hand_out(self, seq: int, descriptor: int) -> "Answer":
        try:
            self._reply(seq, protocol.Opened(), descriptor)
        finally:
            os.close(descriptor)
        return None

    def _ended_cgroup(self, job_id: int) -> Cgroup | None:
        cgroup = self._hierarchy.find(job_id)
        # an earlier launcher's, which was not adopted
        if job_id not in self._jobs and cgroup is not None and cgroup.pids():
            raise JobStateError(f"job {job_id} has not ended")
        return cgroup


Answer = tuple[protocol.Reply] | tuple[protocol.Reply, int] | None


@dataclass(frozen=True, slots=True)
class Route:
    """The method that answers a request, the phase it may come in, and whether that makes processes."""

    answer: Callable[[Launcher, int, Any, list[int]], Answer]
    allowed_in: Phase = Phase.SERVING
    makes_processes: bool = False


# The launcher's whole surface. Anything else, or anything early, ends it: such a peer is
# broken or hostile.
ROUTES: Final[dict[str, Route]] = {
    "hello": Route(Launcher.answer_hello, allowed_in=Phase.GREETING),
    "launch": Route(Launcher.answer_launch, makes_processes=True),
    "adopt": Route(Launcher.answer_adopt),
    "job_ids": Route(Launcher.answer_job_ids),
    "terminate": Route(Launcher.answer_terminate),
    "kill": Route(Launcher.answer_kill),
    "remains": Route(Launcher.answer_remains),
    "measure": Route(Launcher.answer_measure),
    "account": Route(Launcher.answer_account),
    "remove": Route(Launcher.answer_remove, makes_processes=True),
    "exec": Route(Launcher.answer_exec, makes_processes=True),
    "connect": Route(Launcher.answer_connect, makes_processes=True),
    "departed": Route(Launcher.answer_departed),
    "scratch_use": Route(Launcher.answer_scratch_use, makes_processes=True),
    "workspace_names": Route(Launcher.answer_workspace_names),
    "workspace_use": Route(Launcher.answer_workspace_use, makes_processes=True),
    "remove_workspace": Route(Launcher.answer_remove_workspace, makes_processes=True),
    "image_table": Route(Launcher.answer_image_table),
    "reload_mounts": Route(Launcher.answer_reload_mounts),
    "gpus": Route(Launcher.answer_gpus),
    "open_file": Route(Launcher.answer_open_file),
    "open_audit_log": Route(Launcher.answer_open_audit_log),
    "egress": Route(Launcher.answer_egress, makes_processes=True),
    "set_share": Route(Launcher.answer_set_share),
    "measure_client": Route(Launcher.answer_measure_client),
}


def _kept_of(mount_count: int, descriptors: list[int]) -> int:
    """Return the number of descriptors that a launch keeps until its init has its order, mounts included."""
    mounts = mount_count + 2 if mount_count else 0
    return len(descriptors) + mounts if descriptors else 0


def _call_all(callbacks: list[Callable[[], None]]) -> None:
    while callbacks:
        callbacks.pop(0)()


def _in_clients_words(error: PjwError) -> PjwError:
    # an io limit where there is no disk: not the defaults, so this client's wish
    return InvalidJobError(str(error)) if isinstance(error, ConfigError) else error


def refusal_of(error: PjwError) -> protocol.Refused:
    """Word an error as a reply, its facts as fields."""
    hint = error.hint or ""
    match error:
        case KernelError(operation=operation, subject=subject, errno=number):
            return protocol.Refused("kernel", operation, subject, number, hint)
        case MountError(mount=str(name), errno=int(number)):
            return protocol.Refused("mount", "", name, number, hint)
        case MountNotFoundError(mount=name):
            return protocol.Refused("mount", "", name, 0, hint)
        case GpuError(errno=number):
            return protocol.Refused("gpu", str(error), "", number or 0, hint)
        case InvalidJobError():
            return protocol.Refused("invalid", str(error), "", 0, hint)
        case JobStateError():
            return protocol.Refused("state", str(error), "", 0, hint)
        case ConfigError():
            return protocol.Refused("config", str(error), "", 0, hint)
        case _:
            raise error
