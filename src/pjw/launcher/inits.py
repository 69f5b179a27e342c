"""Inits that wait for a job: in their cgroup and namespaces, with their mounts; only the order is missing.

Making all that takes the kernel milliseconds, and most of it is the same for each job. The pool guesses the
rest: ids follow one another, so it knows the next job's id; it takes the client, the image and the limits of
the last job. A wrong guess is never used: that start makes its own init, as without a pool.

A waiting init equals the one that a start would make. When the host's mounts change, so that a job would be
shown other file systems, the pool discards all inits that wait. It also replaces old ones, since an overlay
goes on to show entries that were looked up in it before the host changed them
(Documentation/filesystems/overlayfs.rst, "Changes to underlying filesystems").
"""

import os
import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from typing import Final

from pjw.errors import ConfigError, JobStateError, KernelError, PjwError
from pjw.launcher.cgroup import Cgroup, Hierarchy
from pjw.launcher.departures import Departures, Waiter
from pjw.launcher.images import Images
from pjw.launcher.phases import InitPhase, Phases
from pjw.launcher.policy import JOB_ID_MAX, Policy
from pjw.launcher.processes import Watcher, has_ended, is_ready
from pjw.launcher.protocol import Launch
from pjw.launcher.scratch import Scratch
from pjw.launcher.spawn import Cloned, Spawner, read_report
from pjw.launcher.visible import MOUNTINFO, Place, places_of, read_mounts, template_of
from pjw.model import Limits, Share
from pjw.process import close_all

# Seconds that an init waits before a new one replaces it.
OLDEST_SECONDS: Final = 60.0
# Seconds that a start waits for a wrong guess to go. Nothing blocks such an init, so only a very busy host
# makes it late.
GUESS_LATE_SECONDS: Final = 30.0


@dataclass(slots=True, eq=False)
class Init:
    """One init before its job: `pidfd` is -1 until it has reported that it is there."""

    job_id: int
    uid: int
    limits: Limits
    cgroup: Cgroup
    report: socket.socket
    made_at: float
    image: str = ""
    read_only: bool = False
    pidfd: int = -1


