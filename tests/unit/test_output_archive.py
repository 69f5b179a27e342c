"""The archive of a gateway: what has a name is whole, and one gateway has it."""

import os
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pjw.errors import ConfigError, OffsetError, OutputLostError
from pjw.gateway.archive import OutputArchive, open_directory
from pjw.model import Job, JobState, Limits
from pjw.worker import Part

ALL = Part()
NOW = datetime(2026, 1, 1, tzinfo=UTC)
JOB = Job(7, "alice", "true", JobState.EXITED, Limits(), NOW, NOW, output_bytes=10)


@pytest.fixture
async def archive(tmp_path: Path) -> AsyncIterator[OutputArchive]:
    """An empty one."""
    made = OutputArchive(open_directory(str(tmp_path)), str(tmp_path))
    yield made
    made.close()


def filled(archive: OutputArchive, job: Job = JOB) -> None:
    """Make the copy of an output of two pieces, as far as its name."""
    [stream] = archive.begin(job)
    assert not stream.add(b"first\n", 5_000)
    assert not stream.add(b"last", None)
    archive.finish(job, [stream])
    stream.close()


async def read(archive: OutputArchive, job: Job = JOB, part: Part = ALL) -> bytes:
    """A part of the copy."""
    return b"".join([chunk async for chunk in (await archive.reading(job, part)).chunks()])


async def test_a_copy_gets_its_name_when_it_is_whole(archive: OutputArchive, tmp_path: Path) -> None:
    """Before that it is no copy; another one of the same job replaces it; and then it can be removed."""
    filled(archive)
    assert sorted(os.listdir(tmp_path)) == [".7.part", "lock"]
    for _ in range(2):
        archive.commit(7)
        assert sorted(os.listdir(tmp_path)) == ["7", "lock"]
        assert await read(archive) == b"first\nlast"
        assert await read(archive, part=Part(tail_lines=1)) == b"last"
        assert await read(archive, part=Part(since_ns=5_000)) == b"first\nlast"
        timed = [each async for each in (await archive.reading(JOB, Part())).timed()]
        assert [(data, time and time.microsecond) for data, time in timed] == [
            (b"first\n", 5),
            (b"last", None),
        ]
        with pytest.raises(OffsetError, match="cannot read output from byte 11: it has 10 bytes"):
            await read(archive, part=Part(offset=11))
        filled(archive)
    archive.abandon(7)
    archive.remove(7)
    archive.remove(7)
    assert os.listdir(tmp_path) == ["lock"]


async def test_what_somebody_has_cut_is_told(archive: OutputArchive, tmp_path: Path) -> None:
    """At the end of what there is; also when nothing is there any more."""
    filled(archive)
    archive.commit(7)
    os.truncate(tmp_path / "7" / "output", 5)
    with pytest.raises(
        OutputLostError, match="the output of job 7 is cut short: 5 of 10 bytes are in the archive"
    ):
        await read(archive)
    archive.remove(7)
    with pytest.raises(OutputLostError, match="0 of 10 bytes"):
        await read(archive)
    assert await read(archive, replace(JOB, output_bytes=0)) == b""


async def test_a_file_system_that_gives_back_something_else(
    archive: OutputArchive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy is no copy."""
    fsync = os.fsync

    def rotten(descriptor: int) -> None:
        fsync(descriptor)
        path = tmp_path / ".7.part" / "output"
        path.write_bytes(b"fIrst\nlast")

    monkeypatch.setattr(os, "fsync", rotten)
    with pytest.raises(OSError, match="not what was written"):
        filled(archive)


async def test_one_gateway_has_it_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    """What was begun is removed; what has a name stays."""
    first = OutputArchive(open_directory(str(tmp_path)), str(tmp_path))
    filled(first)
    first.commit(7)
    filled(first)
    with pytest.raises(ConfigError, match="another gateway uses the archive") as caught:
        OutputArchive(open_directory(str(tmp_path)), str(tmp_path))
    assert caught.value.hint == "give each gateway a directory of its own"
    first.close()
    second = OutputArchive(open_directory(str(tmp_path)), str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["7", "lock"]
    second.close()
    with pytest.raises(ConfigError, match=r"cannot use the archive .*/none: no such file or directory"):
        open_directory(str(tmp_path / "none"))
