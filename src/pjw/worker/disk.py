"""Keeps some of the disk free: ends the largest job of the client with most, before a file system is full."""

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Container, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from pjw.amounts import size_in_words
from pjw.errors import JobStateError, LauncherGoneError, PjwError
from pjw.model import JobState
from pjw.worker.held import HeldOutputs
from pjw.worker.job import LiveJob
from pjw.worker.launcher_client import LauncherClient, readable
from pjw.worker.settings import DiskMarks, WorkerSettings
from pjw.worker.state_dir import StateDir

LOOK_SECONDS: Final = 1.0
# Seconds between counts of scratch where the operator bounds clients' stored bytes.
COUNT_SECONDS: Final = 60
# The launcher's process counts for 3 s.
_ANSWER_SECONDS: Final = 15
# When the end of a job has freed nothing for this time, another job is ended as well.
_RELIEF_SECONDS: Final = 10
# Ending a job of a client that has less than this part of the mark would be of no use.
_WORTH: Final = 100
# seconds between messages of the log about a shortage that pjwd cannot relieve
_SAY_AGAIN_SECONDS: Final = 600

log: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TreeUse:
    """The files of a job in its scratch directory, or of a client in a workspace."""

    bytes: int
    inodes: int


@dataclass(frozen=True, slots=True)
class _Shortage:
    """Too little of something (`bytes` or `inodes`) is free on a file system."""

    of: str
    free: int
    mark: int

    def __str__(self) -> str:
        return f"{self.amount(self.free)} free, less than {self.amount(self.mark)} (disk.free_{self.of}_min)"

    def amount(self, number: int) -> str:
        """Return an amount of bytes or inodes, in words."""
        return size_in_words(number) if self.of == "bytes" else f"{number} {self.of}"


