"""Where the last lines of an output begin: as tail(1) says, in blocks, without holding others up."""

import asyncio
import random
import subprocess
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pjw.output import Inotify, OutputLog, start_of_tail
from pjw.output import tail as tail_module
from pjw.output.log import read_at


@pytest.fixture
async def inotify() -> AsyncIterator[Inotify]:
    """The one instance."""
    inotify = Inotify()
    yield inotify
    inotify.close()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that are smaller than most lines."""
    monkeypatch.setattr(tail_module, "BLOCK_BYTES", 7)


def expected(data: bytes, lines: int, offset: int) -> int:
    """By splitting it all."""
    kept = data[offset:].splitlines(keepends=True)
    return offset + sum(map(len, kept[: max(0, len(kept) - lines)]))


@pytest.mark.usefixtures("small_blocks")
async def test_any_output(tmp_path: Path, inotify: Inotify) -> None:
    """The same place as when all of it is split into lines."""
    numbers, path = random.Random(7), tmp_path / "output"
    parts = [b"\n", b"a", b"bc", b"0123456789", b"\n\n"]
    for _ in range(2_000):
        data = b"".join(numbers.choices(parts, k=numbers.randrange(30)))
        lines, offset = numbers.randrange(12), numbers.choice([0, numbers.randrange(len(data) + 1)])
        path.write_bytes(data)
        start = await start_of_tail(OutputLog(str(path), inotify, ended=True), lines, offset)
        assert start == expected(data, lines, offset), (data, lines, offset)


@pytest.mark.parametrize("lines", [0, 1, 2, 10, 99_999, 100_000, 100_001, 2**62])
async def test_as_tail_does(tmp_path: Path, inotify: Inotify, lines: int) -> None:
    """The bytes from there on are those that tail(1) prints; the last line has no end."""
    path = tmp_path / "output"
    path.write_bytes(b"".join(b"line %d\n" % n for n in range(100_000)) + b"open")
    start = await start_of_tail(OutputLog(str(path), inotify, ended=True), lines)
    command = ["tail", "-n", str(lines), str(path)]
    told = subprocess.run(command, capture_output=True, check=True).stdout  # noqa: ASYNC221  nobody waits
    assert path.read_bytes()[start:] == told


async def test_a_gap_in_the_page_cache(
    tmp_path: Path, inotify: Inotify, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read ends there, before the block does: what is behind it counts all the same."""
    path = tmp_path / "output"

    async def cut(descriptor: int, offset: int, count: int) -> tuple[int, bytes]:
        return await read_at(descriptor, offset, min(count, 4096))

    monkeypatch.setattr(tail_module, "read_at", cut)
    data = b"".join(b"line %d\n" % n for n in range(2_000))
    path.write_bytes(data)
    start = await start_of_tail(OutputLog(str(path), inotify, ended=True), 3)
    assert data[start:] == b"line 1997\nline 1998\nline 1999\n"


async def test_many_who_look_hold_others_up_no_longer_than_one(
    tmp_path: Path, inotify: Inotify, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a turn of the event loop one block is read, however many look for lines that are not there."""
    path, turns = tmp_path / "output", asyncio.Lock()
    path.write_bytes(bytes(40 * 7))
    turn, reads = 0, Counter[int]()

    async def counted(descriptor: int, offset: int, count: int) -> tuple[int, bytes]:
        reads[turn] += 1
        return await read_at(descriptor, offset, count)

    monkeypatch.setattr(tail_module, "BLOCK_BYTES", 7)
    monkeypatch.setattr(tail_module, "read_at", counted)
    log = OutputLog(str(path), inotify, ended=True)
    looking = [asyncio.ensure_future(start_of_tail(log, 3, turns=turns)) for _ in range(20)]
    while not all(each.done() for each in looking):
        await asyncio.sleep(0)
        turn += 1
    # all of them begin in the first turn
    assert (reads.pop(0), max(reads.values()), sum(reads.values())) == (20, 1, 20 * 39)
    assert [each.result() for each in looking] == [0] * 20


@pytest.mark.parametrize("number", [1, 2, 77, 100_000, 131_072, 262_143])
async def test_a_block_of_newlines(tmp_path: Path, inotify: Inotify, number: int) -> None:
    """Each of them may be the one."""
    path = tmp_path / "output"
    path.write_bytes(b"\n" * 262_144)
    assert await start_of_tail(OutputLog(str(path), inotify, ended=True), number) == 262_144 - number


async def test_an_offset_beyond_the_end_is_left_to_the_reader(tmp_path: Path, inotify: Inotify) -> None:
    """It gives it back, and so does a negative one: who reads from there is told."""
    (tmp_path / "output").write_bytes(b"1\n2\n")
    log = OutputLog(str(tmp_path / "output"), inotify, ended=True)
    assert [await start_of_tail(log, 1, offset) for offset in (-1, 5)] == [-1, 5]


@pytest.mark.usefixtures("small_blocks")
async def test_others_have_their_turn(tmp_path: Path, inotify: Inotify) -> None:
    """A search through all of a long output does not hold the event loop up."""
    (tmp_path / "output").write_bytes(b"x" * 7_000)
    search = asyncio.ensure_future(start_of_tail(OutputLog(str(tmp_path / "output"), inotify, ended=True), 5))
    turns = 0
    while not search.done():
        await asyncio.sleep(0)
        turns += 1
    assert (search.result(), turns >= 1_000) == (0, True)