class InitPool:
    """The inits that wait, by the ids of the jobs that they are for."""

    def __init__(
        self,
        watcher: Watcher,
        policy: Policy,
        hierarchy: Hierarchy,
        scratch: Scratch,
        departures: Departures,
        images: Images,
        phases: Phases,
        spawner: Spawner,
        oldest_seconds: float = OLDEST_SECONDS,
    ) -> None:
        """Prepare the mounts. Raises ConfigError for a path that cannot be shown to jobs."""
        self._watcher: Final = watcher
        self._departures: Final = departures
        self._phases: Final = phases
        self._open = True
        self._policy: Final = policy
        self._size: Final = policy.waiting_inits
        self._hierarchy: Final = hierarchy
        self._scratch: Final = scratch
        self._images: Final = images
        self._spawner: Final = spawner
        self._waiting: Final[dict[int, Init]] = {}
        self._wanted: list[int] = []
        # the client, its share, and the limits that are guessed
        self._uid = 0
        self._share: Share
        self._limits: Limits
        self._image, self._read_only = "", False
        self._oldest_seconds: Final = oldest_seconds
        self._is_renewing = False
        self._are_stale = False
        self._mounts: Final = _HostMounts(watcher, self._on_mounts)
        self._places: tuple[Place, ...] = ()
        self._look()

    def _look(self) -> None:
        """Have inits show the host's present mounts. Raises ConfigError, KernelError."""
        table = read_mounts()
        places = places_of(self._policy.visible_paths, self._policy.hidden_paths, table)
        # the host's own directories that init takes for a job
        taken = (self._spawner.scratch, *self._hierarchy.shown)
        places += template_of(places, taken, table)
        if places != self._places:
            self._places = places
            self._spawner.show(places)

    @property
    def wants_more(self) -> bool:
        """Whether `fill` has something to do, when there is time for it."""
        return self._next_wanted() is not None

    @property
    def is_half_full(self) -> bool:
        """Whether the next start will hardly have to wait for `fill`."""
        return 2 * len(self._waiting) >= self._size

    def _next_wanted(self) -> int | None:
        # one that a wrong guess has the place of is wanted when that has gone
        absent = InitPhase.ABSENT
        return next((each for each in reversed(self._wanted) if self._phases.of(each) is absent), None)

    def take(self, request: Launch, then: Callable[[Init | PjwError], None]) -> None:
        """Give *then* the init for a job, made now if none waits; guess the next wish from it.

        Later, where the init of a wrong guess is in its way and has to go first. *then* becomes the owner of
        the init: of its report, its pidfd, its end. With an error nothing was made.
        """
        job_id, limits, uid, share = request.job_id, request.limits, request.uid, request.share
        image, read_only = request.image, request.read_only
        try:
            self._empty_if_stale()
            if self._hierarchy.share_of(uid) != share:
                self.set_share(uid, share)
        except ConfigError as error:
            then(KernelError("show the host's file systems to", f"job {job_id}", 0, hint=str(error)))
            return
        except KernelError as error:
            then(error)
            return
        init = self._waiting.pop(job_id, None)
        guessed = init is not None and (init.uid, init.image, init.read_only) == (uid, image, read_only)
        if init is not None and not (guessed and _are_alike(init.limits, limits) and _is_alive(init)):
            self.discard(init)
            init = None
        if init is not None:
            self._guess(init, share)
            then(init)
            return

        def make() -> None:
            # a reload may have given its client another meanwhile
            share_now = self._hierarchy.share_of(uid) or share
            try:
                made = self._make(job_id, limits, uid, share_now, image, read_only=read_only)
            except PjwError as error:
                then(error)
                return
            self._guess(made, share_now)
            then(made)

        self._departures.wait_for(job_id, Waiter(make, then))

    def set_share(self, uid: int, share: Share) -> list[str]:
        """Give a client with jobs another share; return in words the unset parts. Raises KernelError."""
        # a quota of processor time that was guessed would keep its client's above it, on v1
        for job_id in [init.job_id for init in self._waiting.values() if init.uid == uid]:
            self.discard(self._waiting.pop(job_id))
        if uid == self._uid:
            self._share = share
        return self._hierarchy.set_share(uid, share)

    def _guess(self, init: Init, share: Share) -> None:
        job_id = init.job_id
        # Starts overtake each other, but not by much: an init for a job far behind will not be asked for. And
        # an image that no start uses any more may be about to be removed.
        for other in [
            waiting.job_id
            for waiting in self._waiting.values()
            if waiting.job_id < job_id - self._size or waiting.image != init.image
        ]:
            self.discard(self._waiting.pop(other))
        self._uid, self._share, self._limits = init.uid, share, init.limits
        self._image, self._read_only = init.image, init.read_only
        ahead = range(job_id + 1, min(job_id + self._size, JOB_ID_MAX) + 1)
        self._wanted = [number for number in reversed(ahead) if number not in self._waiting]

    def fill(self) -> None:
        """Make the next one that is wanted."""
        if (job_id := self._next_wanted()) is None:
            return
        self._wanted.remove(job_id)
        try:
            own = self._image
            init = self._make(job_id, self._limits, self._uid, self._share, own, read_only=self._read_only)
        except PjwError:
            # Its start has overtaken the last one and was there first; or the next start will report why it
            # cannot be made, if that is still so then.
            return
        self._waiting[job_id] = init
        self._phases.move(job_id, InitPhase.WAITING)
        self._watcher.watch(init.report, lambda: self._on_report(init))
        if not self._is_renewing:
            self._is_renewing = True
            self._watcher.call_after(self._oldest_seconds, self._renew)

    def _renew(self) -> None:
        """Have others made for those that are too old; look again when the next one will be."""
        self._is_renewing = False
        too_old = time.monotonic() - self._oldest_seconds
        for init in [init for init in self._waiting.values() if init.made_at <= too_old]:
            self.discard(self._waiting.pop(init.job_id))
            self._wanted.append(init.job_id)
        self._wanted.sort(reverse=True)
        if self._waiting:
            self._is_renewing = True
            oldest = min(init.made_at for init in self._waiting.values())
            self._watcher.call_after(oldest - too_old, self._renew)

    def _on_report(self, init: Init) -> None:
        match read_report(init.report):
            case Cloned(pidfd):
                init.pidfd = pidfd
            case _:
                # It could not be made, or another process has killed it.
                self.discard(self._waiting.pop(init.job_id))

    def _make(
        self, job_id: int, limits: Limits, uid: int, share: Share, image: str = "", *, read_only: bool = False
    ) -> Init:
        if not self._open:
            raise JobStateError(f"cannot launch job {job_id}: the launcher ends")
        self._scratch.create(job_id)
        trees: list[int] = []
        try:
            if image:
                trees = self._images.trees(job_id, image, uid)
            cgroup = self._hierarchy.create(job_id, limits, uid, share)
        except PjwError:
            close_all(trees)
            self._scratch.remove_if_empty(job_id)
            raise
        try:
            made_at = time.monotonic()
            report = self._spawner.spawn(job_id, cgroup, trees, read_only=read_only)
        except (OSError, PjwError) as error:
            self._begin_departure(job_id, cgroup)
            self._departures.go_on(job_id)
            if isinstance(error, OSError):
                raise KernelError("spawn init of", f"job {job_id}", error.errno or 0) from error
            raise
        finally:
            close_all(trees)
        return Init(job_id, uid, limits, cgroup, report, made_at, image, read_only)

    def discard_waiting(self, job_id: int) -> None:
        """Discard the init that waits for a job, if one does."""
        if (init := self._waiting.pop(job_id, None)) is not None:
            self.discard(init)

    def discard(
        self,
        init: Init,
        then: Callable[[], object] = lambda: None,
        late_seconds: float = GUESS_LATE_SECONDS,
    ) -> None:
        """End an init that got no job or failed to start it, remove all made for it, and call *then*.

        That may take its time: `Departures.wait_for` tells when it is over, or takes longer than that.
        """
        self._watcher.unwatch(init.report)
        self._begin_departure(init.job_id, init.cgroup, then, late_seconds)
        if init.pidfd < 0:
            # its first report comes within a millisecond: without a name it cannot be ended
            self._watcher.watch(init.report, lambda: self._on_named(init))
        else:
            init.report.close()
            self._departures.end_init(init.job_id, init.pidfd)

    def _begin_departure(
        self,
        job_id: int,
        cgroup: Cgroup,
        then: Callable[[], object] = lambda: None,
        late_seconds: float = GUESS_LATE_SECONDS,
    ) -> None:
        def on_gone() -> None:
            # a launch of the job may have begun, or failed; it moves the phase on
            if self._phases.of(job_id) is InitPhase.DISCARDED:
                self._phases.move(job_id, InitPhase.ABSENT)
            self._scratch.remove_if_empty(job_id)
            then()

        if self._phases.of(job_id) in (InitPhase.ABSENT, InitPhase.WAITING):
            self._phases.move(job_id, InitPhase.DISCARDED)
        # Half a cgroup, or a disk that was taken away, does not prevent the kill.
        with suppress(KernelError):
            cgroup.lift_throttles()
        self._departures.begin(job_id, cgroup, on_gone, late_seconds)

    def _on_named(self, init: Init) -> None:
        self._watcher.unwatch(init.report)
        first = read_report(init.report)
        init.report.close()
        if isinstance(first, Cloned):
            self._departures.end_init(init.job_id, first.pidfd)
        else:
            self._departures.go_on(init.job_id)

    def _on_mounts(self) -> None:
        # the next start reports the fault of the mounts, or why they cannot be read
        with suppress(ConfigError, KernelError):
            self._empty_if_stale()

    def _empty_if_stale(self) -> None:
        """Discard all waiting inits when jobs are to see other file systems.

        Raises ConfigError for a path that jobs cannot be shown, KernelError when the mounts cannot be read.
        """
        if not self._are_stale and not self._mounts.have_changed():
            return
        former, self._are_stale = self._places, True
        self._look()
        self._are_stale = False
        if self._places != former:
            self.empty()

    def empty(self) -> None:
        """Discard all that wait; the next start makes new ones."""
        self._wanted.clear()
        while self._waiting:
            self.discard(self._waiting.popitem()[1])

    def close(self) -> None:
        """Leave nothing behind, except processes that do not end."""
        self._open = False
        self.empty()
        self._departures.settle()
        self._mounts.close()


