"""The file of an input, and who may write to it: one at a time, however calls come, go and are cancelled."""

import asyncio
import fcntl
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pjw.errors import InvalidJobError, JobStateError, LauncherGoneError, LimitReachedError, OffsetError
from pjw.worker.input import Inputs, InputWriter
from pjw.worker.quota import StoredBytes
from pjw.worker.settings import Quotas
from tests.support.seen import texts_kept_by


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """An input with its reader."""
    path = tmp_path / "input"
    path.write_bytes(b"")
    path.chmod(0o600)
    with path.open("rb") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        yield path


def inputs_of(bytes_max: int = 0) -> Inputs:
    """As a worker has them, without quotas."""
    nothing: Any = None
    return Inputs(StoredBytes(nothing, {}, {}, Quotas()), bytes_max)


async def never() -> None:
    """The end of a job that goes on."""
    await asyncio.Event().wait()


async def test_what_is_there_is_passed_over(path: Path) -> None:
    """Any overlap, and nothing twice."""
    async with inputs_of().writer_of("job 1", str(path), "alice", never) as writer:
        await writer.write(0, b"abc")
        await writer.write(1, b"bcd")
        await writer.write(0, b"ab")
        await writer.write(4, b"e", end=True)
        await writer.write(0, b"abcde", end=True)
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"abcde", 0o400)


@pytest.mark.parametrize(
    ("offset", "data", "end", "error"),
    [
        (3, b"x", False, OffsetError),
        (3, b"", True, OffsetError),
        (-1, b"x", False, InvalidJobError),
        (0, b"x", True, InvalidJobError),
        (2, b"xxx", False, LimitReachedError),
    ],
)
async def test_what_is_refused_changes_nothing(
    path: Path, offset: int, data: bytes, end: bool, error: type[Exception]
) -> None:
    """A gap, no place, an end before what is there, and more than may be."""
    async with inputs_of(4).writer_of("job 1", str(path), "alice", never) as writer:
        await writer.write(0, b"ab")
        with pytest.raises(error):
            await writer.write(offset, data, end=end)
        await writer.write(2, b"cd")
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"abcd", 0o600)


async def test_too_much_names_its_key(path: Path) -> None:
    """Metrics count refusals by the limit."""
    async with inputs_of(4).writer_of("job 1", str(path), "alice", never) as writer:
        with pytest.raises(LimitReachedError) as refused:
            await writer.write(0, b"abcde")
    assert refused.value.limit == "input_bytes_max"


async def test_an_ended_input_takes_nothing(path: Path) -> None:
    """Also from a writer that comes later."""
    inputs = inputs_of()
    async with inputs.writer_of("job 1", str(path), "alice", never) as writer:
        await writer.write(0, b"ab", end=True)
    async with inputs.writer_of("job 1", str(path), "alice", never) as writer:
        assert (writer.offset, writer.ended) == (2, True)
        with pytest.raises(JobStateError, match="has ended at byte 2"):
            await writer.write(2, b"c")
    assert path.read_bytes() == b"ab"


async def test_without_a_reader_nothing_is_taken(path: Path) -> None:
    """Nobody would ever see it."""
    inputs = inputs_of()
    async with inputs.writer_of("job 1", str(path), "alice", never) as writer:
        await writer.write(0, b"a")
    with path.open("rb") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
    unread = path.with_name("unread")
    unread.write_bytes(b"")
    async with inputs_of().writer_of("job 1", str(unread), "alice", never) as writer:
        with pytest.raises(JobStateError, match="does not read its input any more"):
            await writer.write(0, b"a")
    assert unread.read_bytes() == b""


async def test_the_job_s_end_ends_the_writer(path: Path) -> None:
    """Wherever it waits; as does the end of the launcher, in its own words."""
    begun = asyncio.Event()

    async def job_ended() -> None:
        await begun.wait()

    async def launcher_gone() -> None:
        await begun.wait()
        raise LauncherGoneError("gone")

    async def write(ends: Callable[[], Awaitable[None]]) -> None:
        async with inputs_of().writer_of("job 1", str(path), "alice", ends):
            begun.set()
            await asyncio.Event().wait()

    for ends, kind in ((job_ended, JobStateError), (launcher_gone, LauncherGoneError)):
        begun.clear()
        with pytest.raises(kind):
            await write(ends)


