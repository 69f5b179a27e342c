"""The usage of a job between two moments, from its totals at each of them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from pjw.model import UsageSample

# A rate over less time means nothing: the kernel grants and counts processor time in periods of this length.
PERIOD_SECONDS: Final = 0.1


@dataclass(frozen=True, slots=True)
class Reading:
    """The usage of a job up to a moment, per second; its memory and processes at that moment."""

    time: datetime
    cpu_percent: float
    memory_bytes: int
    read_rate: float
    write_rate: float
    pids: int


def reading(before: UsageSample, now: UsageSample) -> Reading:
    """Return the usage between two samples. A clock set back, or a counter begun anew, is no use."""
    seconds = (now.time - before.time).total_seconds()

    def rate(count: int) -> float:
        return max(0, count) / max(seconds, PERIOD_SECONDS) if seconds > 0 else 0.0

    return Reading(
        time=now.time,
        cpu_percent=rate(now.cpu_usage_usec - before.cpu_usage_usec) / 10_000,
        memory_bytes=now.memory_bytes,
        read_rate=rate(now.io_read_bytes - before.io_read_bytes),
        write_rate=rate(now.io_write_bytes - before.io_write_bytes),
        pids=now.pids,
    )


def readings(start: datetime, samples: Iterable[UsageSample]) -> Iterator[Reading]:
    """Yield the usage over a job's life: nothing was used when it began."""
    before = nothing_at(start)
    for sample in samples:
        yield reading(before, sample)
        before = sample


def nothing_at(start: datetime) -> UsageSample:
    """Return the sample of a job that has just begun."""
    return UsageSample(start, cpu_usage_usec=0, memory_bytes=0, io_read_bytes=0, io_write_bytes=0, pids=0)