class _HostMounts:
    """Tells when the host has mounted or unmounted something (proc_pid_mountinfo(5), poll)."""

    def __init__(self, watcher: Watcher, on_change: Callable[[], None]) -> None:
        # Each descriptor reports a change once. One is asked, at a start that may follow a mount at once;
        # the other wakes us, lest a disk that was unmounted stays busy until the next start. It is always
        # readable, so only the events of an epoll(7) of its own can be waited for.
        self._asked: Final = os.open(MOUNTINFO, os.O_RDONLY | os.O_CLOEXEC)
        self._waking: Final = os.open(MOUNTINFO, os.O_RDONLY | os.O_CLOEXEC)
        self._changes: Final = select.epoll()
        self._changes.register(self._waking, select.EPOLLPRI)
        self._on_change: Final = on_change
        watcher.watch(self._changes.fileno(), self._on_wake)

    def _on_wake(self) -> None:
        self._changes.poll(0)
        self._on_change()

    def close(self) -> None:
        """Close the descriptors."""
        self._changes.close()
        os.close(self._waking)
        os.close(self._asked)

    def have_changed(self) -> bool:
        """Return whether they have since this was last asked."""
        return is_ready(self._asked, select.POLLPRI)


def _is_alive(init: Init) -> bool:
    return init.pidfd < 0 or not has_ended(init.pidfd)


# The limits that a cgroup holds. Init gets the other two in its order.
_OF_CGROUP: Final = attrgetter(
    *(name for name, _ in Limits().items() if name not in ("output_max_bytes", "time_max_seconds"))
)


def _are_alike(one: Limits, other: Limits) -> bool:
    """Return whether a cgroup for one is a cgroup for the other."""
    return bool(_OF_CGROUP(one) == _OF_CGROUP(other))
