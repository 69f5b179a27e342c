"""The jobs that run, from their launch or adoption to their removal, and the requests about them.

The launcher keeps no record of a job on disk. After its own end the next launcher finds each job by its
cgroup, which only root may write.
"""

import errno
import os
import signal
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Final

from pjw.errors import InvalidJobError, JobStateError, KernelError
from pjw.launcher import protocol
from pjw.launcher.cgroup import Cgroup
from pjw.launcher.departures import Waiter, describe
from pjw.launcher.parts import Answer, Parts
from pjw.launcher.phases import InitPhase
from pjw.launcher.policy import check_signal, still_offered
from pjw.launcher.processes import (
    ENTERED_SIGNAL,
    INIT_SIGNAL_FIRST,
    Timer,
    collect,
    find_init,
    has_ended,
    network_of,
    say,
    send_signal,
)
from pjw.launcher.spawn import Cloned, Failed, Listening, listeners_for, read_report
from pjw.model import Usage
from pjw.process import OwnedFds, close_all

# Descriptors of a job until its end: the pidfd of its init, and its status file.
JOB_DESCRIPTORS: Final = 2
# Those of a session: its report, and the pidfd of the process that waits for its command.
SESSION_DESCRIPTORS: Final = 2
# The attempts, and the pause before each, to make the listeners of an adopted job again: the process that had
# the former ones may just be about to end.
LISTEN_TRIES: Final = 10
LISTEN_PAUSE_SECONDS: Final = 0.2
_EPOCH: Final = datetime.fromtimestamp(0, UTC)


@dataclass(slots=True, eq=False)
class Session:
    """Another command in a running job, or a connection to it, by the process that waits for it."""

    # the number of the request that is answered when the command was executed
    seq: int
    report: socket.socket
    timer: Timer | None = None
    # -1 until it has reported that it exists
    pidfd: int = -1


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
    # those that this launcher started and that have not ended
    sessions: list[Session] = field(default_factory=list)
    # its user, and the name of the network that it shares; None: its own
    link: tuple[int, str] | None = None
    # whether it is on its way into that: until then its init has another
    is_joining: bool = False


