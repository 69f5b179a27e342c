"""Launches: each from its request to its answer, and as long as a failed one leaves something behind.

Nothing here waits. A launch in progress is a state that the next report of its init moves on, so a slow start
holds up no other.
"""

import errno
import resource
import select
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

from pjw.errors import ConfigError, GpuError, InvalidJobError, JobStateError, KernelError, PjwError
from pjw.launcher import protocol
from pjw.launcher.cdi import NO_EDITS, Edits, edits_of, read_devices
from pjw.launcher.departures import SETTLE_SECONDS, Waiter
from pjw.launcher.inits import Init
from pjw.launcher.jobs import SESSION_DESCRIPTORS, Jobs, Running
from pjw.launcher.mounts import Source
from pjw.launcher.parts import Answer, Parts, refusal_of
from pjw.launcher.phases import InitPhase
from pjw.launcher.processes import Timer, is_ready
from pjw.launcher.spawn import Cloned, Execed, Failed, Listening, listeners_for, read_report, send_order
from pjw.model import offered
from pjw.process import OwnedFds

# Descriptors of a launch while it is under way; and the reserve for all work that must go on when a client
# has taken the rest: to watch, account and remove, and to receive the next request.
LAUNCH_DESCRIPTORS: Final = 3
SPARE_DESCRIPTORS: Final = 40
# After so long a launch no longer keeps us from making inits ahead.
FILL_AFTER_SECONDS: Final = 0.05
# So long after a launch there is no hurry to make the next init ahead: meanwhile the server answers its
# client, and the job begins. Both share the processors with us.
REST_SECONDS: Final = 0.003
# The steps of init whose failure is not the host's alone, and the kind of refusal for each.
KINDS: Final = {step: step for step in ("exec", "workdir", "unpack", "image", "mount-at", "device-at")} | {
    "overlay": "image"
}


@dataclass(slots=True)
class LaunchInProgress:
    """A launch between its request and its answer, and while its failure leaves something behind."""

    seq: int
    request: protocol.Launch
    since: float
    # the descriptors of the request, until its init has its order
    files: OwnedFds
    # one of them that stays open until the job's end; empty once the job has it
    status: OwnedFds = field(default_factory=OwnedFds)
    # mounts of the operator's directories and devices, until then too; and their number in the end
    mounts: OwnedFds = field(default_factory=OwnedFds)
    mount_count: int = 0
    edits: Edits = NO_EDITS
    init: Init | None = None
    timer: Timer | None = None
    # the number of the request that waits for its end
    awaited_by: int | None = None
    # sockets that listen in the job, until its command was executed
    listeners: OwnedFds = field(default_factory=OwnedFds)
    is_joining: bool = False
    # callbacks for when its init's process is known, or the launch has failed
    followers: list[Callable[[], None]] = field(default_factory=list)

    @property
    def descriptors(self) -> int:
        """The number of descriptors that it keeps until its init has its order, mounts included."""
        return _kept(len(self.files), self.mount_count)


def _kept(files: int, mounts: int) -> int:
    return files + (mounts + 2 if mounts else 0) if files else 0


