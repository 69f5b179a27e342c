"""Inits that wait for a job: in their cgroup and namespaces, with their mounts; only the order is missing.

To make all that takes the kernel milliseconds, and most of it is the same for each job. What differs is
guessed: ids are given one after the other, so the next job's is known, and its cgroup is limited as that of
the last job was. A guess that was wrong costs a start what it would have cost without; it is never used.

What is made ahead is what a start would have made then. Its mounts are copies of the host's, so when those
change all that wait are thrown away.
"""

import os
import select
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from pjw.errors import KernelError, PjwError
from pjw.launcher.cgroup import Cgroup, Hierarchy
from pjw.launcher.policy import JOB_ID_MAX, Policy
from pjw.launcher.processes import Watcher, end, has_ended, is_ready, wait_for
from pjw.launcher.scratch import Scratch
from pjw.launcher.spawn import Cloned, read_report, spawn_init
from pjw.model import Limits


@dataclass(slots=True, eq=False)
class Init:
    """One init before its job: `pidfd` is -1 until it has reported that it is there."""

    job_id: int
    limits: Limits
    cgroup: Cgroup
    report: socket.socket
    pidfd: int = -1


class Pool:
    """The inits that wait, by the ids of the jobs that they are for."""

    def __init__(self, watcher: Watcher, policy: Policy, hierarchy: Hierarchy, scratch: Scratch) -> None:
        self._watcher: Final = watcher
        self._policy: Final = policy
        self._size: Final = policy.waiting_inits
        self._hierarchy: Final = hierarchy
        self._scratch: Final = scratch
        self._waiting: Final[dict[int, Init]] = {}
        self._wanted: list[int] = []
        self._limits: Limits
        self._mounts: Final = _HostMounts(watcher, self._empty_if_stale)

    def __contains__(self, job_id: int) -> bool:
        return job_id in self._waiting

    @property
    def wants_more(self) -> bool:
        """Whether `fill` has something to do, when there is time for it."""
        return bool(self._wanted)

    def take(self, job_id: int, limits: Limits) -> Init:
        """The init for a job, made now if none waits; guess from it what will be wanted next.

        The caller has it: its report, its pidfd, its end. Raises PjwError; nothing was made then.
        """
        self._empty_if_stale()
        init = self._waiting.pop(job_id, None)
        if init is not None and (init.limits != _of_cgroup(limits) or self._is_dead(init)):
            self.discard(init)
            init = None
        if init is None:
            init = self._make(job_id, _of_cgroup(limits))
        self._guess(job_id, init.limits)
        return init

    def _is_dead(self, init: Init) -> bool:
        return init.pidfd >= 0 and has_ended(init.pidfd)

    def _guess(self, job_id: int, limits: Limits) -> None:
        # Starts overtake each other, but not by much: what is far behind will not be asked for.
        for behind in [waiting for waiting in self._waiting if waiting < job_id - self._size]:
            self.discard(self._waiting.pop(behind))
        self._limits = limits
        ahead = range(job_id + 1, min(job_id + self._size, JOB_ID_MAX) + 1)
        self._wanted = [number for number in reversed(ahead) if number not in self._waiting]

    def fill(self) -> None:
        """Make the next one that is wanted."""
        job_id = self._wanted.pop()
        try:
            init = self._make(job_id, self._limits)
        except PjwError:
            # Its start has overtaken the last one and was there first; or whoever starts it is told why it
            # cannot be made, if that is still so then.
            return
        self._waiting[job_id] = init
        self._watcher.watch(init.report, lambda: self._on_report(init))

    def _on_report(self, init: Init) -> None:
        match read_report(init.report):
            case Cloned(pidfd):
                init.pidfd = pidfd
            case _:
                # It could not be made, or somebody has killed it.
                self.discard(self._waiting.pop(init.job_id))

    def _make(self, job_id: int, limits: Limits) -> Init:
        scratch = self._scratch.create(job_id)
        try:
            cgroup = self._hierarchy.create(job_id, limits)
        except PjwError:
            self._scratch.remove_if_empty(job_id)
            raise
        try:
            pid, report = spawn_init(job_id, self._policy, cgroup, scratch)
        except (OSError, PjwError) as error:
            cgroup.remove()
            self._scratch.remove_if_empty(job_id)
            if isinstance(error, OSError):
                raise KernelError("spawn init of", f"job {job_id}", error.errno or 0) from error
            raise
        self._watcher.reap_helper(pid)
        return Init(job_id, limits, cgroup, report)

    def discard(self, init: Init) -> None:
        """End an init that got no job, or failed to start it, and remove what was made for it."""
        self._watcher.unwatch(init.report)
        if init.pidfd < 0:
            init.pidfd = self._pidfd_of(init.report)
        init.report.close()
        if init.pidfd >= 0:
            end(init.pidfd)
        try:
            init.cgroup.remove()
        finally:
            self._scratch.remove_if_empty(init.job_id)

    @staticmethod
    def _pidfd_of(report: socket.socket) -> int:
        """Wait for the first report, a matter of a millisecond: what nobody can name, nobody can end."""
        wait_for(report.fileno())
        first = read_report(report)
        return first.pidfd if isinstance(first, Cloned) else -1

    def _empty_if_stale(self) -> None:
        if self._mounts.have_changed():
            self.empty()

    def empty(self) -> None:
        """Discard all that wait; the next start makes new ones."""
        self._wanted.clear()
        while self._waiting:
            self.discard(self._waiting.popitem()[1])

    def close(self) -> None:
        """Leave nothing."""
        self.empty()
        self._mounts.close()


class _HostMounts:
    """Tells when the host has mounted or unmounted something (proc_pid_mountinfo(5), poll)."""

    def __init__(self, watcher: Watcher, on_change: Callable[[], None]) -> None:
        # Each descriptor is told of a change once. One is asked, at a start that may follow a mount at once;
        # the other wakes us, lest a disk that was unmounted stays busy until the next start. It is always
        # readable, so only what an epoll(7) of its own says of it can be waited for.
        self._asked: Final = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        self._waking: Final = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
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
        """Whether they have since this was last asked."""
        return is_ready(self._asked, select.POLLPRI)


def _of_cgroup(limits: Limits) -> Limits:
    """Without those that init is told in its order."""
    return replace(limits, output_max_bytes=0, time_max_seconds=0)