class Jobs:
    """The jobs whose inits this launcher knows and that were not removed."""

    def __init__(self, parts: Parts) -> None:
        """Begin with no job."""
        self._parts: Final = parts
        self._phases: Final = parts.phases
        self._jobs: Final[dict[int, Running]] = {}
        # of all jobs
        self.session_count = 0

    def __getitem__(self, job_id: int) -> Running:
        return self._jobs[job_id]

    @property
    def descriptors(self) -> int:
        """The number of descriptors that jobs and their sessions cost."""
        return JOB_DESCRIPTORS * len(self._jobs) + SESSION_DESCRIPTORS * self.session_count

    def add(self, job_id: int, job: Running) -> None:
        """Take a job whose init exists."""
        self._jobs[job_id] = job

    def forget(self, job_id: int) -> None:
        """Forget a job whose launch has failed; its init's pidfd belongs to the launch."""
        self._jobs.pop(job_id, None)

    def note_running(self, job_id: int, job: Running) -> None:
        """Watch for the end of a job whose command was executed, or that was adopted."""
        self._phases.move(job_id, InitPhase.RUNNING)
        self._parts.watcher.watch(job.pidfd, partial(self._on_end, job_id, job))

    def note_end(self, job_id: int) -> None:
        """Change the phase of a job that has ended: at once, not only when its end has its turn."""
        if self._phases.of(job_id) is InitPhase.RUNNING and has_ended(self._jobs[job_id].pidfd):
            self._phases.move(job_id, InitPhase.ENDED)

    def link_of(self, link: tuple[int, str]) -> int:
        """Return the network namespace that jobs of one user share by name; -1 for none.

        Only of a job of the same user, as our own records have it. The caller closes it.
        """
        mates = (job for job in self._jobs.values() if job.link == link and not job.is_joining)
        return next((network for job in mates if (network := network_of(job.pidfd)) >= 0), -1)

    # --- requests, in the order of a job's life

    def answer_adopt(self, seq: int, request: protocol.Adopt, _: OwnedFds) -> Answer:
        """Find the init of a job by its cgroup, which only root may write."""
        parts, job_id = self._parts, request.job_id
        parts.policy.check_network(request)
        cgroup = parts.hierarchy.find(job_id)
        if cgroup is None:
            return (protocol.Adopted(alive=False, known=False),)
        if self._phases.of(job_id) is InitPhase.ENDED:
            return (protocol.Adopted(alive=False, known=True),)
        job = self._jobs.get(job_id)
        if job is None:
            pidfd = find_init(cgroup.pids)
            if pidfd is None:
                # processes without their init cannot be: it ends after them all
                return (protocol.Adopted(alive=False, known=True),)
            # a launcher that was killed may have left that to us
            cgroup.make_equal()
            job = self._jobs[job_id] = Running(pidfd, cgroup, seq)
            if request.link:
                job.link = (parts.scratch.owner(job_id), request.link)
            self.note_running(job_id, job)
        job.seq = seq
        if still_offered(request) and job_id not in parts.egress and parts.egress.has_begun:
            self._listen_again(job, request, LISTEN_TRIES)
        return protocol.Adopted(alive=True, known=True), job.pidfd

    def accept_connections(
        self, job_id: int, request: protocol.Launch | protocol.Adopt, sockets: OwnedFds
    ) -> None:
        """Have pjwd-egress accept a job's connections; takes its listening sockets."""
        listeners, taken = listeners_for(request), list(sockets.take_all())
        self._parts.egress.add(job_id, request.client_name, still_offered(request), listeners, taken)

    def _listen_again(self, job: Running, request: protocol.Adopt, tries: int) -> None:
        """Have the listeners of an adopted job made again, by a process that enters it for that."""
        job_id, watcher = request.job_id, self._parts.watcher
        if self._jobs.get(job_id) is not job or has_ended(job.pidfd):
            return

        def again(why: str) -> None:
            if tries > 1:
                watcher.call_after(LISTEN_PAUSE_SECONDS, lambda: self._listen_again(job, request, tries - 1))
            elif not has_ended(job.pidfd):
                say(f"job {job_id} reaches no names on the network any more: cannot {why}")

        send_signal(job.pidfd, ENTERED_SIGNAL)
        try:
            report = self._parts.spawner.listen(job_id, job.pidfd, job.cgroup, listeners_for(request))
        except KernelError as error:
            again(str(error))
            return

        def on_report() -> None:
            match read_report(report):
                case Cloned(pidfd):
                    os.close(pidfd)
                    return
                case Listening(sockets):
                    with OwnedFds(sockets) as found:
                        if self._jobs.get(job_id) is job:
                            self.accept_connections(job_id, request, found)
                case Failed() as failed:
                    again(f"{failed.operation} it ({errno.errorcode.get(failed.errno, 'no reason')})")
            watcher.unwatch(report)
            report.close()

        watcher.watch(report, on_report)

    def answer_job_ids(self, _seq: int, request: protocol.JobIds, _: OwnedFds) -> Answer:
        """List the jobs of which anything is left: a cgroup, or a scratch directory.

        The second may be alone: a host that goes down forgets cgroups, and the last removals.
        """
        left = {*self._parts.hierarchy.job_ids(), *self._parts.scratch.job_ids()}
        found = sorted(
            job_id for job_id in left if job_id > request.after and not self._phases.is_without_job(job_id)
        )
        return (protocol.JobIdPage(tuple(found[: protocol.MAX_JOB_IDS])),)

    def answer_terminate(self, _seq: int, request: protocol.Terminate, _: OwnedFds) -> Answer:
        """Have init send a signal to every process of its job, at once, however they fork."""
        check_signal(request.signal)
        # never SIGTERM itself: init takes that for the host's shutdown, and applies its own grace period
        self._signal_init(request.job_id, INIT_SIGNAL_FIRST + request.signal)
        return (protocol.Done(),)

    def answer_kill(self, _seq: int, request: protocol.Kill, _: OwnedFds) -> Answer:
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

    def answer_remains(self, _seq: int, request: protocol.Remains, _: OwnedFds) -> Answer:
        """Look at the processes of a job that does not end."""
        job = self._jobs.get(request.job_id)
        return (describe(job.cgroup.pids() if job is not None else []),)

    def _signal_init(self, job_id: int, number: int) -> None:
        # Only jobs that this launcher launched or adopted are in the table: no request reaches a process that
        # is not the init of a job.
        job = self._jobs.get(job_id)
        if job is not None:
            send_signal(job.pidfd, number)

    def answer_measure(self, _seq: int, request: protocol.Measure, _: OwnedFds) -> Answer:
        """Read the usage of jobs that this launcher has launched or adopted."""
        if len(request.job_ids) > protocol.MAX_MEASURED:
            raise InvalidJobError(f"at most {protocol.MAX_MEASURED} jobs are measured at once")
        begun = (InitPhase.RUNNING, InitPhase.ENDED)
        wanted = [job_id for job_id in request.job_ids if self._phases.of(job_id) in begun]
        return (protocol.Measured(tuple(_measurements((each, self._jobs[each].cgroup) for each in wanted))),)

    def _on_end(self, job_id: int, job: Running) -> None:
        """Tell the end of a job's init, with its accounts; first remove the job where that is safe and quick.

        Safe: the accounts are where no crash loses them before the cgroup goes. Quick: the job left no files.
        Else all stays as it is until the worker has written the end down, and asks for the removal.
        """
        self.note_end(job_id)
        self._parts.watcher.unwatch(job.pidfd)
        self._parts.egress.remove(job_id)
        known, removed, usage = False, False, Usage()
        # The worker asks for a step that fails now, and so learns why.
        with suppress(KernelError, OSError):
            usage = job.cgroup.usage()
            known = True
            if job.status >= 0 and keep_accounts(job.status, usage):
                removed = self._parts.scratch.remove_if_empty(job_id) and job.cgroup.try_remove()
        if removed:
            self._let_go(job_id)
        self._parts.replies.send(job.seq, protocol.Ended(known, usage, removed))

    def _let_go(self, job_id: int) -> None:
        """Close the descriptors and records of a job that has ended."""
        job = self._jobs.pop(job_id, None)
        if job is None:
            return
        self._phases.move(job_id, InitPhase.ABSENT)
        self._parts.watcher.unwatch(job.pidfd)
        # our child (CLONE_PARENT), unless it was adopted
        collect(job.pidfd)
        if job.status >= 0:
            close_all([job.status])

    def answer_account(self, _seq: int, request: protocol.Account, _: OwnedFds) -> Answer:
        """Read an ended job's usage."""
        cgroup = self._ended_cgroup(request.job_id)
        if cgroup is None:
            return (protocol.Accounted(known=False, usage=Usage()),)
        return (protocol.Accounted(known=True, usage=cgroup.usage()),)

    def answer_remove(self, seq: int, request: protocol.Remove, _: OwnedFds) -> Answer:
        """Remove an ended job's remains; answered later when its scratch directory is full."""
        job_id, scratch = request.job_id, self._parts.scratch
        cgroup = self._ended_cgroup(job_id)
        self._let_go(job_id)
        if scratch.remove_if_empty(job_id):
            self._remove_cgroup(seq, job_id, cgroup)
            return None

        def on_removed() -> None:
            if scratch.remove_if_empty(job_id):
                self._remove_cgroup(seq, job_id, cgroup)
            else:
                path = scratch.path(job_id)
                refused = protocol.Refused("kernel", "remove the scratch directory", path, 0, "")
                self._parts.replies.send(seq, refused)

        self._parts.removals.begin(job_id, on_removed)
        return None

    def _remove_cgroup(self, seq: int, job_id: int, cgroup: Cgroup | None) -> None:
        # It goes last: while it is there, a later launcher knows that something is left.
        replies, departures = self._parts.replies, self._parts.departures
        if cgroup is not None and job_id not in departures:
            departures.begin(job_id, cgroup)
            departures.go_on(job_id)
        done: Callable[[], None] = partial(replies.send, seq, protocol.Done())
        departures.wait_for(job_id, Waiter(done, partial(replies.refuse, seq)))

    def _ended_cgroup(self, job_id: int) -> Cgroup | None:
        cgroup = self._parts.hierarchy.find(job_id)
        # an earlier launcher's, which was not adopted
        if job_id not in self._jobs and cgroup is not None and cgroup.pids():
            raise JobStateError(f"job {job_id} has not ended")
        return cgroup


