"""Random orders of append, end and read: no byte is lost or comes twice, and nobody waits for ever."""

import asyncio
import tempfile
from contextlib import aclosing
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from pjw.output import Inotify, OutputLog, follow
from tests.support.seen import watches

DEADLINE_SECONDS = 10

# What happens, one after the other: bytes are appended, a reader joins at a part of what is there,
# reader number so-and-so takes a chunk, the event loop turns.
appends = st.tuples(st.just("append"), st.sampled_from([1, 2, 100, 65_535, 65_536, 65_537, 300_000]))
joins = st.tuples(st.just("join"), st.integers(0, 100))
takes = st.tuples(st.just("take"), st.integers(0, 5))
turns = st.tuples(st.just("turn"), st.integers(1, 3))
steps = st.lists(appends | joins | takes | turns, max_size=25)


class Story:
    """One file, its readers, and what each has got."""

    def __init__(self, path: Path, inotify: Inotify) -> None:
        self.path = path
        self.file = path.open("wb", buffering=0)
        self.log = OutputLog(str(path), inotify, ended=False)
        self.written = b""
        self.readers: list[asyncio.Task[bytes]] = []
        self.offsets: list[int] = []
        self.tickets: list[asyncio.Semaphore] = []

    def append(self, count: int) -> None:
        """Bytes of which each stretch is recognisable."""
        begin = len(self.written)
        data = bytes((begin + i) * 2654435761 >> 13 & 255 for i in range(min(count, 1000)))
        data = (data * (count // len(data) + 1))[:count]
        self.written += data
        self.file.write(data)

    def join(self, percent: int) -> None:
        """A reader that takes a chunk for each ticket, and everything once the end was said."""
        offset = len(self.written) * percent // 100
        tickets = asyncio.Semaphore(0)
        self.offsets.append(offset)
        self.tickets.append(tickets)
        self.readers.append(asyncio.ensure_future(self._read(offset, tickets)))

    async def _read(self, offset: int, tickets: asyncio.Semaphore) -> bytes:
        got = []
        async with aclosing(follow(self.log, offset)) as chunks:
            async for chunk in chunks:
                got.append(chunk)
                await tickets.acquire()
        return b"".join(got)

    async def end(self) -> None:
        """Say the end, let every reader run, and compare."""
        self.log.mark_ended()
        for tickets in self.tickets:
            for _ in range(1000):
                tickets.release()
        async with asyncio.timeout(DEADLINE_SECONDS):
            results = await asyncio.gather(*self.readers)
        self.file.close()
        assert results == [self.written[offset:] for offset in self.offsets]


async def play(story: list[tuple[str, int]]) -> None:
    """Carry the steps out."""
    inotify = Inotify()
    with tempfile.TemporaryDirectory() as directory:
        told = Story(Path(directory) / "output", inotify)
        for verb, number in story:
            match verb:
                case "append":
                    told.append(number)
                case "join":
                    told.join(number)
                case "take" if told.tickets:
                    told.tickets[number % len(told.tickets)].release()
                case "turn":
                    for _ in range(number):
                        await asyncio.sleep(0)
        await told.end()
        assert watches(Path(directory) / "output") == 0
    inotify.close()


# a story has its own deadline, and a busy machine is late
@settings(deadline=None)
@given(steps)
def test_any_order(story: list[tuple[str, int]]) -> None:
    """Every reader has exactly what was written from its offset on, whatever happened when."""
    asyncio.run(play(story))
