"""follow(): a real file, real inotify, one reader or many."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing, suppress
from pathlib import Path

import pytest

from pjw.errors import KernelError, OffsetError, OutputLostError, WorkerClosedError
from pjw.output import FramePrefix, Inotify, OutputLog, follow
from pjw.output.follower import CHUNK_BYTES_MAX, CHUNK_BYTES_MIN
from pjw.output.log import SHARED_BYTES_MAX, Piece, read_at
from tests.support.seen import kept_by, watches

DEADLINE_SECONDS = 10


class Growing:
    """An output file that a test appends to, and its log."""

    def __init__(self, path: Path, inotify: Inotify) -> None:
        self.file = path.open("wb", buffering=0)
        self.path = path
        self.inotify = inotify
        self.log = OutputLog(str(path), inotify, ended=False)

    def append(self, data: bytes) -> None:
        """Write as init does: at the end, at once."""
        self.file.write(data)


@pytest.fixture
async def inotify() -> AsyncIterator[Inotify]:
    """The one instance."""
    inotify = Inotify()
    yield inotify
    inotify.close()


@pytest.fixture
async def growing(tmp_path: Path, inotify: Inotify) -> AsyncIterator[Growing]:
    """An empty output file."""
    growing = Growing(tmp_path / "output", inotify)
    yield growing
    growing.file.close()


async def read(log: OutputLog, offset: int = 0) -> bytes:
    """Everything until the end."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        return b"".join([chunk async for chunk in follow(log, offset)])


def descriptors(path: Path) -> int:
    """How often this process reads a file: threads of earlier tests may close others at any moment."""
    found = 0
    for name in os.listdir("/proc/self/fdinfo"):
        with suppress(FileNotFoundError):
            flags = Path(f"/proc/self/fdinfo/{name}").read_text().split()[3]
            reads = int(flags, 8) & os.O_ACCMODE == os.O_RDONLY
            found += reads and os.readlink(f"/proc/self/fd/{name}") == str(path)
    return found


def pieces(growing: Growing) -> int:
    """How many chunks a log keeps for its followers."""
    return sum(isinstance(each, Piece) for each in kept_by(growing.log))


async def test_an_ended_file(tmp_path: Path, inotify: Inotify) -> None:
    """All of it from any offset, then the end; without a watch."""
    (tmp_path / "output").write_bytes(b"0123456789")
    log = OutputLog(str(tmp_path / "output"), inotify, ended=True)
    for offset in range(11):
        assert await read(log, offset) == b"0123456789"[offset:]
        assert watches(tmp_path / "output") == 0


@pytest.mark.parametrize("offset", [-1, 11, 2**63 - 1, 2**63, 2**70, -(2**63)])
async def test_an_offset_beyond(tmp_path: Path, inotify: Inotify, offset: int) -> None:
    """An error that says how much there is, whether the output has ended or not; nothing stays open."""
    (tmp_path / "output").write_bytes(b"0123456789")
    for ended in (True, False):
        log = OutputLog(str(tmp_path / "output"), inotify, ended=ended)
        with pytest.raises(OffsetError, match=f"from byte {offset}: it has 10 bytes"):
            await read(log, offset)
    assert descriptors(tmp_path / "output") == 0
    assert watches(tmp_path / "output") == 0


async def test_a_file_that_was_cut_short_has_no_clean_end(growing: Growing) -> None:
    """Its readers get what is left, then an error: init notes in the mode that bytes are gone."""
    growing.append(b"left")
    growing.path.chmod(0o700)
    growing.log.mark_ended()
    for present_only in (False, True):
        chunks = follow(growing.log, present_only=present_only)
        assert await anext(chunks) == b"left"
        with pytest.raises(OutputLostError, match="was cut short; 4 bytes are left"):
            await anext(chunks)


async def test_a_reader_whose_bytes_were_cut_off_is_told_at_once(growing: Growing) -> None:
    """It would wait for bytes at an offset that belongs to others now."""
    growing.append(b"0123456789")
    async with asyncio.timeout(DEADLINE_SECONDS), aclosing(follow(growing.log)) as chunks:
        assert await anext(chunks) == b"0123456789"
        os.truncate(growing.path, 3)
        with pytest.raises(OutputLostError, match="3 bytes are left"):
            await anext(chunks)


