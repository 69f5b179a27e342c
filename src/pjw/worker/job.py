"""LiveJob: one job that has not ended, from its row to its last event."""

import asyncio
import math
import os
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final

from pjw.model import Artifacts, ArtifactsState, EndReason, ExitStatus, Job, Usage, UsageSample
from pjw.output import OutputLog
from pjw.worker.job_rows import from_ns
from pjw.worker.states import JobEvent, transition
from pjw.worker.status_record import End
from pjw.worker.tasks import Flag

# the detail of a job whose output waits
OUTPUT_HELD: Final = "waits: the disk of pjwd takes no more of its output"
# and of one whose command has ended
KEEPING: Final = "its command has ended; it keeps its artifacts"


class LiveJob:
    """Applies events to one job. `job` is always a whole snapshot, replaced at once."""

    def __init__(self, job: Job, output: OutputLog, stderr: OutputLog | None) -> None:
        self.job = job
        self.output: Final = output
        # where it is kept apart
        self.stderr: Final = stderr
        self.ended: Final = Flag()
        # set when its cgroup and its scratch directory are gone too
        self.removed: Final = Flag()
        # set when the launch was answered, one way or the other
        self.launch_over: Final = Flag()
        # set when it was killed and does not end: `job.detail` says why
        self.stuck: Final = Flag()
        # set while the job's output waits; `job.detail` says so then
        self.held: Final = Flag()
        # whether its command has ended, and its artifacts are being packed; `job.detail` says so then
        self.keeping = False
        # whether the last resort was used: its init was killed, so no record can be expected
        self.init_killed = False
        # whether it was ended because it had most of a file system that was about to be full
        self.disk_limit = False
        # its last measured usage, and the time of the event loop then
        self.sample: UsageSample | None = None
        self.sampled_at = -math.inf
        self._why_stuck = ""
        self._packing_killed = False
        self._pidfd = -1

    def _apply(self, event: JobEvent, **changes: object) -> None:
        state = transition(self.job.state, event)
        detail = "" if state.final else self.job.detail
        self.job = replace(self.job, state=state, detail=detail, **changes)  # type: ignore[arg-type]

    def exec_seen(self, started_ns: int | None) -> None:
        """Note that the command was executed; None when only that is known, not when."""
        start = self.job.start if started_ns is None else from_ns(started_ns)
        self._apply(JobEvent.EXEC_SEEN, start=start)

    def stop_asked(self) -> None:
        """Note that an end of the job was requested."""
        self._apply(JobEvent.STOP_ASKED)

    def stuck_seen(self, detail: str) -> None:
        """Note that it was killed and is still there; *detail* is shown until its end."""
        self._why_stuck = detail
        self.stuck.set()
        self._tell()

    def output_held(self, *, held: bool) -> None:
        """Note whether the job's output waits for the disk now."""
        if held:
            self.held.set()
        else:
            self.held.clear()
        self._tell()

    def keeping_seen(self) -> None:
        """Note that the command has ended, and its end is recorded."""
        self.keeping = True
        self._tell()

    def artifacts_seen(self, artifacts: Artifacts, *, killed: bool) -> None:
        """Note the state of its artifacts, known as its init has ended.

        *killed*: SIGKILL has ended their packing.
        """
        self._packing_killed = killed
        required = self.job.artifacts is not None and self.job.artifacts.required
        self.job = replace(self.job, artifacts=replace(artifacts, required=required))

    def _tell(self) -> None:
        if not self.job.state.final:
            otherwise = KEEPING if self.keeping else ""
            detail = self._why_stuck or (OUTPUT_HELD if self.held.is_set() else otherwise)
            self.job = replace(self.job, detail=detail)

    def end_seen(self, end: End, usage: Usage | None, output_bytes: int) -> None:
        """Note the end of the command, as init recorded it."""
        reason = end.reason
        # The counter alone is not the reason: a job may lose a child to it and still succeed.
        if (
            reason is EndReason.COMPLETED
            and usage is not None
            # when the packing was killed for its memory, that is not the command's end
            and usage.oom_kills > self._packing_killed
            and end.exit_status.code != 0
        ):
            reason = EndReason.OOM_KILLED
        if reason is EndReason.STOPPED and self.disk_limit:
            reason = EndReason.DISK_LIMIT
        artifacts = self.job.artifacts
        if (
            reason is EndReason.COMPLETED
            and end.exit_status.code == 0
            and artifacts is not None
            and artifacts.required
            and artifacts.state is not ArtifactsState.KEPT
        ):
            reason = EndReason.ARTIFACTS_MISSING
        self._apply(
            JobEvent.END_SEEN,
            end=from_ns(end.ended_ns),
            exit_status=end.exit_status,
            reason=reason,
            usage=usage,
            output_bytes=output_bytes,
        )

    def killed_unrecorded(self, usage: Usage | None, output_bytes: int) -> None:
        """Note the end of a job that we killed with its init, which recorded nothing."""
        status = ExitStatus(signal=9)
        self._apply(
            JobEvent.END_SEEN,
            end=datetime.now(UTC),
            exit_status=status,
            reason=EndReason.DISK_LIMIT if self.disk_limit else EndReason.STOPPED,
            usage=usage,
            output_bytes=output_bytes,
        )

    def end_unknown(self, reason: EndReason, usage: Usage | None, output_bytes: int) -> None:
        """Note that the job is gone without a record of its end: no guess is made of that.

        *reason* says why there is none.
        """
        self._apply(
            JobEvent.END_UNKNOWN,
            end=datetime.now(UTC),
            reason=reason,
            usage=usage,
            output_bytes=output_bytes,
        )

    def announce_end(self) -> None:
        """Wake all callers that wait for the end, with the final snapshot and whole output in place."""
        self.mark_output_ended()
        self.ended.set()

    def mark_output_ended(self) -> None:
        """Say that the output is whole."""
        self.output.mark_ended()
        if self.stderr is not None:
            self.stderr.mark_ended()

    def abandon_output(self) -> None:
        """Say that the worker closes while the job goes on."""
        self.output.abandon()
        if self.stderr is not None:
            self.stderr.abandon()

    def hold(self, pidfd: int) -> None:
        """Own the pidfd of the job's init, for the case that nothing else can tell its end."""
        self._pidfd = pidfd

    def watch(self) -> None:
        """Say that the output is whole when init ends; nothing happens when its pidfd was closed."""
        if self._pidfd >= 0:
            asyncio.get_running_loop().add_reader(self._pidfd, self._on_pidfd)

    def _on_pidfd(self) -> None:
        self.let_go()
        self.mark_output_ended()

    def let_go(self) -> None:
        """Close the pidfd; the job itself goes on."""
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