class DiskSampler:
    """Samples the free space of the file systems that jobs write to, once a second while there are jobs.

    The kernel has no event for free space. Below a mark this finds the client with most scratch, and ends the
    largest of its jobs: so no client can have others' jobs ended by having many small ones.
    """

    def __init__(
        self,
        state: StateDir,
        scratch: int,
        launcher: LauncherClient,
        live: Mapping[int, LiveJob],
        used: dict[int, TreeUse],
        marks: DiskMarks,
        end: Callable[[LiveJob], None],
        held: HeldOutputs,
    ) -> None:
        """Take over the descriptor *scratch*; *used* has the last counts; *end* ends a job by force."""
        self.marks = marks
        # tells whether to count scratch also while there is enough space
        self.counts: Callable[[], bool] = lambda: False
        self._state: Final = state
        self._scratch: Final = scratch
        self._launcher: Final = launcher
        self._live: Final = live
        self._used: Final = used
        self._end: Final = end
        self._held: Final = held
        # gives a job in a workspace that makes the disk full: Workspaces.growing
        self.growing: Callable[[str, int, int, Container[int]], Awaitable[int | None]] = _nobody
        self._begun: Final = asyncio.Event()
        self._counted_at = float("-inf")
        self._said_at = float("-inf")

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._scratch)

    def job_began(self) -> None:
        """Note that there is a job to look after."""
        self._begun.set()

    def reconfigure(self, settings: WorkerSettings) -> None:
        """Apply the marks of other settings from the next look on."""
        self.marks = settings.disk

    async def run(self) -> None:
        """Look for ever."""
        for live in list(self._live.values()):
            # an end that a worker before us had begun
            if self._state.is_ended_for_disk(live.job.id):
                self._end(live)
        while True:
            if not self._live:
                self._begun.clear()
                await self._begun.wait()
            try:
                await self._look()
            except LauncherGoneError:
                raise
            except (PjwError, OSError) as error:
                self._say("cannot look after the free space of the disk: %s", error)
            await asyncio.sleep(LOOK_SECONDS)

    async def _look(self) -> None:
        flags = os.fstatvfs(self._state.descriptor).f_flag
        self._held.set_read_only(self, read_only=bool(flags & os.ST_RDONLY))
        self._state.store.reserve()
        for descriptor in self._file_systems():
            shortage = _shortage(os.fstatvfs(descriptor), self.marks)
            if shortage is not None:
                await self._relieve(descriptor, shortage)
                return
        if self.counts() and asyncio.get_running_loop().time() - self._counted_at > COUNT_SECONDS:
            await self._count()

    def _file_systems(self) -> Iterator[int]:
        yield self._scratch
        if not self._shared:
            yield self._state.descriptor

    @property
    def _shared(self) -> bool:
        return os.fstat(self._scratch).st_dev == os.fstat(self._state.descriptor).st_dev

    async def _relieve(self, descriptor: int, shortage: _Shortage) -> None:
        await self._count()
        freed = {job_id: self._freed(live, descriptor, shortage.of) for job_id, live in self._endable()}
        least = max(shortage.mark // _WORTH, 1)
        chosen, most = self._largest(freed, least)
        used = "" if chosen is None else shortage.amount(freed[chosen])
        if descriptor != self._scratch or self._shared:
            # Its end gives nothing back, since a workspace stays. But that one grows no more.
            in_workspace = await self.growing(shortage.of, least, most, freed)
            if in_workspace is not None:
                chosen, used = in_workspace, "a workspace that has grown"
        if chosen is None:
            self._say(
                "the file system of %s has %s, and no job uses so much of it that its end would help",
                os.readlink(f"/proc/self/fd/{descriptor}"),
                shortage,
            )
            return
        live = self._live.get(chosen)
        if live is None:
            # it has ended meanwhile
            return
        self._state.note_end_for_disk(live.job.id)
        log.warning(
            "ended job %d of %s, which used %s: the file system of %s has %s",
            live.job.id,
            live.job.client_name,
            used,
            os.readlink(f"/proc/self/fd/{descriptor}"),
            shortage,
        )
        self._end(live)
        await self._wait_for_relief(live, descriptor, shortage)

    def _largest(self, freed: Mapping[int, int], least: int) -> tuple[int | None, int]:
        """Return the largest job of the client that has most, if that is *least* or more; and its amount."""
        by_client: Counter[str] = Counter()
        for job_id, amount in freed.items():
            by_client[self._live[job_id].job.client_name] += amount
        [(client, most)] = by_client.most_common(1) or [("", 0)]
        if most < least:
            return None, most
        own = (job_id for job_id in freed if self._live[job_id].job.client_name == client)
        return max(own, key=freed.__getitem__), most

    async def _wait_for_relief(self, live: LiveJob, descriptor: int, shortage: _Shortage) -> None:
        """Wait for the removal of an ended job's files, as long as that gives something back."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_RELIEF_SECONDS):
                    await live.removed.wait()
                return
            # millions of files take minutes
            now = _shortage(os.fstatvfs(descriptor), self.marks)
            if now is None or now.of != shortage.of or now.free <= shortage.free:
                return
            shortage = now

    def _endable(self) -> list[tuple[int, LiveJob]]:
        return [
            (job_id, live)
            for job_id, live in self._live.items()
            if live.job.state in (JobState.RUNNING, JobState.STOPPING)
            and not self._state.is_ended_for_disk(job_id)
        ]

    def _freed(self, live: LiveJob, descriptor: int, what: str) -> int:
        """Return the amount that a job's end would free. Its output is kept, and no artifacts are."""
        freed = 0
        if descriptor == self._scratch:
            freed += getattr(self._used.get(live.job.id, TreeUse(0, 0)), what)
        if what == "bytes" and (descriptor != self._scratch or self._shared):
            freed += self._state.input_size(live.job) + self._state.artifacts_size(live.job)
        return freed

    def _say(self, words: str, *arguments: object) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._said_at > _SAY_AGAIN_SECONDS:
            self._said_at = now
            log.error(words, *arguments)

    async def _count(self) -> None:
        try:
            words = await self._launcher.request_scratch_use()
        except JobStateError:
            return  # one of before still counts
        try:
            os.set_blocking(words, False)
            async with asyncio.timeout(_ANSWER_SECONDS):
                text = await read_all(words)
        except TimeoutError:
            return
        finally:
            os.close(words)
        self._counted_at = asyncio.get_running_loop().time()
        self._used.clear()
        for line in text.splitlines():
            job_id, size, inodes = map(int, line.split())
            self._used[job_id] = TreeUse(size, inodes)


async def read_all(descriptor: int) -> bytes:
    """Read from a pipe that does not block, until its end."""
    chunks: list[bytes] = []
    while True:
        await readable(descriptor)
        chunk = os.read(descriptor, 65_536)
        if not chunk:
            return b"".join(chunks)
        chunks.append(chunk)


async def _nobody(*_: object) -> int | None:
    return None


def _shortage(status: os.statvfs_result, marks: DiskMarks) -> _Shortage | None:
    free, mark = marks.free_and_mark(status)
    if free < mark:
        return _Shortage("bytes", free, mark)
    mark = marks.inodes_of(status.f_files)
    # some file systems have no number of inodes
    if status.f_files and status.f_favail < mark:
        return _Shortage("inodes", status.f_favail, mark)
    return None