async def test_a_head_before_each_chunk(
    tmp_path: Path, inotify: Inotify, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made from how many bytes there are, whether they were in the page cache or on a slow disk."""
    (tmp_path / "output").write_bytes(b"x" * (CHUNK_BYTES_MIN + 10))
    log = OutputLog(str(tmp_path / "output"), inotify, ended=True)

    async def chunks() -> list[bytes]:
        return [chunk async for chunk in follow(log, 0, lambda count: b"%d:" % count)]

    wanted = [b"%d:" % count + b"x" * count for count in (CHUNK_BYTES_MIN, 10)]
    assert await chunks() == wanted

    def not_cached(*_: object) -> int:
        raise BlockingIOError(errno.EAGAIN, "not in the page cache")

    monkeypatch.setattr(os, "preadv", not_cached)
    assert await chunks() == wanted


async def test_a_missing_file(tmp_path: Path, inotify: Inotify) -> None:
    """A typed error that names the job, and nothing stays open."""
    log = OutputLog(str(tmp_path / "7" / "output"), inotify, ended=False)
    with pytest.raises(KernelError, match="cannot open the output of job 7: "):
        await read(log)
    assert not any(isinstance(each, asyncio.Event) for each in kept_by(log))


async def test_bytes_come_one_by_one(growing: Growing) -> None:
    """Each is delivered before the next is written: no byte waits for a timer or for more."""
    async with asyncio.timeout(DEADLINE_SECONDS), aclosing(follow(growing.log)) as chunks:
        for number in range(200):
            growing.append(bytes([number]))
            assert await anext(chunks) == bytes([number])


async def test_a_silent_file_wakes_nobody(growing: Growing, monkeypatch: pytest.MonkeyPatch) -> None:
    """While nothing is written a follower reads nothing: it waits for the kernel, not for a clock."""
    reads = 0

    async def counted(descriptor: int, offset: int, count: int, head: FramePrefix) -> tuple[int, bytes]:
        nonlocal reads
        reads += 1
        return await read_at(descriptor, offset, count, head)

    monkeypatch.setattr("pjw.output.follower.read_at", counted)
    reading = asyncio.ensure_future(read(growing.log))
    # long enough for the timers that others have been seen to poll with (50 and 200 ms)
    await asyncio.wait({reading}, timeout=0.5)
    assert (reads, reading.done()) == (1, False)
    growing.log.mark_ended()
    assert await reading == b""


async def test_the_last_bytes_before_the_end(growing: Growing) -> None:
    """What is written just before the end is said is delivered, although no event of it was read yet."""
    for number in range(50):
        log = OutputLog(str(growing.path), growing.inotify, ended=False)
        start = growing.path.stat().st_size
        reading = asyncio.ensure_future(read(log, start))
        for _ in range(number % 7):
            await asyncio.sleep(0)
        growing.append(b"last words")
        log.mark_ended()
        assert await reading == b"last words"


async def test_a_write_between_read_and_wait(growing: Growing, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lost wake-up: bytes that come just after a read found nothing are not left lying."""
    words = [b"one"]

    async def read_then_write(
        descriptor: int, offset: int, count: int, head: FramePrefix
    ) -> tuple[int, bytes]:
        got, chunk = await read_at(descriptor, offset, count, head)
        if not got and words:
            growing.append(words.pop())
            growing.log.mark_ended()
        return got, chunk

    monkeypatch.setattr("pjw.output.follower.read_at", read_then_write)
    assert await read(growing.log) == b"one"


async def test_a_write_between_look_and_wait(growing: Growing) -> None:
    """The same, where the size has said that all was read, and the reader took its time with that."""
    async with asyncio.timeout(DEADLINE_SECONDS), aclosing(follow(growing.log)) as chunks:
        with growing.log.changes() as changed:
            for word in (b"one", b"two", b"three"):
                changed.clear()
                growing.append(word)
                await changed.wait()
                assert await anext(chunks) == word


async def test_a_line_is_read_once_for_all(growing: Growing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its followers share one piece of memory; one that wants another head has its own."""
    reads: list[int] = []

    async def counted(descriptor: int, offset: int, count: int, head: FramePrefix) -> tuple[int, bytes]:
        reads.append(offset)
        return await read_at(descriptor, offset, count, head)

    monkeypatch.setattr("pjw.output.follower.read_at", counted)
    async with asyncio.timeout(DEADLINE_SECONDS), AsyncExitStack() as stack:
        several = [await stack.enter_async_context(aclosing(follow(growing.log))) for _ in range(20)]
        for line in (b"one\n", b"two\n"):
            wanted = [asyncio.ensure_future(anext(chunks)) for chunks in several]
            await asyncio.sleep(0)
            reads.clear()
            growing.append(line)
            first, *others = await asyncio.gather(*wanted)
            assert first == line
            assert all(chunk is first for chunk in others)
            assert len(reads) == 1
        headed = await stack.enter_async_context(
            aclosing(follow(growing.log, 4, lambda count: b"%d:" % count))
        )
        assert await anext(headed) == b"4:two\n"
        present = follow(growing.log, 4, present_only=True)
        growing.append(b"three\n")
        assert [chunk async for chunk in present] == [b"two\nthree\n"]
    assert pieces(growing) == 0


async def test_a_line_is_shared_until_the_next_change(growing: Growing) -> None:
    """Who took its size for the end after that would wait for ever."""
    growing.append(b"one")
    async with asyncio.timeout(DEADLINE_SECONDS), aclosing(follow(growing.log)) as early:
        with growing.log.changes() as changed:
            assert await anext(early) == b"one"
            growing.append(b"two")
            await changed.wait()
            async with aclosing(follow(growing.log)) as late:
                assert await anext(late) == b"onetwo"


async def test_what_is_larger_than_a_line_is_not_kept(growing: Growing) -> None:
    """Nor is a line that one follower alone reads: the page cache has both."""
    async with asyncio.timeout(DEADLINE_SECONDS), aclosing(follow(growing.log)) as one:
        growing.append(b"x")
        assert await anext(one) == b"x"
        assert pieces(growing) == 0
        async with aclosing(follow(growing.log, 1)) as other:
            growing.append(bytes(SHARED_BYTES_MAX + 1))
            assert [len(await anext(chunks)) for chunks in (one, other)] == [SHARED_BYTES_MAX + 1] * 2
            assert pieces(growing) == 0


async def test_a_wake_up_during_a_read(growing: Growing, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other lost wake-up: news of bytes that a slow read did not see, come before it returns."""
    appended = False

    async def slow(descriptor: int, offset: int, count: int, head: FramePrefix) -> tuple[int, bytes]:
        nonlocal appended
        got, chunk = await read_at(descriptor, offset, count, head)
        if not got and not appended:
            appended = True
            with growing.log.changes() as changed:
                growing.append(b"unseen")
                await changed.wait()
        return got, chunk

    monkeypatch.setattr("pjw.output.follower.read_at", slow)
    async with asyncio.timeout(DEADLINE_SECONDS), aclosing(follow(growing.log)) as chunks:
        assert await anext(chunks) == b"unseen"


async def test_an_offset_is_not_scanned_to(tmp_path: Path, inotify: Inotify) -> None:
    """The end of a terabyte of nothing comes at once: no byte before the offset is read."""
    path = tmp_path / "output"
    with path.open("wb") as file:
        file.truncate(2**40)
        file.seek(2**40)
        file.write(b"tail")
    log = OutputLog(str(path), inotify, ended=True)
    assert await read(log, 2**40) == b"tail"


async def test_many_followers(growing: Growing) -> None:
    """50 readers at 50 offsets share one watch and get the same bytes; it ends with the last of them."""
    growing.append(bytes(range(50)))
    readers = [asyncio.ensure_future(read(growing.log, offset)) for offset in range(50)]
    await asyncio.sleep(0)
    assert watches(growing.path) == 1
    for number in range(100):
        growing.append(b"%d\n" % number)
        await asyncio.sleep(0)
    growing.log.mark_ended()
    whole = growing.path.read_bytes()
    assert await asyncio.gather(*readers) == [whole[offset:] for offset in range(50)]
    assert watches(growing.path) == 0


async def test_a_stalled_follower(growing: Growing) -> None:
    """One that does not ask gets what it missed later, in chunks no larger than the largest."""
    async with aclosing(follow(growing.log)) as chunks:
        growing.append(b"first")
        assert await anext(chunks) == b"first"
        for number in range(64):
            growing.append(bytes([number]) * 65_536)
        growing.log.mark_ended()
        rest = [chunk async for chunk in chunks]
    assert b"".join(rest) == b"".join(bytes([number]) * 65_536 for number in range(64))
    assert max(len(chunk) for chunk in rest) <= CHUNK_BYTES_MAX


async def test_chunks_grow_for_a_reader_that_keeps_up(
    tmp_path: Path, inotify: Inotify, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the smallest to the largest, and back to the smallest after a pause."""
    monkeypatch.setattr("pjw.output.follower.KEEPS_UP_SECONDS", 3600)
    (tmp_path / "output").write_bytes(bytes(4 * 1024 * 1024))
    log = OutputLog(str(tmp_path / "output"), inotify, ended=True)
    async with aclosing(follow(log)) as chunks:
        sizes = [len(await anext(chunks)) for _ in range(4)]
        assert sizes == [CHUNK_BYTES_MIN, CHUNK_BYTES_MIN * 2, CHUNK_BYTES_MAX, CHUNK_BYTES_MAX]
        # whatever time it took is a pause now
        monkeypatch.setattr("pjw.output.follower.KEEPS_UP_SECONDS", -1)
        assert len(await anext(chunks)) == CHUNK_BYTES_MIN


async def test_a_cancelled_follower(growing: Growing) -> None:
    """It gives back its descriptor and the watch; others go on."""
    one, other = (asyncio.ensure_future(read(growing.log)) for _ in range(2))
    await asyncio.sleep(0)
    assert descriptors(growing.path) == 2
    one.cancel()
    await asyncio.gather(one, return_exceptions=True)
    assert descriptors(growing.path) == 1
    assert watches(growing.path) == 1
    growing.append(b"for the other")
    growing.log.mark_ended()
    assert await other == b"for the other"
    assert descriptors(growing.path) == 0
    assert watches(growing.path) == 0


async def test_an_abandoned_log(growing: Growing) -> None:
    """When the worker closes, a follower gets what is there and an error: no clean end, no silence."""
    got = []

    async def collect() -> None:
        async for chunk in follow(growing.log):
            got.append(chunk)  # noqa: PERF401  # what came before the error counts

    reading = asyncio.ensure_future(collect())
    await asyncio.sleep(0)
    growing.append(b"words")
    growing.log.abandon()
    async with asyncio.timeout(DEADLINE_SECONDS):
        with pytest.raises(WorkerClosedError):
            await reading
    assert got == [b"words"]


async def test_lost_events(growing: Growing, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the kernel's queue overflows it says so, and every follower looks again."""
    chunks = follow(growing.log)
    reading = asyncio.ensure_future(anext(chunks))
    await asyncio.sleep(0)
    overflow = b"\xff\xff\xff\xff" + (0x4000).to_bytes(4, "little") + bytes(8)
    take, lost = os.read, list[bytes]()

    def lose(descriptor: int, count: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{descriptor}") != "anon_inode:inotify":
            return take(descriptor, count)
        lost.append(take(descriptor, count))
        return overflow

    monkeypatch.setattr(os, "read", lose)
    growing.append(b"unseen")
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert await reading == b"unseen"
    assert len(lost) == 1
    await chunks.aclose()


async def test_two_logs_of_one_instance(tmp_path: Path, inotify: Inotify) -> None:
    """A change of one file wakes the followers of that file alone."""
    one, other = (Growing(tmp_path / name, inotify) for name in ("one", "other"))
    with one.log.changes() as one_changed, other.log.changes() as other_changed:
        one.append(b"x")
        async with asyncio.timeout(DEADLINE_SECONDS):
            await one_changed.wait()
        assert not other_changed.is_set()
    one.file.close()
    other.file.close()


async def test_a_follower_that_outlives_the_instance(tmp_path: Path) -> None:
    """An end of a watch after the instance was closed touches no other file's descriptor."""
    inotify = Inotify()
    growing = Growing(tmp_path / "output", inotify)
    reading = asyncio.ensure_future(read(growing.log))
    await asyncio.sleep(0)
    inotify.close()
    reading.cancel()
    (result,) = await asyncio.gather(reading, return_exceptions=True)
    assert isinstance(result, asyncio.CancelledError)
    growing.file.close()


def test_event_loops_in_several_threads(tmp_path: Path) -> None:
    """Each reads its own bytes, though all of them read at the same moment."""
    size = 64 * CHUNK_BYTES_MAX

    async def read_own(name: str) -> bytes:
        inotify = Inotify()
        try:
            return await read(OutputLog(str(tmp_path / name), inotify, ended=True))
        finally:
            inotify.close()

    names = ["a", "b", "c", "d"]
    for name in names:
        (tmp_path / name).write_bytes(name.encode() * size)
    with ThreadPoolExecutor(len(names)) as threads:
        for name, data in zip(
            names, threads.map(lambda name: asyncio.run(read_own(name)), names), strict=True
        ):
            assert data == name.encode() * size


async def test_the_present_alone(growing: Growing) -> None:
    """What is written after the call does not lengthen it, and nothing is waited for."""
    growing.append(b"one\ntwo\n")
    chunks = follow(growing.log, 4, present_only=True)
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert await anext(chunks) == b"two\n"
        growing.append(b"three\n")
        assert [chunk async for chunk in chunks] == []
        assert [chunk async for chunk in follow(growing.log, 14, present_only=True)] == []


async def test_a_file_that_grows_faster_than_it_is_read(growing: Growing) -> None:
    """The end of what was there is the end, in the middle of a chunk as well."""
    growing.append(bytes(100_000))
    size = 0
    async with asyncio.timeout(DEADLINE_SECONDS):
        async for chunk in follow(growing.log, present_only=True):
            size += len(chunk)
            if size <= 1_000_000:
                growing.append(bytes(100_000))
    assert size == 100_000
