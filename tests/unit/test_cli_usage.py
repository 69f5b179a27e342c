"""What a job used a second, from what it had used by then; and bars of it."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from pjw.cli.stats import nothing_at, reading, readings, stats_lines
from pjw.cli.top import bars
from pjw.model import Job, JobState, Limits, UsageSample

START = datetime(2026, 1, 1, tzinfo=UTC)


def sample(seconds: float, cpu: int = 0, memory: int = 0, read: int = 0, written: int = 0) -> UsageSample:
    """What was used so long after the start."""
    return UsageSample(START + timedelta(seconds=seconds), cpu, memory, read, written, pids=2)


def test_rates_are_of_the_time_between() -> None:
    """The first one is since the start, each other since the one before it."""
    first, second = readings(START, [sample(2, 1_000_000, 7, 10), sample(6, 5_000_000, 9, 10, 400)])
    assert (first.cpu_percent, first.memory_bytes, first.read_rate, first.write_rate) == (50, 7, 5, 0)
    assert (second.cpu_percent, second.memory_bytes, second.read_rate, second.write_rate) == (100, 9, 0, 100)


@pytest.mark.parametrize("seconds", [0, -5])
def test_a_clock_that_stood_still_or_went_back_is_no_rate(seconds: float) -> None:
    """Neither a division by zero nor a negative rate."""
    now = reading(nothing_at(START), sample(seconds, 1_000_000, 7, 10, 10))
    assert (now.cpu_percent, now.read_rate, now.write_rate, now.memory_bytes) == (0, 0, 0, 7)


def test_a_short_job_has_no_average(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not 3195 %: what was used in less than a period is no rate (U8)."""
    monkeypatch.setenv("COLUMNS", "80")
    short = Job(1, "alice", "true", JobState.EXITED, Limits(), START, START + timedelta(milliseconds=1))
    assert list(stats_lines(short, [sample(0.001, 31_950, 7)]))[1] == "CPU        32ms"
    longer = replace(short, end=START + timedelta(seconds=1))
    lines = list(
        stats_lines(longer, [sample(0.001, 31_950, 7), sample(1, 531_950, 7), sample(1.001, 540_000, 7)])
    )
    assert lines[1] == "CPU        540ms; 54 % on average, 50 of 100 % at most"


def test_a_counter_that_began_anew_is_no_rate() -> None:
    """It is smaller than before."""
    assert reading(sample(1, 5_000_000), sample(2, 1_000_000)).cpu_percent == 0


@pytest.mark.parametrize(
    ("values", "full", "shown"),
    [([], 100, ""), ([0, 0], 0, "▁▁"), ([50, 100], 100, "▅█"), ([50, 200], 100, "▃█"), ([1, 10], 0, "▁█")],
)
def test_bars_are_of_what_is_full_or_of_the_highest(values: list[float], full: float, shown: str) -> None:
    """A job below its limit does not look as if it were at it."""
    assert bars(values, full).strip() == shown
