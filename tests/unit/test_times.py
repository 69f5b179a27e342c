"""When output was written: bytes are cut at the records of init, and nothing is invented."""

import os
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pjw.output import Inotify, OutputLog, follow_with_times, start_of_time

Record = tuple[int, int]


@pytest.fixture
async def inotify() -> AsyncIterator[Inotify]:
    """The one instance."""
    inotify = Inotify()
    yield inotify
    inotify.close()


def written(tmp_path: Path, inotify: Inotify, data: bytes, times: bytes | None, *, ended: bool) -> OutputLog:
    """An output and its records."""
    (tmp_path / "output").write_bytes(data)
    if times is not None:
        (tmp_path / "times").write_bytes(times)
    return OutputLog(str(tmp_path / "output"), inotify, ended=ended, times_path=str(tmp_path / "times"))


def packed(*records: Record) -> bytes:
    """Records as init writes them."""
    return b"".join(struct.pack("=qQ", *record) for record in records)


async def read(log: OutputLog, offset: int = 0) -> list[tuple[bytes, int | None]]:
    """All pieces of what is there."""
    return [piece async for piece in follow_with_times(log, offset, present_only=True)]


async def test_each_record_is_a_piece(tmp_path: Path, inotify: Inotify) -> None:
    """From any offset on, also from one within a record."""
    log = written(tmp_path, inotify, b"one\ntwo\nthree\n", packed((10, 4), (20, 8), (30, 14)), ended=True)
    assert await read(log) == [(b"one\n", 10), (b"two\n", 20), (b"three\n", 30)]
    assert await read(log, 4) == [(b"two\n", 20), (b"three\n", 30)]
    assert await read(log, 6) == [(b"o\n", 20), (b"three\n", 30)]
    assert await read(log, 14) == []


async def test_what_was_written_since_a_time(tmp_path: Path, inotify: Inotify) -> None:
    """It begins where the record before ends; nothing that was written since then is left out (U13)."""
    log = written(tmp_path, inotify, b"one\ntwo\nthree\nnow", packed((10, 4), (20, 8), (30, 14)), ended=False)
    assert [await start_of_time(log, ns) for ns in (0, 10, 11, 20, 30, 31)] == [0, 0, 4, 4, 8, 14]


async def test_a_time_is_found_among_many(tmp_path: Path, inotify: Inotify) -> None:
    """By bisection, which reads few of them."""
    records = packed(*((2 * n, 100 * n) for n in range(1, 5_001)))
    log = written(tmp_path, inotify, bytes(500_000), records, ended=True)
    for number in (1, 2, 777, 5_000):
        assert await start_of_time(log, 2 * number) == 100 * (number - 1)
        assert await start_of_time(log, 2 * number + 1) == 100 * number


async def test_a_time_without_records_is_not_guessed(tmp_path: Path, inotify: Inotify) -> None:
    """An older init wrote none down; where there is no output, it begins at the first byte."""
    assert await start_of_time(written(tmp_path, inotify, b"words\n", None, ended=True), 10) is None
    assert await start_of_time(written(tmp_path, inotify, b"", None, ended=True), 10) == 0


async def test_many_records_are_found_from_any_offset(tmp_path: Path, inotify: Inotify) -> None:
    """More than are read at once, and more output than a chunk."""
    count, size = 5_000, 100
    records = packed(*((n, n * size) for n in range(1, count + 1)))
    log = written(tmp_path, inotify, bytes(count * size), records, ended=True)
    for offset in (0, 1, size, 123_456, (count - 1) * size):
        pieces: dict[int | None, int] = {}
        for data, ns in await read(log, offset):
            pieces[ns] = pieces.get(ns, 0) + len(data)
        first = offset // size + 1
        expected = dict.fromkeys(range(first, count + 1), size) | {first: size - offset % size}
        assert pieces == expected


async def test_no_records_no_times(tmp_path: Path, inotify: Inotify) -> None:
    """A job of an older version, running or ended, is read all the same."""
    for ended in (False, True):
        log = written(tmp_path, inotify, b"words\n", None, ended=ended)
        assert await read(log) == [(b"words\n", None)]


@pytest.mark.parametrize(
    "records",
    [b"", packed((10, 4))[:15], packed((0, 0)), packed((10, 4)) + bytes(16), packed((10, 4), (20, 2))],
    ids=["empty", "torn", "zero", "zero at the end", "going back"],
)
async def test_what_a_power_cut_took_is_not_made_up(tmp_path: Path, inotify: Inotify, records: bytes) -> None:
    """Bytes of an ended job that no record covers have no time."""
    log = written(tmp_path, inotify, b"one\ntwo\n", records, ended=True)
    pieces = await read(log)
    assert b"".join(data for data, _ in pieces) == b"one\ntwo\n"
    assert {ns for _, ns in pieces} <= {10, None}
    assert pieces[-1][1] is None


async def test_records_beyond_the_output_are_cut(tmp_path: Path, inotify: Inotify) -> None:
    """A power cut may take output that its record survives."""
    log = written(tmp_path, inotify, b"one\n", packed((10, 40)), ended=True)
    assert await read(log) == [(b"one\n", 10)]


async def test_what_has_no_record_yet_is_of_now(tmp_path: Path, inotify: Inotify) -> None:
    """A job that runs wrote it within the last moments."""
    log = written(tmp_path, inotify, b"one\ntwo\n", packed((10, 4)), ended=False)
    before = time.time_ns()
    first, (data, ns) = await read(log)
    assert (first, data) == ((b"one\n", 10), b"two\n")
    assert ns is not None and before <= ns <= time.time_ns()


async def test_records_that_come_later_are_seen(tmp_path: Path, inotify: Inotify) -> None:
    """A follower reads the records that are appended behind those it has read; nothing stays open."""
    before = len(os.listdir("/proc/self/fd"))
    log = written(tmp_path, inotify, b"one\n", packed((10, 4)), ended=False)
    pieces = follow_with_times(log)
    assert await anext(pieces) == (b"one\n", 10)
    with (tmp_path / "times").open("ab") as times, (tmp_path / "output").open("ab") as output:
        times.write(packed((20, 8)))
        times.flush()
        output.write(b"two\n")
    assert await anext(pieces) == (b"two\n", 20)
    log.mark_ended()
    assert [piece async for piece in pieces] == []
    assert len(os.listdir("/proc/self/fd")) == before
