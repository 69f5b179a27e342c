"""Artifacts: the files of a job that are kept after its end, as an archive beside its output.

jobs/ID/artifacts    of a job that keeps some: empty, then the packed part; 0400 when that is whole

Its init packs them when the command has ended and that was recorded (init/archive.c), whether or not
there is a worker. No code here reads the archive. Until it is whole, it is none: its mode says so, and is set
when all of it is on the disk, so that a power cut leaves all of it or nothing.
"""

import asyncio
import logging
from typing import Final

from pjw.errors import CopyError, JobStateError, KernelError, LimitReachedError, PjwError
from pjw.model import Artifacts, ArtifactsState, Job, Usage
from pjw.output import Inotify
from pjw.worker.job import LiveJob
from pjw.worker.orders import memory_file
from pjw.worker.quota import StoredBytes
from pjw.worker.state_dir import StateDir
from pjw.worker.status_record import KeptArtifacts, Packing, parse_record

log: Final = logging.getLogger(__name__)

_NOT_WHOLE: Final = "the job's init, or its host, went down before they were whole"
_NO_MEMORY: Final = "the job's memory does not suffice to pack them"
_NO_DISK: Final = "the disk of pjwd was about to be full, and the job had most of it"
# The words about artifacts that were not kept, by init's record; some records have their own words.
_WORDS: Final = {
    Packing.NOTHING: (ArtifactsState.EMPTY, "no file of the job matches"),
    Packing.STOPPED: (ArtifactsState.FAILED, "the job was stopped"),
    Packing.KILLED: (ArtifactsState.FAILED, "signal 9 has killed the program for archives"),
    Packing.LATE: (ArtifactsState.FAILED, "they were not packed within 10 minutes"),
    Packing.FAILED: (ArtifactsState.FAILED, "they cannot be packed"),
    Packing.WHOLE: (ArtifactsState.FAILED, _NOT_WHOLE),
}


class Keeping:
    """The artifacts of jobs that are about to end, and of those that have ended."""

    def __init__(self, state: StateDir, inotify: Inotify, stored: StoredBytes) -> None:
        self._state: Final = state
        self._inotify: Final = inotify
        self._stored: Final = stored
        self._watches: Final[dict[int, int]] = {}

    def add(self, live: LiveJob) -> None:
        """Have a job that keeps artifacts say when it is packing them."""
        path = self._state.status_path(live.job.id)
        try:
            self._watches[live.job.id] = self._inotify.watch(path, lambda: self._look(live))
        except KernelError as error:
            log.error("cannot tell when job %d packs its artifacts: %s", live.job.id, error)
        # it may have begun before we watched
        self._look(live)

    def _look(self, live: LiveJob) -> None:
        try:
            has_ended = parse_record(self._state.read_status(live.job.id)).end is not None
        except KernelError as error:
            log.error("%s", error)
            return
        if has_ended and not live.keeping:
            live.keeping_seen()

    def remove(self, job_id: int) -> None:
        """Watch no more."""
        if (watch := self._watches.pop(job_id, None)) is not None:
            self._inotify.unwatch(watch)

    async def settle(self, live: LiveJob, kept: KeptArtifacts | None, usage: Usage | None) -> None:
        """Settle the artifacts of a job whose init has ended; remove an archive that is not whole.

        *kept* is the record of its init, if it came to that; *usage* is the job's usage.
        """
        if live.job.artifacts is None:
            return
        job_id = live.job.id
        try:
            # not among the threads that wait for a disk, as the end waits for this
            size = await asyncio.to_thread(self._state.whole_artifacts, job_id)
            found = judge(
                size,
                kept,
                oom_killed=usage is not None and usage.oom_kills > 0,
                disk_limit=self._state.is_ended_for_disk(job_id),
            )
            if found.state is ArtifactsState.KEPT:
                await self._stored.check_kept(live)
        except LimitReachedError as error:
            found = Artifacts(ArtifactsState.FAILED, detail=str(error))
        except PjwError as error:
            log.error("%s", error)
            found = Artifacts(ArtifactsState.FAILED, detail="pjwd cannot read them; its log has the details")
        if found.state is not ArtifactsState.KEPT:
            try:
                await asyncio.to_thread(self._state.remove_artifacts, job_id)
            except PjwError as error:
                log.error("%s", error)
        live.artifacts_seen(found, killed=kept is not None and kept.packing is Packing.KILLED)


def judge(
    size: int | None, kept: KeptArtifacts | None, *, oom_killed: bool = False, disk_limit: bool = False
) -> Artifacts:
    """Return the state of artifacts: *size* bytes of them are whole, or with None they are not.

    *oom_killed*: a process of the job was killed for its memory. *disk_limit*: the job was ended for its use
    of the disk.
    """
    words = "" if kept is None else kept.words
    # after a power cut the record may be missing, but not the mode of the archive's file
    if size is not None and (kept is None or kept.packing is Packing.WHOLE):
        return Artifacts(ArtifactsState.KEPT, size, words)
    if kept is None:
        return Artifacts(ArtifactsState.FAILED, detail=_NOT_WHOLE)
    state, otherwise = _WORDS[kept.packing]
    if kept.packing is Packing.KILLED and oom_killed:
        otherwise = _NO_MEMORY
    if kept.packing is Packing.STOPPED and disk_limit:
        otherwise = _NO_DISK
    return Artifacts(state, detail=words or otherwise)


def patterns_file(patterns: tuple[str, ...]) -> int:
    """Make a file of memory with the patterns, each ended by NUL, which only the job's program reads."""
    return memory_file("pjw-patterns", patterns)


def require_kept(job: Job) -> Artifacts:
    """Return the artifacts of a job. Raises JobStateError before its end, CopyError when it has none."""
    artifacts = job.artifacts
    if job.array is not None:
        raise JobStateError(
            f"job {job.id} is an array, and has no artifacts of its own",
            hint=f"name one of its elements, {job.array.indices}: {job.id}_INDEX",
        )
    if artifacts is None:
        raise CopyError(
            f"job {job.ref} has no artifacts",
            hint="start it with --output GLOB, or copy while it runs",
        )
    if not job.state.final:
        raise JobStateError(f"job {job.ref} is {job.state}: its artifacts come with its end")
    if artifacts.state is not ArtifactsState.KEPT:
        raise CopyError(f"job {job.ref} has no artifacts: {artifacts.detail}")
    return artifacts