async def test_many_writers_at_once_are_one(path: Path) -> None:
    """Of those that come in the same moment the last one writes, when the one before has let go."""
    inputs = inputs_of()
    inside: list[int] = []
    most = 0

    async def write(number: int) -> None:
        nonlocal most
        async with inputs.writer_of("job 1", str(path), "alice", never) as writer:
            inside.append(number)
            most = max(most, len(inside))
            try:
                await writer.write(writer.offset, b"x")
                if number < 9:
                    await asyncio.Event().wait()
            finally:
                inside.remove(number)

    results: list[Any] = await asyncio.gather(
        *(write(number) for number in range(10)), return_exceptions=True
    )
    assert [type(result) for result in results] == [JobStateError] * 9 + [type(None)]
    # the first one was in before there was a second
    assert (most, path.read_bytes()) == (1, b"xx")
    assert "job 1" not in texts_kept_by(inputs)


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """A disk that has begun to write (the first), and goes on when it may (the second)."""
    begun, may_go_on = threading.Event(), threading.Event()
    write: Callable[..., int] = os.write

    def slowly(descriptor: int, data: memoryview) -> int:
        begun.set()
        assert may_go_on.wait(30)
        return write(descriptor, data)

    monkeypatch.setattr("pjw.worker.input.os.write", slowly)
    yield begun, may_go_on
    may_go_on.set()


async def write_abc(inputs: Inputs, path: Path, opened: list[InputWriter]) -> None:
    """Write three bytes behind what is there, as a writer of its own, which is told of when it is open."""
    async with inputs.writer_of("job 1", str(path), "alice", never) as writer:
        opened.append(writer)
        await writer.write(writer.offset, b"abc")


async def test_a_write_is_over_before_the_next_writer_looks(
    path: Path, slow_disk: tuple[threading.Event, threading.Event]
) -> None:
    """A thread cannot be cancelled: what it writes counts, and its descriptor stays its own."""
    begun, may_go_on = slow_disk
    inputs = inputs_of()
    opened: list[InputWriter] = []

    first = asyncio.create_task(write_abc(inputs, path, opened))
    await asyncio.to_thread(begun.wait, 30)
    second = asyncio.create_task(write_abc(inputs, path, opened))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    assert (len(opened), first.done()) == (1, False)
    may_go_on.set()
    await second
    with pytest.raises(asyncio.CancelledError):
        await first
    assert (path.read_bytes(), opened[1].offset) == (b"abcabc", 6)


async def test_a_write_is_over_also_when_the_next_writer_was_cancelled(
    path: Path, slow_disk: tuple[threading.Event, threading.Event]
) -> None:
    """Whoever comes after that waits for the thread as well."""
    begun, may_go_on = slow_disk
    inputs = inputs_of()
    opened: list[InputWriter] = []

    first = asyncio.create_task(write_abc(inputs, path, opened))
    await asyncio.to_thread(begun.wait, 30)
    second = asyncio.create_task(write_abc(inputs, path, opened))
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.wait({second})
    third = asyncio.create_task(write_abc(inputs, path, opened))
    # time enough to open the file, if it could
    await asyncio.sleep(0.05)
    assert (len(opened), first.done(), third.done()) == (1, False, False)
    may_go_on.set()
    await third
    with pytest.raises(JobStateError, match="took over"):
        await first
    assert (path.read_bytes(), opened[1].offset) == (b"abcabc", 6)
    assert "job 1" not in texts_kept_by(inputs)


async def test_a_job_without_a_file_has_ended(tmp_path: Path) -> None:
    """The file goes a moment before the end is told."""
    with pytest.raises(JobStateError, match="job 1 has ended"):
        async with inputs_of().writer_of("job 1", str(tmp_path / "none"), "alice", never):
            pass