def _measurements(jobs: Iterable[tuple[int, Cgroup]]) -> Iterator[protocol.Measurement]:
    """Measure jobs; leave out those whose cgroups have gone meanwhile. Raises KernelError."""
    for job_id, cgroup in jobs:
        try:
            sample = cgroup.measure()
        except KernelError as error:
            # half removed; ENODEV: between the open and the read
            if error.errno in (errno.ENOENT, errno.ENODEV):
                continue
            raise
        yield protocol.Measurement(
            job_id=job_id,
            time_ns=(sample.time - _EPOCH) // timedelta(microseconds=1) * 1000,
            cpu_usage_usec=sample.cpu_usage_usec,
            memory_bytes=sample.memory_bytes,
            io_read_bytes=sample.io_read_bytes,
            io_write_bytes=sample.io_write_bytes,
            pids=sample.pids,
        )


def keep_accounts(status: int, usage: Usage) -> bool:
    """Write a job's usage into its status file, by a descriptor; tell whether all of it is there.

    There it outlives the job's cgroup. The file's space is allocated before the job starts, so that a full
    disk cannot lose this. One pwrite(2), and no sync: it is to survive the kill of any process. A power cut
    takes the cgroup, too.
    """
    line = (
        f"used {usage.cpu_usage_usec} {usage.memory_peak_bytes} {usage.io_read_bytes}"
        f" {usage.io_write_bytes} {usage.oom_kills}\n"
    ).encode()
    with suppress(OSError):
        return os.pwrite(status, line, protocol.ACCOUNTS_OFFSET) == len(line)
    return False
