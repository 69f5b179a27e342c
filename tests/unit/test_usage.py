"""The history of a job's usage in its file, and snapshots of what many use."""

import asyncio
import itertools
import os
import struct
import time
from collections.abc import Sequence
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from google.protobuf.duration_pb2 import Duration

from pjw.errors import InvalidJobError
from pjw.model import Job, JobState, Limits, UsageSample
from pjw.server import usage as server_usage
from pjw.server.usage import UsageWatchers
from pjw.v1 import job_worker_pb2 as pb
from pjw.worker.usage import SAMPLES_MAX, append_sample, interval_seconds, read_samples

BEGAN = datetime(2026, 5, 17, 12, 0, 0, 123_456, UTC)


def sample(second: float) -> UsageSample:
    """One that is told from all others."""
    number = int(second)
    return UsageSample(
        BEGAN + timedelta(seconds=second), number, 2**40 + number, number * 2, number * 3, number % 7
    )


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Where the history is."""
    return str(tmp_path / "usage")


def seconds_of(samples: Sequence[UsageSample]) -> list[float]:
    """When they were taken, after the beginning."""
    return [(each.time - BEGAN).total_seconds() for each in samples]


def test_what_is_written_is_read(path: str) -> None:
    """To the microsecond, and all that a sample has; without a file there is none."""
    assert read_samples(path) == []
    samples = [sample(second) for second in range(1, 11)]
    for each in samples:
        append_sample(path, each)
    assert read_samples(path) == samples
    assert os.stat(path).st_mode & 0o7777 == 0o600


def test_a_life_of_any_length_fits(path: str) -> None:
    """From second to year: at most so many samples, of all of the life, the newest always there."""
    second = 0.0
    while second < 300 * 24 * 3600:
        second += interval_seconds(second)
        append_sample(path, sample(second))
        assert os.stat(path).st_size <= SAMPLES_MAX * 48
    seconds = seconds_of(read_samples(path))
    assert seconds[-1] == second
    assert len(seconds) > SAMPLES_MAX / 2
    steps = [later - earlier for earlier, later in itertools.pairwise(seconds)]
    # even, all along
    assert seconds[0] <= max(steps) <= 2 * min(steps)


@pytest.mark.parametrize(("age", "interval"), [(0, 1), (255, 1), (256, 2), (511, 2), (512, 4), (86_400, 512)])
def test_samples_are_further_apart_the_older_a_job_is(age: int, interval: int) -> None:
    """The interval doubles whenever so many of them would not hold the life."""
    assert interval_seconds(age) == interval


def test_what_a_crash_leaves_is_passed_over(path: str) -> None:
    """A sample cut short, zeros of a power cut, a clock that was set back; the next one is kept."""
    for second in (1, 2):
        append_sample(path, sample(second))
    with open(path, "ab") as file:
        file.write(b"\1" * 20)
    assert seconds_of(read_samples(path)) == [1, 2]
    append_sample(path, sample(3))
    assert seconds_of(read_samples(path)) == [1, 2, 3]
    with open(path, "ab") as file:
        file.write(bytes(96))
        file.write(struct.pack("<6q", -1, 0, 0, 0, 0, 0))
    append_sample(path, sample(2.5))
    append_sample(path, sample(4))
    assert seconds_of(read_samples(path)) == [1, 2, 3, 4]


def test_a_crash_between_two_steps_of_thinning(path: str) -> None:
    """The kept half is in front of what was not cut off yet: each sample is shown once."""
    for second in range(1, SAMPLES_MAX + 1):
        append_sample(path, sample(second))
    whole = Path(path).read_bytes()
    append_sample(path, sample(SAMPLES_MAX + 1))
    thinned = Path(path).read_bytes()[:-48]
    Path(path).write_bytes(thinned + whole[len(thinned) :])
    seconds = seconds_of(read_samples(path))
    assert seconds == [float(second) for second in range(2, SAMPLES_MAX + 1, 2)]


# --- snapshots


class Fake:
    """A worker with some jobs; knows how often it was asked."""

    def __init__(self, count: int, command: str = "true", labels: dict[str, str] | None = None) -> None:
        self.asked: list[tuple[str | None, float, float]] = []
        now = datetime.now(UTC)
        self.usages = [
            (
                Job(number, "alice", command, JobState.RUNNING, Limits(), now, labels=labels or {}),
                sample(number) if number % 2 else None,
            )
            for number in range(1, count + 1)
        ]

    async def usage_now(
        self, owner: str | None, fresh: float, within: float
    ) -> list[tuple[Job, UsageSample | None]]:
        """All of them."""
        self.asked.append((owner, fresh, within))
        return self.usages

    async def queued_now(self, owner: str | None, most: int) -> tuple[int, list[Job]]:
        """None."""
        del owner, most
        return 0, []


async def first(fake: Fake, request: pb.WatchUsageRequest | None = None) -> pb.WatchUsageResponse:
    """The first snapshot."""
    watchers = UsageWatchers(fake)  # type: ignore[arg-type]
    async with aclosing(watchers.watch(request or pb.WatchUsageRequest(), "alice")) as snapshots:
        return await anext(snapshots)


async def test_a_snapshot_has_every_job() -> None:
    """With its sample, or without one when it was never measured."""
    snapshot = await first(Fake(3))
    assert [each.job.id for each in snapshot.jobs] == [1, 2, 3]
    assert [each.HasField("sample") for each in snapshot.jobs] == [True, False, True]
    assert snapshot.jobs[2].sample.memory_bytes == 2**40 + 3
    assert (await first(Fake(0))) == pb.WatchUsageResponse()


@pytest.mark.parametrize("count", [1, 100, 1000, 10_000])
async def test_a_snapshot_fits_into_a_message(count: int) -> None:
    """However long commands and labels are, in four bytes a character."""
    labels = {f"k{number}": "\N{CJK UNIFIED IDEOGRAPH-20000}" * 255 for number in range(32)}
    snapshot = await first(Fake(count, "\N{CJK UNIFIED IDEOGRAPH-20000}" * 100_000, labels))
    assert len(snapshot.jobs) == count
    assert all(each.job.command and not each.job.labels for each in snapshot.jobs)
    assert snapshot.ByteSize() < 4 * 1024 * 1024 - 1024


async def test_what_is_short_is_not_cut() -> None:
    """Commands and labels as they were given."""
    snapshot = await first(Fake(1000, "make test", {"team": "a"}))
    assert {(each.job.command, each.job.labels["team"]) for each in snapshot.jobs} == {("make test", "a")}


@pytest.fixture
async def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """For how long it was waited; no time passes."""
    found: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        if seconds:
            found.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", note)
    return found


@pytest.mark.parametrize(("asked", "kept"), [(None, 2.0), (1.0, 1.0), (60.0, 60.0), (1.5, 1.5)])
async def test_an_interval_is_kept(slept: list[float], asked: float | None, kept: float) -> None:
    """As it was asked for; samples of others that are half as old will do."""
    fake, request = Fake(1), pb.WatchUsageRequest()
    if asked is not None:
        request.interval.FromNanoseconds(int(asked * 1e9))
    watchers = UsageWatchers(fake)  # type: ignore[arg-type]
    async with aclosing(watchers.watch(request, None)) as snapshots:
        for _ in range(3):
            await anext(snapshots)
    assert all(kept - 0.2 < seconds <= kept for seconds in slept)
    assert len(slept) == 2
    assert fake.asked[0] == (None, kept / 2, server_usage.FIRST_SECONDS)
    assert fake.asked[1:] == [(None, kept / 2, kept)] * 2


async def test_many_jobs_and_many_watchers_cost_no_more(
    slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where messages take long to make, they are further apart: a twentieth of a processor for all."""
    ticks = itertools.count()
    # each part of a message takes a second
    monkeypatch.setattr(time, "thread_time", lambda: float(next(ticks)))
    fake = Fake(10_000)
    watchers = UsageWatchers(fake)  # type: ignore[arg-type]
    async with aclosing(watchers.watch(pb.WatchUsageRequest(interval=Duration(seconds=1)), None)) as one:
        await anext(one)
        await anext(one)
        alone = slept[-1]
        async with aclosing(watchers.watch(pb.WatchUsageRequest(), None)) as two:
            await anext(two)
            await anext(one)
            assert slept[-1] > 1.3 * alone > 1.3
    # and the next one is alone again
    async with aclosing(watchers.watch(pb.WatchUsageRequest(interval=Duration(seconds=1)), None)) as later:
        await anext(later)
        await anext(later)
        assert slept[-1] < 1.1 * alone


@pytest.mark.parametrize("seconds", [0, 0.999, 60.001, -1, 3e9])
async def test_an_interval_that_cannot_be(seconds: float) -> None:
    """Refused in words."""
    request = pb.WatchUsageRequest(
        interval=Duration(seconds=int(seconds), nanos=int((seconds - int(seconds)) * 1e9))
    )
    with pytest.raises(InvalidJobError, match="the interval must be from 1 to 60 seconds"):
        await first(Fake(1), request)
