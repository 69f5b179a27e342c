"""What has become of artifacts, by the mode of their file and by what init has recorded."""

import os
from contextlib import closing
from pathlib import Path

import pytest

from pjw.errors import CopyError, JobStateError
from pjw.model import Artifacts, ArtifactsState, EndReason, ExitStatus, Job, JobState, Limits, Usage
from pjw.output import Inotify, OutputLog
from pjw.worker.artifacts import judge, patterns_file, require_kept
from pjw.worker.job import LiveJob
from pjw.worker.job_rows import from_ns
from pjw.worker.status_record import End, KeptArtifacts, Packing

KEPT, EMPTY, FAILED = ArtifactsState.KEPT, ArtifactsState.EMPTY, ArtifactsState.FAILED


@pytest.mark.parametrize(
    ("size", "packing", "words", "state", "detail"),
    [
        (512, Packing.WHOLE, "", KEPT, ""),
        (512, Packing.WHOLE, "left out x: a FIFO", KEPT, "left out x: a FIFO"),
        # a power cut took the record, and not what was synced before
        (512, None, "", KEPT, ""),
        # it took the file's mode, or somebody has removed the file
        (None, Packing.WHOLE, "", FAILED, "the job's init, or its host, went down before they were whole"),
        (None, None, "", FAILED, "the job's init, or its host, went down before they were whole"),
        (None, Packing.NOTHING, "", EMPTY, "no file of the job matches"),
        (None, Packing.STOPPED, "", FAILED, "the job was stopped"),
        (None, Packing.KILLED, "", FAILED, "signal 9 has killed the program for archives"),
        (None, Packing.LATE, "", FAILED, "they were not packed within 10 minutes"),
        (None, Packing.FAILED, "cannot read x: why", FAILED, "cannot read x: why"),
        (None, Packing.FAILED, "", FAILED, "they cannot be packed"),
        # never both; what init says is believed
        (512, Packing.FAILED, "why", FAILED, "why"),
    ],
)
def test_what_has_become_of_them(
    size: int | None, packing: Packing | None, words: str, state: ArtifactsState, detail: str
) -> None:
    """Nothing is kept that is not whole."""
    found = judge(size, None if packing is None else KeptArtifacts(packing, words))
    assert found == Artifacts(state, size or 0 if state is KEPT else 0, detail)


@pytest.mark.parametrize(
    ("packing", "oom_killed", "disk_limit", "words"),
    [
        (Packing.KILLED, True, False, "the job's memory does not suffice to pack them"),
        (Packing.KILLED, False, True, "signal 9 has killed the program for archives"),
        (Packing.STOPPED, False, True, "the disk of pjwd was about to be full, and the job had most of it"),
        (Packing.STOPPED, True, False, "the job was stopped"),
    ],
)
def test_why_it_was_ended(packing: Packing, words: str, *, oom_killed: bool, disk_limit: bool) -> None:
    """What init cannot know: who has killed the program, and why the job was stopped."""
    found = judge(None, KeptArtifacts(packing, ""), oom_killed=oom_killed, disk_limit=disk_limit)
    assert found == Artifacts(FAILED, detail=words)


@pytest.mark.parametrize(
    ("code", "oom_kills", "packing_killed", "reason"),
    [
        (3, 1, False, EndReason.OOM_KILLED),
        (3, 1, True, EndReason.COMPLETED),
        (3, 2, True, EndReason.OOM_KILLED),
        (0, 1, True, EndReason.ARTIFACTS_MISSING),
    ],
)
async def test_a_packing_that_needs_too_much_memory_is_not_the_end(
    tmp_path: Path, code: int, oom_kills: int, reason: EndReason, *, packing_killed: bool
) -> None:
    """The reason is the command's."""
    job = Job(7, "alice", "x", JobState.RUNNING, Limits(), from_ns(1), artifacts=Artifacts(required=True))
    with closing(Inotify()) as inotify:
        live = LiveJob(job, OutputLog(str(tmp_path / "output"), inotify, ended=False), None)
    live.artifacts_seen(Artifacts(FAILED), killed=packing_killed)
    live.end_seen(End(2, ExitStatus(code), EndReason.COMPLETED), Usage(oom_kills=oom_kills), 0)
    assert live.job.reason is reason


def test_patterns_are_for_one_program() -> None:
    """Each ended by NUL."""
    descriptor = patterns_file(("dist/**", "ü"))
    try:
        assert os.pread(descriptor, 100, 0) == b"dist/**\0\xc3\xbc\0"
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    ("artifacts", "state", "error", "words"),
    [
        (None, JobState.EXITED, CopyError, "^job 7 has no artifacts$"),
        (Artifacts(), JobState.RUNNING, JobStateError, "job 7 is running: its artifacts come with its end"),
        (Artifacts(EMPTY, detail="why"), JobState.EXITED, CopyError, "job 7 has no artifacts: why"),
    ],
)
def test_there_are_none(
    artifacts: Artifacts | None, state: JobState, error: type[Exception], words: str
) -> None:
    """Why, in words."""
    with pytest.raises(error, match=words):
        require_kept(Job(7, "alice", "x", state, Limits(), from_ns(1), artifacts=artifacts))
