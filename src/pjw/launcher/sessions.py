"""Sessions: further commands in a job that runs, and connections to its ports."""

import os
import signal
import socket
from contextlib import suppress
from typing import Final

from pjw.errors import JobStateError, KernelError, PjwError
from pjw.launcher import protocol
from pjw.launcher.jobs import Jobs, Running, Session
from pjw.launcher.launches import Launches
from pjw.launcher.parts import Answer, Parts, refusal_of
from pjw.launcher.processes import ENTERED_SIGNAL, has_ended, send_signal
from pjw.launcher.protocol import LAUNCH_SECONDS, SESSIONS_MAX
from pjw.launcher.spawn import Cloned, Connected, Execed, Failed, read_report, send_order
from pjw.process import OwnedFds

# The steps of a session whose failure the client may have caused; all others are the host's.
_KINDS: Final = ("exec", "workdir", "connect")


class Sessions:
    """The sessions of all jobs; each is in its job's list until it has ended."""

    def __init__(self, parts: Parts, jobs: Jobs, launches: Launches) -> None:
        """Begin with no session."""
        self._parts: Final = parts
        self._jobs: Final = jobs
        self._launches: Final = launches

    def answer_exec(self, seq: int, request: protocol.Exec, descriptors: OwnedFds) -> Answer:
        """Start another command in a job that runs, as its user and in its cgroup; answer when executed."""
        parts, job_id = self._parts, request.job_id
        job = self._jobs[job_id]
        parts.policy.check_exec(request, parts.scratch.owner(job_id), descriptors)
        self._admit(job_id, job, len(descriptors))
        tool = parts.archive_program.descriptor() if request.archive else None
        session = self._begin(job_id, job, seq, parts.spawner.enter(job_id, job.pidfd, job.cgroup, tool))
        try:
            # one that failed already has said why
            with suppress(BrokenPipeError, ConnectionResetError):
                send_order(session.report, request, descriptors)
        except OSError as error:
            subject = f"a session of job {job_id}"
            self._refuse(job, session, KernelError("give an order to", subject, error.errno or 0))
        return None

    def answer_connect(self, seq: int, request: protocol.Connect, _: OwnedFds) -> Answer:
        """Connect to a port of a job that runs, within its network; answer with the socket."""
        parts, job_id = self._parts, request.job_id
        job = self._jobs[job_id]
        parts.policy.check_connect(request, parts.scratch.owner(job_id))
        self._admit(job_id, job, 1)
        report = parts.spawner.connect(job_id, job.pidfd, job.cgroup, request.uid, request.port)
        self._begin(job_id, job, seq, report)
        return None

    def _admit(self, job_id: int, job: Running, come: int) -> None:
        """Require room for one more session, which brings *come* descriptors.

        Raises JobStateError and KernelError.
        """
        # we know only those of our own
        if len(job.sessions) >= SESSIONS_MAX:
            raise JobStateError(f"job {job_id} has {SESSIONS_MAX} sessions, and no more may be")
        self._launches.require_room(job_id, come)
        # before there is one, so that its init has heard of it at its end
        send_signal(job.pidfd, ENTERED_SIGNAL)

    def _begin(self, job_id: int, job: Running, seq: int, report: socket.socket) -> Session:
        session = Session(seq, report)
        job.sessions.append(session)
        self._jobs.session_count += 1
        watcher = self._parts.watcher
        session.timer = watcher.call_after(LAUNCH_SECONDS, lambda: self._on_late(job_id, job, session))
        watcher.watch(report, lambda: self._on_report(job_id, job, session))
        return session

    def _on_report(self, job_id: int, job: Running, session: Session) -> None:
        parts = self._parts
        match read_report(session.report):
            case Cloned(pidfd):
                session.pidfd = pidfd
            case Connected(connected):
                self._end_report(session)
                self._drop(job, session)
                parts.replies.hand_out(session.seq, connected)
            case Execed(started_ns):
                self._end_report(session)
                parts.watcher.watch(session.pidfd, lambda: self._drop(job, session))
                parts.replies.send(session.seq, protocol.Entered(started_ns))
            case Failed() as failed:
                if has_ended(job.pidfd):
                    self._refuse(job, session, JobStateError(f"job {job_id} has ended"))
                    return
                kind = failed.step if failed.step in _KINDS else "setup"
                subject = f"a session of job {job_id}"
                refused = protocol.Refused(kind, failed.operation, subject, failed.errno, "")
                self._refuse(job, session, refused)

    def _on_late(self, job_id: int, job: Running, session: Session) -> None:
        subject = f"a session of job {job_id}"
        self._refuse(job, session, protocol.Refused("late", f"within {LAUNCH_SECONDS:.0f} s", subject, 0, ""))

    def _refuse(self, job: Running, session: Session, why: PjwError | protocol.Refused) -> None:
        self._end_report(session)
        if session.pidfd >= 0:
            # one that reported nothing may exist; as a part of the job it ends with the job at the latest
            send_signal(session.pidfd, signal.SIGKILL)
        self._drop(job, session)
        refused = why if isinstance(why, protocol.Refused) else refusal_of(why)
        self._parts.replies.send(session.seq, refused)

    def _end_report(self, session: Session) -> None:
        if session.timer is not None:
            session.timer.cancel()
        self._parts.watcher.unwatch(session.report)
        session.report.close()

    def _drop(self, job: Running, session: Session) -> None:
        """Forget a session that has ended, or was never started."""
        if session.pidfd >= 0:
            self._parts.watcher.unwatch(session.pidfd)
            os.close(session.pidfd)
            session.pidfd = -1
        if session in job.sessions:
            job.sessions.remove(session)
            self._jobs.session_count -= 1