class Launches:
    """The launches under way, by their jobs."""

    def __init__(self, parts: Parts, jobs: Jobs) -> None:
        """Begin with no launch."""
        self._parts: Final = parts
        self._jobs: Final = jobs
        self._phases: Final = parts.phases
        self._launches: Final[dict[int, LaunchInProgress]] = {}
        # when a launch was last answered
        self._answered_at = 0.0

    def seconds_to_fill(self) -> float | None:
        """Return the delay before an init is made ahead: at once when idle, not while a start is under way.

        But a start that takes long does not count: else a client with slow programs would make all starts
        slow. None: no init is wanted.
        """
        pool = self._parts.pool
        if not pool.wants_more:
            return None
        if not self._launches:
            rest = self._answered_at + REST_SECONDS - time.monotonic() if pool.is_half_full else 0.0
            return max(0.0, rest)
        youngest = next(reversed(self._launches.values()))
        return max(0.0, youngest.since + FILL_AFTER_SECONDS - time.monotonic())

    def require_room(self, job_id: int, come: int) -> None:
        """Require room for *come* more descriptors. Raises KernelError (EMFILE)."""
        # A descriptor that cannot be had once init runs would end us, see main().
        room = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE_DESCRIPTORS
        parts = self._parts
        # a launch that waits for its mounts, or for a wrongly guessed init to end, keeps its descriptors
        kept = sum(launch.descriptors for launch in self._launches.values())
        begun = len(self._launches) + parts.policy.waiting_inits + 1
        # one more session may be about to begin
        held = self._jobs.descriptors + SESSION_DESCRIPTORS + len(parts.departures) + parts.egress.descriptors
        if held + kept + come + LAUNCH_DESCRIPTORS * begun > room:
            raise KernelError("launch", f"job {job_id}", errno.EMFILE)

    def answer_launch(self, seq: int, request: protocol.Launch, descriptors: OwnedFds) -> Answer:
        """Take an init that waits, or make one: cgroup, scratch directory, init; then give it its order."""
        parts, job_id = self._parts, request.job_id
        parts.policy.check_launch(request, descriptors)
        if request.allow and not parts.egress.has_begun:
            raise JobStateError("pjwd-egress, which connects jobs to names on the network, was not started")
        edits = self._edits_of(request.gpus, image=bool(request.image)) if request.gpus else NO_EDITS
        sources: list[Source] = [
            *offered(parts.mounts.sources, request.client_name, request.mounts),
            *edits.edits,
        ]
        come = _kept(len(descriptors), len(sources)) + len(listeners_for(request))
        self.require_room(job_id, come)
        self._phases.move(job_id, InitPhase.LAUNCHING)
        files = descriptors.take_all()
        launch = LaunchInProgress(
            seq, request, time.monotonic(), files, mount_count=len(sources), edits=edits
        )
        self._launches[job_id] = launch
        if sources:
            parts.mounts.open(sources, partial(self._on_opened, launch))
        else:
            self._take_init(launch)
        return None

    def _edits_of(self, names: tuple[str, ...], *, image: bool) -> Edits:
        """Return the edits for GPUs, as the operator's files are now. Raises GpuError."""
        policy = self._parts.policy
        try:
            edits = edits_of(read_devices(policy.gpus.kind, policy.gpus.cdi_dirs), names, image=image)
            policy.check_edits(edits)
        except (ConfigError, KernelError):
            # `gpus`, which comes before a launch, has said why
            raise GpuError.unknown() from None
        return edits

    def _on_opened(self, launch: LaunchInProgress, mounts: list[int] | PjwError) -> None:
        if isinstance(mounts, PjwError):
            self._on_taken(launch, mounts)
            return
        launch.mounts = OwnedFds(mounts)
        self._take_init(launch)

    def _take_init(self, launch: LaunchInProgress) -> None:
        self._parts.pool.take(launch.request, partial(self._on_taken, launch))

    def _on_taken(self, launch: LaunchInProgress, init: Init | PjwError) -> None:
        if isinstance(init, Init) and (mate := self._mate_to_be(launch.request)) is not None:
            mate.followers.append(lambda: self._on_taken(launch, init))
            return
        with launch.files, launch.mounts:
            if isinstance(init, PjwError):
                job_id = launch.request.job_id
                del self._launches[job_id]
                # no init was taken: one may wait for this job, and another of a wrong guess be on its way out
                self._parts.pool.discard_waiting(job_id)
                is_left = job_id in self._parts.departures
                self._phases.move(job_id, InitPhase.DISCARDED if is_left else InitPhase.ABSENT)
                self._parts.replies.refuse(launch.seq, _in_clients_words(init))
            else:
                self._order(launch, init)

    def _order(self, launch: LaunchInProgress, init: Init) -> None:
        launch.init = init
        parts, request = self._parts, launch.request
        try:
            parts.scratch.give_to(request.job_id, request.uid)
            with self._workspace_of(request) as workspace, self._link_of(request) as link:
                launch.is_joining = bool(link)
                needs_tool = request.upload or request.artifacts or request.archive
                tool = [parts.archive_program.descriptor()] if needs_tool else []
                # an init that failed already has said why, or its end says it
                with suppress(BrokenPipeError, ConnectionResetError):
                    send_order(
                        init.report,
                        request,
                        [*launch.files, *tool],
                        workspace=workspace,
                        mounts=launch.mounts,
                        link=link,
                        edits=launch.edits.edits,
                    )
            launch.status = OwnedFds([launch.files.take(request.files.index("status"))])
        except OSError as error:
            subject = f"job {request.job_id}"
            self._fail(launch, KernelError("give an order to the init of", subject, error.errno or 0))
            return
        except PjwError as error:
            self._fail(launch, error)
            return
        if init.pidfd >= 0:
            self._jobs.add(request.job_id, self._running(launch, init))
        launch.timer = parts.watcher.call_after(request.seconds_max, lambda: self._on_late(launch, init))
        parts.watcher.watch(init.report, lambda: self._on_report(launch, init))

    def _running(self, launch: LaunchInProgress, init: Init) -> Running:
        request = launch.request
        link = (request.uid, request.link) if request.link else None
        return Running(init.pidfd, init.cgroup, launch.seq, link=link, is_joining=launch.is_joining)

    def _link_of(self, request: protocol.Launch) -> OwnedFds:
        """Return the network namespace a job is to share; none for its own, which others may share then."""
        network = self._jobs.link_of((request.uid, request.link)) if request.link else -1
        return OwnedFds([network] if network >= 0 else [])

    def _mate_to_be(self, request: protocol.Launch) -> LaunchInProgress | None:
        """Return a launch whose network this one is to share, and whose init is not known yet."""
        if not request.link:
            return None
        for job_id, other in self._launches.items():
            is_launching = self._phases.of(job_id) is InitPhase.LAUNCHING
            is_unknown = is_launching and other.init is not None and other.init.pidfd < 0
            if is_unknown and (other.request.uid, other.request.link) == (request.uid, request.link):
                return other
        return None

    def _workspace_of(self, request: protocol.Launch) -> OwnedFds:
        """Make a mount for a job's workspace, if it has one. Raises JobStateError and KernelError."""
        if not request.workspace:
            return OwnedFds()
        if (request.uid, request.workspace) in self._parts.removals:
            raise JobStateError(f"the workspace {request.workspace} is being removed")
        return OwnedFds([self._parts.workspaces.tree(request.uid, request.workspace)])

    def _on_report(self, launch: LaunchInProgress, init: Init) -> None:
        match read_report(init.report):
            case Cloned(pidfd):
                init.pidfd = pidfd
                self._jobs.add(init.job_id, self._running(launch, init))
                _call_all(launch.followers)
            case Listening(sockets):
                launch.listeners = OwnedFds(sockets)
            case Execed(started_ns):
                self._on_executed(launch, init, started_ns)
            case Failed() as failed:
                # init ends by itself after its report; it is killed as well, for one that reported nothing
                kind = KINDS.get(failed.step, "setup")
                subject = f"job {init.job_id}"
                self._fail(launch, protocol.Refused(kind, failed.operation, subject, failed.errno, ""))

    def _on_executed(self, launch: LaunchInProgress, init: Init, started_ns: int) -> None:
        parts, job_id = self._parts, init.job_id
        try:
            init.cgroup.make_equal()
        except KernelError as error:
            self._fail(launch, error)
            return
        parts.watcher.unwatch(init.report)
        init.report.close()
        del self._launches[job_id]
        if launch.timer is not None:
            launch.timer.cancel()
        job = self._jobs[job_id]
        job.status = launch.status.take()
        job.is_joining = False
        if launch.listeners:
            self._jobs.accept_connections(job_id, launch.request, launch.listeners)
        self._jobs.note_running(job_id, job)
        parts.replies.send(launch.seq, protocol.Launched(started_ns), job.pidfd)
        self._answered_at = time.monotonic()

    def _on_late(self, launch: LaunchInProgress, init: Init) -> None:
        if is_ready(init.report.fileno(), select.POLLIN):
            # then we were the slow one
            again = partial(self._on_late, launch, init)
            launch.timer = self._parts.watcher.call_after(FILL_AFTER_SECONDS, again)
            return
        subject = f"job {init.job_id}"
        seconds = f"within {launch.request.seconds_max:.0f} s"
        self._fail(launch, protocol.Refused("late", seconds, subject, 0, ""))

    def _fail(self, launch: LaunchInProgress, why: PjwError | protocol.Refused) -> None:
        """Take all back, then answer: at a deadline at the latest, though something of it may be left."""
        assert launch.init is not None
        parts, job_id = self._parts, launch.request.job_id
        self._phases.move(job_id, InitPhase.REFUSED)
        if launch.timer is not None:
            launch.timer.cancel()
        self._jobs.forget(job_id)
        launch.listeners.close()
        launch.status.close()
        _call_all(launch.followers)
        refusal = why if isinstance(why, protocol.Refused) else refusal_of(why)

        def reply() -> None:
            parts.replies.send(launch.seq, refusal)

        def reply_late(late: KernelError) -> None:
            self._phases.move(job_id, InitPhase.LEFT)
            parts.replies.send(launch.seq, replace(refusal, hint=late.hint or refusal.hint, left=True))

        def on_gone() -> None:
            self._phases.move(job_id, InitPhase.ABSENT)
            del self._launches[job_id]
            if launch.awaited_by is not None:
                parts.replies.send(launch.awaited_by, protocol.Done())

        parts.pool.discard(launch.init, on_gone, SETTLE_SECONDS)
        parts.departures.wait_for(job_id, Waiter(reply, reply_late))

    def answer_departed(self, seq: int, request: protocol.Departed, _: OwnedFds) -> Answer:
        """Answer, maybe much later, when nothing is left of a refused launch."""
        launch = self._launches.get(request.job_id)
        if launch is None:
            return (protocol.Done(),)
        if launch.awaited_by is not None:
            raise JobStateError(f"the end of job {request.job_id} is waited for already")
        launch.awaited_by = seq
        return None


def _call_all(callbacks: list[Callable[[], None]]) -> None:
    while callbacks:
        callbacks.pop(0)()


def _in_clients_words(error: PjwError) -> PjwError:
    # an io limit where there is no disk: not the defaults, so this client's wish
    return InvalidJobError(str(error)) if isinstance(error, ConfigError) else error
